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
    """Run some cases in several processes."""
    done = launched(cases, world, folder, **({"fsdp": True} if engine == "fsdp2" else {}))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_run_goes_on_in_as_many_processes_or_in_others(engine: str, world: worlds.World, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for name, case in given.RESUMED.items():
        given.run(case, world.path, one / name)
    together(given.RESUMED, world, two, engine)
    together(given.resumed(given.RESUMED, two), world, tmp_path / "two-two", engine)
    together(given.resumed(given.RESUMED, one), world, tmp_path / "one-two", engine)
    for name, case in given.resumed(given.RESUMED, two).items():
        assert_same(two / name, tmp_path / "two-two" / name, 0.0)
        given.run(case, world.path, tmp_path / "two-one" / name)
        assert_same(two / name, tmp_path / "two-one" / name, 1e-5)
        assert_same(one / name, tmp_path / "one-two" / name, 1e-5)
