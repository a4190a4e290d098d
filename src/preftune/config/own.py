"""Flags of a verb alone, told apart from the settings that it shares with training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from preftune.config.coercion import Mismatch, coerce
from preftune.config.fields import describe, fields_of
from preftune.config.secrets import redact
from preftune.config.sources import CommandLine
from preftune.errors import ConfigError

T = TypeVar("T")


def take_own(line: CommandLine, cls: type[T], **defaults: Any) -> tuple[T, CommandLine]:
    """Take the flags out that are fields of a class.

    Args:
        line: The split command line.
        cls: A dataclass. A flag of a boolean field needs no value, and ``--no_name`` sets it to false; one of a list of
            texts may be repeated.
        defaults: Values where no flag is given, over those of the class.

    Returns:
        An instance of the class, and the command line without its flags.

    Raises:
        ConfigError: A flag has no value, or one that does not fit.
    """
    own = fields_of(cls)
    given: dict[str, Any] = {}
    rest = []
    for name, values, flag in line.flags:
        turned_off = name.removeprefix("no_")
        if name not in own and not values and turned_off in own and own[turned_off].is_boolean:
            given[turned_off] = False
            continue
        if name not in own:
            rest.append((name, values, flag))
            continue
        field = own[name]
        if not values and not field.is_boolean:
            raise ConfigError("needs a value", where=flag, remedy=f"write {flag} VALUE")
        if field.is_sequence:
            # As they are: what a text means is the verb's affair.
            given.setdefault(name, []).extend(values)
            continue
        text = " ".join(values) or "true"
        try:
            given[name] = coerce(text, field.annotation, choices=field.choices, text=True)
        except Mismatch as why:
            allowed = describe(field.annotation, field.choices)
            raise ConfigError(why.why, where=flag, value=redact(text), allowed=allowed, remedy=why.remedy) from why
    return cls(**{**defaults, **given}), replace(line, flags=tuple(rest))
