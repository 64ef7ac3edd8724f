"""Module paths of PEFT, which are those of the model in transformers' memory, as tensors of the base's folder.

The two differ where transformers 5 fuses what lies apart (the experts of Mixtral, Qwen and their kin are one parameter
in memory, and a tensor for each in the folder), where it renames, and where a decoder stands within a larger model.

    in memory                                    in the folder
    model.layers.0.mlp.experts.gate_up_proj      model.layers.0.block_sparse_moe.experts.{0, 1, ..}.{w1, w3}.weight
    model.language_model.layers.0. ..            language_model.model.layers.0. ..
    lm_head.weight                               embed_out.weight
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from dpo_jax.hf.factors import Key, size
from dpo_jax.hf.mapping import Scheme, TensorEntry, names, placed
from dpo_jax.hf.tensors import TensorInfo
from dpo_jax.model.spec import DecoderSpec

EXPERT = re.compile(r"(?P<around>.+\.experts)\.(?P<number>\d+)\.(?P<matrix>\w+)\.weight")
FUSED = re.compile(r"(?P<around>.+\.experts)\.(?P<matrix>gate_up_proj|down_proj)")
MATRICES = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
GATE_UP, DOWN = "gate_up_proj", "down_proj"
IN_MEMORY = (("block_sparse_moe.", "mlp."), ("embed_out.", "lm_head."))
"""Names of folders, and what transformers 5 calls the same in memory."""
WITHIN = ("model.language_model.", "language_model.model.", "language_model.")
"""What paths begin with where the decoder is a part of a larger model."""


class ExpertParameter(NamedTuple):
    """One parameter in memory that holds a matrix of every expert, and where the folder has it."""

    parts: tuple[tuple[Key, ...], ...]
    """Of each matrix whose outputs stand one after another in the parameter: its key, expert by expert."""
    outputs: tuple[int, ...]
    """Of each of these matrices."""
    inputs: int
    first_is_output: bool
    """Whether each expert's matrix is [O, I] in memory, and not [I, O]."""

    @property
    def count(self) -> int:
        """How many experts there are."""
        return len(self.parts[0])


class PeftPlaces(NamedTuple):
    """Where paths lead: to tensors of the folder by the parameter's path, and to experts by path and parameter."""

    entries: dict[str, TensorEntry]
    tensors: dict[str, str]
    experts: dict[str, dict[str, ExpertParameter]]
    root: str
    memory: dict[str, str]
    """By tensor of the folder, its path in memory."""

    def tensor(self, path: str) -> str | None:
        """The tensor of the folder that a parameter of this path is; None if there is none."""
        return next((self.tensors[one] for one in self._options(path) if one in self.tensors), None)

    def fused(self, path: str) -> dict[str, ExpertParameter] | None:
        """The parameters of the module of all experts; None where it is another module."""
        return next((self.experts[one] for one in self._options(path) if one in self.experts), None)

    def _options(self, path: str) -> Iterator[str]:
        yield path
        yield self.root + path
        for outer in WITHIN:
            if path.startswith(outer):
                yield path.removeprefix(outer)
                yield self.root + path.removeprefix(outer)


def places(spec: DecoderSpec, scheme: Scheme, infos: Mapping[str, TensorInfo]) -> PeftPlaces:
    """The table for the decoder of a folder; with a head of its own even where that is tied to the embedding."""
    untied = dataclasses.replace(spec, tied=False)
    plain, here = names(untied, scheme.naming), names(untied, placed(scheme, infos)[0])
    found = PeftPlaces(
        {one.name: one for one in here}, {}, {}, str(scheme.naming.names["embed"]).split(".")[0] + ".", {}
    )
    each: dict[str, dict[str, dict[int, str]]] = {}
    for canonical, entry in zip((one.name for one in plain), here, strict=True):
        memory = canonical
        for old, new in IN_MEMORY:
            memory = memory.replace(old, new)
        found.tensors[canonical] = found.tensors[memory] = entry.name
        found.memory[entry.name] = memory
        if (one := EXPERT.fullmatch(memory)) and one["matrix"] in MATRICES:
            each.setdefault(one["around"], {}).setdefault(MATRICES[one["matrix"]], {})[int(one["number"])] = entry.name
        if one := FUSED.fullmatch(memory):
            found.experts.setdefault(one["around"], {})[one["matrix"]] = _whole(entry)
    for around, matrices in each.items():
        options = {GATE_UP: ("gate", "up"), DOWN: ("down",)}
        found.experts[around] = {
            name: _apart(found.entries, [matrices[part] for part in parts])
            for name, parts in options.items()
            if all(part in matrices for part in parts)
        }
    return found


def _whole(entry: TensorEntry) -> ExpertParameter:
    outputs, inputs = size(entry)
    keys = tuple((entry.name, number) for number in range(entry.shape[0]))
    return ExpertParameter((keys,), (outputs,), inputs, entry.turned)


def _apart(entries: Mapping[str, TensorEntry], matrices: list[dict[int, str]]) -> ExpertParameter:
    sizes = [size(entries[matrix[0]]) for matrix in matrices]
    keys = tuple(tuple((matrix[number], None) for number in sorted(matrix)) for matrix in matrices)
    return ExpertParameter(keys, tuple(outputs for outputs, _ in sizes), sizes[0][1], True)
