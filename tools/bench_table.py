"""Writes the tables of timings from tools/benchmarks.jsonl: `python tools/bench_table.py [--check]`.

In tools/BENCHMARKS.md between `<!-- benchmarks -->` and `<!-- /benchmarks -->` stand the newest comparisons, one row
for each program. The newest of those that are alike in workload, dtype, reference, pairs in a step and machine is
shown, whatever it says. Between the marks `growth` stand the newest measurements of how cost grows, between the marks
`answers` how fast answers are written, between the marks
`device` what tools/device_kit.py measured, between the marks `compiled` what tools/compilers.py found, and in README.md
between the marks `speed` how many times as fast as each other program in a sentence.
"""

import argparse
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dpo_jax.errors import UserError  # noqa: E402
from tools.benching import micro, records  # noqa: E402
from tools.benching.compare import OURS, QUIET  # noqa: E402
from tools.compiling import report as compiled  # noqa: E402
from tools.device import report  # noqa: E402
from tools.pages import replaced  # noqa: E402

HEAD = (
    "| workload | program | pairs/s | CPU-s per pair | peak memory | first step after | dpo_jax is faster by | CPU | "
    "with reference | losses |"
)
GROWTH = {
    "pairs": ("pairs a step", "CPU-s/pair", "s/pair", "temp MiB"),
    "rows": ("row", "CPU-s", "s", "temp MiB", "attention"),
    "growth": ("pairs", "tokenise us/pair", "plan us/pair", "pack us/pair"),
    "hosts": ("pairs", "what", "CPU-s", "s", "grew MiB"),
}
"""Measurements of `bench.py micro` that show how cost grows, and what is shown of each."""


def table(found: Iterable[Mapping[str, Any]]) -> str:
    """The rows, and a line below for each machine and commit."""
    lines = [HEAD, "|" + " --- |" * 10]
    notes: list[str] = []
    for record in _newest(found):
        note = _note(record)
        number = notes.index(note) + 1 if note in notes else len(notes) + 1
        notes += [note] * (number > len(notes))
        lines += [_row(record, name, result, number) for name, result in record["summary"].items()]
    return "\n".join(lines + [""] + [f"{number}. {note}" for number, note in enumerate(notes, 1)]) + "\n"


def summary(found: Iterable[Mapping[str, Any]]) -> str:
    """How many times as fast as each other program, from the least ratio of its workloads to the greatest."""
    ratios: dict[str, list[float]] = {}
    for record in _newest(found):
        for name, result in record["summary"].items():
            if name != OURS and "problem" not in result:
                program = f"{name} {_version(record, name)}".strip()
                ratios.setdefault(program, []).append(result["ratio"]["median"])
    parts = []
    for program, times in ratios.items():
        ends = dict.fromkeys(f"{end:.1f}" for end in (min(times), max(times)))
        parts.append(f"{' to '.join(ends)} times {program} ({len(times)} workload{'s' * (len(times) > 1)})")
    return "\n".join(textwrap.wrap(f"{', '.join(parts)}.", 120, break_on_hyphens=False)) + "\n"


def _newest(found: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The comparisons to show."""
    return list({_key(record): record for record in found if record["kind"] == "compare"}.values())


def _workload(record: Mapping[str, Any]) -> str:
    spec, rank = record["spec"], record["data"].get("lora_rank")
    adapter = "" if rank is None else f", LoRA of rank {rank}"
    own = ", own reference" if spec["reference"] == "default" else ""
    return f"{record['workload']}, {spec['dtype']}{adapter}{own}"


def _key(record: Mapping[str, Any]) -> tuple:
    spec, machine = record["spec"], record["hardware"]
    about = (spec["dtype"], spec["reference"], spec["pairs_per_step"], spec["max_length"], spec["threads"])
    return (record["workload"], record["data"].get("lora_rank"), *about, machine["processor"], *machine["gpus"])


def _row(record: Mapping[str, Any], name: str, result: Mapping[str, Any], note: int) -> str:
    cells = [f"{_workload(record)} ({note})", f"{name} {_version(record, name)}".strip()]
    if "problem" in result:
        return _joined([*cells, *["-"] * 7, result["problem"].replace("|", "\\|")])
    busy = " (busy)" if result["others"] > QUIET else ""
    memory = f"{result['peak_bytes'] / 2**30:.2f} GiB"
    if result["device_peak_bytes"] is not None:
        memory += f", device {result['device_peak_bytes'] / 2**30:.2f}"
    rate, cpu = f"{result['pairs_per_second']:.3g}{busy}", f"{result['cpu_per_pair']:.3g}"
    cells += [rate, cpu, memory, f"{result['first_step']:.0f} s"]
    if name == OURS:
        return _joined([*cells, "", "", "", ""])
    cells += [_ratio(result[key]) for key in ("ratio", "ratio_cpu", "ratio_with_reference")]
    return _joined([*cells, f"agree to {result['worst_difference']:.0e}"])


def _ratio(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})"


def _joined(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _version(record: Mapping[str, Any], name: str) -> str:
    """The program's own version, as its runs told it."""
    for run in record["runs"]:
        for event in run["events"] if run["runner"] == name else ():
            if event["event"] == "done":
                packages = event["versions"]
                package = {"tunix": "google-tunix", "levanter": "marin-levanter"}.get(name, name)
                return packages.get(package, "")
    return ""


def _note(record: Mapping[str, Any]) -> str:
    machine, spec = record["hardware"], record["spec"]
    where = ", ".join([f"{machine['processor']}, {spec['threads']} threads", *machine["gpus"]])
    repeats = 1 + max((run["repeat"] for run in record["runs"]), default=0)
    counted = spec["steps"] - spec["warmup"]
    return (
        f"{where}; {_commit(record)}; {counted} steps of "
        f"{spec['pairs_per_step']} pairs, {repeats} runs of each in turn; median (least to greatest)"
    )


def _commit(record: Mapping[str, Any]) -> str:
    stale = ", with uncommitted changes" if record["dirty"] else ""
    return f"commit {record['commit']}{stale}, {record['time'][:10]}"


def growth(found: Iterable[Mapping[str, Any]]) -> str:
    """A table for each of `GROWTH`, of its newest record at full size, with what it is, machine and commit."""
    newest = {record["name"]: record for record in found if record["kind"] == "micro" and not record["quick"]}
    parts = []
    for name, columns in GROWTH.items():
        if name not in newest:
            continue
        record = newest[name]
        rows = [row for row in record["rows"] if columns[0] in row]
        lines = [_joined(list(columns)), "|" + " --- |" * len(columns)]
        lines += [_joined([micro.shown(row[column]) for column in columns]) for row in rows]
        about = f"{record['hardware']['processor']}; {_commit(record)}"
        parts.append("\n".join([f"`{name}`: {micro.NAMES[name][1]} ({about})", "", *lines]) + "\n")
    return "\n".join(parts)


def answers(found: Iterable[Mapping[str, Any]]) -> str:
    """How fast answers are written: the newest record, with what it is, machine and commit."""
    made = [record for record in found if record["kind"] == "generate"]
    if not made:
        return ""
    record, columns = made[-1], list(made[-1]["rows"][0])
    lines = [_joined(columns), "|" + " --- |" * len(columns)]
    lines += [_joined([micro.shown(row[column]) for column in columns]) for row in record["rows"]]
    sizes = f"{record['prompts']} prompts of {record['prompt_tokens']} tokens, {record['tokens']} new tokens each"
    where = f"{record['hardware']['processor']}, {record['threads']} threads; {_commit(record)}"
    return "\n".join([*lines, "", f"{record['model']}, {sizes}; medians of {record['repeats']}; {where}"]) + "\n"


def device(_: Iterable[Mapping[str, Any]]) -> str:
    """What the device kit measured: its records have a file of their own."""
    found = records.read(report.RUNS)
    return "\n".join(written(found) for written in (report.beside, report.steps, report.attention))


def programs(_: Iterable[Mapping[str, Any]]) -> str:
    """What accelerators' compilers made of real models' steps: these records have a file of their own."""
    return compiled.table(records.read(compiled.RECORDS))


PAGES = {
    "tools/BENCHMARKS.md": {
        "benchmarks": table,
        "growth": growth,
        "answers": answers,
        "device": device,
        "compiled": programs,
    },
    "README.md": {"speed": summary},
}
"""Blocks of each page, and what writes them."""


def updated(page: str, text: str, found: Iterable[Mapping[str, Any]]) -> str:
    """The text of one of `PAGES` with its tables as they are now.

    Raises:
      UserError: it has no place for one.
    """
    found = list(found)
    return replaced(page, text, {name: written(found) for name, written in PAGES[page].items()})


def main() -> int:
    """Write, or with `--check` tell by the exit code whether there is anything to write."""
    parser = argparse.ArgumentParser(description="The tables of timings.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is stale")
    parser.add_argument("--show", action="store_true", help="print the tables and write nothing")
    options = parser.parse_args()
    try:
        found = records.read()
        if options.show:
            print(*(written(found) for blocks in PAGES.values() for written in blocks.values()), sep="\n", end="")
            return 0
        old = {page: (ROOT / page).read_text("utf-8") for page in PAGES}
        new = {page: updated(page, text, found) for page, text in old.items()}
    except UserError as error:
        print(f"bench_table: {error}", file=sys.stderr)
        return 2
    if options.check:
        return int(new != old)
    for page, text in new.items():
        (ROOT / page).write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
