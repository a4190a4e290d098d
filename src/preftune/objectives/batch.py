"""What a loss sees: sums of log-probs per completion, their lengths, and optional per-pair columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from preftune.errors import DataError
from preftune.objectives.numerics import scalar


@dataclass(frozen=True, kw_only=True, eq=False)
class PairLogps:
    """Log-probs of a batch of preference pairs, one number per completion.

    Every tensor has the shape ``(pairs,)`` and is on one device; nothing is ever broadcast. Half precision is
    raised to float32 on construction, float64 is kept, and the integer columns follow, so that a loss computes in
    one dtype throughout.

    Attributes:
        chosen_logps: log pi(chosen | prompt), summed over completion tokens, in nats. Under LD-DPO the tokens behind
            the shorter completion's length are already down-weighted.
        rejected_logps: The same for the rejected completion.
        ref_chosen_logps: The same sums under the reference model; ``None`` for reference-free methods.
        ref_rejected_logps: The same for the rejected completion.
        chosen_lengths: Completion tokens of the chosen answer, integer or floating.
        rejected_lengths: Completion tokens of the rejected answer.
        chosen_sum_logps: Undown-weighted sum behind the SFT term; by default ``chosen_logps``. ORPO as TRL runs it
            takes this sum over prompt and completion.
        chosen_scored: Tokens that ``chosen_sum_logps`` sums over; by default ``chosen_lengths``.
        margins: Score gap, chosen minus rejected, for methods that use one.
        weights: Factor on each pair's loss, from a data column.
        wpo_weights: Factor of Weighted Preference Optimization; carries no gradient.
        mean_chosen_scored: Number, the mean of ``chosen_scored`` over *all* pairs of the optimizer step, so that a
            token mean over the step is a sum of per-pair terms. By default the mean over this batch, which is right
            only when the batch is the whole step.

    Raises:
        DataError: A tensor has another shape, dtype or device than it must.

    Example:
        >>> batch = PairLogps(
        ...     chosen_logps=torch.tensor([-10.0, -12.0]), rejected_logps=torch.tensor([-11.0, -9.0]),
        ...     ref_chosen_logps=torch.tensor([-10.5, -12.0]), ref_rejected_logps=torch.tensor([-10.0, -9.5]),
        ...     chosen_lengths=torch.tensor([5, 4]), rejected_lengths=torch.tensor([6, 3]))
        >>> batch.num_pairs, batch.chosen_logratios.tolist(), batch.rejected_logratios.tolist()
        (2, [0.5, 0.0], [-1.0, 0.5])
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    chosen_sum_logps: Tensor | None = None
    chosen_scored: Tensor | None = None
    margins: Tensor | None = None
    weights: Tensor | None = None
    wpo_weights: Tensor | None = None
    mean_chosen_scored: Tensor | float | None = None

    def __post_init__(self) -> None:
        if (self.ref_chosen_logps is None) != (self.ref_rejected_logps is None):
            missing = "ref_chosen_logps" if self.ref_chosen_logps is None else "ref_rejected_logps"
            raise DataError(
                "only one of the two reference log-probs is given",
                where=f"PairLogps.{missing}",
                remedy="give both, or neither for a reference-free method",
            )
        _prepare(self, _PAIR_LOGPS, _PAIR_COLUMNS)
        if self.mean_chosen_scored is not None:
            mean = scalar(self.mean_chosen_scored, self.chosen_logps)
            if mean.ndim != 0:
                raise DataError(
                    "the mean number of scored tokens must be one number",
                    where="PairLogps.mean_chosen_scored",
                    value=tuple(mean.shape),
                    allowed="a float or a 0-dimensional tensor",
                )
            object.__setattr__(self, "mean_chosen_scored", mean)

    @property
    def num_pairs(self) -> int:
        """Number of pairs in the batch."""
        return self.chosen_logps.shape[0]

    @property
    def has_reference(self) -> bool:
        """Whether reference log-probs are present."""
        return self.ref_chosen_logps is not None

    @property
    def sft_logps(self) -> Tensor:
        """``chosen_sum_logps`` or its default, ``(pairs,)``."""
        return self.chosen_logps if self.chosen_sum_logps is None else self.chosen_sum_logps

    @property
    def sft_tokens(self) -> Tensor:
        """``chosen_scored`` or its default, ``(pairs,)``."""
        return self.chosen_lengths if self.chosen_scored is None else self.chosen_scored

    @property
    def mean_sft_tokens(self) -> Tensor:
        """``mean_chosen_scored`` or its default, 0-dimensional."""
        if self.mean_chosen_scored is None:
            return self.sft_tokens.mean()
        return torch.as_tensor(self.mean_chosen_scored)

    @property
    def ref_logps(self) -> tuple[Tensor, Tensor]:
        """Reference log-probs of the chosen and the rejected completion; a ``DataError`` where there are none."""
        if self.ref_chosen_logps is None or self.ref_rejected_logps is None:
            raise DataError(
                "this method compares with a reference model, but the batch has no reference log-probs",
                where="PairLogps.ref_chosen_logps",
                remedy="compute them, or take a reference-free method (orpo, simpo, cpo)",
            )
        return self.ref_chosen_logps, self.ref_rejected_logps

    @property
    def chosen_logratios(self) -> Tensor:
        """Log pi(chosen) - log pi_ref(chosen), ``(pairs,)`` in nats."""
        return self.chosen_logps - self.ref_logps[0]

    @property
    def rejected_logratios(self) -> Tensor:
        """Log pi(rejected) - log pi_ref(rejected), ``(pairs,)`` in nats."""
        return self.rejected_logps - self.ref_logps[1]

    def select(self, index: Tensor | slice) -> PairLogps:
        """Return some of the pairs, for a step that is split.

        Args:
            index: What a ``(pairs,)`` tensor is indexed with: a slice, a boolean mask or integer positions.

        Returns:
            A batch of the selected pairs that keeps this batch's ``mean_chosen_scored``, given or by default.
        """
        parts: dict[str, Any] = {"mean_chosen_scored": self.mean_sft_tokens}
        for name in (*_PAIR_LOGPS, *_PAIR_COLUMNS):
            value = getattr(self, name)
            parts[name] = None if value is None else value[index]
        return replace(self, **parts)

    @classmethod
    def concat(cls, batches: Sequence[PairLogps]) -> PairLogps:
        """Join batches of one step, for losses that need all of its pairs at once.

        Args:
            batches: At least one batch, all with the same optional columns and the same ``mean_chosen_scored``
                (the first one's is kept).

        Returns:
            One batch with the pairs in the given order.

        Raises:
            DataError: There is no batch, or only some carry an optional column.
        """
        if not batches:
            raise DataError("there is nothing to join", where="PairLogps.concat", allowed="at least one batch")
        joined: dict[str, Any] = {}
        for name in (*_PAIR_LOGPS, *_PAIR_COLUMNS):
            parts = [part for part in (getattr(batch, name) for batch in batches) if part is not None]
            if parts and len(parts) != len(batches):
                raise DataError(
                    "only some of the batches carry this column",
                    where=f"PairLogps.{name}",
                    value=f"{len(parts)} of {len(batches)}",
                    allowed="all or none",
                )
            joined[name] = torch.cat(parts) if parts else None
        return replace(batches[0], **joined)


@dataclass(frozen=True, kw_only=True, eq=False)
class UnpairedLogps:
    """Log-probs of single completions with a desirable/undesirable label, for methods without pairs.

    Attributes:
        logps: log pi(completion | prompt), summed over completion tokens, ``(examples,)`` in nats.
        ref_logps: The same sums under the reference model.
        labels: ``True`` for desirable completions, boolean ``(examples,)``.
        weights: Factor on each example's loss, from a data column.

    Raises:
        DataError: A tensor has another shape, dtype or device than it must.
    """

    logps: Tensor
    ref_logps: Tensor
    labels: Tensor
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        labels = self.labels
        if not isinstance(labels, Tensor) or labels.dtype != torch.bool:
            raise DataError(
                "labels must be boolean",
                where="UnpairedLogps.labels",
                value=getattr(labels, "dtype", type(labels).__name__),
                allowed="torch.bool, True for desirable",
            )
        _prepare(self, ("logps", "ref_logps"), ("weights",))
        _check_place(labels, "UnpairedLogps.labels", self.logps)

    @property
    def num_examples(self) -> int:
        """Number of examples in the batch."""
        return self.logps.shape[0]

    @property
    def logratios(self) -> Tensor:
        """Log pi - log pi_ref, ``(examples,)`` in nats."""
        return self.logps - self.ref_logps


_PAIR_LOGPS = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps", "chosen_sum_logps")
_PAIR_COLUMNS = ("chosen_lengths", "rejected_lengths", "chosen_scored", "margins", "weights", "wpo_weights")


def _prepare(batch: PairLogps | UnpairedLogps, logps: Sequence[str], columns: Sequence[str]) -> torch.dtype:
    """Check every tensor of a batch and bring all to one dtype: the widest among the log-probs, float32 at least.

    The columns are data, so they lose any gradient.
    """
    kind = type(batch).__name__
    first = getattr(batch, logps[0])
    dtype = torch.float32
    for name in logps:
        value = getattr(batch, name)
        if value is None and _is_optional(batch, name):
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            given = getattr(value, "dtype", type(value).__name__)
            raise DataError("log-probs must be a floating tensor", where=f"{kind}.{name}", value=given)
        _check_place(value, f"{kind}.{name}", first)
        dtype = torch.promote_types(dtype, value.dtype)
    for name in columns:
        value = getattr(batch, name)
        if value is None and _is_optional(batch, name):
            continue
        if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
            given = getattr(value, "dtype", type(value).__name__)
            raise DataError("the column must be a numeric tensor", where=f"{kind}.{name}", value=given)
        _check_place(value, f"{kind}.{name}", first)
    for name in (*logps, *columns):
        value = getattr(batch, name)
        if value is not None:
            value = value.detach() if name in columns else value
            object.__setattr__(batch, name, value.to(dtype))
    return dtype


def _is_optional(batch: PairLogps | UnpairedLogps, name: str) -> bool:
    return any(entry.name == name and entry.default is None for entry in fields(batch))


def _check_place(value: Tensor, where: str, first: Tensor) -> None:
    if value.ndim != 1 or value.shape != first.shape:
        raise DataError(
            "the tensor has another shape than the first log-probs (nothing is broadcast)",
            where=where,
            value=tuple(value.shape),
            allowed=f"({first.shape[0]},)" if first.ndim == 1 else "one dimension: (pairs,)",
        )
    if value.device != first.device:
        raise DataError(
            "the tensor lies on another device than the first log-probs",
            where=where,
            value=str(value.device),
            allowed=str(first.device),
        )
