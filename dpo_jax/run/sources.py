"""What a run takes from the hub, once and at one commit, and what it gives back."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dpo_jax.config import run as config
from dpo_jax.config.run import Run
from dpo_jax.hf import hub, tensors
from dpo_jax.hf.push import check_push, push
from dpo_jax.settings import UserError

EVERYTHING = ("*.safetensors", *tensors.SIDE_FILES)
Part = Literal["model", "reference"]


@dataclasses.dataclass(frozen=True)
class Sources:
    """Folders of the policy's starting weights and of the reference, which may be the same.

    `commits` is by part, and lacks a part that is an ordinary folder: whatever moves at the hub, a run that goes on
    asks for these.
    """

    policy: Path
    reference: Path
    commits: dict[str, str]

    def facts(self) -> dict[str, str]:
        """The commits as a run's record has them."""
        return {_fact(part): commit for part, commit in self.commits.items()}


def find_models(run: Run, record: Mapping[str, Any]) -> Sources:
    """Finds the models that a run starts from, and downloads those that are hub ids.

    Args:
      run: names them.
      record: what the run has written down so far: `settings` and `facts`, or nothing.

    Raises:
      UserError: one cannot be had, or a folder is given a revision.
    """
    commits = _recorded(run, record)
    policy = find(run, "model", EVERYTHING, commits.get("model"))
    other = run.reference.mode != "none" and not is_policy(run)
    reference = find(run, "reference", EVERYTHING, commits.get("reference")) if other else policy
    paths = {"model": policy} | ({"reference": reference} if other else {})
    return Sources(policy, reference, {part: _commit(path) for part, path in paths.items() if _is_hub_id(run, part)})


def find(run: Run, part: Part, patterns: Sequence[str], commit: str | None = None) -> Path:
    """The folder of one model, with at least those of its files that match; `commit` goes before its revision.

    Raises:
      UserError: it cannot be had, or is a folder and given a revision.
    """
    path, revision = _named(run, part)
    try:
        return tensors.local_folder(path, patterns, commit if commit and _is_hub_id(run, part) else revision)
    except UserError as error:
        raise UserError(f"{part}.path: {error}") from error


def is_policy(run: Run) -> bool:
    """Whether the reference is the policy's own starting weights."""
    return run.reference.path is None or _named(run, "reference") == _named(run, "model")


def _named(run: Run, part: str) -> tuple[str, str | None]:
    section = run.model if part == "model" else run.reference
    return section.path or run.model.path, section.revision


def _is_hub_id(run: Run, part: str) -> bool:
    return not Path(_named(run, part)[0]).expanduser().is_dir()


def _commit(folder: Path) -> str:
    commit = hub.commit_of(folder)
    if commit is None:
        raise UserError(f"the hub did not say which commit {folder} is; check HF_ENDPOINT")
    return commit


def _fact(part: str) -> str:
    return f"commit of {part}.path"


def _recorded(run: Run, record: Mapping[str, Any]) -> dict[str, str]:
    """The commits that a run began with, of those models that its settings still name the same."""
    old, new, facts = record.get("settings", {}), config.dump(run), record.get("facts", {})
    same = (
        part
        for part in ("model", "reference")
        if all(old.get(part, {}).get(key) == new[part].get(key) for key in ("path", "revision"))
    )
    return {part: facts[_fact(part)] for part in same if _fact(part) in facts}


def check_export(run: Run) -> None:
    """Whether the result could be pushed now, if it is to be: asked before the hours of training, not after them.

    Raises:
      UserError: it could not.
    """
    if run.export.push is not None:
        try:
            check_push(run.export.push, private=run.export.private)
        except UserError as error:
            raise UserError(f"export.push: {error}") from error


def send(run: Run, folder: Path) -> str:
    """Pushes the result of a run, and returns where it is to be seen.

    Raises:
      UserError: it was not pushed; the folder stays as it is, and the line has the command that pushes it again.
    """
    name = run.export.push or ""
    try:
        return push(folder, name, private=run.export.private, message="Trained by dpo_jax")
    except UserError as error:
        again = f"python -m dpo_jax.convert push {shlex.quote(str(folder))} {name}"
        again += "" if run.export.private else " --public"
        raise UserError(
            f"export.push: {error}; the run is finished and its model is whole, so only push it again: {again}"
        ) from error
