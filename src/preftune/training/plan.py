"""What a training run is going to do, worked out before the first step and shown to the user."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Causes of the peak memory, in the order in which they are shown.
CAUSES = ("weights", "reference", "gradients", "optimizer", "copies", "activations", "head", "runtime")


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory by cause, in bytes.

    Attributes:
        weights: Model parameters.
        reference: A reference model of its own, and copies of the trained weights that follow or run along.
        gradients: Gradients of the trainable parameters.
        optimizer: Optimizer state.
        copies: Half-precision copies of weights: those that autocast keeps, and the matrix at work.
        activations: Activations of the fullest packed row.
        head: Tiles of the language-model head.
        runtime: Libraries, kernels' work space, and freed memory that is not given back.
        available: What the device has for all of it, or ``None`` where that is unknown.
        row_tokens: Tokens of the fullest row.
        checkpointed: Whether its activations are recomputed.
        store: Bytes of reference log-probs on disk.
        machine: Name of the device.
        assumed: Whether lengths were assumed rather than counted.
    """

    weights: int = 0
    reference: int = 0
    gradients: int = 0
    optimizer: int = 0
    copies: int = 0
    activations: int = 0
    head: int = 0
    runtime: int = 0
    available: int | None = None
    row_tokens: int = 0
    checkpointed: bool = False
    store: int = 0
    machine: str = ""
    assumed: bool = False

    @property
    def causes(self) -> dict[str, int]:
        """Bytes by cause, those that take some."""
        return {name: getattr(self, name) for name in CAUSES if getattr(self, name)}

    @property
    def total(self) -> int:
        """Sum over all causes, in bytes."""
        return sum(self.causes.values())

    @property
    def fits(self) -> bool:
        """Whether it is not known to be more than there is."""
        return self.available is None or self.total <= self.available


@dataclass(frozen=True)
class TimeEstimate:
    """How long a run takes.

    Attributes:
        step_seconds: Of an optimizer step.
        reference_seconds: Of the reference pass.
        seconds: Of the whole run, evaluations and checkpoints apart.
        low: Low end of the latter.
        high: High end.
        num_steps: Optimizer steps.
        num_pairs: Examples of an epoch.
        is_measured: Whether the machine's rates were measured, rather than taken from a data sheet.
        machine: Name of the device.
    """

    step_seconds: float = 0.0
    reference_seconds: float = 0.0
    seconds: float = 0.0
    low: float = 0.0
    high: float = 0.0
    num_steps: int = 0
    num_pairs: int = 0
    is_measured: bool = False
    machine: str = ""


@dataclass(frozen=True)
class TrainingPlan:
    """Facts about a run, for the summary panel, ``--dry_run`` and the provenance file.

    Attributes:
        method: Loss name or names, for example ``sigmoid``.
        model: Name or path of the model.
        num_parameters: Parameters of the policy.
        num_trainable_parameters: Parameters that the optimizer updates.
        num_pairs: Training examples after drops.
        pairs_per_step: Examples in one optimizer step over all processes.
        num_steps: Optimizer steps.
        num_prompt_tokens: Tokens of all prompts, each counted once.
        num_completion_tokens: Tokens of all completions.
        num_packed_tokens: Tokens that the model computes in one epoch.
        num_padded_tokens: Tokens that padded batches of both full sequences would have computed.
        max_tokens_per_row: Token budget of one packed row.
        path: ``packed`` or ``padded``.
        backend: Name of the attention backend.
        backend_reason: Why that path and backend were chosen.
        reference: Where reference log-probs come from.
        memory: Estimated peak memory.
        time: Estimated time, or ``None`` where lengths are not known.
        data: Preparation report per split (rows read, kept, dropped, and why).
        notes: Further lines worth showing, such as translated settings.
    """

    method: str
    model: str
    num_parameters: int
    num_trainable_parameters: int
    num_pairs: int
    pairs_per_step: int
    num_steps: int
    num_prompt_tokens: int
    num_completion_tokens: int
    num_packed_tokens: int
    num_padded_tokens: int
    max_tokens_per_row: int
    path: str
    backend: str
    backend_reason: str
    reference: str
    memory: MemoryEstimate
    time: TimeEstimate | None = None
    data: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
