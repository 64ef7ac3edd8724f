"""What a whole run needs, as small as it can be: a model's folder with its tokenizer, pairs, and a question."""

from pathlib import Path
from typing import Any

from tests.support.tiny_folders import write_folder
from tests.support.tiny_rows import byte_tokenizer, user, write, yes_or_no


def write_model(
    folder: Path, family: str = "llama", dtype: str = "float32", *, tokenizer: Any = None, **changes: Any
) -> Any:
    """A folder of a model that knows 300 tokens, with a tokenizer of single bytes or another; returns the tokenizer."""
    tokenizer = tokenizer or byte_tokenizer()
    ends = {"vocab_size": 300, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    write_folder(folder, family, dtype, **ends, **changes)
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def write_world(root: Path, trained: int, held_out: int, *, shards: int = 1) -> Path:
    """A model of two layers in so many files, files of so many pairs to train on and of so many others, and one of a
    question."""
    write_model(root / "model", num_hidden_layers=2, shards=shards)
    rows = yes_or_no(trained + held_out)
    write(root / "train.jsonl", *rows[:trained])
    write(root / "eval.jsonl", *rows[trained:])
    write(root / "answers.jsonl", {"prompt": [user("Say 3")], "good": "."})
    return root


def settings_in(world):
    """Of a run of six steps in a world that `write_world` has written, which saves and measures on the way."""
    return {
        "model.path": world / "model",
        "data.train": world / "train.jsonl",
        "data.eval": world / "eval.jsonl",
        "evaluation.answers": world / "answers.jsonl",
        "evaluation.max_new_tokens": 4,
        "batch.pairs": 4,
        "batch.micro_tokens": 256,
        "steps": 6,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 0,
        "checkpoint.every": 2,
        "evaluation.every": 3,
        "log.tensorboard": False,
    }
