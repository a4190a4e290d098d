"""What ``log.jsonl`` says at this moment, without reading all of it again each time somebody asks."""

from __future__ import annotations

import os
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from preftune.files import finite, parse_json
from preftune.report.files import Notes, leads_out, number, objects, read_lines, read_object
from preftune.report.read import state_file

_BLOCK = 8 * 1024 * 1024
#: Last lines that are looked through for figures; a line of evaluation carries no training loss.
_LAST = 64
#: Bytes at the beginning of a file by which another file in its place is noticed.
_HEAD = 512
_MAX_FILES = 5_000
#: Of a log that is larger when it is first seen, the beginning and so many bytes at the end are read.
_MOST = 8 * _BLOCK
#: A line of ours has a few hundred bytes.
_LONGEST_LINE = 1024 * 1024


@dataclass
class LogFacts:
    """What a list of runs needs to know of a log.

    Attributes:
        begun: The last beginning: process, machine, planned steps.
        last: The last line with figures.
        loss: The last training loss.
        ended: Whether the run said that nothing follows.
        empty: Whether there is no complete line.
    """

    begun: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    loss: float | None = None
    ended: bool = False
    empty: bool = True


@dataclass
class _Read:
    """How far a file was read, and how to see that it still is the same one."""

    facts: LogFacts = field(default_factory=LogFacts)
    offset: int = 0
    head: bytes = b""
    tail: bytes = b""


class Logs:
    """Remembers how far each log was read. A log that was replaced is read anew."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Path, _Read] = {}

    def facts(self, path: Path) -> LogFacts:
        """The state of a log.

        Args:
            path: The file; it may be missing, and be written at this moment.

        Returns:
            What its complete lines say; damaged lines are left out.
        """
        with self._lock:
            try:
                if not path.is_file() or leads_out(path):
                    self._known.pop(path, None)
                    return LogFacts()
                with path.open("rb") as file:
                    known = self._known.get(path)
                    if known is None or not _is_same(file, known):
                        known = _Read()
                    _read_on(file, known)
            except OSError:
                return LogFacts()
            if len(self._known) >= _MAX_FILES:
                self._known.clear()
            self._known[path] = known
            return known.facts


class States:
    """What ``trainer_state.json`` says about runs without a log, read anew where the file has changed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Path, tuple[tuple[Path, int, int], LogFacts]] = {}

    def facts(self, folder: Path) -> LogFacts:
        """The last saved state of a run.

        Args:
            folder: Its folder; the state lies there or in its last checkpoint.

        Returns:
            Last step and figures; nothing where there is no readable state.
        """
        path = state_file(folder)
        try:
            about = None if path is None else path.stat()
        except OSError:
            about = None
        if path is None or about is None:
            return LogFacts()
        key = (path, about.st_size, about.st_mtime_ns)
        with self._lock:
            known = self._known.get(folder)
            if known is None or known[0] != key:
                if len(self._known) >= _MAX_FILES:
                    self._known.clear()
                known = self._known[folder] = (key, _of_state(read_object(path, Notes()) or {}))
            return known[1]


class Counts:
    """How many lines of a file are JSON objects, counted anew where the file has changed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Path, tuple[tuple[int, int], int]] = {}

    def number(self, path: Path) -> int:
        """The number of objects; none where there is no file.

        Args:
            path: A JSON-lines file.
        """
        try:
            about = path.stat()
        except OSError:
            return 0
        key = (about.st_size, about.st_mtime_ns)
        with self._lock:
            known = self._known.get(path)
            if known is None or known[0] != key:
                if len(self._known) >= _MAX_FILES:
                    self._known.clear()
                known = self._known[path] = (key, len(read_lines(path, Notes())))
            return known[1]


def _of_state(state: dict[str, Any]) -> LogFacts:
    lines = objects(state.get("log_history"))
    trained: dict[str, Any] = next((line for line in reversed(lines) if "loss" in line), {})
    last = {"step": state.get("global_step"), "logs": trained}
    return LogFacts({"max_steps": state.get("max_steps")}, last, number(trained.get("loss")), empty=False)


def _is_same(file: BinaryIO, known: _Read) -> bool:
    file.seek(0)
    if file.read(len(known.head)) != known.head:
        return False
    file.seek(known.offset - len(known.tail))
    return file.read(len(known.tail)) == known.tail


def _read_on(file: BinaryIO, known: _Read) -> None:
    """Take in the complete lines behind those that are known."""
    latest: deque[bytes] = deque(maxlen=_LAST)
    size = os.fstat(file.fileno()).st_size
    while True:
        if known.head and size - known.offset > _MOST:
            file.seek(size - _MOST)
            known.offset = size - _MOST + len(file.readline(_BLOCK))
        file.seek(known.offset)
        block = file.read(_BLOCK)
        end = block.rfind(b"\n") + 1
        if not end:
            if len(block) < _BLOCK:
                break
            # No line of ours is as long as this.
            known.offset += len(block)
            continue
        for line in block[:end].split(b"\n"):
            # Of many lines few are about the run itself; the others are not even parsed.
            if len(line) > _LONGEST_LINE:
                continue
            if b'"event"' in line:
                _enter_event(known.facts, _parsed(line))
            if line.strip():
                latest.append(line)
        known.offset += end
        known.tail = block[max(0, end - _HEAD) : end]
        if not known.head:
            known.head = block[:end][:_HEAD]
    if latest:
        _enter_figures(known.facts, latest)


def _enter_event(facts: LogFacts, event: dict[str, Any]) -> None:
    if event.get("event") == "begin":
        facts.begun, facts.ended = event, False
    elif event.get("event") == "end":
        facts.ended = True


def _enter_figures(facts: LogFacts, latest: deque[bytes]) -> None:
    """The newest figures among the last lines; where a kind is missing, the older one stands."""
    found_last = False
    for line in reversed(latest):
        event = _parsed(line)
        facts.empty = facts.empty and not event
        logs = event.get("logs")
        if not isinstance(logs, dict):
            continue
        if not found_last:
            facts.last, found_last = event, True
        if "loss" in logs:
            facts.loss = number(logs["loss"])
            return


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        entry = parse_json(line)
    except ValueError:
        return {}
    found: dict[str, Any] = finite(entry) if isinstance(entry, dict) else {}
    return found
