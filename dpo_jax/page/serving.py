"""How what a run leaves is used: commands for the folder that it exports."""

import shlex
from typing import NamedTuple

from dpo_jax.errors import public
from dpo_jax.page.folder import EXPORTS, RunFolder


class Use(NamedTuple):
    """A way to use a folder, and the text of it."""

    title: str
    text: str


def uses(run: RunFolder) -> list[Use]:
    """Ways to use what the run exported, or will export."""
    settings = run.settings
    output = public(str(settings.get("output") or run.name))
    base = public(str(settings.get("model", {}).get("path") or "BASE"))
    there = {kind: f"{output}/{name}" for kind, name in EXPORTS.items() if (run.path / name).is_dir()}
    reward = settings.get("objective", {}).get("name") == "reward"
    found: list[Use] = []
    if "merged" in there:
        found += _whole(there["merged"], base, reward=reward)
    if "adapter" in there:
        found += _adapter(there["adapter"], base, reward=reward)
    return found


def _whole(folder: str, base: str, *, reward: bool) -> list[Use]:
    named, kind = _python(folder), "AutoModelForSequenceClassification" if reward else "AutoModelForCausalLM"
    loads = Use(
        "transformers",
        f"from transformers import {kind}, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({named})\nmodel = {kind}.from_pretrained({named})",
    )
    if reward:
        return [loads]
    asks = f"python -m dpo_jax.sample {shlex.quote(folder)} --against {shlex.quote(base)} --prompt 'Hello'"
    return [Use("here", asks), Use("vLLM", f"vllm serve {shlex.quote(folder)}"), loads]


def _adapter(folder: str, base: str, *, reward: bool) -> list[Use]:
    kind = "AutoModelForSequenceClassification" if reward else "AutoModelForCausalLM"
    loads = (
        f"from peft import PeftModel\nfrom transformers import {kind}, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({_python(folder)})\n"
        f"model = {kind}.from_pretrained({_python(base)})\n"
        f"model = PeftModel.from_pretrained(model, {_python(folder)})"
    )
    served = f"vllm serve {shlex.quote(base)} --enable-lora --lora-modules tuned={shlex.quote(folder)}"
    merges = f"python -m dpo_jax.convert merge {shlex.quote(base)} {shlex.quote(folder)} MERGED"
    found = [Use("PEFT", loads), Use("merged into one folder", merges)]
    return found if reward else [Use("vLLM", served), *found]


def _python(text: str) -> str:
    return repr(text)
