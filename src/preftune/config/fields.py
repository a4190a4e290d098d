"""The fields of a settings class: name, type, default, allowed values and help text, read from its dataclass."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any, Union, get_args, get_origin

MISSING = dataclasses.MISSING

# Wider than their annotation: the library's own scripts hand a boolean to a field that is typed as text, and parsers
# made from the fields understand no union.
_WIDER: dict[str, Any] = {
    "resume_from_checkpoint": Union[bool, str, None],  # noqa: UP007 - evaluated at run time
    "guards": bool | str | dict[str, Any],
}


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting.

    Attributes:
        name: Its name, as in YAML and after ``--``.
        annotation: Its type, resolved.
        default: The value when nobody sets it (a fresh one from its factory, or ``MISSING``).
        help: One sentence.
        choices: The allowed values where the type alone does not say.
        owner: Name of the class it belongs to.
    """

    name: str
    annotation: Any
    default: Any
    help: str
    choices: tuple[Any, ...]
    owner: str

    @property
    def is_boolean(self) -> bool:
        """Whether ``--name`` alone means true."""
        return bool in members(self.annotation)

    @property
    def is_sequence(self) -> bool:
        """Whether several values may follow the flag."""
        return any(get_origin(member) is list or member is list for member in members(self.annotation))


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type itself as the only one."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(get_args(annotation))
    return (annotation,)


def fields_of(cls: type[Any]) -> dict[str, Field]:
    """Read the settings of a dataclass.

    Args:
        cls: A dataclass; its ``metadata["help"]`` and ``metadata["choices"]`` are used where present.

    Returns:
        Field by name, in the order of definition.
    """
    hints = typing.get_type_hints(cls)
    documented = _documented(cls)
    found = {}
    for item in dataclasses.fields(cls):
        if not item.init:
            continue
        if item.default_factory is not MISSING:
            default: Any = item.default_factory()
        else:
            default = item.default
        found[item.name] = Field(
            name=item.name,
            annotation=_WIDER.get(item.name, hints[item.name]),
            default=default,
            help=_first_sentence(str(item.metadata.get("help") or documented.get(item.name, ""))),
            choices=tuple(item.metadata.get("choices", ())),
            owner=cls.__name__,
        )
    return found


def fields_of_all(classes: Mapping[str, type[Any]]) -> dict[str, Field]:
    """Fields of several classes under one roof; the first class that has a name describes it."""
    found: dict[str, Field] = {}
    for cls in classes.values():
        for name, field in fields_of(cls).items():
            found.setdefault(name, field)
    return found


def describe(annotation: Any, choices: tuple[Any, ...] = ()) -> str:
    """Say in words what a field accepts, for error messages and help.

    Args:
        annotation: A resolved type.
        choices: Allowed values that the type does not tell.

    Returns:
        For example ``an integer or null``.
    """
    if choices:
        words = ", ".join(str(choice) for choice in choices)
        return words + (", null" if type(None) in members(annotation) else "")
    alternatives = members(annotation)
    # An enumeration beside plain text means: one of these names.
    if any(isinstance(member, type) and issubclass(member, Enum) for member in alternatives):
        alternatives = tuple(member for member in alternatives if member is not str)
    ordered = sorted(alternatives, key=lambda member: member is type(None))
    return " or ".join(dict.fromkeys(_describe_one(member) for member in ordered))


def _describe_one(member: Any) -> str:
    plain = {
        bool: "true or false",
        int: "an integer",
        float: "a number such as 0.1 or 1e-6",
        str: "text",
        dict: "a mapping",
        list: "a list",
        type(None): "null",
        Any: "anything",
    }
    if member in plain:
        return plain[member]
    origin = get_origin(member)
    if origin is list:
        (item,) = get_args(member) or (Any,)
        if isinstance(item, type) and issubclass(item, Enum):
            return f"a list of {_describe_one(item)}"
        plural = {str: "texts", int: "integers", float: "numbers", bool: "booleans"}.get(item, "values")
        return f"a list of {plural}"
    if origin is dict:
        return "a mapping"
    if origin is typing.Literal:
        return ", ".join(str(value) for value in get_args(member))
    if isinstance(member, type) and issubclass(member, Enum):
        return ", ".join(str(item.value) for item in member)
    return str(getattr(member, "__name__", member))


def _documented(cls: type[Any]) -> dict[str, str]:
    """Texts of the ``Attributes:`` sections of a class and its bases, by attribute."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        doc = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        section = re.search(r"^Attributes:\n((?:[ \t].*\n?|\n)+)", doc, re.MULTILINE)
        if section is None:
            continue
        for entry in re.finditer(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section.group(1), re.MULTILINE):
            found.setdefault(entry.group(1), entry.group(2).replace("``", ""))
    return found


def _first_sentence(text: str) -> str:
    flat = " ".join(text.replace("%%", "%").split())
    end = re.search(r"\.(\s|$)", flat)
    return flat[: end.start() + 1] if end else flat
