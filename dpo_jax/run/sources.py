"""What a run takes from the hub, once and at one commit, and what it gives back."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.data.tokenizer import Tokenizer, rows_for
from dpo_jax.errors import UserError, redacted
from dpo_jax.hf import hub, tensors
from dpo_jax.hf.push import check_push, push
from dpo_jax.hf.settings import ExportSettings
from dpo_jax.model.settings import AdapterSettings, ModelSettings
from dpo_jax.training.settings import ReferenceSettings

EVERYTHING = ("*.safetensors", *tensors.SIDE_FILES)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
NO_ADAPTER = AdapterSettings()


@dataclasses.dataclass(frozen=True)
class Sources:
    """Folders of the policy's starting weights and of the reference, which may be the same.

    `commits` is by part, and lacks a part that is an ordinary folder: whatever moves at the hub, a run that goes on
    asks for these.
    """

    policy: Path
    reference: Path
    commits: dict[str, str]
    reference_is_policy: bool
    """Whether the reference is the policy's own starting weights."""
    adapter: Path | None = None
    """Folder of the adapter that the run goes on from."""
    rows: int | None = None
    """Rows that the embedding must have at least (`model.resize_embedding`), whatever the folders have."""

    def facts(self) -> dict[str, object]:
        """The commits, and the rows if they are given, as a run's record has them."""
        commits: dict[str, object] = {_fact(part): commit for part, commit in self.commits.items()}
        return commits if self.rows is None else {**commits, "rows of the embedding": self.rows}

    def resized(self, model: ModelSettings, tokenizer: Tokenizer) -> "Sources":
        """The same, with a row for every token of the tokenizer where the settings want that."""
        return dataclasses.replace(self, rows=rows_for(tokenizer)) if model.resize_embedding else self


def find_models(
    model: ModelSettings,
    reference: ReferenceSettings,
    record: Mapping[str, Any],
    patterns: Sequence[str] = EVERYTHING,
    *,
    adapter: AdapterSettings = NO_ADAPTER,
) -> Sources:
    """Finds the models that a run starts from, and downloads those that are hub ids.

    Args:
      model: names the policy.
      adapter: names an adapter to go on from, which is downloaded whole, or none.
      reference: names the reference.
      record: what the run has written down so far: `settings` and `facts`, or nothing.
      patterns: the files that are needed, at least.

    Raises:
      UserError: one cannot be had, or a folder is given a revision.
    """
    named: dict[str, tuple[str, str | None]] = {"model": (model.path, model.revision)}
    is_policy = reference.path is None or (reference.path, reference.revision) == named["model"]
    if reference.path is not None and not is_policy and reference.mode != "none":
        named["reference"] = (reference.path, reference.revision)
    if adapter.path is not None:
        named["adapter"] = (adapter.path, adapter.revision)
    known = _recorded(named, record)
    wanted = {part: ADAPTER_FILES if part == "adapter" else patterns for part in named}
    paths = {part: find(part, *name, wanted[part], known.get(part)) for part, name in named.items()}
    commits = {part: _commit(path) for part, path in paths.items() if _is_hub_id(named[part][0])}
    return Sources(paths["model"], paths.get("reference", paths["model"]), commits, is_policy, paths.get("adapter"))


def find(
    part: str, path: str, revision: str | None, patterns: Sequence[str] = EVERYTHING, commit: str | None = None
) -> Path:
    """The folder of one model, with at least those of its files that match; `commit` goes before its revision.

    Raises:
      UserError: it cannot be had, or is a folder and given a revision.
    """
    try:
        return tensors.local_folder(path, patterns, commit if commit and _is_hub_id(path) else revision)
    except UserError as error:
        raise UserError(f"{part}.path: {error}") from error


def _is_hub_id(path: str) -> bool:
    return not Path(path).expanduser().is_dir()


def _commit(folder: Path) -> str:
    commit = hub.commit_of(folder)
    if commit is None:
        raise UserError(f"the hub did not say which commit {folder} is; check HF_ENDPOINT")
    return commit


def _fact(part: str) -> str:
    return f"commit of {part}.path"


def _recorded(named: Mapping[str, tuple[str, str | None]], record: Mapping[str, Any]) -> dict[str, str]:
    """The commits that a run began with, of those models that its settings still name the same."""
    old, facts = record.get("settings", {}), record.get("facts", {})
    before = {part: (old.get(part, {}).get("path"), old.get(part, {}).get("revision")) for part in named}
    now = {part: (redacted(path), revision) for part, (path, revision) in named.items()}  # as the record has them
    return {part: facts[_fact(part)] for part in named if now[part] == before[part] and _fact(part) in facts}


def check_export(export: ExportSettings) -> None:
    """Whether the result could be pushed now, if it is to be: asked before the hours of training, not after them.

    Raises:
      UserError: it could not.
    """
    if export.push is not None:
        try:
            check_push(export.push, private=export.private)
        except UserError as error:
            raise UserError(f"export.push: {error}") from error


def send(export: ExportSettings, folder: Path) -> str:
    """Pushes the result of a run, and returns where it is to be seen.

    Raises:
      UserError: it was not pushed; the folder stays as it is, and the line has the command that pushes it again.
    """
    name = export.push or ""
    try:
        return push(folder, name, private=export.private, message="Trained by dpo_jax")
    except UserError as error:
        again = f"python -m dpo_jax.convert push {shlex.quote(str(folder))} {name}"
        again += "" if export.private else " --public"
        raise UserError(
            f"export.push: {error}; the run is finished and its model is whole, so only push it again: {again}"
        ) from error
