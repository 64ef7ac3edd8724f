"""LoRA and QLoRA of the other trainers as our adapter settings."""

from typing import Any

from dpo_jax.config.bridge.conversion import Conversion
from dpo_jax.config.bridge.trainers import AXOLOTL, FACTORY, TORCHTUNE

SHAPE = ("lora_r", "lora_alpha", "lora_target_modules", "lora_target_linear", "lora_target_parameters", "use_dora")
SHAPE += ("use_rslora", "lora_modules_to_save", "lora_layers_to_transform", "lora_rank_pattern", "lora_alpha_pattern")
OTHER = ("lora_dropout", "loraplus_lr_ratio", "loraplus_lr_embedding", "bnb_4bit_quant_type", "quantization_type")
TUNED = ("model.lora_attn_modules", "model.apply_lora_to_mlp", "model.apply_lora_to_output", "model.quantize_base")
BITS = ("load_in_4bit", "load_in_8bit", "quantization_bit")
LEAVES = {"embed_tokens": "embed/embedding", "wte": "embed/embedding", "lm_head": "head/embedding"}
"""Modules that PEFT trains whole, and our names of their leaves."""
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
FUSED |= {"up_proj": "gate_up_proj"}


def adapter(c: Conversion) -> None:
    """Everything in the adapter section, and model.quantise."""
    kind = str(c.get("finetuning_type", "") or c.get("adapter", "") or "")
    if kind in ("oft", "llama-adapter", "freeze"):
        _other_kind(c, kind)
    if not _is_used(c, kind):
        c.leave("the whole model is trained there; an adapter is trained where adapter.rank is given", *SHAPE, *OTHER)
        c.leave("model.quantise keeps only what is not trained in few bits; here all is trained", *BITS)
        c.leave("not needed: without adapter.rank the whole model is trained", "use_peft", "finetuning_type", "adapter")
        return
    if c.is_given("adapter_name_or_path"):
        c.put("adapter.path", str(c.get("adapter_name_or_path")), "adapter_name_or_path")
        c.leave("adapter.path has its own", *SHAPE)
        if c.trainer is FACTORY and c.method in ("dpo", "kto") and not c.is_given("ref_model"):
            c.put("reference.adapter", "base", note="the reference is the model without the adapter there as well")
    else:
        _shape(c)
    _dropout(c)
    if c.is_given("loraplus_lr_ratio"):
        c.put("adapter.lr_ratio", float(c.get("loraplus_lr_ratio")), "loraplus_lr_ratio")
    _quantise(c)
    c.leave("an adapter leaves the embedding as it is", "resize_vocab")
    c.leave("not needed: an adapter is trained where adapter.rank is given", "use_peft", "finetuning_type", "adapter")


def _is_used(c: Conversion, kind: str) -> bool:
    if c.trainer is FACTORY or c.trainer is AXOLOTL:
        return kind in ("lora", "qlora")
    if c.trainer is TORCHTUNE:
        return "lora" in str(c.get("model._component_", "")) or c.is_given("lora_r")
    return c.flag("use_peft")


def _other_kind(c: Conversion, kind: str) -> None:
    if kind == "freeze":
        names = ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules", "finetuning_type")
        c.asked["model.freeze"] = (
            f"{c.get('freeze_trainable_layers', 2)} layers are trained there, counted from the end; model.freeze names "
            "the others, as in layers/(?:[0-9]|1[0-9])/.* and embed/embedding"
        )
        c.leave("see model.freeze above", *names)
    else:
        c.asked["adapter.rank"] = f"{kind} is not there; LoRA in its place takes adapter.rank"
        c.leave(f"{kind} is not there; adapter.rank trains LoRA", "finetuning_type", "adapter")


def _shape(c: Conversion) -> None:
    c.put("adapter.rank", c.get("lora_r"), "lora_r")
    if c.get("lora_alpha") is not None:
        c.put("adapter.alpha", float(c.get("lora_alpha")), "lora_alpha")
    value, names = _targets(c)
    c.put("adapter.targets", value, *names)
    found = c.words("lora_modules_to_save")
    if found:
        known = tuple(LEAVES[name] for name in found if name in LEAVES)
        if known and len(known) == len(found):
            c.put("adapter.modules_to_save", known, "lora_modules_to_save")
        else:
            unknown = ", ".join(str(name) for name in found if name not in LEAVES)
            c.asked["adapter.modules_to_save"] = f"our names of the leaves of {unknown} that are trained whole"
            c.leave(f"{unknown}: adapter.modules_to_save takes patterns of our names", "lora_modules_to_save")


def _targets(c: Conversion) -> tuple[Any, tuple[str, ...]]:
    if c.flag("lora_target_linear"):
        c.leave("lora_target_linear takes all of them", "lora_target_modules")
        return "all-linear", ("lora_target_linear",)
    if c.trainer is TORCHTUNE:
        return _tuned_targets(c), TUNED[:3]
    names = [name for name in ("lora_target_modules", "lora_target_parameters") if c.get(name) not in (None, (), "")]
    found: list[str] = []
    for name in names:
        found += c.words(name)
    if found in (["all"], ["all-linear"]):
        return "all-linear", tuple(names)
    return tuple(found) if found else "default", tuple(names)


def _tuned_targets(c: Conversion) -> tuple[str, ...]:
    names = ["o_proj" if name == "output_proj" else str(name) for name in c.words("model.lora_attn_modules")]
    names += ["gate_proj", "up_proj", "down_proj"] if c.flag("model.apply_lora_to_mlp") else []
    names += ["lm_head"] if c.flag("model.apply_lora_to_output") else []
    if "phi" in str(c.get("model._component_", "")):
        names = [FUSED.get(name, name) for name in names]
    return tuple(dict.fromkeys(names))


def _dropout(c: Conversion) -> None:
    rate = c.get("lora_dropout")
    if not rate:
        c.leave("0 is the default", "lora_dropout")
    elif c.flag("disable_dropout"):
        why = (
            f"{c.trainer.name} sets it to 0 in {c.method}, adapters included (disable_dropout); adapter.dropout is real"
        )
        c.leave(why, "lora_dropout")
    else:
        c.put("adapter.dropout", float(rate), "lora_dropout")
    c.leave("not needed: nothing is dropped but by adapter.dropout", "disable_dropout")


def _quantise(c: Conversion) -> None:
    """4 bits, 8 bits, or neither."""
    bits, kind = (
        str(c.get("quantization_bit", "")),
        str(c.get("bnb_4bit_quant_type") or c.get("quantization_type") or "nf4"),
    )
    tuned = c.flag("model.quantize_base") or "qlora" in str(c.get("model._component_", ""))
    if c.flag("load_in_4bit") or bits == "4" or tuned:
        names = ("load_in_4bit", "quantization_bit", "bnb_4bit_quant_type", "quantization_type", "model.quantize_base")
        c.put("model.quantise", kind, *names)
    elif c.flag("load_in_8bit") or bits == "8":
        c.put("model.quantise", "int8", "load_in_8bit", "quantization_bit")
    elif bits:
        c.asked["model.quantise"] = f"{bits} bits are not there; nf4, fp4 and int8 are"
        c.leave(f"{bits} bits are not there; model.quantise takes nf4, fp4 and int8", "quantization_bit")
    c.leave("not needed: model.quantise is off or says it", *BITS, "bnb_4bit_quant_type", "model.quantize_base")
