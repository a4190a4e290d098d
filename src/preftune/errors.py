"""Errors that a person can act on: what is wrong, where, what was given, what is allowed, what to do.

Every failure that preftune foresees is raised as one of these. The command line prints ``str(error)``, which is a
single line, and exits with ``error.exit_code``; a traceback therefore always means a defect in preftune itself.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

_UNSET: Any = object()
# What a terminal obeys instead of showing it: control characters, changes of direction, halves of characters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text of others as a terminal may get it: what would move the cursor or hide something is written out.

    >>> len(printable("done" + chr(7)))
    8
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class PreftuneError(Exception):
    """Base of all foreseen failures.

    Args:
        what: The problem, as a short sentence without a final stop.
        where: File, row, field or flag that it was found in.
        value: The offending value, shown with ``repr`` and shortened.
        allowed: The values that would have been accepted.
        remedy: What the user can do next.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        value: Any = _UNSET,
        allowed: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.value = value
        self.allowed = allowed
        self.remedy = remedy
        super().__init__(self._line())

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception pickles positional arguments only; worker processes must hand over the whole error.
        return (_rebuild, (type(self), self.what, self._fields()))

    def _fields(self) -> dict[str, Any]:
        fields = {"where": self.where, "allowed": self.allowed, "remedy": self.remedy}
        return fields if self.value is _UNSET else fields | {"value": self.value}

    def with_parts(self, **parts: Any) -> PreftuneError:
        """The same error with another ``where``, ``value``, ``allowed`` or ``remedy``."""
        return _rebuild(type(self), self.what, self._fields() | parts)

    def _line(self) -> str:
        parts = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.value is not _UNSET:
            text = repr(self.value)
            parts.append(f"got {text if len(text) <= 120 else text[:117] + '...'}")
        if self.allowed:
            parts.append(f"allowed: {self.allowed}")
        if self.remedy:
            parts.append(self.remedy)
        return printable("; ".join(" ".join(part.split()) for part in parts))


def _rebuild(kind: type[PreftuneError], what: str, fields: dict[str, Any]) -> PreftuneError:
    return kind(what, **fields)


class ConfigError(PreftuneError, ValueError):
    """A setting is unknown, out of range, or contradicts another. Exit code 2, as for any wrong command line."""

    exit_code = 2


class DataError(PreftuneError, ValueError):
    """A data file, row or column cannot be used. Exit code 3."""

    exit_code = 3


class DataTypeError(DataError, TypeError):
    """What was given is no data set at all; a :class:`TypeError` for whoever catches TRL's."""


class ModelError(PreftuneError, ValueError):
    """A model, tokenizer or adapter cannot be loaded or used as asked. Exit code 4."""

    exit_code = 4


class StoreError(PreftuneError, RuntimeError):
    """The reference store is unreadable, locked for too long, or its disk is full. Exit code 5."""

    exit_code = 5


class SetupError(PreftuneError, RuntimeError):
    """The machine lacks something: an optional dependency, disk, memory, network. Exit code 6."""

    exit_code = 6


class TrainingError(PreftuneError, RuntimeError):
    """Training cannot go on with a meaningful result, for example after non-finite values. Exit code 7."""

    exit_code = 7


def flat(error: BaseException) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
