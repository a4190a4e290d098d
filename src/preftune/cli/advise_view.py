"""An advice on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from preftune.cli.style import count, duration, plural, size

if TYPE_CHECKING:
    from rich.console import Console

    from preftune.advice import Advice, Case
    from preftune.advice.case import Setting

_STYLES = {"problem": "red", "warn": "yellow", "note": "dim"}
#: Columns from which on reasons and sources fit into the table.
_WIDE = 120


def show(console: Console, advice: Advice, notes: Sequence[str]) -> None:
    """Print an advice: what it is about, settings, contradictions, flags, memory and time.

    Args:
        console: Where to.
        advice: What.
        notes: Lines about settings and data.
    """
    from rich.table import Table
    from rich.text import Text

    console.print(Text(_about(advice.case), style="bold"))
    for note in dict.fromkeys(notes):
        console.print(Text(f"- {note}", style="yellow"))
    table = Table("setting", pad_edge=False)
    table.columns[0].no_wrap = True
    # In a narrow terminal, sentences stand below: beside the figures they would be a word wide.
    wide = console.width >= _WIDE
    for heading in ("now", "advised", "range", "kind", *(("why", "sources") if wide else ())):
        table.add_column(heading, overflow="fold")
    for setting in advice.settings:
        is_loss = setting.field == "loss_type"
        now = "+".join(advice.case.methods) if is_loss else advice.case.given.get(setting.field)
        table.add_row(
            Text(setting.field),
            Text(_shown(now)),
            Text(_shown(setting.value), style="" if now == setting.value else "bold"),
            Text("" if setting.low is None or setting.high is None else f"{setting.low:g} to {setting.high:g}"),
            setting.kind,
            *((Text(setting.reason), Text(_sources(setting))) if wide else ()),
        )
    console.print(table)
    for setting in () if wide else advice.settings:
        console.print(Text.assemble((f"{setting.field}: ", "bold"), setting.reason, (f" ({_sources(setting)})", "dim")))
    for setting in advice.settings:
        if setting.contradiction:
            console.print(Text.assemble((f"{setting.field}: ", "bold"), setting.contradiction))
    _flags(console, advice)
    for label, text in (("memory", memory_line(advice.memory)), ("time", time_line(advice.time))):
        if text:
            console.print(Text.assemble((f"{label}: ", "bold"), text))


def _sources(setting: Setting) -> str:
    return ", ".join(dict.fromkeys(source.name for source in setting.sources))


def _about(case: Case) -> str:
    pairs = f", {plural(case.num_pairs, 'pair')}" if case.num_pairs else ""
    noise = "label noise not known"
    if case.noise is not None:
        noise = f"label noise {case.noise.estimate:.0%} ({case.noise.span})"
    trained = "an adapter" if case.lora else "all weights"
    return f"{case.verb}, {'+'.join(case.methods)}: {count(case.num_parameters)} parameters, {trained}{pairs}, {noise}"


def _flags(console: Console, advice: Advice) -> None:
    from rich.text import Text

    if not advice.flags:
        console.print(Text("nothing looks risky", style="green"))
    for flag in advice.flags:
        kind = f"{flag.threshold_kind} threshold" if flag.threshold_kind != "computed" else "computed"
        console.print(
            Text.assemble(
                (f"{flag.severity}: {flag.title}", _STYLES[flag.severity]),
                f": {flag.detail}; {flag.remedy} ({kind}; {flag.source})",
            )
        )


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def memory_line(memory: Any) -> str:
    """Peak memory and its causes; empty where it is not known."""
    if not memory:
        return ""
    causes = ("weights", "reference", "gradients", "optimizer", "copies", "activations", "head")
    parts = ", ".join(f"{cause} {size(memory[cause])}" for cause in causes if memory.get(cause))
    text = f"about {size(memory['total'])} ({parts}) of {size(memory['available'])} on {memory['machine']}"
    text += f"; rows of up to {memory['row_tokens']:,} tokens"
    if memory["store_bytes"]:
        text += f"; reference log-probs {size(memory['store_bytes'])} on disk"
    return text + ("; lengths guessed" if memory["lengths_assumed"] else "")


def time_line(time: Any) -> str:
    """Time of the run and of a step; empty where it is not known."""
    if not time:
        return ""
    if not time["plan"]["num_pairs"]:
        return f"about {time['step_seconds']:.2g} s a step"
    return (
        f"about {duration(time['seconds'])} ({duration(time['low'])} to {duration(time['high'])}): "
        f"{plural(time['num_steps'], 'step')} of {time['step_seconds']:.2g} s, "
        f"reference pass {duration(time['reference_seconds'])}"
    )
