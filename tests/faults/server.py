"""A process that has imported everything, and forks a child for every trial: half a second instead of ten.

The server computes nothing itself, so that no thread exists when it forks. A trial is one JSON line in, one out.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0


class ForkServer:
    """Client side.

    Args:
        folder: The world, see :mod:`tests.faults.worlds`.
        extra: Further modules to import beforehand.
    """

    def __init__(self, folder: Path, extra: tuple[str, ...] = ()) -> None:
        self.world = folder
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server", str(folder), *extra],
            cwd=ROOT,
            env={**environment, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def run(self, job: str, out: Path, **options: Any) -> dict[str, Any]:
        """Run ``job`` in a child. Returns ``ended`` (``ok``, ``error``, ``killed`` or ``hung``) and what it said."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"job": job, "out": str(out), **options}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the fork server has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer


# ---- faults, inside the child --------------------------------------------------------------------------------------


class Faults:
    """Counts what is done to files below a folder, and strikes at the chosen one.

    Args:
        below: Only operations on paths below this folder count.
        at: Number of the operation to strike at, from 1; ``None`` only counts.
        strike: What happens there.
        lasting: Strike at every later operation too.
    """

    _EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")

    def __init__(self, below: str, at: int | None, strike: Callable[[str], None], lasting: bool = False) -> None:
        self.count = 0
        self._below, self._at, self._strike, self._lasting = below, at, strike, lasting
        self._busy = False
        sys.addaudithook(self._hear)
        self._fsync = os.fsync
        # The only one that raises no audit event.
        os.fsync = self._sync  # type: ignore[assignment]

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR)) or any(c in str(mode) for c in "wax+")
            if not writes:
                return
        elif event in self._EVENTS:
            path = args[0]
        else:
            return
        if isinstance(path, (str, bytes, os.PathLike)) and self._is_below(os.path.abspath(os.fsdecode(path))):
            self._note(os.fsdecode(path))

    def _is_below(self, path: str) -> bool:
        return path == self._below or path.startswith(self._below + os.sep)

    def _sync(self, handle: Any) -> None:
        number = handle if isinstance(handle, int) else handle.fileno()
        path = os.readlink(f"/proc/self/fd/{number}")
        if self._is_below(path):
            self._note(path)
        self._fsync(handle)

    def _note(self, path: str) -> None:
        if self._busy:
            return
        self.count += 1
        if self._at is not None and (self.count == self._at or (self._lasting and self.count > self._at)):
            self._busy = True
            try:
                self._strike(path)
            finally:
                self._busy = False


def die(path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(PATIENCE)


def no_space(path: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def interrupt(path: str) -> None:
    raise KeyboardInterrupt


STRIKES: dict[str, Callable[[str], None]] = {"kill": die, "full": no_space, "interrupt": interrupt}


def jump_clock() -> None:
    """Let the wall clock jump by days, there and back, several times a second."""
    true = time.time
    time.time = lambda: true() + (-1) ** int(time.monotonic() * 4) * 1e6


def train(world: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint if there is one, and save as the command line does."""
    from preftune.runs.failures import foreseen
    from preftune.training.checkpoints import list_checkpoints
    from tests.faults.worlds import make_trainer, outcome

    if options.get("clock"):
        jump_clock()
    resume: Any = bool(list_checkpoints(out)) or None
    with foreseen(SimpleNamespace(output_dir=str(out))):
        trainer = make_trainer(world, out, options["scenario"], **options.get("changes", {}))
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(str(out))
        trainer.save_state()
    seconds = trainer.state.log_history[-1].get("train_runtime")
    return {"outcome": outcome(out, trainer.state.log_history), "resumed": bool(resume), "seconds": seconds}


JOBS: dict[str, Callable[[Path, Path, dict[str, Any]], dict[str, Any]]] = {"train": train}


def _child(world: Path, request: dict[str, Any], pipe: IO[str]) -> None:
    import torch

    from preftune.errors import PreftuneError

    torch.set_num_threads(1)
    out = Path(request["out"])
    os.environ["PREFTUNE_CACHE"] = request.get("cache", f"{out}-cache")
    os.environ["HF_DATASETS_CACHE"] = f"{out}-datasets"
    said: list[str] = []
    answer: dict[str, Any]
    faults = Faults(str(out), request.get("at"), STRIKES[request.get("strike", "kill")], request.get("lasting", False))
    if "file_size" in request:
        # The kernel ends the process, or fails the write, in the middle of the file that grows beyond this.
        handler = signal.SIG_DFL if request.get("strike", "kill") == "kill" else signal.SIG_IGN
        signal.signal(signal.SIGXFSZ, handler)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], resource.RLIM_INFINITY))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answer = {"ended": "ok", **JOBS[request["job"]](world, out, request)}
        said = [str(w.message) for w in caught if w.category is UserWarning]
    except PreftuneError as error:
        answer = {"ended": "error", "error": str(error), "clear": True}
    except BaseException as error:
        answer = {"ended": "error", "error": f"{type(error).__name__}: {error}", "clear": False}
        answer["trace"] = traceback.format_exc()[-1500:]
    if "file_size" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    pipe.write(json.dumps({**answer, "operations": faults.count, "warnings": said}))
    pipe.flush()


def _trial(world: Path, request: dict[str, Any]) -> dict[str, Any]:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        # Nothing of the server's may be closed or flushed twice.
        with os.fdopen(write, "w") as pipe:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            # A log file on the other end may be longer than the child may write.
            os.dup2(devnull, 2)
            with contextlib.suppress(BaseException):
                _child(world, request, pipe)
        os._exit(0)
    os.close(write)
    started = time.monotonic()
    deadline = started + request.get("seconds", PATIENCE)
    done = status = 0
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.005)
    if not done:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    seconds = time.monotonic() - started
    if text:
        return {**json.loads(text), "took": seconds}
    ended = "killed" if "seconds" in request or done else "hung"
    return {"ended": ended, "signal": status & 0x7F, "took": seconds}


def serve(world: Path, extra: list[str]) -> None:
    """Answer requests until the client goes."""
    import importlib

    for name in ("torch", "datasets", "peft", "preftune", "preftune.training", "tests.faults.worlds", *extra):
        importlib.import_module(name)
    for name in extra:
        JOBS.update(getattr(importlib.import_module(name), "JOBS", {}))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_trial(world, json.loads(line))), flush=True)


if __name__ == "__main__":
    # The module that children import again must be this one.
    sys.modules["tests.faults.server"] = sys.modules["__main__"]
    serve(Path(sys.argv[1]), sys.argv[2:])
