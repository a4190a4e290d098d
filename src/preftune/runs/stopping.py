"""A clean end of training on Ctrl-C and on SIGTERM."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopOnSignal(TrainerCallback):
    """On SIGINT or SIGTERM, finish the step, save a checkpoint and stop; a second SIGINT stops at once.

    With several processes the decision is taken together after each step, because a process that stops alone would
    leave the others waiting.

    Attributes:
        stopped_at: Step after which training stopped, or ``None``.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.stopped_at: int | None = None
        self._say = say
        self._requested = False
        self._previous: dict[int, Any] = {}
        self._group: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the signals over."""
        if args.world_size > 1:
            import torch.distributed

            # Beside the accelerators' own group, so that asking costs no synchronisation with them.
            self._group = torch.distributed.new_group(backend="gloo", timeout=args.ddp_timeout_delta)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop here if anybody asked to."""
        if self.stopped_at is None and self._anybody_asked():
            self.stopped_at = state.global_step
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the signals back."""
        self.restore()

    def restore(self) -> None:
        """Give the signals back; also called when training ends with an error."""
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = True
        self._say("stopping after this step, then saving a checkpoint; press Ctrl-C again to stop at once")

    def _anybody_asked(self) -> bool:
        if self._group is None:
            return self._requested
        import torch

        asked = torch.tensor([int(self._requested)])
        torch.distributed.all_reduce(asked, group=self._group)
        return bool(asked.item())


def say_to_stderr(text: str) -> None:
    """Print a line where it disturbs no output; safe inside a signal handler."""
    # `print` may be in the middle of a line when the signal arrives.
    sys.stderr.write(f"\npreftune: {text}\n")
    sys.stderr.flush()
