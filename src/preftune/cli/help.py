"""Help for the verbs whose settings are the fields of classes."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable, Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple

from preftune.cli.verbs import VERBS
from preftune.config.fields import MISSING, Field, describe, fields_of
from preftune.terminal.wrapping import width, wrapped
from preftune.verbs import TRAINING

_INDENT = 6
#: Settings that most runs set; the help of a training verb begins with the first ten that the verb has.
_MOST_USED = (
    *("model_name_or_path", "dataset_name", "output_dir", "use_peft", "loss_type", "beta", "learning_rate"),
    *("num_train_epochs", "per_device_train_batch_size", "max_length", "gradient_accumulation_steps", "bf16"),
)
_NUM_MOST_USED = 10


class Entry(NamedTuple):
    """A setting as help shows it.

    Attributes:
        name: Its name.
        type: What it takes, in words.
        default: Its default as text; ``None`` where it has to be given.
        help: One sentence.
    """

    name: str
    type: str
    default: str | None
    help: str


#: Headings and what stands below each.
Sections = list[tuple[str, list[Entry]]]


def help_of(verb: str, sections: Sections) -> str:
    """The help of a training verb: an example, the settings that most runs set, and all others.

    Args:
        verb: Its name.
        sections: Its settings.

    Returns:
        Plain text.
    """
    entries = {entry.name: entry for _, listed in sections for entry in listed}
    most_used = [entries[name] for name in _MOST_USED if name in entries][:_NUM_MOST_USED]
    names = {entry.name for entry in most_used}
    rest = [(title, [entry for entry in listed if entry.name not in names]) for title, listed in sections]
    data = TRAINING[verb].example
    example = (
        f"preftune {verb} --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name {data} --output_dir tuned"
    )
    return render(verb, [("most used", most_used), *rest], example)


def render(verb: str, sections: Sections, example: str | None = None) -> str:
    """Write the help of a verb.

    Args:
        verb: Its name.
        sections: Its settings.
        example: A command line.

    Returns:
        Plain text.
    """
    summary = VERBS[verb]
    lines = [
        f"usage: preftune {verb} [--config FILE.yaml ...] [--name value ...]",
        "",
        f"{summary[0].upper()}{summary[1:]}.",
        *(["", f"example: {example}", ""] if example else []),
        "Any field below can be set in the YAML file or as a flag; flags win.",
        "  lists     --name a b",
        "  mappings  --name '{\"key\": 1}'",
        "  switches  --name, --no_name, --name false",
    ]
    for title, entries in sections:
        lines += ["", f"{title}:", *(line for entry in entries for line in entry_lines(entry))]
    return wrapped("\n".join(lines))


def sections_of(
    groups: Mapping[str, type[Any]],
    defaults: Mapping[str, Any] = MappingProxyType({}),
    without: Iterable[str] = (),
) -> Sections:
    """Read settings classes.

    Args:
        groups: Heading to dataclass; the first class that has a field lists it, and a class lists its own fields before
            those it inherits.
        defaults: Defaults of the command line where they differ from those of the classes.
        without: Fields that the verb refuses.

    Returns:
        The settings by heading.
    """
    sections: Sections = []
    seen = set(without)
    for heading, cls in groups.items():
        own = _own_names(cls)
        fields = [field for name, field in fields_of(cls).items() if name not in seen]
        for title, inherited in ((heading, False), ("from transformers.TrainingArguments", True)):
            listed = [_entry(field, defaults) for field in fields if (field.name not in own) == inherited]
            if listed:
                sections.append((title, listed))
        seen |= {field.name for field in fields}
    return sections


def own_lines(cls: type[Any], without: Iterable[str] = ()) -> list[str]:
    """Help on flags that only one verb has.

    Args:
        cls: The dataclass of the flags.
        without: Flags that are not for people.

    Returns:
        Lines of text.
    """
    entries = (_entry(field, {}) for name, field in fields_of(cls).items() if name not in without)
    return [line for entry in entries for line in entry_lines(entry)]


def entry_lines(entry: Entry) -> list[str]:
    """A setting's lines in a help text: name, type and default, and below them what it does."""
    head = f"  --{entry.name}  {entry.type}" + ("" if entry.default is None else f"  [{entry.default}]")
    lines = textwrap.wrap(head, width(), subsequent_indent=" " * _INDENT, break_long_words=False)
    indent = " " * _INDENT
    return lines + textwrap.wrap(entry.help, width(), initial_indent=indent, subsequent_indent=indent)


def _entry(field: Field, defaults: Mapping[str, Any]) -> Entry:
    default = defaults.get(field.name, field.default)
    shown = None if default is MISSING else _shown(default)
    return Entry(field.name, describe(field.annotation, field.choices), shown, field.help)


def _own_names(cls: type[Any]) -> set[str]:
    """A class's own fields, those of its bases in this package included, apart from a library's."""
    bases = (base for base in cls.__mro__ if not base.__module__.startswith("transformers"))
    return {name for base in bases for name in inspect.get_annotations(base)}


def _shown(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value != "" else "''"
