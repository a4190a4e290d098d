"""What tasks that learn from preferences have in common: an objective of the table, and perhaps a reference."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from preftune.objectives import Objective
from preftune.packing import PackedRow
from preftune.training.batch import Batch, Examples
from preftune.training.given_references import choose_adapters
from preftune.training.guards.settings import GUARD_NAMES
from preftune.training.preference_config import PreferenceConfig, ReferenceConfig
from preftune.training.setup import data_options
from preftune.training.task import Scoring, Task

#: Nats per token from which a difference of policy and reference can be seen in what is logged.
_VISIBLE = 1e-4


class PreferenceTask(Task):
    """Base of the tasks with an objective.

    Args:
        args: Settings.
    """

    guards = GUARD_NAMES
    objective: Objective

    def __init__(self, args: PreferenceConfig) -> None:
        self.objective = args.build_objective()
        self.options = data_options(
            args, max_prompt_length=args.max_prompt_length, implicit_prompt=args.implicit_prompt
        )
        self.needs_reference = self.objective.takes_reference
        self.disables_dropout = args.disable_dropout
        #: Adapters that are trained and compared with.
        self._adapters = (args.model_adapter_name, args.ref_adapter_name) if isinstance(args, ReferenceConfig) else ()

    def prepare_model(self, model: Any, tokenizer: Any) -> None:
        """Choose among the model's adapters."""
        choose_adapters(model, *self._adapters)

    def before_rows(self, rows: Sequence[PackedRow], batch: Batch, scoring: Scoring, *, training: bool) -> None:
        """Run the reference along where its values are not in the data."""
        if self.reference is not None:
            self.reference.run_along(rows, batch.examples)

    def reference_sums(self, row: PackedRow, examples: Examples, like: Tensor) -> tuple[Any, Any]:
        """The reference's log-probs of the chosen and the rejected completions, or ``None`` twice without one."""
        return (None, None) if self.reference is None else self.reference.row_sums(row, examples, like)

    def check_agreement(self, ratios: Tensor, tokens: Tensor) -> None:
        """Before the first update the policy is the reference: every log-ratio is zero and a logistic loss is ln 2.

        Args:
            ratios: Log-ratios of policy and reference, ``(n,)``.
            tokens: Tokens that each is summed over, ``(n,)``.
        """
        tolerance, self.tolerance = self.tolerance, None
        if tolerance is None:
            return
        with torch.no_grad():
            worst = float((ratios.abs() / tokens.to(ratios.dtype)).max())
        if not worst <= tolerance:
            warnings.warn(
                f"policy and reference differ by {worst:.2g} nats per token before the first update, so that the loss "
                "does not start where it should; likely causes: dropout is on (disable_dropout: true), the reference "
                "is not the model that training starts from, or an adapter was merged or switched in between",
                UserWarning,
                stacklevel=2,
            )
        elif worst > _VISIBLE:
            warnings.warn(
                f"policy and reference differ by {worst:.1g} nats per token before the first update, which is "
                "rounding: in half precision a sequence is computed otherwise beside others, so that margins start "
                "near 0, not at it; with reference_store: false or in fp32 they start at 0",
                UserWarning,
                stacklevel=2,
            )

    def judged(self, predictions: Any) -> tuple[Any, Any]:
        """Rewards of the chosen and the rejected completion, and the chosen column as label."""
        return predictions, np.zeros(len(predictions), dtype=np.int64)
