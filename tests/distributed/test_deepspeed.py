"""DeepSpeed's ZeRO-1 and ZeRO-2 end with one process's weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import cases as given
from tests.distributed.test_equality import assert_same
from tests.parity import worlds

_CASES = ("uneven", "uneven-live", "uneven-lora", "uneven-kto", "uneven-orpo")
pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_ends_with_one_processs_weights(stage: int, tmp_path: Path) -> None:
    cases = {name: given.UNEVEN[name] for name in _CASES}
    world = worlds.World(tmp_path / "world")
    batches = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    settings = {
        **dict.fromkeys(batches, "auto"),
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    launch = ["torch.distributed.run", "--nproc_per_node", str(given.PROCESSES), "-m", "tests.distributed.cases"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, world.path, str(tmp_path), json.dumps(cases),
         json.dumps({"deepspeed": settings})],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PREFTUNE_CACHE": str(tmp_path / "cache")},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, case in cases.items():
        given.run(case, world.path, tmp_path / "one" / name)
        assert_same(tmp_path / "one" / name, tmp_path / name, 1e-5)
