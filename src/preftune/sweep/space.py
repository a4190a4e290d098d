"""What a sweep searches: fields with listed values or ranges, read from ``--param`` and turned into cells."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from preftune.config.coercion import Mismatch, coerce
from preftune.config.fields import Field, describe, members
from preftune.errors import ConfigError

if TYPE_CHECKING:
    from optuna import Trial

Value = bool | int | float | str | None
Cell = dict[str, Value]

_RANGE = re.compile(r"(?P<low>[^.:]+(?:\.\d+)?(?:[eE][-+]?\d+)?)\.\.(?P<high>[^:]+)(?P<options>(?::[^:]+)*)\Z")
_HOW = "beta=0.05,0.1,0.2, or learning_rate=1e-6..1e-4:log, or learning_rate=1e-6..1e-4:log:5 for five points"


@dataclass(frozen=True)
class Dimension:
    """One field that is searched: listed values, or a range.

    Attributes:
        name: The setting.
        values: Listed values; empty for a range.
        low: Lower end of a range.
        high: Upper end of a range.
        log: Whether a range is searched on a logarithmic scale.
        integer: Whether a range holds whole numbers only.
    """

    name: str
    values: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False

    @property
    def is_range(self) -> bool:
        """Whether values are drawn instead of listed."""
        return not self.values

    def __str__(self) -> str:
        """As ``--param`` takes it, as far as a range has such a form."""
        if not self.is_range:
            return f"{self.name}={','.join(map(str, self.values))}"
        return f"{self.name}={self.low:g}..{self.high:g}{' (log)' if self.log else ''}"

    def suggest(self, trial: Trial) -> Value:
        """Let an Optuna trial take a value; one that was fixed beforehand is kept."""
        if not self.is_range:
            chosen: Value = trial.suggest_categorical(self.name, list(self.values))
            return chosen
        if self.integer:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)

    def to_json(self) -> Any:
        """The listed values, or the range as a mapping."""
        if not self.is_range:
            return list(self.values)
        return {"low": self.low, "high": self.high, "log": self.log, "integer": self.integer}

    @classmethod
    def from_json(cls, name: str, stored: Any) -> Dimension:
        """What :meth:`to_json` wrote."""
        return cls(name, **stored) if isinstance(stored, Mapping) else cls(name, tuple(stored))


def parse_params(texts: Sequence[str], fields: Mapping[str, Field]) -> tuple[Dimension, ...]:
    """Read ``--param`` arguments.

    Args:
        texts: ``field=value,value`` or ``field=low..high[:log][:points]``, one per field.
        fields: All settings by name.

    Returns:
        One dimension per field, in the order given.

    Raises:
        ConfigError: A name is unknown or given twice, or a value does not fit its field.
    """
    found: dict[str, Dimension] = {}
    for text in texts:
        name, equals, given = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not given.strip():
            raise ConfigError("no values to search", where="--param", value=text, allowed=_HOW)
        if name not in fields:
            raise ConfigError(
                f"unknown setting {name!r}", where="--param", value=text, remedy=_nearest(name, list(fields))
            )
        if name in found:
            raise ConfigError("the field is given twice", where="--param", value=text, remedy="list all values in one")
        found[name] = _dimension(name, given.strip(), fields[name])
    return tuple(found.values())


def _nearest(name: str, known: Sequence[str]) -> str | None:
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else None


def _dimension(name: str, text: str, field: Field) -> Dimension:
    numeric = {int, float} & set(members(field.annotation))
    if ".." in text and numeric:
        return _range(name, text, field)
    values = tuple(dict.fromkeys(_value(name, each, field) for each in split_values(text)))
    return Dimension(name, values)


def split_values(text: str) -> list[str]:
    """Split at commas outside of brackets.

    Example:
        >>> split_values("sigmoid,[sigmoid,sft]")
        ['sigmoid', '[sigmoid,sft]']
    """
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _value(name: str, text: str, field: Field) -> Value:
    try:
        value = coerce(text, field.annotation, choices=field.choices, text=True)
    except Mismatch as reason:
        raise ConfigError(
            reason.why,
            where=f"--param {name}",
            value=text,
            allowed=describe(field.annotation, field.choices),
            remedy=reason.remedy,
        ) from reason
    # Lists and mappings are kept as they were written: a study stores scalars.
    return value if value is None or isinstance(value, (bool, int, float, str)) else text


def _range(name: str, text: str, field: Field) -> Dimension:
    match = _RANGE.match(text)
    if match is None:
        raise ConfigError("not a range", where=f"--param {name}", value=text, allowed=_HOW)
    low, high = _value(name, match["low"], field), _value(name, match["high"], field)
    log, points = False, 0
    for option in filter(None, match["options"].split(":")):
        if option == "log":
            log = True
        elif option.isdigit() and int(option) > 1:
            points = int(option)
        else:
            raise ConfigError("unknown option of a range", where=f"--param {name}", value=option, allowed="log, 2, 3 …")
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)) or not low < high:
        raise ConfigError(
            "the range is empty", where=f"--param {name}", value=text, allowed="low..high with low < high"
        )
    if log and low <= 0:
        raise ConfigError("a logarithmic range begins above 0", where=f"--param {name}", value=text)
    integer = float not in members(field.annotation)
    if points:
        return Dimension(name, tuple(dict.fromkeys(_points(low, high, log, integer, points))))
    return Dimension(name, low=float(low), high=float(high), log=log, integer=integer)


def _points(low: float, high: float, log: bool, integer: bool, number: int) -> list[Value]:
    shares = [index / (number - 1) for index in range(number)]
    if log:
        found = [math.exp(math.log(low) + share * (math.log(high) - math.log(low))) for share in shares]
    else:
        found = [low + share * (high - low) for share in shares]
    # Six digits: the ends of a range should read as they were written.
    return [round(value) if integer else float(f"{value:.6g}") for value in found]


def grid(dimensions: Sequence[Dimension]) -> list[Cell]:
    """All combinations of listed values; the last field changes fastest.

    Raises:
        ConfigError: A range has no points to make a grid of.
    """
    for dimension in dimensions:
        if dimension.is_range:
            raise ConfigError(
                "a grid needs listed values",
                where=f"--param {dimension.name}",
                remedy=f"write {dimension.name}={dimension.low:g}..{dimension.high:g}:3, or --search tpe",
            )
    names = [dimension.name for dimension in dimensions]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(d.values for d in dimensions))]


def draw(dimensions: Sequence[Dimension], number: int, seed: int) -> list[Cell]:
    """Cells drawn at random, all different, the same for the same seed.

    Args:
        dimensions: What is searched.
        number: Most cells; fewer where the listed values have no more combinations.
        seed: Of Optuna's random sampler.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    cells: list[Cell] = []
    for _ in range(100 * number):
        trial = study.ask()
        cell = {dimension.name: dimension.suggest(trial) for dimension in dimensions}
        if cell not in cells:
            cells.append(cell)
        if len(cells) == number:
            break
    return cells


def as_flag(value: Any) -> tuple[str, ...]:
    """A value as it follows its flag on the command line."""
    if value is None:
        return ("null",)
    if isinstance(value, bool):
        return (str(value).lower(),)
    if isinstance(value, float):
        return (repr(value),)
    return (value if isinstance(value, str) else json.dumps(value),)


def as_setting(value: Any, field: Field) -> Any:
    """A value as a file has it: lists and mappings, which a study keeps as text, are written out."""
    return coerce(value, field.annotation, choices=field.choices, text=True) if isinstance(value, str) else value


def shown(cell: Mapping[str, Any]) -> str:
    """A cell in words: ``beta 0.1, learning_rate 1e-05``."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in cell.items()
    )
