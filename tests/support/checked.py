"""Annotations that are checked while tests run: shapes by jaxtyping, everything else by beartype alone.

jaxtyping binds the arguments of every call, so that it takes a sixth of the suite's time where it looks at functions
that have no array; only the modules that annotate some are given to it.
"""

from collections.abc import Iterator
from pathlib import Path

from beartype import BeartypeConf
from beartype.claw import beartype_packages
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parents[2]


def modules(*, arrays: bool) -> Iterator[str]:
    """Names of the package's modules that annotate arrays, or of those that do not.

    Left out are those that name types which they import for pyright alone, as beartype cannot find these, and the
    packages' own files, whose names would stand for all that is in them.
    """
    for path in sorted((ROOT / "dpo_jax").rglob("*.py")):
        text = path.read_text("utf-8")
        annotates = "import jaxtyping" in text or "from jaxtyping" in text
        if annotates == arrays and (arrays or "TYPE_CHECKING" not in text) and path.stem != "__init__":
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts)


def check() -> None:
    """Check what is imported of the package from now on."""
    install_import_hook([*modules(arrays=True)], "beartype.beartype")
    beartype_packages([*modules(arrays=False)], conf=BeartypeConf(claw_is_pep526=False, is_pep484_tower=True))
