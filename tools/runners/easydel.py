"""DPO by EasyDeL 0.3.0, for tools/bench.py; see protocol.py for what goes in and out.

    python3.11 -m venv ENV && ENV/bin/pip install easydel==0.3.0 pillow torch==2.13.0
    ENV/bin/python tools/runners/easydel.py SPEC.json

Its import needs Pillow and torch, which it does not ask for. `DPOTrainer.train` on columns of tokens, which it leaves
untokenised. The weights are copied into its parameters, not read by its importer: that rounds them to half precision
and takes theta 10,000 from a config.json in the style of transformers 5. Its way of working is kept: chosen and
rejected in one forward pass, prompts padded on the left and answers on the right (here to the longest of the run,
rounded up to 32), the reference in the step, full logits. Set for speed: no rematerialisation, no norms of gradients in
the log, no checkpoints, `vanilla` attention.

Attention is given the spec's dtype: left to itself it is bfloat16 whatever the model's dtype is, and float32 losses
then differ by 1e-4 to 4e-4. With it they agree to 2e-5.

Refused here: a precomputed reference (it runs unjitted and fails outside a mesh), scaled rotations, biases.
"""

# the package is in an environment of its own
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from padded import longest, plain_llama
from protocol import Events, Spec, spec_of_command_line

PACKAGES = ("easydel", "eformer", "ejkernel", "jax", "jaxlib", "flax", "optax", "numpy")
NEVER = 10**9
SHAPE = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads rms_norm_eps "
    "max_position_embeddings tie_word_embeddings"
).split()


def config_arguments(folder: str) -> dict[str, Any]:
    """Arguments of EasyDeL's `LlamaConfig` from a folder's config.json of either style."""
    config, theta = plain_llama(folder)
    heads = config["num_attention_heads"]
    return {
        **{key: config[key] for key in SHAPE if key in config},
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "rope_theta": theta,
    }


def tensors(folder: str, tied: bool) -> dict[str, Any]:
    """The folder's weights in float32, by the names and in the layouts of EasyDeL's parameters."""
    from safetensors.torch import load_file

    found = {}
    for path in Path(folder).glob("*.safetensors"):
        found |= {name: tensor.float().numpy() for name, tensor in load_file(path).items()}
    if tied:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    result = {}
    for name, array in found.items():
        kind = "embedding" if "embed_tokens" in name else "kernel"
        array = array.T if kind == "kernel" and array.ndim == 2 else array
        result[re.sub("weight$", kind, name)] = array
    return result


def model(spec: Spec) -> Any:
    """EasyDeL's model of the folder, float32 weights.

    Raises:
      ValueError: the folder's tensors are not those of the model.
    """
    import easydel
    import jax
    import jax.numpy as jnp
    from flax import nnx

    arguments = config_arguments(spec.model)
    config = easydel.LlamaConfig(
        **arguments, attn_mechanism="vanilla", attn_dtype=jnp.dtype(spec.dtype), sharding_axis_dims=(1, -1, 1, 1, 1)
    )
    result = easydel.LlamaForCausalLM(config, dtype=jnp.dtype(spec.dtype), param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    weights = tensors(spec.model, arguments.get("tie_word_embeddings", False))
    state = nnx.state(result, nnx.Param)
    flat, tree = jax.tree_util.tree_flatten_with_path(state.to_pure_dict())
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in flat]
    shapes = {name: leaf.shape for name, (_, leaf) in zip(names, flat, strict=True)}
    if shapes != {name: array.shape for name, array in weights.items()}:
        raise ValueError(f"{spec.model}: tensors differ from EasyDeL's: {sorted(set(shapes) ^ set(weights))}")
    leaves = [
        jax.device_put(jnp.asarray(weights[name]), leaf.sharding) for name, (_, leaf) in zip(names, flat, strict=True)
    ]
    nnx.replace_by_pure_dict(state, jax.tree.unflatten(tree, leaves))
    nnx.update(result, state)
    return result


def columns(spec: Spec) -> Any:
    """The pairs as a dataset of tokens and masks, in the order of the file."""
    from datasets import Dataset

    rows = []
    for row in spec.rows():
        parts = {"prompt": row["prompt_ids"], "chosen": row["chosen_ids"], "rejected": row["rejected_ids"]}
        ids = {f"{name}_input_ids": part for name, part in parts.items()}
        rows.append(ids | {f"{name}_attention_mask": [1] * len(part) for name, part in parts.items()})
    return Dataset.from_list(rows)


def tokenizer(spec: Spec) -> Any:
    """A tokenizer of one word. Nothing is tokenised by it; the trainer wants one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    table = Tokenizer(models.WordLevel({"w": 0}, unk_token="w"))
    return PreTrainedTokenizerFast(tokenizer_object=table, unk_token="w", pad_token="w", eos_token="w")


def settings(spec: Spec, scratch: str) -> Any:
    """EasyDeL's DPOConfig that means the spec."""
    import easydel

    prompt, answer = longest(spec)
    return easydel.DPOConfig(
        save_directory=scratch,
        total_batch_size=spec.pairs_per_step,
        max_training_steps=spec.steps,
        num_train_epochs=1,
        beta=spec.beta,
        loss_type="sigmoid",
        learning_rate=spec.learning_rate,
        weight_decay=0.0,
        clip_grad=spec.clip_norm,
        extra_optimizer_kwargs={"b1": spec.beta1, "b2": spec.beta2, "eps": spec.epsilon},
        max_prompt_length=prompt,
        max_completion_length=answer,
        max_length=prompt + answer,
        padding_value=spec.pad_id,
        shuffle_train_dataset=False,
        log_grad_norms=False,
        use_wandb=False,
        report_steps=1,
        log_steps=1,
        progress_bar_type="json",
        save_steps=NEVER,
        do_last_save=False,
        generation_interval=None,
    )


def main() -> None:
    """Load, train, report."""
    events, spec = Events(), spec_of_command_line()
    if spec.reference != "default":
        sys.exit(f"reference={spec.reference}: EasyDeL precomputes it unjitted, inside a mesh only; use default")
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    import easydel

    class Trainer(easydel.DPOTrainer):
        """EasyDeL's trainer, reported: its loop waits for each step."""

        def on_step_start(self, state: Any, step: int) -> Any:
            if step == 0:
                events.ready()
            return super().on_step_start(state=state, step=step)

        def on_step_end(self, state: Any, metrics: Any, step: int) -> Any:
            events.step(step - 1, float(metrics.loss), spec.pairs_per_step)
            return super().on_step_end(state=state, metrics=metrics, step=step)

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            arguments=settings(spec, scratch),
            model=model(spec),
            processing_class=tokenizer(spec),
            train_dataset=columns(spec),
        )
        trainer.train()
    events.done(PACKAGES)


if __name__ == "__main__":
    main()
