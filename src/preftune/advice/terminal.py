"""An advice on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from preftune.terminal.units import count, duration, plural, size

if TYPE_CHECKING:
    from rich.console import Console

    from preftune.advice import Advice, Case
    from preftune.training.plan import MemoryEstimate, TimeEstimate

_STYLES = {"problem": "red", "warn": "yellow", "note": "dim"}


def show(
    console: Console,
    advice: Advice,
    notes: Sequence[str],
    *,
    verbose: bool = False,
    following: str | None = None,
) -> None:
    """Print an advice: what it is about, settings, flags, memory and time, and what to do next.

    Args:
        console: Where to.
        advice: What.
        notes: Lines about settings and data.
        verbose: Also every reason, with its sources and where they disagree.
        following: The next command.
    """
    from rich.table import Table
    from rich.text import Text

    console.print(Text(_about(advice.case), style="bold"))
    for note in dict.fromkeys(notes):
        console.print(Text(f"- {note}", style="yellow"))
    table = Table("setting", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.columns[0].no_wrap = True
    for heading in ("now", "advised", "range", "kind"):
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
        )
    console.print(table)
    if verbose:
        _reasons(console, advice)
    _flags(console, advice, verbose)
    for label, text in (("memory", memory_line(advice.memory)), ("time", time_line(advice.time))):
        if text:
            console.print(Text.assemble((f"{label}: ", "bold"), text))
    if not verbose:
        console.print(Text("reasons and sources: --verbose", style="dim"))
    if following:
        console.print(Text.assemble(("next: ", "bold"), following), soft_wrap=True)


def _reasons(console: Console, advice: Advice) -> None:
    """Reason, sources and contradiction of each setting."""
    from rich.text import Text

    from preftune.advice.yaml_file import quoted

    for setting in advice.settings:
        console.print(Text.assemble((f"{setting.field}: ", "bold"), setting.reason))
        for source in dict.fromkeys(setting.sources):
            console.print(Text(f"  - {quoted(source)}", style="dim"))
        if setting.contradiction:
            console.print(Text(f"  {setting.contradiction}"))


def _about(case: Case) -> str:
    pairs = f", {plural(case.num_pairs, 'pair')}" if case.num_pairs else ""
    noise = "label noise not known"
    if case.noise is not None:
        span = f" ({case.noise.span})" if case.noise.low != case.noise.high else ""
        noise = f"label noise {case.noise.estimate:.0%}{span}"
    trained = "an adapter" if case.lora else "all weights"
    return f"{case.verb}, {'+'.join(case.methods)}: {count(case.num_parameters)} parameters, {trained}{pairs}, {noise}"


def _flags(console: Console, advice: Advice, verbose: bool) -> None:
    from rich.text import Text

    if not advice.flags:
        console.print(Text("nothing looks risky", style="green"))
    for flag in advice.flags:
        kind = f"{flag.threshold_kind} threshold" if flag.threshold_kind != "computed" else "computed"
        where = f" ({kind}; {flag.source})" if verbose else ""
        console.print(
            Text.assemble(
                (f"{flag.severity}: {flag.title}", _STYLES[flag.severity]), f": {flag.detail}; {flag.remedy}{where}"
            )
        )


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def memory_line(memory: MemoryEstimate | None) -> str:
    """Peak memory and its causes; empty where it is not known."""
    if memory is None or not memory.total:
        return ""
    parts = ", ".join(f"{cause} {size(taken)}" for cause, taken in memory.causes.items())
    text = f"about {size(memory.total)} ({parts})"
    if memory.available is not None:
        text += f" of {size(memory.available)}" + (f" on {memory.machine}" if memory.machine else "")
    if memory.row_tokens:
        text += f"; rows of up to {memory.row_tokens:,} tokens"
        text += ", their activations recomputed" if memory.checkpointed else ""
    if memory.store:
        text += f"; reference log-probs {size(memory.store)} on disk"
    return text + ("; lengths guessed" if memory.assumed else "")


def time_line(time: TimeEstimate | None) -> str:
    """Time of the run and of a step; empty where it is not known."""
    if time is None or not time.step_seconds:
        return ""
    measured = "" if time.is_measured else "; a guess from the data sheet's peak rate"
    if not time.num_pairs:
        return f"about {time.step_seconds:.2g} s a step{measured}"
    text = (
        f"about {duration(time.seconds)} ({duration(time.low)} to {duration(time.high)}): "
        f"{plural(time.num_steps, 'step')} of {time.step_seconds:.2g} s"
    )
    if time.reference_seconds:
        text += f", reference pass {duration(time.reference_seconds)}"
    return text + measured
