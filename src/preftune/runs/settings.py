"""Settings of a run: the classes of a verb, the defaults of the command line, and what follows from other settings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from preftune import training
from preftune.config import CommandLine, Resolved, is_secret, redact, resolve
from preftune.config.fields import fields_of
from preftune.errors import ConfigError, SetupError
from preftune.runs.network import hub_answers, is_offline
from preftune.training.provenance import plain
from preftune.verbs import TRAINING

#: Verbs that train, those with most settings last.
TRAINING_VERBS = (*(verb for verb in TRAINING if verb != "dpo"), "dpo")


def settings_classes(verb: str) -> tuple[type[Any], type[Any]]:
    """Settings class and trainer class of a training verb."""
    prefix = verb.upper()
    return getattr(training, f"{prefix}Config"), getattr(training, f"{prefix}Trainer")


def cli_defaults() -> dict[str, Any]:
    """Where the command line refuses, while the Python classes, like TRL's, warn and go on.

    Transcripts of the HH kind are answered after their last shared ``Assistant:``, not after the first letters that two
    answers happen to share. On a machine without accelerator the processor is meant, so that nobody has to say so.
    """
    import torch

    return {
        "on_bad_rows": "skip",
        "transcripts": "messages",
        "environment_turns": "masked",
        "max_dropped_share": 0.1,
        "implicit_prompt": "transcript",
        "existing_output": "refuse",
        "use_cpu": not torch.accelerator.is_available(),
    }


def read_settings(verb: str, line: CommandLine | Sequence[str], **defaults: Any) -> Resolved[Any]:
    """The settings of a command line of a training verb.

    Args:
        verb: One of :data:`TRAINING_VERBS`.
        line: What follows the verb.
        defaults: Further defaults, over those of :func:`cli_defaults`.

    Raises:
        ConfigError: A setting is unknown or wrong; where another verb knows it, that verb is named.
    """
    settings: Resolved[Any] = resolve(
        line,
        settings_classes(verb)[0],
        defaults=cli_defaults() | defaults,
        elsewhere=lambda name: _other_verb(verb, name),
    )
    if TRAINING[verb].rows == "labelled" and settings.origins["pairing"].kind == "default":
        # Single answers are what it learns from, unless somebody wants pairs made of them.
        settings.script.pairing = "none"
    return replace(settings, notes=(*settings.notes, *_idle(settings)))


def _other_verb(verb: str, name: str) -> str | None:
    others = [other for other in reversed(TRAINING_VERBS) if other != verb]
    return next((other for other in others if name in fields_of(settings_classes(other)[0])), None)


def snapshot_of(settings: Resolved[Any]) -> dict[str, dict[str, Any]]:
    """All values by role, as they stand at this moment."""
    holders = {"script": settings.script, "model": settings.model, "trainer": settings.trainer}
    return {
        role: {item.name: getattr(holder, item.name) for item in fields(holder) if item.init}
        for role, holder in holders.items()
    }


def complete_settings(verb: str, settings: Resolved[Any]) -> None:
    """Fill in what follows from other settings, and refuse what would have no effect."""
    script, args, origins = settings.script, settings.trainer, settings.origins
    script.require_dataset()
    name = settings.model.require_model()
    if script.allow_drops:
        args.max_dropped_share = None
    if origins["output_dir"].kind == "default":
        # A key in the place of the model is not to become a folder's name.
        shown = name if redact(name) == name else "model"
        args.output_dir = f"{shown.rstrip('/').split('/')[-1]}-{verb.upper()}"
    if args.on_bad_rows == "skip" and args.quarantine_path is None and not script.dry_run:
        args.quarantine_path = script.quarantine_path = os.path.join(args.output_dir, "quarantine.jsonl")
    if args.do_predict:
        raise ConfigError("there is no test run", where="do_predict", value=True, remedy="set do_eval")
    if origins["do_train"].kind != "default" and not args.do_train:
        raise ConfigError("without training there is nothing to do", where="do_train", value=False, remedy="--dry_run")
    if args.push_to_hub and not script.dry_run:
        _require_hub()


def _idle(settings: Resolved[Any]) -> list[str]:
    """Settings that were made and have no effect, with those that would have to be set too."""
    model, args = settings.model, settings.trainer
    set_here = {name for name, origin in settings.origins.items() if origin.kind != "default"}
    idle: dict[str, str] = {}
    if not model.use_peft:
        idle |= {name: "use_peft" for name in set_here if name.startswith(("lora_", "use_rslora", "use_dora"))}
    if not model.load_in_4bit:
        idle |= {name: "load_in_4bit" for name in set_here if name.startswith(("bnb_4bit", "use_bnb"))}
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
        idle |= dict.fromkeys(set_here & {"eval_steps"}, "eval_strategy: steps")
    return [f"{name} has no effect without {other}" for name, other in sorted(idle.items())]


def _require_hub() -> None:
    """A run that cannot be pushed in the end should say so at the beginning."""
    if is_offline() or not hub_answers():
        raise SetupError(
            "the Hub cannot be reached",
            where="push_to_hub",
            value=True,
            remedy="leave push_to_hub out and run hf upload afterwards",
        )


def explicit(settings: Resolved[Any]) -> dict[str, Any]:
    """The settings that somebody set, as a file for ``--config`` holds them; secrets are left out."""
    found: dict[str, Any] = {}
    for holder in (settings.script, settings.model, settings.trainer):
        for item in fields(holder):
            if item.init and settings.origins[item.name].kind != "default" and not is_secret(item.name):
                found.setdefault(item.name, plain(getattr(holder, item.name)))
    return found
