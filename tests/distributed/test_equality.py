"""Several processes end with one process's weights: sharded parameters, and rows that do not divide by them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import cases as given
from tests.parity import worlds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # PEFT, of an adapter of the head.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]

SHARDED = {**given.EVEN, **given.UNEVEN, **given.SHARDED, **given.SAMPLED}
PLAIN = {**given.UNEVEN, **given.ORDERS, "sampled": given.SAMPLED["sampled"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process runs the cases, once for all engines."""
    return tmp_path_factory.mktemp("one")


def launched(cases: dict[str, given.Case], world: worlds.World, folder: Path, **more: Any) -> Any:
    """Run some cases in several processes."""
    command = [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(given.PROCESSES), "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "tests.distributed.cases",
    ]  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", *command, world.path, str(folder), json.dumps(cases), json.dumps(more)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PREFTUNE_CACHE": str(folder / "cache")},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


def assert_same(one: Path, two: Path, tolerance: float) -> None:
    """Two folders hold the same weights."""
    mine, others = given.saved(one), given.saved(two)
    assert set(mine) == set(others)
    for name, value in mine.items():
        assert float((others[name] - value).norm()) <= tolerance * float(value.norm()), name


def assert_same_samples(one: Path, two: Path) -> None:
    """Two runs have drawn the same texts, which their models find as likely."""
    mine, theirs = ((each / "samples.jsonl").read_text(encoding="utf-8").splitlines() for each in (one, two))
    assert len(mine) == len(theirs) == 20
    for known, found in zip(map(json.loads, mine), map(json.loads, theirs), strict=True):
        scores = {key: pytest.approx(known[key], abs=1e-4) for key in ("logp", "ref_logp", "tail_share")}
        assert found == {**known, **scores}
    # They differ from step to step, so that they tell of the policy.
    assert len({(line["prompt"], line["completion"]) for line in map(json.loads, mine)}) > 5


def assert_as_one_process(case: given.Case, world: worlds.World, folder: Path, together: Path) -> None:
    """One process, which runs where it has not yet, ends with the same weights, losses and evaluation."""
    if not (folder / "found-0.json").exists():
        given.run(case, world.path, folder)
    assert_same(folder, together, 1e-5)
    if "generation_steps" in case[2]:
        assert_same_samples(folder, together)
    alone = json.loads((folder / "found-0.json").read_text(encoding="utf-8"))
    for rank in range(given.PROCESSES):
        found = json.loads((together / f"found-{rank}.json").read_text(encoding="utf-8"))
        assert found["eval"] == {name: pytest.approx(v, rel=1e-4, abs=1e-5) for name, v in alone["eval"].items()}
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4, abs=1e-6)


# One test for all cases of an engine: they share a start of the processes, and workers would each start their own.


@pytest.mark.parametrize(("cases", "engine"), [(SHARDED, "fsdp2"), (PLAIN, "ddp")], ids=["fsdp2", "ddp"])
def test_several_processes_end_with_one_processs_weights(
    cases: dict[str, given.Case], engine: str, world: worlds.World, alone: Path, tmp_path: Path
) -> None:
    done = launched(cases, world, tmp_path / "two", **({"fsdp": True} if engine == "fsdp2" else {}))
    assert done.returncode == 0, done.stderr[-3000:]
    if engine == "fsdp2":
        assert done.stderr.count("fsdp_cpu_ram_efficient_loading has no effect") == 1
    for name, case in cases.items():
        print(name)
        assert_as_one_process(case, world, alone / name, tmp_path / "two" / name)
        follows = case[2].get("sync_ref_model") and not case[2].get("given")
        refused = json.loads((tmp_path / "two" / name / "found-0.json").read_text(encoding="utf-8"))["refused"]
        assert ("in shards" in (refused or "")) is (engine == "fsdp2" and bool(follows))
