"""An evaluation's result for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from preftune.errors import printable
from preftune.evaluation.result import EvalResult

_LABELS = {
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "reward margin",
    "rewards/chosen": "reward of chosen",
    "rewards/rejected": "reward of rejected",
    "logps/accuracies": "accuracy of log-probs",
    "logps/mean_accuracies": "accuracy of log-probs per token",
    "logps/margins": "margin of log-probs",
    "logps/chosen": "log-prob of chosen",
    "logps/rejected": "log-prob of rejected",
}


def show(result: EvalResult, console: Console) -> None:
    """Print the result.

    Args:
        result: What :func:`preftune.evaluation.evaluate` returned.
        console: Where to.
    """
    reference = result.ref_model or "none"
    head = Table.grid(padding=(0, 2))
    head.add_column(no_wrap=True)
    head.add_column(overflow="fold")
    for label, text in (
        ("model", result.model),
        ("reference", reference),
        ("data", f"{result.dataset}: {result.num_pairs:,} pairs, {result.num_prompts:,} prompts"),
        ("reward", f"{result.reward}, beta {result.beta:g}"),
    ):
        # Text, not markup: names, prompts and completions may hold square brackets.
        head.add_row(Text(label), Text(text))
    parts: list[RenderableType] = [head]
    parts += [Text(f"- {note}", style="yellow") for note in result.notes]
    console.print(Panel(Group(*parts), title="preftune eval", title_align="left", expand=False, border_style="cyan"))
    for table in (_metrics(result), _parts(result), _compare(result), _judge(result), _bench(result)):
        if table is not None:
            console.print(table)
    for sample in result.samples[:2]:
        console.print(_sample(sample))
    console.print(Text(result.judgement(), style="bold"), soft_wrap=True)


def _table(title: str, *columns: str, level: float | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(
            column if level is None else column.format(level=f"{100 * level:g} %"),
            justify="left" if not number else "right",
        )
    return table


def _metrics(result: EvalResult) -> Table:
    table = _table("", "metric", "mean", "{level} interval", "n", level=result.level)
    ties = result.metrics.get("rewards/ties") or result.metrics.get("logps/ties") or {}
    for name, metric in result.metrics.items():
        if name in _LABELS:
            _row(table, _LABELS[name], metric, percent=name.endswith("accuracies"))
    if ties.get("mean"):
        _row(table, "ties (count as wrong)", ties, percent=True)
    about = result.calibration
    if about:
        _row(table, "Brier score (0.25 is guessing)", about["brier"])
        _row(table, "log loss (0.693 is guessing)", about["log_loss"])
        table.add_row("calibration error (ECE)", _percent(about["ece"]), "", "")
    if result.kl:
        _row(table, "KL on policy samples, nats", result.kl)
        _row(table, "sampled tokens from the reference's far tail", result.tail_share, percent=True)
    for who in ("model", "reference"):
        if who in result.lengths:
            _row(table, f"tokens per sample, {who}", result.lengths[who]["tokens"])
    return table


def _parts(result: EvalResult) -> Table | None:
    entries = [*result.by_length, *(result.by_source if result.rewardbench is None else [])]
    if not entries:
        return None
    table = _table("Accuracy by length and source", "pairs", "accuracy", "{level} interval", "n", level=result.level)
    for entry in entries:
        _row(table, entry["name"], entry["accuracy"], percent=True)
    return table


def _compare(result: EvalResult) -> Group | None:
    found = result.compare
    if found is None:
        return None
    table = _table(
        f"Against {found['other']}",
        "",
        "model",
        "other",
        "difference",
        "{level} interval",
        "detectable",
        level=result.level,
    )
    for name, title in (("accuracy", "accuracy"), ("margin", "margin")):
        part = found[name]
        form = _percent if name == "accuracy" else _number
        cells = [form(part[side]["mean"]) for side in ("model", "other", "difference")]
        smallest = "" if part["detectable"] is None else form(part["detectable"])
        table.add_row(title, *cells, _interval(part["difference"], form), smallest)
    test = found["mcnemar"]
    line = (
        f"McNemar: {test['only_model']} pairs only the model ranks right, {test['only_other']} only the other; "
        f"p = {test['mid_p']:.3g} (exact {test['exact_p']:.3g}). {found['conclusion']}."
    )
    return Group(table, Text(line))


def _judge(result: EvalResult) -> Table | None:
    found = result.judge
    if found is None:
        return None
    title = f"{found['model']} as judge, against {found['against']}"
    table = _table(title, "metric", "mean", "{level} interval", "n", level=result.level)
    _row(table, "win rate", found["win_rate"], percent=True)
    _row(table, "win rate, length-controlled", found["length_controlled"], percent=True)
    corrected = found.get("corrected")
    if corrected:
        _row(table, f"win rate, corrected by {corrected['labels']:,} human labels", corrected, percent=True)
        _row(table, "judge agrees with people", corrected["agreement"], percent=True)
    for name, title in (("first_wins", "first place wins"), ("consistent", "both orders agree")):
        table.add_row(title, _percent(found["position"][name]), "", "")
    return table


def _bench(result: EvalResult) -> Table | None:
    found = result.rewardbench
    if found is None:
        return None
    table = _table("RewardBench v1", "subset or section", "score", "{level} interval", "n", level=result.level)
    for name, metric in found["subsets"].items():
        _row(table, name, metric, percent=True)
    for name, section in found["sections"].items():
        missing = "" if section["complete"] else f" ({len(section['missing'])} subsets missing)"
        table.add_row(Text(name + missing, style="bold"), _percent(section["score"]), "", "")
    if found["score"] is not None:
        table.add_row(Text("score", style="bold"), _percent(found["score"]), "", "")
    return table


def _sample(sample: Mapping[str, Any]) -> Panel:
    def cut(text: str) -> str:
        # What a model writes is shown, and not obeyed.
        return printable(text if len(text) <= 600 else text[:600] + " ...")

    parts: list[RenderableType] = [Text(cut(str(sample["prompt"])), style="dim")]
    parts += [Text("model", style="bold"), Text(cut(str(sample["completion"])))]
    if sample["reference_completion"] is not None:
        parts += [Text("reference", style="bold"), Text(cut(str(sample["reference_completion"])))]
    return Panel(Group(*parts), title="sample", title_align="left", border_style="dim")


def _row(table: Table, title: str, metric: Mapping[str, Any], *, percent: bool = False) -> None:
    form = _percent if percent else _number
    table.add_row(Text(title), form(metric["mean"]), _interval(metric, form), f"{metric['n']:,}")


def _interval(metric: Mapping[str, Any], form: Any) -> str:
    return f"{form(metric['low'])} to {form(metric['high'])}" if math.isfinite(metric["low"]) else "too few prompts"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "-"


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"
