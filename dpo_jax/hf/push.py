"""An exported folder to a repository of the hub: one commit, read back."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_jax.errors import UserError
from dpo_jax.hf import tensors
from dpo_jax.hf.hub import COMMIT, LOG_IN, REVISION, reason
from dpo_jax.hf.settings import REPOSITORY
from dpo_jax.hf.upload import check_place, upload
from dpo_jax.stores import ADDRESS

if TYPE_CHECKING:
    from huggingface_hub import HfApi

BARE = {".gitattributes"}
"""What the hub itself puts into a new repository."""


class Remote(NamedTuple):
    """A repository as it stands; where it has not the wanted branch, `head` and `files` are main's, if it has that."""

    branch: bool
    head: str | None
    files: frozenset[str]


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    message: str = "Export of dpo_jax",
) -> str:
    """Uploads an export to a repository of the hub, which is made if need be, and returns the commit's URL.

    What is uploaded is what `SHA256SUMS` lists, and `SHA256SUMS`; files of an earlier export that this one lacks are
    deleted. All of it is one commit, made only if nobody made another meanwhile, and then compared with the folder.

    Args:
      folder: what `save_hf` wrote, with nothing in it changed or added.
      repo_id: OWNER/NAME; or `gs://BUCKET/PATH` or `s3://BUCKET/PATH`, for which the rest has no meaning.
      private: what a new repository will be, and an old one must be.
      revision: branch; None is `main`.
      message: first line of the commit.

    Raises:
      UserError: the folder is no whole export; the token may not; the repository holds something else, or is public
        where a private one is wanted; the hub cannot be reached. Says in one line what to do.
    """
    folder = Path(folder)
    files = _whole_export(folder)
    if ADDRESS.fullmatch(repo_id):
        return upload(folder, files, repo_id, "the store")
    with _explained(f"{folder} was not pushed to {repo_id!r}", repo_id):
        api = _client(repo_id, revision)
        _check_token(api.whoami(), repo_id)
        remote = _remote(api, repo_id, private, revision)
        if not remote.branch:
            _create(api, repo_id, private, revision)
            remote = _remote(api, repo_id, private, revision)
        commit = api.create_commit(
            repo_id,
            [*_deletions(api, repo_id, remote, files), *_additions(folder, files)],
            commit_message=message,
            revision=revision,
            parent_commit=remote.head,
        )
        _read_back(api, repo_id, commit.oid, folder, files)
    return commit.commit_url


def check_push(repo_id: str, *, private: bool = True, revision: str | None = None) -> None:
    """Whether `push` could go through now, as far as can be told without changing anything at the hub.

    Raises:
      UserError: there is no token, or none that may write for that owner; or the repository is not one to push to.
    """
    if ADDRESS.fullmatch(repo_id):
        check_place(repo_id, "the store")
        return
    with _explained(f"nothing could be pushed to {repo_id!r}", repo_id):
        api = _client(repo_id, revision)
        _check_token(api.whoami(), repo_id)
        _remote(api, repo_id, private, revision)


@contextlib.contextmanager
def _explained(what: str, repo_id: str) -> Iterator[None]:
    """Turns whatever goes wrong at the hub into one line that begins with `what`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    # The hub's client raises its own errors, those of its HTTP library, OSError, ValueError and RuntimeError.
    except Exception as error:
        raise UserError(f"{what}: {reason(error, repr(repo_id)) or _short(error)}") from error


def _short(error: Exception) -> str:
    """An error of the hub's client that is not known here; what the hub said stands on its later lines."""
    text = " ".join(str(error).split())
    return f"the hub's client stopped ({type(error).__name__}: {text[:300]}); check the network, then push again"


def _client(repo_id: str, revision: str | None) -> Any:
    from huggingface_hub import HfApi, is_offline_mode

    if not REPOSITORY.fullmatch(repo_id):
        raise UserError("a repository is named OWNER/NAME; write it so")
    if revision is not None and (COMMIT.fullmatch(revision) or not REVISION.fullmatch(revision)):
        raise UserError(f"revision {revision!r} is not the name of a branch; give one")
    if is_offline_mode():
        raise UserError("HF_HUB_OFFLINE is set; unset it")
    return HfApi(token=True, library_name="dpo_jax")


def _whole_export(folder: Path) -> dict[str, str]:
    """Digest by name of what is to be uploaded, `SHA256SUMS` included."""
    if not (folder / tensors.OURS).is_file() or not (folder / tensors.SUMS).is_file():
        raise UserError(
            f"{folder} is not an export of dpo_jax ({tensors.OURS} or {tensors.SUMS} is missing); "
            "give a folder that training or `python -m dpo_jax.convert export` wrote"
        )
    changed = tensors.changed_files(folder)
    if changed:
        raise UserError(f"{folder} was changed since it was exported ({changed[0]}); export it again, then push it")
    sums = tensors.file_digest(tensors.member(folder, tensors.SUMS))
    return {**tensors.listed_files(folder), tensors.SUMS: sums}


def _check_token(who: Mapping[str, Any], repo_id: str) -> None:
    owner = repo_id.split("/")[0]
    roles = {org.get("name"): org.get("roleInOrg") for org in who.get("orgs") or ()}
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise UserError(f"the token of {who.get('name')!r} may only read; {LOG_IN} with one that may write")
    if owner != who.get("name") and (owner not in roles or roles[owner] == "read"):
        raise UserError(
            f"the token is of {who.get('name')!r}, who may not write for {owner!r}; push to {who.get('name')}/..., "
            f"or {LOG_IN} with a token that may"
        )


def _remote(api: "HfApi", repo_id: str, private: bool, revision: str | None) -> Remote:
    """The repository, which is ours to push to: not there, empty, or holding an export.

    Raises:
      UserError: it holds something else, or is as public or private as it should not be.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return Remote(False, None, frozenset())
    if bool(info.private) != private:
        raise UserError(
            "the repository is private; make it public on its page at the hub, or leave export.private or --public out"
            if info.private
            else "the repository is public; make it private on its page at the hub, or say that it may be public "
            "(export.private=false, --public)"
        )
    branch = True
    try:
        info = info if revision is None else api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        branch = False
    files = frozenset(file.rfilename for file in info.siblings or ())
    others = sorted(files - BARE)
    if others and tensors.OURS not in files:
        raise UserError(
            f"the repository holds {others[0]} and no {tensors.OURS}, so it is no export of dpo_jax and is left alone; "
            "push to another name, or empty it first"
        )
    return Remote(branch, info.sha, files)


def _create(api: "HfApi", repo_id: str, private: bool, revision: str | None) -> None:
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _additions(folder: Path, files: Mapping[str, str]) -> Iterator[Any]:
    from huggingface_hub import CommitOperationAdd

    for name in sorted(files):
        yield CommitOperationAdd(path_in_repo=name, path_or_fileobj=tensors.member(folder, name))


def _deletions(api: "HfApi", repo_id: str, remote: Remote, files: Mapping[str, str]) -> Iterator[Any]:
    """What the export that is there lists and this one lacks: a leftover shard would be a second model."""
    from huggingface_hub import CommitOperationDelete

    if tensors.SUMS in remote.files:
        earlier = Path(api.hf_hub_download(repo_id, tensors.SUMS, revision=remote.head)).parent
        for name in sorted((tensors.listed_files(earlier).keys() & remote.files) - files.keys()):
            yield CommitOperationDelete(path_in_repo=name, is_folder=False)


def _read_back(api: Any, repo_id: str, commit: str, folder: Path, files: Mapping[str, str]) -> None:
    """Compares a commit with the folder by the digests that the hub gives of its files."""
    found = {file.path: file for file in api.list_repo_tree(repo_id, recursive=True, revision=commit)}
    for name, digest in files.items():
        file = found.get(name)
        same = file is not None and (
            file.lfs.sha256 == digest if file.lfs is not None else file.blob_id == _git_digest(folder / name)
        )
        if not same:
            raise UserError(f"{name} is not at the hub as it is here (commit {commit}); push again")


def _git_digest(path: Path) -> str:
    """Git's name for a file's bytes, by which the hub knows small files."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
