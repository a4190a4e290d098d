"""A stream that is larger than memory is trained on in flat memory, and gone on with in its middle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.parity import worlds
from tests.training import endless

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and measured by the Linux kernel"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


def run(world: worlds.World, out: Path, how: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.training.endless", world.path, str(out), how, *more]
    # Fewer arenas: what the C library keeps for later is no growth.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    root = Path(__file__).parents[2]
    return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=900, check=False)


def test_a_stream_larger_than_memory(world: worlds.World, tmp_path: Path) -> None:
    assert endless.ROWS * endless.STEPS * endless.BYTES > 1.5 * endless.ROOM
    # The limit holds: the same rows do not fit.
    assert run(world, tmp_path / "loaded", "loaded").returncode != 0
    whole = run(world, tmp_path / "whole", "stream")
    assert whole.returncode == 0, whole.stderr[-3000:]
    seen = json.loads((tmp_path / "whole" / "memory.json").read_text(encoding="utf-8"))
    assert len(seen) == endless.STEPS
    early, late = max(seen[: endless.STEPS // 2]), max(seen[endless.STEPS // 2 :])
    print(f"resident memory: {early / 2**20:.0f} MiB in the first half of the run, {late / 2**20:.0f} in the second")
    # The second half reads 300 MB.
    assert late < early + 16 * 2**20
    checkpoint = str(tmp_path / "whole" / "checkpoint-150")
    again = run(world, tmp_path / "again", "stream", checkpoint)
    assert again.returncode == 0, again.stderr[-3000:]
    assert len(json.loads((tmp_path / "again" / "memory.json").read_text(encoding="utf-8"))) == endless.STEPS - 150
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
