"""What a run survives: memory that runs out in a row, and values that are not finite.

Rows are a matter of arrangement: the loss is a sum over examples, so a step whose row does not fit is run again in
shorter rows, from an empty gradient, and ends with the same one. A step whose loss or gradient is not finite is
skipped; weights, optimizer and schedule stay as they were, and the rows that caused it are named.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from preftune.errors import SetupError, TrainingError
from preftune.packing import PackedRow
from preftune.training.batch import Batch
from preftune.training.blame import blamed_rows
from preftune.training.checkpoints import rng
from preftune.training.feeding import FedTrainer

logger = logging.getLogger(__name__)


class RecoveringTrainer(FedTrainer):
    """Runs a step's rows again in shorter ones, and skips steps that are not finite."""

    router: Any

    def __init__(self, **kwargs: Any) -> None:
        self._batch = Batch()
        self._before: dict[str, Any] = {}
        self._step_loss: Tensor | None = None
        super().__init__(**kwargs)

    def _plan(self, batch: Batch) -> list[PackedRow]:
        """Rows of an optimizer step, under the token budget."""
        raise NotImplementedError

    def _rows_everywhere(self, rows: int) -> int:
        """Rows that every process has to run."""
        raise NotImplementedError

    # ---- memory -----------------------------------------------------------------------------------------------------

    def run_step(self, model: nn.Module, batch: Batch, run: Callable[[list[PackedRow]], Tensor]) -> Tensor:
        """Plan the rows of a step and run them, in shorter rows where memory runs out.

        Args:
            model: The wrapped model.
            batch: The examples of the step.
            run: Forward and backward of rows; returns the loss.

        Raises:
            SetupError: If rows cannot be made shorter, or not by this process alone.
        """
        self._forgive()
        self._batch, self._before = batch, self._kept_before_step()
        state = rng.capture(self.args.device)
        while True:
            rows: list[PackedRow] = []
            try:
                rows = self._plan(batch)
                rows += [rows[-1]] * (self._rows_everywhere(len(rows)) - len(rows))
                self._step_loss = run(rows)
                return self._step_loss
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
                self._shorten(rows, error)
            # Out of the handler, whose traceback holds the activations: part of the gradient may have been added.
            model.zero_grad(set_to_none=True)
            clear_device_cache(garbage_collection=True)
            self._restore_before_step()
            rng.restore(state, self.args.device)

    def _shorten(self, rows: list[PackedRow], error: BaseException) -> None:
        """Halve the token budget of rows, now and for the rest of the run."""
        longest = max((row for row in rows if len(row.examples) > 1), key=lambda r: r.num_tokens, default=None)
        most = max((row.num_tokens for row in rows), default=0)
        refused = remedy = None
        if self.args.world_size > 1 or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            refused, remedy = (
                "one process cannot repeat a step by itself",
                f"set max_tokens_per_row: {max(most // 2, 1)}",
            )
        elif self.router is not None:
            refused = "the load-balancing loss belongs to micro-batches, which cannot be split"
            remedy = "lower per_device_train_batch_size and raise gradient_accumulation_steps"
        elif longest is None:
            refused, remedy = (
                "every row holds one example",
                "lower max_length, or set gradient_checkpointing or use_peft",
            )
        if refused is not None:
            raise SetupError(
                f"memory ran out in a row of {most} tokens, and {refused}", where=_flat(error), remedy=remedy
            ) from error
        assert longest is not None
        before = self.max_tokens_per_row
        self.max_tokens_per_row = max(1, min(before, longest.num_tokens) // 2)
        warnings.warn(
            f"memory ran out in step {self.state.global_step + 1}; its rows are run again, and rows from now on hold "
            f"up to {self.max_tokens_per_row} tokens instead of {before} (max_tokens_per_row); results stay the same",
            UserWarning,
            stacklevel=2,
        )

    def _kept_before_step(self) -> dict[str, Any]:
        delta = getattr(self, "running_delta", None)
        return {"process": self.process_state(), "delta": None if delta is None else delta.state}

    def _restore_before_step(self) -> None:
        self.load_process_state(self._before["process"])
        delta = getattr(self, "running_delta", None)
        if delta is not None:
            delta.state = self._before["delta"]

    # ---- values that are not finite ---------------------------------------------------------------------------------

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        # A loss scaler meets infinities on purpose and skips by itself; DeepSpeed owns its gradients.
        left_alone = self.is_deepspeed_enabled or getattr(self.accelerator, "scaler", None) is not None
        if not left_alone and len(self._batch) and not self._is_finite(norm):
            self._skip(model, norm)
        else:
            self.num_skipped_in_a_row = 0
        return norm

    def _is_finite(self, norm: Any) -> bool:
        loss = self._step_loss
        full = getattr(norm, "full_tensor", None)
        value = full() if full is not None else torch.as_tensor(norm, device=self.args.device)
        if loss is not None:
            value = value.to(torch.float32) + loss.to(torch.float32) * 0
        # Gradients are the same everywhere by now, losses are not.
        return self._everywhere(bool(torch.isfinite(value).all()))

    def _skip(self, model: nn.Module, norm: Any) -> None:
        self.num_skipped_in_a_row += 1
        rows = blamed_rows(self, model, self._batch)
        self._restore_before_step()
        for parameter in model.parameters():
            parameter.grad = None
        # accelerate's optimizer does nothing between synchronisations, and a skipped step leaves the schedule alone.
        self.accelerator.gradient_state._set_sync_gradients(False)
        for optimizer in self.accelerator._optimizers:
            optimizer._is_overflow = True
        finite_loss = self._step_loss is None or bool(torch.isfinite(self._step_loss))
        what = f"step {self.state.global_step + 1}: the {'gradient' if finite_loss else 'loss'} is not finite"
        if self.num_skipped_in_a_row > self.args.max_skipped_steps:
            raise TrainingError(
                f"{what}, in {self.num_skipped_in_a_row} steps in a row; {rows}",
                remedy="look at these rows; lower learning_rate, set max_grad_norm, or train in bf16 or fp32",
            )
        warnings.warn(
            f"{what}; the step is skipped, weights and optimizer stay as they were; {rows}", UserWarning, stacklevel=2
        )

    def _forgive(self) -> None:
        for optimizer in self.accelerator._optimizers:
            if getattr(self.accelerator, "scaler", None) is None:
                optimizer._is_overflow = False


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whatever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, Exception) and bool(should_reduce_batch_size(error))


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
