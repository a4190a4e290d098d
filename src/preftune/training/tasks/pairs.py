"""DPO and its family: pairs, compared with a reference where the method has one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from preftune.data import PrepareReport, prepare
from preftune.errors import DataError
from preftune.kernels.device import put
from preftune.kernels.head import TokenScores
from preftune.objectives import ObjectiveResult, PairLogps
from preftune.packing import PackedRow, Tree, pair_trees
from preftune.training.batch import Batch, Example, Examples, Totals
from preftune.training.extra_state import RunningDelta
from preftune.training.guards.evidence import of_pairs
from preftune.training.lengths import ExampleLengths, pair_lengths
from preftune.training.preference_config import DPOConfig
from preftune.training.reference import COLUMNS
from preftune.training.sequences import num_scored, pair_metrics, sequence_sums, wpo_weights
from preftune.training.task import RowTerms, Scoring, weights_of
from preftune.training.tasks.preference import PreferenceTask


class Pairs(PreferenceTask):
    """Base of the tasks whose example is a chosen and a rejected completion."""

    columns = (
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
        "rejected_prompt_ids",
        "chosen_mask",
        "rejected_mask",
        "margin",
        "weight",
        *COLUMNS,
    )

    def prepare(self, dataset: Any, tokenizer: Any, name: str) -> tuple[Any, PrepareReport]:
        """Tokenised pairs."""
        stale = [column for column in COLUMNS if column in (getattr(dataset, "column_names", None) or ())]
        if stale:
            # Whose log-probs they are cannot be known; the store finds what is still valid by its content.
            warnings.warn(f"columns {stale} of the data are not used", UserWarning, stacklevel=4)
            dataset = dataset.remove_columns(stale)
        return prepare(dataset, tokenizer, self.options, name)

    def lengths(self, dataset: Any) -> ExampleLengths | None:
        """Token counts of tokenised pairs."""
        return pair_lengths(dataset)

    def num_tokens(self, examples: Examples) -> int:
        """Tokens of both sequences of every pair."""
        total = 0
        for e in examples:
            other = e.get("rejected_prompt_ids")
            total += len(e["prompt_ids"]) + len(e["prompt_ids"] if other is None else other)
            total += len(e["chosen_ids"]) + len(e["rejected_ids"])
        return total

    def begin_evaluation(self, batches: Iterable[Batch], scoring: Scoring) -> list[float] | None:
        """Numbers of pairs and scored tokens: a mean over tokens must not depend on the batches it is taken in."""
        if not self.objective.averages_tokens:
            return None
        mine = [self.totals(batch.examples) for batch in batches]
        return scoring.sum_over_processes([sum(each) for each in zip([0.0, 0.0], *mine, strict=True)])


class PairTask(Pairs):
    """Pairs of a chosen and a rejected completion.

    Args:
        args: Settings.
    """

    name = "dpo"
    config_class = DPOConfig
    balances_experts = True

    def __init__(self, args: DPOConfig) -> None:
        super().__init__(args)
        self.ld_alpha = args.ld_alpha
        self.use_weighting = self.needs_log_sum_sq = args.use_weighting
        self.joint = not self.objective.separable
        self.running_delta = RunningDelta() if self.objective.uses_running_delta else None

    # ---- data -----------------------------------------------------------------------------------------------------

    def prepare(self, dataset: Any, tokenizer: Any, name: str) -> tuple[Any, PrepareReport]:
        """Tokenised pairs, with the score gaps that the method needs."""
        prepared, report = super().prepare(dataset, tokenizer, name)
        if "margins" in self.objective.requires:
            if "margin" not in prepared.column_names:
                raise DataError(
                    f"{', '.join(self.objective.names)} needs a score gap for every pair",
                    where=f"{name} data set",
                    value=prepared.column_names,
                    remedy="give the data a `margin` column, or scores for both completions",
                )
            # A row without a gap becomes NaN, which the check names.
            self.objective.check_margins(torch.tensor(prepared.data.table["margin"].to_numpy()))
        return prepared, report

    # ---- rows -----------------------------------------------------------------------------------------------------

    def trees(self, example: Example, number: int) -> tuple[Tree, ...]:
        """A pair's trees."""
        return pair_trees(
            example["prompt_ids"],
            example["chosen_ids"],
            example["rejected_ids"],
            example.get("rejected_prompt_ids"),
            (2 * number, 2 * number + 1),
            scored=(example.get("chosen_mask"), example.get("rejected_mask")),
        )

    def totals(self, examples: Examples) -> list[float]:
        """Number of pairs, and of scored chosen tokens."""
        return [float(len(examples)), float(sum(num_scored(e, "chosen")[1] for e in examples))]

    def before_rows(self, rows: Sequence[PackedRow], batch: Batch, scoring: Scoring, *, training: bool) -> None:
        """Run the reference along where its values are not in the data."""
        if self.running_delta is not None:
            self.running_delta.begin()
        super().before_rows(rows, batch, scoring, training=training)

    def pair_logps(self, row: PackedRow, scores: TokenScores, examples: Examples, totals: Totals) -> PairLogps:
        """Everything the objective may ask for about a row's pairs."""
        device = scores.logps.device
        chosen, rejected = sequence_sums(row, scores.logps, self.ld_alpha)
        plain = chosen if self.ld_alpha is None else sequence_sums(row, scores.logps)[0]
        ref_chosen, ref_rejected = self.reference_sums(row, examples, chosen)

        def column(values: list[float]) -> Tensor:
            return put(values, device, chosen.dtype)

        weights = weights_of(examples)
        margins = [e["margin"] for e in examples] if "margins" in self.objective.requires else []
        return PairLogps(
            chosen_logps=chosen,
            rejected_logps=rejected,
            ref_chosen_logps=ref_chosen,
            ref_rejected_logps=ref_rejected,
            chosen_lengths=column([num_scored(e, "chosen")[0] for e in examples]),
            rejected_lengths=column([num_scored(e, "rejected")[0] for e in examples]),
            chosen_sum_logps=plain,
            chosen_scored=column([num_scored(e, "chosen")[1] for e in examples]),
            margins=column(margins) if margins else None,
            weights=column(weights) if weights else None,
            wpo_weights=wpo_weights(row, scores) if self.use_weighting else None,
            mean_chosen_scored=totals[1] / totals[0],
        )

    def losses(self, logps: PairLogps) -> ObjectiveResult:
        """The objective of some pairs, with the numbers that belong to the whole step."""
        return self.objective(logps, bco_delta=None if self.running_delta is None else self.running_delta.state.delta)

    def row_terms(self, row: PackedRow, scores: TokenScores, examples: Examples, totals: Totals) -> RowTerms:
        """Objective and TRL's metrics of one row."""
        logps = self.pair_logps(row, scores, examples, totals)
        result = self.losses(logps)
        terms = self.terms(row, scores, logps, result.parts)
        terms.total = result.loss.sum()
        return terms

    def terms(
        self, row: PackedRow, scores: TokenScores, logps: PairLogps, parts: Mapping[str, Tensor] | None
    ) -> RowTerms:
        """All of a row's terms but the loss."""
        self.check_pairs(logps)
        rewards = torch.stack(self.objective.rewards(logps), 1).detach()
        metrics = pair_metrics(row, scores, logps, rewards)
        if self.running_delta is not None:
            metrics["bco_delta"] = (self.running_delta.state.delta, 1.0)
            self.running_delta.note(row, rewards)
        if parts and len(self.objective.names) > 1:
            metrics |= {f"loss/{name}": (part.detach().sum(), float(logps.num_pairs)) for name, part in parts.items()}
        return RowTerms(rewards.new_zeros(()), float(logps.num_pairs), metrics, rewards, of_pairs(logps, rewards))

    def check_pairs(self, logps: PairLogps) -> None:
        """Look whether policy and reference agree on some pairs, in the first row of a run."""
        if self.tolerance is not None:
            self.check_agreement(
                torch.cat([logps.chosen_logratios, logps.rejected_logratios]),
                torch.cat([logps.chosen_lengths, logps.rejected_lengths]),
            )

    # ---- what follows ---------------------------------------------------------------------------------------------

    def finish_step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Move the running reward shift on."""
        if self.running_delta is not None:
            self.running_delta.finish(reduce)

    def kept(self) -> Any:
        """The running reward shift before a step."""
        return None if self.running_delta is None else self.running_delta.state

    def undo(self, kept: Any) -> None:
        """Put the running reward shift back."""
        if self.running_delta is not None:
            self.running_delta.state = kept
