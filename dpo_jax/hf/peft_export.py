"""An adapter out: a PEFT folder that PEFT, vLLM, SGLang and llama.cpp's converter read as the same function.

They agree on plain LoRA of one rank and one scale. SGLang takes `lora_alpha / r` of the config for every module, and
llama.cpp `lora_alpha` by the rank of each tensor; neither follows `use_rslora` or `alpha_pattern`. So every factor is
brought to the largest rank with zeros, which add nothing, and what differs in scale is multiplied into B.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.errors import UserError, printable
from dpo_jax.hf import beside, tensors
from dpo_jax.hf.beside import ADAPTER_CONFIG
from dpo_jax.hf.card import ADAPTER_MODEL, base_name, front_matter, model_card
from dpo_jax.hf.checkpoint import scheme_of
from dpo_jax.hf.configs import is_wrapper, quiet
from dpo_jax.hf.factors import EMBED, HEAD, Adapter, Factor, Key, stacked, turned
from dpo_jax.hf.mapping import Scheme
from dpo_jax.hf.peft import FILE, INNER, PREFIX, read_adapter
from dpo_jax.hf.peft_names import DOWN, EXPERT, GATE_UP, MATRICES, ExpertParameter, PeftPlaces, places
from dpo_jax.hf.tensors import TensorInfo, Tensors, read_json
from dpo_jax.model.spec import DecoderSpec

FORMAT = "0.21.2"
"""The version of PEFT whose layout this is; it tells the layout of fused experts apart from that before 0.19."""
TOKENIZER = re.compile(
    r"(tokenizer|special_tokens_map|added_tokens|vocab|merges|chat_template|sentencepiece|spiece)[^/]*"
    r"|additional_chat_templates/.*|[^/]*\.(jinja|model|tiktoken)|(LICENSE|NOTICE)[^/]*"
)
"""What of the base's folder comes along."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be, from its 8 up; its default is 16."""


class WrittenAdapter(NamedTuple):
    """What the adapter's folder holds."""

    rank: int
    alpha: float
    modules: int


class _Plain(NamedTuple):
    """The adapter as it is written: arrays by tensor, and what the config says of them."""

    arrays: dict[str, np.ndarray]
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    rank: int
    alpha: float


def write_adapter(
    target: str | Path,
    adapter: Adapter,
    base: Tensors,
    spec: DecoderSpec,
    *,
    base_model: str | None = None,
    card: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, str] | None = None,
    replace: bool = False,
) -> WrittenAdapter:
    """Writes a PEFT folder, and reads it back before it stands there.

    The factors are float32. Beside them: the base's tokenizer, a card, `dpo_jax.json` and `SHA256SUMS`.

    Args:
      target: where to; it must not exist, or be empty.
      adapter: plain low-rank factors.
      base: tensors of the base.
      spec: of the base.
      base_model: hub id or folder of the base, which readers of the adapter load; the base's folder if None.
      card: as in `save_hf`.
      extra_files: as in `save_hf`.
      replace: an earlier export at `target`, with nothing in it changed or added, may be replaced.

    Raises:
      UserError: the adapter is more than plain LoRA, or the folder cannot be written.
    """
    target, scheme = Path(target), scheme_of(spec, base.folder)
    check_plain(adapter, spec)
    within = _within(base.folder)
    plain = _plain(adapter, places(spec, scheme, base.infos), within)
    infos = {name: TensorInfo(FILE, "F32", array.shape) for name, array in plain.arrays.items()}
    tensors.check_target(target, replace)
    need = sum(tensors.num_bytes(info.dtype, info.shape) for info in infos.values())
    named = str(base.folder) if base_model is None else base_model
    with tensors.staging(target, need, replace) as staging:
        digest = tensors.write_tensors(staging / FILE, infos, {"format": "pt"}, plain.arrays.__getitem__)
        tensors.check_tensors(staging / FILE, infos, digest)
        sums = {FILE: digest}
        names = beside.files(base.folder, own=extra_files or {})
        copied = [name for name in names if TOKENIZER.fullmatch(name)]
        sums |= beside.copy(base.folder, copied, staging)
        texts = {ADAPTER_CONFIG: json.dumps(_config(plain, adapter, spec, named), indent=2) + "\n"}
        texts["README.md"] = model_card(
            base_name(named, card),
            front_matter(base.folder),
            card,
            kind=ADAPTER_MODEL,
            note=_how_to(plain, base_name(named, card)),
        )
        own = extra_files or {}
        texts |= beside.record(base_name(named, card), base.folder, own)
        for name, text in {**texts, **own}.items():
            if name in sums or name == tensors.SUMS or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
                raise ValueError(f"extra file {name!r} is not a free plain name")
            sums[name] = tensors.write_bytes(staging / name, text.encode())
        listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        tensors.write_bytes(staging / tensors.SUMS, listing.encode())
        _check(staging, plain, base, spec, scheme, within)
    return WrittenAdapter(plain.rank, plain.alpha, len({name.rsplit(".lora_", 1)[0] for name in plain.arrays}))


def check_plain(adapter: Adapter, spec: DecoderSpec) -> None:
    """Refuses an adapter that is more than what all readers of PEFT folders agree on."""
    ends = {entry.parts[0].leaf: name for name, entry in adapter.entries.items()}
    tied = [name for name in (ends.get(EMBED), ends.get(HEAD)) if spec.tied and (name, None) in adapter.factors]
    what = f"factors of {tied[0]!r}, an embedding that is tied to the head" if tied else adapter.beyond_lora
    if what is not None:
        raise UserError(
            f"this cannot be written as an adapter: it has {what}, and programs that serve adapters refuse that or "
            "pass over it; write the merged model (export.kind: merged, or convert merge)"
        )
    if not adapter.factors:
        raise UserError("the adapter has no factors, so there is nothing to write; train some modules")


# ---------------------------------------------------------------------------------------------- one rank, one scale


def _plain(adapter: Adapter, where: PeftPlaces, within: str) -> _Plain:
    """All factors as PEFT's modules have them, of one rank and one scale."""
    left = dict(adapter.factors)
    stacks: dict[str, list[Factor]] = {}
    for around, table in where.experts.items():
        for matrix, experts in table.items():
            found = _of_experts(experts, left)
            if found:
                stacks[f"{around}.{matrix}"] = found
    single = {where.memory[name]: factor for (name, _), factor in left.items()}
    every = [*single.values(), *(one for found in stacks.values() for one in found)]
    rank, scale = max(one.rank for one in every), _usual(every)

    def brought(factor: Factor, path: str) -> Factor:
        return _brought(factor, rank, scale, path)

    arrays: dict[str, np.ndarray] = {}
    leaves = {where.memory[name]: entry.parts[0].leaf for name, entry in adapter.entries.items()}
    for path, factor in single.items():
        one, embeds = brought(factor, path), leaves[path].endswith("/embedding") and leaves[path] != HEAD
        halves = (".lora_embedding_A", ".lora_embedding_B") if embeds else (".lora_A.weight", ".lora_B.weight")
        module = PREFIX + _outer(path.removesuffix(".weight"), where.root, within)
        arrays |= {module + halves[0]: one.a, module + halves[1]: one.b}
    for path, found in stacks.items():
        around, _, matrix = path.rpartition(".")
        inner = INNER if matrix == GATE_UP and f"{around}.{DOWN}" in stacks else ""
        module, of_each = PREFIX + _outer(around, where.root, within) + inner, [brought(one, path) for one in found]
        a = np.concatenate([one.a for one in of_each])
        b = np.stack([one.b for one in of_each], axis=-1).reshape(len(of_each[0].b), -1)
        arrays |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    parameters = {path for path in single if _is_parameter(path, leaves[path], bool(where.experts))}
    modules = {path.removesuffix(".weight") for path in single if path not in parameters}
    there = {path for path in leaves if not EXPERT.fullmatch(path)}
    there |= {f"{around}.{matrix}" for around, table in where.experts.items() for matrix in table}
    return _Plain(
        arrays,
        _named(modules, {path.removesuffix(".weight") for path in there if path.endswith(".weight")}, 1, where, within),
        _named({*stacks, *parameters}, there, 3, where, within),
        rank,
        scale * rank,
    )


def _of_experts(experts: ExpertParameter, left: dict[Key, Factor]) -> list[Factor]:
    """A factor for each expert of one parameter, taken out of `left`; none if none has any."""
    taken = [[left.pop(key, None) for key in part] for part in experts.parts]
    if all(one is None for part in taken for one in part):
        return []
    zeros = [Factor(np.zeros((1, experts.inputs), np.float32), np.zeros((1, 1), np.float32), 0.0)]
    return [
        stacked([part[number] for part in taken], experts.outputs)
        or zeros[0]._replace(b=np.zeros((sum(experts.outputs), 1), np.float32))
        for number in range(experts.count)
    ]


def _usual(factors: Sequence[Factor]) -> float:
    """The scale that most factors have; of those that change anything."""
    counted = Counter(one.scale for one in factors if one.scale != 0)
    return counted.most_common(1)[0][0] if counted else 1.0


def _brought(factor: Factor, rank: int, scale: float, path: str) -> Factor:
    """The same product with another rank and scale."""
    more = rank - factor.rank
    a, b = np.pad(factor.a, ((0, more), (0, 0))), np.pad(factor.b, ((0, 0), (0, more)))
    if factor.scale != scale:
        with np.errstate(over="ignore"):
            b = b * np.float32(factor.scale / scale)
        if tensors.non_finite(b):
            raise UserError(f"the factors of {path!r} are too large for one scale of all; write the merged model")
    return Factor(np.ascontiguousarray(a), np.ascontiguousarray(b), scale)


# ---------------------------------------------------------------------------------------------- what the config says


def _is_parameter(path: str, leaf: str, experts: bool) -> bool:
    """Whether PEFT must be told of a parameter, and not of a module.

    Routers are no linear layers, but for gemma4's. In a model with fused experts PEFT takes the names of their
    matrices for the experts', also where they are those of a dense or a shared MLP.
    """
    router = leaf.endswith("/router/kernel") and not path.endswith("router.proj.weight")
    return router or (experts and path.removesuffix(".weight").rpartition(".")[2] in MATRICES)


def _named(paths: set[str], there: set[str], words: int, where: PeftPlaces, within: str) -> tuple[str, ...]:
    """The names that PEFT finds these paths by, and no others: their last words, where all that end so are meant."""
    found: set[str] = set()
    for path in paths:
        end = ".".join(path.split(".")[-words:])
        alike = {one for one in there if f".{one}".endswith(f".{end}")}
        found.add(end if alike <= paths and not within else _outer(path, where.root, within))
    return tuple(sorted(found))


def _outer(path: str, root: str, within: str) -> str:
    """The path within a larger model, but for the head, which stands beside the decoder."""
    return root + within + path.removeprefix(root) if path.startswith(root) else path


def _within(folder: Path) -> str:
    """What stands between the root and the decoder's modules in the model that transformers loads for this folder."""
    if not is_wrapper(folder):
        return ""
    with quiet():
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    kind = str(known.get(read_json(folder, "config.json")["model_type"], ""))
    return "" if kind.endswith("ForCausalLM") else "language_model."


def _config(plain: _Plain, adapter: Adapter, spec: DecoderSpec, base: str) -> dict[str, Any]:
    """`adapter_config.json`; keys that older readers do not know are there only where they must be."""
    transposed = any(
        not turned(adapter.entries[name]) and len(adapter.entries[name].shape) == 2 for name, _ in adapter.factors
    )
    parameters = {"target_parameters": list(plain.parameters)} if plain.parameters else {}
    return {
        "peft_type": "LORA",
        "peft_version": FORMAT,
        "task_type": "SEQ_CLS" if spec.scalar_head else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "r": plain.rank,
        "lora_alpha": int(plain.alpha) if plain.alpha.is_integer() else plain.alpha,
        "lora_dropout": 0.0 if parameters else adapter.dropout,
        "target_modules": list(plain.modules),
        **parameters,
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _how_to(plain: _Plain, base: str) -> str:
    """How it is served: with its base, and nothing else merged in."""
    most = next((str(rank) for rank in RANKS if rank >= plain.rank), None)
    limit = f"--max-lora-rank {most}" if most else "(no vLLM takes a rank this large)"
    return (
        f"Load `{printable(base)}` and this adapter, and no other:\n\n"
        "    from peft import PeftModel\n"
        "    model = PeftModel.from_pretrained(base, ADAPTER)\n\n"
        f"    vllm serve BASE --enable-lora {limit} --lora-modules dpo=ADAPTER"
    )


def _check(staging: Path, plain: _Plain, base: Tensors, spec: DecoderSpec, scheme: Scheme, within: str) -> None:
    """Reads the folder back; raises OSError where it is another adapter."""
    again = _plain(read_adapter(staging, spec, scheme, base), places(spec, scheme, base.infos), within)
    same = again.arrays.keys() == plain.arrays.keys() and all(
        np.array_equal(again.arrays[name], array) for name, array in plain.arrays.items()
    )
    if not same or not math.isclose(again.alpha, plain.alpha, rel_tol=1e-12):
        raise OSError(f"{staging} does not read back as it was written")
