"""The Hugging Face hub: the files of a repository at one commit, and in one line why they cannot be had.

What the hub's own client can be told is left to it: HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN and
the login of `hf auth login`. No token passes through here. Nothing here knows what the files are.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_jax.errors import UserError, one_line

COMMIT = re.compile(r"[0-9a-f]{40}")
REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
LEFT_OUT = ("*/*.safetensors",)
"""Copies of the weights in folders of their own, for other programs."""
LOG_IN = "set HF_TOKEN or run `hf auth login`"


def snapshot(hub_id: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The cache's folder with those files of a repository that match a pattern, at one commit.

    What is in the cache is not fetched again. A commit that is there whole is never asked for; a branch or tag is,
    unless the hub is out of reach: then it is what it was when it was last seen.

    Args:
      hub_id: NAME or OWNER/NAME of a model.
      patterns: of names to fetch, such as `*.safetensors`.
      revision: branch, tag or commit; None is `main`.

    Raises:
      UserError: the files cannot be had.
    """
    from huggingface_hub import snapshot_download

    if revision is not None and not REVISION.fullmatch(revision):
        raise UserError(f"{revision!r} is not the name of a branch, a tag or a commit; correct the revision")
    name = repr(hub_id) if revision is None else f"{hub_id!r} at revision {revision!r}"
    try:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(LEFT_OUT))
        )
    # The hub's client raises its own errors, those of its HTTP library, OSError and ValueError.
    except Exception as error:
        raise UserError(
            reason(error, name)
            or f"there is no folder {hub_id!r}, and the hub did not give a model of that name ({one_line(error)}); "
            "check the name, the network and HF_ENDPOINT"
        ) from error


def listing(hub_id: str, folder: Path) -> list[str]:
    """Names of all files of the commit that `snapshot` gave, fetched or not; empty where the cache does not say."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return [file.path for file in get_cached_repo_tree(hub_id, revision=commit_of(folder))]
    except CachedRepoTreeNotFoundError:
        return []


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the hub's cache holds; None for any other folder."""
    cached = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.name if cached and COMMIT.fullmatch(folder.name) else None


def reason(error: BaseException | None, name: str) -> str | None:
    """What an error of the hub's client, or one that led to it, means for the model `name`, with the remedy.

    None if it is no known one.
    """
    while error is not None:
        said = _by_kind(error, name) or _by_status(getattr(error, "response", None), name)
        if said is not None:
            return said
        error = error.__cause__
    return None


def _by_kind(error: BaseException, name: str) -> str | None:
    from huggingface_hub import errors

    known = (
        (errors.LocalTokenNotFoundError, f"there is no token of the hub; {LOG_IN}"),
        (
            errors.OfflineModeIsEnabled,
            f"HF_HUB_OFFLINE is set, and {name} is not whole in the hub's cache; unset it, or give a folder",
        ),
        (
            errors.GatedRepoError,
            f"{name} is gated, and the hub lets nobody in without leave; ask for it on the model's page, then {LOG_IN}",
        ),
        (errors.RevisionNotFoundError, f"the hub has no {name}; give a branch, a tag or a commit that is there"),
        (
            errors.RepositoryNotFoundError,
            f"there is no such folder, and the hub shows no {name}; check the name; if it is private, {LOG_IN}",
        ),
    )
    return next((sentence for kind, sentence in known if isinstance(error, kind)), None)


def _by_status(response: Any, name: str) -> str | None:
    status = 0 if response is None else response.status_code
    if status == 401:
        return f"the hub does not know the token that it was shown for {name}; {LOG_IN} with a valid one"
    if status == 403:
        return f"the hub forbids this token to touch {name}; {LOG_IN} with one that may"
    if status in (409, 412):
        return f"{name} was changed by someone else meanwhile; try again"
    if status == 429 or status >= 500:
        return f"the hub answered {status} for {name}; try again later"
    return None
