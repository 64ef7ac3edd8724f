"""Records of the kit: kept as one line each in tools/device_runs.jsonl, and shown as tables in tools/BENCHMARKS.md."""

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tools.benching import records
from tools.benching.records import ROOT

RUNS = ROOT / "tools" / "device_runs.jsonl"
SHOWN_KERNELS, SAID = 12, 300
"""Of a trace the longest kernels, and of an output the last characters, are kept."""


def keep(out: Path, into: Path = RUNS) -> None:
    """Add what a kit measured to the file of records."""
    record = json.loads((out / "kit.json").read_text("utf-8"))
    records.append(shortened(record), into)


def shortened(value: Any) -> Any:
    """The record without long outputs and lists of kernels."""
    if isinstance(value, Mapping):
        return {key: shortened(part) for key, part in value.items()}
    if isinstance(value, str):
        return value[-SAID:]
    if isinstance(value, list) and value and isinstance(value[0], Mapping) and "kernel" in value[0]:
        return value[:SHOWN_KERNELS]
    return [shortened(part) for part in value] if isinstance(value, list) else value


def steps(found: Iterable[Mapping[str, Any]]) -> str:
    """A row for each timed step, the newest of those of one name and card."""
    rows = {}
    for record, name, part in _parts(found):
        if "useful_tflops" in part:
            rows[_card(record), name] = (record, part)
    lines = [
        "| step | seconds | TFLOP/s | device memory | kernels, ms and launches | first step after | card | commit |",
        "|" + " --- |" * 8,
    ]
    for (card, name), (record, part) in rows.items():
        trace, work = part["trace"], part["work"]
        more = " ".join(work["settings"]) or "as it comes"
        lines.append(
            f"| {name}: {work['size']}, {work['pairs']} pairs, {more} | {part['seconds']:.3f} | "
            f"{part['useful_tflops']:.0f} | {part['device_peak_bytes'] / 2**30:.1f} GiB | "
            f"{trace['ms'] / 2:.0f}, {trace['launches'] // 2:,} | {part['first_step']:.0f} s | {card} | "
            f"{record['commit']} |"
        )
    return "\n".join(lines) + "\n"


def attention(found: Iterable[Mapping[str, Any]]) -> str:
    """Of each backend: the largest error in any case, and milliseconds of forward and backward together."""
    errors: dict[tuple[str, str], list[float]] = {}
    plain: dict[tuple[str, str], list[float]] = {}
    times: dict[tuple[str, str], float] = {}
    for record, name, part in _parts(found):
        if name == "timings":
            times |= {(_card(record), key): value for key, value in part.items() if key != "part_seconds"}
        if name.startswith("numerics "):
            for case, result in part.items():
                if isinstance(result, Mapping) and "errors" in result:
                    key = _card(record), f"{name.removeprefix('numerics ')}, {case.rsplit(', ', 1)[1]}"
                    errors.setdefault(key, []).append(max(result["errors"].values()))
                    plain.setdefault(key, []).append(max(result["plain"].values()))
    lines = ["| backend | cases | largest error | of the plain formula in that dtype | card |", "|" + " --- |" * 5]
    for (card, name), worst in errors.items():
        least = f"{max(plain[card, name]):.1e}" if max(plain[card, name]) else "exact"
        lines.append(f"| {name} | {len(worst)} | {max(worst):.1e} | {least} | {card} |")
    lines += ["", "| attention, forward and backward | ms | card |", "|" + " --- |" * 3]
    lines += [f"| {name} | {ms:.2f} | {card} |" for (card, name), ms in times.items() if isinstance(ms, float)]
    return "\n".join(lines) + "\n"


def beside(found: Iterable[Mapping[str, Any]]) -> str:
    """dpo_jax beside TRL: seconds of a step of each run, and whether losses agree."""
    lines = [
        "| run | dpo_jax, s/step | TRL, s/step | dpo_jax is faster by | losses apart | device memory | card | commit |",
        "|" + " --- |" * 8,
    ]
    for record, _, part in _parts(found):
        if "summary" not in part:
            continue
        warm, said = part["work"]["warmup"], part["summary"]
        apart = max(float(said[name].get("worst_difference") or 0) for name in ("dpo_jax", "trl"))
        memory = ", ".join(f"{name} {said[name]['device_peak_bytes'] / 2**30:.1f} GiB" for name in ("dpo_jax", "trl"))
        for number in (1, 2):
            ours, theirs = (
                statistics.median(part["seconds"][f"{name} {number}"][warm:-1]) for name in ("dpo_jax", "trl")
            )
            lines.append(
                f"| {number} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.2f}x | {apart:.1e} | {memory} | "
                f"{_card(record)} | {record['commit']} |"
            )
    return "\n".join(lines) + "\n"


def _parts(found: Iterable[Mapping[str, Any]]) -> Iterable[tuple[Mapping[str, Any], str, Mapping[str, Any]]]:
    for record in found:
        if not record["quick"]:
            yield from ((record, name, part) for name, part in record["parts"].items() if "failed" not in part)


def _card(record: Mapping[str, Any]) -> str:
    return ", ".join(record["hardware"]["gpus"]).removeprefix("NVIDIA ") or "CPU"
