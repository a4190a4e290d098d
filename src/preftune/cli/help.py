"""Help for the verbs whose settings are the fields of classes."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from enum import Enum
from types import MappingProxyType
from typing import Any

from preftune.config.fields import MISSING, Field, describe, fields_of

_INDENT = 6
_WIDTH = 110


def render(
    verb: str,
    summary: str,
    groups: Mapping[str, type[Any]],
    defaults: Mapping[str, Any] = MappingProxyType({}),
    without: Iterable[str] = (),
) -> str:
    """Write the help of a verb.

    Args:
        verb: Its name.
        summary: What it does.
        groups: Heading to dataclass; the first class that has a field lists it, and a class lists its own fields before
            those it inherits.
        defaults: Defaults of the command line where they differ from those of the classes.
        without: Fields that the verb refuses.

    Returns:
        Plain text.
    """
    lines = [
        f"usage: preftune {verb} [--config FILE.yaml ...] [--name value ...]",
        "",
        f"{summary[0].upper()}{summary[1:]}.",
        "Any field below may stand in the YAML file or follow as a flag; flags win.",
        "Lists: --name a b. Mappings: --name '{\"key\": 1}'. Switches: --name, --no_name, --name false.",
    ]
    seen = set(without)
    for heading, cls in groups.items():
        own, inherited = _split(cls)
        for title, keep in ((heading, own), ("from transformers.TrainingArguments", inherited)):
            shown = [field for name, field in fields_of(cls).items() if name not in seen and keep(name)]
            if shown:
                lines += ["", f"{title}:"]
                lines += [line for field in shown for line in field_lines(_with_default(field, defaults))]
                seen |= {field.name for field in shown}
    return "\n".join(lines)


def _with_default(field: Field, defaults: Mapping[str, Any]) -> Field:
    return replace(field, default=defaults.get(field.name, field.default))


def _split(cls: type[Any]) -> tuple[Callable[[str], bool], Callable[[str], bool]]:
    """Tell a class's own fields, those of its bases in this package included, from a library's."""
    own = {
        name
        for base in cls.__mro__
        if not base.__module__.startswith("transformers")
        for name in inspect.get_annotations(base)
    }
    return (lambda name: name in own), (lambda name: name not in own)


def field_lines(field: Field) -> list[str]:
    """A field's lines in a help text: name, type and default, and below them what it does."""
    head = f"  --{field.name}  {describe(field.annotation, field.choices)}"
    if field.default is not MISSING:
        head += f"  [{_shown(field.default)}]"
    lines = textwrap.wrap(head, _WIDTH, subsequent_indent=" " * _INDENT, break_long_words=False)
    if field.help:
        indent = " " * _INDENT
        lines += textwrap.wrap(field.help, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value != "" else "''"
