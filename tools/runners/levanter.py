"""DPO by Levanter, marin-levanter 0.2.227.dev40316220070, for tools/bench.py; see protocol.py for what goes in and out.

    python3.12 -m venv ENV && ENV/bin/pip install --pre marin-levanter==0.2.227.dev40316220070
    ENV/bin/python tools/runners/levanter.py SPEC.json

`levanter.main.train_dpo.main`, weights by its own reader of Hugging Face folders. The pairs are written to its cache of
tokenised pairs, as its tokenising phase would leave them; the tokenizer beside it is there because Levanter wants one,
and its size is the model's vocabulary. Its way of working is kept: one row for each answer, padded to one length (here
that of the longest of the run, rounded up to 32), chosen and rejected in forward passes of their own, the reference in
the step, layers by scan, a cross entropy in blocks. Set for speed: no rematerialisation, no norms of each parameter
every ten steps, no tracker. Attention is `VANILLA`; `JAX_FLASH`
gave the same losses in the same time at 960 tokens.

Not offered by Levanter and refused here: a reference precomputed for training data.
"""

# the package is in an environment of its own
# pyright: reportMissingImports=false

import contextlib
import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from padded import longest_sequence
from protocol import Events, Spec, spec_of_command_line

PACKAGES = ("marin-levanter", "marin-haliax", "jax", "jaxlib", "equinox", "optax", "numpy")
POLICIES = {"float32": "f32", "bfloat16": "p=f32,c=bfloat16"}


class Finished(Exception):
    """The last step is done; leaves out the checkpoint that Levanter writes at the end."""


def write_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer of `size` words. Nothing is tokenised by it; Levanter takes the vocabulary's size from it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    table = Tokenizer(models.WordLevel({f"w{index}": index for index in range(size)}, unk_token="w0"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=table, unk_token="w0", pad_token="w0", eos_token="w1")
    # its reader of preference pairs refuses a template without a generation block
    tokenizer.chat_template = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    tokenizer.save_pretrained(folder)


def cached_row(row: dict[str, list[int]]) -> dict[str, Any]:
    """A pair as Levanter's tokenising leaves it: whole sequences and masks that are 1 at the answer's tokens."""
    import numpy as np

    result = {}
    for name in ("chosen", "rejected"):
        prompt, answer = row["prompt_ids"], row[f"{name}_ids"]
        result[f"{name}_input_ids"] = np.array(prompt + answer, np.int32)
        result[f"{name}_assistant_masks"] = np.array([0] * len(prompt) + [1] * len(answer), np.int32)
    return result


def write_cache(spec: Spec, folder: Path, config: Any) -> None:
    """The tokenised pairs of the run, in the folder where `config` (a data config) looks for them."""
    from levanter.store.cache import CacheMetadata, SerialCacheWriter

    component = config.components["pairs"]
    processor = component.format.build_preprocessor(config.the_tokenizer)
    metadata = CacheMetadata(preprocessor_metadata=processor.metadata)
    with SerialCacheWriter(str(folder), processor.output_exemplar, metadata=metadata) as writer:
        writer.write_batch([cached_row(row) for row in spec.rows()])


def training_config(spec: Spec, scratch: Path) -> Any:
    """Levanter's config of the run; writes the tokenizer and the cache of pairs into `scratch`."""
    import jmp
    from levanter.callbacks.watch import WatchConfig
    from levanter.checkpoint import CheckpointerConfig
    from levanter.data.text.datasets import DatasetComponent
    from levanter.data.text.preference import PreferenceChatLmDatasetFormat, PreferenceLmDataConfig
    from levanter.layers.attention import AttentionBackend
    from levanter.main import train_dpo
    from levanter.models.llama import LlamaConfig
    from levanter.optim.config import AdamConfig
    from levanter.tracker.tracker import NoopConfig
    from levanter.trainer import TrainerConfig
    from transformers import LlamaConfig as HfLlamaConfig

    hf = HfLlamaConfig.from_pretrained(spec.model)
    tokenizer, pairs = scratch / "tokenizer", scratch / "pairs"
    write_tokenizer(tokenizer, hf.vocab_size)
    model = LlamaConfig.from_hf_config(hf)
    model = dataclasses.replace(
        model,
        gradient_checkpointing=False,
        attn_backend=AttentionBackend.VANILLA,
        reference_checkpoint=spec.model,
        tokenizer=str(tokenizer),
    )
    component = DatasetComponent(
        source=None, cache_dir=str(pairs), flat_cache=True, format=PreferenceChatLmDatasetFormat()
    )
    # blocks of one: within a block its mixture permutes, even a mixture of one dataset with shuffle=False
    data = PreferenceLmDataConfig(
        tokenizer=str(tokenizer), shuffle=False, mixture_block_size=1, components={"pairs": component}
    )
    write_cache(spec, pairs, data)
    optimizer = AdamConfig(
        learning_rate=spec.learning_rate,
        beta1=spec.beta1,
        beta2=spec.beta2,
        epsilon=spec.epsilon,
        max_grad_norm=spec.clip_norm,
        weight_decay=0.0,
        warmup=0.0,
        lr_schedule="constant",
    )
    trainer = TrainerConfig(
        mp=jmp.get_policy(POLICIES[spec.dtype]),
        train_batch_size=spec.pairs_per_step,
        num_train_steps=spec.steps,
        tracker=NoopConfig(),
        watch=WatchConfig(watch_targets=[]),
        log_dir=scratch / "logs",
        log_jaxprs=False,
        log_xla_hlo=False,
        require_accelerator=False,
        checkpointer=CheckpointerConfig(base_path=str(scratch / "checkpoints"), save_interval=None, keep=None),
    )
    return train_dpo.TrainDpoConfig(
        data=data,
        trainer=trainer,
        model=model,
        optimizer=optimizer,
        train_seq_len=longest_sequence(spec),
        reference=train_dpo.SeparateReferenceConfig(model_path=spec.model, is_hf=True),
        beta=spec.beta,
        initialize_from_hf=spec.model,
        validation_split_fraction=None,
        hf_save_path=None,
    )


def main() -> None:
    """Load, train, report."""
    events, spec = Events(), spec_of_command_line()
    if spec.reference != "default":
        sys.exit(f"reference={spec.reference}: Levanter runs the reference in each step of training; use default")
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    import jax
    from levanter.main import train_dpo
    from levanter.trainer import Trainer

    train_step = Trainer.train_step

    def timed(self: Any, state: Any, *batch: Any, **more: Any) -> Any:
        """Levanter's step, reported: it waits for the loss by itself, and this for the weights."""
        step = int(state.step)
        if step == 0:
            events.ready()
        info = train_step(self, state, *batch, **more)
        jax.block_until_ready(jax.tree.leaves(info.state.trainable_model))
        events.step(step, info.loss, spec.pairs_per_step)
        if step + 1 == spec.steps:
            raise Finished
        return info

    Trainer.train_step = timed
    with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(Finished):
        train_dpo.main(training_config(spec, Path(scratch)))
    events.done(PACKAGES)


if __name__ == "__main__":
    main()
