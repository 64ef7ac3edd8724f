"""A folder of packed weights, seen as the plain folder that it was made of.

Every weight is computed by the formula of its format (`formats`) in float32 when it is read, and rounded once. In which
dtype: bitsandbytes writes beside each weight of 4 bits the dtype that it becomes, and it does become that whatever it
is then used in, as when transformers dequantises it. Other formats name none: `exact` gives their float32, and `read`
what a plain folder would hold, in the dtype that `config.json` names. What is packed is seen from what stands beside a
tensor; what scales activations is left out, so that these are the weights and nothing else.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.hf import tensors
from dpo_jax.hf.formats import ACTIVATIONS, FORMATS, MARKS, FourBits, four_bits
from dpo_jax.hf.packed import Damaged, PackedFormat, Plan, Stem
from dpo_jax.hf.quantisation import KEY, Method, method_of
from dpo_jax.hf.tensors import STORED, TensorInfo, Tensors, read_json

CONFIG = "config.json"


def opened(folder: Path, *, unrounded: bool = False) -> Tensors:
    """The tensors of a folder, those that are packed as the plain ones that they stand for.

    Args:
      folder: of any model; one without a `quantization_config` is opened as it is.
      unrounded: whether bitsandbytes' weights of 4 bits keep all digits, instead of being rounded to the dtype that
        they name (bitsandbytes itself keeps them where it computes in float32).

    Raises:
      UserError: a tensor is not as its format has it, or is packed in another way than `config.json` says.
    """
    there = os.path.lexists(folder / CONFIG)
    method = method_of(read_json(folder, CONFIG), folder / CONFIG) if there else None
    stored = Tensors(folder)
    _check_marks(stored, method)
    return stored if method is None else Quantised(stored, method, unrounded=unrounded)


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of the plain folder."""
    return {name: value for name, value in config.items() if name != KEY}


def _check_marks(stored: Tensors, method: Method | None) -> None:
    """Refuses a tensor that another method packed than the config names."""
    for name, info in stored.infos.items():
        mark = next((mark for mark in MARKS if name.endswith(mark)), None)
        if mark is not None and (method is None or method.name not in MARKS[mark]):
            says = f"has no {KEY}" if method is None else f"says quant_method {method.name!r}"
            raise UserError(
                f"{stored.folder / info.file}: tensor {name!r} is packed by {' or '.join(MARKS[mark])}, and "
                f"{CONFIG} {says}; fetch the model again, {CONFIG} and all"
            )


class _Weight(NamedTuple):
    stem: Stem
    row: PackedFormat
    plan: Plan


class Quantised(Tensors):
    """The plain tensors of a folder of packed ones; `stored` are those that are there."""

    def __init__(self, stored: Tensors, method: Method, *, unrounded: bool = False):
        """Plans every packed weight from the headers; see `opened`."""
        self.stored, self.quantised, self._unrounded = stored, method.name, unrounded
        self.folder, self.files, self.metadata = stored.folder, stored.files, stored.metadata
        self._weights: dict[str, _Weight] = {}
        parts = self._planned(method)
        if not self._weights:
            raise UserError(
                f"{self.folder / CONFIG}: {KEY} says {method.name!r}, and no tensor is packed by it; "
                f"take {KEY} out of a copy of the folder"
            )
        self.infos: dict[str, TensorInfo] = {}
        for name, info in stored.infos.items():
            if name not in parts:
                self.infos[name] = info
            elif (plain := parts[name]) is not None:
                plan = self._weights[plain].plan
                self.infos[plain] = TensorInfo(info.file, plan.dtype or method.dtype, plan.shape)
        with_map = stored.weight_map is not None
        self.weight_map = {name: info.file for name, info in self.infos.items()} if with_map else None
        self.spare = frozenset(self._zero_biases() if method.name in ("gptq", "awq") else ())

    def _planned(self, method: Method) -> dict[str, str | None]:
        """Plans the weights; the tensors that they are made of, the codes of each with the plain name."""
        rows, dropped = FORMATS[method.name], ACTIVATIONS.get(method.name, ())
        parts: dict[str, str | None] = {}
        for name, infos in _stems(self.stored.infos, rows, dropped).items():
            parts |= {name + suffix: None for suffix in infos}
            infos = {suffix: info for suffix, info in infos.items() if suffix not in dropped}
            if not infos:
                continue
            stem = Stem(name, infos, self.folder, lambda suffix, name=name: self.stored.read(name + suffix))
            row = _row_of(stem, rows)
            plain = name + row.plain
            if row.plain not in infos and plain in self.stored.infos:
                raise stem.wrong(row.codes, f"stands beside {plain!r}, and is the same weight")
            self._weights[plain] = _Weight(stem, row, row.plan(stem, method))
            parts[name + row.codes] = plain
        return parts

    def _zero_biases(self) -> Iterator[str]:
        """Biases of nothing but zeros, which GPTQ writes for layers that have none."""
        for weight in self._weights.values():
            name = f"{weight.stem.name}.bias"
            if name in self.infos and not self.stored.read(name).any():
                yield name

    def is_packed(self, name: str) -> bool:
        """Whether the whole tensor is computed for any part of it that is read."""
        return name in self._weights

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor or a part of it, in the dtype that `infos` names; a packed one is computed whole, then cut."""
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, which every reader looks for
            return self.exact(name, index).astype(STORED[self.infos[name].dtype], copy=False)

    def exact(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The same with all its digits: float32, or the dtype that the format itself names.

        Raises:
          UserError: a scale or a weight is NaN or infinite, or a group does not exist.
        """
        if name not in self._weights:
            return self.stored.read(name, index)
        stem, row, plan = self._weights[name]
        arrays = self._arrays(name)
        with np.errstate(over="ignore", invalid="ignore"):
            try:
                found = row.weight(arrays, plan)
            except Damaged as error:
                raise stem.wrong(error.suffix, str(error)) from error
            assert found.shape == plan.shape and found.dtype == np.float32, (name, found.shape, plan)
            if plan.dtype is not None and not self._unrounded:
                found = found.astype(STORED[plan.dtype], copy=False)
        if bad := tensors.non_finite(found):
            raise stem.wrong(row.codes, f"gives {bad} weights that are NaN or infinite")
        return found[index] if index else found

    def four_bits(self, name: str) -> FourBits | None:
        """A weight of bitsandbytes' 4 bits as it is packed; None for any other tensor."""
        weight = self._weights.get(name)
        is_one = weight is not None and weight.row.weight is FORMATS["bitsandbytes"][0].weight
        return four_bits(self._arrays(name), weight.plan) if weight is not None and is_one else None

    def _arrays(self, name: str) -> dict[str, np.ndarray]:
        """What a packed weight is made of, by suffix."""
        stem, row, _ = self._weights[name]
        arrays = {suffix: self.stored.read(stem.name + suffix) for suffix in stem.infos}
        for suffix, array in arrays.items():
            if suffix != row.codes and not np.isfinite(array.astype(np.float32)).all():
                raise stem.wrong(suffix, "has values that are NaN or infinite")
        return arrays

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The numbers of a tensor in their order, exactly, some at a time."""
        if name not in self._weights:
            yield from self.stored.pieces(name)
            return
        flat = self.exact(name).reshape(-1)
        for start in range(0, flat.size, tensors.PIECE_BYTES):
            yield flat[start : start + tensors.PIECE_BYTES]


def _stems(
    infos: Mapping[str, TensorInfo], rows: tuple[PackedFormat, ...], dropped: tuple[str, ...]
) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of packed weights, by stem and suffix; a plain `.weight` alone is not one."""
    suffixes = {suffix for row in rows for suffix in (*row.needed, *row.optional)} | {*dropped}
    ends = tuple(sorted(suffixes - {".weight"}, key=len, reverse=True))
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in infos.items():
        if name.endswith(ends):
            suffix = next(end for end in ends if name.endswith(end))
            found.setdefault(name.removesuffix(suffix), {})[suffix] = info
    if ".weight" in suffixes:
        for stem, own in found.items():
            if f"{stem}.weight" in infos and not own.keys() <= {*dropped}:
                own[".weight"] = infos[f"{stem}.weight"]
    return found


def _row_of(stem: Stem, rows: tuple[PackedFormat, ...]) -> PackedFormat:
    """The format of a packed weight, all of whose tensors are there."""
    fits = [row for row in rows if row.fits(stem.infos)]
    if len(fits) != 1:
        raise stem.wrong(next(iter(stem.infos)), "is packed in two ways at once: " + ", ".join(stem.infos))
    row = fits[0]
    missing = [suffix for suffix in row.needed if suffix not in stem.infos]
    if missing:
        raise stem.wrong(missing[0], f"is missing, and {stem.name + next(iter(stem.infos))!r} is there")
    more = [suffix for suffix in stem.infos if suffix not in (*row.needed, *row.optional)]
    if more:
        raise stem.wrong(more[0], f"does not belong beside {stem.name + row.codes!r}")
    return row
