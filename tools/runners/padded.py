"""Plain llamas, and batches of one fixed shape, as rivals that pad take them; for their runners. Needs NumPy only.

Import it before anything of the rival: with `protocol` it takes the runners' folder off the path.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from protocol import Spec

ROUND_TO = 32
ANSWERS = ("chosen_ids", "rejected_ids")
PLAIN = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def plain_llama(folder: str) -> tuple[dict[str, Any], float]:
    """A folder's config.json, of either style, and the theta of its rotation; exits if it is no plain llama."""
    config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    wrong = {key: config.get(key) for key, value in PLAIN.items() if config.get(key, value) != value}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        wrong["rope_type"] = rope
    if wrong:
        sys.exit(f"{folder}: this runner has no {wrong}; choose a plain llama")
    return config, rope.get("rope_theta", config.get("rope_theta", 10000.0))


def rounded_up(length: int, multiple: int = ROUND_TO) -> int:
    """The next multiple at or above `length`."""
    return -(-length // multiple) * multiple


def longest(spec: Spec) -> tuple[int, int]:
    """Tokens of the longest prompt and of the longest answer of the run, each rounded up to a multiple of 32.

    The least that a rival which pads every batch to one shape can be given.
    """
    rows = spec.rows()
    prompt = max(len(row["prompt_ids"]) for row in rows)
    answer = max(len(row[key]) for row in rows for key in ANSWERS)
    return rounded_up(prompt), rounded_up(answer)


def longest_sequence(spec: Spec) -> int:
    """Tokens of the longest prompt with an answer of the run, rounded up to a multiple of 32."""
    return rounded_up(max(len(row["prompt_ids"]) + len(row[key]) for row in spec.rows() for key in ANSWERS))


def padded(sequences: Iterable[Sequence[int]], width: int, pad_id: int, *, left: bool = False) -> tuple[Any, Any]:
    """Token ids and their mask (1: a token, 0: padding), two int32 arrays of [rows, width].

    Raises:
      ValueError: a sequence is longer than `width`.
    """
    ids, mask = [], []
    for sequence in sequences:
        missing = width - len(sequence)
        if missing < 0:
            raise ValueError(f"a sequence of {len(sequence)} tokens does not fit into {width}")
        gap, ones = [pad_id] * missing, [1] * len(sequence)
        ids.append([*gap, *sequence] if left else [*sequence, *gap])
        mask.append([0] * missing + ones if left else ones + [0] * missing)
    return np.array(ids, np.int32), np.array(mask, np.int32)
