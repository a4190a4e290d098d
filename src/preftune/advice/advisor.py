"""From what is known about a run to an advice: settings, flags, memory and time."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from preftune.advice.case import Case, Flag, Setting
from preftune.advice.config_view import View
from preftune.advice.flags import flags_for
from preftune.advice.rules import settings_for
from preftune.models.shapes import Shape
from preftune.objectives import METHODS
from preftune.training.estimate import (
    Workload,
    estimate_memory,
    estimate_time,
    exchanges,
    lengths_of_rows,
    num_steps,
    trains_little,
)
from preftune.training.machines import Machine
from preftune.training.plan import MemoryEstimate, TimeEstimate

#: Lines at the head of a training.
MOST_LINES = 5


@dataclass(frozen=True)
class Advice:
    """What is advised, and what looks risky.

    Attributes:
        case: What it is about.
        settings: Advised settings.
        flags: Risks of the settings as they are, the gravest first.
        memory: Peak memory by cause with the advised settings; ``None`` without a model.
        time: Seconds of step and run with them, likewise.
    """

    case: Case
    settings: tuple[Setting, ...]
    flags: tuple[Flag, ...]
    memory: MemoryEstimate | None = None
    time: TimeEstimate | None = None

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
            "memory": _as_dict(self.memory),
            "time": {} if self.time is None else asdict(self.time),
        }

    def lines(self, most: int = MOST_LINES) -> list[str]:
        """Flags in short for the head of a training: warnings and worse, nothing where all is well."""
        told = [f"{flag.title}: {flag.detail}; {flag.remedy}" for flag in self.flags if flag.severity != "note"]
        if len(told) > most:
            told = [*told[: most - 1], f"and {len(told) - most + 1} more: preftune advise"]
        return told


def _as_dict(memory: MemoryEstimate | None) -> dict[str, Any]:
    return {} if memory is None else {**asdict(memory), "total": memory.total, "fits": memory.fits}


def advise(
    case: Case,
    shape: Shape | None = None,
    machine: Machine | None = None,
    *,
    memory: MemoryEstimate | None = None,
    time: TimeEstimate | None = None,
    set_alone: bool = False,
) -> Advice:
    """Advise on a run.

    Args:
        case: What is known about it; ``given`` are its settings as they are.
        shape: The model as the advised settings make it, for memory and time.
        machine: Where it is to run, likewise.
        memory: An estimate that is there already.
        time: The same of the time.
        set_alone: Look for risks in settings alone that somebody has set: defaults give way to what is advised.

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
    if shape is not None and machine is not None:
        planned = replace(case, given={**case.given, **{setting.field: setting.value for setting in settings}})
        work = workload_of(planned, shape)
        memory, time = estimate_memory(shape, work, machine), estimate_time(shape, work, machine)
    view = View(case, {setting.field: setting for setting in settings}, memory, time)
    flags = flags_for(view)
    if set_alone:
        flags = [flag for flag in flags if not flag.fields or flag.always or case.explicit.intersection(flag.fields)]
    return Advice(case, settings, tuple(flags), memory, time)


def workload_of(case: Case, shape: Shape) -> Workload:
    """What memory and time depend on, from the settings as they are."""
    given = case.given
    limit = given.get("max_length", 1024)
    batch = int(given.get("per_device_train_batch_size", 8))
    accumulation = int(given.get("gradient_accumulation_steps", 1))
    count = case.num_pairs or 0
    needs_reference = any(METHODS[name].needs_reference for name in case.methods)
    live = needs_reference and (bool(given.get("sync_ref_model")) or given.get("reference_store") is False)
    separate = shape.weight_bytes if needs_reference and given.get("ref_model_name_or_path") else 0
    spread = bool(given.get("fsdp") or given.get("deepspeed"))
    lengths = case.lengths
    assumed = lengths is None or not len(lengths.longest)
    kept = None if lengths is None else lengths.cut(limit)
    return Workload(
        pairs_per_step=batch * accumulation,
        num_pairs=math.ceil(count / case.num_processes),
        num_steps=num_steps(
            count,
            batch,
            accumulation,
            case.num_processes,
            float(given.get("num_train_epochs", 1)),
            int(given.get("max_steps", -1) or -1),
        ),
        **(guessed_lengths(limit) if assumed or kept is None else lengths_of_rows(kept.prompt, kept.both)),
        max_tokens_per_row=given.get("max_tokens_per_row"),
        half=bool(given.get("bf16") or given.get("fp16")),
        optim=str(given.get("optim") or "adamw_torch"),
        needs_reference=needs_reference,
        live_reference=live,
        exchanges=exchanges(case.methods),
        separate_reference=separate,
        copies=(
            int(live and not separate and not trains_little(shape))
            + int(bool(given.get("generation_steps")) and not trains_little(shape))
        ),
        checkpointing=str(given.get("checkpoint_policy", "needed"))
        if given.get("gradient_checkpointing", True)
        else "off",
        offloading=bool(given.get("activation_offloading")),
        sharded=case.num_processes if spread else 1,
        assumed=assumed,
    )


def guessed_lengths(max_length: int | None) -> dict[str, Any]:
    """Lengths where nothing is known: sequences of half the limit, a third of them prompt."""
    limit = max_length or 1024
    return {
        "prompt": limit / 6,
        "completion": 2 * limit / 3,
        "longest_row": round(5 * limit / 3),
        "spread": 5 * limit / 18,
    }


def with_advice(case: Case, advice: Advice) -> Case:
    """The case as it would be with the advised settings."""
    return replace(case, given={**case.given, **advice.values()})
