"""Turn a value from YAML or from the command line into the type that a field asks for, or say why it cannot be."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from enum import Enum
from typing import Any, Literal, get_args, get_origin

import yaml

from preftune.config.fields import members
from preftune.config.yaml_text import read_yaml

_TRUE = frozenset({"true", "yes", "on", "1", "y", "t"})
_FALSE = frozenset({"false", "no", "off", "0", "n", "f"})
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?\Z")
_COMMA_LIST = re.compile(r"[\w./:+-]+(,[\w./:+-]+)+\Z")


class Mismatch(ValueError):
    """A value does not fit its field.

    Args:
        why: What is wrong with it, as a clause.
        remedy: What to write instead, where that is known.
    """

    def __init__(self, why: str, remedy: str | None = None) -> None:
        super().__init__(why)
        self.why = why
        self.remedy = remedy


def coerce(value: Any, annotation: Any, *, choices: Iterable[Any] = (), text: bool = False) -> Any:
    """Fit a value to a type.

    Args:
        value: What was written: any YAML value, or text, or a list of texts.
        annotation: The field's resolved type.
        choices: Allowed values that the type does not tell.
        text: Whether the value comes from the command line, where everything is text.

    Returns:
        The value in the field's own type.

    Raises:
        Mismatch: If it does not fit.
    """
    allowed = tuple(choices)
    options = members(annotation)
    if value is None:
        if type(None) in options or Any in options:
            return None
        raise Mismatch("null is not allowed here")
    if text and isinstance(value, str) and value == "null" and type(None) in options:
        return None
    if (
        text
        and isinstance(value, str)
        and value.lower() in ("none", "~")
        and type(None) in options
        and str not in options
    ):
        return None
    result = _fit(value, options, text)
    for item in result if isinstance(result, list) else [result]:
        plain = item.value if isinstance(item, Enum) else item
        if allowed and plain is not None and plain not in allowed:
            raise Mismatch("not an allowed value")
    return result


def _fit(value: Any, options: tuple[Any, ...], text: bool) -> Any:
    """Try the alternatives of a union, the most specific reading first."""
    if Any in options:
        return value
    reasons: list[Mismatch] = []
    has_enum = any(isinstance(option, type) and issubclass(option, Enum) for option in options)
    for option in sorted(options, key=lambda option: _rank(option, value)):
        if option is type(None) or (option is str and has_enum):
            continue
        try:
            return _fit_one(value, option, text)
        except Mismatch as reason:
            reasons.append(reason)
    # The reason that tells what to do is worth more than the first one.
    raise next((reason for reason in reasons if reason.remedy), reasons[0] if reasons else Mismatch("not allowed here"))


def _rank(option: Any, value: Any) -> int:
    """Order of attempts: what the value already is, then narrow types, then text."""
    if isinstance(value, bool):
        return 0 if option is bool else 1
    origin = get_origin(option) or option
    if isinstance(origin, type) and not issubclass(origin, str) and isinstance(value, origin):
        return 0
    if isinstance(value, str) and origin is list:
        # "[a, b]" is a list, "a" is a text, where a field takes both.
        return 1 if value.lstrip().startswith("[") or _COMMA_LIST.match(value) else 9
    if isinstance(value, str) and origin is dict:
        return 1 if value.lstrip().startswith("{") else 10
    return {bool: 2, int: 3, float: 4, str: 8}.get(origin, 5)


def _fit_one(value: Any, option: Any, text: bool) -> Any:
    origin = get_origin(option)
    if origin is Literal:
        return _to_literal(value, get_args(option))
    if option is list or origin is list:
        (item,) = get_args(option) or (Any,)
        return _to_list(value, item, text)
    if option is dict or origin is dict:
        return _to_mapping(value)
    if isinstance(option, type) and issubclass(option, Enum):
        return _to_enum(value, option)
    if isinstance(value, list) and len(value) == 1 and text:
        value = value[0]
    if option is bool:
        return _to_bool(value)
    if option is int:
        return _to_int(value)
    if option is float:
        return _to_float(value)
    if option is str:
        return _to_text(value)
    raise Mismatch(
        f"a {getattr(option, '__name__', option)} cannot be written in a file or flag", "set it in a Python script"
    )


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if isinstance(value, (str, int)) and word in _TRUE | _FALSE:
        return word in _TRUE
    raise Mismatch("not true or false")


def _to_int(value: Any) -> int:
    number = _to_float(value)
    if not number.is_integer():
        raise Mismatch("not an integer")
    # Beyond 2**53 a float has holes, so whole numbers are read as such.
    return int(value) if isinstance(value, int) or re.fullmatch(r"[-+]?\d+", str(value)) else int(number)


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise Mismatch("not a number")
    # PyYAML reads 1e-6 as text, because YAML 1.1 wants a point in it.
    if isinstance(value, str) and not _NUMBER.match(value.strip()):
        raise Mismatch("not a number")
    try:
        number = float(value)
    except (OverflowError, ValueError) as error:
        raise Mismatch("not a number that fits") from error
    if not math.isfinite(number):
        raise Mismatch("not a finite number")
    return number


def _to_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, (bool, float)):
        raise Mismatch("not text", "put it in quotes")
    raise Mismatch("not text")


def _to_enum(value: Any, option: type[Enum]) -> Enum:
    values = {str(item.value): item for item in option}
    # YAML 1.1 reads an unquoted `no` as false.
    word = "no" if value is False and "no" in values else str(value.value if isinstance(value, Enum) else value)
    if word not in values:
        raise Mismatch("not an allowed value")
    return values[word]


def _to_literal(value: Any, allowed: tuple[Any, ...]) -> Any:
    for item in allowed:
        if value is item or (not isinstance(value, bool) and not isinstance(item, bool) and value == item):
            return item
        if isinstance(value, str) and isinstance(item, bool) and value.lower() == str(item).lower():
            return item
    raise Mismatch("not an allowed value")


def _to_list(value: Any, item: Any, text: bool) -> list[Any]:
    values = value if isinstance(value, (list, tuple)) else [value]
    if text and len(values) == 1 and isinstance(values[0], str):
        single = values[0].strip()
        if single.startswith("["):
            values = _read_nested(single, list, "a list")
            text = False
        elif _COMMA_LIST.match(single):
            values = single.split(",")
    elif isinstance(value, dict):
        raise Mismatch("a mapping where a list is expected")
    return [coerce(entry, item, text=text) for entry in values]


def _to_mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str) and value.strip().startswith("{"):
        value = _read_nested(value.strip(), dict, "a mapping")
    if not isinstance(value, dict):
        raise Mismatch("not a mapping", 'write it as YAML, or as JSON such as {"key": 1}')
    return {str(key): _numbers_inside(entry) for key, entry in value.items()}


def _read_nested(text: str, kind: type[Any], words: str) -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        try:
            found = read_yaml(text)
        except (yaml.YAMLError, ValueError) as error:
            raise Mismatch(f"not readable as {words}", "write it as JSON inside single quotes") from error
    if not isinstance(found, kind):
        raise Mismatch(f"not {words}")
    return found


def _numbers_inside(value: Any) -> Any:
    """Read 1e-6 inside nested mappings, whose types nobody declares, as the number that was meant."""
    if isinstance(value, dict):
        return {key: _numbers_inside(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_numbers_inside(entry) for entry in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value
