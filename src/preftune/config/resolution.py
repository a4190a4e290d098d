"""YAML files and flags to typed settings: merge layers, translate old names, check values, build the classes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from preftune.config.coercion import Mismatch, coerce
from preftune.config.fields import Field, describe, fields_of, fields_of_all
from preftune.config.legacy import TABLE, translate
from preftune.config.model import ModelConfig
from preftune.config.script import ScriptConfig
from preftune.config.secrets import is_secret
from preftune.config.sources import (
    CommandLine,
    Setting,
    settings_from_file,
    settings_from_flags,
    split_command_line,
)
from preftune.errors import ConfigError, PreftuneError

T = TypeVar("T")

#: Settings that name data, in the forms that are merged and as they may be written.
_SOURCES = ("dataset_name", "dataset_mixer")
_NAMES_DATA = (*_SOURCES, "dataset_mixture", "datasets")
#: Settings that say how one data set is read.
_OF_ONE_DATA_SET = frozenset(
    {
        *("dataset_config", "dataset_train_split", "dataset_test_split", "dataset_columns", "dataset_splits"),
        *("dataset_format", "dataset_text_field", "pairing"),
    }
)
_BEGINS_AS_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Origin:
    """Where a value comes from.

    Attributes:
        kind: ``default``, ``file`` or ``flag``.
        where: File and line, or the flag; empty for defaults.
        translated_from: The old name that was written, if another.
    """

    kind: str
    where: str = ""
    translated_from: str | None = None

    def __str__(self) -> str:
        place = f" {self.where}" if self.where else ""
        return f"{self.kind}{place}" + (f" (written as {self.translated_from})" if self.translated_from else "")


@dataclass(frozen=True)
class Resolved(Generic[T]):
    """Typed settings of one run.

    Attributes:
        script: Data and behaviour of the command line.
        model: Model, tokenizer, adapter.
        trainer: The trainer's own settings.
        origins: Where each value comes from, by name.
        notes: What the user should be told: translated names, flags given twice.
    """

    script: ScriptConfig
    model: ModelConfig
    trainer: T
    origins: Mapping[str, Origin]
    notes: tuple[str, ...]


def resolve(
    argv: Sequence[str] | CommandLine,
    trainer_class: type[T],
    *,
    defaults: Mapping[str, Any] | None = None,
    elsewhere: Callable[[str], str | None] = lambda name: None,
) -> Resolved[T]:
    """Read a command line into typed settings.

    Args:
        argv: ``--config FILE``, then ``--name value`` for any field of the three classes; flags override files, later
            files override earlier ones.
        trainer_class: A dataclass that extends ``transformers.TrainingArguments``.
        defaults: Defaults of the command line where they differ from those of the classes; names that no class has are
            left out.
        elsewhere: Asked about unknown names: the verb that would know them, if any.

    Returns:
        The three settings objects, with the origin of every value.

    Raises:
        ConfigError: One line, naming source, field, value, what is allowed and the remedy.
    """
    line = argv if isinstance(argv, CommandLine) else split_command_line(argv)
    classes: dict[str, type[Any]] = {"script": ScriptConfig, "model": ModelConfig, "trainer": trainer_class}
    fields = fields_of_all(classes)
    booleans = {name for name, field in fields.items() if field.is_boolean}
    booleans |= {name for name, row in TABLE.items() if row.boolean}
    sequences = {name for name, field in fields.items() if field.is_sequence}
    sequences |= {"dataset_configs"}
    layers = [settings_from_file(path, number) for number, path in enumerate(line.configs)]
    from_flags, notes = settings_from_flags(line, booleans, sequences, {*fields, *TABLE}, len(layers))
    merged = _merge([*layers, from_flags], fields, notes, elsewhere)
    values = {name: value for name, value in (defaults or {}).items() if name in fields}
    values |= {name: _checked(setting, fields[name]) for name, setting in merged.items()}
    built = {}
    for role, cls in classes.items():
        own = fields_of(cls)
        built[role] = _build(cls, {name: value for name, value in values.items() if name in own}, merged)
    origins = {
        name: Origin(merged[name].kind, merged[name].where, merged[name].translated_from)
        if name in merged
        else Origin("default")
        for name in fields
    }
    return Resolved(built["script"], built["model"], built["trainer"], origins, tuple(dict.fromkeys(notes)))


def _merge(
    layers: list[list[Setting]], fields: Mapping[str, Field], notes: list[str], elsewhere: Callable[[str], str | None]
) -> dict[str, Setting]:
    """Translate old names and let later layers win; report all unknown names in one line."""
    merged: dict[str, Setting] = {}
    unknown: list[Setting] = []
    for layer in _mixtures_from_trl(layers):
        for setting in layer:
            current: Setting | None = setting
            if setting.name not in fields:
                current = _translated(setting, fields, notes, unknown)
            if current is None:
                continue
            earlier = merged.get(current.name)
            if earlier is not None and earlier.layer == current.layer:
                raise ConfigError(
                    f"{current.name} is set twice, as {_as_written(earlier)} and as {_as_written(current)}",
                    where=current.where,
                    remedy="keep one of them",
                )
            merged[current.name] = current
    if unknown:
        raise _unknown_error(unknown, fields, elsewhere)
    _drop_what_belongs_to_other_data(merged, layers, notes)
    return merged


def _drop_what_belongs_to_other_data(merged: dict[str, Setting], layers: list[list[Setting]], notes: list[str]) -> None:
    """A file that names its own data set says how to read that one, and not the one that a later layer names."""
    sources = [merged[name] for name in (*_SOURCES, "dataset_mixture") if name in merged]
    if not sources:
        return
    newer = max(sources, key=lambda setting: setting.layer)
    newest = newer.layer
    # A name that is given once more is the same data set.
    named = {
        layer
        for layer, each in enumerate(layers)
        if any(setting.name in _NAMES_DATA and (setting.name, setting.value) != _named(newer) for setting in each)
    }
    dropped = [
        setting
        for name, setting in merged.items()
        if setting.layer < newest
        and setting.layer in named
        and (name in _OF_ONE_DATA_SET or name in (*_SOURCES, "dataset_mixture"))
    ]
    for setting in dropped:
        del merged[setting.name]
    if dropped:
        told = ", ".join(f"{setting.name} ({setting.where})" for setting in dropped)
        notes.append(f"left out, as it belongs to the data that {newer.where} replaces: {told}")


def _named(setting: Setting) -> tuple[str, Any]:
    return setting.name, setting.value


def _translated(
    setting: Setting, fields: Mapping[str, Field], notes: list[str], unknown: list[Setting]
) -> Setting | None:
    outcome = translate(setting.name, setting.value, setting.where)
    if outcome is None or (outcome.name is not None and outcome.name not in fields):
        unknown.append(setting)
        return None
    notes.append(outcome.note)
    return None if outcome.name is None else setting.renamed(outcome.name, outcome.value)


def _as_written(setting: Setting) -> str:
    return setting.translated_from or setting.name


def _mixtures_from_trl(layers: list[list[Setting]]) -> list[list[Setting]]:
    """Fold TRL's ``datasets``, and the ``test_split_size`` of any layer, into one ``dataset_mixture``."""
    sizes = [setting for layer in layers for setting in layer if setting.name == "test_split_size"]
    if not any(setting.name == "datasets" for layer in layers for setting in layer):
        return layers
    return [
        [
            setting.renamed("dataset_mixture", _mixture(setting, sizes[-1:])) if setting.name == "datasets" else setting
            for setting in layer
            if setting.name != "test_split_size"
        ]
        for layer in layers
    ]


def _mixture(datasets: Setting, sizes: list[Setting]) -> dict[str, Any]:
    try:
        entries = coerce(datasets.value, list[dict[str, Any]], text=datasets.is_text)
    except Mismatch as reason:
        raise ConfigError(
            reason.why, where=f"{datasets.where} (datasets)", value=datasets.value, allowed="a list of mappings"
        ) from reason
    rename = {"path": "id", "name": "config"}
    # TRL joins the sets as they are, and leaves the order to the sampler.
    mixture: dict[str, Any] = {"datasets": [], "shuffle": False}
    for number, entry in enumerate(entries):
        for key in ("fraction", "data_dir", "data_files"):
            if entry.get(key) is not None:
                raise ConfigError(
                    f"datasets[{number}].{key} is not supported",
                    where=datasets.where,
                    value=entry[key],
                    remedy="use dataset_mixture with id, split and weight; id may be a file",
                )
        mixture["datasets"].append({rename.get(key, key): value for key, value in entry.items() if value is not None})
    for size in sizes:
        try:
            # A flag is text; sizes are shares or numbers of rows.
            mixture["test_split_size"] = coerce(size.value, float | int, text=True) if size.is_text else size.value
        except Mismatch as reason:
            raise ConfigError(reason.why, where=size.where, value=size.value, allowed="a share or a number") from reason
    return mixture


def _checked(setting: Setting, field: Field) -> Any:
    try:
        return coerce(setting.value, field.annotation, choices=field.choices, text=setting.is_text)
    except Mismatch as reason:
        where = setting.where if setting.is_text else f"{setting.where} ({_as_written(setting)})"
        shown = {} if is_secret(field.name) else {"value": setting.value}
        raise ConfigError(
            reason.why,
            where=where,
            allowed=describe(field.annotation, field.choices),
            remedy=reason.remedy or _suggest_value(setting.value, field),
            **shown,
        ) from reason


def _suggest_value(value: Any, field: Field) -> str | None:
    if not isinstance(value, str):
        return None
    number = _BEGINS_AS_NUMBER.match(value)
    if number and "number" in describe(field.annotation, field.choices):
        # "such as 1e-6" describes what is meant, and is no value to offer.
        return f"did you mean {number[0]}?"
    options = describe(field.annotation, field.choices).replace(" or ", ", ").split(", ")
    options = [option for option in options if " " not in option]
    close = difflib.get_close_matches(value, options, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else None


def _unknown_error(
    unknown: list[Setting], fields: Mapping[str, Field], elsewhere: Callable[[str], str | None]
) -> ConfigError:
    told = []
    for setting in unknown:
        hint = _hint(setting.name, fields, elsewhere)
        told.append(f"{setting.name!r}" + (f" ({hint})" if hint and len(unknown) > 1 else ""))
    plural = "s" if len(unknown) > 1 else ""
    single = _hint(unknown[0].name, fields, elsewhere) if len(unknown) == 1 else None
    return ConfigError(
        f"unknown setting{plural} {', '.join(told)}",
        where=", ".join(dict.fromkeys(setting.where for setting in unknown)),
        remedy=single,
    )


def _hint(name: str, fields: Mapping[str, Field], elsewhere: Callable[[str], str | None]) -> str | None:
    verb = elsewhere(name)
    if verb:
        return f"{name} is a setting of `preftune {verb}`"
    close = difflib.get_close_matches(name, [*fields, *TABLE], n=3, cutoff=0.6)
    # A name that only lost or gained a prefix is a better guess than one with the same letters.
    close.sort(key=lambda candidate: candidate not in fields)
    return f"did you mean {close[0]}?" if close else None


def _build(cls: type[T], values: dict[str, Any], merged: Mapping[str, Setting]) -> T:
    """Construct a settings object; whatever its own checks say becomes one line that names the source."""
    try:
        return cls(**values)
    except ConfigError as error:
        raise _with_source(error, merged) from error
    except PreftuneError:
        raise
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError, RuntimeError, KeyError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        named = [setting for name, setting in merged.items() if name in values and name in said]
        where = ", ".join(dict.fromkeys(setting.where for setting in named)) or "settings"
        raise ConfigError(said.rstrip("."), where=where) from error


def _with_source(error: ConfigError, merged: Mapping[str, Setting]) -> ConfigError:
    setting = merged.get(error.where or "")
    if setting is None or setting.is_text:
        where = setting.where if setting else error.where
    else:
        where = f"{setting.where} ({error.where})"
    _, (kind, what, given) = error.__reduce__()
    rebuilt: ConfigError = kind(what, **{**given, "where": where})
    return rebuilt
