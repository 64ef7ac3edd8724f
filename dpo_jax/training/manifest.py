"""The manifest of a checkpoint: which files a step has, and the digest of each, so that any damage is noticed."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from dpo_jax.files import digest_of

MANIFEST = "manifest.json"
CHANGED = f"{MANIFEST} was changed"


class Damaged(Exception):  # noqa: N818 -- said of a checkpoint, and caught by whoever looks for one that is whole
    """What is wrong with a step."""


class Claim(NamedTuple):
    """What a manifest says of a file."""

    name: str
    size: int
    digest: str


def text_of(step: int, table: Mapping[str, Any]) -> str:
    """The manifest of a step whose files have these sizes (bytes) and digests, `{name: [size, digest]}`.

    Its own digest is in it: one that lacks an entry is noticed as well as a file that does.
    """
    body = json.dumps({"files": table, "step": step}, sort_keys=True)
    return json.dumps({"digest": digest_of(body), "files": table, "step": step}, indent=1, sort_keys=True) + "\n"


def claims_of(text: str, name: str, under: str = "") -> list[Claim]:
    """What a manifest that lies in the folder `name` says of the files whose names begin with `under`.

    A manifest counts under the name of the step that it was written for, and says of itself that nothing was taken out.

    Raises:
      Damaged: it was changed, or is of another step.
    """
    try:
        manifest = json.loads(text)
        step, table = manifest["step"], manifest["files"]
        if text != text_of(step, table) or not table:
            raise Damaged(CHANGED)
        claims = [Claim(file, size, digest) for file, (size, digest) in table.items()]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        raise Damaged(CHANGED) from None
    if str(step) != name:
        raise Damaged(f"it is of step {step}")
    return [claim for claim in claims if claim.name.startswith(under)]


def difference(claim: Claim, size: int, digest: str | None) -> str | None:
    """How a file with this size and digest (None: not looked at) is other than it was; None if it is not."""
    if size != claim.size:
        return f"{claim.name} has {size} bytes instead of {claim.size}"
    return None if digest in (None, claim.digest) else f"{claim.name} has other bytes than were saved"
