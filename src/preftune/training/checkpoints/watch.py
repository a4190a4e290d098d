"""What checkpoints need to know about the loop: when it begins, where epochs end, whether somebody asks for a save."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from preftune.training.checkpoints.saved import SavedTrainer

#: An empty file of this name in the output folder asks for a checkpoint after the present step.
TRIGGER = "SAVE"


class LoopWatch(TrainerCallback):
    """Tells the trainer when the loop has reset its sums, and moves saves behind everything that belongs to a step.

    The last step of an epoch is followed by the epoch's own log line and evaluation. A checkpoint taken between the two
    would lose them on resuming, so it is taken after them.

    Args:
        trainer: The trainer that is watched.
    """

    def __init__(self, trainer: SavedTrainer) -> None:
        self._trainer = trainer
        self._epoch_ended = False
        self._postponed = False
        self._last_saved = -1
        self._trigger_works = True
        self._group: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put back what the loop has just reset."""
        self._epoch_ended, self._postponed, self._last_saved = False, False, -1
        if args.world_size > 1 and self._group is None:
            import torch.distributed

            # Beside the accelerators' own group, so that asking costs no synchronisation with them.
            self._group = torch.distributed.new_group(backend="gloo", timeout=args.ddp_timeout_delta)
        self._trainer.begin()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An epoch begins."""
        self._epoch_ended = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """All steps of an epoch are done, or training stops."""
        self._epoch_ended = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save where the trigger file asks for it."""
        if self._trigger_works and self._asked(args):
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember what is saved."""
        self._last_saved = state.global_step

    def arrange_save(self, control: TrainerControl, state: TrainerState, epoch: float) -> None:
        """Postpone a save that is due at the last step of an epoch until the epoch's log line and evaluation are done.

        Args:
            control: What is due now.
            state: The trainer's state, at the end of a step or of an epoch.
            epoch: Number of the epoch, from zero.
        """
        complete = state.epoch >= epoch + 1 or state.global_step >= state.max_steps > 0
        if not self._epoch_ended:
            self._postponed = complete and control.should_save
            if self._postponed:
                control.should_save = False
            return
        if self._postponed:
            control.should_save, self._postponed = True, False
        elif not complete and self._stopped_by_user():
            # The epoch goes on after resuming: neither its log line nor its evaluation is due, and all is saved.
            control.should_log = control.should_evaluate = False
            control.should_save = control.should_save and self._last_saved != state.global_step

    def _stopped_by_user(self) -> bool:
        return any(getattr(each, "stopped_at", None) is not None for each in self._trainer.callback_handler.callbacks)

    def _asked(self, args: TrainingArguments) -> bool:
        asked = False
        if args.process_index == 0:
            trigger = Path(args.output_dir or ".") / TRIGGER
            # Something that has content is no request, and would be lost.
            asked = trigger.is_file() and not trigger.is_symlink() and not trigger.stat().st_size
            if asked:
                try:
                    trigger.unlink()
                except OSError as error:
                    self._trigger_works = False
                    warnings.warn(
                        f"{trigger} cannot be removed ({error.strerror}) and is ignored from now on",
                        UserWarning,
                        stacklevel=2,
                    )
        if self._group is None:
            return asked
        import torch

        flag = torch.tensor([int(asked)])
        torch.distributed.broadcast(flag, src=0, group=self._group)
        return bool(flag.item())
