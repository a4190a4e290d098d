"""Processes that hang or die, data-loader workers and training processes: one clear error, and no waiting without end.

A worker is a process of ``dataloader_num_workers``. It has nothing to compute, since examples are tokenised beforehand,
but it can be stopped, wait for a file system that has gone away, or be ended by the system where memory is short.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from preftune.config.machine import machine_id
from preftune.errors import PreftuneError, SetupError

if TYPE_CHECKING:
    from preftune.training.config import PackedConfig


def limited(loader: DataLoader[Any], seconds: float) -> DataLoader[Any]:
    """Let a loader give up on workers that send nothing.

    Args:
        loader: A loader, or accelerate's wrapper of one.
        seconds: How long it waits for the next batch; 0 waits for ever.
    """
    # The wrapper iterates over the loader inside, which is also what a resumed epoch copies its settings from.
    inside = getattr(loader, "base_dataloader", loader)
    if inside.num_workers:
        inside.timeout = seconds
        inside.worker_init_fn = partial(_begin, inside.worker_init_fn)
        if inside.persistent_workers and inside.generator is None:
            # Workers that stay take a seed once a run, in a resumed run once more: not from the random state that
            # dropout goes on with.
            inside.generator = torch.Generator()
    return loader


def _begin(then: Callable[[int], None] | None, number: int) -> None:
    # Ctrl-C reaches every process of the terminal; the training process alone decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if then is not None:
        then(number)


def limit_collectives(args: PackedConfig) -> None:
    """Let ``ddp_timeout`` hold without an accelerator too, where transformers does not hand it on."""
    if args.use_cpu and args.world_size > 1 and torch.distributed.is_initialized():
        _set_pg_timeout(args.ddp_timeout_delta)


@dataclass(frozen=True)
class _Peer:
    """A training process: where it runs, and its number there."""

    machine: str
    pid: int
    started: float

    def has_gone(self) -> bool:
        try:
            found = psutil.Process(self.pid)
            return found.create_time() != self.started or found.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


#: All training processes by rank, this one included; empty where there is one alone.
_peers: list[_Peer] = []
#: Seconds until the death of a process shows, after its connection has broken.
_SECONDS_TO_SHOW = 3.0


def remember_processes(args: PackedConfig) -> None:
    """Let processes know each other, so that one that goes can be named."""
    if args.world_size > 1:
        from accelerate.utils import gather_object

        me = _Peer(machine_id(), os.getpid(), psutil.Process().create_time())
        _peers[:] = gather_object([me])


def _gone() -> str:
    """Which processes of this machine have gone, in words; empty where none shows."""
    here = machine_id()
    end = time.monotonic() + _SECONDS_TO_SHOW
    while True:
        found = [f"{n} (pid {peer.pid})" for n, peer in enumerate(_peers) if peer.machine == here and peer.has_gone()]
        if found or time.monotonic() > end or not _peers:
            return ", ".join(found)
        time.sleep(0.1)


@contextmanager
def worker_errors(args: PackedConfig) -> Iterator[None]:
    """Say in one line that a data-loader worker, or another training process, hangs or has died.

    Args:
        args: Settings of the run.

    Raises:
        SetupError: A worker sent nothing within ``worker_timeout`` seconds, a process took no part in an exchange
            within ``ddp_timeout`` seconds, or one of them died.
    """
    try:
        yield
    except RuntimeError as error:
        said = " ".join(str(error).split())
        if isinstance(error, PreftuneError):
            raise
        if said.startswith("DataLoader"):
            raise _worker_failed(said, error, args) from error
        if getattr(args, "world_size", 1) > 1 and (isinstance(error, torch.distributed.DistError) or "gloo" in said):
            raise _process_failed(said, args) from error
        raise


_GO_ON = "resume_from_checkpoint: true goes on from the last checkpoint"


def _worker_failed(said: str, error: RuntimeError, args: PackedConfig) -> SetupError:
    if "timed out" in said:
        pids = ", ".join(str(worker.pid) for worker in _kill_workers(error))
        what = f"no data-loader worker has sent anything for {args.worker_timeout:g} s (processes {pids})"
        remedy = "set dataloader_num_workers: 0, or raise worker_timeout"
    else:
        what = f"a data-loader worker died ({said.rstrip('. ')})"
        remedy = "set dataloader_num_workers: 0; if the system ended it, memory was short"
    where, value = "dataloader_num_workers", args.dataloader_num_workers
    return SetupError(what, where=where, value=value, remedy=f"{remedy}; {_GO_ON}")


def _process_failed(said: str, args: PackedConfig) -> SetupError:
    waited = "timed out" in said.lower() or "timeout" in said.lower()
    gone = _gone()
    what = f"training process {gone} has gone" if gone else "a training process of another machine has gone"
    remedy = "what it said stands above or in its own output; if it said nothing, the system ended it"
    if waited and not gone:
        what = f"another training process has taken no part for {args.ddp_timeout} s (ddp_timeout)"
        remedy = "see whether it hangs or is merely slow; raise ddp_timeout for the latter"
    return SetupError(what, where=f"process {args.process_index} of {args.world_size}", remedy=f"{remedy}; {_GO_ON}")


def _kill_workers(error: BaseException) -> list[Any]:
    """End the workers of the iterator that raised: one that is stopped hears nothing else, and Python joins it."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        iterator = frame.f_locals.get("self")
        workers = getattr(iterator, "_workers", None)
        if isinstance(workers, list):
            if getattr(iterator, "_worker_pids_set", False):
                # torch would report their deaths, wherever this process is by then.
                signal_handling._remove_worker_pids(id(iterator))  # type: ignore[attr-defined]
                iterator._worker_pids_set = False  # type: ignore[union-attr]
            for worker in workers:
                worker.kill()
            return workers
    return []
