"""From single measurements to ratios with their range; used for the terminal and for the document."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

LABELS = {
    "trl": "TRL as shipped",
    "trl-precompute": "TRL, precomputed reference",
    "padded": "padded baseline",
    "packed": "preftune",
    "packed-known": "preftune, second run",
}
HEADERS = (
    "contender",
    "pairs/s",
    "pairs/s, steps alone",
    "start-up, s",
    "x TRL",
    "x padded",
    "memory growth",
    "memory / TRL",
    "of matmul rate",
    "s/pair CPU",
    "pairs",
)

Cell = dict[str, Any]


def setting_of(cell: Cell) -> tuple[Any, ...]:
    """Return what all contenders of one comparison share."""
    keys = ("model", "workload", "dtype", "peft", "checkpointing", "batch_size", "data_scale", "scale")
    return tuple(cell[key] for key in keys)


def setting_text(setting: tuple[Any, ...]) -> str:
    """Describe a setting in one line."""
    model, workload, dtype, peft, checkpointing, batch_size, data_scale, scale = setting
    kind = "LoRA" if peft == "lora" else "full fine-tuning"
    default = "each library's default checkpointing" if checkpointing == "default" else "no checkpointing"
    text = f"{workload}, {dtype}, {kind}, {default}, batch {batch_size}, {model}"
    text += f", {data_scale}x data" if data_scale != 1 else ""
    return text + (f", {scale:g}x length" if scale != 1 else "")


def pairs_per_second(cell: Cell) -> float:
    """Return pairs over construction and training time."""
    return float(cell["num_pairs"] / cell["seconds"])


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Return ``median`` or, of several values, ``median (min-max)``."""
    if not values:
        return "-"
    middle = form(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({form(min(values))}-{form(max(values))})"


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def megabytes(value: float) -> str:
    """Bytes as MB."""
    return f"{value / 1e6:,.0f} MB"


def percent(value: float) -> str:
    """A share as per cent."""
    return f"{100 * value:.1f} %"


def cell_line(cell: Cell) -> str:
    """Describe one measurement."""
    label = LABELS[cell["variant"]]
    if "error" in cell:
        return f"{label} FAILED ({cell['error']})"
    return (
        f"{label} {number(pairs_per_second(cell))} pairs/s ({cell['num_pairs']} pairs in {cell['seconds']:.1f} s), "
        f"memory +{megabytes(cell['memory_growth'])}"
    )


def busy(machine: dict[str, Any]) -> str:
    """Return a caution if other programs were running when the measurements began, else an empty text."""
    load = (machine["load_average"] or [0.0])[0]
    if load < 0.5 * machine["num_cores"]:
        return ""
    return (
        f"Caution: the machine was busy (load {load:.1f} on {machine['num_cores']} cores). Wall times are disturbed "
        "and ratios with them; on a shared machine `--threads 1` and the column s/pair CPU are the fairer guide."
    )


def rows_of(report: dict[str, Any]) -> dict[tuple[Any, ...], list[list[str]]]:
    """Return the table's rows per setting, in the order of measurement.

    Ratios are formed within a repetition, between cells that ran next to each other, and then summarised.
    """
    groups: dict[tuple[Any, ...], dict[str, dict[int, Cell]]] = defaultdict(lambda: defaultdict(dict))
    for cell in report["cells"]:
        groups[setting_of(cell)][cell["variant"]][cell["rep"]] = cell
    rates = report["machine"]["matmul_flops_per_second"]
    return {
        setting: [
            _row(variant, cells, groups[setting], rates[setting[2]])
            for variant, cells in sorted(group.items(), key=lambda item: list(LABELS).index(item[0]))
        ]
        for setting, group in groups.items()
    }


def _row(variant: str, by_rep: dict[int, Cell], group: dict[str, dict[int, Cell]], rate: float) -> list[str]:
    cells = {rep: cell for rep, cell in by_rep.items() if "error" not in cell}
    label = LABELS[variant]
    if not cells:
        reasons = {cell["error"] for cell in by_rep.values()}
        return [f"{label}: failed, {'; '.join(sorted(reasons))}", *["-"] * (len(HEADERS) - 1)]

    def ratios(other: str, value: Callable[[Cell], float]) -> list[float]:
        base = {rep: cell for rep, cell in group.get(other, {}).items() if "error" not in cell}
        return [value(cells[rep]) / value(base[rep]) for rep in sorted(cells.keys() & base.keys())]

    ordered = [cells[rep] for rep in sorted(cells)]
    return [
        label,
        spread([pairs_per_second(cell) for cell in ordered], number),
        spread([cell["num_pairs"] / cell["training_seconds"] for cell in ordered], number),
        spread([cell["construction_seconds"] for cell in ordered], number),
        spread(ratios("trl", pairs_per_second), number),
        spread(ratios("padded", pairs_per_second), number),
        spread([cell["memory_growth"] for cell in ordered], megabytes),
        spread(ratios("trl", lambda cell: float(cell["memory_growth"])), number),
        spread([cell["useful_flops"] / cell["seconds"] / rate for cell in ordered], percent),
        spread([cell["cpu_seconds"] / cell["num_pairs"] for cell in ordered], number),
        str(ordered[0]["num_pairs"]),
    ]


def table(report: dict[str, Any]) -> str:
    """Return aligned text for a terminal."""
    lines = []
    for setting, rows in rows_of(report).items():
        grid = [list(HEADERS), *rows]
        widths = [max(len(row[i]) for row in grid) for i in range(len(HEADERS))]
        lines += ["", setting_text(setting)]
        for row in grid:
            first, *rest = (text.rjust(width) for text, width in zip(row, widths, strict=True))
            lines.append("  ".join(["  " + first.strip().ljust(widths[0]), *rest]))
    if caution := busy(report["machine"]):
        lines += ["", caution]
    return "\n".join(lines)
