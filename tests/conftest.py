"""One thread per worker, no network, and a reference store of its own for every test session."""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from pathlib import Path

import pytest
from hypothesis import settings

from tests.own_rows import write_files

# Before anything imports torch, datasets or huggingface_hub, which read these once.
_CACHES = tempfile.mkdtemp(prefix="preftune-tests-")
os.environ["PREFTUNE_CACHE"] = os.path.join(_CACHES, "preftune")
os.environ["HF_DATASETS_CACHE"] = os.path.join(_CACHES, "datasets")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

# A busy machine is no defect: examples are bounded by number, not by the clock.
settings.register_profile("preftune", deadline=None)
settings.load_profile("preftune")


#: Folders whose tests are all left to the slow tier: a real browser, runs that are killed, a pretrained model.
_SLOW_FOLDERS = {"browser", "faults", "real"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a run take a part of the tests, so that several runs take all of them."""
    parser.addoption("--part", default="1/1", help="K/N: of the tests, the K-th of N parts (the first is 1)")


def in_part(nodeid: str, part: str) -> bool:
    """Whether a test belongs to a part; all parameter sets of a test belong to the same."""
    number, of = map(int, part.split("/"))
    assert 1 <= number <= of, f"--part {part}: K/N with K from 1 to N"
    return zlib.crc32(nodeid.partition("[")[0].encode()) % of == number - 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave all but some parameter sets of a test marked ``thin`` to the slow tier: the first, the last, even steps."""
    groups: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if _SLOW_FOLDERS & set(item.path.relative_to(item.config.rootpath).parts):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("thin") and not item.get_closest_marker("slow"):
            groups.setdefault((item.path, item.nodeid.partition("[")[0]), []).append(item)
    for group in groups.values():
        marker = group[0].get_closest_marker("thin")
        assert marker is not None
        (kept,) = marker.args
        places = {round(n * (len(group) - 1) / max(kept - 1, 1)) for n in range(kept)}
        for place, item in enumerate(group):
            if place not in places:
                item.add_marker(pytest.mark.slow)
    part = config.getoption("--part")
    others = [item for item in items if not in_part(item.nodeid, part)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if in_part(item.nodeid, part)]


def pytest_unconfigure() -> None:
    """Remove the caches that this process made."""
    shutil.rmtree(_CACHES, ignore_errors=True)


#: Published preference files beside the checkout; without them the tests run on rows of their own alone.
PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "data"
_SOURCES = [
    "own",
    *([pytest.param("published", marks=pytest.mark.slow)] if PUBLISHED.is_dir() else []),
]


@pytest.fixture(scope="session", params=_SOURCES)
def preference_files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the two files of :mod:`tests.own_rows`: the tests' own, and the published ones where they are."""
    if request.param == "published":
        return PUBLISHED
    return write_files(tmp_path_factory.mktemp("preference-files"))
