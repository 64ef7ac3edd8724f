"""How much host memory an import and an export take beyond the model itself: `python tools/export_memory.py`.

A Llama of random numbers is written in many files, then loaded and exported by a process of its own. On a CPU the
model's arrays are host memory too, so what counts is what comes on top of them: at most two files. Exit code 1 if not.
Needs Linux, whose kernel keeps the peak.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

WIDTH, MLP_WIDTH, VOCABULARY, HEADS = 512, 2048, 8192, 8
BYTES = {"float32": 4, "bfloat16": 2}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peaks(NamedTuple):
    """Bytes of a model in memory, of its largest file, and of what loading and saving took beyond the model."""

    model: int
    shard: int
    load: int
    save: int

    @property
    def ok(self) -> bool:
        """Whether both stayed below two files."""
        return max(self.load, self.save) <= 2 * self.shard


def write_model(folder: Path, shards: int, dtype: str) -> None:
    """A Llama of 8.4 M weights a file: two layers, or one and the embedding (the first) or the head (the last)."""
    layers = 2 * shards - 2
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": dtype, "hidden_size": WIDTH,
        "intermediate_size": MLP_WIDTH, "vocab_size": VOCABULARY, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    ends = [{"model.embed_tokens.weight": (VOCABULARY, WIDTH)}, {"lm_head.weight": (VOCABULARY, WIDTH)}]
    parts = [ends[0], *map(_layer, range(layers)), ends[1] | {"model.norm.weight": (WIDTH,)}]
    shapes = [parts[i] | parts[i + 1] for i in range(0, len(parts), 2)]
    weight_map, rng = {}, np.random.default_rng(0)
    for i, part in enumerate(shapes):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
        arrays = {name: rng.standard_normal(shape, np.float32).astype(kind) for name, shape in part.items()}
        save_file(arrays, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _layer(i: int) -> dict[str, tuple[int, ...]]:
    square, norms = ("q_proj", "k_proj", "v_proj", "o_proj"), ("input_layernorm", "post_attention_layernorm")
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{name}": (WIDTH, WIDTH) for name in square}
    shapes |= {f"mlp.{name}": (MLP_WIDTH, WIDTH) for name in ("gate_proj", "up_proj")}
    shapes |= {"mlp.down_proj": (WIDTH, MLP_WIDTH), **{name: (WIDTH,) for name in norms}}
    return {f"model.layers.{i}.{name}.weight": shape for name, shape in shapes.items()}


def status(name: str) -> int:
    """A line of this process's status, in bytes: `VmRSS`, `VmHWM` (its peak) or `RssAnon` (without mapped files)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def watched(act: Callable[[], Any]) -> tuple[Any, int]:
    """What `act` gives, and the most that `RssAnon` grew meanwhile, looked at every millisecond.

    Files that are mapped while they are read are left out: their pages are the kernel's to drop.
    """
    done, before, most = threading.Event(), status("RssAnon"), 0

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, status("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        value = act()
    finally:
        done.set()
        thread.join()
    return value, max(most, status("RssAnon")) - before


def measure(source: Path, target: Path) -> Peaks:
    """Loads and saves twice, so that everything is compiled when it is measured."""
    import jax

    from dpo_jax.hf.checkpoint import load_hf, save_hf

    save_hf(load_hf(source), target / "first", source)
    model, grown = watched(lambda: jax.block_until_ready(load_hf(source)))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    before = status("VmRSS")
    CLEAR.write_text("5")  # the peak starts again from what there is
    save_hf(model, target / "second", source)
    shard = max(path.stat().st_size for path in source.glob("*.safetensors"))
    return Peaks(model=size, shard=shard, load=grown - size, save=status("VmHWM") - before)


def in_a_process_of_its_own(shards: int, dtype: str) -> Peaks:
    """The peaks, measured where nothing else has used memory before.

    Raises:
      subprocess.CalledProcessError: the process failed.
    """
    with tempfile.TemporaryDirectory(prefix="dpo_jax-memory-") as scratch:
        source = Path(scratch) / "source"
        source.mkdir()
        write_model(source, shards, dtype)
        argv = [sys.executable, "-m", "tools.export_memory", "--measure", str(source), scratch]
        # Arrays go back to the kernel when they are freed, or the next ones would hide in what was kept.
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "JAX_PLATFORMS": "cpu"}
        root = Path(__file__).resolve().parents[1]
        done = subprocess.run(argv, cwd=root, env=env, stdout=subprocess.PIPE, text=True, check=True)
        return Peaks(**json.loads(done.stdout))


def main() -> int:
    """Print the peaks."""
    parser = argparse.ArgumentParser(description="Host memory of an import and an export beyond the model.")
    parser.add_argument("--shards", type=int, default=12, help="files of the model, 8.4 million weights each")
    parser.add_argument("--dtype", choices=BYTES, default="bfloat16", help="of the files; in memory all is float32")
    parser.add_argument("--measure", nargs=2, type=Path, metavar=("SOURCE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)._asdict()))
        return 0
    peaks = in_a_process_of_its_own(options.shards, options.dtype)
    print(f"model in memory {peaks.model / 1e6:.1f} MB, {options.shards} files of {peaks.shard / 1e6:.1f} MB")
    for name in ("load", "save"):
        size = getattr(peaks, name)
        print(f"{name}: {size / 1e6:.1f} MB beyond the model, {size / peaks.shard:.2f} files")
    print("at most two files" if peaks.ok else "MORE than two files")
    return 0 if peaks.ok else 1


if __name__ == "__main__":
    sys.exit(main())
