"""Whether a run may go on under other settings or data: where its past stays the same, or where it is told to.

A run that goes on is the run that had its settings from the start if the steps already made would have been the same:
the same pairs at the same learning rates. More steps, more epochs and more data are accepted where that holds.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.config import run as config
from dpo_jax.config.run import Run
from dpo_jax.data.batches import Batches
from dpo_jax.data.encoded import Encoded, head
from dpo_jax.errors import UserError, redacted_values
from dpo_jax.objectives.own import own_digests
from dpo_jax.objectives.table import SHIPPED
from dpo_jax.processes.here import here
from dpo_jax.run import output
from dpo_jax.training.optimizer import same_rates, warmup_steps
from dpo_jax.training.reference import data_digest

STEPS, PAIRS, DATA, WEIGHTS, ADAPTER, REFERENCE = (
    "number of steps",
    "number of pairs",
    "digest of the training data",
    "digest of the weights at the start",
    "digest of the adapter at the start",
    "digest of the weights of the reference",
)
"""Facts of a run: what it depends on beside its settings."""
OWN, PACKAGES = "digest of objective {}", "the package's own"
"""Fact for each objective that is not the package's own, and what stands for one that is."""
_OWN = re.compile(OWN.format(".*"))
OBJECTIVES = frozenset({"objective.name", "objective.mixture"})
"""Settings that name objectives."""
JUDGED_BY_FACTS = ("steps", "epochs", "data.train", "data.first")
"""Settings of which only the data themselves can tell whether the steps already made would have been others."""
NEVER = frozenset(
    f"adapter.{name}" for name in ("rank", "targets", "layers", "rank_pattern", "dora", "modules_to_save")
) | {"model.freeze", "optimizer.name"}
"""Settings without which a checkpoint has other leaves, so that none can be gone on from under others."""
ACCEPTED = "which checkpoint.allow_change accepts"


@dataclasses.dataclass(frozen=True)
class Past:
    """What the run of an output folder has been so far.

    Attributes:
      settings, facts: those it was begun with; empty where nothing was learned.
      step: of its newest checkpoint; None before the first.
      finished: whether it was trained to its end and exported.
      exported: the settings of the folder that it exported.
      changed: what `checkpoint.allow_change` has accepted so far, and from which step on.
    """

    folder: Path
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]
    step: int | None
    finished: bool
    exported: Mapping[str, Any]
    changed: Sequence[str] = ()

    @classmethod
    def of(cls, folder: Path) -> "Past":
        """That of process 0's output folder, empty if it has neither a step nor a model to lose: one that was refused
        in the middle of its start may be begun again with other settings, data or weights."""
        return cls(folder, **here().decide("what the run has been", lambda: _found(folder)))

    def changes(self, run: Run) -> list[str]:
        """Settings that lead to another model than the run's own: lines `key: old -> new`."""
        if not self.settings:
            return []
        changes = config.changed_mathematics(self.settings, redacted_values(config.dump(run)))
        return changes if OBJECTIVES & {*map(_key, changes)} else [*changes, *self._functions(run)]

    def _functions(self, run: Run) -> list[str]:
        """Objectives of these names that were other functions when the run was begun."""
        now, found = own_objectives(run), []
        for name in run.objective.objectives:
            fact = OWN.format(name)
            new = now.get(fact, PACKAGES)
            old = self.facts.get(fact, PACKAGES if name in SHIPPED else new)
            if old != new:
                was, now_is = (one if one == PACKAGES else f"digest {one[:9]}" for one in (old, new))
                found.append(f"objective.name: {name} ({was}) -> {name} as another function ({now_is})")
        return found

    def check_settings(self, run: Run) -> None:
        """Refuse what is known to make it another run, before anything is read.

        Raises:
          UserError: a setting is another one, and `checkpoint.allow_change` does not name it.
        """
        all_changes = _roots(self.changes(run))
        accepted = {*run.checkpoint.allow_change, *JUDGED_BY_FACTS} - NEVER
        changes = [change for change in all_changes if _key(change) not in accepted]
        if not changes:
            return
        what, it = ("another setting", "it") if len(changes) == 1 else ("other settings", "them")
        keys = [*map(_key, changes)]
        if NEVER & {*keys}:
            remedy = f"no checkpoint of it could become that: name another output, or change {it} back"
        elif "model.path" in keys:
            remedy = f"name another output to start from that, or change {it} back; if it is the same model elsewhere"
            remedy += f", {_accept(run, *keys)}"
        elif self.finished:
            longer = [] if run.optimizer.schedule == "constant" else ["steps"]
            remedy = f"name another output, or change {it} back; to train it further, give more steps and "
            remedy += _accept(run, *keys, *longer)
        else:
            remedy = f"change {it} back, name another output, or {_accept(run, *keys)}"
        raise UserError(f"output: {self.folder} holds a run with {what}, {', '.join(changes)}; {remedy}")

    def changed_by(self, run: Run, said: Sequence[str]) -> list[str]:
        """What was accepted before, and what this run changes after the steps that are made; `said` is what
        `check_facts` had to say."""
        new = [change for change in _roots(self.changes(run)) if _key(change) not in JUDGED_BY_FACTS]
        new = [*new, *(line for line in said if ACCEPTED in line)] if self.step else []
        return [*self.changed, *(f"from step {(self.step or 0) + 1:,} on: {change}" for change in new)]

    def check_fact(self, name: str, value: object) -> None:
        """Refuse one that is not as the run has it.

        Raises:
          UserError: names it, and what it was.
        """
        if self.facts.get(name, value) != value:
            raise UserError(
                f"output: {self.folder} holds a run whose {name} was {self.facts[name]} and is now {value}; "
                "restore it, or name another output"
            )

    def check_facts(self, run: Run, facts: Mapping[str, Any], train: Encoded) -> list[str]:
        """Refuse data, weights and lengths under which the steps already made would have been others.

        Args:
          run: the settings now.
          facts: the facts now, as the run's record has them.
          train: the training data now.

        Returns:
          What has changed and is accepted, in lines to be said.

        Raises:
          UserError: one of them makes it another run.
        """
        judged = {STEPS, PAIRS, DATA, *([REFERENCE] if _allows(run, "reference.") else [])}
        for name, value in facts.items():
            if name not in judged and not _OWN.fullmatch(name):
                self.check_fact(name, value)
        if not self.facts:
            return []
        said = [self._check_data(run, facts, train), self._check_length(run, facts)]
        if self.finished and self.changes(run) and facts[STEPS] <= (self.step or 0):
            raise UserError(
                f"output: {self.folder} holds a run that is finished after {self.step} steps, and the changed settings "
                f"({', '.join(map(_key, self.changes(run)))}) train no further; give more steps, or name another output"
            )
        return [line for line in said if line]

    def _check_data(self, run: Run, facts: Mapping[str, Any], train: Encoded) -> str | None:
        if self.facts.get(DATA, facts[DATA]) == facts[DATA]:
            return None
        pairs = f"{self.facts[PAIRS]:,} -> {facts[PAIRS]:,} pairs"
        if _saw_the_same(run, self.facts, self.step or 0, train):
            return f"the training data have grown ({pairs}); the steps already made saw the same"
        if _allows(run, "data."):
            return f"the training data have changed ({pairs}), {ACCEPTED}"
        raise UserError(
            f"output: {self.folder} holds a run whose {DATA} was {self.facts[DATA][:9]} and is now {facts[DATA][:9]} "
            f"({pairs}): its steps so far would have seen other pairs; restore the data, name another output, or "
            f"{_accept(run, 'data.train')}"
        )

    def _check_length(self, run: Run, facts: Mapping[str, Any]) -> str | None:
        before, now, made = self.facts.get(STEPS, facts[STEPS]), facts[STEPS], self.step or 0
        if now < made:
            raise UserError(
                f"output: {self.folder} holds a run that has made {made:,} steps, more than the {now:,} that it is to "
                "have; raise steps or epochs, or name another output"
            )
        if now == before:
            return None
        length = f"the run is to have {now:,} steps in place of {before:,}"
        scheduled = any(term.settings.get("beta_end") is not None for term in run.objective.terms)
        if not scheduled and same_rates(run.optimizer, before, now, made):
            return f"{length}; the steps already made would have been the same"
        if _allows(run, "steps", "epochs", "batch.pairs", "data."):
            return f"{length}, {ACCEPTED}; the rates are those of {now:,} steps from now on"
        other, keep = f"optimizer.schedule={run.optimizer.schedule}", ""
        warmed = warmup_steps(run.optimizer, before)
        if scheduled:
            other = "objective.beta_end"
        elif run.optimizer.schedule == "constant":
            other = f"optimizer.warmup_fraction={run.optimizer.warmup_fraction}"
            other += f" ({warmup_steps(run.optimizer, now):,} steps of warm-up in place of {warmed:,})"
            keep = self._keeping(run, warmed)
        raise UserError(
            f"output: {self.folder} holds a run of {before:,} steps; with {now:,}, under {other}, the {made:,} steps "
            f"already made would have been others; {keep}change it back, name another output, or "
            f"{_accept(run, 'steps')}"
        )

    @staticmethod
    def _keeping(run: Run, warmed: int) -> str:
        """How to keep a warm-up of so many steps."""
        given, names = "", ["optimizer.warmup_steps"]
        if "warmup_fraction" in run.optimizer.model_fields_set:
            given, names = " optimizer.warmup_fraction=null", [*names, "optimizer.warmup_fraction"]
        return f"keep them with optimizer.warmup_steps={warmed}{given} and {_allowing(run, *names)}, "


def own_objectives(run: Run) -> dict[str, str]:
    """Facts of a run whose objectives are not all the package's own: what each of those computes."""
    return {OWN.format(name): digest for name, digest in own_digests(run.objective.objectives).items()}


def _found(folder: Path) -> dict[str, Any]:
    """All of `Past` but the folder."""
    known = output.recorded(folder, say=print)
    step, model = output.newest_step(folder), output.has_exports(folder)
    learned = known if step is not None or model or output.has_steps(folder) else {}
    return {
        "settings": learned.get("settings", {}),
        "facts": learned.get("facts", {}),
        "step": step,
        "finished": bool(learned.get("finished")),
        "exported": known.get("exported") or {},
        "changed": learned.get("changed") or [],
    }


def _roots(changes: Sequence[str]) -> list[str]:
    """The changes without those of an objective's settings that came with another objective: accepting that accepts
    them."""
    if not OBJECTIVES & {*map(_key, changes)}:
        return list(changes)
    return [change for change in changes if _key(change) in OBJECTIVES or not change.startswith("objective.")]


def _key(change: str) -> str:
    return change.split(":")[0]


def _accept(run: Run, *keys: str) -> str:
    """The setting that accepts changes of these, and still those that it accepts now."""
    return f"accept it with {_allowing(run, *keys)}"


def _allowing(run: Run, *keys: str) -> str:
    return f"checkpoint.allow_change=[{','.join(dict.fromkeys([*run.checkpoint.allow_change, *keys]))}]"


def _allows(run: Run, *names: str) -> bool:
    """Whether one of these settings, or one of these sections, is named in `checkpoint.allow_change`."""
    return any(key.startswith(names) for key in run.checkpoint.allow_change)


def _saw_the_same(run: Run, facts: Mapping[str, Any], steps: int, train: Encoded) -> bool:
    """Whether the first `steps` of a run over grown data see the pairs that they saw before it grew."""
    known = facts[PAIRS]
    if train.num_pairs < known:
        return False
    before = head(train, known)
    if data_digest(before) != facts[DATA]:
        return False
    order = "shuffled" if run.data.shuffle else "file"
    old, new = (Batches(each, run.batch.pairs, 1, steps, order=order, seed=run.seed) for each in (before, train))
    return _same_pairs(old, new, range(steps))


def _same_pairs(old: Batches, new: Batches, steps: Sequence[int]) -> bool:
    return all((old.pairs_of(step) == new.pairs_of(step)).all() for step in steps)
