"""Hold a run of dpo_jax beside a run of TRL on the same rows, step by step.

    python tools/compare_trl.py RUN/metrics.jsonl TRL.json [--tolerance 1e-4]

TRL.json is what `tools/trl_baseline.py` wrote, or a list of TRL's log records. For each step and each metric that both
have, the relative difference is taken; the table shows the loss of each step and the largest difference of each metric.
Exit code 1 if a loss differs by more than the tolerance.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

METRICS = (
    "loss grad_norm rewards/chosen rewards/rejected rewards/margins rewards/accuracies logps/chosen logps/rejected "
    "logits/chosen logits/rejected entropy mean_token_accuracy num_tokens"
).split()


def our_records(path: Path) -> list[dict[str, Any]]:
    """Training records of a `metrics.jsonl`, by step."""
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [record for record in records if "loss" in record]


def their_records(path: Path) -> list[dict[str, Any]]:
    """TRL's log records of single steps."""
    table = json.loads(path.read_text("utf-8"))
    records = table if isinstance(table, list) else table["steps"]
    return [record for record in records if "loss" in record]


def difference(ours: float, theirs: float) -> float:
    """Relative difference; absolute where TRL's value is 0."""
    return abs(ours - theirs) / (abs(theirs) or 1.0)


def compare(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> tuple[list[str], float]:
    """Lines of the table, and the largest relative difference of a loss."""
    lines = [f"{'step':>4}  {'dpo_jax loss':>14}  {'TRL loss':>14}  {'relative':>9}"]
    losses = []
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False), 1):
        losses.append(difference(one["loss"], other["loss"]))
        lines.append(f"{number:>4}  {one['loss']:>14.9f}  {other['loss']:>14.9f}  {losses[-1]:>9.1e}")
    lines.append(f"\n{'metric':<20}  {'largest relative difference':>27}")
    for name in METRICS:
        found = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=False) if name in a and name in b]
        if found:
            lines.append(f"{name:<20}  {max(difference(a, b) for a, b in found):>27.1e}")
    return lines, max(losses)


def main() -> int:
    """Read both, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ours", type=Path, metavar="RUN/metrics.jsonl")
    parser.add_argument("theirs", type=Path, metavar="TRL.json")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    arguments = parser.parse_args()
    lines, worst = compare(our_records(arguments.ours), their_records(arguments.theirs))
    print("\n".join(lines))
    print(f"\nlargest relative difference of a loss: {worst:.1e} (tolerance {arguments.tolerance:.0e})")
    return int(worst > arguments.tolerance)


if __name__ == "__main__":
    sys.exit(main())
