"""Small PEFT folders, written with NumPy alone; and the goldens that PEFT itself made, where they are."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from dpo_jax import trees
from dpo_jax.hf.checkpoint import load_hf, scheme_of
from dpo_jax.hf.configs import read_spec
from dpo_jax.hf.factors import Adapter
from dpo_jax.hf.mapping import claim
from dpo_jax.hf.merged import Merged, with_adapter
from dpo_jax.hf.peft import read_adapter
from dpo_jax.hf.tensors import Tensors

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = next(
    (place / "shared/adapters" for place in (ROOT, ROOT.parent, *ROOT.parents) if (place / "shared/adapters").is_dir()),
    None,
)
PREFIX = "base_model.model."
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "the/base",
    "r": 2,
    "lora_alpha": 3,
    "target_modules": ["q_proj"],
    "bias": "none",
    "peft_version": "0.21.2",
}


def case_names() -> list[str]:
    """Names of the golden adapters; none where they are not."""
    return [] if GOLDENS is None else sorted(json.loads((GOLDENS / "adapters/cases.json").read_text()))


def case(name: str) -> tuple[Path, Path]:
    """A golden adapter's folder, and its base's."""
    assert GOLDENS is not None
    folder = GOLDENS / "adapters" / name
    return folder, GOLDENS.parent / json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


def halves(module: str, outputs: int, inputs: int, rank: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Random factors of a module, by PEFT's names."""
    rng = np.random.default_rng([seed, *module.encode()])
    return {
        f"{PREFIX}{module}.lora_A.weight": rng.standard_normal((rank, inputs), np.float32),
        f"{PREFIX}{module}.lora_B.weight": rng.standard_normal((outputs, rank), np.float32),
    }


def write_peft(folder: Path, tensors: Mapping[str, np.ndarray], **config) -> Path:
    """A PEFT folder; a change to ... leaves a key out."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {key: value for key, value in {**CONFIG, **config}.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(table))
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def read(folder: Path, base: Path) -> Adapter:
    """The adapter of a folder for a base's."""
    spec = read_spec(base)
    return read_adapter(folder, spec, scheme_of(spec, base), Tensors(base))


def view(folder: Path, base: Path, dtype="keep") -> Merged:
    """Base and adapter as one."""
    spec, source = read_spec(base), Tensors(base)
    scheme = scheme_of(spec, base)
    return with_adapter(folder, source, spec, scheme, claim(spec, source.infos, str(base), scheme), dtype)


def leaves(base: Path, adapter: Path | None = None, **options) -> dict[str, np.ndarray]:
    """Leaves of the loaded model by path."""
    table = trees.paths(load_hf(base, adapter=adapter, **options).params)
    return {path: np.array(leaf) for path, leaf in table.items()}
