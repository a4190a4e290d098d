"""From a finished run to its model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import preftune
from preftune.cli.panel import data_lines
from preftune.config import Origin, redact
from preftune.config.secrets import is_secret
from preftune.training import card, provenance

# Decisive even where nobody touched them.
_ALWAYS = ("beta", "learning_rate", "num_train_epochs", "max_length", "seed")
# Said elsewhere in the card, or of no interest to its readers.
_NEVER = frozenset(
    {"output_dir", "model_name_or_path", "dataset_name", "dataset_mixture", "dataset_mixer", "loss_type"}
)


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
        versions={"preftune": preftune.__version__, **versions},
        is_adapter=bool(values.get("use_peft")),
    )


def _papers(methods: Sequence[str]) -> list[tuple[str, str]]:
    from preftune.objectives import METHODS

    papers = [METHODS[name].paper for name in methods if name in METHODS]
    return list(dict.fromkeys((paper.title, paper.link) for paper in papers))


def _is_figure(name: str) -> bool:
    """Leave the speed of the machine out of the card; it is in the provenance file."""
    return not name.endswith(("_runtime", "_per_second", "total_flos"))
