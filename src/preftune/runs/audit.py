"""Audit the data that settings name, as the planned training would read them."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from preftune.config import Resolved
from preftune.data.audit import audit
from preftune.data.audit.rows import read_rows
from preftune.data.audit.tokens import tokenise
from preftune.data.truncation import truncate
from preftune.errors import ConfigError
from preftune.evaluation.scoring import Scorer
from preftune.models.loading import load_model_and_tokenizer, load_tokenizer
from preftune.ownership import check_places
from preftune.references.store import ReferenceStore
from preftune.runs.data import dataset_names, load_splits
from preftune.runs.network import go_offline_if_unreachable
from preftune.training.setup import data_options

if TYPE_CHECKING:
    from rich.console import Console

    from preftune.data.audit import AuditReport
    from preftune.data.audit.rows import Rows


def audit_data(
    settings: Resolved[Any], console: Console, *, ref_model: str | None = None, show_progress: bool = True
) -> AuditReport:
    """Look the data over.

    Args:
        settings: Settings of the planned training.
        console: Where notes are printed.
        ref_model: Model that judges the pairs besides, by default the reference of the settings.
        show_progress: Draw progress bars where there is a terminal.

    Returns:
        What was found.

    Raises:
        PreftuneError: Data or models cannot be used.
    """
    script, model, args = settings.script, settings.model, settings.trainer
    script.require_dataset()
    names = dataset_names(script)
    check_places({"quarantine_path": args.quarantine_path}, {f"dataset {name}": name for name in names})
    reference = ref_model or model.ref_model_name_or_path
    tokenised_by = model.tokenizer_name_or_path or model.model_name_or_path or reference
    offline = go_offline_if_unreachable([*names, tokenised_by, reference])
    if offline:
        console.print(offline, style="yellow", highlight=False)
    if args.dataset_num_proc is not None:
        text = f"dataset_num_proc: {args.dataset_num_proc} has no effect here; an audit runs in one process"
        console.print(text, style="yellow", highlight=False)
    with console.status("loading data"):
        splits, bad = _load(settings)
        tokenizer = load_tokenizer(replace(model, tokenizer_name_or_path=tokenised_by)) if tokenised_by else None
    options = data_options_of(settings)
    margins = None
    if reference:
        margins = reference_margins(splits["train"], reference, tokenizer, options, settings, quiet=console.quiet)
    with console.status("looking"):
        return audit(
            splits["train"],
            tokenizer,
            options=options,
            test=splits.get("test"),
            ref_margins=margins,
            name=", ".join(Path(name).name if os.path.exists(name) else name for name in names),
            bad_rows=bad,
            seed=args.seed,
            show_progress=show_progress,
        )


def data_options_of(settings: Resolved[Any]) -> Any:
    """The data options of the planned training."""
    args = settings.trainer
    extra = {key: getattr(args, key) for key in ("max_prompt_length", "implicit_prompt") if hasattr(args, key)}
    # Loading has left the bad rows out, written them to the quarantine file, and divided transcripts.
    options = replace(data_options(args, **extra), on_bad_rows="skip", quarantine_path=None)
    return replace(options, max_dropped_share=None) if settings.script.allow_drops else options


def _load(settings: Resolved[Any]) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Training data, the test split if there is one, and where the bad rows were."""
    path, args = settings.trainer.quarantine_path, settings.trainer
    with tempfile.TemporaryDirectory() as folder:
        if path is None and args.on_bad_rows == "skip":
            path = os.path.join(folder, "quarantine.jsonl")
        return load_splits(settings, with_test=None, quarantine_path=path), _places(path)


def _places(path: str | None) -> list[dict[str, str]]:
    if path is None or not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    return [{"place": str(one["place"]), "reason": str(one["reason"])} for one in entries]


def reference_margins(
    dataset: Any, reference: str, tokenizer: Any, options: Any, settings: Resolved[Any], *, quiet: bool
) -> Any:
    """Log-probs of chosen less rejected under the reference: sums, and means per token; NaN where nothing is left."""
    rows = read_rows(dataset, options, tokenizer=tokenizer)
    if not rows.paired:
        raise ConfigError(
            "a reference model judges pairs, and the rows are single answers",
            where="--ref_model",
            value=reference,
            remedy="leave it out",
        )
    config = replace(settings.model, model_name_or_path=reference, ref_model_name_or_path=None)
    kwargs = getattr(settings.trainer, "model_init_kwargs", None)
    model = load_model_and_tokenizer(
        replace(
            config, tokenizer_name_or_path=settings.model.tokenizer_name_or_path or settings.model.model_name_or_path
        ),
        model_init_kwargs=kwargs,
        with_reference=False,
    ).model
    store = ReferenceStore() if getattr(settings.trainer, "reference_store", False) else None
    return pair_margins(model, rows, tokenizer, options, store=store, quiet=quiet)


def pair_margins(
    model: Any, rows: Rows, tokenizer: Any, options: Any, *, store: Any = None, bf16: bool = False, quiet: bool = False
) -> Any:
    """How much likelier a model finds the chosen answer than the rejected one.

    Args:
        model: Any causal model.
        rows: Pairs.
        tokenizer: The model's.
        options: Data options; answers are truncated as training would.
        store: Where log-probs are looked up and kept.
        bf16: Compute in bfloat16 by autocast.
        quiet: Draw no bar.

    Returns:
        ``(rows, 2)``: difference of the sums of log-probs, in nats, and of their means per token; NaN where truncation
        leaves nothing to compare.
    """
    found = tokenise(rows, tokenizer, options, lambda items, title: items)
    items, numbers, lengths = [], [], []
    for pair, i in zip(found.pairs, found.numbers, strict=True):
        kept, _ = truncate(pair, options.max_length, options.max_prompt_length, options.truncation_mode)
        if kept is None:
            continue
        other = kept.prompt if kept.rejected_prompt is None else kept.rejected_prompt
        parts = ((kept.prompt, kept.chosen), (other, kept.rejected))
        items.append([(np.asarray(prompt, dtype=np.int64), np.asarray(ids, dtype=np.int64)) for prompt, ids in parts])
        numbers.append(i)
        lengths.append((len(kept.chosen), len(kept.rejected)))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    scorer = Scorer(model, store=store, bf16=bf16, pad_token_id=pad, show_progress=not quiet)
    sums = scorer.sums(items, "Scoring")
    out = np.full((len(rows), 2), np.nan)
    if items:
        out[numbers, 0] = sums[:, 0] - sums[:, 1]
        means = sums / np.maximum(1, np.array(lengths))
        out[numbers, 1] = means[:, 0] - means[:, 1]
    return out
