"""The stages of a run, one function each; `train.py` and `evaluate.py` put them in a row."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import sharding
from dpo_jax.config import run as config
from dpo_jax.config.run import Run
from dpo_jax.data.batches import Batches
from dpo_jax.data.encode import Encoded, encode
from dpo_jax.data.entries import as_entries
from dpo_jax.hf import checkpoint as hf
from dpo_jax.model.decoder import Model, cast
from dpo_jax.model.spec import DecoderSpec
from dpo_jax.objectives.terms import data_of
from dpo_jax.preference import heldout as preference
from dpo_jax.preference.loss import Problem
from dpo_jax.preference.scoring import score_batch
from dpo_jax.reporting.journal import Journal, read_records, summary
from dpo_jax.run import sources as exchange
from dpo_jax.run.models import load_model, shares, weights_digest
from dpo_jax.run.sources import Sources, is_policy
from dpo_jax.settings import UserError
from dpo_jax.training import reference as references
from dpo_jax.training.step import State

RUN_FILE = "run.json"


# ---------------------------------------------------------------------------------------------- output


@contextlib.contextmanager
def opened(run: Run) -> Iterator[Path]:
    """The output folder, made if need be and locked while the run lasts.

    Raises:
      UserError: it belongs to something else, to a run with other mathematics, or to one that is still going on.
    """
    folder = Path(run.output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: {folder} is a file; name a folder")
    strangers = [] if not folder.exists() else [entry.name for entry in folder.iterdir() if entry.name not in OURS]
    if strangers and not (folder / RUN_FILE).exists():
        raise UserError(
            f"output: {folder} holds other things ({sorted(strangers)[0]}, ...); name a new or empty folder"
        )
    _refuse_changes(run, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"output: {folder} is in use by another run; wait for it or name another folder") from None
        yield folder


OURS = (".lock", RUN_FILE, "metrics.jsonl", "tensorboard", "checkpoints", "model", "cache", "data.json", "answers")


def _refuse_changes(run: Run, folder: Path) -> None:
    """Stop if the folder's run would lead to another model than this one."""
    path = folder / RUN_FILE
    if not path.exists():
        return
    try:
        old = json.loads(path.read_text())["settings"]
    except (ValueError, KeyError):
        raise UserError(f"{path} is damaged; name another output folder") from None
    changes = [
        c
        for c in config.changed_mathematics(old, config.dump(run))
        if c.split(":")[0] not in run.checkpoint.allow_change
    ]
    if changes:
        raise UserError(
            "\n".join(
                f"output: {folder} holds a run with another setting, {change}; change it back, name another output, or "
                f"accept it with checkpoint.allow_change=[{change.split(':')[0]}]"
                for change in changes
            )
        )


def recorded(folder: Path) -> dict[str, Any]:
    """What the folder's run has written down: `settings`, `facts`, whether it is `finished`; empty before it began."""
    path = folder / RUN_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def facts(sources: Sources, data: "Data", steps: int) -> dict[str, Any]:
    """What a run depends on beside its settings: when one of these changes, it is another run."""
    return {
        **sources.facts(),
        "number of steps": steps,
        "number of pairs": data.train.num_pairs,
        "digest of the training data": references.data_digest(data.train),
        "digest of the starting weights": weights_digest(sources.policy),
    }


def record_run(run: Run, folder: Path, facts: dict[str, Any]) -> None:
    """Write down what this run is; refuse if the same settings now mean other data or other weights."""
    known = recorded(folder).get("facts", {})
    for name, value in facts.items():
        if known.get(name, value) != value:
            raise UserError(
                f"output: {folder} holds a run whose {name} was {known[name]} and is now {value}; restore it, or "
                "name another output"
            )
    write_json(folder / RUN_FILE, {"settings": config.dump(run), "facts": facts})


def write_json(path: Path, value: Any) -> None:
    """Write a file in one move."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    temporary.replace(path)


def make_journal(
    run: Run, folder: Path, steps: int, start: int | None, process: int | None = None, *, began: float | None = None
) -> Journal:
    """The run's journal, of a command that `began` then.

    What was recorded after the checkpoint that it goes on from is dropped.
    """
    process = jax.process_index() if process is None else process
    return Journal(folder, steps, run.log, -1 if start is None else start, process=process, began=began)


def cache_folder(run: Run) -> Path:
    """Where tokenised data and reference log-probabilities are kept."""
    return Path(run.data.cache) if run.data.cache else Path(run.output) / "cache"


# ---------------------------------------------------------------------------------------------- data


@dataclasses.dataclass(frozen=True)
class Data:
    """Tokenised training and held-out pairs, and what was found on the way."""

    train: Encoded
    held_out: Encoded | None
    dropped: int
    report: dict[str, Any]


def load_data(run: Run, tokenizer: Any, folder: Path, say: Callable[[str], None]) -> Data:
    """Read, check and tokenise; the reports are printed, and kept in `data.json`."""
    cache = cache_folder(run)
    train, report = encode(run.data.train, tokenizer, run.data, cache, first=run.data.first)
    reports = {"data.train": report}
    held_out = None
    if run.data.eval is not None:
        held_out, reports["data.eval"] = encode(run.data.eval, tokenizer, run.data, cache)
    for name, found in reports.items():
        say(name)
        for line in found.lines():
            say(f"  {line}")
    tables = {name: found.to_dict() for name, found in reports.items()}
    write_json(folder / "data.json", tables)
    train, held_out = entries(run, train), None if held_out is None else entries(run, held_out)
    return Data(train, held_out, report.bad + report.too_long, tables)


def entries(run: Run, encoded: Encoded) -> Encoded:
    """The data as the objective wants it: pairs, whole rankings, single completions, or chosen answers alone.

    Raises:
      UserError: the rows cannot be that, or have margins or labels that every objective of the run would ignore.
    """
    terms = run.objective.terms
    name = " + ".join(term.name for term in terms)
    found = as_entries(encoded, data_of(terms), objective=name, max_length=run.data.max_length)
    used = {use for term in terms for use in term.row.uses}
    for column, plain in (("margin", 0.0), ("label", 1.0)):
        rows = np.flatnonzero(getattr(encoded, column) != plain)
        if len(rows) and column not in used:
            raise UserError(
                f"{encoded.origin(int(rows[0]))}: has a {column} (as have {len(rows)} entries in all), which "
                f"objective.name={name} would ignore; remove the column or choose an objective that takes it"
            )
    return found


def number_of_steps(run: Run, data: Data) -> int:
    """Optimizer steps of the run."""
    pairs = data.train.num_pairs
    if pairs < run.batch.pairs:
        raise UserError(f"batch.pairs: {run.batch.pairs} is more than the {pairs} entries of data.train; lower it")
    return run.steps if run.steps is not None else max(1, int((run.epochs or 1) * pairs / run.batch.pairs))


def training_batches(
    run: Run, data: Data, steps: int, mesh: jax.sharding.Mesh, policy: Model, reference: "Reference"
) -> Batches:
    """The run's batches as a function of (seed, step)."""
    return Batches(
        data.train,
        run.batch.pairs,
        sharding.batch_shards(mesh),
        steps,
        order="shuffled" if run.data.shuffle else "file",
        seed=run.seed,
        share_prompts=shares(run, policy.spec),
        micro_tokens=run.batch.micro_tokens,
        attention_length=attention_length(),
        reference=reference.train,
        rankings=data_of(run.objective.terms) == "rankings",
    )


def sweep(run: Run, encoded: Encoded, shards: int, share: bool, logps: np.ndarray | None = None) -> Batches:
    """Every pair of a data set once."""
    pairs = min(run.batch.pairs, encoded.num_pairs)
    batches = Batches(
        encoded,
        pairs,
        shards,
        1,
        share_prompts=share,
        micro_tokens=run.batch.micro_tokens,
        attention_length=attention_length(),
        reference=logps,
        rankings=data_of(run.objective.terms) == "rankings",
    )
    return batches.sweep()


def attention_length() -> int:
    """Row length at which attention costs as much as the matrix products.

    On a CPU it skips what a row's trees do not see of each other, so that a slot of a long row costs hardly more: at
    4,096 slots 1.3 times what it costs at 512.
    """
    return 65536 if jax.default_backend() == "cpu" else ATTENTION_LENGTH


ATTENTION_LENGTH = 8192
"""That of an accelerator."""


# ---------------------------------------------------------------------------------------------- reference


@dataclasses.dataclass(frozen=True)
class Reference:
    """Log-probabilities by scored token of the training and of the held-out data; or live weights; or neither."""

    train: np.ndarray | None = None
    held_out: np.ndarray | None = None
    weights: Any = None


def make_reference(
    run: Run,
    sources: Sources,
    policy: Model,
    problem: Problem,
    data: Data,
    mesh: jax.sharding.Mesh,
    journal: Journal,
    *,
    resumes: bool = False,
) -> Reference:
    """The reference as the settings want it. Cached: its weights are gone when this returns.

    There are none where the run resumes with a reference that moves: its weights are in the checkpoint.
    """
    if run.reference.mode == "none" or (run.reference.update_every and resumes):
        return Reference()
    dtype = "float32" if run.reference.update_every else problem.compute_dtype
    model = policy if is_policy(run) else load_model(sources.reference, mesh, dtype)
    if run.reference.mode == "live":
        # One that moves is kept in float32.
        return Reference(weights=_own(model.params, dtype) if is_policy(run) else cast(model.params, jnp.dtype(dtype)))
    digest = weights_digest(sources.reference)
    sets = {"train": data.train, "held_out": data.held_out}
    return Reference(
        **{
            name: None if encoded is None else _cached(run, digest, model, problem, encoded, mesh, journal)
            for name, encoded in sets.items()
        }
    )


def _own(params: Any, dtype: str) -> Any:
    """The policy's parameters in this dtype, none in the policy's own buffers: its first step gives those away."""
    cast_ = cast(params, jnp.dtype(dtype))
    return jax.tree.map(lambda new, old: jnp.copy(new) if new.dtype == old.dtype else new, cast_, params)


def _cached(
    run: Run, digest: str, model: Model, problem: Problem, encoded: Encoded, mesh, journal: Journal
) -> np.ndarray:
    kind = problem.compute_dtype
    if is_policy(run) and run.optimizer.param_dtype != "float32" and kind == "float32":
        kind = f"{kind} of {run.optimizer.param_dtype}"  # the weights are rounded before they are computed with
    key = references.cache_key(digest, encoded, kind)

    def compute() -> np.ndarray:
        journal.phase("compiling the reference")
        return score_all(
            problem, model, sweep(run, encoded, sharding.batch_shards(mesh), shares(run, model.spec)), mesh, journal
        )

    return references.cached(cache_folder(run), key, encoded.num_scored, compute)


def score_all(
    problem: Problem, model: Model, batches: Batches, mesh: jax.sharding.Mesh, journal: Journal
) -> np.ndarray:
    """Log-probability of each scored token under a model, in nats."""
    params = cast(model.params, jnp.dtype(problem.compute_dtype))
    scorer = sharding.Compiled(
        lambda params, batch: score_batch(model.spec, params, batch, execution=problem.execution)
    )

    def progress(done: int, total: int) -> None:
        journal.phase(f"reference log-probabilities {done}/{total}")

    place = functools.partial(sharding.place, mesh=mesh)
    return preference.token_logprobs(scorer, params, batches, place, progress)


# ---------------------------------------------------------------------------------------------- result


def before_and_after(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The first and the last evaluation of a run, from its records."""
    records = read_records(folder / "metrics.jsonl")
    found = [{name: value for name, value in record.items() if name.startswith("eval_")} for record in records]
    found = [evaluation for evaluation in found if evaluation]
    return (found[0], found[-1]) if found else ({}, {})


def export(run: Run, sources: Sources, spec: DecoderSpec, state: State, folder: Path, journal: Journal) -> None:
    """The trained model as a Hugging Face folder like the one it came from, written beside and verified first."""
    journal.phase("exporting")
    _, metrics = before_and_after(folder)
    names = [run.data.train] if isinstance(run.data.train, str) else list(run.data.train)
    settings = config.dump(run)
    pinned = {part: {**settings[part], "revision": commit} for part, commit in sources.commits.items()}
    card = {"datasets": [Path(name).name for name in names], "metrics": metrics, "config": {**settings, **pinned}}
    card["objectives"] = {term.name: term.row.paper for term in run.objective.terms}
    record = {"settings": settings, "settings_sha256": config.digest(run), "commits": sources.commits}
    record["metrics"] = metrics
    files = {"dpo_jax.json": json.dumps(record, indent=2, ensure_ascii=False) + "\n"}
    model = Model(spec, state["params"])
    hf.save_hf(model, folder / "model", like=sources.policy, card=card, extra_files=files, replace=True)
    write_json(folder / RUN_FILE, {**recorded(folder), "finished": True})


def is_finished(folder: Path) -> bool:
    """Whether the run that this folder holds has been trained to its end and exported."""
    return recorded(folder).get("finished", False) and (folder / "model").exists()


def show_result(run: Run, folder: Path, word: str) -> int:
    """Print what was measured before and after, and where the model is; push it, if that is wanted and not done yet.

    Raises:
      UserError: it was not pushed. The run is finished all the same.
    """
    summary(*before_and_after(folder))
    print(f"{word}: the model is in {folder / 'model'}, the record in {folder / 'metrics.jsonl'}", flush=True)
    record = recorded(folder)
    if run.export.push is not None and run.export.push not in record.get("pushed", {}):
        url = exchange.send(run, folder / "model")
        write_json(folder / RUN_FILE, {**record, "pushed": {**record.get("pushed", {}), run.export.push: url}})
        print(f"pushed: {url}")
    return 0


def say_stopped(number: int, state: State, journal: Journal) -> int:
    """Tell how to go on; exit code 75 (try again) after SIGTERM, 130 after Ctrl-C."""
    journal.note(f"stopped and saved after step {int(state['step'])}; run the same command again to go on")
    return 130 if number == signal.SIGINT else 75
