"""What a preference trainer carries from step to step beside model and optimizer, and keeps in its checkpoints.

BCO's running mean of rewards goes into a checkpoint as JSON, a reference that follows the policy as safetensors, so
that a resumed run goes on with the very same numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from preftune.errors import TrainingError
from preftune.files import replace_text, replacing
from preftune.kernels.device import widened
from preftune.objectives import BCOState
from preftune.packing import PackedRow
from preftune.references.live import like, shard_of, whole_of
from preftune.training.reference import Reference

STATE_FILE = "preftune_state.json"
REFERENCE_FILE = "reference.safetensors"


class RunningDelta:
    """BCO's reward shift (2404.04656) while training: the mean reward of all *earlier* optimizer steps.

    The paper's shift is the mean reward over the data under the present policy, which nobody knows; the mean over the
    steps so far stands for it. It moves once per optimizer step, by the rewards of all of the step's pairs on all
    processes, and acts from the next step on: within a step it is a constant, so that the order of the pairs, the token
    budget and the accumulation cannot change a result. TRL's former BCO trainer moved it with every micro-batch, before
    using it there. Both begin at 0, which is the mean reward of the first step, where policy and reference agree.

    Attributes:
        state: Sum and number of the rewards so far.
    """

    def __init__(self) -> None:
        self.state = BCOState()
        self._rows: dict[int, tuple[Tensor, int]] = {}

    def begin(self) -> None:
        """Forget rows that no finished step contains."""
        self._rows.clear()

    def note(self, row: PackedRow, rewards: Tensor) -> None:
        """Take note of a row's rewards, of any shape; a row that is run again counts once."""
        self._rows[id(row)] = (widened(rewards.detach()).sum(), rewards.numel())

    def finish(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Move on by the rewards of a step; ``reduce`` sums a tensor over all processes."""
        total = torch.stack([reward for reward, _ in self._rows.values()]).sum()
        count = sum(number for _, number in self._rows.values())
        self._rows.clear()
        summed, number = reduce(torch.stack([total, total.new_full((), float(count))])).tolist()
        self.state = self.state.update(reward_sum=summed, num_rewards=int(number))


class Carrier(Protocol):
    """What has such state: a task, or the trainer that runs it."""

    @property
    def running_delta(self) -> RunningDelta | None:
        """BCO's reward shift."""

    @property
    def reference(self) -> Reference | None:
        """The reference, which may follow the policy."""


def save(carrier: Carrier, folder: str, *, writes: bool) -> None:
    """Write what is carried into a checkpoint folder, each file in one step.

    Args:
        carrier: What has such state.
        folder: The checkpoint.
        writes: Whether this process writes; the others are called too, since they may hold shards of it.
    """
    if writes and carrier.running_delta is not None:
        state = carrier.running_delta.state
        # JSON's shortest decimals give back the same double.
        text = json.dumps({"bco": {"total": state.total, "count": state.count}})
        replace_text(Path(folder, STATE_FILE), text + "\n")
    if carrier.reference is not None and carrier.reference.follows:
        from safetensors.torch import save_file

        tensors = {str(n): whole_of(value).contiguous() for n, value in enumerate(carrier.reference.following())}
        if writes:
            with replacing(Path(folder, REFERENCE_FILE)) as beside:
                save_file(tensors, beside)


def load(carrier: Carrier, folder: str) -> None:
    """Read what :func:`save` wrote.

    Raises:
        TrainingError: A file is missing or does not fit the model, so that the run could not go on as it began.
    """
    if carrier.running_delta is not None:
        try:
            found = json.loads(Path(folder, STATE_FILE).read_text(encoding="utf-8"))["bco"]
            carrier.running_delta.state = BCOState(float(found["total"]), int(found["count"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _unusable(folder, STATE_FILE, "the running mean of BCO's rewards") from error
    if carrier.reference is not None and carrier.reference.follows:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        mine = carrier.reference.following()
        try:
            tensors = load_file(Path(folder, REFERENCE_FILE))
            for number, value in enumerate(mine):
                shard_of(value).copy_(shard_of(like(tensors[str(number)], value)))
        except (OSError, KeyError, RuntimeError, SafetensorError) as error:
            raise _unusable(folder, REFERENCE_FILE, "the reference as it had followed the policy") from error


def _unusable(folder: str, name: str, what: str) -> TrainingError:
    return TrainingError(
        f"the checkpoint does not hold {what}",
        where=os.path.join(folder, name),
        remedy="go on from a checkpoint of a run with the same settings, or begin anew without resume_from_checkpoint",
    )
