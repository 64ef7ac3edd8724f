"""A weighted sum of objectives over the pairs of a step, with the modifiers that change an objective from outside.

Letters: P pairs, m numbers remembered.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from dpo_jax.errors import UserError
from dpo_jax.objectives.pairs import LossOutput, Pairs, Scalar
from dpo_jax.objectives.pairwise import desensitized, policy_weights
from dpo_jax.objectives.table import OBJECTIVES, RECIPES
from dpo_jax.objectives.terms import Term, make_terms, meant_by, takes


class Progress(NamedTuple):
    """Where in a run a loss is taken: the share of the run that is done, what earlier steps left to remember, and a
    number of the seed and the step, for what a step draws at random (None draws nothing)."""

    share: Scalar = 0.0
    memory: Float[Array, " m"] | None = None
    key: UInt32[Array, ""] | None = None


START = Progress()


def objective_loss(name: str, pairs: Pairs, **settings: Any) -> LossOutput:
    """One objective of the table by name, for use on its own: unreduced losses, and the quantity that grows.

    >>> from dpo_jax import make_pairs
    >>> pairs = make_pairs(jnp.array([-8.0]), jnp.array([-18.0]), chosen_length=8, rejected_length=9)
    >>> found = objective_loss("simpo", pairs, beta=2.0, gamma=1.0)  # -log sigmoid(2 (-1 + 2) - 1)
    >>> round(float(found.losses[0]), 4)
    0.3133

    Recipes are sums over a step and no loss of one pair; take their parts. It composes with `jax.jit` (name and words
    static) and `jax.grad`; a setting that is an array is traced, and its range is not checked.

    Args:
      name: a key of `dpo_jax.objectives.table.OBJECTIVES`.
      pairs: from `make_pairs`.
      **settings: as in the table; what is not given has the table's default.

    Raises:
      ValueError: a name or a setting is unknown or out of range.
    """
    if name in RECIPES:
        parts = ", ".join(f"objective_loss({part!r}, ...)" for part, _, _ in RECIPES[name].parts)
        raise UserError(
            f"{name!r} is not an objective of the table but a sum of some over a step, {RECIPES[name].equation}; take "
            f"{parts}, or train with objective.name={name}"
        )
    if name not in OBJECTIVES:
        raise UserError(f"{name!r} is not an objective of the table; {meant_by(name)}")
    traced = {key: value for key, value in settings.items() if isinstance(value, jax.Array) and key in takes(name)}
    (term,) = make_terms([{"name": name, **{key: value for key, value in settings.items() if key not in traced}}])
    _check_given(term, pairs)
    (found,) = outcomes((dataclasses.replace(term, settings={**term.settings, **traced}),), pairs)
    return found


def _check_given(term: Term, pairs: Pairs) -> None:
    """Refuse pairs without what an objective looks at.

    Raises:
      UserError: names the argument of `make_pairs` that is missing.
    """
    lacking = {
        "chosen_length=N, rejected_length=N, the numbers of tokens": "length" in term.row.uses
        and pairs.assumed is not None,
        "shared=Sums(...), over the tokens that both have (ld_alpha)": term.desensitizes and pairs.shared is None,
        "alignment=(chosen, rejected) (weighting)": term.weighting != "none" and pairs.alignment is None,
        "ranking=Ranking(...)": term.row.data == "rankings" and pairs.ranking is None,
    }
    if missing := [name for name, gone in lacking.items() if gone]:
        raise UserError(f"objective {term.name}: pairs: lack what it looks at; give make_pairs {missing[0]}")


def outcomes(terms: Sequence[Term], pairs: Pairs, progress: Progress = START) -> list[LossOutput]:
    """What each term says of each pair; losses are multiplied by the pair's weight and are 0 where nothing is real."""
    return [_outcome(term, pairs, progress) for term in terms]


def total(terms: Sequence[Term], found: Sequence[LossOutput], counts: Mapping[str, Any]) -> Float[Array, ""]:
    """The loss: the sum over terms of `weight * sum of losses / count`, `count` being what the term is taken per."""
    parts = [
        term.weight * outcome.losses.sum() / counts[term.row.per] for term, outcome in zip(terms, found, strict=True)
    ]
    return jnp.asarray(sum(parts[1:], parts[0]), jnp.float32)


def counts_of(real: Bool[Array, "*P"], chosen_length: Float[Array, "*P"]) -> dict[str, Float[Array, ""]]:
    """What losses are divided by: real pairs, and tokens of their chosen completions (each at least 1)."""
    return {
        "pairs": jnp.maximum(real.sum().astype(jnp.float32), 1.0),
        "chosen_tokens": jnp.maximum(jnp.where(real, chosen_length, 0.0).sum(), 1.0),
    }


def leading(terms: Sequence[Term]) -> Term:
    """The term whose beta and whose modifiers the metrics follow: the first that compares completions."""
    return next((term for term in terms if term.row.data != "chosen"), terms[0])


def beta_of(term: Term, progress: int | Scalar) -> Scalar:
    """Beta of a term where a share `progress` of the run is done; 1 for an objective without beta."""
    beta, end = term.settings.get("beta", 1.0), term.settings.get("beta_end")
    if end is None:
        return beta
    share = jnp.clip(jnp.asarray(progress, jnp.float32), 0.0, 1.0)
    if term.settings.get("beta_schedule", "linear") == "cosine":
        share = 0.5 * (1.0 - jnp.cos(jnp.pi * share))
    return beta + (end - beta) * share


def modified(term: Term, pairs: Pairs) -> Pairs:
    """The pairs as a term sees them: without the reference, or desensitised to length, where its settings say so."""
    if not term.uses_reference:
        nothing = {name: jnp.zeros_like(getattr(pairs, name)) for name in ("reference_chosen", "reference_rejected")}
        ranking, shared = pairs.ranking, pairs.shared
        pairs = pairs._replace(
            **nothing,
            ranking=ranking and ranking._replace(reference=jnp.zeros_like(ranking.reference)),
            shared=shared and shared._replace(**nothing),
        )
    return desensitized(pairs, term.settings["ld_alpha"]) if term.desensitizes else pairs


def as_measured(terms: Sequence[Term]) -> tuple[Term, ...]:
    """The terms as they are taken on held-out data, where nothing is drawn and nothing remembered."""
    return tuple(_stand_in(term) for term in terms)


def labels_of(terms: Sequence[Term]) -> list[str]:
    """A name for each term, of its own also where an objective comes twice."""
    seen: Counter[str] = Counter()
    found = []
    for term in terms:
        seen[term.name] += 1
        found.append(term.name if seen[term.name] == 1 else f"{term.name}_{seen[term.name]}")
    return found


def start_constant(terms: Sequence[Term]) -> float | None:
    """The loss where policy and reference agree, or None where that is no constant."""
    values = [term.at_start() for term in terms]
    return None if any(value is None for value in values) else sum(value for value in values if value is not None)


def _outcome(term: Term, pairs: Pairs, progress: Progress) -> LossOutput:
    seen = modified(term, pairs)
    settings = {name: term.settings[name] for name in term.row.settings}
    if "beta" in settings:
        settings["beta"] = beta_of(term, progress.share)
    if term.row.remembers:
        settings["memory"] = progress.memory
    found = term.row.function(seen, **settings)
    _check(term, found, jnp.shape(pairs.policy_chosen))
    weight = seen.weight
    if term.weighting != "none":
        weight = weight * policy_weights(seen, clamped=term.weighting == "wpo_clamped")
    losses = jnp.where(pairs.real, weight * found.losses, 0.0)
    return found._replace(losses=losses, margins=jax.lax.stop_gradient(found.margins))


def _check(term: Term, found: object, shape: tuple[int, ...]) -> None:
    """Refuse what a function of the caller's own gives that is no loss of each pair: a sum would be taken for each.

    Raises:
      UserError: names the objective and what is wanted.
    """
    wanted = f"objective {term.name!r}: its function gives"
    if not isinstance(found, LossOutput):
        raise UserError(f"{wanted} {type(found).__name__}, not dpo_jax.objectives.pairs.LossOutput(losses, margins)")
    for name in ("losses", "margins"):
        if (given := jnp.shape(getattr(found, name))) != shape:
            raise UserError(f"{wanted} {name} of shape {given}; one for each pair is wanted, of shape {shape}")


def _stand_in(term: Term) -> Term:
    name = term.row.measured_as
    if name is None:
        return term
    kept = {key: value for key, value in term.settings.items() if key in takes(name)}
    (plain,) = make_terms([{"name": name}])
    return dataclasses.replace(term, name=name, settings={**plain.settings, **kept})
