"""DeepSpeed's ZeRO-1, ZeRO-2 and ZeRO-3 end with one process's weights, and go on from their checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import cases as given
from tests.distributed.test_equality import assert_as_one_process, assert_same
from tests.parity import worlds

pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("ignore")]

CASES: dict[str, given.Case] = {
    **given.UNEVEN,
    **{name: given.EVEN[name] for name in ("lora-stored", "short-rows", "given", "given-synced")},
    # Gradients near zero, of which Adam would make much: a larger epsilon than the gradients' rounding.
    "uneven-sft": ("SFT", 51, {"num_train_epochs": 2, "gradient_accumulation_steps": 3, "adam_epsilon": 1e-6}),
    **{name: given.SHARDED[name] for name in ("tied", "checkpointing")},
    **{name: given.SAMPLED[name] for name in ("sampled", "sampled-given", "sampled-synced", "sampled-orpo")},
    "lora-head": ("DPO", 37, {"num_train_epochs": 2, "reference_store": False, "lora": True, "adapts_head": True}),
    "trained-head": ("DPO", 37, {"num_train_epochs": 2, "reference_store": False, "lora": True, "trains_head": True}),
}
_FEW = ("uneven", "uneven-live", "uneven-lora", "short-rows", "uneven-synced", "given-synced")
#: Every parameter in shards: without it all those of a tiny model would stay whole.
_SHARDED: dict[str, Any] = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 2000}
_CPU = {"device": "cpu"}
#: ``{name: (zero_optimization, whether DeepSpeed's optimizer for the CPU computes, cases)}``
ENGINES: dict[str, tuple[dict[str, Any], bool, tuple[str, ...]]] = {
    "zero1": ({"stage": 1}, False, tuple(CASES)),
    "zero2": ({"stage": 2}, False, tuple(CASES)),
    "zero3": ({"stage": 3, **_SHARDED}, False, tuple(CASES)),
    "zero3-partly-whole": ({"stage": 3, "stage3_param_persistence_threshold": 100}, False, _FEW),
    "zero2-offload": ({"stage": 2, "offload_optimizer": _CPU}, True, _FEW),
    "zero3-offload": ({"stage": 3, **_SHARDED, "offload_optimizer": _CPU, "offload_param": _CPU}, True, _FEW),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process runs the cases, once for all engines."""
    return tmp_path_factory.mktemp("one")


def deepspeed(engine: str) -> dict[str, Any]:
    """DeepSpeed's configuration of an engine."""
    zero, own, _ = ENGINES[engine]
    batches = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {**dict.fromkeys(batches, "auto"), "zero_optimization": zero, "zero_force_ds_cpu_optimizer": own}


def launched(cases: dict[str, given.Case], world: worlds.World, folder: Path, engine: str) -> None:
    """Run some cases in several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(given.PROCESSES)]
    command += ["-m", "tests.distributed.cases"]
    done = subprocess.run(
        [*command, world.path, str(folder), json.dumps(cases), json.dumps({"deepspeed": deepspeed(engine)})],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PREFTUNE_CACHE": str(folder / "cache")},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("engine", ENGINES)
def test_zero_ends_with_one_processs_weights(engine: str, world: worlds.World, alone: Path, tmp_path: Path) -> None:
    cases = {name: CASES[name] for name in ENGINES[engine][2]}
    launched(cases, world, tmp_path / "two", engine)
    for name, case in cases.items():
        print(name)
        found = json.loads((tmp_path / "two" / name / "found-0.json").read_text(encoding="utf-8"))
        assert found["wrapper"] == "DeepSpeedEngine"
        assert not engine.startswith("zero3") or not found.get("whole")
        assert_as_one_process(case, world, alone / name, tmp_path / "two" / name)


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "zero3-offload"])
def test_a_run_goes_on_to_the_bit(engine: str, world: worlds.World, tmp_path: Path) -> None:
    launched(given.RESUMED, world, tmp_path / "two", engine)
    launched(given.resumed(given.RESUMED, tmp_path / "two"), world, tmp_path / "again", engine)
    for name in given.RESUMED:
        assert_same(tmp_path / "two" / name, tmp_path / "again" / name, 0.0)
