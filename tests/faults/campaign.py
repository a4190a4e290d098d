"""Faults injected into runs, and what became of them: used by the tests in small numbers, by the report in large."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.faults import launched
from tests.faults.server import ForkServer
from tests.faults.worlds import NUM_PAIRS


@dataclass
class Trial:
    """One fault, or one chain of them in one run.

    Attributes:
        kind: Kind of the fault.
        scenario: Which run it was injected into.
        where: Where it struck.
        faults: How many struck.
        survived: Whether the run, gone on with, ended as the undisturbed one.
        bytes_lost: Bytes of results that differ from the undisturbed run's.
        note: What was said, or what went wrong.
    """

    kind: str
    scenario: str
    where: str
    faults: int
    survived: bool
    bytes_lost: int
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Campaign:
    """Runs trials against the undisturbed runs of one world.

    Args:
        server: Where children are forked.
        folder: Scratch folder.
        seed: Seed of all random choices.
    """

    def __init__(self, server: ForkServer, folder: Path, seed: int = 0) -> None:
        self.server, self.folder = server, folder
        self.draw = random.Random(seed)
        self._undisturbed: dict[str, dict[str, Any]] = {}
        self._number = 0

    def undisturbed(self, scenario: str) -> dict[str, Any]:
        """The run without faults; run once."""
        if scenario not in self._undisturbed:
            out = self.folder / f"undisturbed-{scenario}"
            answer = self.server.run("train", out, scenario=scenario)
            assert answer["ended"] == "ok", answer
            self._undisturbed[scenario] = {**answer, "out": out}
        return self._undisturbed[scenario]

    def place(self, name: str) -> Path:
        """A new folder name."""
        self._number += 1
        return self.folder / f"{name}-{self._number}"

    def bytes_lost(self, scenario: str, out: Path, answer: dict[str, Any]) -> int:
        """Bytes of the results that differ from the undisturbed run's; all of them if there are none."""
        expected = self.undisturbed(scenario)["outcome"]
        found = answer.get("outcome", {})
        lost = 0
        for key, value in expected.items():
            if found.get(key) != value:
                paths = list((self.undisturbed(scenario)["out"]).rglob(key)) if "." in key else []
                lost += sum(path.stat().st_size for path in paths) or len(str(value))
        lost += sum(len(str(value)) for key, value in found.items() if key not in expected)
        return lost

    def finish(self, kind: str, scenario: str, out: Path, where: str, faults: int, note: str = "") -> Trial:
        """Go on without faults and compare."""
        answer = self.server.run("train", out, scenario=scenario)
        lost = self.bytes_lost(scenario, out, answer)
        well = answer["ended"] == "ok" and lost == 0
        said = note if well else answer.get("error", "") or f"{answer['ended']}: {note}"
        for extra in (out, Path(f"{out}-cache"), Path(f"{out}-datasets")):
            if well:
                shutil.rmtree(extra, ignore_errors=True)
        return Trial(kind, scenario, where, faults, well, lost, said)

    # ---- kills ------------------------------------------------------------------------------------------------------

    def kill_at_random_instants(self, scenario: str, kills: int) -> Trial:
        """SIGKILL from outside, again and again in one run, at instants drawn over its whole length."""
        out, took = self.place(f"instant-{scenario}"), self.undisturbed(scenario)["took"]
        struck, instants = 0, []
        for _ in range(kills):
            instant = self.draw.uniform(0.02, took)
            answer = self.server.run("train", out, scenario=scenario, seconds=instant)
            struck += answer["ended"] == "killed"
            instants.append(f"{instant:.2f} s")
        return self.finish("SIGKILL at a random instant", scenario, out, ", ".join(instants), struck)

    def kill_at_operations(self, scenario: str, kills: int) -> Trial:
        """SIGKILL just before the k-th operation on files: in the middle of saving, renaming, deleting."""
        out, operations = self.place(f"operation-{scenario}"), self.undisturbed(scenario)["operations"]
        struck, places = 0, []
        for _ in range(kills):
            at = self.draw.randint(1, operations)
            answer = self.server.run("train", out, scenario=scenario, at=at)
            struck += answer["ended"] == "killed"
            places.append(str(at))
        where = f"before operation {', '.join(places)} of about {operations}"
        return self.finish("SIGKILL between two file operations of a save", scenario, out, where, struck)

    def kill_inside_a_write(self, scenario: str) -> Trial:
        """The kernel ends the process when a file grows beyond a size: a file is left half written."""
        out = self.place(f"write-{scenario}")
        # First a checkpoint that a resumed run can start from, then the torn one.
        at = self.undisturbed(scenario)["operations"] // 2
        first = self.server.run("train", out, scenario=scenario, at=at)
        last = max((p.stat().st_size for p in out.rglob("*.safetensors")), default=4096)
        size = self.draw.randint(1, last - 1)
        answer = self.server.run("train", out, scenario=scenario, file_size=size)
        struck = (first["ended"] == "killed") + (answer["ended"] == "killed")
        return self.finish("killed inside a write, file torn", scenario, out, f"at byte {size}", struck)

    def interrupt(self, scenario: str) -> Trial:
        """Ctrl-C inside a save."""
        out, at = self.place(f"interrupt-{scenario}"), self.draw.randint(1, self.undisturbed(scenario)["operations"])
        answer = self.server.run("train", out, scenario=scenario, at=at, strike="interrupt")
        struck = int("KeyboardInterrupt" in answer.get("error", ""))
        return self.finish("Ctrl-C inside a save", scenario, out, f"at operation {at}", struck)

    # ---- damaged checkpoints ----------------------------------------------------------------------------------------

    def damaged(self, scenario: str, most: int | None = None) -> Iterator[Trial]:
        """Every file of the newest checkpoint truncated, zeroed and deleted in turn; the one before is used."""
        stem = self.place(f"damage-{scenario}")
        self.server.run("train", stem, scenario=scenario, at=int(self.undisturbed(scenario)["operations"] * 0.7))
        steps = sorted(int(p.name.split("-")[1]) for p in stem.glob("checkpoint-*"))
        newest = f"checkpoint-{steps[-1]}"
        names = sorted(p.relative_to(stem / newest).as_posix() for p in (stem / newest).rglob("*") if p.is_file())
        cases = [(name, how) for name in names for how in DAMAGES]
        for name, how in cases if most is None else self.draw.sample(cases, most):
            out = self.place(f"damaged-{scenario}")
            shutil.copytree(stem, out)
            if Path(f"{stem}-cache").exists():
                shutil.copytree(f"{stem}-cache", f"{out}-cache", dirs_exist_ok=True)
            DAMAGES[how](out / newest / name)
            yield self.finish(f"checkpoint file {how}", scenario, out, name, 1)

    # ---- disks ------------------------------------------------------------------------------------------------------

    def full_disk(self, scenario: str, *, lasting: bool) -> Trial:
        """One write fails for want of space, or all from there on; afterwards there is space again."""
        out, at = self.place(f"full-{scenario}"), self.draw.randint(1, self.undisturbed(scenario)["operations"])
        answer = self.server.run("train", out, scenario=scenario, at=at, strike="full", lasting=lasting)
        return self._after_full("disk full, " + ("for good" if lasting else "once"), scenario, out, f"at {at}", answer)

    def full_inside_a_write(self, scenario: str) -> Trial:
        """The system refuses to let a file grow beyond a size, native writers included."""
        out, size = self.place(f"limit-{scenario}"), self.draw.randint(1, 20000)
        answer = self.server.run("train", out, scenario=scenario, file_size=size, strike="full")
        return self._after_full("write fails half-way", scenario, out, f"at byte {size}", answer)

    def small_disk(self, scenario: str, kilobytes: int) -> Trial:
        """A real file system that fills up; afterwards it is made larger."""
        point = self.place("disk")
        with disk(point, kilobytes) as grow:
            out = point / "out"
            cache = str(self.place("cache"))
            answer = self.server.run("train", out, scenario=scenario, cache=cache)
            grow(64 << 10)
            return self._after_full("a real disk filled up", scenario, out, f"{kilobytes} KiB", answer)

    def _after_full(self, kind: str, scenario: str, out: Path, where: str, answer: dict[str, Any]) -> Trial:
        clear = answer["ended"] == "ok" or (answer["ended"] == "error" and answer["clear"])
        note = answer.get("error", "") or "; ".join(answer.get("warnings", [])) or "nothing to say"
        trial = self.finish(kind, scenario, out, where, 1, note[:300])
        if not clear:
            trial.survived, trial.note = False, f"not one clear error: {answer.get('trace', answer)}"
        return trial

    def read_only(self, scenario: str) -> Trial:
        """The output folder turns read-only in the middle; afterwards it can be written again."""
        point = self.place("readonly")
        with disk(point, 64 << 10) as grow:
            out = point / "out"
            cache = str(self.place("cache"))
            at = self.undisturbed(scenario)["operations"] // 2
            self.server.run("train", out, scenario=scenario, cache=cache, at=at)
            grow(None)
            answer = self.server.run("train", out, scenario=scenario, cache=cache)
            refused = answer["ended"] == "error" and answer["clear"]
            grow(64 << 10)
            trial = self.finish("output folder read-only", scenario, out, "after a kill", 1, answer.get("error", ""))
            trial.survived &= refused
            return trial

    # ---- inside a step, inside the store ----------------------------------------------------------------------------

    def memory_runs_out(self, scenario: str, lack: str) -> Trial:
        """A row's backward runs out of memory with half of the gradient added; the step is run again."""
        answer = self.server.run("memory", self.place("memory"), scenario=scenario, lack=lack)
        well = answer["ended"] == "ok" and answer["met"] > 0 and answer["difference"] < 1e-5
        note = f"updates differ by {answer['difference']:.1e} of the largest" if "difference" in answer else str(answer)
        return Trial("memory runs out in a row", scenario, lack, answer.get("met", 0), well, 0, note)

    def values_not_finite(self, scenario: str, where: str) -> Trial:
        """One row's loss or gradient is not finite; its step alone is skipped and the row is named."""
        row = self.draw.randrange(NUM_PAIRS)
        answer = self.server.run("values", self.place("values"), scenario=scenario, where=where, row=row)
        well = bool(answer.get("well"))
        note = str(answer.get("said", answer))[:300]
        return Trial(f"{where} not finite", scenario, f"row {row}", 1, well, 0, note)

    def store_killed(self, writers: int) -> Trial:
        """SIGKILL while one or two processes write the reference store; what was committed is there."""
        out, chunks, instant = self.place("store"), 400, self.draw.uniform(0.02, 0.4)
        options = {"writers": writers, "chunks": chunks}
        struck = self.server.run("write store", out, seconds=instant, **options)["ended"] == "killed"
        answer = self.server.run("read store", out, **options)
        missing = answer.get("missing", -1)
        well = answer["ended"] == "ok" and missing == 0 and not answer["warnings"]
        kind = f"reference store, {writers} writer{'s' * (writers > 1)}, SIGKILL"
        note = f"{answer.get('checked')} entries compared" if well else str(answer)[:300]
        return Trial(kind, "store", f"{instant:.2f} s", int(struck), well, max(missing, 0) * 200, note)

    def store_damaged(self, scenario: str, how: str) -> Trial:
        """The store's file is damaged between two runs; the second computes anew what it cannot read."""
        cache = self.place("cache")
        self.server.run("train", self.place("first"), scenario=scenario, cache=str(cache))
        for path in cache.rglob("*.sqlite"):
            DAMAGES[how](path)
        out = self.place("second")
        answer = self.server.run("train", out, scenario=scenario, cache=str(cache))
        lost = self.bytes_lost(scenario, out, answer)
        well = answer["ended"] == "ok" and lost == 0
        return Trial(f"reference store {how}", scenario, "between runs", 1, well, lost, str(answer.get("error", "")))

    # ---- processes that hang or die ---------------------------------------------------------------------------------

    def worker_fails(self, scenario: str, how: str) -> Trial:
        """A data-loader worker is stopped, never returns, or is killed; the run ends with one clear error."""
        out, batch = self.place(f"worker-{scenario}"), self.draw.randint(2, 4)
        answer = self.server.run("train with workers", out, scenario=scenario, how=how, batch=batch)
        trial = self._after_failure(f"data-loader worker {how}", scenario, out, f"at its batch {batch}", answer)
        trial.survived &= "dataloader_num_workers" in answer.get("error", "")
        return trial

    def preparation_fails(self, scenario: str, how: str) -> Trial:
        """A process that prepares rows is stopped, never returns, or is killed."""
        out = self.place("prepare")
        answer = self.server.run("prepare with processes", out, scenario=scenario, how=how)
        trial = self._after_failure(f"process that prepares rows {how}", scenario, out, "at its third batch", answer)
        trial.survived &= "dataset_num_proc" in answer.get("error", "")
        return trial

    def _after_failure(self, kind: str, scenario: str, out: Path, where: str, answer: dict[str, Any]) -> Trial:
        clear = answer["ended"] == "error" and answer["clear"]
        trial = self.finish(kind, scenario, out, where, 1, answer.get("error", "")[:300])
        if not clear:
            trial.survived, trial.note = False, f"not one clear error: {answer.get('trace', answer)}"
        return trial

    def process_fails(self, how: str) -> Trial:
        """One of two training processes is stopped or killed; the other says so, and the run goes on to the bit."""
        world, whole = self.server.world, self.folder / "two-undisturbed"
        constant = ("--lr_scheduler_type", "constant")
        if not whole.exists():
            code, said = launched.train(world, whole, *constant)
            assert code == 0, said[-1500:]
        out = self.place("two")
        # Long enough to be struck, and alike up to the checkpoint that is gone on from.
        code, said = launched.train(world, out, *constant, "--max_steps", "9999", "--ddp_timeout", "6", how=how)
        lines = [line for line in said.splitlines() if line.startswith("preftune: process 0 of 2: ")]
        clear = code not in (0, -99) and len(lines) == 1 and "[rank0]: Traceback" not in said
        for later in out.glob("checkpoint-*"):
            # A run of seven steps goes on from a step that it has.
            if int(later.name.split("-")[1]) != 2:
                shutil.rmtree(later)
        code, rest = launched.train(world, out, *constant, "--resume_from_checkpoint", "true")
        expected, found = launched.outcome(whole), launched.outcome(out)
        lost = sum(len(str(value)) for key, value in expected.items() if found.get(key) != value)
        note = lines[0] if clear else f"{code}: {said[-1500:]} {rest[-500:]}"
        kind = f"one of two training processes {how}"
        return Trial(kind, "two", "after the first checkpoint", 1, clear and code == 0 and not lost, lost, note[:2000])

    def sweep_worker_fails(self, how: str) -> Trial:
        """One of two sweep workers is stopped or killed; its trial is run again."""
        world, whole, out = self.server.world, self.folder / "sweep-undisturbed", self.place("sweep")
        if not whole.exists():
            code, said = launched.sweep(world, whole)
            assert code == 0, said[-1500:]
        code, said = launched.sweep(world, out, how=how)
        expected, found = launched.scores(whole), launched.scores(out)
        lost = sum(len(str(value)) for key, value in expected.items() if found.get(key) != value)
        told = [line for line in said.splitlines() if "is run again" in line or "hung and was ended" in line]
        well = code == 0 and not lost and (bool(told) or how == "killed")
        note = "; ".join(told) if well else f"{code}: {said[-1500:]}"
        return Trial(f"sweep worker {how}", "sweep", "during a trial", 1, well, lost, note[:2000])

    def jumping_clock(self, scenario: str) -> Trial:
        """The wall clock jumps by days, forth and back; so do the checkpoints' times."""
        out, at = self.place("clock"), self.undisturbed(scenario)["operations"] // 2
        self.server.run("train", out, scenario=scenario, at=at, clock=True)
        for number, path in enumerate(sorted(out.glob("checkpoint-*"))):
            os.utime(path, (2e9 - 1e6 * number, 2e9 - 1e6 * number))
        answer = self.server.run("train", out, scenario=scenario, clock=True)
        lost = self.bytes_lost(scenario, out, answer)
        took = answer.get("seconds")
        sane = took is not None and 0 < took < 600
        return Trial(
            "clock jumps", scenario, "+-12 days, four times a second", 1, lost == 0 and sane, lost, f"{took} s"
        )


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES: dict[str, Callable[[Path], None]] = {"truncated": _truncate, "zeroed": _zero, "deleted": Path.unlink}


def may_mount() -> bool:
    """Whether this process may mount a file system of its own."""
    return os.geteuid() == 0 and _mount(b"tmpfs", b"/proc/self/nowhere", 0, b"") in (2, 20)


def _mount(kind: bytes, point: bytes, flags: int, options: bytes) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.mount(b"tmpfs", point, kind, ctypes.c_ulong(flags), options)
    return 0 if done == 0 else ctypes.get_errno()


@contextmanager
def disk(point: Path, kilobytes: int) -> Iterator[Callable[[int | None], None]]:
    """A file system of its own in memory; yields a function that changes its size, or makes it read-only."""
    read_only, remount = 1, 32
    point.mkdir(parents=True)
    name = os.fsencode(point)
    failed = _mount(b"tmpfs", name, 0, b"size=%dk" % kilobytes)
    assert not failed, os.strerror(failed)

    def change(size: int | None) -> None:
        flags = remount | (read_only if size is None else 0)
        failed = _mount(b"tmpfs", name, flags, b"" if size is None else b"size=%dk" % size)
        assert not failed, os.strerror(failed)

    try:
        yield change
    finally:
        ctypes.CDLL(None).umount2(name, 2)
