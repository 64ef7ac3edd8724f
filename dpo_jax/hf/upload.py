"""An exported folder to an object store: the list of its files comes last, and what is there is held against it."""

from collections.abc import Mapping
from pathlib import Path

from dpo_jax.errors import UserError
from dpo_jax.hf import tensors
from dpo_jax.stores import Store


def check_place(address: str, key: str) -> Store:
    """The store at an address, which can be written to and holds nothing, or an export.

    Raises:
      UserError: it cannot, or holds other things; begins with `key`.
    """
    store = Store(address, key)
    names = store.names()
    if names and tensors.OURS not in names:
        raise UserError(
            f"{key}: {address} holds {sorted(names)[0]} and no {tensors.OURS}, so it is no export of dpo_jax and is "
            "left alone; name another place"
        )
    store.check()
    return store


def upload(folder: Path, files: Mapping[str, str], address: str, key: str) -> str:
    """Write the files of an export, those of `files`, and return where they are; files of an earlier one that it lacks
    are deleted.

    While some are written there is no `SHA256SUMS`, so that nobody takes a part for the whole.

    Raises:
      UserError: they cannot be written, or are not there afterwards; begins with `key`.
    """
    store = check_place(address, key)
    there = store.objects()
    earlier = tensors.listed_in(store.read(tensors.SUMS).decode("utf-8", "replace")) if tensors.SUMS in there else {}
    store.delete([tensors.SUMS, *(earlier.keys() & there.keys() - files.keys())])
    for name in sorted(files, key=lambda name: name == tensors.SUMS):
        store.put(tensors.member(folder, name), name)
    found = store.objects()
    for name in files:
        size = (folder / name).stat().st_size
        if name not in found or found[name].size != size:
            raise UserError(f"{key}: {address} has not all of {name} ({size} bytes); run the same command again")
    return store.address
