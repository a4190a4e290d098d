"""Peak memory and time of a run: the one model behind ``advise``, ``--dry_run``, the panel and the report.

What goes in is a :class:`~preftune.models.shapes.Shape` (the model, from its configuration or as it is loaded), a
:class:`Workload` (the run) and a :class:`~preftune.training.machines.Machine`. How far off the answers are is measured
in docs/advice.md, here and against published footprints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from preftune.kernels.head import working_bytes
from preftune.models.shapes import Shape
from preftune.objectives import METHODS
from preftune.training.lengths import Counts
from preftune.training.machines import Machine
from preftune.training.memory import row_limits
from preftune.training.plan import MemoryEstimate, TimeEstimate

#: Reference log-probs on disk: bytes per scored token, value and key (fp32, and the row's share of keys).
STORE_BYTES = 4
#: A step is some examples drawn from all: its tokens stay below the mean by so many standard deviations above it in
#: nearly all steps, and the fullest row is what counts for memory.
_FULL_STEP = 2.0


@dataclass(frozen=True)
class Workload:
    """What a run consists of, as far as memory and time depend on it.

    Attributes:
        pairs_per_step: Examples of an optimizer step and process.
        num_pairs: Examples of an epoch and process.
        num_steps: Optimizer steps of the run.
        prompt: Mean prompt tokens per example, a shared prompt counted once.
        completion: Mean tokens of all completions.
        longest_row: Most row tokens of one example.
        spread: Standard deviation of the row tokens of an example.
        max_tokens_per_row: Token budget of a row, or ``None`` for what the trainer would choose.
        half: Whether training runs in bf16 or fp16.
        optim: Name of the optimizer.
        needs_reference: Whether reference log-probs are scored.
        live_reference: Whether they are scored along with every step instead of once before.
        exchanges: Whether each example's prompt is also scored with another's answer, for a KL baseline.
        separate_reference: Bytes of a reference model beside the policy.
        copies: Copies of the trained weights that are kept: a reference that is run along, or that follows.
        checkpointing: ``off``, ``needed`` (recompute activations that do not fit) or ``always``.
        offloading: Whether saved activations are kept in host memory.
        sharded: Processes that divide weights, gradients, optimizer state and references (FSDP, ZeRO-3).
        assumed: Whether lengths were assumed rather than counted.
    """

    pairs_per_step: int
    num_pairs: int
    num_steps: int
    prompt: float = 0.0
    completion: float = 0.0
    longest_row: int = 0
    spread: float = 0.0
    max_tokens_per_row: int | None = None
    half: bool = False
    optim: str = "adamw_torch"
    needs_reference: bool = True
    live_reference: bool = False
    exchanges: bool = False
    separate_reference: int = 0
    copies: int = 0
    checkpointing: str = "needed"
    offloading: bool = False
    sharded: int = 1
    assumed: bool = False

    @property
    def pair_tokens(self) -> float:
        """Mean tokens of an example in a packed row."""
        return self.prompt + self.completion


def num_steps(examples: int, batch: int, accumulation: int, processes: int, epochs: float, max_steps: int = -1) -> int:
    """Optimizer steps of a run, as the trainer counts them."""
    if max_steps > 0:
        return max_steps
    batches = math.ceil(examples / max(batch * processes, 1))
    return math.ceil(epochs * max(math.ceil(batches / max(accumulation, 1)), 1))


def exchanges(methods: Sequence[str]) -> bool:
    """Whether a method takes its KL baseline from exchanged answers."""
    return any(METHODS[name].needs_kl for name in methods if name in METHODS)


def checkpointing_of(settings: Any) -> str:
    """``off``, ``needed`` or ``always``, from a trainer's settings."""
    return str(settings.checkpoint_policy) if settings.gradient_checkpointing else "off"


def lengths_of_rows(prompt: Counts, completion: Counts) -> dict[str, Any]:
    """Mean prompt, mean completions, longest row and its spread, as a :class:`Workload` takes them."""
    row = prompt + completion
    if not len(row):
        return {"prompt": 0.0, "completion": 0.0, "longest_row": 0, "spread": 0.0}
    return {
        "prompt": float(prompt.mean()),
        "completion": float(completion.mean()),
        "longest_row": int(row.max()),
        "spread": float(np.std(row)),
    }


#: Bytes of optimizer state per trained parameter, where it does not have the parameter's own type; by a part of the
#: optimizer's name, the first that fits. 8-bit states have one fp32 constant per block of 256; Adafactor keeps sums of
#: rows and columns. A paged state moves to the host where the device is full.
_STATE_BYTES = (
    ("paged", 0.0),
    ("lion_8bit", 1 + 4 / 256),
    ("8bit", 2 * (1 + 4 / 256)),
    ("4bit", 2 * (0.5 + 4 / 128)),
    ("adafactor", 0.01),
)
#: Numbers of the parameter's own type, likewise; anything else is taken for Adam.
_STATE_NUMBERS = (("sgd", 0.0), ("lion", 1.0), ("rmsprop", 1.0), ("adagrad", 1.0))


def optimizer_bytes(optim: str, trainable_bytes: int, num_trainable: int) -> int:
    """Bytes of state that an optimizer keeps on the device.

    >>> optimizer_bytes("adamw_torch", 400, 100), optimizer_bytes("adamw_8bit", 400, 100)
    (800, 203)
    """
    for part, size in _STATE_BYTES:
        if part in optim:
            return round(size * num_trainable)
    numbers = next((each for part, each in _STATE_NUMBERS if part in optim), 2.0)
    return round(numbers * trainable_bytes)


def row_tokens(shape: Shape, work: Workload, machine: Machine) -> int:
    """Tokens of the fullest packed row: what a step holds, within the budget, and at least the longest example."""
    budget = work.max_tokens_per_row or limits_on(shape, work, machine)[0]
    count = min(work.pairs_per_step, max(work.num_pairs, 1))
    # All pairs in one step have no spread; drawn one by one, they have nearly all of it.
    left = 1 - (count - 1) / max(work.num_pairs - 1, 1) if work.num_pairs else 1.0
    in_step = count * work.pair_tokens + _FULL_STEP * work.spread * math.sqrt(count * max(left, 0.0))
    return max(work.longest_row, min(budget, math.ceil(in_step)))


def limits_on(shape: Shape, work: Workload, machine: Machine) -> tuple[int, int]:
    """Token budget of a row, and tokens up to which activations are kept, as the trainer would choose them."""
    free = max(machine.memory - shape.weight_bytes // work.sharded, 0)
    reserved = 3 * shape.trainable_bytes // work.sharded
    return row_limits(shape.activation_bytes, torch.device(machine.kind), reserved, free)


def activation_bytes(shape: Shape, work: Workload, machine: Machine, tokens: int, fits: int) -> int:
    """Bytes that a row keeps between forward and backward, and those of the layer at work."""
    layer = shape.activation_bytes * tokens / max(shape.layers, 1)
    if work.offloading and machine.kind != "cpu":
        return round(2 * layer)
    if work.checkpointing == "always" or (work.checkpointing == "needed" and tokens > fits):
        # The inputs of all layers; one layer computed once more, and its gradients, half of them at a time.
        return round(shape.checkpoint_bytes * tokens + 1.5 * layer)
    return round(shape.activation_bytes * tokens + layer)


def estimate_memory(
    shape: Shape, work: Workload, machine: Machine, *, checkpoint_above: int | None = None
) -> MemoryEstimate:
    """Peak memory by cause, in bytes.

    Args:
        shape: The model.
        work: The run.
        machine: Where it is to run.
        checkpoint_above: Tokens of a row up to which activations are kept, where that is settled already.
    """
    tokens = row_tokens(shape, work, machine)
    fits = limits_on(shape, work, machine)[1] if checkpoint_above is None else checkpoint_above
    scored = min(tokens, round(tokens * work.completion / max(work.pair_tokens, 1)))
    itemsize = 2 if work.half else shape.itemsize
    free = max(machine.memory - (shape.weight_bytes + 3 * shape.trainable_bytes) // work.sharded, 0)
    device = torch.device(machine.kind)
    trained = shape.head_elements if shape.head_trains else 0
    activations = activation_bytes(shape, work, machine, tokens, fits)
    head = working_bytes(scored, shape.vocab, itemsize, trained, device, free)
    gradients = shape.trainable_bytes // work.sharded
    # A matrix at a time is unpacked, or cast for its product.
    unpacks = shape.quantised or (work.half and shape.itemsize > 2)
    casts = shape.cast_bytes + (2 * shape.largest_matrix if unpacks else 0)
    return MemoryEstimate(
        weights=shape.weight_bytes // work.sharded,
        reference=(work.separate_reference + work.copies * shape.trainable_bytes) // work.sharded,
        gradients=gradients,
        optimizer=optimizer_bytes(work.optim, shape.trainable_bytes, shape.num_trainable) // work.sharded,
        copies=casts,
        activations=activations,
        head=head,
        runtime=runtime_bytes(shape, machine, tokens),
        available=machine.memory,
        row_tokens=tokens,
        checkpointed=work.checkpointing == "always" or (work.checkpointing == "needed" and tokens > fits),
        store=round(STORE_BYTES * work.num_pairs * work.completion) if work.needs_reference else 0,
        machine=machine.name,
        assumed=work.assumed,
    )


#: On a processor: what libraries, the start-up probes and kernels take, at the least and as a share of the weights.
_CPU_RUNTIME, _CPU_SHARE = 56 << 20, 0.18
#: Freed memory that the C library keeps, as a share of the activations of a row: nothing large fills the gaps where an
#: adapter is trained. Fitted to the measurements of docs/advice.md.
_CPU_KEPT = 0.85
#: On an accelerator: context, libraries and their workspaces.
_GPU_RUNTIME = 600 << 20


def runtime_bytes(shape: Shape, machine: Machine, tokens: int) -> int:
    """What is there beside the run's own tensors; measured, see docs/advice.md."""
    if machine.kind != "cpu":
        return _GPU_RUNTIME
    kept = _CPU_KEPT * shape.activation_bytes * tokens if trains_little(shape) else 0.0
    return round(_CPU_RUNTIME + _CPU_SHARE * shape.weight_bytes + kept)


def trains_little(shape: Shape) -> bool:
    """Whether an adapter is trained rather than the model."""
    return shape.num_trainable < 0.5 * shape.num_parameters


# ---- time ------------------------------------------------------------------------------------------------------------

#: Share of the peak rate of matrix products that a step on an accelerator reaches: heuristic, low end, middle, high.
ACCELERATOR_SHARE = (0.15, 0.3, 0.5)
#: How far off the time on a processor may be, by the measurements of docs/advice.md.
PROCESSOR_ERROR = 1.25
#: Times that each saved byte of activations passes through memory in a step, by whether an adapter is trained (whose
#: sums and scalings come on top) and whether in half precision (with its casts); and the share of a forward in them.
#: Fitted to the measurements of docs/advice.md.
_PASSES = {(False, False): 4.0, (False, True): 20.0, (True, False): 15.0, (True, True): 42.0}
_FORWARD_SHARE = 0.45
#: Bytes of parameters, gradients and Adam's moments that an update reads and writes per trained number, its clipping
#: included; per trained fp32 number under autocast, the casts of weight and gradient.
_UPDATE_BYTES, _CAST_BYTES = 48, 12


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one example.

    Attributes:
        forward: Of a forward pass.
        step: Of forward and backward.
        thin: Those of an adapter's small matrices, forward and backward.
        recompute: Of the body's second forward, where activations are recomputed.
    """

    forward: float
    step: float
    thin: float
    recompute: float


def operations(shape: Shape, work: Workload) -> Operations:
    """Floating-point operations of one example.

    Two per matrix element and token forward; as many backward for the gradient of the activations, and once more for
    that of a matrix that is trained. The head acts on completion tokens only. Attention: four per width, layer and pair
    of positions that see one another.
    """
    side = work.completion / 2
    seen = work.prompt**2 / 2 + 2 * (side * work.prompt + side**2 / 2)
    little = trains_little(shape)
    trained = shape.num_trainable if little else shape.body_matmul
    thin = 6 * trained * work.pair_tokens if little else 0.0
    matrices = shape.body_matmul - trained if little else shape.body_matmul
    body = 2 * matrices * work.pair_tokens + 4 * shape.hidden * shape.layers * seen
    head = 2 * shape.head_elements * work.completion
    passes = 2 if little else 3
    return Operations(body + head + thin / 3, passes * body + (3 if shape.head_trains else 2) * head, thin, body)


def estimate_time(shape: Shape, work: Workload, machine: Machine) -> TimeEstimate:
    """Seconds of a step, of the reference pass and of the whole run.

    On a processor: operations over the rates that products reached here, and bytes over the rate of memory. On an
    accelerator a share of the peak rate, which no measurement here backs.

    Args:
        shape: The model.
        work: The run.
        machine: Where it is to run.
    """
    half = work.half or shape.itemsize < 4
    count = operations(shape, work)
    memory = estimate_memory(shape, work, machine)
    step = count.step + (count.recompute if memory.checkpointed else 0.0)
    # Forward passes beside the trained one: the reference's, and the baseline's (of policy and reference).
    step += (work.live_reference + work.exchanges + (work.live_reference and work.exchanges)) * count.forward
    rate = machine.bf16 if half else machine.fp32
    if machine.kind == "cpu" and machine.is_measured:
        thin = machine.thin_bf16 if half else machine.thin_fp32
        moved = _PASSES[trains_little(shape), half] * shape.activation_bytes * work.pair_tokens / machine.bandwidth
        again = 1 + (_FORWARD_SHARE if memory.checkpointed else 0.0)
        update = (_UPDATE_BYTES + (_CAST_BYTES if shape.cast_bytes else 0)) * shape.num_trainable / machine.bandwidth
        seconds = (step / rate + count.thin / thin + again * moved) * work.pairs_per_step + update
        scored = count.forward / rate + _FORWARD_SHARE * moved
        low, high = 1 / PROCESSOR_ERROR, PROCESSOR_ERROR
    else:
        least, middle, most = ACCELERATOR_SHARE
        seconds = (step + count.thin) * work.pairs_per_step / (rate * middle)
        scored = count.forward / (rate * middle)
        low, high = middle / most, middle / least
    # A stored reference is scored once, one that follows or is not stored with every step.
    reference = (
        scored * work.num_pairs * (1 + work.exchanges) if work.needs_reference and not work.live_reference else 0.0
    )
    whole = seconds * work.num_steps + reference
    return TimeEstimate(
        step_seconds=seconds,
        reference_seconds=reference,
        seconds=whole,
        low=whole * low,
        high=whole * high,
        num_steps=work.num_steps,
        num_pairs=work.num_pairs,
        is_measured=machine.is_measured,
        machine=machine.name,
    )
