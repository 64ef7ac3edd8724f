"""What configs of other trainers may train. Nothing is imported here, so that help is quick."""

METHODS = {
    "dpo": "DPO",
    "kto": "KTO",
    "orpo": "ORPO",
    "cpo": "CPO or SimPO",
    "reward": "a reward model",
    "sft": "supervised fine-tuning",
}
"""What can be converted, and what it is called."""
