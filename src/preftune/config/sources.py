"""Where settings come from: YAML files and flags, each value remembered with the place it was written in."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from preftune.config.secrets import redact
from preftune.config.yaml_text import check_length, check_size
from preftune.errors import ConfigError


@dataclass(frozen=True)
class Setting:
    """One value as written.

    Attributes:
        name: Name of the setting, with underscores.
        value: What was written: any YAML value, or text, or a list of texts.
        kind: ``file`` or ``flag``.
        where: ``recipe.yaml:12`` or ``--beta``.
        layer: Later layers override earlier ones.
        translated_from: The old or foreign name it was written under, if that differs.
    """

    name: str
    value: Any
    kind: str
    where: str
    layer: int
    translated_from: str | None = None

    @property
    def is_text(self) -> bool:
        """Whether the value came from the command line, where everything is text."""
        return self.kind == "flag"

    def renamed(self, name: str, value: Any) -> Setting:
        """The same setting under its new name."""
        return replace(self, name=name, value=value, translated_from=self.translated_from or self.name)


@dataclass(frozen=True)
class CommandLine:
    """A split command line.

    Attributes:
        configs: YAML files, in order.
        flags: ``(name, values, as typed)`` in order; no values means that the flag stood alone.
        help: Whether help was asked for.
    """

    configs: tuple[str, ...]
    flags: tuple[tuple[str, tuple[str, ...], str], ...]
    help: bool = False


def split_command_line(argv: Sequence[str]) -> CommandLine:
    """Split ``--name value ...``, ``--name=value`` and YAML files apart, without knowing any names.

    Args:
        argv: Arguments after the verb.

    Returns:
        Configs and flags in order.

    Raises:
        ConfigError: If an argument belongs to no flag.
    """
    configs: list[str] = []
    flags: list[tuple[str, tuple[str, ...], str]] = []
    index, wants_help = 0, False
    while index < len(argv):
        token = argv[index]
        index += 1
        if token in ("-h", "--help"):
            wants_help = True
            continue
        if not token.startswith("--") or token == "--":
            if token.endswith((".yaml", ".yml")) and not flags:
                configs.append(token)
                continue
            raise ConfigError(
                "an argument that belongs to no flag",
                where="command line",
                value=token,
                remedy="settings are written as --name value",
            )
        shown, equals, attached = token.partition("=")
        values = [attached] if equals else []
        while not equals and index < len(argv) and _is_value(argv[index]):
            values.append(argv[index])
            index += 1
        name = shown[2:].replace("-", "_")
        if name == "config":
            if not values:
                raise ConfigError("needs the path of a YAML file", where="--config")
            configs.extend(values)
        else:
            flags.append((name, tuple(values), shown))
    return CommandLine(tuple(configs), tuple(flags), wants_help)


def _is_value(token: str) -> bool:
    """A value may begin with a dash only where it is a negative number."""
    return not token.startswith("-") or bool(re.match(r"-[\d.]", token)) or token == "-"


def settings_from_flags(
    line: CommandLine, booleans: Collection[str], sequences: Collection[str], known: Collection[str], layer: int
) -> tuple[list[Setting], list[str]]:
    """Give flags their meaning, now that the names are known.

    Args:
        line: The split command line.
        booleans: Names for which the bare flag means true, and ``--no_name`` false.
        sequences: Names that take several values, also by repeating the flag.
        known: Every known name, old ones included.
        layer: Layer number of the command line.

    Returns:
        One setting per name, and notes about flags that were given twice.

    Raises:
        ConfigError: If a value is missing, or there are too many.
    """
    found: dict[str, Setting] = {}
    notes: list[str] = []
    for raw_name, values, shown in line.flags:
        name, value = raw_name, _one_or_many(values)
        if raw_name not in known and raw_name.startswith("no_") and raw_name[3:] in booleans:
            if values:
                given = _safe(name, values)
                raise ConfigError("takes no value", where=shown, value=given, remedy=f"write {shown} alone")
            name, value = raw_name[3:], "false"
        elif not values:
            if name in known and name not in booleans and name not in sequences:
                raise ConfigError("needs a value", where=shown, remedy=f"write {shown} VALUE")
            value = "true" if name in booleans or name not in known else []
        elif len(values) > 1 and name in known and name not in sequences:
            remedy = "several data sets are a dataset_mixture" if name == "dataset_name" else None
            raise ConfigError("takes one value", where=shown, value=_safe(name, values), remedy=remedy)
        if name in found:
            if name in sequences:
                value = [*_as_list(found[name].value), *_as_list(value)]
            else:
                notes.append(f"{shown} was given twice; the last one counts")
        found[name] = Setting(name, value, "flag", shown, layer)
    return list(found.values()), notes


def _safe(name: str, values: tuple[str, ...]) -> Any:
    return redact(" ".join(values), name)


def _one_or_many(values: tuple[str, ...]) -> Any:
    return values[0] if len(values) == 1 else list(values)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def settings_from_file(path: str, layer: int) -> list[Setting]:
    """Read a YAML file of settings.

    Args:
        path: A mapping of names to values; read with PyYAML's safe loader.
        layer: Layer number of this file.

    Returns:
        One setting per key, with its line number.

    Raises:
        ConfigError: If the file cannot be read, is not a mapping, or has a key twice.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError("not UTF-8 text", where=path, remedy="save the file as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"cannot read the file ({error.strerror})", where=path) from error
    loader: yaml.SafeLoader | None = None
    try:
        check_length(text)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return []
        check_size(node)
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError("not a mapping of names to values", where=path, remedy="write lines such as `beta: 0.1`")
        return _settings_of(node, loader, path, layer)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else path
        raise ConfigError(f"not valid YAML ({error.problem or error.context})", where=where) from error
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"not valid YAML ({why})", where=path) from error
    finally:
        if loader is not None:
            loader.dispose()


def _settings_of(node: yaml.MappingNode, loader: yaml.SafeLoader, path: str, layer: int) -> list[Setting]:
    written: dict[str, str] = {}
    for key_node, _ in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        name = str(key_node.value).replace("-", "_")
        if name in written:
            raise ConfigError(f"{name!r} is set twice", where=where, remedy=f"remove it here or at {written[name]}")
        written[name] = where
    # Only now, because merged keys (`<<: *base`) may be overridden.
    loader.flatten_mapping(node)
    found: dict[str, Setting] = {}
    for key_node, value_node in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ConfigError("a name that is not text", where=where, value=key, remedy="put it in quotes")
        name = key.replace("-", "_")
        found[name] = Setting(name, loader.construct_object(value_node, deep=True), "file", where, layer)
    return list(found.values())
