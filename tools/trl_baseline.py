"""Runs TRL's DPO on a few batches and writes down every number, to compare dpo_jax with.

python tools/trl_baseline.py --write-rows ROWS.jsonl --first 64 DATA.jsonl
python tools/trl_baseline.py MODEL DATA.jsonl OUT.json --steps 8 --pairs 8 --max-length 1024 --learning-rate 1e-6

The first form needs nothing but Python: it splits Anthropic hh-rlhf pairs into explicit prompt, chosen and rejected,
so that both programs read the same file. The second needs an environment with TRL (trl==1.16.0, transformers==5.23.0,
datasets, torch) and a model folder with its tokenizer. It trains in float32 on the CPU, rows in file order, constant
learning rate, with a reference loaded from the same folder; nothing is saved but OUT.json.
"""

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

MARKER = "\n\nAssistant:"
PACKAGES = ("trl", "transformers", "torch", "datasets", "accelerate", "tokenizers")


def explicit(row: dict[str, str]) -> dict[str, str]:
    """A row with prompt, chosen and rejected; a row that has a prompt already is returned as it is.

    An hh-rlhf text is split after its last assistant marker. Prompts that differ within a pair are an error.

        chosen   = "...Human: hi\\n\\nAssistant: Hello."
        prompt   = "...Human: hi\\n\\nAssistant:"         chosen = " Hello."
    """
    if "prompt" in row:
        return {key: row[key] for key in ("prompt", "chosen", "rejected")}
    ends = {key: row[key].rfind(MARKER) + len(MARKER) for key in ("chosen", "rejected")}
    prompts = {key: row[key][:end] for key, end in ends.items()}
    if any(MARKER not in text for text in prompts.values()):
        raise ValueError(f"no {MARKER!r} in chosen or rejected")
    if prompts["chosen"] != prompts["rejected"]:
        raise ValueError("the prompts of chosen and rejected differ")
    return {"prompt": prompts["chosen"], **{key: row[key][end:] for key, end in ends.items()}}


def read_rows(path: Path, first: int | None) -> tuple[list[dict[str, str]], list[str]]:
    """The explicit rows of the first `first` lines of a JSONL file (None: all), and what is wrong with the others."""
    rows, problems = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip() or (first is not None and number > first):
            continue
        try:
            rows.append(explicit(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{path}:{number}: left out: {error!r}")
    return rows, problems


def write_rows(data: Path, out: Path, first: int | None) -> None:
    """Writes the explicit rows of `data` to `out`; every line left out is reported on stderr."""
    rows, problems = read_rows(data, first)
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    print(f"wrote {len(rows)} rows to {out}; left out {len(problems)}")


def settings(arguments: argparse.Namespace, scratch: str) -> dict[str, Any]:
    """The arguments of DPOConfig, complete for a run that another program can repeat."""
    return {
        "output_dir": scratch,
        "loss_type": "sigmoid",
        "beta": 0.1,
        "label_smoothing": 0.0,
        "max_length": arguments.max_length,
        "truncation_mode": "keep_start",
        "per_device_train_batch_size": arguments.pairs,
        "gradient_accumulation_steps": 1,
        "max_steps": arguments.steps,
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch",
        "learning_rate": arguments.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "disable_dropout": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "seed": 0,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }


def stopwatch() -> Any:
    """A Trainer callback whose `seconds` holds the wall time of every optimizer step."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        """Times the span from the start of a step, after its batch was collated, to the end of its update."""

        def __init__(self):
            self.seconds: list[float] = []
            self._started = 0.0

        def on_step_begin(self, args, state, control, **kwargs):
            self._started = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            self.seconds.append(time.perf_counter() - self._started)

    return Stopwatch()


def tokenization(trainer: Any, tokenizer: Any) -> dict[str, Any]:
    """What TRL made of the rows: token counts before truncation, and the first pair in full."""
    rows, parts = trainer.train_dataset, ("prompt_ids", "chosen_ids", "rejected_ids")
    return {
        "eos_token": tokenizer.eos_token,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rows_after_dropping": len(rows),
        "lengths": {part: [len(ids) for ids in rows[part]] for part in parts},
        "first_pair": {part: list(rows[0][part]) for part in parts},
    }


def train(arguments: argparse.Namespace, rows: list[dict[str, str]]) -> dict[str, Any]:
    """Trains with TRL and returns the whole record."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    policy, reference = (AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32) for _ in range(2))
    with tempfile.TemporaryDirectory() as scratch:
        given, timer = settings(arguments, scratch), stopwatch()
        trainer = DPOTrainer(
            model=policy,
            ref_model=reference,
            args=DPOConfig(**given),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
            callbacks=[timer],
        )
        trainer.train()
    history = trainer.state.log_history
    steps = [entry for entry in history if "loss" in entry]
    return {
        "settings": {key: value for key, value in given.items() if key != "output_dir"},
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "machine": {"threads": torch.get_num_threads(), "processor": platform.machine()},
        "tokenization": tokenization(trainer, tokenizer),
        "losses": [entry["loss"] for entry in steps],
        "grad_norms": [entry["grad_norm"] for entry in steps],
        "step_seconds": timer.seconds,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "steps": steps,
        "summary": history[-1],
    }


def run(arguments: argparse.Namespace) -> None:
    """Reads the rows, trains, writes OUT.json."""
    rows, problems = read_rows(arguments.data, arguments.first)
    if problems:
        raise ValueError(f"{problems[0]}; use --write-rows to make a file of explicit rows")
    if len(rows) < arguments.steps * arguments.pairs:
        raise ValueError(f"{arguments.steps} steps of {arguments.pairs} pairs need more than the {len(rows)} rows")
    os.environ.update(CI="1", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")  # before TRL is imported
    record = train(arguments, rows)
    record |= {"model": str(arguments.model), "data": str(arguments.data), "rows": len(rows)}
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {arguments.out}: losses {record['losses']}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; `paths` is opened into model, data and out."""
    parser = argparse.ArgumentParser(
        description="run TRL's DPO on a few batches and write down every number",
        usage="trl_baseline.py MODEL DATA.jsonl OUT.json [options] | --write-rows ROWS.jsonl [--first N] DATA.jsonl",
    )
    parser.add_argument("paths", nargs="+", type=Path, help="MODEL DATA.jsonl OUT.json; with --write-rows DATA.jsonl")
    parser.add_argument("--write-rows", type=Path, metavar="FILE", help="only write explicit rows to FILE")
    parser.add_argument("--first", type=int, metavar="N", help="use the first N lines of DATA.jsonl")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=8, help="pairs in a step")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    arguments = parser.parse_args(argv)
    wanted = ("data",) if arguments.write_rows else ("model", "data", "out")
    if len(arguments.paths) != len(wanted):
        parser.error(f"{len(wanted)} paths are expected: {' '.join(wanted).upper()}")
    vars(arguments).update(zip(wanted, arguments.paths, strict=True))
    return arguments


def main() -> int:
    """0 when the file was written, 2 with one line on stderr when not."""
    arguments = parse(sys.argv[1:])
    try:
        if arguments.write_rows:
            write_rows(arguments.data, arguments.write_rows, arguments.first)
        else:
            run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"trl_baseline: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
