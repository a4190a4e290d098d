"""What guards look at: windows of training pairs, evaluations of held-out pairs, and samples of the policy.

Shapes: P pairs (or single answers, for methods without pairs), C columns.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from preftune.kernels.device import put, widened
from preftune.objectives import PairLogps

Array = npt.NDArray[np.float64]

#: Columns of what is kept of a pair. A method without pairs leaves the other answer's columns NaN, and its margin is
#: the reward, with its sign changed where the answer is undesirable.
COLUMNS = ("margin", "chosen", "rejected", "chosen_length", "rejected_length")
#: What a window of training pairs keeps moments of.
MEASURES = ("margin", "implied", "correct")


@dataclass
class Moments:
    """Number, sums and sums of squares of the :data:`MEASURES` over some pairs; adds up over windows and processes.

    ``implied`` is ``sigma(margin)``; ``correct`` is 1 where the margin is positive, and a half where it is zero, as all
    margins are before the first step.
    """

    num: float = 0.0
    sums: list[float] = field(default_factory=lambda: [0.0] * len(MEASURES))
    squares: list[float] = field(default_factory=lambda: [0.0] * len(MEASURES))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.num + other.num,
            [a + b for a, b in zip(self.sums, other.sums, strict=True)],
            [a + b for a, b in zip(self.squares, other.squares, strict=True)],
        )

    def mean(self, measure: str) -> float:
        """Mean over the pairs; NaN without any."""
        return self.sums[MEASURES.index(measure)] / self.num if self.num else math.nan

    def variance(self, measure: str) -> float:
        """Variance over the pairs (divided by P - 1); NaN below two."""
        if self.num < 2:
            return math.nan
        place = MEASURES.index(measure)
        spread = self.squares[place] - self.sums[place] ** 2 / self.num
        return max(spread, 0.0) / (self.num - 1)

    def standard_error(self, measure: str) -> float:
        """Standard error of the mean.

        A share of 0 or 1 has no variance of its own, yet is not known exactly: the share is shrunk by two answers of
        each kind for its error (Agresti and Coull 1998).
        """
        if measure == "correct":
            share = (self.sums[MEASURES.index(measure)] + 2) / (self.num + 4)
            return math.sqrt(share * (1 - share) / (self.num + 4))
        return math.sqrt(self.variance(measure) / self.num)

    @property
    def is_finite(self) -> bool:
        """Whether every sum is a number."""
        return all(map(math.isfinite, (*self.sums, *self.squares)))

    def as_list(self) -> list[float]:
        """For JSON."""
        return [self.num, *self.sums, *self.squares]

    @classmethod
    def from_list(cls, values: Sequence[float]) -> Moments:
        """Back from :meth:`as_list`."""
        size = len(MEASURES)
        return cls(values[0], list(values[1 : 1 + size]), list(values[1 + size :]))


@dataclass(frozen=True)
class Window:
    """Training since the last log line.

    Attributes:
        step: Optimizer step at its end.
        epoch: Epochs at its end.
        pairs: Moments over its pairs.
        grad_norms: Gradient norm of each step, before clipping.
        logs: The log line.
    """

    step: int
    epoch: float
    pairs: Moments
    grad_norms: list[float]
    logs: Mapping[str, float]


@dataclass(frozen=True)
class HeldOut:
    """One evaluation of held-out pairs.

    Attributes:
        step: Optimizer step.
        epoch: Epochs.
        split: Name of the data, ``eval`` where there is one set.
        values: ``(P, C)``, the :data:`COLUMNS`.
        groups: Number of each pair's prompt, ``(P,)``: pairs of one prompt are not independent.
        has_reference: Whether ``chosen`` and ``rejected`` are log-ratios to the reference; plain log-probs otherwise.
        train: Moments of the training pairs since the previous evaluation.
        generation: The last samples of the policy, or ``None``.
        logs: The evaluation's log line.
    """

    step: int
    epoch: float
    split: str
    values: Array
    groups: npt.NDArray[np.int64]
    has_reference: bool
    train: Moments
    generation: Generation | None
    logs: Mapping[str, float]

    def column(self, name: str) -> Array:
        """One of the :data:`COLUMNS`, ``(P,)``."""
        column: Array = self.values[:, COLUMNS.index(name)]
        return column

    @property
    def fingerprint(self) -> int:
        """Changes with the data, so that values of different pairs are never compared pair by pair."""
        lengths = np.nan_to_num(self.values[:, 3:], nan=-1).astype(np.int32)
        return zlib.crc32(lengths.tobytes() + self.groups.astype(np.int64).tobytes())


@dataclass(frozen=True)
class Generation:
    """Samples of the policy, see :mod:`preftune.training.generations`.

    Attributes:
        step: Optimizer step.
        epoch: Epochs.
        log_ratios: Log-prob under the policy less that under the reference, per sample, in nats ``(S,)``.
        lengths: Tokens per sample, end of sequence included ``(S,)``.
        chosen_lengths: Tokens of the chosen answers to the same prompts ``(S,)``.
        entropy: Mean of ``-log pi`` per token, per sample ``(S,)``: an estimate of the policy's entropy.
        finished: Whether each sample ended within the limit ``(S,)``.
        tail_shares: Share of each sample's tokens that lie in the reference's far tail ``(S,)``; see
            :data:`preftune.models.sampling.TAIL_LEVEL`.
    """

    step: int
    epoch: float
    log_ratios: Array
    lengths: Array
    chosen_lengths: Array
    entropy: Array
    finished: npt.NDArray[np.bool_]
    tail_shares: Array

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            **{name: pack(np.asarray(getattr(self, name), dtype=np.float64)) for name in _PER_SAMPLE},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Generation:
        """Back from :meth:`as_dict`."""
        columns: dict[str, Any] = {name: unpack(values[name]) for name in _PER_SAMPLE}
        columns["finished"] = columns["finished"] > 0
        return cls(step=int(values["step"]), epoch=float(values["epoch"]), **columns)


_PER_SAMPLE = ("log_ratios", "lengths", "chosen_lengths", "entropy", "finished", "tail_shares")


class Watch:
    """Collects evidence during training without waiting for the device.

    Args:
        device: Where sums are kept.
        on: Whether anything is to be collected.
    """

    def __init__(self, device: torch.device, on: bool = True) -> None:
        self.on = on
        self._device = device
        self._window: Tensor | None = None
        self._grad_norms: list[Tensor | float] = []
        self.split = ""
        self._heldout: list[Tensor] = []
        self._groups: list[int] = []

    def add_train(self, pairs: Tensor | None) -> None:
        """Add a row's pairs, ``(P, C)``, to the window."""
        if not self.on or pairs is None:
            return
        margin = pairs[:, 0]
        values = torch.stack([torch.ones_like(margin), margin, margin.sigmoid(), (margin.sign() + 1) / 2], 1)
        sums = torch.cat([values.sum(0), values[:, 1:].square().sum(0)])
        self._window = sums if self._window is None else self._window + sums

    def add_grad_norm(self, norm: Any) -> None:
        """Add a step's gradient norm."""
        if self.on and norm is not None:
            full = getattr(norm, "full_tensor", None)
            self._grad_norms.append(full() if full is not None else norm)

    def state(self) -> dict[str, Any]:
        """The window so far, for a checkpoint."""
        return {"window": self._window, "grad_norms": list(self._grad_norms)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with a window from :meth:`state`."""
        window = state["window"]
        self._window = None if window is None else window.to(self._device)
        self._grad_norms = list(state["grad_norms"])

    def begin_heldout(self, split: str) -> None:
        """Forget what an evaluation left behind whose log line never came, and name the one that begins."""
        self.split, self._heldout, self._groups = split, [], []

    def add_heldout(
        self, parts: Sequence[Tensor | None], order: Sequence[int], examples: Sequence[Mapping[str, Any]]
    ) -> None:
        """Add a batch of held-out pairs.

        Args:
            parts: Per packed row its pairs, ``(P, C)``.
            order: Number within the batch of each of these pairs.
            examples: The batch, which says what pairs share a prompt.
        """
        present = [part for part in parts if part is not None]
        if not self.on or len(present) < len(parts) or not present:
            return
        inverse = put(np.argsort(order), present[0].device)
        self._heldout.append(torch.cat(present)[inverse])
        self._groups.extend(zlib.crc32(np.asarray(example["prompt_ids"]).tobytes()) for example in examples)

    def pop_window(self, reduce: Callable[[Tensor], Tensor]) -> tuple[Moments, list[float]]:
        """Moments over all processes and gradient norms since the last call."""
        moments = Moments()
        size = 1 + 2 * len(MEASURES)
        if self.on:
            # Every process takes part, those without pairs as well.
            sums = torch.zeros(size, device=self._device) if self._window is None else self._window
            values = reduce(widened(sums)).tolist()
            moments = Moments.from_list(values)
        norms = [float(norm) for norm in self._grad_norms]
        self._window, self._grad_norms = None, []
        return moments, norms

    def pop_heldout(self, gather: Callable[[Any], list[Any]]) -> tuple[Array, npt.NDArray[np.int64]] | None:
        """Values ``(P, C)`` and prompt numbers of all processes since the last call, or ``None``.

        Args:
            gather: Gives what every process has.
        """
        if not self.on:
            return None
        local = torch.cat(self._heldout).cpu().double().numpy() if self._heldout else np.zeros((0, len(COLUMNS)))
        parts = gather((local, np.asarray(self._groups, dtype=np.int64)))
        self._heldout, self._groups = [], []
        values = np.concatenate([part[0] for part in parts])
        return (values, np.concatenate([part[1] for part in parts])) if len(values) else None


def of_pairs(logps: PairLogps, rewards: Tensor) -> Tensor:
    """The :data:`COLUMNS` of some pairs, ``(P, C)``, without graph; rewards are ``(P, 2)``."""
    chosen, rejected = logps.chosen_logps, logps.rejected_logps
    if logps.ref_chosen_logps is not None and logps.ref_rejected_logps is not None:
        chosen, rejected = chosen - logps.ref_chosen_logps, rejected - logps.ref_rejected_logps
    margin = (rewards[:, 0] - rewards[:, 1]).detach()
    columns = [margin, chosen, rejected, logps.chosen_lengths, logps.rejected_lengths]
    return torch.stack([column.detach().to(margin.dtype) for column in columns], 1)


def of_answers(logratios: Tensor, rewards: Tensor, desirable: Tensor, lengths: Tensor) -> Tensor:
    """The :data:`COLUMNS` of single answers, ``(P, C)``, without graph; all arguments are ``(P,)``."""
    rewards, ratios = rewards.detach(), logratios.detach().to(rewards.dtype)
    lengths = lengths.to(rewards.dtype)
    nowhere = torch.full_like(rewards, math.nan)
    signed = torch.where(desirable, rewards, -rewards)
    wanted = [torch.where(desirable, values, nowhere) for values in (ratios, lengths)]
    other = [torch.where(desirable, nowhere, values) for values in (ratios, lengths)]
    return torch.stack([signed, wanted[0], other[0], wanted[1], other[1]], 1)


def pack(values: Array) -> str:
    """A vector as compact text for a checkpoint's JSON, in fp32."""
    return base64.b64encode(np.asarray(values, dtype=np.float32).tobytes()).decode("ascii")


def unpack(text: str) -> Array:
    """Back from :func:`pack`."""
    return np.frombuffer(base64.b64decode(text), dtype=np.float32).astype(np.float64)
