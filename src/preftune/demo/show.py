"""What the demo prints: stages as they pass, a table, samples, where the files lie."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_TITLE = "Fresh prompts, 95 % intervals; accuracy of the implicit reward on held-out pairs"


class Stage:
    """One stage in progress; `tell` moves its bar, `result` is what its line says in the end."""

    def __init__(self, bar: Progress, task: Any) -> None:
        self.result = ""
        self._bar = bar
        self._task = task

    def tell(self, done: int, total: int) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=done, total=total)


class Account:
    """Prints the demo's stages and keeps their times.

    Args:
        console: Where to.

    Attributes:
        seconds: Wall time by stage.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, key: str, title: str) -> Iterator[Stage]:
        """Shows a bar while the stage lasts and one line of outcome afterwards.

        Args:
            key: Name of the stage in `seconds`.
            title: Name on the screen.
        """
        started = time.perf_counter()
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<26}"),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        # In a file or a log a bar would only leave debris.
        hidden = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=hidden) as bar:
            stage = Stage(bar, bar.add_task(title, total=None))
            yield stage
        self.seconds[key] = round(time.perf_counter() - started, 2)
        line = Text.assemble(("✓ ", "green"), f"{title:<26}", (f"{self.seconds[key]:6.1f} s   ", "dim"), stage.result)
        self.console.print(line, soft_wrap=True)


def scores_table(results: dict[str, Any]) -> Table:
    """Scores of the SFT model and of each beta, the headline beta in bold; fits 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.title, table.title_justify, table.title_style = _TITLE, "left", "dim"
    table.add_column("model")
    for name in ("true reward", "KL, nats", "accuracy, %", "grammar", "tokens"):
        table.add_column(name, justify="right")
    table.add_row("SFT", *_cells(results["sft"]))
    for run in results["betas"]:
        style = "bold green" if run["beta"] == results["dpo"]["beta"] else ""
        table.add_row(f"beta {run['beta']:g}", *_cells(run), style=style)
    return table


def samples_table(samples: list[dict[str, Any]]) -> Table:
    """Completions before and after, side by side, each with its true reward."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True)
    table.add_column("prompt", ratio=2, style="cyan")
    table.add_column("before (SFT)", ratio=3)
    table.add_column("after (DPO)", ratio=3)
    for sample in samples:
        before, after = (
            Text.assemble((f"{sample[side]['reward']:.2f} ", "bold"), sample[side]["completion"].strip())
            for side in ("before", "after")
        )
        table.add_row(Text(sample["prompt"]), before, after)
    return table


def verdict(results: dict[str, Any], out: Path) -> Panel:
    """Whether the reward rose by more than its interval, by how much, and where everything lies."""
    rise = results["rise"]
    headline = (
        f"The true reward rose by {rise['mean']:.3f} (95 % interval {rise['low']:.3f} to {rise['high']:.3f}) "
        f"at beta {results['dpo']['beta']:g}."
        if results["risen"]
        else f"The true reward did NOT rise by more than its interval at beta {results['dpo']['beta']:g}."
    )
    lines = Text(headline, style="bold green" if results["risen"] else "bold red")
    for names, what in (
        ("demo.json", "all numbers, settings, versions"),
        ("reward_kl.png", "true reward against KL, one point per beta"),
        ("samples.md", f"{results['num_side_by_side']} completions before and after, side by side"),
        ("pairs.jsonl", "preference pairs with their true rewards"),
        ("sft, dpo_beta_*", "the models, each with its tokenizer"),
    ):
        lines.append(f"\n  {names:<17}", style="not bold default")
        lines.append(what, style="not bold dim")
    return Panel(lines, box=box.ROUNDED, expand=False, subtitle=f"in {out}", subtitle_align="left")


def _cells(scores: dict[str, Any]) -> tuple[str, ...]:
    reward, kl, accuracy = scores["reward"], scores["kl_interval"], scores["accuracy_interval"]
    return (
        f"{reward['mean']:.3f} [{reward['low']:.3f}, {reward['high']:.3f}]",
        f"{scores['kl']:.2f} [{kl['low']:.1f}, {kl['high']:.1f}]",
        f"{100 * scores['accuracy']:.0f} [{100 * accuracy['low']:.0f}, {100 * accuracy['high']:.0f}]",
        f"{100 * scores['grammatical']:.0f} %",
        f"{scores['length']:.0f}",
    )
