"""Object stores, by address: `gs://BUCKET/PATH`, `s3://BUCKET/PATH`."""

import importlib.util
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.errors import UserError, one_line

ADDRESS = re.compile(r"(gs|s3)://[^/]+/.*[^/]/*")
"""An address in a store, below the bucket itself."""
NEEDED = {"gs": ("gcsfs", "dpo_jax[gcs]"), "s3": ("s3fs", "dpo_jax[s3]")}
"""The package that reaches each kind of store, and what is installed for it."""
CHECKSUMS = ("crc32c", "md5Hash", "ETag")
"""What a store says of an object's bytes; the first that it says counts."""
REMEDY = "check the network, and that the credentials of this machine may write there"
_THEIRS = ("gcsfs", "google", "aiohttp", "fsspec", "s3fs", "botocore", "aiobotocore")
"""Packages whose errors are a store's."""


class Stored(NamedTuple):
    """What a store says of an object."""

    size: int
    """In bytes."""
    checksum: str


class Store:
    """The objects whose names begin with an address. Every error of it is one line that begins with `key`, the setting
    that names it."""

    def __init__(self, address: str, key: str):
        """Nothing need be there yet.

        Raises:
          UserError: what reaches such a store is not installed.
        """
        self.address, self._key = address.rstrip("/"), key
        scheme, _, self._path = self.address.partition("://")
        package, install = NEEDED[scheme]
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{key}: {address} needs {package}; pip install '{install}'")
        from etils.epath import backend

        # the very one that Orbax asks, so that neither remembers what the other has deleted
        self._files = backend.fsspec_backend.fs(self.address)

    def check(self) -> None:
        """Write an object and delete it again.

        Raises:
          UserError: the store cannot be reached, or refuses.
        """
        probe = f"probe-{uuid.uuid4().hex}"
        self.write(probe, b"?")
        self.delete([probe])

    def names(self) -> list[str]:
        """First parts of the names of all objects."""
        with suppress(FileNotFoundError):
            entries = [str(entry).rstrip("/") for entry in self._ask(self._files.ls, self._path, detail=False)]
            return [entry.rsplit("/", 1)[1] for entry in entries if entry != self._path]
        return []

    def objects(self, below: str = "") -> dict[str, Stored]:
        """All objects below a name, by the rest of theirs."""
        start = f"{self._path}/{below}/" if below else f"{self._path}/"
        with suppress(FileNotFoundError):
            found = self._ask(self._files.find, start, detail=True)
            return {
                name.removeprefix(start): self._about(name, info) for name, info in found.items() if name[-1] != "/"
            }
        return {}

    def read(self, name: str) -> bytes:
        """An object; raises FileNotFoundError where it is not there."""
        return self._ask(self._files.cat_file, f"{self._path}/{name}")

    def write(self, name: str, data: bytes) -> None:
        """Write an object, whole or not at all."""
        try:
            self._ask(self._files.pipe_file, f"{self._path}/{name}", data)
        except FileNotFoundError as error:
            problem = "there is no such bucket; make it, or correct the address"
            raise UserError(f"{self._key}: {self.address}: {problem}") from error

    def put(self, path: Path, name: str) -> None:
        """Write an object from a file, some bytes at a time."""
        self._ask(self._files.put_file, str(path), f"{self._path}/{name}")

    def copy(self, source: str, target: str) -> None:
        """Write an object again under another name."""
        self._ask(self._files.copy, f"{self._path}/{source}", f"{self._path}/{target}")

    def delete(self, names: Iterable[str]) -> None:
        """Delete those of the objects that are there."""
        if paths := [f"{self._path}/{name}" for name in names]:
            with suppress(FileNotFoundError):
                self._ask(self._files.rm, paths)

    def reason(self, error: Exception) -> str | None:
        """What the store, or what was between, has said; None for an error of ours."""
        whose = type(error).__module__.split(".")[0]
        theirs = whose in _THEIRS or isinstance(error, OSError) or self.address in str(error)
        return one_line(error) if theirs or "storage/v1" in str(error) else None

    def _about(self, name: str, info: Mapping[str, Any]) -> Stored:
        sums = [str(info[kind]) for kind in CHECKSUMS if info.get(kind)]
        if not sums:
            raise UserError(f"{self._key}: the store gives no checksum of {name}; choose a folder on a disk")
        return Stored(int(info["size"]), sums[0])

    def _ask(self, call: Callable[..., Any], *arguments: Any, **how: Any) -> Any:
        """Call the store, past what is remembered of it; raises FileNotFoundError where an object is not there.

        Raises:
          UserError: the store cannot be reached, or refuses.
        """
        self._files.invalidate_cache()
        try:
            return call(*arguments, **how)
        except FileNotFoundError:
            raise
        except Exception as error:
            if (reason := self.reason(error)) is None:
                raise
            raise UserError(f"{self._key}: {self.address}: {reason}; {REMEDY}") from error
