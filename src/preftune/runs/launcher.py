"""Several processes on one machine, started and watched: ``preftune dpo --num_processes 8``.

What a process says goes where this one's output goes. The first that fails is named, with its reason; the others get a
few seconds to end by themselves, and are ended then: one that waits for a process that has gone would wait for long.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from preftune.errors import ConfigError, SetupError

#: Set for the processes that :func:`launch` starts.
LAUNCHED = "PREFTUNE_LAUNCHED"
#: Seconds that the others get to end after one has failed, and after they were asked to.
_PATIENCE = 5.0
_INTERVAL = 0.1


@dataclass(frozen=True)
class Processes:
    """How many processes train.

    Attributes:
        num_processes: Processes on this machine, each with a GPU of its own, or all on the processor.
    """

    num_processes: int | None = field(
        default=None, metadata={"help": "Train in so many processes on this machine, one for each GPU."}
    )

    def to_launch(self) -> int | None:
        """How many processes this one has to start; ``None`` where it trains itself.

        Raises:
            ConfigError: The number cannot be had.
        """
        number = self.num_processes
        if number is None or os.environ.get(LAUNCHED):
            return None
        where = "--num_processes"
        if number < 1:
            raise ConfigError("not a number of processes", where=where, value=number, allowed="1 or more")
        if "WORLD_SIZE" in os.environ:
            raise ConfigError(
                f"a launcher has started {os.environ['WORLD_SIZE']} processes already",
                where=where,
                value=number,
                remedy="leave it out, or start preftune by itself",
            )
        return number

    def check_devices(self) -> None:
        """Refuse more processes than there are GPUs; called by each of them.

        Raises:
            ConfigError: There are fewer, but some.
        """
        import torch

        there = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
        if there and self.num_processes is not None and self.num_processes > there:
            raise ConfigError(
                "there is no GPU for each process",
                where="--num_processes",
                value=self.num_processes,
                allowed=f"1 to {there}",
                remedy="set CUDA_VISIBLE_DEVICES= (to nothing) to train on the processor",
            )


def launch(number: int, command: Sequence[str], say: Callable[[str], None]) -> int:
    """Run a command in several processes.

    Args:
        number: How many.
        command: The command, whose processes find their place as torchrun would tell it to them.
        say: Prints a line.

    Returns:
        The exit code: 0 where all ended well, otherwise that of the first process that failed.

    Raises:
        SetupError: A process was ended by a signal that nobody sent to this one.
    """
    workers = [subprocess.Popen(command, env=each, start_new_session=True) for each in _environments(number)]
    try:
        with _forwarded(workers) as asked:
            return _watched(workers, say, asked)
    finally:
        _end(workers)


def this_program(*arguments: str) -> list[str]:
    """The command that runs preftune with other arguments."""
    return [sys.executable, "-m", "preftune", *arguments]


def _environments(number: int) -> Iterator[Mapping[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, LAUNCHED: "1"}
    # As torchrun does, though not down to one where there are more cores.
    threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // number, 1))}
    for rank in range(number):
        yield {**threads, **os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}


def _watched(workers: Sequence[subprocess.Popen[bytes]], say: Callable[[str], None], asked: threading.Event) -> int:
    while True:
        codes = [worker.poll() for worker in workers]
        # One that was ended by a signal, before those that have lost it.
        gone = sorted((code > 0, rank) for rank, code in enumerate(codes) if code)
        failed = gone[0][1] if gone else None
        if failed is None and None not in codes:
            return 0
        # Asked to stop, they save a checkpoint first, which may take its time.
        if failed is not None and (None not in codes or not asked.is_set()):
            break
        time.sleep(_INTERVAL)
    code = codes[failed] or 0
    # Those that fail together have found the same mistake, and one of them has said so.
    _wait(workers, _PATIENCE if code > 0 else 0.0)
    named = f"process {failed} of {len(workers)} (pid {workers[failed].pid})"
    if code > 0:
        if any(worker.poll() is None for worker in workers):
            say(f"{named} ended with exit code {code}; the others are ended")
        return code
    if asked.is_set():
        return 128 - code
    why = f"was ended by {_name_of(-code)}"
    memory = "; if nobody sent it, memory was short" if code == -signal.SIGKILL else ""
    say(f"{named} {why}; the others are ended")
    _wait(workers, _PATIENCE)
    remedy = f"resume_from_checkpoint: true goes on from the last checkpoint{memory}"
    raise SetupError(why, where=named, remedy=remedy)


@contextmanager
def _forwarded(workers: Sequence[subprocess.Popen[bytes]]) -> Iterator[threading.Event]:
    """Hand signals on, which the processes know how to obey."""
    asked = threading.Event()

    def forward(number: int, frame: FrameType | None) -> None:
        asked.set()
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    before: dict[int, object] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def _wait(workers: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while any(worker.poll() is None for worker in workers) and time.monotonic() < end:
        time.sleep(_INTERVAL)


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what is still running."""
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    if any(worker.poll() is None for worker in workers):
        _wait(workers, _PATIENCE)
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
        worker.wait()


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
