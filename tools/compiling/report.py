"""The table of steps that accelerators' compilers made, from tools/compiled_programs.jsonl."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).resolve().parents[1] / "compiled_programs.jsonl"
HEAD = (
    "step",
    "settings",
    "attention",
    "launches, waits",
    "ms: products, memory, launches, attention, exchanges waited for (hidden)",
    "MFU",
    "memory: compiler, plan",
    "fits",
    "commit",
)


def table(found: Iterable[Mapping[str, Any]]) -> str:
    """A row for each program, of its newest record."""
    newest = {record["name"]: record for record in found}
    lines = [_joined(HEAD), "|" + " --- |" * len(HEAD)]
    return "\n".join([*lines, *(_joined(_row(record)) for record in newest.values())]) + "\n"


def _row(record: Mapping[str, Any]) -> list[str]:
    plan = record["plan"]
    time, memory = plan["time"], plan["memory"]
    real, predicted = memory["compiler"]["peak"], sum(memory["predicted"].values())
    launched = "-" if plan["launches"] is None else f"{plan['launches']:,.0f}, {plan['waits']:,.0f}"
    parts = ", ".join(f"{1e3 * time[name]:,.1f}" for name in ("products", "memory", "launches", "attention", "exposed"))
    mesh = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1)
    return [
        f"{record['name']}, {plan['batch']['pairs']} pairs",
        ", ".join([mesh, f"remat={plan['model']['remat']}"]).lstrip(", "),
        plan["model"]["attention"],
        launched,
        f"{1e3 * time['step']:,.0f}: {parts} ({1e3 * time['hidden']:,.1f})",
        f"{100 * plan['mfu']['step']:.1f} %",
        f"{real / 2**30:.2f}, {predicted / 2**30:.2f} GiB ({100 * (predicted / real - 1):+.0f} %)",
        "yes" if max(real, predicted) <= memory["capacity"] else "no",
        record["commit"] + (" and changes" if record["dirty"] else ""),
    ]


def _joined(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
