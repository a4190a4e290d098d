"""What ``eval.json``, ``audit.json``, ``advice.json`` and ``provenance.json`` say, as lists of name and text."""

from __future__ import annotations

from typing import Any

from preftune.report.files import mapping, objects
from preftune.report.read import Run
from preftune.report.settings import text_of
from preftune.report.tables import Table, facts, figure, interval, is_interval, is_share, rows_of, size, title_of

#: Parts of ``eval.json`` that have a place of their own.
_EVAL_PLACED = (
    *("metrics", "samples", "calibration", "by_length", "by_source"),
    *("kl", "tail_share", "lengths", "compare", "judge"),
)
_AUDIT_PLACED = ("findings", "lengths", "noise")
_ADVICE_PLACED = ("settings", "flags", "memory", "time")


def eval_tables(evaluation: dict[str, Any]) -> list[tuple[str, Table]]:
    """The parts of ``eval.json`` that are lists, with their headings."""
    calibration = mapping(evaluation.get("calibration"))
    bins = next((value for value in calibration.values() if objects(value)), None)
    parts = (
        ("By length", evaluation.get("by_length")),
        ("By source", evaluation.get("by_source")),
        ("Calibration", bins),
    )
    filled = ((title, [entry for entry in objects(entries) if entry.get("n") != 0]) for title, entries in parts)
    return [(title, table) for title, entries in filled if (table := rows_of(entries)) is not None]


def eval_facts(evaluation: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The parts of ``eval.json`` that are single figures, with their headings."""
    metrics = mapping(evaluation.get("metrics"))
    shown = [(title_of(name), interval(value, as_share=is_share(name))) for name, value in metrics.items()]
    kl = evaluation.get("kl")
    parts = [
        ("Held-out pairs", shown),
        ("KL on the policy's own samples", _interval_facts(kl)),
        ("Its tokens from the reference's far tail", _interval_facts(evaluation.get("tail_share"), as_share=True)),
        ("Lengths of answers, in tokens", facts(evaluation.get("lengths"))),
        ("Calibration of the margins", facts(evaluation.get("calibration"))),
        ("Compared with the other model", facts(evaluation.get("compare"))),
        ("Judge", facts(evaluation.get("judge"))),
        ("About this evaluation", facts(evaluation, leave_out=_EVAL_PLACED)),
    ]
    return [(title, pairs) for title, pairs in parts if pairs]


def audit_facts(audit: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The parts of ``audit.json`` beside its findings."""
    noise = audit.get("noise")
    parts = [
        # Without an estimate a finding says why there is none.
        ("Estimated label noise", _interval_facts(noise, as_share=True) if is_interval(noise) else []),
        ("Lengths", facts(audit.get("lengths"), leave_out=("histogram", "max_length_to_keep"))),
        ("About this audit", facts(audit, leave_out=_AUDIT_PLACED)),
    ]
    return [(title, pairs) for title, pairs in parts if pairs]


def advice_facts(advice: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The parts of ``advice.json`` beside settings and flags."""
    parts = [
        ("Memory", _memory_facts(mapping(advice.get("memory")))),
        ("Time", facts(advice.get("time"))),
        ("About this advice", facts(advice, leave_out=_ADVICE_PLACED)),
    ]
    return [(title, pairs) for title, pairs in parts if pairs]


#: Entries of the memory estimate that are no bytes.
_NO_BYTES = ("row_tokens", "checkpointed", "machine", "assumed", "fits")


def _memory_facts(memory: dict[str, Any]) -> list[tuple[str, str]]:
    """Bytes by cause, those that take some, and what else is said of them."""
    sizes = [(name.replace("_", " "), size(value)) for name, value in memory.items() if name not in _NO_BYTES and value]
    return sizes + facts({name: memory[name] for name in _NO_BYTES if name in memory})


def provenance_facts(run: Run) -> list[tuple[str, str]]:
    """Where a run comes from: command, versions, machine and data."""
    source = run.provenance
    command = source.get("command")
    pairs: list[tuple[str, Any]] = [("command", " ".join(map(str, command)) if isinstance(command, list) else command)]
    pairs += [(name, source.get(name)) for name in ("created", "preftune", "seed")]
    git = mapping(source.get("git"))
    if git.get("commit"):
        pairs.append(("commit", f"{git['commit']}{', with local changes' if git.get('changed') else ''}"))
    for part in ("versions", "machine"):
        pairs += [(name.replace("_", " "), value) for name, value in mapping(source.get(part)).items()]
    for split, entry in mapping(source.get("data")).items():
        if isinstance(entry, dict):
            digest = str(entry.get("sha256", "?"))[:16]
            names = text_of(entry.get("names") or [])
            pairs.append((f"data, {split}", f"{names}, {figure(entry.get('num_rows'))} rows, sha256 {digest}"))
    return [(name, text_of(value)) for name, value in pairs if value is not None]


def entries(value: Any) -> list[Any]:
    """The value where it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def _interval_facts(value: Any, *, as_share: bool = False) -> list[tuple[str, str]]:
    if not is_interval(value):
        return facts(value)
    return [
        ("estimate", interval(value, as_share=as_share)),
        *facts(value, leave_out=("mean", "estimate", "low", "high")),
    ]
