"""Measurements of what the host does with the data: tokenising, planning the shapes of a run, packing its steps."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.data.batches import Batches
from dpo_jax.data.encode import collect
from dpo_jax.data.encoded import Encoded
from dpo_jax.data.settings import DataSettings
from dpo_jax.errors import UserError
from dpo_jax.hf.tokenizer import load_tokenizer
from tools.benching.inputs import encoded_of
from tools.benching.micro import Options, Row, once
from tools.benching.workloads import hh_lengths, write_tiny

PAIRS_PER_STEP, SHARDS, TIMED_STEPS = 256, 8, 64


def packing(options: Options) -> list[Row]:
    """A million pairs of hh-rlhf's lengths, 256 in a step, on 8 devices: planning once, and packing by the step.

    Peak memory is the process's, less what it had before, and without the tokens, which are never written.
    """
    return _plan_and_pack(_pairs(20_000 if options.quick else 1_000_000))


def _pairs(count: int) -> Encoded:
    return encoded_of(np.minimum(hh_lengths(count, np.random.default_rng(0)), 1000), 50_000, blank=True)


def _plan_and_pack(encoded: Encoded) -> list[Row]:
    from tools.runners.protocol import peak_bytes

    steps, before = encoded.num_pairs // PAIRS_PER_STEP, peak_bytes()
    batches = Batches(encoded, PAIRS_PER_STEP, SHARDS, steps)
    (shapes, depth), plan = once(lambda: (batches.shapes, batches.depth))
    after_plan = peak_bytes()
    picked = np.unique(np.linspace(0, steps - 1, TIMED_STEPS).astype(int)).tolist()
    made, pack = once(lambda: [_padding(batches.at(step)) for step in picked])
    described = " ".join(f"{shape.rows}x{shape.length}" for shape in shapes)
    mib = {"grew MiB": (after_plan - before) / 2**20}
    return [
        {"what": "plan", "pairs": encoded.num_pairs, **plan, **mib, "shapes": f"{described} x{depth}"},
        {
            "what": "a step",
            "pairs": PAIRS_PER_STEP,
            **{name: value / len(picked) for name, value in pack.items()},
            "grew MiB": (peak_bytes() - after_plan) / 2**20,
            "padding": float(np.mean(made)),
        },
    ]


def _padding(batch: Any) -> float:
    """Share of the slots of the micro-batches in use that hold nothing."""
    used = batch.group[: int(batch.micro_batches)]
    return float(1 - np.count_nonzero(used) / used.size)


def growth(options: Options) -> list[Row]:
    """Seconds by pair at 1x, 4x and 16x pairs: what is linear stays the same.

    CPU seconds of this process; but of tokenising, which other processes do, wall seconds, with starting them.
    """
    base = 500 if options.quick else 4000
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = load_tokenizer(write_tiny(folder / "model"), None)
        for factor in (1, 4, 16):
            count = factor * base
            text = _texts(folder / f"{factor}.jsonl", count)
            (_, report), encoding = once(lambda text=text: collect(text, tokenizer, DataSettings(train=text)))
            plan, pack = _plan_and_pack(_pairs(count))
            found.append(
                {
                    "pairs": count,
                    "kept": report.pairs,
                    "tokenise us/pair": 1e6 * encoding["s"] / count,
                    "plan us/pair": 1e6 * plan["CPU-s"] / count,
                    "pack us/pair": 1e6 * pack["CPU-s"] / PAIRS_PER_STEP,
                }
            )
    return found


def _texts(path: Path, count: int) -> str:
    """A file of pairs of random words in hh-rlhf's lengths."""
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for lengths in hh_lengths(count, rng).tolist():
            words = [" ".join(f"w{number}" for number in rng.integers(4, 8192, length)) for length in lengths]
            file.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), words, strict=True))) + "\n")
    return str(path)


def tokenisation(options: Options) -> list[Row]:
    """A file of pairs to token ids, without the cache; --model and --data name both, else both are made here."""
    if (options.model is None) != (options.data is None):
        raise UserError("tokenisation: --model and --data belong together; give both, or neither")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = Path(options.model) if options.model else write_tiny(folder / "model")
        data = options.data or _texts(folder / "pairs.jsonl", 500 if options.quick else 8000)
        tokenizer = load_tokenizer(model, None)
        (encoded, report), cost = once(lambda: collect(data, tokenizer, DataSettings(train=data)))
        size = Path(data).stat().st_size
    rates = {"pairs/s": report.pairs / cost["s"], "tokens/s": len(encoded.tokens) / cost["s"]}
    return [{"pairs": report.pairs, "MB": size / 1e6, **cost, **rates}]
