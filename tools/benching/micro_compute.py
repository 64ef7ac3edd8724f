"""Measurements of what the device computes: the head, the layouts of a batch, and steps and rows that grow."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data.batch import Batch
from dpo_jax.data.batches import Batches
from dpo_jax.data.encoded import Encoded
from dpo_jax.logprobs.tokens import linear_logprobs
from dpo_jax.model.decoder import Execution, init_params
from dpo_jax.model.weights import Weights
from dpo_jax.preference.loss import TrainingObjective, loss_and_gradient
from dpo_jax.run.data import length_on
from tools.benching.inputs import encoded_of
from tools.benching.memory import Shape, llama
from tools.benching.micro import Options, Row, timed
from tools.benching.workloads import hh_lengths

SMALL = Shape(layers=6, width=512, inner=1408, heads=8, kv_heads=4, vocabulary=10240)
"""30 million parameters."""


def _float32_is_float32() -> None:
    jax.config.update("jax_default_matmul_precision", "highest")


def temporary_mib(compiled: Any) -> float:
    """What a compiled program allocates beside its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


# ---------------------------------------------------------------------------------------------- head


def head(options: Options) -> list[Row]:
    """Forward and backward of the head alone: N tokens, width D, vocabulary V as SmolLM2's.

    `worst` is the largest difference of a log-probability from the float32 value by whole logits, in nats.
    """
    _float32_is_float32()
    n, d, v = (256, 64, 8192) if options.quick else (4096, 576, 49152)
    hidden, rows, targets, slope = _head_inputs(n, d, v)
    truth = np.asarray(jax.jit(_naive)(hidden, rows, targets))
    found = []
    for dtype in ("float32", "bfloat16"):
        for name, form in (("whole logits", _naive), ("fused", _fused)):
            args = (hidden.astype(dtype), rows.astype(dtype), targets)
            compiled = jax.jit(_forward_and_backward(form)).lower(*args, slope).compile()
            logps = np.asarray(compiled(*args, slope)[0])
            found.append(
                {
                    "head": name,
                    "dtype": dtype,
                    **timed(_blocking(compiled, *args, slope), 3),
                    "temp MiB": temporary_mib(compiled),
                    "worst": float(np.abs(logps - truth).max()),
                }
            )
    return found


def _head_inputs(n: int, d: int, v: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (n, d))
    rows = 0.05 * jax.random.normal(keys[1], (v, d))
    return hidden, rows, jax.random.randint(keys[2], (n,), 0, v), jax.random.normal(keys[3], (n,))


def _naive(hidden: jax.Array, rows: jax.Array, targets: jax.Array) -> jax.Array:
    logits = jnp.einsum("nd,vd->nv", hidden, rows, preferred_element_type=jnp.float32)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=-1)[:, 0]


def _fused(hidden: jax.Array, rows: jax.Array, targets: jax.Array) -> jax.Array:
    return linear_logprobs(hidden, rows.T, targets)


def _forward_and_backward(form: Callable) -> Callable:
    def both(hidden, rows, targets, slope):
        logps, pull = jax.vjp(lambda hidden, rows: form(hidden, rows, targets), hidden, rows)
        return logps, pull(slope)

    return both


def _blocking(call: Callable, *args: Any) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(call(*args))


# ---------------------------------------------------------------------------------------------- layouts


def layouts(options: Options) -> list[Row]:
    """Loss and gradient of the same steps of 8 pairs of hh-rlhf's lengths, in three layouts.

    The reference is 0 everywhere, so that the loss, which must be the same in all, depends on every log-probability.
    """
    _float32_is_float32()
    shape = dataclasses.replace(SMALL, layers=2, width=64, inner=128) if options.quick else SMALL
    pairs, steps = 8, 1 if options.quick else 4
    encoded = encoded_of(np.minimum(hh_lengths(pairs * steps, np.random.default_rng(0)), 400), shape.vocabulary)
    make = functools.partial(
        Batches,
        encoded,
        pairs,
        1,
        steps,
        order="file",
        attention_length=length_on(jax.devices()[0].platform),
        reference=np.zeros(encoded.num_scored, np.float32),
    )
    shared, alone = make(share_prompts=True), make(share_prompts=False)
    batches = {
        "shared prompts, packed": [shared.at(step) for step in range(steps)],
        "packed": [alone.at(step) for step in range(steps)],
        "padded to the longest": [padded(encoded, shared.pairs_of(step), shared.at(step)) for step in range(steps)],
    }
    return [
        {"layout": name, "dtype": dtype, **_step_cost(shape, dtype, found, steps * pairs)}
        for dtype in ("float32", *(("bfloat16",) if jax.default_backend() != "cpu" else ()))
        for name, found in batches.items()
    ]


def _step_cost(shape: Shape, dtype: str, batches: list[Batch], pairs: int) -> Row:
    """Slots, seconds by pair, largest temporary memory, and the mean loss of these steps."""
    objective = TrainingObjective(llama(shape), compute_dtype=dtype, execution=Execution(remat="attention"))
    params = init_params(objective.spec, jax.random.key(0))
    compiled = {}
    for batch in batches:
        if batch.tokens.shape not in compiled:
            solve = jax.jit(lambda params, batch: loss_and_gradient(objective, Weights(params), batch)[::2])
            compiled[batch.tokens.shape] = solve.lower(params, batch).compile()
    losses = [float(compiled[batch.tokens.shape](params, batch)[0]) for batch in batches]

    def all_steps() -> None:
        for batch in batches:
            jax.block_until_ready(compiled[batch.tokens.shape](params, batch))

    cost = timed(all_steps, 3)
    slots = sum(int(batch.micro_batches) * int(np.prod(batch.tokens.shape[1:])) for batch in batches)
    return {
        "slots/pair": slots / pairs,
        **{f"{name}/pair": value / pairs for name, value in cost.items()},
        "temp MiB": max(temporary_mib(program) for program in compiled.values()),
        "loss": float(np.mean(losses)),
    }


def padded(encoded: Encoded, pairs: np.ndarray, like: Batch) -> Batch:
    """The pairs as trainers without packing lay them out: a row for each sequence, as long as the longest.

    `like` is a batch of the same pairs; what does not depend on the layout is taken from it.
    """
    completions = np.concatenate([encoded.chosen[pairs], encoded.rejected[pairs]])
    texts = [(encoded.prompt(int(c)), encoded.completion(int(c))) for c in completions]
    longest, count = max(len(prompt) + len(answer) for prompt, answer in texts), len(pairs)
    slots = np.zeros((4, 1, 1, len(texts), longest), np.int32)
    for row, (prompt, answer) in enumerate(texts):
        length = len(prompt) + len(answer)
        slots[0, 0, 0, row, :length] = np.concatenate([prompt, answer])
        slots[1, 0, 0, row, :length] = 1
        slots[2, 0, 0, row, len(prompt) : length] = 1
        slots[3, 0, 0, row, :length] = np.arange(length)
    sources = [row * longest + len(p) - 1 + np.arange(len(a)) for row, (p, a) in enumerate(texts)]
    owners = [np.full(len(answer), row) for row, (_, answer) in enumerate(texts)]

    def lead(values: Any, dtype: Any = np.int32) -> np.ndarray:
        return np.asarray(values, dtype)[None, None]

    numbers = np.arange(len(texts))
    return dataclasses.replace(
        like,
        **dict(zip(("tokens", "group", "branch", "position"), slots, strict=True)),
        source=lead(np.concatenate(sources)),
        target=lead(np.concatenate([answer for _, answer in texts])),
        completion=lead(np.concatenate(owners)),
        chosen=lead(numbers[:count]),
        rejected=lead(numbers[count:]),
        **{name: lead(np.ones(count), np.float32) for name in ("weight", "label")},
        margin=lead(np.zeros(count), np.float32),
        real=lead(np.ones(count), bool),
        noise=lead(np.full(count, 0.5), np.float32),
        ranked=lead(np.zeros((count, 0))),
        rank=lead(np.zeros((count, 0))),
        reference=lead(np.zeros(sum(map(len, sources))), np.float32),
        lengths=lead([len(answer) for _, answer in texts], np.float32),
        last=lead([row * longest + len(p) + len(a) - 1 for row, (p, a) in enumerate(texts)]),
        ids=lead(completions),
        micro_batches=np.int32(1),
    )


# ---------------------------------------------------------------------------------------------- growth


def pairs(options: Options) -> list[Row]:
    """Loss and gradient of the same 64 pairs of hh-rlhf's lengths, in steps of 4, 16 and 64 pairs."""
    _float32_is_float32()
    shape = dataclasses.replace(SMALL, layers=2, **({"width": 64, "inner": 128} if options.quick else {}))
    total, sizes = (16, (1, 4, 16)) if options.quick else (64, (4, 16, 64))
    encoded = encoded_of(np.minimum(hh_lengths(total, np.random.default_rng(0)), 400), shape.vocabulary)
    reference = np.zeros(encoded.num_scored, np.float32)
    found = []
    for size in sizes:
        steps = total // size
        batches = Batches(
            encoded,
            size,
            1,
            steps,
            order="file",
            attention_length=length_on(jax.devices()[0].platform),
            reference=reference,
        )
        cost = _step_cost(shape, "float32", [batches.at(step) for step in range(steps)], total)
        found.append({"pairs a step": size, **cost})
    return found


def rows(options: Options) -> list[Row]:
    """Loss and gradient of 4,096 slots in rows of 256 to 4096, one pair filling each row.

    The same slots, scored tokens and weights in each, so what grows with the length is attention: `attention` is its
    share by a least-squares line `s = rest + slope * length` through all rows.
    """
    _float32_is_float32()
    shape = dataclasses.replace(SMALL, layers=2, width=64, inner=128) if options.quick else SMALL
    total, lengths = (512, (128, 256, 512)) if options.quick else (4096, (256, 512, 1024, 2048, 4096))
    found = [_row_cost(shape, total, length) for length in lengths]
    slope, rest = np.polyfit([row["row"] for row in found], [row["CPU-s"] for row in found], 1)
    return [{**row, "attention": float(slope * row["row"] / (slope * row["row"] + rest))} for row in found]


def _row_cost(shape: Shape, total: int, length: int) -> Row:
    pairs = total // length
    encoded = encoded_of(np.tile([length // 2, length // 4, length // 4], (pairs, 1)), shape.vocabulary)
    reference = np.zeros(encoded.num_scored, np.float32)
    # rows of exactly one pair, all of them in one micro-batch
    batch = Batches(encoded, pairs, 1, 1, attention_length=1, micro_tokens=total, reference=reference).at(0)
    shown = batch.tokens.shape[2:]
    if shown != (pairs, length):
        raise ValueError(f"{pairs} pairs of {length} slots were packed as {shown[0]} rows of {shown[1]}")
    objective = TrainingObjective(llama(shape), execution=Execution(remat="attention"))
    params = init_params(objective.spec, jax.random.key(0))
    solve = jax.jit(lambda params, batch: loss_and_gradient(objective, Weights(params), batch)[::2])
    compiled = solve.lower(params, batch).compile()
    return {
        "row": length,
        "rows": pairs,
        **timed(_blocking(compiled, params, batch), 3),
        "temp MiB": temporary_mib(compiled),
    }
