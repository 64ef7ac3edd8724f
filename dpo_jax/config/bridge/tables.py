"""Data sets that the other trainers know by a name of their own, and the columns of their rows."""

from typing import Any

PREPARED: dict[tuple[str, str], dict[str, Any]] = {
    ("dpo", "chat_template.default"): {"prompt": "messages"},
    ("", "intel"): {"prompt": "question"},
    ("", "icr"): {"prompt": "input"},
    ("dpo", "argilla"): {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    ("kto", "argilla"): {"prompt": "instruction"},
    ("reward", "chat_template"): {"prompt": "input"},
    ("reward", "llama3"): {"prompt": "input"},
    ("", "alpaca"): {"prompt": ("instruction", "input"), "completion": "output"},
    ("", "gpteacher"): {"prompt": ("instruction", "input"), "completion": "response"},
    ("", "sharegpt"): {"messages": "conversations"},
}
"""Columns of Axolotl's `type` (or its last part), by method or for all: our column and theirs. Others have ours."""

_PAIRS = {"ranking": True, "formatting": "sharegpt", "columns": {"messages": "conversations", "chosen": "chosen"}}
FACTORY_SETS: dict[str, dict[str, Any]] = {
    "dpo_en_demo": {"file_name": "dpo_en_demo.json", **_PAIRS},
    "dpo_zh_demo": {"file_name": "dpo_zh_demo.json", **_PAIRS},
    "dpo_mix_en": {"hf_hub_url": "llamafactory/DPO-En-Zh-20k", "subset": "en", **_PAIRS},
    "dpo_mix_zh": {"hf_hub_url": "llamafactory/DPO-En-Zh-20k", "subset": "zh", **_PAIRS},
    "coig_p": {"hf_hub_url": "m-a-p/COIG-P", **_PAIRS},
    "ultrafeedback": {
        "hf_hub_url": "llamafactory/ultrafeedback_binarized",
        "ranking": True,
        "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
    },
    "orca_pairs": {
        "hf_hub_url": "Intel/orca_dpo_pairs",
        "ranking": True,
        "columns": {"prompt": "question", "chosen": "chosen", "rejected": "rejected", "system": "system"},
    },
    "orca_dpo_de": {"hf_hub_url": "mayflowergmbh/intel_orca_dpo_pairs_de", "ranking": True},
    "nectar_rm": {"hf_hub_url": "AstraMindAI/RLAIF-Nectar", "ranking": True},
    "kto_en_demo": {
        "file_name": "kto_en_demo.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "kto_tag": "label"},
    },
    "kto_mix_en": {
        "hf_hub_url": "argilla/kto-mix-15k",
        "formatting": "sharegpt",
        "columns": {"messages": "completion", "kto_tag": "label"},
    },
    "ultrafeedback_kto": {
        "hf_hub_url": "argilla/ultrafeedback-binarized-preferences-cleaned-kto",
        "columns": {"prompt": "prompt", "response": "completion", "kto_tag": "label"},
    },
    "identity": {"file_name": "identity.json"},
    "alpaca_en_demo": {"file_name": "alpaca_en_demo.json"},
    "alpaca_zh_demo": {"file_name": "alpaca_zh_demo.json"},
    "alpaca_en": {"hf_hub_url": "llamafactory/alpaca_en"},
    "alpaca_gpt4_en": {"hf_hub_url": "llamafactory/alpaca_gpt4_en"},
    "slimorca": {"hf_hub_url": "Open-Orca/SlimOrca", "formatting": "sharegpt"},
}
"""Entries of LLaMA-Factory's own dataset_info.json for preferences and its examples; a file beside the config wins."""

COMPONENTS: dict[str, tuple[str | None, dict[str, Any], str | None]] = {
    "stack_exchange_paired_dataset": (
        "lvwerra/stack-exchange-paired",
        {"prompt": "question", "chosen": "response_j", "rejected": "response_k"},
        "of this data set the folder data/rl is read there; download it and name its files",
    ),
    "hh_rlhf_helpful_dataset": ("RLHFlow/HH-RLHF-Helpful-standard", {}, None),
    "preference_dataset": (None, {}, None),
    "chat_dataset": (None, {}, None),
    "instruct_dataset": (None, {"prompt": "input", "completion": "output"}, None),
    "alpaca_dataset": ("tatsu-lab/alpaca", {"prompt": ("instruction", "input"), "completion": "output"}, None),
    "alpaca_cleaned_dataset": (
        "yahma/alpaca-cleaned",
        {"prompt": ("instruction", "input"), "completion": "output"},
        None,
    ),
    "samsum_dataset": ("Samsung/samsum", {"prompt": "dialogue", "completion": "summary"}, None),
    "grammar_dataset": ("liweili/c4_200m", {"prompt": "input", "completion": "output"}, None),
    "slimorca_dataset": ("Open-Orca/SlimOrca-Dedup", {"messages": "conversations"}, None),
}
"""torchtune's builders of data sets: the source, our columns and theirs, and what is to be asked."""
