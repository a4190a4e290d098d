"""What the page starts: `preftune run`, and a finished run's evaluation and export, in processes of their own.

They go on when the page is closed. What is asked for becomes single words of a command line, never a shell's, and no
word may look like a flag. The folder of a run is made inside the folder that the page shows. Model code from the Hub is
not run. A run is gone on with only where its record holds nothing but what this page may ask for: the record is a file
like any other in a folder that may be somebody else's.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.errors import ConfigError, PreftuneError, SetupError
from preftune.files import parse_json
from preftune.pipeline.stages import STATE
from preftune.ui.folders import process_of

#: What the page may set; everything else is advised, and shown with the plan.
SETTINGS = ("beta", "learning_rate", "num_train_epochs", "max_steps", "max_length", "test_split_size")
#: What a run prints, beside its results.
LOG = "launch.log"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NUMBER = re.compile(r"\d+(\.\d+)?([eE]-?\d+)?")
_MOST_LETTERS = 4096
#: Bytes of a log's end that the page shows.
_TAIL = 16_384
_PLAN_SECONDS = 600.0
#: Seconds between two looks at whether the browser is still there.
_LOOK = 0.25


#: What can be done with a run that is not running -> the words after ``preftune``; those of a run are in its record.
WORK: dict[str, tuple[str, ...]] = {
    "evaluate": ("eval", "--model", "{folder}"),
    "export": ("export", "{folder}"),
    "resume": (),
}


@dataclass(frozen=True)
class Order:
    """A run that is asked for.

    Attributes:
        data: File, folder or name on the Hub.
        model: Folder or name on the Hub.
        folder: The run's folder.
        settings: Words for further settings.
    """

    data: str
    model: str
    folder: Path
    settings: tuple[str, ...] = ()

    def command(self, *more: str) -> list[str]:
        """The command that starts it, word by word."""
        words = ["run", self.data, "--model", self.model, "--out", str(self.folder), *self.settings, *more]
        return [sys.executable, "-m", "preftune", *words]


def read_order(root: Path, content: dict[str, Any]) -> Order:
    """What the page asks for.

    Args:
        root: The folder that the page shows.
        content: ``data``, ``model``, ``name``, and perhaps ``settings``.

    Raises:
        ConfigError: Something is missing, or not what it has to be.
    """
    data, model = (_word(content, name) for name in ("data", "model"))
    name = _word(content, "name")
    if not _NAME.fullmatch(name):
        raise ConfigError(
            "not a name for a folder", where="name", value=name, allowed="letters, digits, dots, dashes, underscores"
        )
    folder = root.resolve() / name
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError("something else has this name", where="name", value=name, remedy="take another name")
    settings: list[str] = []
    given = content.get("settings", {})
    if not isinstance(given, dict):
        raise ConfigError("not a mapping of names to numbers", where="settings")
    for key, value in given.items():
        if key not in SETTINGS:
            raise ConfigError("cannot be set here", where="settings", value=str(key)[:40], allowed=", ".join(SETTINGS))
        if value in ("", None):
            continue
        if not isinstance(value, str) or not _NUMBER.fullmatch(value):
            raise ConfigError("not a number", where=key, value=str(value)[:40], allowed="a number such as 0.1 or 1e-6")
        settings += [f"--{key}", value]
    return Order(data, model, folder, tuple(settings))


def recorded_order(folder: Path) -> Order:
    """What a run in a folder was asked for, where this page could have asked for it.

    Raises:
        ConfigError: The run was begun otherwise.
    """
    try:
        words = parse_json((folder / STATE).read_text(encoding="utf-8"))["command"]
        (verb, data), given = words[1:3], dict(zip(words[3::2], words[4::2], strict=True))
        out, settings = Path(given.pop("--out")), {key.removeprefix("--"): value for key, value in given.items()}
        content = {"data": data, "model": settings.pop("model"), "name": out.name, "settings": settings}
        order = read_order(out.parent, content)
        if verb == "run" and order.folder.resolve() == folder.resolve():
            return order
    except (OSError, ValueError, KeyError, TypeError, AttributeError, PreftuneError):
        pass
    raise ConfigError(
        "it was not begun by this page, or with more than this page can set",
        where="resume",
        value=folder.name,
        remedy="use the command that it printed when it stopped",
    )


def _word(content: dict[str, Any], name: str) -> str:
    value = content.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError("not given", where=name, remedy="fill it in")
    word = value.strip()
    if word.startswith("-") or len(word) > _MOST_LETTERS or not word.isprintable():
        raise ConfigError("not a file, folder or name", where=name, value=word[:80])
    return word


class Launcher:
    """Starts runs, and tells what they print.

    Args:
        root: The folder that the page shows.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._begun: dict[str, subprocess.Popen[bytes]] = {}
        self._logs: dict[str, Path] = {}
        self._planning = False

    async def plan(self, content: dict[str, Any], gone: Callable[[], Awaitable[bool]]) -> dict[str, Any]:
        """What a run would do, as `preftune run --dry_run` prints it; nothing is left behind.

        Args:
            content: What the page asks for.
            gone: Tells whether whoever asked has left.

        Raises:
            ConfigError: It cannot be asked for.
            SetupError: Another plan is being made.
        """
        order = read_order(self._root, content)
        if self._planning:
            raise SetupError("another plan is being made", where="plan", remedy="try again when it is done")
        self._planning = True
        try:
            process = await asyncio.create_subprocess_exec(
                *order.command("--dry_run"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
            )
            return await _printed(process, gone)
        finally:
            self._planning = False

    def start(self, content: dict[str, Any]) -> dict[str, Any]:
        """Start a run, or go on with one that was begun with the same words.

        Args:
            content: What the page asks for.

        Raises:
            ConfigError: It cannot be asked for.
            SetupError: It runs already, or cannot be started.
        """
        order = read_order(self._root, content)
        self._begin(order.folder.name, order.folder, order.command())
        return {"done": f"started {order.folder.name}; it appears in the list when its training begins"}

    def work(self, folder: Path, action: str) -> dict[str, Any]:
        """Evaluate a run on what it held out, make a model of it that others load, or go on with it.

        Args:
            folder: Its folder.
            action: One of :data:`WORK`.

        Raises:
            ConfigError: It cannot be gone on with from here.
            SetupError: It runs, or the work cannot be started.
        """
        if process_of(folder) is not None:
            raise SetupError("it is running", where=action, value=folder.name, remedy="stop it first, or wait")
        place = str(folder.resolve())
        words = [word.format(folder=place) for word in WORK[action]]
        command = [sys.executable, "-m", "preftune", *words] if words else recorded_order(folder).command()
        name = f"{action} {folder.name}"
        self._begin(name, folder, command)
        return {"done": f"started: {name}", "follow": name}

    def _begin(self, name: str, folder: Path, command: list[str]) -> None:
        place = folder.resolve()
        if any(self._alive(other) for other, log in self._logs.items() if log.parent == place):
            raise SetupError("it is running", where="start", value=name, remedy="stop it on its page first, or wait")
        try:
            folder.mkdir(exist_ok=True)
            # No link is followed: the log is made in this folder or not at all.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            log = os.open(folder / LOG, flags, 0o600)
        except OSError as error:
            raise SetupError(f"cannot write ({error.strerror})", where="start", value=name) from error
        try:
            self._logs[name] = place / LOG
            self._begun[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(),
                # The run is to go on when the page ends.
                start_new_session=True,
            )
        except OSError as error:
            raise SetupError(f"cannot be started ({error.strerror})", where="start", value=name) from error
        finally:
            os.close(log)

    def told(self, name: str) -> dict[str, Any]:
        """What a run that was started here has printed last, whether it is alive, and how it ended.

        Args:
            name: Its folder's name, or what :meth:`work` said.

        Raises:
            ConfigError: No such run was started here.
        """
        process = self._begun.get(name)
        if process is None:
            raise ConfigError("no run of this name was started here", where="name", value=name[:80])
        code = process.poll()
        try:
            with open(self._logs[name], "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            text = ""
        return {"text": text, "running": code is None, "code": code}

    def _alive(self, name: str) -> bool:
        process = self._begun.get(name)
        return process is not None and process.poll() is None


async def _printed(process: asyncio.subprocess.Process, gone: Callable[[], Awaitable[bool]]) -> dict[str, Any]:
    """What a process prints until it ends; it is ended when nobody waits for it any more."""
    reading = asyncio.ensure_future(process.communicate())
    waited = 0.0
    try:
        while not reading.done() and waited < _PLAN_SECONDS and not await gone():
            await asyncio.wait({reading}, timeout=_LOOK)
            waited += _LOOK
    finally:
        if not reading.done():
            process.kill()
    out, _ = await reading
    return {"text": out.decode("utf-8", "replace"), "code": process.returncode}


def _environment() -> dict[str, str]:
    # Modules are looked for where this process found them, and not in whatever folder is the current one.
    places = os.pathsep.join(os.path.abspath(place) for place in sys.path if place)
    return {**os.environ, "PYTHONPATH": places, "PYTHONUNBUFFERED": "1", "COLUMNS": "100", "NO_COLOR": "1"}
