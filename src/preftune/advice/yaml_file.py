"""An advice as a configuration that the training verbs read, every advised value with its reason beside it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from preftune.advice.advisor import Advice
from preftune.advice.case import Setting, Source
from preftune.config.secrets import REDACTED, redact
from preftune.errors import ConfigError

_WIDTH = 110


def configuration(advice: Advice, kept: Mapping[str, Any]) -> str:
    """The text of a YAML file.

    Args:
        advice: Whose values are written, with reason, range and sources as comments.
        kept: Settings of the run as it was configured; where the advice says something else, the advice wins.

    Returns:
        YAML that ``preftune <verb> --config`` reads.
    """
    case = advice.case
    lines = [
        f"# Written by `preftune advise` for `preftune {case.verb}`: {'+'.join(case.methods)}, "
        f"{case.num_parameters:,} parameters, {'an adapter' if case.lora else 'all weights'}"
        + (f", {case.num_pairs:,} pairs." if case.num_pairs else "."),
        "# published: somebody printed the number; computed: it follows from the data; heuristic: a rule of thumb.",
        "",
    ]
    held = held_out(advice, kept)
    advised = {setting.field for setting in advice.settings} | set(held)
    for name, value in kept.items():
        if name not in advised:
            # Such a file is kept, passed on and put under version control.
            secret = REDACTED in str(redact(value, name))
            left_out = f"# {name}: left out, as it holds a secret; give it as a flag"
            lines.append(left_out if secret else _entry(name, value))
    lines.append("")
    for setting in advice.settings:
        lines += [*_comment(setting), _entry(setting.field, setting.value)]
    if held:
        lines.append("# held out, whole prompts at a time: a growing training margin looks the same with and without")
        lines.append("#   overfitting")
        lines += [_entry(name, value) for name, value in held.items()]
    return "\n".join(lines) + "\n"


#: What is held out where the data have no test split, and how often it is looked at, as shares.
_HELD_OUT, _EVERY = 0.1, 0.25


def held_out(advice: Advice, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that hold data out and evaluate on them, where nothing does so yet."""
    case = advice.case
    found: dict[str, Any] = {}
    if str(case.given.get("eval_strategy", "no")) == "no":
        found |= {"eval_strategy": "steps", "eval_steps": _EVERY}
    mixture = kept.get("dataset_mixture")
    divided = kept.get("test_split_size") or (isinstance(mixture, Mapping) and mixture.get("test_split_size"))
    if not case.has_test and not divided:
        found["test_split_size"] = _HELD_OUT
    # Without data there is nothing to divide.
    return {} if case.has_test is None else found


def _comment(setting: Setting) -> list[str]:
    span = "" if setting.low is None or setting.high is None else f" [{setting.low:g} to {setting.high:g}]"
    text = f"{setting.kind}{span}: {setting.reason}. " + "; ".join(map(quoted, setting.sources))
    if setting.contradiction:
        text += f". {setting.contradiction[0].upper()}{setting.contradiction[1:]}"
    return textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)


def quoted(source: Source) -> str:
    """A source with its link and what it says."""
    link = f" ({source.link})" if source.link else ""
    return f"{source.name}{link}: {source.says}"


def _entry(name: str, value: Any) -> str:
    if isinstance(value, float):
        # YAML 1.1 takes 1e-06 for text; with a point it is a number.
        text = repr(value)
        mantissa, mark, exponent = text.partition("e")
        return f"{name}: {mantissa if '.' in mantissa else mantissa + '.0'}{mark}{exponent}"
    if isinstance(value, (dict, list, tuple)):
        plain = list(value) if isinstance(value, tuple) else value
        return f"{name}: {yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=100_000)}".rstrip()
    return yaml.safe_dump({name: value}, default_flow_style=False, allow_unicode=True, width=100_000).rstrip("\n")


def write_configuration(text: str, path: str | Path) -> None:
    """Write the file; one that exists is left as it is.

    Raises:
        ConfigError: The file exists, or cannot be written.
    """
    target = Path(path).expanduser()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder ({error.strerror})", where="--write", value=str(path)) from error
    try:
        with target.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(
            "the file exists and is left as it is", where="--write", value=str(path), remedy="name another file"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot write the file ({error.strerror})", where="--write", value=str(path)) from error
