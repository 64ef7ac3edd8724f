"""An adapter as PEFT writes it (LoRA and what goes with it), read into factors of the tensors of its base.

Everything in the folder must be understood: a tensor that belongs to nothing, or a half without the other, would be an
adapter that acts otherwise than where it was trained, without a word.
"""

import os
from pathlib import Path

import numpy as np

from dpo_jax.errors import UserError, nearest, short
from dpo_jax.hf.beside import ADAPTER, ADAPTER_CONFIG
from dpo_jax.hf.factors import EMBED, HEAD, Adapter, Factor, Key, Rows, same, size
from dpo_jax.hf.mapping import Scheme, TensorEntry
from dpo_jax.hf.peft_config import AdapterConfig, read_config
from dpo_jax.hf.peft_names import DOWN, GATE_UP, ExpertParameter, PeftPlaces, places
from dpo_jax.hf.tensors import DTYPES, PICKLES, Tensors, non_finite
from dpo_jax.model.spec import DecoderSpec

FILE = f"{ADAPTER}.safetensors"
PREFIX = "base_model.model."
INNER = ".base_layer"
PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "embedding a",
    ".lora_embedding_B": "embedding b",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".token_adapter.trainable_tokens_delta": "rows",
}
"""How names of PEFT's tensors end, and what they are of the module that stands before."""


def read_adapter(folder: Path, spec: DecoderSpec, scheme: Scheme, base: Tensors) -> Adapter:
    """The adapter of a PEFT folder, for the decoder of a base.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      spec: of the base, as its folder is.
      scheme: how the base's tensors are named (`checkpoint.scheme_of`).
      base: the base's tensors; those are read of which the adapter has a copy.

    Raises:
      UserError: anything in the folder that is not understood, is not built, is damaged, or fits another base.
    """
    config = read_config(folder)
    return _Reader(config, _opened(folder), places(spec, scheme, base.infos), base, spec.tied).adapter()


def _opened(folder: Path) -> Tensors:
    if not os.path.lexists(folder / FILE):
        there = sorted(path.name for path in folder.iterdir() if path.name.startswith(ADAPTER))
        pickles = [name for name in there if name.endswith(PICKLES)]
        if pickles:
            raise UserError(
                f"{folder} has no {FILE}, only {pickles[0]}, a format that can run code when it is opened and is never "
                "read; save the adapter with save_pretrained(..., safe_serialization=True) where it is trusted"
            )
        raise UserError(f"{folder / FILE} is missing; an adapter has it beside {ADAPTER_CONFIG}, so fetch it again")
    return Tensors(folder, FILE)


class _Reader:
    """Reads one folder; `found` becomes the adapter."""

    def __init__(self, config: AdapterConfig, tensors: Tensors, where: PeftPlaces, base: Tensors, tied: bool):
        self._config, self._tensors, self._places, self._base = config, tensors, where, base
        self._file = tensors.folder / FILE
        self._tied = tied and any(one.parts[0].leaf == HEAD for one in where.entries.values())
        self._factors: dict[Key, Factor] = {}
        self._replaced: dict[str, np.ndarray] = {}
        self._copies: dict[str, np.ndarray] = {}
        self._rows: dict[str, Rows] = {}

    def adapter(self) -> Adapter:
        """The whole of it."""
        modules, whole = self._sorted()
        self._read_experts({path: parts for path, parts in modules.items() if self._is_experts(path)})
        for path, parts in modules.items():
            if not self._is_experts(path):
                self._read_module(path, parts)
        for path, name in whole.items():
            self._read_whole(path, name)
        self._check_whole()
        if not self._factors and not self._replaced and not self._rows:
            raise UserError(f"{self._file} changes nothing of the base; give an adapter that was trained")
        unties = self._settle_head()
        return Adapter(self._factors, self._places.entries, self._replaced, self._rows, unties, self._config.dropout)

    # ------------------------------------------------------------------------------------------ what is there

    def _sorted(self) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """Names of tensors by module and part, and those of whole tensors of the base by path."""
        modules: dict[str, dict[str, str]] = {}
        whole: dict[str, str] = {}
        for name, info in self._tensors.infos.items():
            if info.dtype not in DTYPES:
                raise self._refuse(name, f"has dtype {info.dtype}; only {', '.join(DTYPES)} are read")
            path = name.removeprefix(PREFIX)
            if path == name:
                raise self._refuse(name, f"does not begin with {PREFIX!r}, as PEFT's do; save the adapter with PEFT")
            end = next((end for end in PARTS if path.endswith(end)), None)
            if end is None:
                whole[path] = name
            elif modules.setdefault(path.removesuffix(end), {}).setdefault(PARTS[end], name) != name:
                raise self._refuse(name, "is there twice, under two names; keep one")
        return modules, whole

    def _is_experts(self, path: str) -> bool:
        return self._places.fused(path.removesuffix(INNER)) is not None

    def _refuse(self, name: str, why: str) -> UserError:
        return UserError(f"{self._file}: tensor {short(name)!r} {why}")

    def _read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor in float32, of the shape that it must have."""
        found = self._tensors.infos[name].shape
        if found != shape:
            raise self._refuse(
                name, f"has shape {list(found)}, and {self._config.file.name} and the base ask for {list(shape)}"
            )
        array = self._tensors.read(name).astype(np.float32)
        bad = non_finite(array)
        if bad:
            raise self._refuse(name, f"has {bad} values that are NaN or infinite; take an earlier checkpoint")
        return array

    def _tensor(self, path: str, name: str) -> str:
        """The base's tensor of a path."""
        found = self._places.tensor(path)
        if found is None:
            near = nearest(path, self._places.tensors)
            of = f" (the adapter names {short(self._config.base)} as its base)" if self._config.base else ""
            hint = f"; the nearest is {near!r}" if near else ""
            raise self._refuse(name, f"is of nothing in the base {self._base.folder}{of}{hint}; give its own base")
        return found

    def _scale(self, path: str) -> float:
        return self._config.scale(path)

    # ------------------------------------------------------------------------------------------ modules

    def _read_module(self, path: str, parts: dict[str, str]) -> None:
        first = next(iter(parts.values()))
        tensor = self._tensor(f"{path}.weight", first)
        entry = self._places.entries[tensor]
        if "rows" in parts:
            self._read_rows(path, tensor, entry, parts.pop("rows"))
        if parts:
            self._add((tensor, None), self._factor(path, entry, parts), first)

    def _add(self, key: Key, factor: Factor, name: str) -> None:
        if key in self._factors:
            raise self._refuse(name, f"changes {short(key[0])!r} a second time; keep one of the two")
        self._factors[key] = factor

    def _factor(self, path: str, entry: TensorEntry, parts: dict[str, str]) -> Factor:
        first = next(iter(parts.values()))
        shape = entry.parts[0].shape
        if len(shape) != 2 or entry.column:
            raise self._refuse(first, f"is of {entry.name!r}, which is no matrix with inputs and outputs")
        embedding = entry.parts[0].leaf.endswith("/embedding") and entry.parts[0].leaf != HEAD
        left, right = ("embedding a", "embedding b") if embedding else ("a", "b")
        for part, other in ((left, right), (right, left)):
            if part in parts and other not in parts:
                raise self._refuse(parts[part], "is there without its other half; the file is not complete")
        wrong = [part for part in parts if part not in (left, right, "magnitude", "bias")]
        if wrong or left not in parts:
            kind = "an embedding" if embedding else "a linear layer"
            raise self._refuse(first, f"does not go with {entry.name!r}, which is {kind}")
        self._check_extras(parts, first)
        outputs, inputs = size(entry)
        rank = self._rank(path, parts[left])
        return Factor(
            self._read(parts[left], (rank, inputs)),
            self._read(parts[right], (outputs, rank)),
            self._scale(self._pattern_path(path)),
            self._read(parts["magnitude"], (outputs,)) if "magnitude" in parts else None,
            self._bias(entry, parts["bias"], outputs) if "bias" in parts else None,
        )

    def _pattern_path(self, path: str) -> str:
        """A parameter is looked up by its own name."""
        named = f"{path}.weight"
        return named if any(f".{named}".endswith(f".{one}") for one in self._config.target_parameters) else path

    def _rank(self, path: str, name: str) -> int:
        rank = self._config.rank(self._pattern_path(path))
        found = self._tensors.infos[name].shape
        if len(found) == 2 and found[0] != rank:
            why = f"has rank {found[0]}, and r or rank_pattern of {self._config.file.name} say {rank}; make them agree"
            raise self._refuse(name, why)
        return rank

    def _check_extras(self, parts: dict[str, str], first: str) -> None:
        wanted = {"magnitude": ("use_dora", self._config.dora), "bias": ("lora_bias", self._config.lora_bias)}
        for part, (key, on) in wanted.items():
            if part in parts and not on:
                raise self._refuse(parts[part], f"is there, and {key} of {self._config.file.name} is false; set it")
            if on and part not in parts:
                raise self._refuse(first, f"has no {part} beside it, which {key} asks for; the file is not complete")

    def _bias(self, entry: TensorEntry, name: str, outputs: int) -> np.ndarray:
        if bias_name(entry.name) not in self._places.entries:
            raise self._refuse(name, f"adds a bias to {entry.name!r}, which has none in the base's family; not built")
        return self._read(name, (outputs,))

    def _read_rows(self, path: str, tensor: str, entry: TensorEntry, name: str) -> None:
        tokens = self._config.tokens
        if isinstance(tokens, dict):
            keys = [key for key in tokens if f".{path}".endswith(f".{key}")]
            numbers = tokens[keys[0]] if keys else ()
        else:
            numbers = tokens
        if not numbers or len(entry.shape) != 2:
            raise self._refuse(name, f"is of no embedding that trainable_token_indices of {self._config.file} names")
        if max(numbers) >= entry.shape[0]:
            why = f"is for token {max(numbers)}, and {tensor!r} has {entry.shape[0]} rows; resize and save the base"
            raise self._refuse(name, why)
        self._rows[tensor] = Rows(numbers, self._read(name, (len(numbers), entry.shape[1])))

    # ------------------------------------------------------------------------------------------ experts

    def _read_experts(self, modules: dict[str, dict[str, str]]) -> None:
        for path, parts in modules.items():
            around = path.removesuffix(INNER)
            table = self._places.fused(around) or {}
            first = next(iter(parts.values()))
            if set(parts) != {"a", "b"}:
                raise self._refuse(first, "of all experts together must be a lora_A and a lora_B, and nothing else")
            if path != around and around not in modules:
                raise self._refuse(first, f"is within {short(around)!r}, of which there are no factors")
            if around + INNER in modules:
                matrix = GATE_UP if path != around else DOWN
            else:
                matrix = self._alone(around, table, first)
            if matrix not in table:
                raise self._refuse(first, f"is of {matrix}, which the experts of the base do not have")
            self._read_fused(f"{around}.{matrix}", table[matrix], parts)

    def _alone(self, around: str, table: dict[str, ExpertParameter], first: str) -> str:
        """Which parameter the factors are of where only one has any: the one that the config names."""
        named = [
            matrix
            for matrix in table
            if any(f".{around}.{matrix}".endswith(f".{one}") for one in self._config.target_parameters)
        ]
        if len(named) != 1:
            why = f"is of one parameter of {short(around)!r}, and target_parameters of {self._config.file} names"
            raise self._refuse(first, f"{why} {len(named)} of them; name the one")
        return named[0]

    def _read_fused(self, path: str, experts: ExpertParameter, parts: dict[str, str]) -> None:
        """A [E R, I] and B [O, E R], expert by expert in A and expert fastest in B.

        PEFT before 0.19 took O and I for each other where the matrices are [O, I].
        """
        rank, count, outputs = self._config.rank(path), experts.count, sum(experts.outputs)
        shapes = [(count * rank, experts.inputs), (outputs, count * rank)]
        swapped = [(count * rank, outputs), (experts.inputs, count * rank)]
        found = [self._tensors.infos[parts[part]].shape for part in ("a", "b")]
        old = experts.first_is_output and found == swapped and (found != shapes or self._config.swapped)
        left, right = (
            self._read(parts[part], shape) for part, shape in zip("ab", swapped if old else shapes, strict=True)
        )
        left = left.reshape(count, rank, -1)
        right = np.moveaxis(right.reshape(-1, rank, count), -1, 0)
        a, b = (right.swapaxes(-1, -2), left.swapaxes(-1, -2)) if old else (left, right)
        scale, start = self._scale(path), 0
        for keys, size_of_part in zip(experts.parts, experts.outputs, strict=True):
            for expert, key in enumerate(keys):
                rows = np.ascontiguousarray(b[expert, start : start + size_of_part])
                self._add(key, Factor(np.ascontiguousarray(a[expert]), rows, scale), parts["a"])
            start += size_of_part

    # ------------------------------------------------------------------------------------------ whole tensors

    def _read_whole(self, path: str, name: str) -> None:
        """A tensor of the base: trained whole, or only a copy (PEFT saves those of embeddings)."""
        copied = f"{INNER}." in path
        tensor = self._tensor(path.replace(f"{INNER}.", "."), name)
        entry = self._places.entries[tensor]
        module, _, kind = path.replace(f"{INNER}.", ".").rpartition(".")
        of_embedding = self._config.ties and self._tied and entry.parts[0].leaf == HEAD
        trained = not copied and (self._config.saves(module) or of_embedding)
        if kind == "bias" and not trained:
            if self._config.bias == "none":
                raise self._refuse(name, f"is there, and bias of {self._config.file.name} is none; set it to all")
            trained = True
        ends = entry.parts[0].leaf in (EMBED, HEAD)
        if not trained and not ends:
            raise self._refuse(name, "is a whole tensor that neither modules_to_save nor bias of the config names")
        if self._tensors.infos[name].shape != entry.shape and ends:
            rows = f"has {self._tensors.infos[name].shape[0]} rows, and the base {entry.shape[0]}"
            raise self._refuse(name, f"{rows}: its vocabulary was changed; resize and save the base, and give that")
        table = self._replaced if trained else self._copies
        if tensor in table:
            raise self._refuse(name, f"replaces {tensor!r} a second time; keep one of the two")
        table[tensor] = self._read(name, entry.shape)

    def _check_whole(self) -> None:
        """Drops copies of what the base has; one that differs takes its place, as in PEFT."""
        for tensor, copy in self._copies.items():
            held = tensor if tensor in self._base.infos else self._embedding()
            if held in self._base.infos and np.array_equal(self._base.read(held).astype(np.float32), copy):
                continue
            if self._tied or tensor in self._replaced:
                raise UserError(
                    f"{self._file}: the copy of {tensor!r} differs from the base's, {self._base.folder}; the adapter "
                    "was trained on another base: give that"
                )
            self._replaced[tensor] = copy
        both = [tensor for tensor in self._rows if tensor in self._replaced or (tensor, None) in self._factors]
        if both:
            raise UserError(f"{self._file}: {both[0]!r} has trained tokens beside another change; not built: merge it")

    # ------------------------------------------------------------------------------------------ a tied head

    def _embedding(self) -> str:
        return next(name for name, one in self._places.entries.items() if one.parts[0].leaf == EMBED)

    def _head(self) -> str:
        return next(name for name, one in self._places.entries.items() if one.parts[0].leaf == HEAD)

    def _settle_head(self) -> bool:
        """Whether a head that is tied becomes another matrix than the embedding; equal changes of both are one."""
        if not self._tied:
            return False
        embed, head = self._embedding(), self._head()
        left, right = self._replaced.get(embed), self._replaced.get(head)
        if left is not None and right is not None and np.array_equal(left, right):
            del self._replaced[head]
            left = right = None
        one, other = self._factors.get((embed, None)), self._factors.get((head, None))
        if one is not None and other is not None and same(one._replace(a=one.b.T, b=one.a.T), other):
            del self._factors[head, None]
            one = other = None
        changed = any(part is not None for part in (left, right, one, other))
        if changed and embed in self._rows:
            raise UserError(f"{self._file}: {embed!r} has trained tokens, and its head another change; not built")
        return changed


def bias_name(weight: str) -> str:
    """The bias that goes with a weight."""
    return f"{weight.removesuffix('.weight')}.bias"
