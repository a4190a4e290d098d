"""From what is known about a run to an advice: settings, flags, memory and time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from preftune.advice.case import Case, Flag, Setting
from preftune.advice.flags import View, flags_for
from preftune.advice.machines import Machine
from preftune.advice.memory import Plan, estimate_memory, estimate_time, lengths_or_guess, optimizer_states
from preftune.advice.rules import settings_for
from preftune.advice.shapes import Shape
from preftune.objectives import METHODS
from preftune.ownership import put_text

#: Lines at the head of a training.
MOST_LINES = 5


@dataclass(frozen=True)
class Advice:
    """What is advised, and what looks risky.

    Attributes:
        case: What it is about.
        settings: Advised settings.
        flags: Risks of the settings as they are, the gravest first.
        memory: Peak memory by cause with the settings as they are; empty without a model.
        time: Seconds of step and run; empty without a model.
    """

    case: Case
    settings: tuple[Setting, ...]
    flags: tuple[Flag, ...]
    memory: Mapping[str, Any]
    time: Mapping[str, Any]

    def values(self) -> dict[str, Any]:
        """Advised values by name."""
        return {setting.field: setting.value for setting in self.settings}

    def as_dict(self) -> dict[str, Any]:
        """What ``advice.json`` holds."""
        case = self.case
        noise = None if case.noise is None else {**asdict(case.noise), "agreement": case.noise.agreement}
        return {
            "verb": case.verb,
            "methods": list(case.methods),
            "num_parameters": case.num_parameters,
            "lora": case.lora,
            "num_pairs": case.num_pairs,
            "noise": noise,
            "settings": [asdict(setting) for setting in self.settings],
            "flags": [asdict(flag) for flag in self.flags],
            "memory": dict(self.memory),
            "time": dict(self.time),
        }

    def lines(self, most: int = MOST_LINES) -> list[str]:
        """Flags in short for the head of a training: warnings and worse, nothing where all is well."""
        told = [f"{flag.title}: {flag.detail}; {flag.remedy}" for flag in self.flags if flag.severity != "note"]
        if len(told) > most:
            told = [*told[: most - 1], f"and {len(told) - most + 1} more: preftune advise"]
        return told


def advise(
    case: Case,
    shape: Shape | None = None,
    machine: Machine | None = None,
    *,
    memory: Mapping[str, Any] | None = None,
) -> Advice:
    """Advise on a run.

    Args:
        case: What is known about it; ``given`` are its settings as they are.
        shape: The model, for memory and time.
        machine: Where it is to run, likewise.
        memory: An estimate that is there already.

    Returns:
        Settings with reasons, and flags on the settings as they are.

    Example:
        >>> from preftune.advice import Case, Noise, advise
        >>> noisy = Case("dpo", ("sigmoid",), 7_000_000_000, num_pairs=60_000, noise=Noise(0.3, 0.2, 0.4))
        >>> values = advise(noisy).values()
        >>> values["beta"], values["learning_rate"], values["num_train_epochs"], values["label_smoothing"]
        (0.1, 1e-06, 1, 0.3)
    """
    settings = tuple(settings_for(case))
    found: Mapping[str, Any] = memory or {}
    time: dict[str, Any] = {}
    if shape is not None and machine is not None:
        plan = plan_of(case, shape)
        found, time = estimate_memory(shape, plan, machine), estimate_time(shape, plan, machine)
    view = View(case, {setting.field: setting for setting in settings}, found, time)
    return Advice(case, settings, tuple(flags_for(view)), found, time)


def plan_of(case: Case, shape: Shape) -> Plan:
    """What memory and time depend on, from the settings as they are."""
    given = case.given
    limit = given.get("max_length", 1024)
    prompt, completion, longest, assumed = lengths_or_guess(case.lengths, limit)
    pairs = case.num_pairs or 0
    epochs = float(given.get("num_train_epochs", 1))
    per_step = max(1, (case.pairs_per_step or 8 * case.num_processes) // case.num_processes)
    max_steps = int(given.get("max_steps", -1) or -1)
    if max_steps > 0 and pairs:
        epochs = max_steps * per_step * case.num_processes / pairs
    needs_reference = any(METHODS[name].needs_reference for name in case.methods)
    return Plan(
        pairs_per_step=per_step,
        num_pairs=math.ceil(pairs / case.num_processes),
        num_epochs=epochs,
        prompt=prompt,
        completion=completion,
        longest_row=longest,
        max_tokens_per_row=given.get("max_tokens_per_row"),
        half=bool(given.get("bf16") or given.get("fp16")),
        optimizer_states=optimizer_states(str(getattr(given.get("optim"), "value", given.get("optim", "adamw")))),
        needs_reference=needs_reference,
        separate_reference=shape.weight_bytes if needs_reference and given.get("ref_model_name_or_path") else 0,
        assumed=assumed,
    )


def with_advice(case: Case, advice: Advice) -> Case:
    """The case as it would be with the advised settings."""
    return replace(case, given={**case.given, **advice.values()})


def write_json(document: Mapping[str, Any], path: str | Path) -> None:
    """Write a JSON document whole or not at all; numbers that are none become null."""
    put_text(Path(path), json.dumps(plain(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """The value as JSON takes it: numbers that are none become ``None``."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
