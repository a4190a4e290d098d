"""The GPU part of docs/benchmarks.md, from the result files of ``benchmarks.gpu``."""

from __future__ import annotations

from typing import Any

from benchmarks.summary import number, percent

#: Least ratios that were aimed at: to TRL at its best, and to our own rows with every prompt computed twice.
GOALS = {
    ("train-1b", "hh"): (2.3, 1.4),
    ("train-1b", "ultrafeedback"): (1.6, 1.15),
    ("train-8b", "hh"): (2.4, None),
    ("train-8b", "ultrafeedback"): (1.6, None),
}
TITLES = {
    "train-1b": "Llama-3.2-1B shape, full fine-tuning, bf16, batch 32",
    "train-8b": "Llama-3.1-8B shape, LoRA, bf16, batch 16",
    "train-qwen": "Qwen2.5-1.5B sizes and vocabulary, full fine-tuning, bf16, batch 32",
}
HEADERS = ("contender", "pairs/s", "x TRL at its best", "goal", "peak memory", "of matmul rate", "first step", "path")
#: Attention kernels whose worst token is off by more than this are wrong, as in ``kernels/attention/check.py``.
WRONG = 0.1
UNMEASURED = (
    "## GPU\n\n**Unmeasured**: no accelerator was at hand when these results were taken. `python -m benchmarks.gpu` "
    "(`make gpu`) takes them in eight minutes, on a machine without a network; [hardware.md](hardware.md) says what "
    "was read, emulated and computed instead."
)


def section(report: dict[str, Any], machine_text: str) -> str:
    """Render one result file."""
    parts = [f"## GPU, kernels and training, {report['date'][:10]}", machine_text]
    for name, result in report["sections"].items():
        if name in TITLES:
            parts += [f"### {TITLES[name]}", _training(name, result, report)]
        elif name != "env":
            parts += [f"### {name.capitalize()}", _facts(result)]
    return "\n\n".join(parts)


def _training(section_name: str, result: dict[str, Any], report: dict[str, Any]) -> str:
    rate = report.get("machine", {}).get("matmul_flops_per_second", {}).get("bf16")
    lines = ["| rows | " + " | ".join(HEADERS) + " |", "|---|---|" + "---:|" * (len(HEADERS) - 2) + "---|"]
    cells = {name: cell for name, cell in result.items() if isinstance(cell, dict)}
    for name, cell in cells.items():
        kind, contender = name.split(": ", 1)
        if "pairs_per_second" not in cell:
            lines.append(f"| {kind} | {contender}: {cell.get('error', 'no step')} |" + " - |" * (len(HEADERS) - 1))
            continue
        base = cells.get(f"{kind}: TRL at its best", {}).get("pairs_per_second")
        goal = GOALS.get((section_name, kind), (None, None))[0] if contender == "preftune" else None
        lines.append(
            f"| {kind} | {contender} | {number(cell['pairs_per_second'])} | "
            f"{number(cell['pairs_per_second'] / base) if base else '-'} | {goal or '-'} | "
            f"{cell['peak_gb']} GB | "
            f"{percent(cell['operations_per_second'] / rate) if rate else '-'} | {cell['until_first_step_s']} s | "
            f"{', '.join(cell.get('backends', [])) or '-'} |"
            if "peak_gb" in cell
            else f"| {kind} | {contender} | {number(cell['pairs_per_second'])} |" + " - |" * (len(HEADERS) - 2)
        )
    notes = [_sharing(section_name, cells)] + [result[key] for key in ("skipped", "error") if key in result]
    return "\n".join(lines) + "".join(f"\n\n{note}" for note in notes if note)


def _sharing(section_name: str, cells: dict[str, Any]) -> str:
    told = []
    for kind in dict.fromkeys(name.split(": ", 1)[0] for name in cells):
        both = [
            cells.get(f"{kind}: {name}", {}).get("pairs_per_second")
            for name in ("preftune", "preftune, prompts not shared")
        ]
        if all(both):
            goal = GOALS.get((section_name, kind), (None, None))[1]
            told.append(f"{kind} {number(both[0] / both[1])}" + (f" (goal {goal})" if goal else ""))
    return f"What sharing prompts gains over packed rows without: {'; '.join(told)}." if told else ""


def _facts(result: dict[str, Any]) -> str:
    lines = ["| what | result |", "|---|---|"]
    for name, value in result.items():
        if name in ("section_s", "where"):
            continue
        text = ", ".join(f"{key} {each}" for key, each in value.items()) if isinstance(value, dict) else str(value)
        if isinstance(value, float) and value > WRONG:
            text += " **wrong**"
        lines.append(f"| {name} | {text} |")
    return "\n".join(lines)
