"""Runs and sweeps are objects of the library: none of them needs the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import SMALL_RUN, world

__all__ = ["world"]

TRAIN = """
import sys
from preftune.config import split_command_line
from preftune.runs.run import Run, build_trainer, train
from preftune.runs.settings import read_settings, settings_classes

argv = sys.argv[1:]
this = Run("dpo", tuple(argv), read_settings("dpo", split_command_line(argv)))
this.complete()
trainer, splits = build_trainer(this, settings_classes("dpo")[1])
assert train(this, trainer, trainer.plan(), splits)
assert not [name for name in sys.modules if name.startswith("preftune.cli")]
"""

SWEEP = """
import sys
from pathlib import Path
from preftune.config import split_command_line
from preftune.sweep.board import Board
from preftune.sweep.options import read_options
from preftune.sweep.result import write_result
from preftune.sweep.run import run_trials
from preftune.sweep.setup import begin
from preftune.sweep.worker import Reporter

options, rest = read_options(split_command_line(sys.argv[1:]))
folder = Path(options.out)
plan, _ = begin(options, rest, folder)
board = Board(plan, folder)
run_trials(plan, folder, board, Reporter())
write_result(plan, board.states(), folder)
assert not [name for name in sys.modules if name.startswith("preftune.cli")]
"""


def flags(**settings: object) -> list[str]:
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def in_python(world: Path, folder: Path, program: str, *argv: str) -> None:
    for name in ("model", "pairs.jsonl"):
        (folder / name).symlink_to(world / name)
    command = [sys.executable, "-c", program, *argv]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_run_trains_without_the_command_line(world: Path, tmp_path: Path) -> None:
    in_python(world, tmp_path, TRAIN, *flags(**SMALL_RUN, output_dir="out", save_strategy="no"))
    for name in ("model.safetensors", "provenance.json", "README.md", "train_results.json"):
        assert (tmp_path / "out" / name).exists(), name


@pytest.mark.slow
def test_a_sweep_runs_its_trials_without_the_command_line(world: Path, tmp_path: Path) -> None:
    own = ("--out", "sweep", "--param", "beta=0.05,0.5", "--num_samples", "0", "--eval_share", "0.25")
    in_python(world, tmp_path, SWEEP, *own, *flags(**SMALL_RUN))
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text(encoding="utf-8"))
    assert [trial["state"] for trial in found["trials"]] == ["complete", "complete"]
    assert (tmp_path / "sweep" / "best.yaml").exists()
