"""Runs and sweeps below one folder, each under a name that is no path, and what goes on in them.

A request names a run by a digest that is looked up among the folders that were found: no path ever comes from outside,
and a folder or file that leads out of the root by a symbolic link is not shown.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from preftune.report.files import Notes, mapping, number, read_object
from preftune.report.read import INSIDE, LIVE_LOG, STATE, is_run, is_sweep
from preftune.ui.logs import Counts, Logs, States

Status = Literal["running", "finished", "stopped", "evaluation", "unknown"]
MAX_DEPTH = 6
MAX_FOLDERS = 5_000
#: Files whose change means that there is something new to show.
WATCHED = (
    LIVE_LOG,
    STATE,
    "alarms.jsonl",
    "samples.jsonl",
    "eval.json",
    "audit.json",
    "advice.json",
    "sweep.json",
    "eval/eval.json",
)
#: How far each log was read; shared, because a log is the same whoever asks.
_LOGS = Logs()
_STATES = States()
_ALARMS = Counts()
_SKIPPED = ("checkpoint-", ".", "__")


@dataclass(frozen=True)
class Entry:
    """A run or a sweep.

    Attributes:
        key: Name in addresses.
        label: Path below the root.
        folder: The folder.
        kind: ``run`` or ``sweep``.
    """

    key: str
    label: str
    folder: Path
    kind: Literal["run", "sweep"]


def find(root: Path) -> dict[str, Entry]:
    """All runs and sweeps below a folder.

    Args:
        root: The folder; it may be a run or a sweep itself.

    Returns:
        Entries by key, in the order of their paths. Folders that vanish meanwhile are left out.
    """
    base = root.resolve()
    found: dict[str, Entry] = {}
    for folder in _folders(base):
        if folder.name == INSIDE and folder != base and is_run(folder.parent):
            # A run's own evaluation, which its page shows.
            continue
        kind: Literal["run", "sweep"] | None = "sweep" if is_sweep(folder) else "run" if is_run(folder) else None
        if kind is not None and not leads_out(folder, base):
            label = folder.relative_to(base).as_posix() if folder != base else base.name
            key = hashlib.sha256(os.fsencode(folder)).hexdigest()[:20]
            found[key] = Entry(key, label, folder, kind)
    return found


def leads_out(folder: Path, root: Path) -> bool:
    """Whether a file that would be read lies outside of the root, by way of a symbolic link."""
    try:
        entries = list(folder.iterdir())
        inner = [entry / STATE for entry in entries if entry.name.startswith("checkpoint-")]
        return any(not entry.resolve().is_relative_to(root) for entry in (*entries, *inner))
    except OSError:
        return True


def signature(entry: Entry) -> str:
    """Changes whenever something of the run or sweep changes; ``gone`` where its folder has vanished."""
    if not entry.folder.is_dir():
        return "gone"
    parts = []
    for name in WATCHED:
        try:
            facts = (entry.folder / name).stat()
            parts.append(f"{name}:{facts.st_size}:{facts.st_mtime_ns}")
        except OSError:
            continue
    return hashlib.sha256("|".join([*parts, status_of(entry.folder)]).encode()).hexdigest()[:16]


def status_of(folder: Path) -> Status:
    """Whether a run goes on.

    Args:
        folder: Its folder.

    Returns:
        ``running`` while its process is alive; ``stopped`` where it died without saying so; ``evaluation`` for a folder
        that holds nothing else; ``unknown`` for other runs that left no ``log.jsonl``.
    """
    facts = _LOGS.facts(folder / LIVE_LOG)
    if facts.empty:
        evaluated = (folder / "eval.json").is_file() and not (folder / STATE).is_file()
        return "evaluation" if evaluated else "unknown"
    if facts.ended:
        return "finished"
    return "running" if process_of(folder) is not None else "stopped"


def begun_of(folder: Path) -> dict[str, Any]:
    """What a run said when it began: process, machine, token, planned steps."""
    return _LOGS.facts(folder / LIVE_LOG).begun


def process_of(folder: Path) -> Any | None:
    """The process of a run, only if it is the very one that wrote the log.

    Args:
        folder: Output folder of the run.

    Returns:
        A ``psutil.Process``, or ``None`` where it has ended, is another one with the same number, or runs elsewhere.
    """
    import psutil

    from preftune.config.machine import machine_id

    begun = begun_of(folder)
    pid, started = begun.get("pid"), number(begun.get("started"))
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 1 or started is None:
        return None
    if begun.get("machine") != machine_id():
        return None
    try:
        process = psutil.Process(pid)
        # Numbers are used again: a process that began at another time is somebody else's.
        same = abs(process.create_time() - started) < 0.5 and process.status() != psutil.STATUS_ZOMBIE
        same = same and process.uids().real == os.getuid()
    except (psutil.Error, OverflowError):
        return None
    return process if same else None


def overview(entry: Entry) -> dict[str, Any]:
    """One line about a run or sweep, for the list."""
    facts: dict[str, Any] = {"key": entry.key, "label": entry.label, "kind": entry.kind, "signature": signature(entry)}
    if entry.kind == "sweep":
        content = read_object(entry.folder / "sweep.json", Notes()) or {}
        trials = content.get("trials")
        return {**facts, "status": "unknown", "trials": len(trials) if isinstance(trials, list) else 0}
    log = _LOGS.facts(entry.folder / LIVE_LOG)
    if log.empty:
        # Of TRL, or of a Python script without the callback: what it left at its last save is all there is.
        log = _STATES.facts(entry.folder)
    return {
        **facts,
        "status": status_of(entry.folder),
        "step": number(log.last.get("step")),
        "max_steps": number(log.begun.get("max_steps")),
        "loss": log.loss,
        "accuracy": number(mapping(log.last.get("logs")).get("rewards/accuracies")),
        "alarms": _ALARMS.number(entry.folder / "alarms.jsonl"),
    }


def _folders(root: Path) -> Iterator[Path]:
    """The root and what lies below it, without checkpoints, hidden folders and symbolic links."""
    for place, inside, _ in islice(os.walk(root, followlinks=False), MAX_FOLDERS):
        folder = Path(place)
        yield folder
        deep = len(folder.relative_to(root).parts) >= MAX_DEPTH
        # In place, as os.walk asks for: what is taken out is not entered.
        inside[:] = [] if deep else sorted(name for name in inside if not name.startswith(_SKIPPED))
