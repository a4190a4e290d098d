"""The reference store: what is found again, what never is, and what happens when the disk misbehaves."""

from __future__ import annotations

import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from preftune.errors import DataError, StoreError
from preftune.references import database
from preftune.references.store import ReferenceStore, StoreWarning, cache_home

W = "0123456789abcdef0123456789abcdef"
SRC = Path(__file__).resolve().parents[2] / "src"


def value_of(number: int) -> npt.NDArray[np.float32]:
    """Return the value that belongs to a key, recomputable by any process."""
    return -np.random.default_rng(number).random(1 + number % 50, dtype=np.float32)


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "little")


def entries(*numbers: int) -> dict[bytes, npt.NDArray[np.float32]]:
    return {key_of(number): value_of(number) for number in numbers}


def assert_holds(store: ReferenceStore, numbers: range, weights_key: str = W) -> None:
    found = store.get_many(weights_key, [key_of(number) for number in numbers])
    assert found.keys() == {key_of(number) for number in numbers}
    for number in numbers:
        np.testing.assert_array_equal(found[key_of(number)], value_of(number))


def opened_with_warning(folder: Path, match: str) -> ReferenceStore:
    with pytest.warns(StoreWarning, match=match):
        return ReferenceStore(folder)


def integrity(folder: Path) -> list[tuple[str, ...]]:
    connection = sqlite3.connect(folder / database.FILE_NAME)
    try:
        return connection.execute("PRAGMA integrity_check").fetchall()
    finally:
        connection.close()


def run_child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a process that has ``value_of`` and ``key_of`` of this file at hand."""
    head = f"import sys; sys.path[:0] = [{str(SRC)!r}]\nimport numpy as np\n"
    head += "from preftune.references.store import ReferenceStore\n"
    head += "def value_of(n): return -np.random.default_rng(n).random(1 + n % 50, dtype=np.float32)\n"
    head += "def key_of(n): return n.to_bytes(16, 'little')\n"
    command = [sys.executable, "-W", "error", "-c", head + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


class TestReadAndWrite:
    def test_finds_what_was_put_after_reopening(self, tmp_path: Path) -> None:
        with ReferenceStore(tmp_path) as store:
            store.put_many(W, entries(*range(5000)))  # more than one transaction and many IN-queries
        with ReferenceStore(tmp_path) as store:
            assert_holds(store, range(5000))

    def test_values_are_bitwise_float32_and_read_only(self, tmp_path: Path) -> None:
        values = np.array([-0.0, -1e-45, -1e38, -1 / 3], dtype=np.float32)
        with ReferenceStore(tmp_path) as store:
            store.put_many(W, {b"k": values})
            found = store.get_many(W, [b"k"])[b"k"]
        assert found.dtype == np.float32
        assert found.tobytes() == values.tobytes()
        assert not found.flags.writeable

    def test_misses_are_absent_and_repeats_are_allowed(self, tmp_path: Path) -> None:
        with ReferenceStore(tmp_path) as store:
            store.put_many(W, entries(1))
            assert list(store.get_many(W, [key_of(1), key_of(2), key_of(1)])) == [key_of(1)]
            assert store.get_many(W, []) == {}

    def test_other_weights_never_hit(self, tmp_path: Path) -> None:
        with ReferenceStore(tmp_path) as store:
            store.put_many(W, entries(1, 2))
            assert store.get_many(W[::-1], [key_of(1), key_of(2)]) == {}

    def test_putting_again_replaces(self, tmp_path: Path) -> None:
        with ReferenceStore(tmp_path) as store:
            store.put_many(W, {key_of(1): value_of(9)})
            store.put_many(W, entries(1))
            assert_holds(store, range(1, 2))
            assert store.info().num_entries == 1

    def test_a_sequence_without_scored_tokens_is_an_entry(self, tmp_path: Path) -> None:
        with ReferenceStore(tmp_path) as store:
            store.put_many(W, {b"k": np.empty(0, dtype=np.float32)})
            assert store.get_many(W, [b"k"])[b"k"].shape == (0,)

    def test_non_finite_values_are_not_kept(self, tmp_path: Path) -> None:
        with ReferenceStore(tmp_path) as store:
            with pytest.warns(StoreWarning, match="non-finite"):
                store.put_many(W, entries(1) | {b"nan": np.array([-1.0, np.nan]), b"inf": np.array([-np.inf])})
            assert list(store.get_many(W, [key_of(1), b"nan", b"inf"])) == [key_of(1)]

    @pytest.mark.parametrize("value", [np.zeros((2, 2)), np.float32(1.0)])
    def test_only_vectors_are_values(self, tmp_path: Path, value: npt.NDArray[np.float32]) -> None:
        with ReferenceStore(tmp_path) as store, pytest.raises(DataError, match="one-dimensional"):
            store.put_many(W, {b"k": value})

    def test_threads_share_one_store(self, tmp_path: Path) -> None:
        with ReferenceStore(tmp_path) as store:
            parts = [entries(*range(first, first + 100)) for first in range(0, 800, 100)]
            threads = [threading.Thread(target=store.put_many, args=(W, part)) for part in parts]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert_holds(store, range(800))


class TestFolder:
    def test_own_variable_comes_first(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "own"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_home() == tmp_path / "own"
        monkeypatch.delenv("PREFTUNE_CACHE")
        assert cache_home() == tmp_path / "xdg" / "preftune"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cache_home() == tmp_path / ".cache" / "preftune"

    def test_default_store_lies_there(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "a" / "b"))
        with ReferenceStore() as store:
            store.put_many(W, entries(1))
        assert (tmp_path / "a" / "b" / database.FILE_NAME).stat().st_size > 0


class TestInfoAndClear:
    def test_info_counts_per_reference(self, tmp_path: Path) -> None:
        before = time.time()
        with ReferenceStore(tmp_path) as store:
            store.put_many("first", entries(1, 2, 3))
            store.put_many("second", entries(4))
            info = store.info()
        assert {item.weights_key: item.num_entries for item in info.weights} == {"first": 3, "second": 1}
        assert info.num_entries == 4
        assert all(before <= item.created <= item.last_used <= time.time() for item in info.weights)
        assert info.path == tmp_path / database.FILE_NAME
        assert (info.mode, info.journal_mode, info.num_in_memory) == ("disk", "wal", 0)
        assert info.num_bytes >= info.path.stat().st_size

    def test_clear_one_reference(self, tmp_path: Path) -> None:
        with ReferenceStore(tmp_path) as store:
            store.put_many("first", entries(1, 2, 3))
            store.put_many("second", entries(4))
            assert store.clear("first") == 3
            assert store.get_many("first", [key_of(1)]) == {}
            assert_holds(store, range(4, 5), "second")
            assert store.clear("unknown") == 0

    def test_clear_by_age_goes_by_last_use(self, tmp_path: Path) -> None:
        with ReferenceStore(tmp_path) as store:
            store.put_many("old", entries(1))
            store.put_many("read", entries(2))
            store.put_many("new", entries(3))
        with sqlite3.connect(tmp_path / database.FILE_NAME) as connection:
            connection.execute("UPDATE weights SET created = created - 9000, used = used - 9000 WHERE key != 'new'")
        connection.close()
        with ReferenceStore(tmp_path) as store:
            assert_holds(store, range(2, 3), "read")  # a read counts as use
            assert store.clear(older_than=timedelta(hours=2)) == 1
            assert {item.weights_key for item in store.info().weights} == {"read", "new"}
            assert store.clear(older_than=0.0) == 2

    def test_clear_gives_the_space_back(self, tmp_path: Path) -> None:
        with ReferenceStore(tmp_path) as store:
            store.put_many(W, {key_of(n): np.zeros(1000, dtype=np.float32) for n in range(500)})
            full = store.info().num_bytes
            assert full > 2_000_000
            assert store.clear() == 500
            assert store.info().num_bytes < full / 10

    def test_cleared_and_refilled_by_another_process_is_seen(self, tmp_path: Path) -> None:
        with ReferenceStore(tmp_path) as one, ReferenceStore(tmp_path) as two:
            one.put_many("a", entries(1))
            two.clear()
            two.put_many("b", {key_of(1): value_of(2)})
            assert one.get_many("a", [key_of(1)]) == {}  # not b's, whose row might have taken over a's number
            one.put_many("a", entries(1))
            assert_holds(two, range(1, 2), "a")


class TestProcesses:
    def test_two_writers_at_once(self, tmp_path: Path) -> None:
        code = (
            "start = int(sys.argv[2])\n"
            "with ReferenceStore(sys.argv[1]) as store:\n"
            "    for first in range(start, start + 2000, 40):\n"
            "        store.put_many('w', {key_of(n): value_of(n) for n in range(first, first + 40)})\n"
        )
        # The ranges overlap by half, so both also write the same keys.
        children = [run_child(code, tmp_path, start) for start in (0, 1000)]
        for child in children:
            child.communicate(timeout=60)
        assert [child.returncode for child in children] == [0, 0]
        with ReferenceStore(tmp_path) as store:
            assert_holds(store, range(3000), "w")
            assert store.info().num_entries == 3000
        assert integrity(tmp_path) == [("ok",)]

    def test_killed_writers_leave_committed_values_and_nothing_wrong(self, tmp_path: Path) -> None:
        code = (
            "print('open', flush=True)\n"
            "with ReferenceStore(sys.argv[1]) as store:\n"
            "    n = int(sys.argv[2])\n"
            "    while True:\n"
            "        store.put_many('w', {key_of(k): value_of(k) for k in range(n, n + 25)})\n"
            "        n += 25\n"
            "        print(n, flush=True)\n"
        )
        delays = random.Random(0)
        first = 0
        for _ in range(12):
            child = run_child(code, tmp_path, first)
            assert child.stdout is not None
            assert child.stdout.readline() == "open\n"
            time.sleep(delays.uniform(0.0, 0.15))  # from before the file exists to well within the writing
            child.send_signal(signal.SIGKILL)
            lines = child.stdout.read().split()
            child.stdout.close()
            assert child.wait(10) == -signal.SIGKILL
            committed = int(lines[-1]) if lines else first
            with ReferenceStore(tmp_path) as store:
                assert_holds(store, range(first, committed), "w")
                # The batch in flight is there as a whole or not at all.
                tail = store.get_many("w", [key_of(n) for n in range(committed, committed + 25)])
                assert len(tail) in (0, 25)
                assert all(np.array_equal(tail[key], value_of(int.from_bytes(key, "little"))) for key in tail)
            assert integrity(tmp_path) == [("ok",)]
            first = committed
        assert first > 0

    def test_interrupted_pass_continues(self, tmp_path: Path) -> None:
        keys = [key_of(n) for n in range(60)]
        scored: list[bytes] = []

        def reference_pass(stop_after: int | None) -> None:
            with ReferenceStore(tmp_path) as store:
                known = store.get_many(W, keys)
                missing = [key for key in keys if key not in known]
                for start in range(0, len(missing), 10):
                    if start == stop_after:
                        return
                    batch = missing[start : start + 10]
                    scored.extend(batch)
                    store.put_many(W, {key: value_of(int.from_bytes(key, "little")) for key in batch})

        reference_pass(stop_after=30)
        reference_pass(stop_after=None)
        assert sorted(scored) == sorted(keys)  # every sequence once, none twice

    def test_a_forked_child_opens_its_own_connection(self, tmp_path: Path) -> None:
        with ReferenceStore(tmp_path) as store:
            store.put_many(W, entries(0))

            def action() -> None:
                assert_holds(store, range(1))
                store.put_many(W, entries(1))
                store.close()

            in_child(action)
            store.put_many(W, entries(2))
            assert_holds(store, range(3))
        assert integrity(tmp_path) == [("ok",)]


class TestNetworkFileSystem:
    def test_goes_without_wal(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(database, "is_network_path", lambda path: True)
        with ReferenceStore(tmp_path) as one, ReferenceStore(tmp_path) as two:
            assert one.info().journal_mode == "delete"
            one.put_many(W, entries(1))
            two.put_many(W, entries(2))
            assert_holds(one, range(1, 3))
        assert not list(tmp_path.glob("*-wal"))

    def test_a_file_made_elsewhere_is_converted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with ReferenceStore(tmp_path) as store:
            store.put_many(W, entries(1))
        monkeypatch.setattr(database, "is_network_path", lambda path: True)
        with ReferenceStore(tmp_path) as store:
            assert store.info().journal_mode == "delete"
            assert_holds(store, range(1, 2))

    def test_file_systems_are_told_apart(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        mounts = f"none / ext4 rw 0 0\nhost:/x {tmp_path} nfs4 rw 0 0\nnone {tmp_path}/here xfs rw 0 0\n"
        real = Path.read_text
        monkeypatch.setattr(
            Path, "read_text", lambda self, **kw: mounts if str(self) == "/proc/self/mounts" else real(self, **kw)
        )
        assert database.is_network_path(tmp_path / "home")
        assert not database.is_network_path(tmp_path / "here" / "deep")
        assert not database.is_network_path(Path(f"{tmp_path}-not"))


class TestDamage:
    def test_a_truncated_value_is_a_miss_and_is_repaired(self, tmp_path: Path) -> None:
        with ReferenceStore(tmp_path) as store:
            store.put_many(W, entries(40, 41, 42, 43))
        connection = sqlite3.connect(tmp_path / database.FILE_NAME)
        for number, change in (
            (40, "substr(value, 1, 20)"),  # cut within the values, on a float's boundary
            (41, "substr(value, 1, 21)"),
            (42, "zeroblob(length(value))"),
            (43, "x''"),
        ):
            connection.execute(f"UPDATE logps SET value = {change} WHERE key = ?", (key_of(number),))
        connection.commit()
        connection.close()
        with ReferenceStore(tmp_path) as store:
            assert store.get_many(W, [key_of(n) for n in range(40, 44)]) == {}
            store.put_many(W, entries(40, 41, 42, 43))
            assert_holds(store, range(40, 44))

    def test_a_value_under_the_wrong_name_is_a_miss(self, tmp_path: Path) -> None:
        with ReferenceStore(tmp_path) as store:
            store.put_many(W, entries(1, 2))
        connection = sqlite3.connect(tmp_path / database.FILE_NAME)
        connection.execute("UPDATE logps SET key = x'00' || key WHERE key = ?", (key_of(1),))
        connection.execute("UPDATE logps SET key = ? WHERE key = ?", (key_of(1), key_of(2)))
        connection.execute("INSERT INTO weights (key, created, used) VALUES ('other', 0, 0)")
        connection.execute("INSERT INTO logps (weights, key, value) SELECT 2, key, value FROM logps")
        connection.commit()
        connection.close()
        with ReferenceStore(tmp_path) as store:
            assert store.get_many(W, [key_of(1)]) == {}
            assert store.get_many("other", [key_of(1)]) == {}

    @pytest.mark.parametrize("damage", ["not a database", "header only", "hole", "tail"])
    def test_a_corrupt_file_is_moved_aside_with_a_word(self, tmp_path: Path, damage: str) -> None:
        with ReferenceStore(tmp_path) as store:
            store.put_many(W, entries(*range(2000)))
        file = tmp_path / database.FILE_NAME
        content = bytearray(file.read_bytes())
        if damage == "not a database":
            content[:] = b"hello " * 1000
        elif damage == "header only":
            del content[100:]
        elif damage == "hole":
            content[4096 : len(content) // 2] = os.urandom(len(content) // 2 - 4096)
        else:
            del content[len(content) // 2 :]
        file.write_bytes(content)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with ReferenceStore(tmp_path) as store:
                found = store.get_many(W, [key_of(n) for n in range(2000)])
                assert all(np.array_equal(found[key], value_of(int.from_bytes(key, "little"))) for key in found)
                store.put_many(W, entries(*range(2000)))
                assert_holds(store, range(2000))
                assert store.info().mode == "disk"
        (warning,) = caught
        assert issubclass(warning.category, StoreWarning)
        (aside,) = tmp_path.glob("*.corrupt-*")
        assert aside.name in str(warning.message)
        assert aside.read_bytes() == bytes(content)
        assert integrity(tmp_path) == [("ok",)]

    def test_strict_refuses_a_corrupt_file_and_leaves_it(self, tmp_path: Path) -> None:
        file = tmp_path / database.FILE_NAME
        file.write_bytes(b"hello " * 1000)
        with pytest.raises(StoreError, match=r"cannot be used \(file is not a database\); `preftune cache clear`"):
            ReferenceStore(tmp_path, strict=True)
        assert file.read_bytes() == b"hello " * 1000

    def test_only_one_of_two_processes_moves_a_corrupt_file(self, tmp_path: Path) -> None:
        (tmp_path / database.FILE_NAME).write_bytes(b"hello " * 1000)
        with opened_with_warning(tmp_path, "moved") as store:
            store.put_many(W, entries(1))
            # A process that met the corrupt file before it was replaced, and only now gets to moving it.
            assert database.move_aside(tmp_path) is None
            assert_holds(store, range(1, 2))

    def test_somebody_elses_database_is_left_alone(self, tmp_path: Path) -> None:
        file = tmp_path / database.FILE_NAME
        connection = sqlite3.connect(file)
        connection.execute("CREATE TABLE theirs (x)")
        connection.commit()
        connection.close()
        before = file.read_bytes()
        with pytest.raises(StoreError, match="not made by preftune"):
            ReferenceStore(tmp_path, strict=True)
        with opened_with_warning(tmp_path, "not made by preftune") as store:
            store.put_many(W, entries(1))
            assert_holds(store, range(1, 2))
        assert file.read_bytes() == before


def in_child(action: Callable[[], None], *, as_nobody: bool = False) -> None:
    """Run in a process of its own, on request without root's power to write everywhere."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if as_nobody and os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            action()
            status = 0
        except BaseException as error:
            print(f"in the child: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """Return a folder that other users can enter, which those of ``tmp_path`` forbid."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
        Path(folder).chmod(0o755)


class TestDiskThatCannotBeWritten:
    def test_full_store_goes_on_in_memory_with_one_warning(self, tmp_path: Path) -> None:
        with ReferenceStore(tmp_path, max_bytes=200_000) as store:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for first in range(0, 4000, 500):
                    store.put_many(W, entries(*range(first, first + 500)))
            (warning,) = caught
            assert "full" in str(warning.message)
            assert "PREFTUNE_CACHE" in str(warning.message)
            assert_holds(store, range(4000))
            info = store.info()
            assert info.num_in_memory + info.num_entries == 4000
            assert info.num_entries > 0
            assert info.num_in_memory > 0
        with ReferenceStore(tmp_path) as store:
            assert len(store.get_many(W, [key_of(n) for n in range(4000)])) == info.num_entries
        assert integrity(tmp_path) == [("ok",)]

    def test_write_errors_of_the_system_are_survived(self, tmp_path: Path) -> None:
        def action() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
            with ReferenceStore(tmp_path) as store, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for first in range(0, 4000, 100):
                    store.put_many(W, entries(*range(first, first + 100)))
                assert ["full or broken" in str(warning.message) for warning in caught] == [True]
                assert_holds(store, range(4000))
                assert store.info().num_in_memory > 0

        in_child(action)
        with ReferenceStore(tmp_path) as store:
            found = store.get_many(W, [key_of(n) for n in range(4000)])
            assert 0 < len(found) < 4000
        assert integrity(tmp_path) == [("ok",)]

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreError, match="PREFTUNE_CACHE"):
            ReferenceStore(tmp_path / "file" / "cache", strict=True)
        with opened_with_warning(tmp_path / "file" / "cache", "kept in memory") as store:
            store.put_many(W, entries(1))
            assert_holds(store, range(1, 2))
            assert store.info().mode == "memory"
            with pytest.raises(StoreError, match="nothing was cleared"):
                store.clear()

    def test_a_read_only_store_is_still_read(self, public_folder: Path) -> None:
        folder = public_folder
        with ReferenceStore(folder) as store:
            store.put_many(W, entries(*range(100)))
        (folder / database.FILE_NAME).chmod(0o444)
        folder.chmod(0o555)

        def action() -> None:
            with opened_with_warning(folder, "read-only") as store:
                assert_holds(store, range(100))
                store.put_many(W, entries(100))
                assert_holds(store, range(101))
                assert store.info().mode == "read_only"
                with pytest.raises(StoreError, match="cannot be written"):
                    store.clear()
            with ReferenceStore(folder, strict=True) as store:
                assert store.info().num_entries == 100
                with pytest.raises(StoreError, match="read-only"):
                    store.put_many(W, entries(100))

        in_child(action, as_nobody=True)

    def test_a_lock_that_is_never_released_does_not_stop_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
        with ReferenceStore(tmp_path) as store:
            store.put_many(W, entries(0))
            blocker = sqlite3.connect(tmp_path / database.FILE_NAME, isolation_level=None)
            blocker.execute("BEGIN IMMEDIATE")
            with pytest.warns(StoreWarning, match="database is locked"):
                store.put_many(W, entries(1))
            assert_holds(store, range(1, 2))
            blocker.execute("ROLLBACK")
            blocker.close()


def is_locked(file: Path) -> bool:
    """Whether a connection holds the file, as another process sees it: SQLite locks bytes from 2**30 + 2 on."""
    code = (
        "import fcntl, sys\n"
        "with open(sys.argv[1], 'r+b') as file:\n"
        "    try:\n"
        "        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 510, 2**30 + 2)\n"
        "    except OSError:\n"
        "        sys.exit(7)\n"
    )
    return subprocess.run([sys.executable, "-c", code, str(file)], check=False).returncode == 7


def test_another_store_in_the_process_leaves_the_locks_of_the_first(tmp_path: Path) -> None:
    """A process that closes any handle of a file loses all of its locks on it; then others delete its log."""
    with ReferenceStore(tmp_path) as first:
        first.put_many(W, entries(*range(20)))
        assert is_locked(first.file)
        for mode in (0o600, 0o644):
            first.file.chmod(mode)
            with ReferenceStore(tmp_path) as second:
                assert_holds(second, range(20))
            assert first.file.stat().st_mode & 0o777 in (0o600, 0o640)
            # SQLite keeps the handle of the second connection until the first one is done, for this very reason.
            assert is_locked(first.file)
    assert not is_locked(tmp_path / database.FILE_NAME)
