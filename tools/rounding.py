"""What an export's rounding leaves of a training, and whether the run says so: measured again by PyTorch.

python tools/rounding.py CONFIG [key=value ...] --rates 5e-7 2e-6 1e-5 5e-5 [--work FOLDER] [--out FILE]

For each learning rate the run is made once and exported three times: rounded to nearest, rounded at random (the
default), and in float32. Of each export: the held-out margin that the run reports (nats, times beta), the margin that
PyTorch gives the exported folder against the folder that the run began with, both in float32, and the shares of the
float32 export's margin and of the moved weights that are left. Exit code 1 if a reported margin is further from
PyTorch's than 1e-4 of it, or 1e-6, whichever is larger. Needs torch; held-out rows must be lists of chat messages.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_jax import train
from dpo_jax.config import run as config
from dpo_jax.reporting.journal import read_records

EXPORTS = {
    "nearest": ("export.rounding=nearest",),
    "random": ("export.rounding=random",),
    "float32": ("export.dtype=float32",),
}


def torch_logprobs(folder: Path, rows: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """By row, summed log-probabilities (nats) of chosen and rejected, each up to the token that ends the turn."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}

    def logprob(prompt: list[dict[str, str]], answer: list[dict[str, str]]) -> float:
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)
        assert whole.startswith(start)
        first, tokens = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (start, whole))
        while tokens[-1] not in special:  # what a template writes after a turn is not scored
            tokens.pop()
        with torch.no_grad():
            scores = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        return float(sum(scores[place - 1, tokens[place]] for place in range(len(first), len(tokens))))

    return [(logprob(row["prompt"], row["chosen"]), logprob(row["prompt"], row["rejected"])) for row in rows]


def margin(policy: Sequence[tuple[float, float]], reference: Sequence[tuple[float, float]], beta: float) -> float:
    """Mean over rows of beta times what the policy gives chosen over rejected, beyond the reference."""
    gains = [(a - b) - (c - d) for (a, b), (c, d) in zip(policy, reference, strict=True)]
    return beta * sum(gains) / len(gains)


def measured(words: list[str], rate: str, work: Path) -> list[dict[str, Any]]:
    """A row for each export of one run."""
    output, found, before = work / f"rate-{rate}", [], None
    for name, more in EXPORTS.items():
        argv = [*words, f"optimizer.learning_rate={rate}", f"output={output}", *more]
        if train.main(argv) != 0:
            raise SystemExit(f"the run failed: {' '.join(argv)}")
        run = config.load(argv)
        lines = Path(str(run.data.eval)).read_text("utf-8").splitlines()
        reported = read_records(output / "metrics.jsonl")[-1]["eval_rewards/margins"]
        moved, of = json.loads((output / "run.json").read_text())["moved"]
        beta = run.objective.terms[0].settings["beta"]
        rows = list(map(json.loads, lines))
        before = before or torch_logprobs(Path(run.model.path), rows)
        again = margin(torch_logprobs(output / "model", rows), before, beta)
        found.append({"rate": rate, "export": name, "reported": reported, "torch": again, "moved": moved / of})
    whole = found[-1]["torch"]
    return [{**row, "kept": row["torch"] / whole} for row in found]


def main() -> int:
    """Make the runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rates", nargs="+", default=["5e-7", "2e-6", "1e-5", "5e-5"])
    parser.add_argument("--work", type=Path, help="folder of the runs (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="file to append the rows to, as JSON lines")
    given = parser.parse_intermixed_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="rounding_"))
    rows = [row for rate in given.rates for row in measured([given.config, *given.overrides], rate, work)]
    print("| rate | export | margin reported | by PyTorch | of float32's | weights moved |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        numbers = f"{row['reported']:+.6g} | {row['torch']:+.6g} | {row['kept']:.1%} | {row['moved']:.1%}"
        print(f"| {row['rate']} | {row['export']} | {numbers} |")
    if given.out:
        with given.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    wrong = [row for row in rows if abs(row["reported"] - row["torch"]) > max(1e-4 * abs(row["torch"]), 1e-6)]
    for row in wrong:
        print(f"NOT EQUAL: {row}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
