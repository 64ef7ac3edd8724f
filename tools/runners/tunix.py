"""DPO by Tunix, google-tunix 0.1.7, for tools/bench.py; see protocol.py for what goes in and out.

    python3.12 -m venv ENV && ENV/bin/pip install google-tunix==0.1.7 jax
    ENV/bin/python tools/runners/tunix.py SPEC.json

`DPOTrainer.train` on batches of `TrainingInput`, weights by Tunix's own safetensors reader. Its way of working is kept:
a reference model that is run before each step, prompts padded on the left and answers on the right (here to the longest
of the run, rounded up to 32), dense attention, full logits, no rematerialisation.

One repair, which costs no time: its Llama rotates with theta 1,000,000 whatever its ModelConfig says. The runner binds
the theta of config.json, so that its losses can be compared with others.

The time of a step is that between completions, as its loop reports them one step late. Not offered by Tunix and refused
here: bfloat16 over float32 weights (its Llama computes in the dtype of its weights), a precomputed reference, scaled
rotations, biases.
"""

# the package is in an environment of its own
# pyright: reportMissingImports=false

import functools
import sys
from typing import Any

from padded import longest, padded, plain_llama
from protocol import Events, Spec, spec_of_command_line

PACKAGES = ("google-tunix", "jax", "jaxlib", "flax", "optax", "numpy")
NEVER = 10**9


def refuse_unsupported(spec: Spec) -> None:
    """Stop at a spec that Tunix cannot run as it is meant."""
    if spec.dtype != "float32":
        sys.exit(f"dtype={spec.dtype}: Tunix's Llama computes in the dtype of its weights; use float32")
    if spec.reference != "default":
        sys.exit(f"reference={spec.reference}: Tunix runs the reference in each step; use default")


def shape(folder: str) -> tuple[dict[str, Any], float]:
    """Keyword arguments of Tunix's Llama `ModelConfig` from a folder's config.json, and the theta of its rotation."""
    config, theta = plain_llama(folder)
    heads = config["num_attention_heads"]
    arguments = {
        "num_layers": config["num_hidden_layers"],
        "vocab_size": config["vocab_size"],
        "embed_dim": config["hidden_size"],
        "hidden_dim": config["intermediate_size"],
        "num_heads": heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "num_kv_heads": config.get("num_key_value_heads", heads),
        "norm_eps": config["rms_norm_eps"],
        "weight_tying": config.get("tie_word_embeddings", False),
    }
    return arguments, theta


def batches(spec: Spec) -> list[Any]:
    """The `TrainingInput` of each step."""
    from tunix.sft.dpo import dpo_trainer

    prompt, answer = longest(spec)
    result = []
    for rows in spec.batches():
        prompts = padded((row["prompt_ids"] for row in rows), prompt, spec.pad_id, left=True)
        chosen = padded((row["chosen_ids"] for row in rows), answer, spec.pad_id)
        rejected = padded((row["rejected_ids"] for row in rows), answer, spec.pad_id)
        result.append(
            dpo_trainer.TrainingInput(
                prompt_ids=prompts[0],
                prompt_mask=prompts[1],
                chosen_ids=chosen[0],
                chosen_mask=chosen[1],
                rejected_ids=rejected[0],
                rejected_mask=rejected[1],
            )
        )
    return result


def models(folder: str) -> tuple[Any, Any]:
    """The policy and its reference, two float32 models of the same folder, with the folder's theta."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from tunix.models.llama3 import model as llama
    from tunix.models.llama3.params import create_model_from_safe_tensors

    arguments, theta = shape(folder)
    llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=theta)
    config = llama.ModelConfig(**arguments, rope_theta=theta)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(-1, 1), ("fsdp", "tp"))
    policy, reference = (create_model_from_safe_tensors(folder, config, mesh, jnp.float32) for _ in range(2))
    return policy, reference


def main() -> None:
    """Load, train, report."""
    events, spec = Events(), spec_of_command_line()
    refuse_unsupported(spec)
    import optax
    from tunix.sft.dpo import dpo_trainer
    from tunix.sft.hooks import TrainingHooks

    class Report(TrainingHooks):
        """Says of each step that it is complete; Tunix calls it with steps from 1."""

        def on_train_step_end(self, train_ctx, train_step, train_loss):
            events.step(train_step - 1, train_loss, spec.pairs_per_step)

        def _nothing(self, *arguments):
            pass

        on_train_start = on_train_end = on_train_step_start = on_eval_step_start = on_eval_step_end = _nothing

    policy, reference = models(spec.model)
    adamw = optax.adamw(spec.learning_rate, b1=spec.beta1, b2=spec.beta2, eps=spec.epsilon, weight_decay=0.0)
    clip = optax.identity() if spec.clip_norm is None else optax.clip_by_global_norm(spec.clip_norm)
    config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=NEVER, max_steps=spec.steps, beta=spec.beta)
    trainer = dpo_trainer.DPOTrainer(policy, reference, optax.chain(clip, adamw), config)
    trainer.with_training_hooks(Report())
    data = batches(spec)
    events.ready()
    trainer.train(data)
    events.done(PACKAGES)


if __name__ == "__main__":
    main()
