"""A killed training process is named, with its reason; the others end, and the run goes on from its checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from preftune.errors import SetupError
from tests.distributed.cases import PROCESSES
from tests.parity import worlds

pytestmark = [pytest.mark.slow]
#: All ten instants where the whole fault suite is asked for, one otherwise.
_INSTANTS = range(10) if os.environ.get("PREFTUNE_FAULTS") == "full" else range(1)
_STEPS = 40


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    made = worlds.World(tmp_path_factory.mktemp("world"))
    lines = [json.dumps(row) for row in worlds.pair_rows(37)]
    Path(made.path, "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return made


def started(world: worlds.World, out: Path, *more: str) -> subprocess.Popen[str]:
    """Several processes, as the command line starts them."""
    flags = (
        f"--model_name_or_path {world.path} --dataset_name {world.path}/rows.jsonl --output_dir {out} --bf16 false "
        f"--use_cpu true --report_to none --max_steps {_STEPS} --save_steps 5 --logging_steps 1 --learning_rate 1e-3 "
        f"--per_device_train_batch_size {4 // PROCESSES} --reference_store false --max_length 128 --generation_steps 0"
    ).split()
    return subprocess.Popen(
        [sys.executable, "-m", "preftune", "dpo", "--num_processes", str(PROCESSES), *flags, *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def steps_done(out: Path) -> int:
    try:
        lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(world: worlds.World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run = started(world, out)
    _, said = run.communicate(timeout=280)
    assert run.returncode == 0, said[-3000:]
    return out


def victim_of(run: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The process of a rank."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for child in psutil.Process(run.pid).children():
            with contextlib.suppress(psutil.Error):
                if child.environ().get("RANK") == str(rank):
                    return child
        time.sleep(0.02)
    raise AssertionError("the processes do not start")


def assert_named(run: subprocess.Popen[str], rank: int, victim: psutil.Process) -> str:
    """A process that is killed now is named in time; the others end."""
    children = psutil.Process(run.pid).children()
    began = time.monotonic()
    victim.kill()
    _, said = run.communicate(timeout=60)
    assert time.monotonic() - began < 15
    assert run.returncode == SetupError.exit_code
    assert f"process {rank} of {PROCESSES} (pid {victim.pid}) was ended by SIGKILL" in said
    assert "Traceback" not in said
    assert not any(child.is_running() for child in children)
    return said


@pytest.mark.parametrize("rank", range(PROCESSES))
@pytest.mark.parametrize("instant", _INSTANTS)
def test_a_killed_process_is_named_and_the_run_goes_on(
    instant: int, rank: int, world: worlds.World, undisturbed: Path, tmp_path: Path
) -> None:
    draw = random.Random(100 * rank + instant)
    step, out = draw.randint(6, _STEPS - 4), tmp_path / "out"
    run = started(world, out)
    end = time.monotonic() + 200
    while steps_done(out) < step:
        assert run.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(draw.random() * 0.1)
    victim = victim_of(run, rank)
    said = assert_named(run, rank, victim)
    # The survivor says whom it misses, and ends by itself.
    assert f"training process {rank} (pid {victim.pid}) has gone" in said
    again = started(world, out, "--resume_from_checkpoint", "true")
    _, said = again.communicate(timeout=280)
    assert again.returncode == 0, said[-3000:]
    one, two = weights(undisturbed), weights(out)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("rank", range(PROCESSES))
@pytest.mark.parametrize("instant", _INSTANTS)
def test_one_that_is_killed_before_it_trains_is_named_too(
    instant: int, rank: int, world: worlds.World, tmp_path: Path
) -> None:
    """While libraries or the model are loaded, the processes find each other, or the reference is scored."""
    run = started(world, tmp_path / "out", "--reference_store", "true")
    victim = victim_of(run, rank)
    time.sleep(random.Random(100 * rank + instant).uniform(0, 8))
    assert_named(run, rank, victim)
