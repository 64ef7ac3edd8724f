"""A run's data: read, tokenised, made into what the objective compares, and laid out in batches."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax import sharding
from dpo_jax.data.batches import Batches
from dpo_jax.data.encode import Encoded, encode
from dpo_jax.data.encoded import found_where
from dpo_jax.data.examples import as_examples
from dpo_jax.data.settings import BatchSettings, DataSettings
from dpo_jax.data.split import set_name, shared_line, split
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.errors import UserError, printable, redacted
from dpo_jax.model.spec import DecoderSpec
from dpo_jax.objectives.terms import Term, data_of
from dpo_jax.processes.here import Here

ACCELERATOR_ATTENTION_LENGTH = 8192
"""Row length, in tokens, at which attention costs as much as the matrix products on an accelerator."""

SHARED, WARNINGS = "shared", "warnings"
"""Lines of what is found of data sets together, in the report of all of them: of prompts that are both trained and
measured on, and of what is wrong with whole sets."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Tokenised training and held-out pairs, and what was found on the way."""

    train: Encoded
    held_out: Mapping[str, Encoded]
    """By name of the set, which is empty where there is one alone."""
    dropped: int
    report: dict[str, Any]
    called: str = "data.train"
    """What the training data are called."""

    @property
    def date(self) -> str:
        """The day that the chat template writes (YYYY-MM-DD), if it may write one."""
        return self.report["data.train"]["date"]

    @property
    def sets(self) -> dict[str, Encoded]:
        """Training and held-out data by what they are called: as in the settings, where they have files of their own;
        a part of data.train that is held out has the name of the share."""
        share = "data.eval_fraction" in self.report
        held_out = {"data.eval_fraction" if share else set_name(name): part for name, part in self.held_out.items()}
        return {self.called: self.train, **held_out}

    def examples(self, terms: tuple[Term, ...], max_length: int) -> "Data":
        """The same as the objective wants it; raises as the function `examples`."""
        held_out = {name: examples(encoded, terms, max_length) for name, encoded in self.held_out.items()}
        found = dataclasses.replace(self, train=examples(self.train, terms, max_length), held_out=held_out)
        if (line := labels_line(found, terms)) is None:
            return found
        return dataclasses.replace(found, report={**self.report, WARNINGS: [*self.report[WARNINGS], line]})


def read_data(
    settings: DataSettings,
    tokenizer: Tokenizer,
    cache: Path,
    say: Callable[[str], None],
    *,
    date: str | None = None,
    seed: int = 0,
    place: Here | None = None,
    called: str = "data.train",
) -> Data:
    """Read, check and tokenise; each report is said line by line, and is in the result as plain values.

    `date` is the day that a template writes which writes one (YYYY-MM-DD); None is today. With the `seed` a share of
    the training data is held out, where that is wanted. `place` as of `data.encode.collect`. The training data are
    `called` so where something is said of them.

    Raises:
      UserError: too many rows are bad, or too few prompts are there to hold some out.
    """
    how: dict[str, Any] = {"date": date, "place": place}
    train, report = encode(settings.train, tokenizer, settings, cache, first=settings.first, **how)
    reports = {"data.train": report}
    held_out: dict[str, Encoded] = {}
    for name, sources in settings.eval_sets.items():
        held_out[name], reports[set_name(name)] = encode(sources, tokenizer, settings, cache, **how)
    for name, found in reports.items():
        say(called if name == "data.train" else name)
        for line in found.lines():
            say(redacted(f"  {line}"))
    tables: dict[str, Any] = {name: found.to_dict() for name, found in reports.items()}
    shared = (shared_line(set_name(name), encoded, train) for name, encoded in held_out.items())
    tables[SHARED] = [line for line in shared if line is not None]
    for line in tables[SHARED]:
        say(line)
    tables[WARNINGS] = [f"{name}: {line}" for name, found in reports.items() for line in found.warnings()]
    if settings.eval_fraction is not None:
        parts = split(train, settings.eval_fraction, seed)
        say(parts.line())
        train, held_out, tables["data.eval_fraction"] = parts.train, {"": parts.held_out}, parts.counts()
    return Data(train, held_out, report.bad + report.too_long + report.unranked, tables, called)


def print_for_now(line: str) -> None:
    """Print a line of a report, but where its cache is, for a command with which that goes."""
    if not line.startswith("  cache: "):
        print(line)


def examples(encoded: Encoded, terms: tuple[Term, ...], max_length: int) -> Encoded:
    """The data as the objective wants it: pairs, whole rankings, single completions, or chosen answers alone.

    Raises:
      UserError: the rows cannot be that, or have margins or labels that every term of the objective would ignore.
    """
    name = " + ".join(term.name for term in terms)
    found = as_examples(encoded, data_of(terms), objective=name, max_length=max_length)
    used = {use for term in terms for use in term.row.uses}
    for column, plain in (("margin", 0.0), ("label", 1.0)):
        rows = np.flatnonzero(getattr(encoded, column) != plain)
        if len(rows) and column not in used:
            raise UserError(
                f"{encoded.first_origin(rows)}: has a {column} (as have {len(rows)} examples in all), which "
                f"objective.name={name} would ignore; remove the column or choose an objective that takes it"
            )
    return found


def check_tokens(data: Data, rows: int, tokenizer: Tokenizer) -> None:
    """Whether the model's embedding has a row for every token of the data.

    Raises:
      UserError: it has `rows`, and a token's number is larger: the tokenizer knows more tokens than the model.
    """
    for name, encoded in data.sets.items():
        beyond = found_where(encoded.tokens, lambda tokens: tokens >= rows)
        if not len(beyond):
            continue
        token = int(encoded.tokens[beyond[0]])
        unit = int(np.searchsorted(encoded.prompt_start, beyond[0], side="right")) - 1
        pairs = np.flatnonzero(encoded.pair_unit == unit)
        where = encoded.origin(int(pairs[0])) if len(pairs) else name
        name_of_it = printable(str(tokenizer.convert_ids_to_tokens(token)))
        raise UserError(
            f"{where}: token {token} ({name_of_it}) has no row in the model's embedding, whose rows are 0 to {rows - 1}"
            f", as {len(beyond):,} tokens of {name}; take the model's own tokenizer and template, or "
            "train with model.resize_embedding=true, which gives the model a row for every token"
        )


def number_of_steps(examples: int, pairs_per_step: int, *, steps: int | None, epochs: float | None) -> int:
    """Optimizer steps of a run over so many examples: as given, or as many as its epochs take, rounded up.

    Raises:
      UserError: there are fewer examples than a step takes.
    """
    if examples < pairs_per_step:
        raise UserError(f"batch.pairs: {pairs_per_step} is more than the {examples} examples of data.train; lower it")
    return steps if steps is not None else math.ceil((epochs or 1) * examples / pairs_per_step)


def length_line(examples: int, per_step: int, steps: int, called: str = "pairs") -> str:
    """How long a run is, in words, and what becomes of an epoch that steps do not divide; examples are `called` so."""
    passes, rest = divmod(steps * per_step, examples)
    each = f"{per_step:,} {called if per_step > 1 else called.removesuffix('s')}"
    made = f"{steps:,} {'steps' if steps > 1 else 'step'} of {each}"
    said = f"{made}: {steps * per_step / examples:.2f} passes over the data"
    over = rest if passes and rest < per_step else 0
    some = called if over > 1 else called.removesuffix("s")
    return said + (f"; the last step ends with {over:,} {some} of the next pass" if over else "")


def labels_line(data: Data, terms: tuple[Term, ...]) -> str | None:
    """That an objective of labels gets one kind of label to train on alone, in words, where the report has not said so;
    None where it has, or where there are both kinds."""
    labels = data.train.label
    if data_of(terms) != "unpaired" or (labels > 0.5).any() == (labels <= 0.5).any():
        return None
    report, (name, *_) = data.report["data.train"], (term.name for term in terms)
    labelled = any(about.get("layout") == "unpaired" for about in report["files"].values())
    if labelled and report["undesirable"] in (0, report["singles"]):
        return None
    kind, other = ("desirable", "undesirable") if labels[0] > 0.5 else ("undesirable", "desirable")
    if not labelled and kind == "desirable":
        return (
            f"data.train: no row has a label; all {len(labels):,} answers are taken as desirable, and {name} "
            "wants some undesirable ones too; give the rows labels, or use objective.name=sft"
        )
    return f"data.train: all {len(labels):,} answers to train on are {kind}; {name} wants some {other} ones too"


def length_on(platform: str) -> int:
    """Row length at which attention costs as much as the matrix products, in tokens.

    On a CPU it skips what a row's prompt groups do not see of each other, so that a position of a long row costs hardly
    more: at 4,096 positions 1.3 times what it costs at 512.
    """
    return 65536 if platform == "cpu" else ACCELERATOR_ATTENTION_LENGTH


@dataclasses.dataclass(frozen=True)
class Packing:
    """How examples become the rows of batches; the numbers of a run do not depend on it."""

    pairs: int
    """Examples of a step."""
    shards: int
    own: tuple[int, ...] | None
    """Shards whose arrays this process makes; None: all."""
    micro_tokens: int | None
    share_prompts: bool
    max_length: int
    attention_length: int
    rankings: bool

    @classmethod
    def of(
        cls,
        batch: BatchSettings,
        max_length: int,
        terms: tuple[Term, ...],
        mesh: jax.sharding.Mesh,
        *,
        attention_length: int | None = None,
    ) -> "Packing":
        """That of the settings on a mesh; `attention_length` in place of that of the mesh's devices."""
        length = attention_length or length_on(sharding.platform(mesh))
        shards, rankings = sharding.batch_shards(mesh), data_of(terms) == "rankings"
        micro_tokens = batch.micro_tokens and batch.micro_tokens * mesh.shape["context"]  # a shard is so many devices
        own = sharding.own_shards(mesh)
        return cls(batch.pairs, shards, own, micro_tokens, batch.share_prompts, max_length, length, rankings)

    def can_share_prompt(self, spec: DecoderSpec) -> bool:
        """Whether prompts are laid out once for all their completions."""
        return self.share_prompts and spec.can_share_prompt(self.max_length)

    def steps(
        self,
        encoded: Encoded,
        spec: DecoderSpec,
        steps: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        reference: np.ndarray | None = None,
    ) -> Batches:
        """Batches as a function of (seed, step); `reference` are log-probabilities by scored token, in nats."""
        order = {"order": "shuffled" if shuffle else "file", "seed": seed}
        return Batches(encoded, self.pairs, self.shards, steps, **order, **self._rows(spec), reference=reference)

    def sweep(self, encoded: Encoded, spec: DecoderSpec, reference: np.ndarray | None = None) -> Batches:
        """Every example once."""
        pairs = min(self.pairs, encoded.num_pairs)
        return Batches(encoded, pairs, self.shards, 1, **self._rows(spec), reference=reference).sweep()

    def _rows(self, spec: DecoderSpec) -> Mapping[str, Any]:
        return {
            "share_prompts": self.can_share_prompt(spec),
            "micro_tokens": self.micro_tokens,
            "attention_length": self.attention_length,
            "rankings": self.rankings,
            "own": self.own,
        }
