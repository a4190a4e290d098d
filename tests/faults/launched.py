"""Runs as a user starts them, in several processes, one of which is stopped or killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.faults.worlds import digest, timeless

SIGNALS = {"stopped": signal.SIGSTOP, "killed": signal.SIGKILL}
LIMIT = 280.0

_LAUNCH = [
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "-m", "preftune", "dpo"),
]
_FLAGS = [
    *("--per_device_train_batch_size", "2"),
    *("--max_steps", "7"),
    *("--learning_rate", "1e-2"),
    *("--bf16", "false"),
    *("--use_cpu", "true"),
    *("--report_to", "none"),
    *("--disable_dropout", "false"),
    *("--logging_steps", "3"),
    *("--save_steps", "2"),
    *("--max_tokens_per_row", "120"),
    *("--guards", "off"),
]
#: A sweep whose first process gives workers up sooner; 15 s are more than one beat.
_SWEEP = (
    "import sys; from preftune.sweep import liveness; liveness.PATIENCE_HERE_SECONDS = 15.0; "
    "from preftune.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


def _world_flags(world: Path) -> list[str]:
    rows = world / "pairs.jsonl"
    if not rows.exists():
        pairs = json.loads((world / "pairs.json").read_text(encoding="utf-8"))["train"]
        rows.write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    return ["--model_name_or_path", str(world / "model"), "--dataset_name", str(rows)]


@contextmanager
def _started(world: Path, words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PREFTUNE_CACHE": str(world / "launched-cache"),
        "PYTHONPATH": f"{Path(__file__).resolve().parents[2] / 'src'}",
    }
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, *words], env=environment, stdout=file, stderr=subprocess.STDOUT)
    family = psutil.Process(process.pid)
    try:
        yield process
    finally:
        # Whatever a failed trial left behind must not go on.
        for left in [*family.children(recursive=True), family] if family.is_running() else []:
            left.kill()
        process.wait()


def _strike(
    process: subprocess.Popen[bytes], number: signal.Signals | None, ready: Callable[[], Any], which: Any
) -> int:
    """Wait until ``ready``, then signal the descendant that ``which`` picks. Returns the exit code, -99 if it hung."""
    deadline, struck = time.monotonic() + LIMIT, False
    while process.poll() is None and time.monotonic() < deadline:
        if number is not None and not struck and ready():
            for child in psutil.Process(process.pid).children(recursive=True):
                if not struck and which(child):
                    child.send_signal(number)
                    struck = True
        time.sleep(0.1)
    code = process.poll()
    return -99 if code is None else code


def train(world: Path, out: Path, *flags: str, how: str | None = None) -> tuple[int, str]:
    """Train in two processes; the second is struck once a checkpoint is there. Returns exit code and output."""
    words = [*_LAUNCH, *_world_flags(world), "--output_dir", str(out), *_FLAGS, *flags]
    log = out.with_suffix(".log")
    with _started(world, words, log) as process:

        def saved() -> bool:
            return (out / "checkpoint-2").exists()

        def second(child: psutil.Process) -> bool:
            return bool(child.environ().get("RANK") == "1")

        code = _strike(process, SIGNALS[how] if how else None, saved, second)
    return code, log.read_text(encoding="utf-8")


def outcome(out: Path) -> dict[str, Any]:
    """What two runs have to agree in to the bit."""
    names = ("model.safetensors", "checkpoint-7/optimizer.safetensors", "checkpoint-7/rank_state_1.safetensors")
    found: dict[str, Any] = {name: digest(out / name) for name in names if (out / name).exists()}
    state = out / "trainer_state.json"
    if state.exists():
        found["log"] = timeless(json.loads(state.read_text(encoding="utf-8"))["log_history"])
    return found


def sweep(world: Path, out: Path, how: str | None = None) -> tuple[int, str]:
    """A sweep with two workers, one of which is struck. Returns exit code and output."""
    words = ["-c", _SWEEP, "sweep", *_world_flags(world), "--param", "beta=0.05,0.1,0.2,0.4", "--max_steps", "12"]
    words += ["--out", str(out), "--workers", "2", "--report_to", "none", "--use_cpu", "true", "--bf16", "false"]
    log = out.with_suffix(".log")
    with _started(world, [*words, "--save_strategy", "no", "--eval_share", "0.2"], log) as process:

        def begun() -> bool:
            return any((out / "trials").glob("*")) if (out / "trials").exists() else False

        def worker(child: psutil.Process) -> bool:
            return "--as_worker" in child.cmdline()

        code = _strike(process, SIGNALS[how] if how else None, begun, worker)
    return code, log.read_text(encoding="utf-8")


def scores(out: Path) -> dict[str, Any]:
    """Settings, state and figures of every trial of a sweep."""
    path = out / "sweep.json"
    if not path.exists():
        return {}
    trials = json.loads(path.read_text(encoding="utf-8"))["trials"]
    return {
        str(trial["number"]): [
            trial["params"],
            trial["state"],
            {k: v for k, v in trial["metrics"].items() if "runtime" not in k and "per_second" not in k},
        ]
        for trial in trials
    }
