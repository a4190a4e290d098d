"""What FSDP2 has beside equal weights in fp32: half precision, and what a process holds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import cases as given
from tests.distributed.test_equality import launched
from tests.parity import worlds

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def folder(world: worlds.World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have run all cases; they share a start."""
    made = tmp_path_factory.mktemp("two")
    done = launched({**given.HALF, **given.COUNTED}, world, made, fsdp=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


def found(folder: Path, rank: int = 0) -> Any:
    return json.loads((folder / f"found-{rank}.json").read_text(encoding="utf-8"))


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all weights."""
    return math.sqrt(sum(float((one[name].double() - two[name].double()).norm() ** 2) for name in one))


@pytest.mark.parametrize("name", given.HALF)
def test_half_precision_is_as_near_to_fp32_as_in_one_process(
    name: str, world: worlds.World, folder: Path, tmp_path: Path
) -> None:
    kind, rows, settings = given.HALF[name]
    given.run((kind, rows, settings), world.path, tmp_path / "half")
    whole = {key: value for key, value in settings.items() if key not in ("bf16", "model_init_kwargs")}
    given.run((kind, rows, whole), world.path, tmp_path / "whole")
    one, two, exact = (given.saved(each) for each in (tmp_path / "half", folder / name, tmp_path / "whole"))
    assert {key: value.dtype for key, value in one.items()} == {key: value.dtype for key, value in two.items()}
    assert distance(two, exact) <= 1.3 * distance(one, exact)
    # Policy and reference begin as the same numbers.
    assert found(folder / name)["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert found(folder / name)["losses"] == found(folder / name, 1)["losses"]


@pytest.mark.parametrize("name", given.COUNTED)
def test_no_process_holds_more_than_its_shard(name: str, world: worlds.World, folder: Path, tmp_path: Path) -> None:
    """Weights, optimizer state and reference, counted over all tensors of a process after each step."""
    given.run(given.COUNTED[name], world.path, tmp_path)
    (whole,) = found(tmp_path)["held"]
    for rank in range(given.PROCESSES):
        (part,) = found(folder / name, rank)["held"]
        assert part <= (1 / given.PROCESSES + 0.02) * whole
