"""What the stopwatch is held to: a model, pairs as token ids in step order, and the numbers of a spec.

    smollm2_hh   short dialogues of hh-rlhf: --model FOLDER --data hh_train.jsonl
    sharegpt     short prompts and long answers: --model FOLDER --data sharegpt.json
    tiny         a random 5.2-million-parameter Llama and random pairs of hh-rlhf's lengths; made here

Texts are read by dpo_jax's own reader, tokenised by the model's tokenizer, and truncated by its default rule, once;
every runner is given the same token ids.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.data.encode import collect
from dpo_jax.data.encoded import Encoded
from dpo_jax.data.settings import DataSettings
from dpo_jax.errors import UserError
from tools.runners.protocol import Spec

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.02,
    "dtype": "float32",
}
"""The model on which the peers were tried by hand."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """What does not depend on the machine."""

    pairs_per_step: int
    max_length: int
    learning_rate: float
    """High enough that the losses of a few steps move: losses that do not move cannot tell two programs apart."""
    made_here: bool = False


WORKLOADS = {
    "smollm2_hh": Workload(pairs_per_step=8, max_length=1024, learning_rate=5e-5),
    "sharegpt": Workload(pairs_per_step=8, max_length=1024, learning_rate=5e-5),
    "tiny": Workload(pairs_per_step=8, max_length=1024, learning_rate=1e-3, made_here=True),
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the command line decides."""

    steps: int
    warmup: int
    dtype: str
    reference: str
    threads: int
    model: str | None = None
    data: str | None = None
    pairs_per_step: int | None = None
    max_length: int | None = None
    lora: int | None = None
    """Rank of an adapter of all of attention and the MLPs, which is trained in place of the model."""


def prepare(name: str, choice: Choice, folder: Path) -> tuple[Spec, dict[str, Any]]:
    """Write the pairs (and the model of `tiny`) to the folder; the spec, and facts of the data for the record.

    Raises:
      UserError: the workload needs --model and --data, takes none, or the data has too few pairs.
    """
    workload = WORKLOADS[name]
    _check_sources(name, workload, choice)
    size = choice.pairs_per_step or workload.pairs_per_step
    length = choice.max_length or workload.max_length
    wanted = size * choice.steps
    if workload.made_here:
        model = write_tiny(folder / "model")
        rows = list(random_rows(wanted, length))
    else:
        model = Path(str(choice.model)).expanduser().resolve()
        rows = read_rows(model, str(choice.data), length, wanted)
    if len(rows) < wanted:
        raise UserError(
            f"{name}: {choice.steps} steps of {size} pairs need {wanted} pairs and the data has {len(rows)}"
        )
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    spec = Spec(
        model=str(model),
        pairs=str(path),
        pairs_per_step=size,
        steps=choice.steps,
        warmup=choice.warmup,
        dtype=choice.dtype,
        learning_rate=workload.learning_rate,
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-8,
        clip_norm=1.0,
        beta=0.1,
        max_length=length,
        reference=choice.reference,
        threads=choice.threads,
        pad_id=pad_id(model),
        adapter=None if choice.lora is None else str(write_lora(folder / "adapter", model, choice.lora)),
    )
    return spec, facts(model, rows) | ({} if choice.lora is None else {"lora_rank": choice.lora})


def write_lora(folder: Path, model: Path, rank: int) -> Path:
    """A new adapter as PEFT draws one: A uniform, B zero, scaled by 2."""
    from dpo_jax.model.settings import AdapterSettings, ModelSettings
    from dpo_jax.model.weights import Weights
    from dpo_jax.run.adapted import Text, write_adapter
    from dpo_jax.run.policy import Policy
    from dpo_jax.run.sources import Sources

    settings = ModelSettings(path=str(model)), AdapterSettings(rank=rank)
    how = {"compute_dtype": "float32", "param_dtype": "float32", "scalar_head": False}
    policy = Policy.of(Sources(model, model, {}, True), *settings, **how)
    write_adapter(policy, Weights(policy.fresh(0)), folder, Text({}, {}, str(model)))
    return folder


def _check_sources(name: str, workload: Workload, choice: Choice) -> None:
    for option, value in (("--model", choice.model), ("--data", choice.data)):
        if workload.made_here and value is not None:
            raise UserError(f"{name}: {option} {value}: the workload makes its own; leave it out")
        if not workload.made_here and value is None:
            raise UserError(f"{name}: {option} is not given; name the {'folder' if option == '--model' else 'file'}")


def facts(model: Path, rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """What a record says of model and data: their names, a digest of the token ids, and mean lengths in tokens."""
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    means = {part: round(float(np.mean([len(row[f"{part}_ids"]) for row in rows])), 1) for part in PARTS}
    return {"model": model.name, "pairs": len(rows), "pairs_sha256": digest, "mean_tokens": means}


PARTS = ("prompt", "chosen", "rejected")


def read_rows(model: Path, data: str, max_length: int, wanted: int) -> list[dict[str, list[int]]]:
    """The first pairs of a file in its order, as dpo_jax reads, tokenises and truncates them by default."""
    from dpo_jax.hf.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model, None)
    # Rows that cannot be used are left out, so some more are read than are wanted.
    first = wanted + max(64, wanted // 4)
    encoded, _ = collect(data, tokenizer, DataSettings(train=data, max_length=max_length), first=first)
    return [row for _, row in zip(range(wanted), rows_of(encoded), strict=False)]


def rows_of(encoded: Encoded) -> Iterator[dict[str, list[int]]]:
    """Every pair in the form that runners read."""
    for chosen, rejected in zip(encoded.chosen.tolist(), encoded.rejected.tolist(), strict=True):
        yield {
            "prompt_ids": encoded.prompt(chosen).tolist(),
            "chosen_ids": encoded.completion(chosen).tolist(),
            "rejected_ids": encoded.completion(rejected).tolist(),
        }


def pad_id(model: Path) -> int:
    """The model's padding token, or its end token where it has none: attention masks hide it either way."""
    config = json.loads((model / "config.json").read_text("utf-8"))
    known = (config.get("pad_token_id"), config.get("eos_token_id"))
    found = next((token for token in known if token is not None), 0)
    return found[0] if isinstance(found, list) else found


def hh_lengths(count: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens of prompt, chosen and rejected, int [count, 3], spread as hh-rlhf's are in SmolLM2's tokens.

    Log-normal with the medians and means of 2,312 pairs of its harmless part: prompts 98 and 125, chosen 28 and 41,
    rejected 36 and 51.
    """
    medians, means = np.array([98.0, 28.0, 36.0]), np.array([125.1, 40.8, 50.9])
    sigma = np.sqrt(2 * np.log(means / medians))
    return np.maximum(np.exp(np.log(medians) + sigma * rng.standard_normal((count, 3))), 2).astype(int)


def random_rows(count: int, max_length: int, seed: int = 0) -> Iterator[dict[str, list[int]]]:
    """Pairs of random tokens in hh-rlhf's lengths; none is longer than `max_length`."""
    rng = np.random.default_rng(seed)
    for prompt, chosen, rejected in hh_lengths(count, rng).tolist():
        answers = [min(length, max_length // 2) for length in (chosen, rejected)]
        lengths = (min(prompt, max_length - max(answers)), *answers)
        ids = [rng.integers(4, TINY["vocab_size"], length).tolist() for length in lengths]
        yield dict(zip((f"{part}_ids" for part in PARTS), ids, strict=True))


def write_tiny(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder of a random Llama, with a tokenizer whose words are `w4`, `w5`, ..."""
    from safetensors.numpy import save_file

    from dpo_jax.hf.checkpoint import entries_of
    from dpo_jax.hf.configs import read_spec

    write_config(folder, **changes)
    rng = np.random.default_rng(seed)
    tensors = {}
    for entry in entries_of(read_spec(folder), folder):
        norm = len(entry.shape) == 1
        values = np.ones(entry.shape) if norm else 0.02 * rng.standard_normal(entry.shape, np.float32)
        tensors[entry.name] = values.astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, (TINY | changes)["vocab_size"])
    return folder


def write_config(folder: Path, **changes: Any) -> Path:
    """A folder with nothing but the config of `TINY`, changed as told."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(TINY | changes, indent=1) + "\n", "utf-8")
    return folder


def write_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer of so many tokens, whose words are `w4`, `w5`, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {token: number for number, token in enumerate(special)} | {f"w{i}": i for i in range(len(special), size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    table = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(table, indent=1) + "\n", "utf-8")
