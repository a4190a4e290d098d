"""Which pairs a model can learn: each is judged by a model that was trained on the other half of them.

Pairs that stay wrong for a model trained on others are too hard for it, or mislabelled: training without the hardest
ones can be better than with all (Gao et al. 2025, arXiv 2502.09650). The paper ranks pairs by the loss under models
that were trained on the other half, and keeps the easier half. The loss of DPO falls with the margin, so that the order
by held-out margin is the paper's order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from preftune.config import CommandLine, Resolved
from preftune.data.audit.rows import read_rows
from preftune.errors import ConfigError, DataError
from preftune.ownership import check_places
from preftune.runs.audit import data_options_of, pair_margins
from preftune.runs.data import load_splits
from preftune.runs.failures import foreseen, trainer_errors
from preftune.runs.folder import places_read
from preftune.runs.holdout import chosen_prompts, prompt_key
from preftune.runs.run import Run, Sources, build_trainer, end_trainer
from preftune.runs.settings import read_settings, settings_classes
from preftune.stats.intervals import Interval, proportion_interval
from preftune.training.notices import Telling

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import Console

#: Settings that have no place in trainings of halves that leave nothing behind.
REFUSED = ("resume_from_checkpoint", "push_to_hub", "test_split_size", "generation_steps", "dry_run", "do_eval")
#: What these trainings do without, whatever a file of settings says.
WITHOUT = {
    **{"eval_strategy": "no", "eval_on_start": "false", "load_best_model_at_end": "false", "save_strategy": "no"},
    **{"report_to": "none", "advice": "false", "guards": "off"},
}
#: Pairs of each half below which a training tells nothing; heuristic.
LEAST_PAIRS = 8


@dataclass(frozen=True)
class Selection:
    """Pairs, each with its margin under a model that has not seen it.

    Attributes:
        rows: All pairs.
        margins: ``(pairs,)``, by how many nats more than before training the model prefers the chosen answer; NaN where
            truncation leaves nothing to compare.
        halves: ``(pairs,)``, 0 or 1.
        kept: ``(pairs,)``, whether the pair is among those to train on.
        accuracy: Share of pairs with a margin above 0, with its 95 % interval over prompts.
    """

    rows: Dataset
    margins: npt.NDArray[np.float64]
    halves: npt.NDArray[np.int64]
    kept: npt.NDArray[np.bool_]
    accuracy: Interval

    @property
    def tells(self) -> bool:
        """Whether the models have learned anything that holds for pairs they have not seen."""
        return self.accuracy.low > 0.5

    def part(self, *, kept: bool) -> Dataset:
        """The pairs to train on, or the others with the margin that decided."""
        part = self.rows.select(np.flatnonzero(self.kept == kept))
        if kept:
            return part
        values = self.margins[self.kept == kept]
        return part.add_column("held_out_margin", [None if np.isnan(value) else float(value) for value in values])

    def as_dict(self) -> dict[str, Any]:
        """For a file: what was found, and a margin for every row."""
        return {
            "num_pairs": len(self.kept),
            "num_kept": int(self.kept.sum()),
            "held_out_accuracy": {"mean": self.accuracy.mean, "low": self.accuracy.low, "high": self.accuracy.high},
            "tells": self.tells,
            "source": "arXiv 2502.09650",
            "margins": [None if np.isnan(value) else float(value) for value in self.margins],
            "halves": self.halves.tolist(),
            "kept": self.kept.tolist(),
        }


def halves_of(keys: Sequence[Hashable], seed: int) -> npt.NDArray[np.int64]:
    """Two halves of the prompts, drawn at random; all pairs of a prompt are in one of them.

    Args:
        keys: Prompt of each pair.
        seed: Of the draw.

    Raises:
        DataError: There are too few pairs in one of them.
    """
    found = np.array(chosen_prompts(keys, len(set(keys)) // 2, seed), dtype=np.int64)
    fewest = int(np.bincount(found, minlength=2).min()) if len(found) else 0
    if fewest < LEAST_PAIRS:
        raise DataError(
            "too few pairs of different prompts to judge them by one another",
            value=f"{fewest} in one half",
            allowed=f"{LEAST_PAIRS} or more in each",
        )
    return found


def easiest(margins: npt.NDArray[Any], halves: npt.NDArray[Any], keep: float) -> npt.NDArray[np.bool_]:
    """The share of the pairs with the largest margins, of each half by itself: their models may differ in strength.

    Args:
        margins: Per pair; NaN is never kept.
        halves: Per pair, which model judged it.
        keep: The share of the pairs that can be judged, above 0, at most 1.
    """
    kept = np.zeros(len(margins), dtype=bool)
    for half in np.unique(halves):
        own = np.flatnonzero((halves == half) & ~np.isnan(margins))
        order = own[np.argsort(-margins[own], kind="stable")]
        kept[order[: round(keep * len(own))]] = True
    return kept


class _Rows(Sources):
    """Rows that are loaded, and the model as always."""

    def __init__(self, rows: Dataset) -> None:
        self._rows = rows

    def splits(self, settings: Any, *, with_test: bool) -> dict[str, Any]:
        """The rows."""
        return {"train": self._rows}


def select_pairs(
    verb: str,
    line: CommandLine,
    console: Console,
    *,
    keep: float,
    quarantine_path: str | None = None,
    watch: Callable[[int, Any], Any] = lambda half, trainer: None,
) -> Selection:
    """Train on one half of the pairs and judge the other, both ways; no weights are kept.

    Args:
        verb: Method to train with.
        line: Settings of that verb.
        console: Where notes are printed.
        keep: Share of the pairs to keep, above 0, at most 1.
        quarantine_path: File for bad rows where the settings name none.
        watch: Called with the half and its trainer before each training.

    Returns:
        All pairs with their margins, and which are kept.

    Raises:
        PreftuneError: Settings, data or model cannot be used, or are this verb's own affair.
    """
    settings = read_settings(verb, line)
    _check(settings, console)
    settings.script.require_dataset()
    settings.model.require_model()
    check_places({"quarantine_path": settings.trainer.quarantine_path}, places_read(settings))
    bad_rows = settings.trainer.quarantine_path or quarantine_path
    with console.status("loading data"):
        rows = load_splits(settings, with_test=False, quarantine_path=bad_rows)["train"]
    if not {"chosen", "rejected"} <= set(rows.column_names):
        raise DataError(
            "single answers are no pairs", where=str(settings.script.dataset_name), remedy="set pairing: all"
        )
    keys = [prompt_key(row) for row in rows]
    halves = halves_of(keys, settings.trainer.seed)
    margins = np.full(len(rows), np.nan)
    with tempfile.TemporaryDirectory(prefix="preftune-select-") as folder:
        for half in (0, 1):
            others = np.flatnonzero(halves != half)
            this = _run(verb, line, console, Path(folder, str(half)), rows.select(np.flatnonzero(halves == half)))
            margins[others] = _judged(this, rows.select(others), partial(watch, half))
    known = ~np.isnan(margins)
    accuracy = proportion_interval(
        (margins[known] > 0).astype(float), groups=[key for key, is_known in zip(keys, known, strict=True) if is_known]
    )
    return Selection(rows, margins, halves, easiest(margins, halves, keep), accuracy)


def _check(settings: Resolved[Any], console: Console) -> None:
    """Refuse settings that have no place here; of those that a file shares with a training, say so."""
    typed = {name for name in ("output_dir", *WITHOUT) if settings.origins[name].kind == "flag"}
    for name in (*REFUSED, *sorted(typed)):
        if settings.origins[name].kind != "default":
            raise ConfigError(
                "has no place where pairs are selected: two trainings that leave nothing behind",
                where=str(settings.origins[name]),
                remedy=f"leave {name} out",
            )
    unused = [name for name in ("output_dir", *WITHOUT) if settings.origins[name].kind == "file"]
    if unused:
        text = f"without effect here: {', '.join(unused)}"
        console.print(text, style="yellow", highlight=False, soft_wrap=True)


def _run(verb: str, line: CommandLine, console: Console, folder: Path, rows: Dataset) -> Run:
    """The training of the verb on these rows."""
    without = {"output_dir": str(folder), **WITHOUT}
    flags = tuple((name, (value,), "preftune data select") for name, value in without.items())
    settings = read_settings(verb, replace(line, flags=(*line.flags, *flags)))
    return Run(verb, (), settings, console, sources=_Rows(rows))


def _judged(this: Run, others: Dataset, watch: Callable[[Any], Any]) -> npt.NDArray[np.float64]:
    """Margins of other rows after the training, less those from before it, in nats."""
    with foreseen(this.args):
        this.complete()
        trainer, _ = build_trainer(this, settings_classes(this.verb)[1])
        trainer.remove_callback(Telling)
        tokenizer, options = trainer.processing_class, data_options_of(this.settings)
        read = read_rows(others, options, tokenizer=tokenizer)

        def margins() -> Any:
            model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            training = model.training
            found = pair_margins(model, read, tokenizer, options, bf16=this.args.bf16, quiet=this.console.quiet)
            model.train(training)
            return found[:, 0]

        before = margins()
        watch(trainer)
        with trainer_errors():
            trainer.train()
        end_trainer(trainer)
        found = np.full(len(others), np.nan)
        found[read.numbers] = margins() - before
        return found
