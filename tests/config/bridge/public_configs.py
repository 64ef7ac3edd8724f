"""Sixty configs in the shapes of those that the trainers publish, each with what it must become.

Written for the tests after the examples in the repositories of TRL, the alignment handbook, Axolotl, LLaMA-Factory and
torchtune: the keys, their order of magnitude and their quirks are theirs; models and values are often others.
"""

import dataclasses
import json
from typing import Any

import yaml

MODEL = "org/base-7b"


@dataclasses.dataclass(frozen=True, eq=False)
class Public:
    """A config: the file's name and text, options and settings given with the command, and some of the result."""

    name: str
    text: str
    becomes: dict[str, Any]
    asks: tuple[str, ...] = ()
    method: str | None = None
    devices: int | None = 1
    told: tuple[str, ...] = ()


def _yaml(*blocks: dict[str, Any]) -> str:
    merged = {key: value for block in blocks for key, value in block.items()}
    kept = json.loads(json.dumps({key: value for key, value in merged.items() if value != "gone"}))
    return yaml.safe_dump(kept, sort_keys=False)  # copied before, as what stands twice would become an alias


# ------------------------------------------------------------------------------------------------------- TRL YAML

TRL = {
    "model_name_or_path": MODEL,
    "dataset_name": "trl-lib/ultrafeedback_binarized",
    "learning_rate": "5.0e-7",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "gradient_checkpointing": True,
    "eval_strategy": "steps",
    "eval_steps": 50,
    "output_dir": "Qwen2-0.5B-DPO",
    "no_remove_unused_columns": True,
}
LORA = {"use_peft": True, "lora_r": 32, "lora_alpha": 16, "lora_target_modules": "all-linear"}
PLAIN = {
    "model.path": MODEL,
    "data.train": "trl-lib/ultrafeedback_binarized",
    "data.eval": "trl-lib/ultrafeedback_binarized:test",
    "optimizer.learning_rate": 5e-7,
    "optimizer.warmup_steps": 0,
    "batch.pairs": 16,
    "epochs": 1.0,
    "evaluation.every": 50,
    "data.truncation": "keep_start",
}


def trl(name: str, becomes: dict[str, Any], changes: dict[str, Any], **more: Any) -> Public:
    """A YAML for `trl METHOD --config`."""
    return Public(f"{name}.yaml", _yaml(TRL, changes), becomes, **more)


MIXED = [{"name": "sigmoid", "weight": 0.8}, {"name": "bco_pair", "weight": 0.2}, {"name": "sft", "weight": 1.0}]
TRL_YAML = [
    trl("dpo", {**PLAIN, "objective.name": "sigmoid", "objective.beta": 0.1}, {"beta": 0.1, "loss_type": "sigmoid"}),
    trl(
        "dpo_lora",
        {"adapter.rank": 32, "adapter.alpha": 16, "adapter.targets": "all-linear", "adapter.dropout": 0.0},
        {**LORA, "beta": 0.05, "lora_dropout": 0.05, "learning_rate": 5.0e-6},
        asks=("method",),
    ),
    trl(
        "dpo_defaults",
        {"optimizer.learning_rate": 1e-6, "epochs": 3.0, "batch.pairs": 64, "objective.beta": 0.1, "data.eval": None},
        dict.fromkeys(
            (*("learning_rate", "num_train_epochs", "per_device_train_batch_size"), "eval_strategy", "eval_steps"),
            "gone",
        ),
        asks=("method",),
    ),
    trl(
        "mpo",
        {"objective.blocks": MIXED, "reference.mode": "cached"},
        {
            "loss_type": ["sigmoid", "bco_pair", "sft"],
            "loss_weights": [0.8, 0.2, 1.0],
            "precompute_ref_log_probs": True,
        },
    ),
    trl(
        "wpo_tr",
        {
            "objective.weighting": "wpo",
            "reference.update_every": 256,
            "reference.update_rate": 0.6,
            "reference.mode": "live",
        },
        {"use_weighting": True, "sync_ref_model": True, "ref_model_sync_steps": 256, "loss_type": ["sigmoid"]},
    ),
    trl(
        "fdpo",
        {"objective.divergence": "alpha_divergence", "objective.divergence_alpha": 0.5, "objective.ld_alpha": 0.5},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5, "ld_alpha": 0.5, "beta": 0.1},
    ),
    trl(
        "rpo_old",
        {"objective.blocks": [{"name": "sigmoid", "weight": 1.0}, {"name": "sft", "weight": 0.5}]},
        {"rpo_alpha": 0.5, "max_prompt_length": 512, "max_completion_length": 512, "label_pad_token_id": -100},
    ),
    trl(
        "kto",
        {"objective.name": "kto", "objective.desirable_weight": 1.33, "optimizer.warmup_fraction": 0.07},
        {"desirable_weight": 1.33, "undesirable_weight": 1.0, "warmup_steps": 0.07, "lr_scheduler_type": "cosine"},
    ),
    trl(
        "simpo",
        {"objective.name": "simpo", "objective.beta": 2.5, "objective.gamma": 1.4, "reference.mode": "none"},
        {
            "loss_type": "simpo",
            "cpo_alpha": 0.0,
            "simpo_gamma": 1.4,
            "beta": 2.5,
            "eval_strategy": "gone",
            "eval_steps": 500,
        },
    ),
    trl(
        "cpo",
        {"objective.name": "cpo", "objective.sft_weight": 1.0, "optimizer.warmup_steps": 150, "steps": 1000},
        {"cpo_alpha": 1.0, "warmup_steps": 150, "max_steps": 1000, "optim": "rmsprop"},
    ),
    trl(
        "orpo_gpt2",
        {"objective.name": "orpo", "objective.odds_weight": 0.1, "reference.mode": "none"},
        {"beta": 0.1, "logging_first_step": True},
        asks=("method",),
    ),
    trl(
        "reward_modeling",
        {"objective.name": "reward", "objective.center": 0.01, "optimizer.learning_rate": 1e-4},
        {"center_rewards_coefficient": 0.01, "max_length": 2048, "learning_rate": "gone"},
    ),
    trl(
        "sft",
        {"objective.name": "sft", "optimizer.learning_rate": 2e-5, "data.max_length": 4096},
        {"packing": True, "max_length": 4096, "learning_rate": "gone", "assistant_only_loss": True},
    ),
]

# ---------------------------------------------------------------------------------------------- scripts, commands

SCRIPT = """
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

NAME = "org/base-7b"
BETA = 0.2
model = AutoModelForCausalLM.from_pretrained(NAME, torch_dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(NAME)
train_dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")
peft_config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
training_args = DPOConfig(
    output_dir=f"out-{BETA}",
    beta=BETA,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    learning_rate=5e-5,
    warmup_ratio=0.1,
    report_to=["wandb"],
)
trainer = DPOTrainer(model=model, args=training_args, processing_class=tokenizer, train_dataset=train_dataset,
                     peft_config=peft_config)
trainer.train()
"""
QUICK = """
from datasets import load_dataset
from trl import KTOConfig, KTOTrainer
KTOTrainer(model="org/base-7b", args=KTOConfig("kto-out", desirable_weight=2.0),
           train_dataset=load_dataset("trl-lib/kto-mix-14k", split="train")).train()
"""
OLD = """
from trl import DPOTrainer
from transformers import TrainingArguments, AutoModelForCausalLM
from datasets import load_dataset
model = AutoModelForCausalLM.from_pretrained("org/base-7b", load_in_4bit=True)
data = load_dataset("json", data_files="pairs.jsonl", split="train")
args = TrainingArguments(per_device_train_batch_size=1, gradient_accumulation_steps=16, max_steps=200,
                         learning_rate=2e-5, output_dir="./results", remove_unused_columns=False)
DPOTrainer(model, ref_model=None, args=args, beta=0.1, max_length=1536, max_prompt_length=1024,
           train_dataset=data, tokenizer=tokenizer).train()
"""
UNSLOTH = """
from unsloth import FastLanguageModel, PatchDPOTrainer
from trl import DPOConfig, DPOTrainer
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="org/base-7b", max_seq_length=2048, dtype=None, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=64, target_modules=["q_proj", "k_proj"], lora_alpha=64,
                                         use_gradient_checkpointing="unsloth", random_state=3407)
dpo_trainer = DPOTrainer(model=model, train_dataset=raw["train"], args=DPOConfig(
    per_device_train_batch_size=2, gradient_accumulation_steps=4, warmup_ratio=0.1, num_train_epochs=3,
    learning_rate=5e-6, optim="adamw_8bit", lr_scheduler_type="linear", seed=42, output_dir="outputs"))
"""
COMPUTED = """
from trl import ORPOConfig, ORPOTrainer
args = ORPOConfig(learning_rate=rate * 2, beta=0.1, output_dir="o", max_length=1024, fp16=not supported())
trainer = ORPOTrainer(model="org/base-7b", args=args, train_dataset=load_dataset("org/pairs"))
"""
COMMAND = """#!/bin/bash
MODEL=org/base-7b
accelerate launch --num_processes 4 --config_file multi_gpu.yaml trl/scripts/dpo.py \\
    --dataset_name trl-lib/ultrafeedback_binarized \\
    --model_name_or_path $MODEL \\
    --learning_rate 5.0e-6 --num_train_epochs 1 \\
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8 \\
    --eval_strategy steps --eval_steps 0.2 \\
    --output_dir out --no_remove_unused_columns \\
    --use_peft --lora_r 32 --lora_alpha 16 --report_to wandb tensorboard
"""
TORCHRUN = """
export WANDB_PROJECT=x
torchrun --nnodes 2 --nproc_per_node=8 examples/scripts/kto.py --model_name_or_path=org/base-7b \\
  --dataset_name trl-lib/kto-mix-14k --per_device_train_batch_size 16 --warmup_steps 0.1 --output_dir kto
"""
CLI = "trl dpo --model_name_or_path org/base-7b --dataset_name org/pairs --dataset_train_split train_prefs\n"
SCRIPTS = [
    Public(
        "train_dpo.py",
        SCRIPT,
        {"objective.beta": 0.2, "output": "out-0.2", "adapter.rank": 16, "batch.pairs": 16, "log.loggers": ["wandb"]},
    ),
    Public("quick.py", QUICK, {"objective.name": "kto", "objective.desirable_weight": 2.0, "output": "kto-out"}),
    Public(
        "old.py",
        OLD,
        {"data.train": "pairs.jsonl", "steps": 200, "objective.beta": 0.1, "data.max_length": 1536, "batch.pairs": 16},
    ),
    Public(
        "unsloth_dpo.py",
        UNSLOTH,
        {"adapter.rank": 64, "model.quantise": "nf4", "adapter.targets": ["q_proj", "k_proj"], "data.train": "a.jsonl"},
        told=("data.train=a.jsonl",),
    ),
    Public(
        "computed.py",
        COMPUTED,
        {"objective.odds_weight": 0.1, "optimizer.learning_rate": 8e-6},
        told=("optimizer.learning_rate=8e-6",),
        asks=("fp16",),
    ),
    Public(
        "dpo.sh",
        COMMAND,
        {"batch.pairs": 64, "evaluation.every": "0.2 epochs", "log.loggers": ["wandb"], "adapter.rank": 32},
        devices=None,
    ),
    Public(
        "kto.sh",
        TORCHRUN,
        {"batch.pairs": 256, "objective.name": "kto", "optimizer.warmup_fraction": 0.1},
        devices=None,
    ),
    Public("cli.sh", CLI, {"data.train": "org/pairs:train_prefs", "batch.pairs": 8, "objective.name": "sigmoid"}),
]

# ------------------------------------------------------------------------------------------------------- handbook

HANDBOOK = {
    "model_name_or_path": MODEL,
    "torch_dtype": None,
    "dataset_mixer": {"HuggingFaceH4/ultrafeedback_binarized": 1.0},
    "dataset_splits": ["train_prefs", "test_prefs"],
    "preprocessing_num_workers": 12,
    "bf16": True,
    "beta": 0.01,
    "do_eval": True,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "hub_model_id": "zephyr-7b-dpo-full",
    "learning_rate": "5.0e-7",
    "log_level": "info",
    "logging_steps": 10,
    "lr_scheduler_type": "cosine",
    "max_length": 1024,
    "max_prompt_length": 512,
    "num_train_epochs": 1,
    "optim": "adamw_torch",
    "output_dir": "data/zephyr-7b-dpo-full",
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "push_to_hub": False,
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 42,
    "warmup_ratio": 0.1,
}
MIXTURE = {
    "dataset_mixer": "gone",
    "dataset_splits": "gone",
    "dataset_mixture": {
        "datasets": [
            {
                "id": "org/a",
                "config": "default",
                "split": "train_prefs",
                "columns": ["chosen", "rejected"],
                "weight": 1.0,
            },
            {
                "id": "org/b",
                "config": "Preference",
                "split": "think",
                "columns": ["chosen", "rejected"],
                "weight": 0.25,
            },
        ],
        "seed": 0,
    },
}
ZEPHYR = {
    "data.train": "HuggingFaceH4/ultrafeedback_binarized:train_prefs",
    "data.eval": "HuggingFaceH4/ultrafeedback_binarized:test_prefs",
    "batch.pairs": 128,
    "objective.beta": 0.01,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_fraction": 0.1,
    "model.compute_dtype": "bfloat16",
    "seed": 42,
}


def handbook(name: str, becomes: dict[str, Any], changes: dict[str, Any] | None = None, **more: Any) -> Public:
    """A recipe; what it trains is only in the folder's name."""
    return Public(name, _yaml(HANDBOOK, changes or {}), becomes, **more)


QLORA = {"use_peft": True, "load_in_4bit": True, "lora_r": 128, "lora_alpha": 128, "lora_dropout": 0.05}
HANDBOOK_YAML = [
    handbook("recipes/zephyr-7b-beta/dpo/config_full.yaml", ZEPHYR, asks=("method",), devices=8),
    handbook(
        "recipes/zephyr-7b-beta/dpo/config_qlora.yaml",
        {"model.quantise": "nf4", "adapter.rank": 128, "adapter.targets": ["q_proj", "v_proj"], "adapter.dropout": 0.0},
        {**QLORA, "lora_target_modules": ["q_proj", "v_proj"], "optim": "paged_adamw_32bit"},
        asks=("method",),
    ),
    handbook(
        "recipes/smollm3/dpo/apo.yaml",
        {
            "objective.name": "apo_zero",
            "data.train": ["org/a:train_prefs", "org/b:Preference:think[:25%]"],
            "optimizer.clip_norm": 0.2,
        },
        {
            **MIXTURE,
            "loss_type": "apo_zero",
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "max_grad_norm": 0.2,
            "eval_strategy": "no",
            "save_steps": 0.5,
            "padding_free": True,
        },
    ),
    handbook(
        "recipes/smollm2/dpo/config.yaml",
        {"data.train": ["org/a:train_prefs", "org/b:Preference:think[:25%]"], "data.eval": None},
        {**MIXTURE, "dataset_mixture": {**MIXTURE["dataset_mixture"], "test_split_size": 2000}},
        asks=("method", "data.eval_fraction"),
    ),
    handbook(
        "recipes/told/dpo/config.yaml",
        {"data.eval_fraction": 0.03, "evaluation.every": 100},
        {**MIXTURE, "dataset_mixture": {**MIXTURE["dataset_mixture"], "test_split_size": 2000}},
        told=("data.eval_fraction=0.03",),
        asks=("method",),
    ),
    handbook(
        "recipes/zephyr-141b/orpo/config_full.yaml",
        {"objective.name": "orpo", "objective.odds_weight": 0.05, "optimizer.warmup_steps": 100},
        {
            "beta": 0.05,
            "lr_scheduler_type": "inverse_sqrt",
            "warmup_steps": 100,
            "warmup_ratio": "gone",
            "optim": "adamw_bnb_8bit",
        },
        asks=("method",),
    ),
    handbook(
        "recipes/zephyr-7b-beta/sft/config_full.yaml",
        {"objective.name": "sft", "data.max_length": 2048, "evaluation.every": "1 epoch"},
        {
            "beta": "gone",
            "max_length": "gone",
            "max_seq_length": 2048,
            "eval_strategy": "epoch",
            "eval_steps": "gone",
            "max_steps": -1,
        },
    ),
    handbook(
        "recipes/gemma/dpo/config_full.yaml",
        {"objective.beta": 0.05, "optimizer.learning_rate": 5e-7},
        {"beta": 0.05, "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}", "loss_type": "sigmoid"},
        asks=("data.template",),
    ),
    handbook(
        "recipes/scan/dpo/ipo.yaml",
        {"objective.name": "ipo", "objective.beta": 0.7, "export.push": "org/zephyr", "export.private": False},
        {"loss_type": "ipo", "beta": 0.7, "push_to_hub": True, "hub_model_id": "org/zephyr", "hub_private_repo": False},
    ),
]

# -------------------------------------------------------------------------------------------------------- Axolotl

AXOLOTL = {
    "base_model": MODEL,
    "model_type": "LlamaForCausalLM",
    "tokenizer_type": "AutoTokenizer",
    "special_tokens": {"pad_token": "<|finetune_right_pad_id|>"},
    "load_in_8bit": True,
    "load_in_4bit": False,
    "rl": "dpo",
    "datasets": [
        {
            "path": "fozziethebeat/alpaca_messages_2k_dpo_test",
            "type": "chat_template.default",
            "field_messages": "conversation",
            "field_chosen": "chosen",
            "field_rejected": "rejected",
            "message_property_mappings": {"role": "role", "content": "content"},
            "roles": {"user": ["user"], "assistant": ["assistant"]},
        }
    ],
    "dataset_prepared_path": None,
    "val_set_size": 0.05,
    "output_dir": "./outputs/lora-out",
    "sequence_len": 4096,
    "sample_packing": False,
    "adapter": "lora",
    "lora_model_dir": None,
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_linear": True,
    "wandb_project": None,
    "gradient_accumulation_steps": 4,
    "micro_batch_size": 2,
    "num_epochs": 4,
    "optimizer": "adamw_bnb_8bit",
    "lr_scheduler": "cosine",
    "learning_rate": 0.0002,
    "bf16": "auto",
    "tf32": False,
    "gradient_checkpointing": True,
    "logging_steps": 1,
    "attn_implementation": "flash_attention_2",
    "warmup_ratio": 0.1,
    "evals_per_epoch": 4,
    "saves_per_epoch": 1,
    "weight_decay": 0.0,
}
FULL = dict.fromkeys(
    ("adapter", "lora_r", "lora_alpha", "lora_dropout", "lora_target_linear", "load_in_8bit", "lora_model_dir"), "gone"
)


def axolotl(name: str, becomes: dict[str, Any], changes: dict[str, Any] | None = None, **more: Any) -> Public:
    """A YAML for `axolotl train`."""
    becomes = {"checkpoint.every": "1 epoch", **becomes}
    return Public(f"{name}.yml", _yaml(AXOLOTL, changes or {}), becomes, **more)


def rows(path: str, kind: Any, **more: Any) -> dict[str, Any]:
    """A `datasets` entry."""
    return {"datasets": [{"path": path, "type": kind, **more}]}


AXOLOTL_YAML = [
    axolotl(
        "instruct-dpo-lora-8b",
        {
            "data.columns": {"prompt": "conversation"},
            "data.eval_fraction": 0.05,
            "evaluation.every": "0.25 epochs",
            "model.quantise": "int8",
            "adapter.targets": "all-linear",
            "objective.beta": 0.1,
            "batch.pairs": 16,
            "data.max_length": 4096,
        },
        devices=2,
    ),
    axolotl(
        "qlora-kto",
        {"objective.name": "kto", "objective.beta": 0.5, "objective.desirable_weight": 0.2, "data.as_chat": True},
        {"rl": "kto", "rl_beta": 0.5, "kto_desirable_weight": 0.2, "adapter": "qlora", "load_in_4bit": True}
        | {"load_in_8bit": False, "val_set_size": 0.0, **rows("argilla/kto", "llama3.ultra", split="train")},
    ),
    axolotl(
        "qlora-orpo",
        {"objective.name": "orpo", "objective.odds_weight": 0.1},
        {"rl": "orpo", "orpo_alpha": 0.1, "chat_template": "chatml", **rows("argilla/x", "chat_template.argilla")},
        asks=("data.template",),
    ),
    axolotl(
        "simpo",
        {"objective.blocks": [{"name": "simpo", "beta": 2.0, "gamma": 0.8}, {"name": "sft", "weight": 1.0}]},
        {"rl": "simpo", "rl_beta": 2.0, "trl": {"beta": 2.0}, "simpo_gamma": 0.8},
    ),
    axolotl(
        "simpo-alone",
        {"objective.name": "simpo", "objective.gamma": 1.0},
        {"rl": "simpo", "simpo_gamma": 1.0, "cpo_alpha": 0},
    ),
    axolotl("ipo", {"objective.name": "ipo", "objective.beta": 0.3}, {"rl": "ipo", "rl_beta": 0.3}),
    axolotl(
        "fft",
        {"adapter.rank": None, "model.quantise": None, "data.columns": {"prompt": "question"}, "data.as_chat": True},
        {**FULL, **rows("Intel/orca_dpo_pairs", "chatml.intel", split="train"), "deepspeed": "zero3.json"},
    ),
    axolotl(
        "local-files",
        {"data.train": "pairs.jsonl", "data.columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
        rows(
            "json",
            {"field_prompt": "q", "field_chosen": "good", "field_rejected": "bad"},
            data_files=["pairs.jsonl"],
            ds_type="json",
        ),
    ),
    axolotl(
        "reward-model",
        {"objective.name": "reward", "data.columns": {"prompt": "input"}, "data.eval_fraction": None},
        {"rl": "gone", "reward_model": True, "num_labels": 1, "val_set_size": 0.0, "evals_per_epoch": None}
        | rows("argilla/distilabel-intel-orca-dpo-pairs", "bradley_terry.chat_template"),
    ),
    axolotl(
        "sft",
        {"objective.name": "sft", "data.columns": {"prompt": ["instruction", "input"], "completion": "output"}},
        {"rl": "gone", "val_set_size": 0, "sample_packing": True, **rows("tatsu-lab/alpaca", "alpaca")},
    ),
    axolotl(
        "mesh",
        {
            "mesh.tensor": 2,
            "batch.pairs": 32,
            "optimizer.beta2": 0.95,
            "optimizer.warmup_steps": 128,
            "log.loggers": ["wandb"],
        },
        {
            "tensor_parallel_size": 2,
            "context_parallel_size": 1,
            "adam_beta2": 0.95,
            "warmup_steps": 128,
            "warmup_ratio": "gone",
        }
        | {"wandb_project": "dpo", "fsdp_config": {"offload_params": False}, "dp_shard_size": 4},
        devices=8,
    ),
    axolotl(
        "mixture",
        {
            "objective.blocks": [{"name": "sigmoid", "weight": 1.0}, {"name": "sft", "weight": 0.2}],
            "data.eval": "org/held:test",
        },
        {"dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1.0, 0.2], "val_set_size": 0}
        | {"test_datasets": [{"path": "org/held", "split": "test", "type": "chat_template.default"}]},
    ),
]

# -------------------------------------------------------------------------------------------------- LLaMA-Factory

FACTORY = {
    "model_name_or_path": MODEL,
    "trust_remote_code": True,
    "stage": "dpo",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "pref_beta": 0.1,
    "pref_loss": "sigmoid",
    "dataset": "dpo_en_demo",
    "template": "qwen3_nothink",
    "cutoff_len": 2048,
    "max_samples": 1000,
    "overwrite_cache": True,
    "preprocessing_num_workers": 16,
    "dataloader_num_workers": 4,
    "output_dir": "saves/qwen3-4b/lora/dpo",
    "logging_steps": 10,
    "save_steps": 500,
    "plot_loss": True,
    "overwrite_output_dir": True,
    "save_only_model": False,
    "report_to": "none",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 5.0e-6,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "ddp_timeout": 180000000,
    "resume_from_checkpoint": None,
}
NO_PAIRS = {"pref_loss": "gone", "pref_beta": "gone"}


def factory(name: str, becomes: dict[str, Any], changes: dict[str, Any] | None = None, **more: Any) -> Public:
    """A YAML for `llamafactory-cli train`."""
    return Public(f"{name}.yaml", _yaml(FACTORY, changes or {}), becomes, **more)


FACTORY_YAML = [
    factory(
        "qwen3_lora_dpo",
        {
            "objective.beta": 0.1,
            "adapter.rank": 8,
            "adapter.targets": "all-linear",
            "data.train": "data/dpo_en_demo.json",
            "data.first": 1000,
            "batch.pairs": 32,
            "optimizer.warmup_fraction": 0.1,
        },
        devices=4,
    ),
    factory(
        "kto",
        {"objective.name": "kto", "objective.desirable_weight": 1.5},
        {**NO_PAIRS, "stage": "kto", "dataset": "kto_en_demo", "kto_chosen_weight": 1.5, "pref_beta": 0.1},
    ),
    factory(
        "rm",
        {"objective.name": "reward", "optimizer.learning_rate": 1e-4},
        {**NO_PAIRS, "stage": "rm", "learning_rate": 1e-4},
    ),
    factory(
        "sft",
        {
            "objective.name": "sft",
            "data.train": ["data/identity.json", "data/alpaca_en_demo.json"],
            "data.as_chat": True,
        },
        {**NO_PAIRS, "stage": "sft", "dataset": "identity,alpaca_en_demo"},
    ),
    factory(
        "simpo",
        {"objective.name": "simpo", "objective.gamma": 0.5, "objective.beta": 2.0},
        {"pref_loss": "simpo", "pref_beta": 2.0},
    ),
    factory("orpo", {"objective.name": "orpo", "objective.odds_weight": 0.1}, {"pref_loss": "orpo"}),
    factory(
        "ftx",
        {"objective.blocks": [{"name": "hinge", "weight": 1.0}, {"name": "sft", "weight": 0.3}]},
        {"pref_loss": "hinge", "pref_ftx": 0.3},
    ),
    factory(
        "bco",
        {"objective.blocks": [{"name": "sigmoid", "weight": 0.8}, {"name": "bco_pair", "weight": 0.2}]},
        {"pref_bco_weight": 0.25, "dpo_label_smoothing": 0.1},
    ),
    factory(
        "qlora",
        {
            "model.quantise": "nf4",
            "adapter.dora": True,
            "adapter.targets": ["q_proj", "v_proj"],
            "adapter.lr_ratio": 16.0,
        },
        {
            "quantization_bit": 4,
            "quantization_method": "bnb",
            "use_dora": True,
            "lora_target": "q_proj,v_proj",
            "loraplus_lr_ratio": 16.0,
        },
    ),
    factory(
        "full",
        {"adapter.rank": None, "reference.path": "org/other", "data.eval_fraction": 0.1, "evaluation.every": 500},
        {
            "finetuning_type": "full",
            "ref_model": "org/other",
            "val_size": 0.1,
            "eval_strategy": "steps",
            "eval_steps": 500,
        }
        | {
            "lora_rank": "gone",
            "lora_target": "gone",
            "deepspeed": "ds_z3_config.json",
            "per_device_eval_batch_size": 1,
        },
    ),
    factory(
        "freeze",
        {"model.freeze": ["layers/[0-9]/.*"], "objective.name": "sft"},
        {**NO_PAIRS, "stage": "sft", "finetuning_type": "freeze", "freeze_trainable_layers": 8, "lora_rank": "gone"},
        told=("model.freeze=['layers/[0-9]/.*']",),
    ),
    factory(
        "hub",
        {"data.train": "llamafactory/DPO-En-Zh-20k:en:train", "data.chat_template_kwargs": {"enable_thinking": False}},
        {
            "dataset": "dpo_mix_en",
            "enable_thinking": False,
            "early_stopping_steps": 3,
            "disable_gradient_checkpointing": True,
        },
    ),
    factory("mine", {"data.train": "data/mine.json"}, {"dataset": "mine", "dataset_dir": "data"}, asks=("data.train",)),
]

# ------------------------------------------------------------------------------------------------------ torchtune

TORCHTUNE = {
    "output_dir": "/tmp/torchtune/llama3_1_8B/lora_dpo",
    "model": {
        "_component_": "torchtune.models.llama3_1.lora_llama3_1_8b",
        "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True,
        "apply_lora_to_output": False,
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
    },
    "tokenizer": {
        "_component_": "torchtune.models.llama3.llama3_tokenizer",
        "path": "/tmp/Meta-Llama-3.1-8B-Instruct/original/tokenizer.model",
        "max_seq_len": 1024,
    },
    "checkpointer": {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": "/tmp/Meta-Llama-3.1-8B-Instruct/",
        "checkpoint_files": ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        "recipe_checkpoint": None,
        "output_dir": "${output_dir}",
        "model_type": "LLAMA3",
    },
    "resume_from_checkpoint": False,
    "save_adapter_weights_only": False,
    "dataset": {"_component_": "torchtune.datasets.hh_rlhf_helpful_dataset"},
    "seed": None,
    "shuffle": True,
    "batch_size": 4,
    "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "weight_decay": 0.05, "lr": "5e-4"},
    "lr_scheduler": {
        "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
        "num_warmup_steps": 100,
    },
    "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.1, "label_smoothing": 0},
    "epochs": 1,
    "max_steps_per_epoch": 1000,
    "gradient_accumulation_steps": 8,
    "compile": False,
    "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": "${output_dir}/logs"},
    "log_every_n_steps": 1,
    "log_peak_memory_stats": True,
    "log_level": "INFO",
    "device": "cuda",
    "dtype": "bf16",
    "enable_activation_checkpointing": True,
    "enable_activation_offloading": False,
}


def torchtune(name: str, becomes: dict[str, Any], changes: dict[str, Any] | None = None, **more: Any) -> Public:
    """A YAML for `tune run`."""
    return Public(f"{name}.yaml", _yaml(TORCHTUNE, changes or {}), becomes, **more)


FULL_MODEL = {"model": {"_component_": "torchtune.models.llama3_1.llama3_1_8b"}}
TORCHTUNE_YAML = [
    torchtune(
        "8B_lora_dpo",
        {
            "steps": 1000,
            "batch.pairs": 64,
            "optimizer.clip_norm": None,
            "optimizer.weight_decay": 0.05,
            "optimizer.warmup_steps": 100,
            "adapter.targets": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "output": "/tmp/torchtune/llama3_1_8B/lora_dpo",
        },
        devices=2,
    ),
    torchtune(
        "8B_full_dpo",
        {"adapter.rank": None, "reference.path": "/tmp/other", "model.compute_dtype": "bfloat16"},
        {**FULL_MODEL, "ref_checkpointer": {**TORCHTUNE["checkpointer"], "checkpoint_dir": "/tmp/other"}},
    ),
    torchtune(
        "7B_lora_dpo_single_device",
        {"batch.pairs": 32, "objective.beta": 0.1},
        {"loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"}},
        devices=None,
    ),
    torchtune(
        "rso",
        {"objective.name": "hinge", "objective.beta": 0.2},
        {"loss": {"_component_": "torchtune.rlhf.loss.RSOLoss", "gamma": 0.2}},
    ),
    torchtune(
        "mine",
        {"data.train": "pairs.json", "data.columns": {"chosen": "yes", "rejected": "no"}, "epochs": 3.0},
        {
            "dataset": {
                "_component_": "torchtune.datasets.preference_dataset",
                "source": "json",
                "data_files": "pairs.json",
                "column_map": {"chosen": "yes", "rejected": "no"},
                "split": "train",
            },
            "max_steps_per_epoch": None,
            "epochs": 3,
            "clip_grad_norm": 0.5,
        },
    ),
]


PUBLIC = [*TRL_YAML, *SCRIPTS, *HANDBOOK_YAML, *AXOLOTL_YAML, *FACTORY_YAML, *TORCHTUNE_YAML]
"""All of them."""
