"""What the compiled training step allocates, and whether any array of it is as large as logits would be.

The shape is the one that the peers were measured at: a Llama of two layers and width 256, four pairs whose sequences
(prompt and answer) have 512 tokens each, float32, so four trees of 256 + 256 + 256 slots and 2,048 scored tokens.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

CLAIM_BYTES = 350_000_000
"""Temporary memory that the step may take at 128,256 tokens. One gradient of the embedding is 131 MB of it."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the model and of a step."""

    layers: int = 2
    width: int = 256
    inner: int = 704
    heads: int = 8
    kv_heads: int = 4
    vocabulary: int = 128256
    pairs: int = 4
    prompt: int = 256
    answer: int = 256

    @property
    def scored(self) -> int:
        """Tokens of all answers."""
        return 2 * self.pairs * self.answer

    @property
    def sequences(self) -> int:
        """Tokens as padding counts them: every prompt once for each answer."""
        return 2 * self.pairs * (self.prompt + self.answer)


def measure(shape: Shape) -> dict[str, Any]:
    """Bytes by kind, the largest arrays, and what is not as it is claimed to be."""
    compiled, slots = compile_step(shape)
    analysis = compiled.memory_analysis()
    text = compiled.as_text()
    logits = sorted({array for array in arrays(text) if is_logits(array, shape)}, key=size)
    found = {
        "shape": dataclasses.asdict(shape),
        "slots": slots,
        "temporary_bytes": analysis.temp_size_in_bytes,
        "argument_bytes": analysis.argument_size_in_bytes,
        "output_bytes": analysis.output_size_in_bytes,
        "aliased_bytes": analysis.alias_size_in_bytes,
        "full_logits_bytes": 4 * shape.sequences * shape.vocabulary,
        "largest_arrays": [written(array) for array in sorted(set(arrays(text)), key=size)[:-6:-1]],
    }
    return found | {"problems": problems(found, logits)}


def problems(found: Mapping[str, Any], logits: list[tuple[str, tuple[int, ...]]]) -> list[str]:
    """A line for each claim that does not hold."""
    lines = [f"{written(array)} is larger than the embedding" for array in logits]
    if found["shape"] == dataclasses.asdict(Shape()) and found["temporary_bytes"] > CLAIM_BYTES:
        lines.append(f"temporary memory {found['temporary_bytes']:,} is more than {CLAIM_BYTES:,} bytes")
    return lines


def compile_step(shape: Shape) -> tuple[Any, int]:
    """The training step as `dpo_jax.train` compiles it, with a cached reference; and the token slots of a batch.

    Weights are shapes only; nothing is computed.
    """
    import jax
    import numpy as np

    from dpo_jax.data.batches import Batches
    from dpo_jax.model.decoder import Execution, abstract_params
    from dpo_jax.model.weights import Weights
    from dpo_jax.preference.loss import TrainingObjective
    from dpo_jax.training.optimizer import make_optimizer, schedule
    from dpo_jax.training.settings import OptimizerSettings
    from dpo_jax.training.step import fresh_state, make_step
    from tools.benching.inputs import encoded_of

    jax.config.update("jax_default_matmul_precision", "highest")
    spec = llama(shape)
    lengths = np.tile([shape.prompt, shape.answer, shape.answer], (shape.pairs, 1))
    encoded = encoded_of(lengths, shape.vocabulary)
    reference = np.zeros(encoded.num_scored, np.float32)
    batch = Batches(encoded, shape.pairs, 1, 1, attention_length=768, reference=reference).at(0)
    settings = OptimizerSettings(schedule="constant", warmup_steps=0)
    optimizer = make_optimizer(settings)
    objective = TrainingObjective(
        spec, compute_dtype="float32", execution=Execution(scan_layers=True, remat="attention")
    )
    step = make_step(objective, optimizer, schedule(settings, 1))
    state = jax.eval_shape(lambda params: fresh_state(params, optimizer), abstract_params(spec))
    described = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), (state, batch))
    compiled = jax.jit(step, donate_argnums=0).lower(described[0], Weights({}), None, described[1]).compile()
    return compiled, int(np.prod(batch.tokens.shape[1:])) * int(batch.micro_batches)


def llama(shape: Shape) -> Any:
    """The model's spec, read from a config as for any folder."""
    import tempfile
    from pathlib import Path

    from dpo_jax.hf.configs import read_spec
    from tools.benching.workloads import write_config

    with tempfile.TemporaryDirectory() as folder:
        return read_spec(
            write_config(
                Path(folder) / "model",
                vocab_size=shape.vocabulary,
                hidden_size=shape.width,
                intermediate_size=shape.inner,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                head_dim=shape.width // shape.heads,
            )
        )


# ---------------------------------------------------------------------------------------------- optimized HLO

_ARRAY = re.compile(r"\b(pred|[fsu]\d+|bf16|f8\w+)\[([\d,]+)\]")
_BYTES = {"pred": 1, "bf16": 2}


def arrays(text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """dtype and shape of every array that the text of a compiled program names."""
    for dtype, sizes in _ARRAY.findall(text):
        yield dtype, tuple(int(number) for number in sizes.split(","))


def is_logits(array: tuple[str, tuple[int, ...]], shape: Shape) -> bool:
    """Whether an array could hold a vocabulary axis times a token axis at full size.

    Nothing that a step needs is larger than the embedding, vocabulary x width, and there are more scored tokens than
    the model is wide: so the test is the number of elements, however the axes are cut.
    """
    assert shape.scored > shape.width, shape
    return math.prod(array[1]) > shape.vocabulary * shape.width


def size(array: tuple[str, tuple[int, ...]]) -> int:
    """Bytes."""
    dtype, sizes = array
    return math.prod(sizes) * (_BYTES.get(dtype) or int(re.findall(r"\d+", dtype)[0]) // 8 or 1)


def written(array: tuple[str, tuple[int, ...]]) -> str:
    """As HLO has it."""
    return f"{array[0]}[{','.join(map(str, array[1]))}]"


def lines(found: Mapping[str, Any]) -> list[str]:
    """For the terminal."""
    shape = found["shape"]
    return [
        f"{shape['layers']} layers, width {shape['width']}, {shape['pairs']} pairs of 2 x "
        f"{shape['prompt'] + shape['answer']} tokens in {found['slots']} slots, vocabulary {shape['vocabulary']:,}",
        f"temporary memory     {found['temporary_bytes'] / 1e6:>9,.1f} MB (claimed: at most {CLAIM_BYTES / 1e6:,.0f})",
        f"state and batch      {found['argument_bytes'] / 1e6:>9,.1f} MB, of which {found['aliased_bytes'] / 1e6:,.1f} "
        "MB are updated in place",
        f"logits, had they been {found['full_logits_bytes'] / 1e6:>8,.1f} MB",
        f"largest arrays       {'  '.join(found['largest_arrays'])}",
        *(
            [f"NOT AS CLAIMED: {line}" for line in found["problems"]]
            or ["no array is larger than the embedding, so none has a token and a vocabulary axis at full size"]
        ),
    ]
