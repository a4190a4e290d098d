"""One bit of the store's file differs, in every table in turn: an entry is missed or found as it was."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tests.references.test_store import W, entries, key_of, value_of

from preftune.errors import PreftuneError
from preftune.references import database
from preftune.references.store import ReferenceStore, StoreWarning

#: All trials together were run once with 4,000.
NUM_TRIALS = int(os.environ.get("PREFTUNE_BIT_FLIPS", "400"))
OTHER = "f" * 32
NUMBERS = range(120)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    with ReferenceStore(folder) as store:
        store.put_many(W, entries(*NUMBERS))
        store.put_many(OTHER, entries(*range(10)))
    connection = sqlite3.connect(folder / database.FILE_NAME)
    connection.execute("PRAGMA journal_mode=delete")
    connection.close()
    return folder


def pages_by_table(file: Path) -> dict[str, list[int]]:
    """Pages of each table and index, and those of none, by SQLite's own account."""
    connection = sqlite3.connect(file)
    (num_pages,) = connection.execute("PRAGMA page_count").fetchone()
    found: dict[str, list[int]] = {}
    for name, page in connection.execute("SELECT name, pageno FROM dbstat"):
        found.setdefault(name, []).append(page)
    connection.close()
    found["(header)"] = [1]
    rest = set(range(1, num_pages + 1)) - {page for pages in found.values() for page in pages}
    return found | ({"(free)": sorted(rest)} if rest else {})


def use(folder: Path, *, strict: bool) -> str:
    """Everything that a run does with a store; returns what came of it."""
    with ReferenceStore(folder, strict=strict) as store:
        found = store.get_many(W, [key_of(number) for number in NUMBERS])
        for key, value in found.items():
            np.testing.assert_array_equal(value, value_of(int.from_bytes(key, "little")))
        store.put_many(W, entries(*NUMBERS, *range(1000, 1010)))
        again = store.get_many(W, [key_of(number) for number in (*NUMBERS, 1005)])
        for key, value in again.items():
            np.testing.assert_array_equal(value, value_of(int.from_bytes(key, "little")))
        store.info()
    return "all found" if len(found) == len(NUMBERS) else "some missed"


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_every_table(sound: Path, tmp_path: Path, strict: bool) -> None:
    draw = random.Random(int(strict))
    size = sound.joinpath(database.FILE_NAME).stat().st_size
    pages = pages_by_table(sound / database.FILE_NAME)
    assert {"weights", "logps", "(header)"} <= set(pages)
    page_size = 4096
    assert size % page_size == 0
    outcomes: Counter[str] = Counter()
    for trial in range(NUM_TRIALS // 2):
        folder = tmp_path / str(trial)
        shutil.copytree(sound, folder)
        file = folder / database.FILE_NAME
        table = sorted(pages)[trial % len(pages)]
        # Where the cells lie, and the header before them; the middle of a page is often empty.
        spot = (draw.choice(pages[table]) - 1) * page_size + draw.choice(
            [draw.randrange(page_size), draw.randrange(120), page_size - 1 - draw.randrange(600)]
        )
        data = bytearray(file.read_bytes())
        data[spot] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        started = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", StoreWarning)
                outcomes[use(folder, strict=strict)] += 1
        except PreftuneError as error:
            if not strict or not str(error).isprintable():
                pytest.fail(f"trial {trial}, {table}, byte {spot}: {error!r}")
            outcomes["one line"] += 1
        except Exception as error:
            if isinstance(error, AssertionError):
                raise
            pytest.fail(f"trial {trial}, {table}, byte {spot}: {type(error).__name__}: {error}")
        assert time.monotonic() - started < 5, (trial, table, spot)
        shutil.rmtree(folder)
    assert outcomes["all found"]
    assert outcomes["some missed"]
    assert not strict or outcomes["one line"]


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_the_store_is_its_owner_s_alone(tmp_path: Path) -> None:
    home = tmp_path / "cache" / "preftune"
    before = os.umask(0o000)
    try:
        with ReferenceStore(home) as store:
            store.put_many(W, entries(1))
            assert {path.name: mode(path) for path in home.iterdir()}.items() >= {
                database.FILE_NAME: 0o600,
                f"{database.FILE_NAME}-wal": 0o600,
                ".references.lock": 0o600,
            }.items()
    finally:
        os.umask(before)
    assert mode(home) == 0o700
    # One that an older version left open to all is closed to all but its group.
    (home / database.FILE_NAME).chmod(0o664)
    with ReferenceStore(home) as store:
        assert_found(store)
    assert mode(home / database.FILE_NAME) == 0o660


def assert_found(store: ReferenceStore) -> None:
    np.testing.assert_array_equal(store.get_many(W, [key_of(1)])[key_of(1)], value_of(1))


def test_a_folder_that_everybody_can_write_to_is_not_used(tmp_path: Path) -> None:
    with ReferenceStore(tmp_path) as store:
        store.put_many(W, entries(1))
    for bits in (0o777, 0o1777, 0o702):
        tmp_path.chmod(bits)
        with pytest.warns(StoreWarning, match="All users of this machine can write"):
            store = ReferenceStore(tmp_path)
        assert store.get_many(W, [key_of(1)]) == {}
        assert store.info().mode == "memory"
    tmp_path.chmod(0o770)
    with ReferenceStore(tmp_path) as store:
        assert_found(store)


def test_a_lock_that_is_a_link_creates_nothing(tmp_path: Path) -> None:
    for name in (".references.lock", database.FILE_NAME):
        folder = tmp_path / name.strip(".")
        folder.mkdir()
        (folder / name).symlink_to(tmp_path / f"created by {name}")
    with ReferenceStore(tmp_path / "references.lock") as store:
        store.put_many(W, entries(1))
    assert not list(tmp_path.glob("created by .ref*"))
