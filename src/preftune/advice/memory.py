"""Peak memory and time of a run before it exists. How far off they are is measured in docs/advice.md."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from preftune.advice.case import Lengths
from preftune.advice.machines import Machine
from preftune.advice.shapes import Shape
from preftune.kernels.head import working_bytes
from preftune.training.memory import MOST_TOKENS

#: Share of the peak rate of matrix products that a training step reaches: heuristic, low and high end, by whether the
#: rate was measured (on the processor that the benchmark ran on, docs/advice.md) or comes from a data sheet.
EFFICIENCY = {("cpu", "fp32"): (0.45, 0.65, 0.9), ("cpu", "bf16"): (0.15, 0.25, 0.4), ("gpu", ""): (0.15, 0.3, 0.5)}
#: Reference log-probs: bytes per scored token on disk, value and key (fp32, and the row's share of keys).
STORE_BYTES = 4


@dataclass(frozen=True)
class Plan:
    """What a run consists of, as far as memory and time depend on it.

    Attributes:
        pairs_per_step: Pairs of an optimizer step and process.
        num_pairs: Pairs of an epoch and process.
        num_epochs: Passes over them.
        prompt: Mean prompt tokens per pair.
        completion: Mean tokens of both completions.
        longest_row: Most tokens of one pair.
        max_tokens_per_row: The user's budget, or ``None``.
        half: Whether training runs in bf16.
        optimizer_states: fp32 numbers per trainable parameter that the optimizer keeps.
        needs_reference: Whether reference log-probs are scored.
        separate_reference: Bytes of a reference model beside the policy.
        checkpointing: Whether activations are recomputed where they do not fit.
        assumed: Whether lengths were assumed rather than counted.
    """

    pairs_per_step: int
    num_pairs: int
    num_epochs: float
    prompt: float
    completion: float
    longest_row: int
    max_tokens_per_row: int | None = None
    half: bool = False
    optimizer_states: float = 2.0
    needs_reference: bool = True
    separate_reference: int = 0
    checkpointing: bool = True
    assumed: bool = False

    @property
    def pair_tokens(self) -> float:
        """Mean tokens of a pair in a packed row, its prompt once."""
        return self.prompt + self.completion


#: Bytes per parameter of optimizer state, by ``optim``; anything else is taken for AdamW.
_STATES = {
    "sgd": 0.0,
    "adafactor": 0.05,
    "adamw_bnb_8bit": 0.5,
    "paged_adamw_8bit": 0.5,
    "rmsprop": 1.0,
    "adagrad": 1.0,
}


def optimizer_states(optim: str) -> float:
    """fp32 numbers that an optimizer keeps per trainable parameter."""
    return _STATES.get(optim, 2.0)


def lengths_or_guess(lengths: Lengths | None, max_length: int | None) -> tuple[float, float, int, bool]:
    """Mean prompt, mean of both completions and longest pair; guessed from ``max_length`` where nothing is known.

    The guess: sequences of half the limit, a third of them prompt.
    """
    if lengths is not None and len(lengths.longest):
        kept = lengths.cut(max_length)
        both = kept.chosen + kept.rejected
        return float(kept.prompt.mean()), float(both.mean()), int((kept.prompt + both).max()), False
    limit = max_length or 1024
    return limit / 6, 2 * limit / 3, round(5 * limit / 3), True


def row_tokens(shape: Shape, plan: Plan, machine: Machine) -> int:
    """Tokens of the longest packed row: what a step holds, within the budget that the trainer would choose."""
    most = MOST_TOKENS["cpu" if _is_processor(machine) else "cuda"]
    if plan.max_tokens_per_row:
        most = plan.max_tokens_per_row
    elif shape.activation_bytes > 0:
        fits = (machine.memory - shape.weight_bytes - 3 * shape.trainable_bytes) * 0.5 / shape.activation_bytes
        most = max(256, min(most, int(fits)))
    in_step = plan.pairs_per_step * plan.pair_tokens
    return max(plan.longest_row, min(most, math.ceil(in_step)))


def estimate_memory(shape: Shape, plan: Plan, machine: Machine) -> dict[str, Any]:
    """Peak memory by cause, in bytes.

    Weights; gradients and optimizer state of what is trained; half-precision copies under autocast; activations of the
    longest packed row; the head's tiles of fp32 logits and, where the head is trained, kept probabilities and its
    gradient; a reference model of its own. Not in it: the interpreter, kernels' work space, the data.

    Args:
        shape: The model.
        plan: The run.
        machine: Where it is to run.

    Returns:
        Bytes by cause, ``total``, ``available``, ``row_tokens``, ``fits``, and ``store_bytes`` on disk.
    """
    tokens = row_tokens(shape, plan, machine)
    scored = min(tokens, round(tokens * plan.completion / max(plan.pair_tokens, 1)))
    itemsize = 2 if plan.half or shape.weight_bytes < 3 * shape.num_parameters else 4
    device = torch.device("cpu" if _is_processor(machine) else "cuda")
    free = max(machine.memory - shape.weight_bytes - 3 * shape.trainable_bytes, 0)
    trained = shape.head_elements if shape.head_trains else 0
    head = working_bytes(scored, shape.vocab, itemsize, trained, device, free)
    parts = {
        "weights": shape.weight_bytes,
        "reference": plan.separate_reference,
        "gradients": shape.trainable_bytes,
        "optimizer": round(plan.optimizer_states * shape.trainable_bytes),
        "copies": shape.cast_bytes,
        "activations": round(shape.activation_bytes * tokens),
        "head": head,
    }
    total = sum(parts.values())
    store = STORE_BYTES * plan.num_pairs * plan.completion if plan.needs_reference else 0
    return {
        **parts,
        "total": total,
        "growth": total - shape.weight_bytes,
        "available": machine.memory,
        "fits": total <= machine.memory,
        "row_tokens": tokens,
        "store_bytes": round(store),
        "machine": machine.name,
        "machine_source": machine.source,
        "activations_traced": shape.exact,
        "lengths_assumed": plan.assumed,
    }


def operations(shape: Shape, plan: Plan) -> tuple[float, float]:
    """Floating-point operations of one pair: training step, and reference pass.

    Two per matrix element and token forward; twice that backward where weights are trained, once where only gradients
    with respect to activations are needed. The head acts on completion tokens only. Attention: four per width, layer
    and pair of positions that see one another.
    """
    side = plan.completion / 2
    seen = plan.prompt**2 / 2 + 2 * (side * plan.prompt + side**2 / 2)
    forward = 2 * shape.body_matmul * plan.pair_tokens + 2 * shape.head_elements * plan.completion
    forward += 4 * shape.hidden * shape.layers * seen
    backward = 2.0 if shape.num_trainable > 0.5 * shape.num_parameters else 1.0
    return (1 + backward) * forward, forward if plan.needs_reference else 0.0


def _is_processor(machine: Machine) -> bool:
    return machine.is_measured and "processor" in machine.name


def estimate_time(shape: Shape, plan: Plan, machine: Machine) -> dict[str, Any]:
    """Seconds of a step, of the reference pass and of the whole run.

    Args:
        shape: The model.
        plan: The run.
        machine: Where it is to run.

    Returns:
        ``step_seconds``, ``reference_seconds``, ``seconds`` with ``low`` and ``high`` ends, and what was assumed.
    """
    half = plan.half or shape.weight_bytes < 3 * shape.num_parameters
    rate = machine.bf16 if half else machine.fp32
    key = ("cpu", "bf16" if half else "fp32") if _is_processor(machine) else ("gpu", "")
    low, middle, high = EFFICIENCY[key]
    step, reference = operations(shape, plan)
    steps = max(1, math.ceil(plan.num_epochs * math.ceil(plan.num_pairs / max(plan.pairs_per_step, 1))))
    work = step * plan.pairs_per_step * steps + reference * plan.num_pairs
    return {
        "step_seconds": step * plan.pairs_per_step / (rate * middle),
        "reference_seconds": reference * plan.num_pairs / (rate * middle),
        "seconds": work / (rate * middle),
        "low": work / (rate * high),
        "high": work / (rate * low),
        "num_steps": steps,
        "operations": work,
        "rate": rate,
        "share_of_rate": middle,
        "plan": asdict(plan),
    }
