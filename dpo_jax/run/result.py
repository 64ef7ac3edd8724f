"""What a run leaves: the exported folder, the table of before and after, and how to go on."""

import json
import signal
from pathlib import Path

from dpo_jax.config import run as config
from dpo_jax.config.run import Run
from dpo_jax.data.encoded import Encoded
from dpo_jax.hf import checkpoint
from dpo_jax.hf.ending import Ending, aligned
from dpo_jax.model.decoder import Model
from dpo_jax.reporting.journal import Journal, read_records, summary
from dpo_jax.run import output, sources, written
from dpo_jax.run.models import notes, weights_digest
from dpo_jax.run.sources import Sources
from dpo_jax.training import reference
from dpo_jax.training.step import State


def facts(found: Sources, train: Encoded, steps: int) -> dict[str, object]:
    """What a run depends on beside its settings: when one of these changes, it is another run."""
    return {
        **found.facts(),
        "number of steps": steps,
        "number of pairs": train.num_pairs,
        "digest of the training data": reference.data_digest(train),
        "digest of the starting weights": weights_digest(found.policy),
    }


def before_and_after(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The first and the last evaluation of a run, from its records."""
    records = read_records(folder / "metrics.jsonl")
    found = [{name: value for name, value in record.items() if name.startswith("eval_")} for record in records]
    found = [evaluation for evaluation in found if evaluation]
    return (found[0], found[-1]) if found else ({}, {})


def export(run: Run, found: Sources, model: Model, journal: Journal, end: Ending | None) -> None:
    """The trained model as a Hugging Face folder like the one it came from, written beside and verified first."""
    folder = journal.folder
    journal.phase("exporting")
    _, metrics = before_and_after(folder)
    names = [run.data.train] if isinstance(run.data.train, str) else list(run.data.train)
    settings = config.dump(run)
    pinned = {part: {**settings[part], "revision": commit} for part, commit in found.commits.items()}
    card = {"datasets": [Path(name).name for name in names], "metrics": metrics, "config": {**settings, **pinned}}
    card["objectives"] = {term.name: term.row.paper for term in run.objective.terms}
    record = {"settings": settings, "settings_sha256": config.digest(run), "commits": found.commits}
    record["metrics"] = metrics
    record["notes"] = card["notes"] = notes(found, end, run.export)
    files = {"dpo_jax.json": json.dumps(record, indent=2, ensure_ascii=False) + "\n"}
    files |= aligned(found.policy, end) if run.export.align_eos else {}
    dtype = written.KEEP[run.export.dtype]
    moved = checkpoint.save_hf(
        model, folder / "model", like=found.policy, card=card, extra_files=files, replace=True, dtype=dtype
    )
    output.mark(folder, finished=True, moved=moved)


def is_finished(folder: Path) -> bool:
    """Whether the run that this folder holds has been trained to its end and exported."""
    return output.recorded(folder).get("finished", False) and (folder / "model").exists()


def show(run: Run, folder: Path, word: str) -> int:
    """Print what was measured before and after, and where the model is; push it, if that is wanted and not done yet.

    Raises:
      UserError: it was not pushed. The run is finished all the same.
    """
    before, after = before_and_after(folder)
    summary(before, after)
    said = [written.moved_line(output.recorded(folder).get("moved")), written.margin_line(after, run.export.dtype)]
    print("\n".join(line for line in said if line), end="\n" if any(said) else "")
    print(f"{word}: the model is in {folder / 'model'}, the record in {folder / 'metrics.jsonl'}", flush=True)
    pushed = output.recorded(folder).get("pushed", {})
    if run.export.push is not None and run.export.push not in pushed:
        url = sources.send(run.export, folder / "model")
        output.mark(folder, pushed={**pushed, run.export.push: url})
        print(f"pushed: {url}")
    return 0


def say_stopped(number: int, state: State, journal: Journal) -> int:
    """Tell how to go on; exit code 75 (try again) after SIGTERM, 130 after Ctrl-C."""
    journal.note(f"stopped and saved after step {int(state['step'])}; run the same command again to go on")
    return 130 if number == signal.SIGINT else 75
