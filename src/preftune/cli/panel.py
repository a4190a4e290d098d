"""The summary before training: what is trained on what, how, and what it will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from preftune.advice.terminal import memory_line, time_line
from preftune.runs.records import data_lines, facts_of
from preftune.terminal.units import count, plural, share
from preftune.training.plan import MemoryEstimate, TrainingPlan


def summary(
    plan: TrainingPlan, *, paired: bool, output_dir: str, verb: str = "dpo", notes: Sequence[str] = ()
) -> Panel:
    """Lay the plan out.

    Args:
        plan: What the trainer worked out.
        paired: Whether an example is a pair, whose prompt packing computes once.
        output_dir: Where the results go.
        verb: The verb that trains.
        notes: Lines about settings, such as translated names.

    Returns:
        A panel for a Rich console.
    """
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    unit = "pair" if paired else "example"
    for label, text in _rows(plan, unit, paired, output_dir):
        # Text, not markup: names of models and files may hold square brackets.
        grid.add_row(label, Text(text))
    told = list(dict.fromkeys([*_warnings(plan.data), *notes, *plan.notes]))
    body: list[RenderableType] = [grid]
    if told:
        body += [Text(""), *(Text(f"- {line}", style="yellow") for line in told)]
    usual = plan.method in (verb, "sigmoid" if verb == "dpo" else verb)
    title = Text(f"preftune {verb}" if usual else f"preftune {verb}: {plan.method}")
    return Panel(Group(*body), title=title, title_align="left", expand=False, border_style="cyan")


def _rows(plan: TrainingPlan, unit: str, paired: bool, output_dir: str) -> list[tuple[str, str]]:
    trained = share(plan.num_trainable_parameters, plan.num_parameters)
    return [
        ("model", f"{plan.model}: {count(plan.num_parameters)} parameters, {trained} of them trained"),
        *(("data", line) for line in data_lines(plan.data)),
        ("tokens", f"{count(plan.num_prompt_tokens)} in prompts, {count(plan.num_completion_tokens)} in completions"),
        ("packing", saved(plan, paired)),
        ("steps", f"{plan.num_steps:,} steps of {plural(plan.pairs_per_step, unit)}"),
        ("path", f"{plan.path}, {plan.backend}: {plan.backend_reason}"),
        *([("reference", plan.reference)] if plan.reference != "none" else []),
        ("memory", memory(plan.memory)),
        *([("time", time_line(plan.time))] if time_line(plan.time) else []),
        ("output", output_dir),
    ]


def saved(plan: TrainingPlan, paired: bool) -> str:
    """How much of the padded computation packing saves, apart for shared prompts and for padding."""
    padded, packed = plan.num_padded_tokens, plan.num_packed_tokens
    if plan.path != "packed" or padded <= 0:
        return f"none; {count(padded)} tokens are computed in an epoch, padding included"
    separate = min(max(packed + (plan.num_prompt_tokens if paired else 0), packed), max(padded, packed))
    parts = [f"{share(padded - separate, padded)} of the padded tokens were padding"]
    if paired:
        parts.insert(0, f"{share(separate - packed, padded)} are prompts that the two answers share")
    rows = f"rows of up to {plan.max_tokens_per_row:,} tokens"
    return f"{count(packed)} tokens instead of {count(padded)}: {', '.join(parts)}; {rows}"


def memory(estimate: MemoryEstimate) -> str:
    """Estimated peak and its causes, and what there is."""
    text = memory_line(estimate) or "unknown"
    if not estimate.fits:
        text += "; it may not be enough: preftune advise says what makes room"
    return text


def _warnings(reports: Mapping[str, Any]) -> list[str]:
    return [f"{split}: {line}" for split, report in reports.items() for line in facts_of(report).get("warnings", ())]
