"""What a terminal of 80 and of 120 columns shows, kept as text to be looked at.

``PREFTUNE_WRITE_SCREENS=1 pytest tests/cli/test_screens.py`` writes the files anew.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from preftune.cli.help import help_of
from preftune.cli.help_table import sections_of_verb
from preftune.cli.panel import summary
from preftune.evaluation.result import EvalResult
from preftune.evaluation.table import show as show_evaluation
from preftune.terminal.bar import Bar
from tests.cli.test_panel import PLAN

SCREENS = Path(__file__).with_name("screens")


def metric(mean: float, low: float, high: float, n: int = 48) -> Any:
    return {"mean": mean, "low": low, "high": high, "n": n}


def evaluation() -> EvalResult:
    return EvalResult(
        model="out/tuned",
        ref_model="out/tuned without its adapter",
        dataset="pairs.jsonl",
        num_pairs=48,
        num_prompts=48,
        reward="beta * (log p(answer | prompt) - log ref(answer | prompt))",
        beta=0.1,
        metrics={
            "rewards/accuracies": metric(0.729, 0.59, 0.834),
            "rewards/margins": metric(0.123, 0.05, 0.2),
            "rewards/ties": metric(0.02, 0.0, 0.1),
            "logps/accuracies": metric(0.5, 0.36, 0.64),
        },
        calibration={"brier": metric(0.22, 0.2, 0.24), "log_loss": metric(0.63, 0.6, 0.66), "ece": 0.05},
        kl=metric(1.25, 0.9, 1.6, 16),
        tail_share=metric(0.004, 0.001, 0.01, 16),
        lengths={name: {"tokens": metric(45.0, 38.0, 52.0, 16)} for name in ("model", "reference")},
        samples=[
            {
                "prompt": "Why is the sky blue?",
                "completion": "Because blue light is scattered more than red light. " * 3,
                "reference_completion": "It is.",
            }
        ],
        notes=["beta 0.1 as in training (out/tuned/provenance.json)"],
    )


def sweep() -> dict[str, Any]:
    trials = [
        {
            "number": number,
            "params": {"beta": beta, "learning_rate": 5e-6},
            "state": "complete",
            "metrics": {
                "eval_rewards/margins_per_token": metric(0.00013 * number, -8.28e-05, 0.00013 * number + 4.08e-04),
                "eval_rewards/accuracies": metric(0.5 + 0.05 * number, 0.4, 0.7),
                "train_loss": {"mean": 0.69, "low": None, "high": None, "n": 0},
            },
            "left_reference": number == 0,
            "tied_with_best": number == 1,
        }
        for number, beta in enumerate((0.05, 0.1, 0.3))
    ]
    return {
        "method": "sigmoid",
        "metric": "eval_rewards/margins_per_token",
        "params": {"beta": {}, "learning_rate": {}},
        "trials": trials,
        "best": {"number": 2, "highest_mean": 2},
    }


def bar(console: Console) -> None:
    shown = Bar("training", 350, 120)
    shown.left, shown.figures = "3 min 20 s", ["loss 0.6931"]
    console.print(shown)


def of_sweep(console: Console) -> None:
    from preftune.sweep.view import table

    console.print(table(sweep()))


def of_help(console: Console) -> None:
    lines = help_of("dpo", sections_of_verb("dpo")).split("\n")
    console.print("\n".join(lines[:48]), markup=False, highlight=False, soft_wrap=True)


def of_run_help(console: Console) -> None:
    from preftune.cli.run import help_text

    console.print(help_text(), markup=False, highlight=False, soft_wrap=True)


def of_advise(console: Console) -> None:
    """Of a model, data and a machine that are not at hand, so that it is the same everywhere."""
    from preftune.advice.inputs import Known, advise_on
    from preftune.advice.terminal import show
    from preftune.config import split_command_line
    from preftune.runs.settings import read_settings

    settings = read_settings("dpo", split_command_line(["--learning_rate", "5e-5", "--beta", "0.9"]))
    advice, notes = advise_on("dpo", settings, Known("a100-80g", 7e9, 60_000, 0.1, None))
    show(console, advice, [*settings.notes, *notes], following="preftune advise --write advised.yaml")


DRAW: dict[str, Callable[[Console], None]] = {
    "bar": bar,
    "plan": lambda console: console.print(summary(PLAN, paired=True, output_dir="out/tuned", verb="dpo")),
    "eval": lambda console: show_evaluation(evaluation(), console),
    "sweep": of_sweep,
    "advise": of_advise,
    "help-dpo": of_help,
    "help-run": of_run_help,
}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", DRAW)
def test_screen(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    DRAW[name](console)
    assert isinstance(console.file, io.StringIO)
    text = "\n".join(line.rstrip() for line in console.file.getvalue().split("\n"))
    file = SCREENS / f"{name}-{width}.txt"
    if os.environ.get("PREFTUNE_WRITE_SCREENS"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")
    # Sentences may be longer: a terminal breaks them itself, and a pipe keeps them whole.
    drawn = [line for line in text.split("\n") if set("│╭╰━┃┏└┌─") & set(line)]
    assert all(len(line) <= width for line in drawn)


def test_numbers_of_the_table_of_a_sweep_stay_whole() -> None:
    text = (SCREENS / "sweep-80.txt").read_text(encoding="utf-8")
    assert text.count("[-8.28e-05,") == 3
    assert all(each in text.split() for each in ("0.00013", "0.000408]", "0.000538]", "0.00026", "0.000668]"))
    assert "sweet spot" in text
