"""The check whether a run fits into memory, and what would make room."""

from __future__ import annotations

from collections.abc import Iterator

from preftune.advice.case import Flag
from preftune.advice.config_view import View
from preftune.training.plan import MemoryEstimate


def memory_flags(view: View) -> Iterator[Flag]:
    """What does not fit, and what saves most first."""
    memory = view.memory
    if memory is None or memory.fits or memory.available is None:
        return
    yield Flag(
        "problem" if memory.total > 1.2 * memory.available else "warn",
        ("max_tokens_per_row", "use_peft"),
        "it may not fit into memory",
        f"about {memory.total / 2**30:.1f} GiB are needed, {memory.available / 2**30:.1f} GiB are there"
        + (f", most of it for {max(memory.causes, key=lambda cause: memory.causes[cause])}" if memory.causes else ""),
        "; ".join(_room(view, memory)[:3]),
        "estimate, docs/advice.md",
        "computed",
        always=True,
    )


def _room(view: View, memory: MemoryEstimate) -> list[str]:
    """What would make room and is not done yet, what saves most first."""
    given, case = view.case.given, view.case
    accelerator = "processor" not in memory.machine
    quantised = bool(given.get("load_in_4bit") or given.get("load_in_8bit"))
    half_weights = given.get("dtype") in ("bfloat16", "float16")
    optim = str(given.get("optim", ""))
    saved: list[tuple[float, str]] = []
    if not case.lora:
        saved.append((0.9 * (memory.gradients + memory.optimizer + memory.copies), "use_peft: true"))
    elif not half_weights and not quantised:
        saved.append((memory.weights / 2, "dtype: bfloat16"))
    elif accelerator and not quantised:
        saved.append((0.7 * memory.weights, "load_in_4bit: true"))
    if accelerator and "8bit" not in optim and "adafactor" not in optim and not case.lora:
        share = 0.75 if not half_weights else 0.5
        saved.append((share * memory.optimizer, "optim: adamw_8bit (paged_adamw_8bit where that is not enough)"))
    if not memory.checkpointed:
        keep = "gradient_checkpointing: true" if given.get("gradient_checkpointing") is False else ""
        always = "checkpoint_policy: always"
        saved.append((0.9 * memory.activations, keep or always))
    elif accelerator and not given.get("activation_offloading"):
        saved.append((0.5 * memory.activations, "activation_offloading: true"))
    limit = view.number("max_length")
    if limit is not None and memory.row_tokens > limit:
        saved.append((0.5 * memory.activations, "a shorter max_length"))
    if accelerator and case.num_processes == 1:
        saved.append((0.5 * (memory.weights + memory.gradients + memory.optimizer), "more devices with FSDP or ZeRO-3"))
    saved.sort(key=lambda each: -each[0])
    return [text for size, text in saved if size > 0.02 * memory.total] or ["a smaller model"]
