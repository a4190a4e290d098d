"""The summary before training."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from preftune.cli.panel import memory, saved, summary
from preftune.data import PrepareReport
from preftune.runs.records import data_lines
from preftune.terminal.units import count, duration, plural, share, size
from preftune.training.plan import MemoryEstimate, TrainingPlan

GIB = 1 << 30

PLAN = TrainingPlan(
    method="sigmoid",
    model="org/[bold]model",
    num_parameters=2_000_000,
    num_trainable_parameters=500_000,
    num_pairs=90,
    pairs_per_step=8,
    num_steps=1234,
    num_prompt_tokens=3_000,
    num_completion_tokens=4_000,
    num_packed_tokens=7_000,
    num_padded_tokens=20_000,
    max_tokens_per_row=4096,
    path="packed",
    backend="cpu",
    backend_reason="passes the probe",
    reference="from the store",
    memory=MemoryEstimate(weights=GIB, activations=GIB, available=GIB),
    data={
        "train": PrepareReport(
            "train", "hh", 100, 90, dropped={"completion_empty": 10}, num_truncated=3, warnings=("w1",)
        )
    },
    notes=("n1",),
)


def text_of(
    width: int = 200, paired: bool = True, notes: tuple[str, ...] = (), plan: TrainingPlan = PLAN, verb: str = "dpo"
) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(summary(plan, paired=paired, output_dir="out/x", verb=verb, notes=notes))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_everything_is_said() -> None:
    shown = text_of(notes=("torch_dtype -> dtype",))
    for words in (
        "org/[bold]model: 2.0 M parameters, 25.0 % of them trained",
        "train: 90 of 100 rows (hh); dropped: completion empty 10; 3 truncated",
        "3,000 in prompts, 4,000 in completions",
        "7,000 tokens instead of 20.0 k: 15.0 % are prompts that the two answers share, ",
        "50.0 % of the padded tokens were padding",
        "1,234 steps of 8 pairs",
        "packed, cpu: passes the probe",
        "from the store",
        "about 2.0 GiB (weights 1.0 GiB, activations 1.0 GiB) of 1.0 GiB; it may not be enough",
        "out/x",
        "- train: w1",
        "- torch_dtype -> dtype",
        "- n1",
    ):
        assert words in shown, words


def test_examples_share_no_prompt_and_need_no_reference() -> None:
    shown = text_of(paired=False, verb="sft", plan=dataclasses.replace(PLAN, method="nll", reference="none"))
    assert "preftune sft: nll" in shown
    assert "65.0 % of the padded tokens were padding" in shown
    assert "share" not in shown.replace("shared", "")
    assert "reference" not in shown
    assert "steps of 8 examples" in shown


@pytest.mark.parametrize("width", [40, 80])
def test_narrow_terminals_lose_nothing(width: int) -> None:
    lines = text_of(width).splitlines()
    assert all(len(line) <= width for line in lines)
    assert "1,234" in " ".join(lines)


def test_the_padded_path_saves_nothing() -> None:
    assert saved(dataclasses.replace(PLAN, path="padded"), paired=True).startswith("none; 20.0 k tokens")


def test_reports_may_be_mappings() -> None:
    report = PLAN.data["train"]
    assert data_lines({"train": report.to_json()}) == data_lines({"train": report})


def test_unknown_memory_is_called_so() -> None:
    assert memory(MemoryEstimate()) == "unknown"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (duration(45.4), "45 s"),
        (duration(200), "3 min 20 s"),
        (duration(7500), "2 h 05 min"),
        (duration(-1), "0 s"),
        (size(512), "512 B"),
        (size(1536), "1.5 KiB"),
        (size(300 * GIB), "300 GiB"),
        (size(5000 * GIB), "4.9 TiB"),
        (count(9_999), "9,999"),
        (count(18_700_000), "18.7 M"),
        (count(7e9), "7.0 B"),
        (share(1, 0), "0 %"),
        (share(1, 8), "12.5 %"),
        (plural(1, "pair"), "1 pair"),
        (plural(1200, "pair"), "1,200 pairs"),
    ],
)
def test_numbers(shown: str, expected: str) -> None:
    assert shown == expected
