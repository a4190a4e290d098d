"""What `preftune run` decides where nobody has: the verb, what is held out, an adapter, and the advised settings."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from preftune.config import CommandLine, is_secret
from preftune.config.coercion import coerce
from preftune.config.sources import settings_from_file
from preftune.errors import ConfigError
from preftune.verbs import ROWS

if TYPE_CHECKING:
    from preftune.advice import Advice

#: Verbs that it may choose.
VERBS = tuple(ROWS)
#: Verbs of each kind of rows.
_LABELLED = next(verb for verb, rows in ROWS.items() if rows == "labelled")
_BY_KIND = {"preference": "dpo", "ranked": "dpo", "rated": "dpo", "unpaired": _LABELLED, "sft": "sft"}
_WIDTH = 110
#: Most rows that are held out, and the share of the rows where that is fewer.
MOST_HELD_OUT, HELD_OUT_SHARE = 500, 0.1
#: At least this many are held out, or a fifth of all rows where that is less.
LEAST_HELD_OUT = 50
#: Supervised fine-tuning, which there is no advice for: the recipes of alignment-handbook, batch for one device.
_SFT = {
    "num_train_epochs": (1, "one pass, as in alignment-handbook's recipes"),
    "per_device_train_batch_size": (16, "examples of a step"),
    "warmup_steps": (0.1, "a share of the steps"),
    "lr_scheduler_type": ("cosine", "as in alignment-handbook's recipes"),
}


@dataclass(frozen=True)
class Asked:
    """What somebody wants to be done.

    Attributes:
        line: Settings of the training as they were given.
        verb: The training verb, ``None`` to find it from the settings and the rows.
        audit: Look the data over first.
        evaluate: Evaluate in the end.
        num_prompts: Prompts that answers are drawn for in the evaluation.
        max_new_tokens: Longest such answer.
    """

    line: CommandLine
    verb: str | None = None
    audit: bool = True
    evaluate: bool = True
    num_prompts: int = 16
    max_new_tokens: int = 128

    def given(self) -> dict[str, Any]:
        """Names that are set in files or by flags, with the last value as it was written."""
        found: dict[str, Any] = {}
        for number, path in enumerate(self.line.configs):
            found |= {each.name: each.value for each in settings_from_file(path, number)}
        for name, values, _ in self.line.flags:
            bare = name[3:] if name.startswith("no_") and not values else name
            found[bare] = values[0] if len(values) == 1 else list(values)
        return found

    def secrets(self) -> list[str]:
        """Flags that no file may hold, as words of a command line."""
        return [word for name, values, flag in self.line.flags if is_secret(name) for word in (flag, *values)]


@dataclass(frozen=True)
class Choice:
    """A setting that nobody has given.

    Attributes:
        name: Its name.
        value: What was chosen.
        why: The reason, in a few words.
        source: Where it comes from, in full; empty for a choice of this verb.
    """

    name: str
    value: Any
    why: str
    source: str = ""


@dataclass(frozen=True)
class Rows:
    """What is known about the data before they are loaded for good.

    Attributes:
        kind: Kind of the rows, see :data:`preftune.data.formats.FORMATS`.
        num_rows: How many.
        has_test: Whether there is a test split.
    """

    kind: str
    num_rows: int
    has_test: bool


@dataclass(frozen=True)
class Settled:
    """Settings of a training, all of them decided.

    Attributes:
        verb: The training verb.
        given: Settings as they were given.
        choices: Those that were chosen.
    """

    verb: str
    given: Mapping[str, Any]
    choices: Sequence[Choice] = field(default=())

    def text(self) -> str:
        """As a file for ``--config``, with the reasons as comments."""
        lines = [
            f"# Written by `preftune run`; `preftune {self.verb} --config` trains with it.",
            *(["", "# As given."] if self.given else []),
        ]
        lines += [_entry(name, value) for name, value in self.given.items()]
        lines += ["", "# Chosen; a flag of the same name replaces a value."]
        for choice in self.choices:
            why = choice.why + (f". {choice.source}" if choice.source else "")
            lines += textwrap.wrap(
                why,
                _WIDTH,
                initial_indent="# ",
                subsequent_indent="#   ",
                break_on_hyphens=False,
                break_long_words=False,
            )
            lines.append(_entry(choice.name, choice.value))
        return "\n".join(lines) + "\n"


def look_at(values: Mapping[str, Any]) -> Rows:
    """Read the rows that settings name, without converting them.

    Args:
        values: Settings by name.

    Returns:
        Their kind and number.

    Raises:
        PreftuneError: The data cannot be found, read or recognised.
    """
    from preftune.data import locations
    from preftune.data.formats import resolve

    mixture = values.get("dataset_mixture")
    if values.get("dataset_name") is None:
        has_test = bool(isinstance(mixture, Mapping) and mixture.get("test_split_size"))
        return Rows("preference", 0, has_test or bool(values.get("dataset_splits")))
    name, split = str(values["dataset_name"]), str(values.get("dataset_train_split") or "train")
    config = values.get("dataset_config")
    origin = locations.find(name, config)
    known = locations.hub_splits(name, config) if origin.splits is None else origin.splits
    table = origin.read(split)
    columns = values.get("dataset_columns")
    if isinstance(columns, str):
        columns = coerce(columns, dict[str, str] | list[str], text=True)
    if isinstance(columns, Mapping):
        table.rename = dict(columns)
    spec = resolve(str(values.get("dataset_format") or "auto"), table.columns(), table.example(), where=name)
    base = split.partition("[")[0]
    test = base.replace("train", "test")
    return Rows(spec.kind, len(table), values.get("dataset_test_split") is not None or (test != base and test in known))


def verb_for(asked: Asked, rows: Rows) -> str:
    """The training verb: the one named, or that of the loss, or that of the rows.

    Raises:
        ConfigError: There is no such verb.
    """
    if asked.verb is not None:
        if asked.verb not in VERBS:
            raise ConfigError("no training verb", where="--verb", value=asked.verb, allowed=", ".join(VERBS))
        return asked.verb
    if "loss_type" in asked.given():
        from preftune.advice.inputs import find_verb

        return find_verb(asked.line)
    return _BY_KIND.get(rows.kind, "dpo")


def held_out_size(num_rows: int) -> float:
    """How many rows to hold out: a tenth; 50, or a fifth of all, where a tenth is less; and at most 500."""
    return max(1, min(MOST_HELD_OUT, max(round(HELD_OUT_SHARE * num_rows), min(LEAST_HELD_OUT, num_rows // 5))))


def own_choices(verb: str, rows: Rows, *, accelerator: bool) -> list[Choice]:
    """What this verb decides by itself.

    Args:
        verb: The training verb.
        rows: The data.
        accelerator: Whether there is one that computes in bfloat16.
    """
    found = [
        Choice("use_peft", True, "an adapter: small, quick to train, and its reference costs no second model"),
        Choice("lora_r", 16, "the usual rank"),
        Choice("lora_alpha", 32, "twice the rank"),
        Choice("lora_target_modules", "all-linear", "every linear layer, so that the rank can stay small"),
    ]
    if accelerator:
        found.append(Choice("bf16", True, "bfloat16 arithmetic, which this device is made for"))
    if not rows.has_test:
        share = HELD_OUT_SHARE if not rows.num_rows else held_out_size(rows.num_rows)
        found.append(Choice("test_split_size", share, "held out, whole prompts at a time, to judge the model by"))
    found += [
        Choice("eval_strategy", "steps", "the held-out rows are scored on the way"),
        Choice("eval_steps", 0.25, "four times"),
        Choice("eval_on_start", True, "and once before the first step, to compare with"),
        Choice("save_strategy", "steps", "so that an interrupted run can go on"),
        Choice("save_steps", 0.25, "as often as it is evaluated"),
        Choice("save_total_limit", 2, "older checkpoints make room"),
        Choice("logging_steps", 0.04, "25 lines in the log"),
    ]
    if verb == "sft":
        found.append(Choice("learning_rate", 2e-4, "alignment-handbook's rate for adapters; 2e-5 for all weights"))
        found += [Choice(name, value, why) for name, (value, why) in _SFT.items()]
    return found


def advised_choices(advice: Advice) -> list[Choice]:
    """The advised settings, each with its reason and sources."""
    found = []
    for setting in advice.settings:
        sources = "; ".join(f"{source.name}: {source.says}" for source in setting.sources)
        found.append(Choice(setting.field, setting.value, setting.reason, f"{setting.kind}: {sources}"))
    return found


def settle(verb: str, given: Mapping[str, Any], choices: Sequence[Choice]) -> Settled:
    """What was given wins over what is advised, and that over what this verb chooses by itself."""
    by_name = {choice.name: choice for choice in choices}
    if given.get("use_peft") is False:
        by_name = {name: choice for name, choice in by_name.items() if not name.startswith(("lora_", "use_peft"))}
    return Settled(verb, given, [choice for name, choice in by_name.items() if name not in given])


def _entry(name: str, value: Any) -> str:
    if isinstance(value, (dict, list, tuple)):
        plain = list(value) if isinstance(value, tuple) else value
        return f"{name}: {yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=100_000)}".rstrip()
    return yaml.safe_dump({name: value}, default_flow_style=False, allow_unicode=True, width=100_000).rstrip("\n")
