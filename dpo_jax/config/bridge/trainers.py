"""The trainers whose configs are read: how one is known, its names for things, and its defaults.

Names lead to those of TRL and transformers, in which the rules are written (rules.py). A name that leads to itself
needs no row.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_jax.config.bridge.methods import METHODS
from dpo_jax.config.bridge.source import Config
from dpo_jax.errors import UserError, short


@dataclasses.dataclass(frozen=True)
class OtherTrainer:
    """A trainer: its name, its names for things (theirs -> TRL's), and its defaults by method ("" for all of them)."""

    name: str
    names: Mapping[str, str]
    defaults: Mapping[str, Mapping[str, Any]]

    def default(self, method: str) -> dict[str, Any]:
        """What it does where a config of a method is silent, under TRL's names."""
        return {**self.defaults.get("", {}), **self.defaults.get(method, {})}


def _names(text: str) -> dict[str, str]:
    """Rows `TRL's name: theirs, ...` as a table from theirs."""
    rows = (line.split(":") for line in text.split("\n") if line.strip())
    return {name.strip(): ours.strip() for ours, names in rows for name in names.split(",")}


TRANSFORMERS = {
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "optim": "adamw_torch_fused",
    "eval_strategy": "no",
    "output_dir": "trainer_output",
}
"""Defaults of transformers' TrainingArguments."""
PAIRS = {"beta": 0.1, "disable_dropout": True}
_TRL = {
    "": {
        **TRANSFORMERS,
        "max_length": 1024,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
    },
    "dpo": {**PAIRS, "learning_rate": 1e-6, "loss_type": "sigmoid", "truncation_mode": "keep_start"},
    "kto": {**PAIRS, "learning_rate": 1e-6, "loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "orpo": {**PAIRS, "learning_rate": 1e-6},
    "cpo": {**PAIRS, "learning_rate": 1e-6, "loss_type": "sigmoid", "cpo_alpha": 1.0, "simpo_gamma": 0.5},
    "reward": {"learning_rate": 1e-4, "disable_dropout": True},
    "sft": {"learning_rate": 2e-5},
}

TRL = OtherTrainer(
    "TRL",
    _names("""
        torch_dtype: dtype
        max_length: max_seq_length
        eval_strategy: evaluation_strategy
        ref_model: ref_model_name_or_path
        test_split_size: dataset_mixture.test_split_size
        lora_r: lora_rank
        lora_target_modules: target_modules
    """),
    _TRL,
)
HANDBOOK = dataclasses.replace(TRL, name="the alignment handbook")

AXOLOTL = OtherTrainer(
    "Axolotl",
    _names("""
        model_name_or_path: base_model
        model_revision: revision_of_model
        max_length: sequence_len
        per_device_train_batch_size: micro_batch_size
        num_train_epochs: num_epochs
        optim: optimizer
        lr_scheduler_type: lr_scheduler
        eval_strategy: evaluation_strategy
        test_split_size: val_set_size
        beta: rl_beta, dpo_beta, trl.beta
        desirable_weight: kto_desirable_weight
        undesirable_weight: kto_undesirable_weight
        label_smoothing: dpo_label_smoothing
        use_weighting: dpo_use_weighting
        loss_type: dpo_loss_type
        loss_weights: dpo_loss_weights
        sync_ref_model: trl.sync_ref_model
        ref_model_sync_steps: trl.ref_model_sync_steps
        ref_model_mixup_alpha: trl.ref_model_mixup_alpha
        adapter_name_or_path: lora_model_dir
        use_dora: peft_use_dora
        use_rslora: peft_use_rslora
        lora_layers_to_transform: peft_layers_to_transform
        bf16: bfloat16
        fp16: float16
        chat_template_path: chat_template, chat_template_jinja
    """),
    {
        "": {
            **TRANSFORMERS,
            "learning_rate": None,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.03,
            "warmup_steps": None,
            "num_train_epochs": 1.0,
            "per_device_train_batch_size": 1,
            "max_length": 512,
            "lora_dropout": 0.0,
            "output_dir": "model-out",
            "ref_model_sync_steps": 64,
            "ref_model_mixup_alpha": 0.9,
        },
        "dpo": {**PAIRS, "loss_type": "sigmoid"},
        "kto": {**PAIRS, "loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0},
        "orpo": PAIRS,
        "cpo": {**PAIRS, "loss_type": "simpo", "cpo_alpha": 1.0},
        "reward": {"disable_dropout": True},
    },
)

FACTORY = OtherTrainer(
    "LLaMA-Factory",
    _names("""
        max_length: cutoff_len
        lora_r: lora_rank
        lora_target_modules: lora_target
        lora_modules_to_save: additional_target
        beta: pref_beta
        loss_type: pref_loss
        label_smoothing: dpo_label_smoothing
        desirable_weight: kto_chosen_weight
        undesirable_weight: kto_rejected_weight
        test_split_size: val_size
        eval_strategy: evaluation_strategy
        early_stopping_patience: early_stopping_steps
        router_aux_loss_coef: moe_aux_loss_coef
        chat_template_path: template
    """),
    {
        "": {
            **TRANSFORMERS,
            "finetuning_type": "lora",
            "max_length": 2048,
            "lora_r": 8,
            "lora_alpha": None,
            "lora_dropout": 0.0,
            "lora_target_modules": "all",
        },
        "dpo": {**PAIRS, "loss_type": "sigmoid", "simpo_gamma": 0.5},
        "kto": {**PAIRS, "loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0},
    },
)

TORCHTUNE = OtherTrainer(
    "torchtune",
    _names("""
        model_name_or_path: checkpointer.checkpoint_dir
        ref_model: ref_checkpointer.checkpoint_dir
        adapter_name_or_path: checkpointer.adapter_checkpoint
        max_length: tokenizer.max_seq_len
        per_device_train_batch_size: batch_size
        num_train_epochs: epochs
        learning_rate: optimizer.lr
        weight_decay: optimizer.weight_decay
        adam_epsilon: optimizer.eps
        optim: optimizer._component_
        lr_scheduler_type: lr_scheduler._component_
        warmup_steps: lr_scheduler.num_warmup_steps
        max_grad_norm: clip_grad_norm
        beta: loss.beta
        label_smoothing: loss.label_smoothing
        loss_type: loss._component_
        lora_r: model.lora_rank
        lora_alpha: model.lora_alpha
        lora_dropout: model.lora_dropout
        use_dora: model.use_dora
        eval_steps: run_val_every_n_steps
        logging_steps: log_every_n_steps
        torch_dtype: dtype
    """),
    {
        "": {
            "learning_rate": 1e-3,
            "weight_decay": 0.01,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "num_train_epochs": 1,
            "gradient_accumulation_steps": 1,
            "max_grad_norm": 0,
            "optim": "torch.optim.AdamW",
            "lora_dropout": 0.0,
        },
        "dpo": {"beta": 0.1, "loss_type": "DPOLoss"},
    },
)

MARKS: tuple[tuple[OtherTrainer, tuple[str, ...]], ...] = (
    (TORCHTUNE, ("model._component_", "tokenizer._component_", "loss._component_", "checkpointer._component_")),
    (AXOLOTL, ("base_model",)),
    (FACTORY, ("stage", "finetuning_type", "pref_loss", "pref_beta", "cutoff_len", "dataset_dir")),
    (HANDBOOK, ("dataset_mixer", "dataset_mixture")),
    (
        TRL,
        (
            "model_name_or_path",
            "dataset_name",
            "train_dataset",
            "datasets",
            "per_device_train_batch_size",
            "output_dir",
        ),
    ),
)
"""Keys by which a trainer's configs are known; the first row that fits."""

NO_RUN: tuple[tuple[str, str], ...] = (
    (
        "compute_environment",
        "a config of `accelerate launch`, which says how processes are started; give the trainer's",
    ),
    ("zero_optimization", "a config of DeepSpeed, which says how memory is shared; give the trainer's"),
    ("export_dir", "a config that merges or exports a model; `convert merge` does that here"),
    ("infer_backend", "a config for inference; `sample` and `winrate` do that here"),
    ("model_class", "a config of LLaMA-Factory's version 1, which is not read; write it in the form of version 0.9"),
    ("model.path", "a config of this package already; `train --print-config` shows what it sets"),
)
"""Keys of files that are no trainer's config of a training run, and what they are."""


def trainer_of(config: Config) -> OtherTrainer:
    """Whose config this is.

    Raises:
      UserError: nobody's that is known.
    """
    for key, what in NO_RUN:
        if key in config:
            raise UserError(f"{short(config.file)}: is {what}")
    for trainer, marks in MARKS:
        if trainer is TORCHTUNE and "tokenizer._component_" in config and "optimizer._component_" not in config:
            raise UserError(
                f"{short(config.file)}: is a config that evaluates, generates or quantises; nothing is trained"
            )
        if any(mark in config for mark in marks):
            return trainer
    raise UserError(
        f"{short(config.file)}: is no config of TRL, Axolotl, LLaMA-Factory, torchtune or the alignment handbook that "
        "is known here; such a file names a model (model_name_or_path, base_model or checkpointer)"
    )


REFUSED = {
    "grpo gdpo rloo ppo online_dpo nash_md xpo ebft gspo dapo": "generates and rewards answers while it trains",
    "gkd kd distillation gold minillm knowledge_distillation": "distils one model into another",
    "pt pretrain": "pretrains on plain text",
    "prm process_reward_model stepwise_supervised": "trains a reward model of single steps",
    "bco": "is BCO on single answers; kto takes the same rows (--method kto)",
    "qat": "trains for quantisation",
}
"""Methods that are not here, and what they are."""
ALIASES = {
    "ipo": "dpo",
    "simpo": "cpo",
    "rm": "reward",
    "reward_modeling": "reward",
    "reward_model": "reward",
    "finetune": "sft",
    "instruct": "sft",
}
TELLING = (
    ("kto", ("desirable_weight", "undesirable_weight")),
    ("cpo", ("cpo_alpha", "simpo_gamma")),
    ("reward", ("center_rewards_coefficient",)),
    ("grpo", ("num_generations", "reward_funcs", "reward_model_path")),
    (
        "sft",
        (
            "max_seq_length",
            "packing",
            "assistant_only_loss",
            "completion_only_loss",
            "dataset_text_field",
            "dataset_kwargs",
        ),
    ),
    ("dpo", ("loss_type", "ld_alpha", "f_divergence_type", "precompute_ref_log_probs", "rpo_alpha", "sync_ref_model")),
)
"""Keys that only configs of one method have."""


def method_of(config: Config, trainer: OtherTrainer, told: str | None) -> tuple[str, str | None]:
    """Which of METHODS a config is of, and, where that is only likely, what is to be said.

    Raises:
      UserError: it is of none, or of one that cannot be told.
    """
    found, doubt = (told, None) if told else _method(config, trainer)
    refused = next((what for names, what in REFUSED.items() if found in names.split()), None)
    if refused:
        raise UserError(f"{short(config.file)}: is of a run that {refused} ({found}); only {_listed()} are here")
    if found not in METHODS:
        raise UserError(f"{short(config.file)}: does not say its method; give --method, one of {_listed()}")
    return found, doubt


def _listed() -> str:
    return ", ".join(METHODS)


def _method(config: Config, trainer: OtherTrainer) -> tuple[str | None, str | None]:
    if trainer is AXOLOTL:
        return _of_axolotl(config), None
    if trainer is FACTORY:
        return _known(str(config.value("stage") or "sft")), None
    if trainer is TORCHTUNE:
        return _of_torchtune(config), None
    if (method := _known(config.method)) is not None:
        return method, None
    if method := next((method for method, keys in TELLING if any(key in config for key in keys)), None):
        return method, None
    words = [word for part in Path(config.file).parts[-4:] for word in re.split(r"[^a-z]+", part.lower())]
    if method := next(filter(None, map(_known, reversed(words))), None):
        return method, f"taken as {METHODS.get(method, method)} for the file's name; --method says otherwise"
    if "beta" in config:
        return "dpo", "taken as DPO, as it has a beta and nothing else that tells; --method says otherwise"
    return None, None


def _known(word: str | None) -> str | None:
    """The method that a word is a name of."""
    word = ALIASES.get(word or "", word)
    return word if word in METHODS or any(word in names.split() for names in REFUSED) else None


def _of_axolotl(config: Config) -> str | None:
    if "pretraining_dataset" in config:
        return "pretrain"
    if config.value("reward_model") or config.value("process_reward_model"):
        return "reward" if config.value("reward_model") else "prm"
    rl = config.value("rl")
    kinds = {str(given.value) for key, given in config.given.items() if re.fullmatch(r"datasets\.\d+\.type", key)}
    if rl is None and kinds and kinds <= {"completion", "pretrain"}:
        return "pretrain"
    return "sft" if rl is None else _known(str(rl)) or "unknown"


def _of_torchtune(config: Config) -> str | None:
    loss = str(config.value("loss._component_") or "").rpartition(".")[2]
    data = str(config.value("dataset._component_") or "").rpartition(".")[2]
    if data in ("text_completion_dataset", "wikitext_dataset", "cnn_dailymail_articles_dataset") and "PPO" not in loss:
        return "pretrain"
    kinds = {"PPO": "ppo", "GRPO": "grpo", "KL": "kd", "SimPO": "cpo", "DPO": "dpo", "RSO": "dpo", "IPO": "dpo"}
    found = next((method for name, method in kinds.items() if name in loss), None)
    if "kd_loss._component_" in config:
        return "kd"
    if found is None and "loss._component_" not in config:
        found = next(filter(None, map(_known, re.split(r"[^a-z]+", Path(config.file).stem.lower()))), None)
    return found or ("qat" if "quantizer._component_" in config else "sft")
