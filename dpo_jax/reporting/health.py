"""Alarms that teach: what the metrics of a run's steps say of its health, each thing once, in a line of text.

Pure functions of numbers: nothing is acted on, nothing is read from elsewhere. A line says what was seen, what it
usually means, and what to try. Steps are noisy (a batch may be one pair), so a mean is believed only with `SURE`
standard errors to spare; a short run of small batches says nothing rather than something false.

A record is what one step's metrics are; with `log.every` above 1 there is one every `log.every` steps.
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from dpo_jax.reporting.collapse import Ruined, Still
from dpo_jax.reporting.overfitting import Overfitting

SURE = 3.0
"""Standard errors between a mean and a bound before the mean counts as beyond it."""
FEWEST = 8
"""Records that a mean must rest on: the standard error of fewer is itself too uncertain."""
QUICK = 10.0
"""Memory, in records, of what is watched for sudden change: long enough for FEWEST, short enough to be in time."""
LOSS_SLACK = 0.005
"""Share of the starting loss that counts as nothing learned. For DPO 0.0035 nats, which is a margin of 0.007; a weak
but real run (135M parameters, 60 steps of 8 pairs) ends 0.028 below its start."""
MOVED = 0.01
"""Divergence per token, in nats, of a policy that has moved, though a tiny beta hides it from loss and margins."""
STILL = 0.01
"""Reward margin, in nats, below which the policy is at rest: rounding in bfloat16 may make as much (0.005 of loss)."""
CHANCE = 0.55
"""Accuracy below which nothing was learned of the pairs. That same weak run, on noisy human labels, reaches 0.595; to
tell 0.5 from 0.55 takes (3 * 0.5 / 0.05)^2 = 900 pairs."""
REVERSED = 0.4
"""Accuracy below which the opposite was learned."""
STUCK = 30
"""Records with the very same accuracy. Two pairs a step agree by chance with probability 1/2 at most: 2e-9 for 30."""
GROWING = 1.1
"""How many times its longer mean the recent divergence is while it grows."""
MEMORISED = 0.05
"""Share of the starting loss that counts as near 0. For DPO 0.035 nats, a margin of 3.3 on every pair."""
MEMORISED_PAIRS = 200
"""Pairs without an error before they count as memorised: where one in 30 fails, a chance of 0.001."""
EXPLODED = 10.0
"""How many times the earlier median a gradient norm is when it explodes. It doubles over the quickstart's 87 steps."""
EARLIER, RECENT = 64, 16
"""Records whose medians of the gradient norm are compared; half of the earlier ones must be there."""


class Course(NamedTuple):
    """What is known of a run before it starts: the loss where nothing is learned, or None, and steps and pairs."""

    start: float | None
    warmup: int
    total: int
    pairs: int
    every: int

    @property
    def settled(self) -> int:
        """The step that is long after warm-up: a third of the records left, from 20 on; of very many, a fifth."""
        return self.warmup + self.every * max(20, min(self._left // 3, max(1000, self._left // 5)))

    @property
    def memory(self) -> float:
        """Records that slow averages remember: a quarter of those after warm-up, from 20 to 1000."""
        return float(min(max(20, self._left // 4), 1000))

    @property
    def records(self) -> int:
        """Records of the whole run."""
        return self.total // self.every

    @property
    def _left(self) -> int:
        return (self.total - self.warmup) // self.every


@dataclasses.dataclass
class Smooth:
    """Exponentially weighted mean of a series and its standard error; weights fall by e in `horizon` values."""

    horizon: float
    mean: float = 0.0
    _weight: float = 0.0
    _squares: float = 0.0
    _scatter: float = 0.0

    def take(self, value: float) -> None:
        """Add a value (West's update, which does not cancel)."""
        decay = math.exp(-1 / self.horizon)
        self._weight = decay * self._weight + 1
        self._squares = decay**2 * self._squares + 1
        step = value - self.mean
        self.mean += step / self._weight
        self._scatter = decay * self._scatter + step * (value - self.mean)

    @property
    def count(self) -> float:
        """Values that the mean rests on, were they weighted alike."""
        return self._weight**2 / self._squares if self._squares else 0.0

    @property
    def deviation(self) -> float:
        """Standard deviation of one value; inf where that is unknown."""
        freedom = self._weight - self._squares / self._weight if self._weight else 0.0
        return math.sqrt(self._scatter / freedom) if self.count > 1.5 else math.inf

    @property
    def error(self) -> float:
        """Standard error of the mean; inf where that is unknown."""
        return self.deviation / math.sqrt(self.count) if self.count else math.inf

    @property
    def enough(self) -> bool:
        """Whether mean and error may be believed."""
        return self.count >= FEWEST

    def within(self, centre: float, bound: float) -> bool:
        """Whether the mean surely is closer to `centre` than `bound`."""
        return self.enough and abs(self.mean - centre) + SURE * self.error < bound


class Fall:
    """Change of a noisy value since the start of the run, where it was 0 or what its first records say."""

    def __init__(self, starts_at_zero: bool):
        """Nothing is known yet."""
        self._start = Smooth(math.inf)
        self._recent = Smooth(QUICK)
        self._first = 0 if starts_at_zero else QUICK

    def take(self, value: float) -> None:
        """Add a value."""
        side = self._start if self._start.count < self._first else self._recent
        side.take(value)

    @property
    def change(self) -> float:
        """Recent mean minus the mean at the start."""
        return self._recent.mean - self._start.mean

    def beyond(self, bound: float) -> bool:
        """Whether the value surely fell by more than `bound`."""
        error = math.hypot(self._recent.error, self._start.error if self._first else 0.0)
        return self._recent.enough and self.change + SURE * error < -bound


class Alarm(Protocol):
    """Watches for one thing."""

    def take(self, step: int, metrics: Mapping[str, Any]) -> str | None:
        """What to say after this step, if anything; asked no more once it has said something."""


class Flat:
    """The loss is where it started, long after warm-up."""

    def __init__(self, course: Course):
        """Start watching."""
        self._course = course
        self._loss, self._margin, self._kl = (Smooth(course.memory) for _ in range(3))
        self._rate = 0.0

    def take(self, step: int, metrics: Mapping[str, Any]) -> str | None:
        """Speak if the loss surely is at its start, and the policy too as far as is known."""
        start = self._course.start
        if start is None or step <= self._course.warmup:
            return None
        self._rate = max(self._rate, _number(metrics, "learning_rate") or 0.0)
        for name, mean in (("loss", self._loss), ("rewards/margins", self._margin), ("kl", self._kl)):
            _feed(mean, metrics, name)
        if step < self._course.settled or not self._loss.within(start, LOSS_SLACK * abs(start)):
            return None
        if self._kl.mean > MOVED or (self._margin.count and not self._margin.within(0.0, STILL)):
            return None
        return (
            f"the loss is {self._loss.mean:.4f}, as at the start ({start:.4f}): next to nothing is learned;"
            f" optimizer.learning_rate ({self._rate:.2g} at most) is too small, no weight is trained,"
            " or the labels are random"
        )


class Accuracy:
    """Long after warm-up, pairs are told apart no better than by chance, or the wrong way round, or always alike."""

    def __init__(self, course: Course):
        """Start watching."""
        self._course = course
        self._rate, self._margin = Smooth(course.memory), Smooth(course.memory)
        self._same: list[float] = []
        self._value = -1.0

    def take(self, step: int, metrics: Mapping[str, Any]) -> str | None:
        """Speak if the accuracy surely is low, or exactly the same for long."""
        rate = _number(metrics, "rewards/accuracies")
        if rate is None or step <= self._course.warmup:
            return None
        self._rate.take(rate)
        _feed(self._margin, metrics, "rewards/margins")
        self._follow(rate, _number(metrics, "loss"))
        if step < self._course.settled:
            return None
        low = self._low(known=self._margin.count > 0) if _starts_undecided(metrics) else None
        return low or self._stuck()

    def _follow(self, rate: float, loss: float | None) -> None:
        self._same = self._same if rate == self._value else []
        self._value = rate
        if loss is not None:
            self._same = [*self._same, loss][-STUCK:]

    def _low(self, known: bool) -> str | None:
        """What there is to say of a low mean; nothing where the margins, if known, are those of a policy at rest."""
        pairs = self._rate.count * self._course.pairs
        # the error if the truth were a half: that of a sample may be 0 by luck
        error = max(self._rate.error, 0.5 / math.sqrt(pairs)) if pairs else math.inf
        most = self._rate.mean + SURE * error
        if not self._rate.enough or most >= CHANCE:
            return None
        seen = f"rewards/accuracies is {self._rate.mean:.3f} over about {pairs:.0f} pairs"
        if most < REVERSED and (not known or self._margin.mean + SURE * self._margin.error < -STILL):
            return (
                f"{seen}, far below chance: the opposite of the labels is learned;"
                " look whether chosen and rejected are swapped in data.train, also at its label column"
            )
        if known and self._margin.deviation * math.sqrt(self._course.pairs) < STILL:
            return None
        return (
            f"{seen}, no better than chance, though the policy moves: labels are noisy or random;"
            " look at data.train; if it is right, try larger batch.pairs"
        )

    def _stuck(self) -> str | None:
        losses = self._same
        if not 0 < self._value < 1 or len(losses) < STUCK or max(losses) - min(losses) < 0.01 * abs(losses[0]):
            return None
        return (
            f"rewards/accuracies is exactly {self._value:.4f} in {STUCK} records while the loss went {losses[0]:.3f} to"
            f" {losses[-1]:.3f}: each step has the same pairs and some are not learned; look at them, or add data"
        )


class Chosen:
    """Chosen completions have become much less likely than they were at the start."""

    def __init__(self, course: Course, bound: float):
        """Start watching; the bound is in nats per token."""
        self._bound = bound
        self._sides = {
            source: {side: Fall(source == "drift" and course.start is not None) for side in ("chosen", "rejected")}
            for source in ("drift", "logps")
        }

    def take(self, step: int, metrics: Mapping[str, Any]) -> str | None:
        """Speak if they surely fell past the bound, as compared with the reference where there is one."""
        source = "drift" if "drift/chosen" in metrics else "logps"
        sides = self._sides[source]
        for side, fall in sides.items():
            total, length = _number(metrics, f"{source}/{side}"), _number(metrics, f"lengths/{side}")
            if total is not None and length:
                fall.take(total / length)
        if not sides["chosen"].beyond(self._bound):
            return None
        remedy = "rpo (SFT term) or apo_zero" if source == "drift" else "cpo or orpo (SFT term)"
        chosen, rejected = sides["chosen"].change, sides["rejected"].change
        return (
            f"{source}/chosen fell by {-chosen:.2f} nats per token (rejected by {-rejected:.2f}): good answers become"
            f" unlikely; try objective.name={remedy}, larger objective.beta, lower optimizer.learning_rate"
        )


class Runaway:
    """The divergence from the reference is large and grows."""

    def __init__(self, course: Course, bound: float):
        """Start watching; the bound is in nats per token."""
        self._bound = bound
        self._recent, self._longer = Smooth(QUICK), Smooth(max(4 * QUICK, course.records / 8))

    def take(self, step: int, metrics: Mapping[str, Any]) -> str | None:
        """Speak if it surely is above the bound and above its own longer mean.

        Means of logarithms: the estimate is exponential in log-ratios, so that one completion of a batch can make it a
        million. What is far below the bound counts alike.
        """
        value = _number(metrics, "kl")
        if value is None:
            return None
        value = math.log(max(value, 0.01 * self._bound))
        self._recent.take(value)
        self._longer.take(value)
        least = self._recent.mean - SURE * self._recent.error
        if not self._recent.enough or least <= max(math.log(self._bound), self._longer.mean + math.log(GROWING)):
            return None
        return (
            f"kl is typically {math.exp(self._recent.mean):.3g} nats per token and grows: the policy leaves the"
            " reference and may forget; try larger objective.beta, lower optimizer.learning_rate or fewer epochs"
        )


class Memorised:
    """Every pair is told apart and the loss is near 0, for long."""

    def __init__(self, course: Course):
        """Start watching."""
        self._floor = None if course.start is None else MEMORISED * abs(course.start)
        self._long = max(20, math.ceil(MEMORISED_PAIRS / course.pairs), course.records // 20)
        self._count, self._since, self._worst = 0, 0, 0.0

    def take(self, step: int, metrics: Mapping[str, Any]) -> str | None:
        """Speak after the last of so many records."""
        loss, rate = _number(metrics, "loss"), _number(metrics, "rewards/accuracies")
        if loss is None or rate is None or self._floor is None:
            return None
        if rate < 1 or abs(loss) > self._floor:
            self._count, self._worst = 0, 0.0
            return None
        self._since = self._since if self._count else step
        self._count, self._worst = self._count + 1, max(self._worst, loss)
        if self._count < self._long:
            return None
        return (
            f"since step {self._since} rewards/accuracies is 1 and the loss at most {self._worst:.3f}: the pairs are"
            " memorised, or something trivial gives them away; try fewer epochs, and watch held-out pairs (data.eval)"
        )


class Gradient:
    """The gradient's norm has become many times what it was, and stays there."""

    def __init__(self):
        """Start watching."""
        self._first: list[float] = []
        self._last: collections.deque[float] = collections.deque(maxlen=EARLIER + RECENT)

    def take(self, step: int, metrics: Mapping[str, Any]) -> str | None:
        """Speak if the recent median is far above that of the run's start and that of the records before.

        Medians: one batch in a hundred may have any norm. The start: where pairs are memorised, norms fall to almost
        nothing, and ten times that is nothing too.
        """
        value = _number(metrics, "grad_norm")
        if value is None:
            return None
        if len(self._first) < EARLIER // 2:
            self._first.append(value)
        self._last.append(value)
        before, recent = list(self._last)[:-RECENT], list(self._last)[-RECENT:]
        if len(before) < EARLIER // 2:
            return None
        usual, now = max(statistics.median(self._first), statistics.median(before)), statistics.median(recent)
        if not usual or now <= EXPLODED * usual:
            return None
        return (
            f"grad_norm is {now:.3g} (median of {RECENT} records), {now / usual:.0f} times what it was ({usual:.3g}):"
            f" steps are too long and training may diverge; lower optimizer.learning_rate, or lengthen its warm-up"
        )


IMPLIED = {
    "accuracy": ("flat", "ruined", "still"),
    "flat": ("accuracy",),
    "ruined": ("runaway",),
    "chosen": ("ruined",),
    "runaway": ("chosen", "ruined"),
}
"""What is not worth saying after something else was: it has the same cause and the same remedies."""


class Alarms:
    """All alarms of a run. Their state follows from the records taken, so that a resumed run replays those it has."""

    def __init__(
        self,
        *,
        start: float | None,
        warmup_steps: int,
        total_steps: int,
        pairs: int,
        chosen_drift: float,
        kl: float,
        every: int = 1,
    ):
        """Watch a run from its start.

        Args:
          start: the loss where policy and reference agree, if this run starts there; else None.
          warmup_steps: steps over which the learning rate rises.
          total_steps: steps of the run.
          pairs: pairs per step.
          chosen_drift: bound on the fall of chosen completions, in nats per token.
          kl: bound on the divergence from the reference, in nats per token.
          every: steps between records.
        """
        course = Course(start, warmup_steps, total_steps, pairs, every)
        self._waiting: dict[str, Alarm] = {
            "ruined": Ruined(kl, starts_at_reference=start is not None),
            "still": Still(),
            "flat": Flat(course),
            "accuracy": Accuracy(course),
            "chosen": Chosen(course, chosen_drift),
            "runaway": Runaway(course, kl),
            "memorised": Memorised(course),
            "gradient": Gradient(),
            "overfitting": Overfitting(),
        }
        self._said: set[str] = set()

    def take(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        """Lines to show after a step (from 1), usually none. What is missing, None or not finite is passed over."""
        lines = []
        for name, alarm in list(self._waiting.items()):
            if self._said.intersection(IMPLIED.get(name, ())):
                continue
            if text := alarm.take(step, metrics):
                lines.append(f"alarm: step {step}: {text}")
                self._said.add(name)
                del self._waiting[name]
        return lines

    def replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take the records of earlier steps, as `metrics.jsonl` has them, without saying anything again."""
        for record in records:
            self.take(int(record["step"]), record)


def _number(metrics: Mapping[str, Any], name: str) -> float | None:
    """A metric, if it is there and finite."""
    value = metrics.get(name)
    return float(value) if value is not None and math.isfinite(value) else None


def _feed(mean: Smooth, metrics: Mapping[str, Any], name: str) -> None:
    """Add a metric to its mean, if it is there and finite."""
    if (value := _number(metrics, name)) is not None:
        mean.take(value)


def _starts_undecided(metrics: Mapping[str, Any]) -> bool:
    """Whether half is chance: pairs, compared by a reference or a reward model.

    Without either, accuracy is the share of pairs whose chosen completion is the likelier one, which may be anything
    before a run and far from it after; KTO's depends on how many of its examples are desirable.
    """
    if "objective/kto_baseline" in metrics:
        return False
    return "kl" in metrics or "drift/chosen" in metrics or "logps/chosen" not in metrics
