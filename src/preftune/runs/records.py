"""What a finished run leaves beside its weights: provenance and model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preftune.config import Origin, Resolved, redact
from preftune.config.secrets import is_secret
from preftune.models.locating import holds_adapter
from preftune.runs.data import dataset_names
from preftune.training import card, provenance
from preftune.version import __version__

# Decisive even where nobody touched them.
_ALWAYS = ("beta", "learning_rate", "num_train_epochs", "max_length", "seed")
# Said elsewhere in the card, or of no interest to its readers.
_NEVER = frozenset(
    {"output_dir", "model_name_or_path", "dataset_name", "dataset_mixture", "dataset_mixer", "loss_type"}
)


def leave_records(
    verb: str,
    argv: Sequence[str],
    settings: Resolved[Any],
    snapshot: Mapping[str, Mapping[str, Any]],
    plan: Any,
    splits: Mapping[str, Any],
    results: Mapping[str, Any],
) -> None:
    """Write provenance and model card into the output folder.

    Args:
        verb: The training verb.
        argv: Arguments after it.
        settings: The settings, as they are now.
        snapshot: Values by role and name, as they were resolved.
        plan: The training plan.
        splits: The rows by split.
        results: Final metrics.
    """
    names, folder = dataset_names(settings.script), settings.trainer.output_dir
    document = provenance.collect(
        argv=[verb, *argv],
        settings=snapshot,
        origins=settings.origins,
        plan=plan,
        data={split: {"names": names, **provenance.describe_dataset(rows)} for split, rows in splits.items()},
        results=results,
        notes=settings.notes,
        num_processes=settings.trainer.world_size,
    )
    # The record comes last: where it is, everything is.
    card.write(folder, make_card(verb, snapshot, settings.origins, plan, names, results))
    provenance.write(folder, document)


def make_card(
    verb: str,
    snapshot: Mapping[str, Mapping[str, Any]],
    origins: Mapping[str, Origin],
    plan: Any,
    datasets: Sequence[str],
    results: Mapping[str, Any],
) -> card.Card:
    """Gather what the model card says.

    Args:
        verb: The training verb.
        snapshot: Values by role and name.
        origins: Origin of each value.
        plan: The training plan.
        datasets: Names of the datasets.
        results: Final metrics.

    Returns:
        The card.
    """
    values = {name: value for role in snapshot.values() for name, value in role.items()}
    methods = str(plan.method).split(" + ") if verb != "sft" else []
    chosen = [name for name in values if name in _ALWAYS or origins[name].kind != "default"]
    settings = {
        name: redact(provenance.plain(values[name]), name)
        for name in chosen
        if name not in _NEVER and not is_secret(name)
    }
    versions = provenance.versions()
    return card.Card(
        title=Path(str(values.get("output_dir") or "model")).name,
        verb=verb,
        base_model=str(redact(str(values.get("model_name_or_path")))),
        datasets=[str(redact(name)) for name in datasets],
        methods=methods,
        papers=_papers(methods),
        settings=settings,
        metrics={name: value for name, value in results.items() if _is_figure(name)},
        data_lines=data_lines(plan.data),
        versions={"preftune": __version__, **versions},
        is_adapter=bool(values.get("use_peft")) or holds_adapter(str(values.get("model_name_or_path"))),
    )


def _papers(methods: Sequence[str]) -> list[tuple[str, str]]:
    from preftune.objectives import METHODS

    papers = [METHODS[name].paper for name in methods if name in METHODS]
    return list(dict.fromkeys((paper.title, paper.link) for paper in papers))


def _is_figure(name: str) -> bool:
    """Leave the speed of the machine out of the card; it is in the provenance file."""
    return not name.endswith(("_runtime", "_per_second", "total_flos"))


def data_lines(reports: Mapping[str, Any]) -> list[str]:
    """Rows kept and lost, one line per split.

    Args:
        reports: :class:`~preftune.data.PrepareReport` by split, or what its ``to_json`` gives.

    Returns:
        For example ``train: 1,699 of 1,700 rows (hh); dropped: prompt_too_long 1``.
    """
    lines = []
    for split, report in reports.items():
        facts = facts_of(report)
        line = f"{split}: {facts.get('rows_kept', 0):,} of {facts.get('rows_read', 0):,} rows"
        line += f" ({facts['format']})" if facts.get("format") else ""
        for key, words in (("dropped", "dropped"), ("bad_rows", "bad")):
            counts = facts.get(key) or {}
            if counts:
                line += f"; {words}: " + ", ".join(f"{reason.replace('_', ' ')} {n:,}" for reason, n in counts.items())
        if facts.get("num_truncated"):
            line += f"; {facts['num_truncated']:,} truncated"
        lines.append(line)
    return lines


def facts_of(report: Any) -> Mapping[str, Any]:
    """A report on prepared data as a mapping."""
    if isinstance(report, Mapping):
        return report
    facts: Mapping[str, Any] = report.to_json() if hasattr(report, "to_json") else {}
    return facts
