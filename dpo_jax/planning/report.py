"""A plan as text and as plain values."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dpo_jax.files import size_text
from dpo_jax.planning.exchanges import Collective

PREFIXES = ("", "k", "M", "G", "T", "P", "E")
TIGHT = 0.92
"""Share of a device's memory above which it is tight: allocators fragment, and libraries take their part."""
SMALL = 0.002
"""Share of all traffic below which exchanges are put together in one line."""


def table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Aligned lines; the first `left` columns to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def scaled(value: int | float, unit: str) -> str:
    """A quantity with the prefix that leaves one to three digits before the point: 1,234,000 B is 1.23 MB."""
    power = min(max((len(f"{int(value)}") - 1) // 3, 0), len(PREFIXES) - 1)
    return f"{value / 1000**power:,.2f} {PREFIXES[power]}{unit}"


def memory_lines(items: Mapping[str, int], compiler: Mapping[str, int], note: str) -> list[str]:
    """Predicted bytes by item, their sum, and beside them what the compiler says."""
    state = sum(
        items.get(name, 0)
        for name in ("parameters", "frozen parameters", "optimizer", "reference", "counters", "batch")
    )
    total = sum(items.values())
    named = [(name, size_text(size), "") for name, size in items.items() if size]
    named += [
        ("state and batch (the compiler's arguments)", size_text(state), size_text(compiler["argument"])),
        ("what the step needs beside them (its temporaries)", size_text(total - state), size_text(compiler["temp"])),
        ("peak", size_text(total), size_text(compiler["peak"])),
    ]
    return ["memory of a device", *table([("", "predicted", "compiler"), *named]), *([f"  {note}"] if note else [])]


def fit_line(peak: int | float, capacity: int | float, what: str) -> str:
    """Whether a peak fits."""
    share = peak / capacity
    verdict = "does not fit" if share > 1 else "fits, but tightly" if share > TIGHT else "fits"
    return f"  {verdict}: {size_text(peak)} of {size_text(capacity)} of {what} ({100 * share:.0f} %)"


def collective_rows(found: Iterable[Collective], per_host: int) -> list[dict[str, Any]]:
    """Exchanges that are alike put together, those that send most first."""
    rows: dict[tuple, dict[str, Any]] = {}
    for one in found:
        across = one.across(per_host)
        where = "forward" if "jvp" in one.source and "transpose" not in one.source else "backward"
        where = where if "jvp" in one.source else "step"
        key = one.kind, one.dtype, one.shape, one.size, bool(across), where, one.hides
        row = rows.setdefault(
            key,
            {
                "kind": one.kind,
                "dtype": one.dtype,
                "shape": list(one.shape),
                "devices": one.size,
                "links": "across hosts" if across else "inside a host",
                "pass": where,
                "hides": one.hides,
                "times": 0.0,
                "bytes": 0.0,
                "bytes_across": 0.0,
            },
        )
        row["times"] += one.times
        row["bytes"] += one.sent
        row["bytes_across"] += across
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def collective_lines(rows: Sequence[Mapping[str, Any]], theory: float, *, scheduled: bool = False) -> list[str]:
    """The table of exchanges, and what theory asks for; with what each hides behind where that is scheduled."""
    total = sum(row["bytes"] for row in rows)
    lines = ["exchanges in a step, by device (a ring's bytes that leave it)"]
    if not rows:
        return [*lines, "  none"]
    shown = [row for row in rows if row["bytes"] >= SMALL * total]
    rest = [row for row in rows if row["bytes"] < SMALL * total]
    cells = [
        (
            f"{row['kind']} {row['dtype']}[{','.join(map(str, row['shape']))}]",
            row["pass"],
            row["links"],
            str(row["devices"]),
            f"{row['times']:g}",
            scaled(row["bytes"], "B"),
            *([("hidden" if row["hides"] else "waited for")] if scheduled else []),
        )
        for row in shown
    ]
    last = [""] if scheduled else []
    if rest:
        times, size = sum(row["times"] for row in rest), sum(row["bytes"] for row in rest)
        cells.append((f"{len(rest)} small ones", "", "", "", f"{times:g}", scaled(size, "B"), *last))
    lines += table([("", "pass", "links", "devices", "times", "sent", *last), *cells], left=3)
    by_kind: dict[str, float] = {}
    for row in rows:
        by_kind[f"{row['kind']} {row['dtype']}"] = by_kind.get(f"{row['kind']} {row['dtype']}", 0.0) + row["bytes"]
    kinds = sorted(by_kind.items(), key=lambda item: -item[1])
    lines.append("  of each kind: " + ", ".join(f"{k} {scaled(v, 'B')}" for k, v in kinds if v >= SMALL * total))
    asked = f"; theory asks for {scaled(theory, 'B')} ({100 * (total / theory - 1):+.1f} %)" if theory else ""
    return [*lines, f"  in all {scaled(total, 'B')}{asked}"]


def time_lines(plan: Mapping[str, Any]) -> list[str]:
    """Busy seconds of each part, the step between its two bounds, and the useful share of the chips' peak."""
    time = plan["time"]
    rows = [
        ("matrix products", scaled(plan["flops"]["device"], "FLOP"), time["compute"]),
        ("memory", scaled(plan["memory_traffic"], "B"), time["memory"]),
        ("links inside a host", scaled(plan["traffic"]["inside"], "B"), time["inside"]),
        ("links across hosts", scaled(plan["traffic"]["across"], "B"), time["across"]),
    ]
    cells = [(name, work, f"{1e3 * seconds:,.1f} ms") for name, work, seconds in rows]
    names = dict(zip(("compute", "memory", "inside", "across"), (row[0] for row in rows), strict=True))
    return [
        f"time of a step on {plan['devices']} x {plan['chip']}",
        *table([("", "work", "busy"), *cells]),
        f"  bottleneck: {names[time['bottleneck']]}",
        f"  all overlapped {1e3 * time['overlapped']:,.1f} ms: {_speed(plan, 'overlapped')}",
        f"  nothing overlapped {1e3 * time['serial']:,.1f} ms: {_speed(plan, 'serial')}",
        *_run_lines(plan, (time["overlapped"], time["serial"])),
    ]


def compiled_time_lines(plan: Mapping[str, Any]) -> list[str]:
    """Seconds of a step as its own compiler's program adds up to, and the useful share of the chips' peak."""
    time, gpu = plan["time"], plan["cycles"] is None
    if gpu:
        rows = [
            ("kernels bound by products", scaled(plan["flops"]["device"], "FLOP"), time["products"]),
            ("kernels bound by memory", scaled(plan["memory_traffic"], "B"), time["memory"]),
            ("kernels bound by launching", f"{plan['launches']:,.0f} launches", time["launches"]),
            ("waits for the host", f"{plan['waits']:,.0f}", time["waits"]),
        ]
    else:
        rows = [("all but kernels and exchanges", scaled(plan["cycles"], "cycles"), time["products"])]
    rows += [("kernels of attention", "", time["attention"])]
    rows += [("exchanges that are waited for", "", time["exposed"]), ("exchanges that hide", "", time["hidden"])]
    cells = [(name, work, f"{1e3 * seconds:,.1f} ms") for name, work, seconds in rows]
    return [
        f"time of a step on {plan['devices']} x {plan['chip']}, put together and not measured",
        *table([("", "work", "busy"), *cells]),
        f"  a step {1e3 * time['step']:,.1f} ms: {_speed(plan, 'step')}",
        *_run_lines(plan, (time["step"],)),
    ]


def _run_lines(plan: Mapping[str, Any], seconds: Sequence[float]) -> list[str]:
    """Hours of the run's steps alone, or of a thousand where its length is not known."""
    steps = plan["steps"]
    hours = " to ".join(f"{(steps or 1000) * one / 3600:,.2f}" for one in sorted({round(x, 6) for x in seconds}))
    what = f"the run's {steps:,} steps" if steps else "1,000 steps (the run's length is that of its data)"
    return [f"  {what}: {hours} hours"]


def _speed(plan: Mapping[str, Any], bound: str) -> str:
    pairs = plan["batch"]["pairs"] / plan["time"][bound]
    return f"MFU {100 * plan['mfu'][bound]:.1f} %, {pairs:,.1f} pairs/s, {pairs / plan['devices']:,.2f} per device"


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """The whole plan."""
    real = "kernels" in plan
    memory = memory_lines(plan["memory"]["predicted"], plan["memory"]["compiler"], plan["memory"]["note"])
    peak = max(sum(plan["memory"]["predicted"].values()), plan["memory"]["compiler"]["peak"] if real else 0)
    memory.append(fit_line(peak, plan["memory"]["capacity"], plan["chip"]))
    parts = [_head_lines(plan), memory, *_host_lines(plan), _product_lines(plan)]
    parts.append(collective_lines(plan["collectives"], plan.get("theory", 0.0), scheduled=real))
    parts.append(compiled_time_lines(plan) if real else time_lines(plan))
    parts.append(["assumed", *(f"  {line}" for line in plan["assumed"])])
    return "\n\n".join("\n".join(part) for part in parts).splitlines()


def _head_lines(plan: Mapping[str, Any]) -> list[str]:
    batch, model = plan["batch"], plan["model"]
    rows, length = batch["shape"]
    return [
        f"{model['path']}: {model['parameters'] / 1e9:,.3f} billion parameters, computed in {model['compute_dtype']}, "
        f"{model['remat']} computed again, attention by {model['attention']}",
        f"{plan['devices']} devices on {plan['hosts']} hosts: mesh "
        + " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items()),
        f"a step is {batch['pairs']} pairs, {batch['tokens']:,.0f} tokens of which {batch['scored']:,.0f} scored "
        f"({batch['data']}); {batch['micro_batches']:g} micro-batches of {rows} x {length} slots a device, "
        f"{100 * batch['filled']:.0f} % filled",
        f"compiled by {plan['compiler']}",
    ]


def _host_lines(plan: Mapping[str, Any]) -> list[list[str]]:
    """What the host that has most to do reads, holds and writes, beside an equal part of it."""
    rows = [
        (name, scaled(found["most"], "B"), f"{found['most'] / found['share']:.2f} of an equal part")
        for name, found in plan["of_a_host"].items()
    ]
    return [["of one host, at most", *table(rows)]] if rows else []


def _product_lines(plan: Mapping[str, Any]) -> list[str]:
    flops = plan["flops"]
    rows = [("useful, all devices", scaled(flops["useful"], "FLOP"))]
    if "kernels" not in plan:
        rows += [
            ("as compiled, all devices", scaled(flops["device"] * plan["devices"], "FLOP")),
            ("as compiled, a device", scaled(flops["device"], "FLOP")),
        ]
        return ["matrix products of a step", *table(rows), *([f"  {flops['note']}"] if flops["note"] else [])]
    rows += [
        (f"as compiled of {dtype}, a device, kernels left out", scaled(count, "FLOP"))
        for dtype, count in flops["by_dtype"].items()
    ]
    kernels = ", ".join(f"{times:g} x {name}" for name, times in plan["kernels"].items()) or "none"
    return ["matrix products of a step", *table(rows), f"  kernels: {kernels}"]
