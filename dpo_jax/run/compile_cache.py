"""The folder of compiled programs that later runs start from.

jax keeps what took longer than a second to compile, under a key of the program, its options, jaxlib and the devices.
Several runs may share the folder: it is locked while it is read or written, an entry that cannot be read costs a
warning and is compiled again, and what was not used for longest is removed once all take more than `MOST_BYTES`.
A program for a CPU holds the instructions of that very kind of CPU, so each kind has a folder of its own.
"""

import hashlib
import os
import platform
from pathlib import Path

from dpo_jax.errors import UserError, printable

MOST_BYTES = 4 << 30
AUTO = "auto"


def use(wanted: str | None) -> Path | None:
    """Keep compiled programs from now on; to be called before anything is compiled. Returns the folder, if one is used.

    Args:
      wanted: the setting `model.compile_cache`, see `folder_for`.

    Raises:
      UserError: the folder that was given cannot be made or written to.
    """
    import jax

    folder = folder_for(wanted)
    if folder is None:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if str(folder) == jax.config.values["jax_compilation_cache_dir"]:  # jax's own business, and its size is the user's
        return folder
    if _can_be_written(folder):
        jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))
        if jax.config.values["jax_compilation_cache_max_size"] == -1:
            jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
        return folder
    if wanted == AUTO:  # a home that is read-only, or none at all, is as common as it is harmless
        return None
    raise UserError(f"model.compile_cache: {printable(str(wanted))} cannot be written to; name another folder, or null")


def folder_for(wanted: str | None) -> Path | None:
    """The folder that a setting means, with what jax was told itself; None where nothing is kept.

    A folder that was given wins; else JAX_COMPILATION_CACHE_DIR; else a folder of the user's caches. Where jax was told
    to keep nothing (JAX_ENABLE_COMPILATION_CACHE=false), nothing is kept.

    Args:
      wanted: a folder, "auto", or None to keep nothing.
    """
    import jax

    values = jax.config.values
    if wanted is None or not values["jax_enable_compilation_cache"]:
        return None
    if wanted == AUTO and values["jax_compilation_cache_dir"] is not None:
        return Path(values["jax_compilation_cache_dir"])
    return (user_folder() if wanted == AUTO else Path(wanted).expanduser()) / kind_of_host()


def _can_be_written(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def user_folder() -> Path:
    """Where programs are kept unless told otherwise: the user's folder of caches, as the platform has it."""
    given = os.environ.get("XDG_CACHE_HOME")
    home = Path(given) if given and os.path.isabs(given) else Path("~/.cache").expanduser()
    return home / "dpo_jax" / "compiled"


def kind_of_host(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's architecture and a digest of what it can do: `x86_64-1f0c9a2b`."""
    machine = platform.machine() or "cpu"
    try:
        lines = cpuinfo.read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    told = {line for line in lines if line.lower().startswith(("flags", "features", "model name", "cpu part"))}
    return f"{machine}-{hashlib.sha256(repr(sorted(told or lines[:1])).encode()).hexdigest()[:8]}"
