"""What a training run is going to do, worked out before the first step and shown to the user."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory by cause, in bytes.

    Attributes:
        weights: Model parameters, a frozen reference copy included where one is kept.
        gradients: Gradients of the trainable parameters.
        optimizer: Optimizer state.
        activations: Activations of the largest packed row.
        head: Tiles of the language-model head.
        available: What the device has free, or ``None`` where that is unknown.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    head: int = 0
    available: int | None = None

    @property
    def total(self) -> int:
        """Sum over all causes, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


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
    data: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
