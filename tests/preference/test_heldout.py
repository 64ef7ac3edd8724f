"""Several sets of held-out data are measured together as if they were one set."""

import numpy as np
import pytest

from dpo_jax.objectives.pairs import Pairs, Ranking
from dpo_jax.objectives.terms import make_terms
from dpo_jax.preference.heldout import SeenPairs, measured, measurement


def pairs_of(count: int, width: int | None, seed: int, room: int = 0) -> Pairs:
    """Random pairs; with rankings of `width` completions, `room` more places for none."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(-20, 3, shape).astype(np.float32)

    sums = [draw(count) for _ in range(4)]
    ones = np.ones(count, np.float32)
    plain = {"chosen_length": 9 * ones, "rejected_length": 7 * ones, "margin": 0 * ones, "label": ones, "weight": ones}
    ranking = None
    if width is not None:
        filled = ((0, 0), (0, room))
        rank = np.tile(np.arange(width, dtype=np.int32), (count, 1))
        ranking = Ranking(
            np.pad(draw(count, width), filled),
            np.pad(draw(count, width), filled),
            np.pad(rank, filled, constant_values=-1),
        )
    return Pairs(*sums, **plain, real=np.ones(count, bool), ranking=ranking)


@pytest.mark.parametrize(("name", "widths"), [("sigmoid", (None, None)), ("plackett_luce", (3, 5))])
def test_sets_together_are_one_set(name, widths):
    measure = measurement(make_terms([{"name": name}]))
    (few, many), totals = ((5, 3), (11, 4)), {"entropy": np.asarray([6.0, 3.0])}
    sets = [SeenPairs([pairs_of(*few[:1], widths[0], few[1])], totals)]
    sets += [SeenPairs([pairs_of(*many[:1], widths[1], many[1])], {"entropy": np.asarray([1.0, 4.0])})]
    room = 0 if widths[0] is None else widths[1] - widths[0]
    one = SeenPairs([pairs_of(few[0], widths[0], few[1], room), sets[1].pairs[0]], {"entropy": np.asarray([7.0, 7.0])})
    together, alone = measured(sets[0] + sets[1], measure), measured(one, measure)
    assert together == alone and together["entropy"] == 1.0
    parts = [measured(part, measure) for part in sets]
    for metric in ("loss", "rewards/margins", "logps/chosen"):  # means over pairs, which all weigh the same
        mean = (few[0] * parts[0][metric] + many[0] * parts[1][metric]) / (few[0] + many[0])
        assert together[metric] == pytest.approx(mean, rel=1e-5, abs=1e-6)  # float32 sums in another order
    quantiles = [part["rewards/margins_p90"] for part in parts]
    assert min(quantiles) <= together["rewards/margins_p90"] <= max(quantiles)
