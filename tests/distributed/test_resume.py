"""A run goes on from its checkpoint, in as many processes as before or in others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import cases as given
from tests.distributed.test_equality import assert_same, launched
from tests.parity import worlds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:resuming with changes"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


def together(cases: dict[str, given.Case], world: worlds.World, folder: Path, engine: str) -> None:
    """Run some cases in two processes."""
    done = launched(cases, world, folder, **({"fsdp": True} if engine == "fsdp2" else {}))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def engine(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture(scope="module")
def one(world: worlds.World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process left."""
    folder = tmp_path_factory.mktemp("one")
    for name, case in given.RESUMED.items():
        given.run(case, world.path, folder / name)
    return folder


@pytest.fixture(scope="module")
def two(engine: str, world: worlds.World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    folder = tmp_path_factory.mktemp(f"two-{engine}")
    together(given.RESUMED, world, folder, engine)
    return folder


def test_two_processes_go_on_to_the_bit(engine: str, world: worlds.World, two: Path, tmp_path: Path) -> None:
    together(given.resumed(given.RESUMED, two), world, tmp_path, engine)
    for name in given.RESUMED:
        assert_same(two / name, tmp_path / name, 0.0)


def test_one_process_goes_on_for_two(two: Path, world: worlds.World, tmp_path: Path) -> None:
    for name, case in given.resumed(given.RESUMED, two).items():
        given.run(case, world.path, tmp_path / name)
        assert_same(two / name, tmp_path / name, 1e-5)


def test_two_processes_go_on_for_one(engine: str, one: Path, world: worlds.World, tmp_path: Path) -> None:
    together(given.resumed(given.RESUMED, one), world, tmp_path, engine)
    for name in given.RESUMED:
        assert_same(one / name, tmp_path / name, 1e-5)
