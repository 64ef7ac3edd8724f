"""TRL's DPOTrainer under the stopwatch: `PYTHON tools/runners/trl.py SPEC.json`, as protocol.py says.

Needs trl==1.16.0, torch and datasets, and peft where the spec has an adapter. The trainer is TRL's own, with what suits
a timing: no gradient checkpointing, no reports, fused AdamW, autocast for bfloat16 with float32 weights, and a
reference that is computed ahead if the spec says so. TRL tokenises texts only, so `_prepare_dataset`, which does that,
hands back the tokens it is given.
"""

# protocol comes first: it takes this folder off the path, where this file would stand before the package
from protocol import Events, Spec, cpu_seconds, spec_of_command_line  # isort: split

import os
import tempfile
import time
from typing import Any

PACKAGES = ("trl", "torch", "transformers", "accelerate", "datasets", "numpy")


def settings(spec: Spec, scratch: str, *, on_cpu: bool) -> dict[str, Any]:
    """The arguments of DPOConfig that mean the spec."""
    return {
        "output_dir": scratch,
        "loss_type": "sigmoid",
        "beta": spec.beta,
        "max_length": spec.max_length,
        "precompute_ref_log_probs": spec.reference == "precomputed",
        "per_device_train_batch_size": spec.pairs_per_step,
        "gradient_accumulation_steps": 1,
        "max_steps": spec.steps,
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch_fused",
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_beta1": spec.beta1,
        "adam_beta2": spec.beta2,
        "adam_epsilon": spec.epsilon,
        "max_grad_norm": spec.clip_norm or 0.0,  # 0 is how transformers is told not to clip
        "disable_dropout": True,
        "gradient_checkpointing": False,
        "bf16": spec.dtype == "bfloat16",
        "use_cpu": on_cpu,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_pin_memory": not on_cpu,
        "disable_tqdm": True,
    }


def run(spec: Spec, events: Events, scratch: str) -> None:
    """Train, telling the stopwatch."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "HF_DATASETS_CACHE": scratch}
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportAttributeAccessIssue]

    torch.set_num_threads(spec.threads)
    on_cpu = not torch.cuda.is_available()

    class Given(DPOTrainer):
        """TRL's trainer for data that is tokenised already; says how long the reference took."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *rest: Any, **named: Any) -> Any:
            wall, cpu = time.perf_counter(), cpu_seconds()
            found = super()._precompute_ref_logps(dataset, *rest, **named)
            events.reference(time.perf_counter() - wall, cpu_seconds() - cpu, len(dataset))
            return found

    class Timed(TrainerCallback):
        """Reports each step when TRL logs it, which is after its loss was fetched from the device."""

        def on_train_begin(self, args, state, control, **_):
            events.ready()

        def on_log(self, args, state, control, logs=None, **_):
            if logs and "loss" in logs:
                events.step(state.global_step - 1, logs["loss"], spec.pairs_per_step)

    adapter: dict[str, Any] = {}
    if spec.adapter is not None:
        from peft import PeftConfig

        adapter = {"peft_config": PeftConfig.from_pretrained(spec.adapter)}
        adapter["peft_config"].inference_mode = False  # as an argument it would lose to what the folder says
    trainer = Given(
        model=AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32),
        args=DPOConfig(**settings(spec, scratch, on_cpu=on_cpu)),
        processing_class=AutoTokenizer.from_pretrained(spec.model),
        train_dataset=Dataset.from_list(spec.rows()),
        callbacks=[Timed()],
        **adapter,
    )
    if spec.adapter is not None:  # TRL draws an adapter of its own, and this is the one that all begin with
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(trainer.model, load_peft_weights(spec.adapter, device="cpu"))
    trainer.train()
    events.done(PACKAGES, None if on_cpu else torch.cuda.max_memory_allocated())


def main() -> None:
    """Run the spec of the command line."""
    events, spec = Events(), spec_of_command_line()
    with tempfile.TemporaryDirectory() as scratch:
        run(spec, events, scratch)


if __name__ == "__main__":
    main()
