"""Files of a Hugging Face folder: read without trust, and written so that nothing is ever half there.

A folder holds its tensors in `model.safetensors`, or in shards that `model.safetensors.index.json` lists. Names stay
inside the folder, tensors come from safetensors only, and everything is checked before a tensor is read. Tensors are
read and written one at a time. A new folder is finished and verified under a hidden name before it takes its place.
Nothing here knows a model.
"""

import contextlib
import copy
import functools
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dpo_jax.errors import UserError, one_line
from dpo_jax.files import digest_of, file_digest, repeated_key, sync_folder
from dpo_jax.hf import hub

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
OURS = "dpo_jax.json"
SUMS = "SHA256SUMS"
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5", ".npz")
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""What weights may be, by safetensors' names."""
STORED = DTYPES | {"BOOL": np.dtype(bool), "F64": np.dtype(np.float64)}
STORED |= {f"{kind.upper()}{8 * size}": np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)}
FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
STORED |= {name: np.dtype(getattr(ml_dtypes, kind)) for name, kind in FLOAT8.items()}
"""What any tensor of a folder may be, such as a mask that is carried along."""
MAX_JSON_BYTES = 64 << 20
MAX_JSON_PARTS = 200_000
"""Lists and objects that a JSON file may hold: each takes 100 times the memory that it takes in the file."""
SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md")
"""What a hub repository may hand us beside its tensors."""


class TensorInfo(NamedTuple):
    """Where a tensor lies and what it is; `dtype` is safetensors' name for it, such as `BF16`."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def local_folder(
    folder_or_hub_id: str | Path,
    patterns: Sequence[str] = ("*.safetensors", *SIDE_FILES),
    revision: str | None = None,
) -> Path:
    """The folder itself if it exists here, otherwise the hub repository of that name, downloaded (or from its cache).

    Raises:
      UserError: there is no such folder, and no such repository or revision can be had (`HF_HUB_OFFLINE` is honoured);
        or a folder is to have a revision.
    """
    folder = Path(folder_or_hub_id).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"{folder} is a folder, which has no revision {revision!r}; leave the revision out")
        return folder
    if folder.exists():
        raise UserError(f"{folder} is a file, not a model folder; give the folder that holds config.json")
    if isinstance(folder_or_hub_id, Path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(folder_or_hub_id)):
        raise UserError(f"there is no folder {str(folder_or_hub_id)!r}; give an existing model folder or a hub id")
    folder = hub.snapshot(str(folder_or_hub_id), patterns, revision)
    if "*.safetensors" in patterns and not any(folder.glob("*.safetensors")):
        raise UserError(_no_tensors(str(folder_or_hub_id), hub.listing(str(folder_or_hub_id), folder)))
    return folder


def member(folder: Path, name: str) -> Path:
    """Path of a regular file of the folder.

    A link may leave the folder only towards the `blobs` of the hub cache that the folder itself is a snapshot of.

    Raises:
      UserError: the file is missing, is not a regular file, or lies elsewhere.
    """
    path, root = folder / name, folder.resolve()
    if not os.path.lexists(path):
        raise UserError(f"{folder}: {name} is missing; the folder is not complete, or the wrong one")
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} is a link that leads nowhere; put the file itself into the folder") from error
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not real.is_relative_to(root) and not real.is_relative_to(blobs):
        raise UserError(f"{path} leads out of its folder, to {real}; put the file itself into the folder")
    if not real.is_file():
        raise UserError(f"{path} is not a regular file; put the file itself into the folder")
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object from a file of the folder; parsed once for as long as the file stays the same.

    Raises:
      UserError: the file is missing, cannot be read, is too large, not JSON, not an object, or names a key twice.
    """
    path = member(folder, name)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{path} has {path.stat().st_size} bytes, more than the {MAX_JSON_BYTES} such a file may have")
    return copy.deepcopy(_parsed(path, read_bytes(path)))


def read_bytes(path: Path) -> bytes:
    """A file's content; raises UserError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); make it readable, or fetch it again") from error


@functools.lru_cache(maxsize=32)
def _parsed(path: Path, content: bytes) -> dict[str, Any]:
    parts = content.count(b"[") + content.count(b"{")
    if parts > MAX_JSON_PARTS:
        raise UserError(f"{path} holds {parts} lists and objects, more than the {MAX_JSON_PARTS} such a file may hold")
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({one_line(error)}); fetch or write it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object; fetch or write it again")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := repeated_key(pairs)) is not None:
        raise ValueError(f"key {twice!r} stands there twice")
    return dict(pairs)


PIECE_BYTES = 1 << 20
"""Bytes of a tensor that are read at a time."""


class Tensors:
    """The tensors of a folder: `infos` by name, in file and offset order. Files stay mapped while this lives.

    `quantised` names the method by which a folder is packed (see `quantised`), `spare` tensors that a model need not
    have.
    """

    quantised: str = ""
    spare: frozenset[str] = frozenset()

    def __init__(self, folder: Path, file: str | None = None):
        """Opens and checks every tensor file of the folder, or the one that is named; reads no tensor."""
        self.folder = folder
        self.files, self.weight_map = _tensor_files(folder) if file is None else ([file], None)
        opened = {file: _open(folder, file) for file in self.files}
        self._handles = {file: handle for file, (handle, _) in opened.items()}
        self._places = {file: places for file, (_, places) in opened.items()}
        self.metadata = {file: dict(handle.metadata() or {}) for file, handle in self._handles.items()}
        self.infos: dict[str, TensorInfo] = {}
        for file, handle in self._handles.items():
            self._add(file, handle)
        self._check_index()

    def _add(self, file: str, handle: safe_open) -> None:
        for name in handle.offset_keys():
            if name in self.infos:
                raise UserError(f"tensor {name!r} is in both {self.infos[name].file} and {file} of {self.folder}")
            part = handle.get_slice(name)
            info = TensorInfo(file, part.get_dtype(), tuple(part.get_shape()))
            if info.dtype not in STORED:
                raise UserError(
                    f"tensor {name!r} of {self.folder / file} has dtype {info.dtype}; "
                    f"only {', '.join(STORED)} are read: dequantise or convert the model first"
                )
            self.infos[name] = info

    def _check_index(self) -> None:
        if self.weight_map is None:
            return
        for name, file in self.weight_map.items():
            if name not in self.infos or self.infos[name].file != file:
                raise UserError(f"{self.folder / INDEX} puts tensor {name!r} into {file}, which does not hold it")
        extra = next((name for name in self.infos if name not in self.weight_map), None)
        if extra is not None:
            raise UserError(f"{self.folder / self.infos[extra].file} holds {extra!r}, which {INDEX} does not list")

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or the part of it that `index` selects, as a new array."""
        info = self.infos[name]
        if info.dtype in FLOAT8:  # NumPy has none, so safetensors does not read it
            return np.concatenate([np.empty(0, STORED[info.dtype]), *self.pieces(name)]).reshape(info.shape)[index]
        handle = self._handles[info.file]
        try:
            return handle.get_slice(name)[index] if index else handle.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{self.folder / info.file}: tensor {name!r}: {one_line(error)}") from error

    def exact(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """As `read`, with all digits that the folder gives, which for packed weights are more than `infos` says."""
        return self.read(name, index)

    def is_packed(self, name: str) -> bool:
        """Whether reading a part takes as long as reading the whole tensor."""
        return False

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The numbers of a tensor in their order, some at a time; what `read` maps into memory stays there."""
        info = self.infos[name]
        dtype = STORED[info.dtype]
        begin, end = self._places[info.file][name]
        with member(self.folder, info.file).open("rb") as file:
            file.seek(begin)
            for start in range(begin, end, PIECE_BYTES):
                yield np.frombuffer(file.read(min(PIECE_BYTES, end - start)), dtype)


def tensor_names(folder: Path) -> list[str]:
    """Names of the folder's tensors; none where it has no tensor files (yet)."""
    there = any(os.path.lexists(folder / name) for name in (SINGLE, INDEX))
    return list(Tensors(folder).infos) if there else []


def _open(folder: Path, file: str) -> tuple[safe_open, dict[str, tuple[int, int]]]:
    """A tensor file, and where in it the bytes of each tensor begin and end."""
    path = member(folder, file)
    try:
        with path.open("rb") as opened:
            text = opened.read(min(MAX_JSON_BYTES, *struct.unpack("<Q", opened.read(8))))
            after = opened.tell()
        if text.count(b"{") > MAX_JSON_PARTS:
            raise ValueError(f"a header of more than {MAX_JSON_PARTS} tensors")
        handle = safe_open(path, framework="numpy")
        header = json.loads(text, object_pairs_hook=_unique)  # safetensors lets the last of two equal names pass
        header.pop("__metadata__", None)
        places = {name: tuple(after + offset for offset in info["data_offsets"]) for name, info in header.items()}
        return handle, places
    except (SafetensorError, OSError, ValueError, RecursionError, struct.error) as error:
        raise UserError(f"{path} is not a whole safetensors file ({one_line(error)}); fetch it again") from error


def _tensor_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the tensor files, and the index's map from tensor to file if there is an index."""
    if os.path.lexists(folder / INDEX):
        weight_map = _weight_map(folder)
        files = sorted(set(weight_map.values()))
        if os.path.lexists(folder / SINGLE) and files != [SINGLE]:
            raise UserError(f"{folder} holds both {SINGLE} and {INDEX}; remove the one that is not the model")
        return files, weight_map
    if os.path.lexists(folder / SINGLE):
        return [SINGLE], None
    raise UserError(_no_tensors(str(folder), [path.name for path in folder.iterdir()]))


def _no_tensors(where: str, names: Sequence[str]) -> str:
    """Why a folder or repository with these files gives no tensors."""
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        return (
            f"{where} has no {SINGLE}, only {pickles[0]}, a format that can run code when it is opened and is never "
            "read; save the model with save_pretrained(..., safe_serialization=True) where it is trusted"
        )
    return f"{where} has neither {SINGLE} nor {INDEX}; give a folder with safetensors weights"


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX} has no weight_map of tensor names to files; fetch it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not SHARD_NAME.fullmatch(file):
            raise UserError(
                f"{folder / INDEX} names {file!r} for {name!r}; only a plain *.safetensors name is followed"
            )
    return weight_map


def non_finite(array: np.ndarray) -> int:
    """How many elements are NaN or infinite."""
    if array.dtype == DTYPES["BF16"]:  # ml_dtypes' isfinite goes through float32 element by element, 8 times slower
        return int(np.count_nonzero((array.view(np.uint16) & 0x7F80) == 0x7F80))
    return array.size - int(np.count_nonzero(np.isfinite(array)))


def weights_digest(folder: str | Path) -> str:
    """SHA-256 over the files of tensors, by name: a key for what was computed with them."""
    folder = Path(folder)
    return digest_of("".join(file_digest(member(folder, file)) for file in _tensor_files(folder)[0]))


def stamps(folder: Path, files: Sequence[str] = ()) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of change of files of a folder, by default those of tensors: other weights have others."""
    files = files or _tensor_files(folder)[0]
    found = ((file, member(folder, file).stat()) for file in files)
    return tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in found)


def write_tensors(
    path: Path, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], fetch: Callable[[str], np.ndarray]
) -> str:
    """Writes a safetensors file tensor by tensor, in the order of `infos`, and returns the SHA-256 of what was meant.

    Only one tensor is in memory at a time. The header is the one that safetensors itself writes for that order, so
    that tensors which did not change give a file that did not change.
    """
    digest = hashlib.sha256()
    with path.open("xb") as file:
        header = _header(infos, metadata)
        file.write(header)
        digest.update(header)
        for name, info in infos.items():
            part = _bytes_of(name, info, fetch(name))
            file.write(part)
            digest.update(part)
            del part  # before the next tensor is fetched
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (_, dtype, shape) in infos.items():
        start, end = end, end + num_bytes(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def num_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor takes in a file."""
    return int(np.prod(shape, dtype=np.int64)) * STORED[dtype].itemsize


def _bytes_of(name: str, info: TensorInfo, array: np.ndarray) -> memoryview:
    assert array.shape == info.shape and array.dtype == STORED[info.dtype], (name, info, array.shape, array.dtype)
    # Every kernel arrives as a transposed view; the file holds rows in C order.
    array = np.ascontiguousarray(array)
    assert array.flags.c_contiguous, name
    return array.reshape(-1).view(np.uint8).data


def check_tensors(path: Path, infos: Mapping[str, TensorInfo], digest: str) -> None:
    """Reopens a written file and holds it against what was meant.

    Raises:
      OSError: a name, shape, dtype or byte differs.
    """
    with safe_open(path, framework="numpy") as file:
        parts = {name: file.get_slice(name) for name in file.offset_keys()}
        found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    if found != {name: (dtype, shape) for name, (_, dtype, shape) in infos.items()} or file_digest(path) != digest:
        raise OSError(f"{path} does not read back as it was written")


# ---------------------------------------------------------------------------------------------- replacing a folder


def check_target(target: Path, replace: bool) -> None:
    """Refuses a target in which anything of the user's would be lost."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target} is a link or a file; give a folder that does not exist yet")
    if not target.exists() or not any(target.iterdir()):
        return
    if not replace or not (target / OURS).is_file():
        raise UserError(f"{target} exists and is not empty; give another folder, or move it away first")
    changed = changed_files(target)
    if changed:
        raise UserError(f"{target} was changed since it was exported ({changed[0]}); move it away first")


def listed_files(folder: Path) -> dict[str, str]:
    """What an export's `SHA256SUMS` says: digest by name. Empty where there is none."""
    return listed_in((folder / SUMS).read_text("utf-8")) if (folder / SUMS).is_file() else {}


def listed_in(sums: str) -> dict[str, str]:
    """The same of the file's text."""
    return {name: digest for digest, _, name in (line.partition("  ") for line in sums.splitlines())}


def changed_files(folder: Path) -> list[str]:
    """Files of an export that are new, missing, or other than its `SHA256SUMS` says."""
    listed = listed_files(folder)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {SUMS}
    same = {name for name in found & listed.keys() if file_digest(folder / name) == listed[name]}
    return sorted((found | listed.keys()) - same)


@contextlib.contextmanager
def staging(target: Path, need: int, replace: bool) -> Iterator[Path]:
    """A new folder beside the target that takes its place if the block ends well, and vanishes if not."""
    folder = target.absolute().with_name(f".{target.absolute().name}.tmp-{os.getpid()}")
    with refused_by_the_disk(target):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder.parent).free
            if free < need:
                raise UserError(f"{target} needs {need} bytes, {free} are free there; make room or give another folder")
            shutil.rmtree(folder, ignore_errors=True)  # of a process that had our number and was killed
            folder.mkdir()
            yield folder
            check_target(target, replace)
            _publish(folder, target.absolute())
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def refused_by_the_disk(target: Path) -> Iterator[None]:
    """What the system refuses in the block is an error of the user's, in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{target} cannot be written ({one_line(error)}); make room or give another folder") from error


def _publish(staging: Path, target: Path) -> None:
    """Two renames: at any moment the old folder or the new one is whole, under its name or a hidden one beside it."""
    for folder in [staging, *(path for path in staging.rglob("*") if path.is_dir())]:
        sync_folder(folder)
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(staging, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> str:
    """Writes a small new file, down to the disk, and returns its SHA-256."""
    path.parent.mkdir(exist_ok=True)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digest_of(data)
