"""``preftune data audit``: what is wrong with a data set, before anything is trained on it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.config import CommandLine, Resolved, resolve, split_command_line
from preftune.config.coerce import Mismatch, coerce
from preftune.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from preftune.data.audit import AuditReport, Finding

VERBS = ("dpo", "orpo", "cpo", "kto", "sft")
_STYLES = {"ok": "green", "note": "cyan", "warn": "yellow", "problem": "bold red"}

_HELP = """usage: preftune data audit --dataset_name D [--out DIR] [--config FILE.yaml] [--name value ...]

Look a data set over: duplicates, contradictions, leakage, length bias, truncation, template and special tokens,
refusals, languages, trivial answers, and an estimate of how many labels are wrong.

  --out        a folder
      Write audit.json there; a report of the same folder shows it.
  --json       a switch
      Print JSON instead of the table.
  --ref_model  a model
      Score the pairs with this model too; it is a second judge of the labels.
  --verb       dpo, orpo, cpo, kto, sft  [dpo]
      Read the settings as this verb would.

Settings that concern data, tokenizer, truncation and seed count as they do in training. Without --model_name_or_path
lengths are counted in words, and truncation and template go unchecked. Bad rows are counted and left out
(on_bad_rows: skip) unless on_bad_rows says otherwise. Rows are numbered from 0 as they are loaded: `preftune data show
--on_bad_rows skip --first_row N` prints one."""


@dataclass
class _Own:
    """Flags of this verb alone."""

    out: str | None = None
    json: bool = False
    ref_model: str | None = None
    verb: str = "dpo"


def main(argv: Sequence[str]) -> int:
    """Run the verb.

    Args:
        argv: Arguments after ``preftune data audit``.

    Returns:
        0, whatever was found.

    Raises:
        PreftuneError: Wrong settings, or data that cannot be read.
    """
    line = split_command_line(argv)
    if line.help:
        print(_HELP)
        return 0
    from rich.console import Console

    from preftune.cli.failures import plain_warnings
    from preftune.cli.training import cli_defaults, settings_classes
    from preftune.ownership import claim_files

    own, rest = _own_settings(line)
    # What is printed beside JSON must not end up in it.
    console = Console(stderr=own.json)
    with plain_warnings(console):
        defaults = cli_defaults() | {"on_bad_rows": "skip"}
        settings = resolve(rest, settings_classes(own.verb)[0], defaults=defaults)
        if own.out is not None:
            claim_files(own.out, "audit", ["audit.json"], "--out")
        _check_quarantine(settings)
        report = _audit(console, settings, own)
    if own.json:
        print(json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        console.print(table(report))
    if own.out is not None:
        console.print(f"wrote {report.write(own.out)}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _check_quarantine(settings: Resolved[Any]) -> None:
    from preftune.cli.training import dataset_names
    from preftune.ownership import check_places

    names = dataset_names(settings.script)
    check_places({"quarantine_path": settings.trainer.quarantine_path}, {f"dataset {name}": name for name in names})


def _own_settings(line: CommandLine) -> tuple[_Own, CommandLine]:
    """Take out the flags that only this verb has."""
    own, kept = _Own(), []
    for name, values, shown in line.flags:
        if name not in ("out", "json", "ref_model", "verb"):
            kept.append((name, values, shown))
            continue
        kind = bool if name == "json" else str
        if not values and kind is str:
            raise ConfigError("needs a value", where=shown)
        try:
            setattr(own, name, coerce(values[0] if len(values) == 1 else (list(values) or True), kind, text=True))
        except Mismatch as reason:
            raise ConfigError(reason.why, where=shown, value=" ".join(values)) from reason
    if own.verb not in VERBS:
        raise ConfigError("not an allowed value", where="--verb", value=own.verb, allowed=", ".join(VERBS))
    if own.out is not None and os.path.exists(own.out) and not os.path.isdir(own.out):
        raise ConfigError("not a folder", where="--out", value=own.out, remedy="name a folder")
    return own, replace(line, flags=tuple(kept))


def _audit(console: Console, settings: Resolved[Any], own: _Own) -> AuditReport:
    from preftune.cli.network import go_offline_if_unreachable
    from preftune.cli.training import dataset_names
    from preftune.data.audit import audit
    from preftune.models.loading import load_tokenizer

    script, model, args = settings.script, settings.model, settings.trainer
    script.require_dataset()
    names = dataset_names(script)
    reference = own.ref_model or model.ref_model_name_or_path
    tokenised_by = model.tokenizer_name_or_path or model.model_name_or_path or reference
    offline = go_offline_if_unreachable([*names, tokenised_by, reference])
    if offline:
        console.print(offline, style="yellow", highlight=False)
    if args.dataset_num_proc is not None:
        text = f"dataset_num_proc: {args.dataset_num_proc} has no effect here; an audit runs in one process"
        console.print(text, style="yellow", highlight=False)
    if own.verb == "kto" and settings.origins["pairing"].kind == "default":
        script.pairing = "none"
    with console.status("loading data"):
        splits, bad = _load(settings)
        tokenizer = load_tokenizer(replace(model, tokenizer_name_or_path=tokenised_by)) if tokenised_by else None
    options = _options(settings)
    margins = None
    if reference:
        margins = _margins(splits["train"], reference, tokenizer, options, settings, quiet=console.quiet)
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
            show_progress=not own.json,
        )


def _options(settings: Resolved[Any]) -> Any:
    """The data options of the planned training."""
    from preftune.training.setup import data_options

    args = settings.trainer
    extra = {key: getattr(args, key) for key in ("max_prompt_length", "implicit_prompt") if hasattr(args, key)}
    # Loading has left the bad rows out, written them to the quarantine file, and divided transcripts.
    options = replace(data_options(args, **extra), on_bad_rows="skip", quarantine_path=None)
    return replace(options, max_dropped_share=None) if settings.script.allow_drops else options


def _load(settings: Resolved[Any]) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Training data, the test split if there is one, and where the bad rows were."""
    from preftune.cli.training import reading_of
    from preftune.data import load

    script, args = settings.script, settings.trainer
    common: dict[str, Any] = {
        "dataset_config": script.dataset_config,
        "columns": script.dataset_columns,
        "dataset_format": args.dataset_format,
        "pairing": script.pairing,
        "on_bad_rows": args.on_bad_rows,
        "seed": args.seed,
        **reading_of(args),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = args.quarantine_path
        if path is None and args.on_bad_rows == "skip":
            path = os.path.join(folder, "quarantine.jsonl")
        if script.dataset_name is None:
            several = {key: getattr(script, key) for key in ("dataset_mixture", "dataset_mixer", "dataset_splits")}
            splits = load(**several, quarantine_path=path, **common)
        else:
            splits = load(script.dataset_name, split=script.dataset_train_split, quarantine_path=path, **common)
            # A split that is asked for by name has to be there; otherwise it is taken where it is found.
            if "test" not in splits and settings.origins["dataset_test_split"].kind != "default":
                splits["test"] = load(script.dataset_name, split=script.dataset_test_split, **common)["train"]
        return splits, _places(path)


def _places(path: str | None) -> list[dict[str, str]]:
    if path is None or not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    return [{"place": str(one["place"]), "reason": str(one["reason"])} for one in entries]


def _margins(
    dataset: Any, reference: str, tokenizer: Any, options: Any, settings: Resolved[Any], *, quiet: bool
) -> Any:
    """Log-probs of chosen less rejected under the reference: sums, and means per token; NaN where nothing is left."""
    import numpy as np

    from preftune.data.audit.rows import read_rows
    from preftune.data.audit.tokens import tokenise
    from preftune.data.truncate import truncate
    from preftune.evaluation.scoring import Scorer
    from preftune.models.loading import load_model_and_tokenizer
    from preftune.references.store import ReferenceStore

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
    store = ReferenceStore() if getattr(settings.trainer, "reference_store", False) else None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    sums = Scorer(model, store=store, pad_token_id=pad, show_progress=not quiet).sums(items, "Reference")
    out = np.full((len(rows), 2), np.nan)
    if items:
        out[numbers, 0] = sums[:, 0] - sums[:, 1]
        means = sums / np.maximum(1, np.array(lengths))
        out[numbers, 1] = means[:, 0] - means[:, 1]
    return out


# ---- the table ------------------------------------------------------------------------------------------------------


def table(report: AuditReport) -> RenderableType:
    """The report for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    form = ", ".join(dict.fromkeys((report.format, report.kind)))
    head = f"{report.dataset}: {report.num_rows:,} of {report.num_read:,} rows ({form})"
    grid = Table(show_header=True, header_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    grid.add_column("", no_wrap=True)
    grid.add_column("check", no_wrap=True)
    grid.add_column("finding", overflow="fold")
    for finding in report.findings:
        # Text, not markup: data may hold square brackets.
        grid.add_row(Text(finding.severity, style=_STYLES[finding.severity]), finding.check, _told(finding))
    parts: list[RenderableType] = [Text(head, style="bold"), grid]
    if report.not_applicable:
        reasons: dict[str, list[str]] = {}
        for check, why in report.not_applicable.items():
            reasons.setdefault(why, []).append(check)
        parts += [Text(f"not checked: {', '.join(names)} ({why})", style="dim") for why, names in reasons.items()]
    parts.append(Text(f"{report.seconds:.1f} s; sources of all thresholds are in audit.json (--out)", style="dim"))
    return Group(*parts)


def _told(finding: Finding) -> Any:
    from rich.text import Text

    text = Text(finding.title)
    if finding.severity != "ok":
        text.append(f"\n{finding.detail}", style="dim")
        rows = [str(one["row"]) for one in finding.examples if "row" in one]
        places = [str(one["place"]) for one in finding.examples if one.get("place")]
        if rows:
            text.append(f"\nrows {', '.join(rows)}", style="dim")
        elif places:
            text.append(f"\n{'; '.join(places)}", style="dim")
        if finding.threshold_kind != "none":
            text.append(f"\n{finding.threshold_kind}", style="dim italic")
    return text
