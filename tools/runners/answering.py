"""One program writes answers under the stopwatch: `PYTHON tools/runners/answering.py PROGRAM SPEC.json`.

PROGRAM is dpo_jax or transformers. Both are given the same prompts as token ids, take the most probable token each time
and stop at none, so both write the same number of tokens. Prints one JSON object: what each call took, after a first
one that compiles (`first`), in wall and CPU seconds, and the tokens.
"""

from protocol import Spec, bind, cpu_seconds  # isort: split

import json
import sys
import time
from collections.abc import Callable
from typing import Any

assert Spec  # of the same folder; importing it takes this folder off the path


def dpo_jax(spec: dict[str, Any]) -> Callable[[], list[list[int]]]:
    """Ours."""
    import jax.numpy as jnp

    from dpo_jax.evaluation.generate import Decoding, generate
    from dpo_jax.hf.checkpoint import load_hf

    model = load_hf(spec["model"], dtype=jnp.dtype(spec["dtype"]))
    decoding, prompts = Decoding(spec["tokens"]), spec["prompts"]
    return lambda: [
        answer.tokens for answer in generate(model.spec, model.params, prompts, decoding, batch_size=len(prompts))
    ]


def transformers(spec: dict[str, Any]) -> Callable[[], list[list[int]]]:
    """Theirs."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(spec["threads"])
    model: Any = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"])).eval()
    prompts = torch.tensor(spec["prompts"])
    new = {"max_new_tokens": spec["tokens"], "min_new_tokens": spec["tokens"], "eos_token_id": None, "pad_token_id": 0}

    def call() -> list[list[int]]:
        with torch.inference_mode():
            whole = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, **new)
        return whole[:, prompts.shape[1] :].tolist()

    return call


PROGRAMS = {"dpo_jax": dpo_jax, "transformers": transformers}


def main() -> None:
    """Load, answer once to be warm, then as often as is asked."""
    program, path = sys.argv[1:]
    with open(path, encoding="utf-8") as file:
        spec = json.load(file)
    bind(spec["threads"])
    call, calls, tokens = PROGRAMS[program](spec), [], []
    for _ in range(spec["repeats"] + 1):
        wall, cpu = time.perf_counter(), cpu_seconds()
        tokens = call()
        calls.append({"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu})
    print(json.dumps({"first": calls[0], "calls": calls[1:], "tokens": tokens}))


if __name__ == "__main__":
    main()
