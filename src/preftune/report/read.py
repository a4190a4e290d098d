"""Run folders and sweep folders, of preftune and of anything else that leaves a ``trainer_state.json``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preftune.config.yaml_text import TooMuch, read_yaml
from preftune.errors import DataError
from preftune.report.files import Notes, mapping, number, objects, read_lines, read_object, read_text

STATE, LIVE_LOG = "trainer_state.json", "log.jsonl"
#: Trials of a sweep whose curves are drawn; more lines cannot be told apart.
MAX_TRIAL_RUNS = 12

_CHECKPOINT = re.compile(r"checkpoint-(\d+)\Z")
_RUN_FILES = (STATE, "provenance.json", LIVE_LOG, "alarms.jsonl", "samples.jsonl", "eval.json")
_EVALUATION = "eval.json"
_REPORT_FILES = ("audit.json", "advice.json", _EVALUATION)
#: Folder of a run that holds its evaluation.
INSIDE = "eval"


@dataclass
class Run:
    """What one run folder holds; every part but the name may be missing.

    Attributes:
        name: Label on the page, unique there.
        path: The folder.
        history: Log lines in the order of their steps.
        state: ``trainer_state.json`` without its log lines.
        events: Lines of ``log.jsonl``, which carry the time.
        provenance: ``provenance.json``.
        config: ``config.yaml``.
        alarms: Lines of ``alarms.jsonl``.
        samples: Lines of ``samples.jsonl``.
        audit: ``audit.json``.
        advice: ``advice.json``.
        evaluation: ``eval.json``.
        base_model: Name of the model before training, where the folder tells.
        notes: What could not be read.
    """

    name: str
    path: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    audit: dict[str, Any] = field(default_factory=dict)
    advice: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    notes: Notes = field(default_factory=Notes)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        parts = (self.history, self.provenance, self.alarms, self.samples, self.audit, self.advice, self.evaluation)
        return not any(parts)


@dataclass
class Sweep:
    """What one sweep folder holds.

    Attributes:
        name: Label on the page.
        path: The folder.
        content: ``sweep.json``.
        trials: Its trials.
        runs: Run folders of the trials, at most :data:`MAX_TRIAL_RUNS`, the best first.
        notes: What could not be read.
    """

    name: str
    path: Path
    content: dict[str, Any]
    trials: list[dict[str, Any]]
    runs: list[Run] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)


def read_all(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[Run], list[Sweep]]:
    """Read folders of runs and of sweeps.

    Args:
        paths: Folders, or files inside them.

    Returns:
        The runs and the sweeps, in their order, with names that differ.

    Raises:
        DataError: A path does not exist, or holds nothing that a report could show.
    """
    runs: list[Run] = []
    sweeps: list[Sweep] = []
    folders = list(dict.fromkeys(_folder(path) for path in paths))
    for folder in folders:
        if (folder / "sweep.json").is_file():
            sweep = read_sweep(folder)
            if sweep is not None:
                sweeps.append(sweep)
                continue
        run = read_run(folder)
        if run.empty:
            _refuse(folder, run.notes)
        runs.append(run)
    runs = _with_evaluations(runs)
    everything: list[Run | Sweep] = [*runs, *sweeps]
    for item, name in zip(everything, distinct_names([item.path for item in everything]), strict=True):
        item.name = name
    return runs, sweeps


def _with_evaluations(runs: list[Run]) -> list[Run]:
    """One run for a training and its evaluation, whether the evaluation was named or is found in the run's folder."""
    trained = {run.path.resolve(): run for run in runs if run.history or run.provenance}
    kept = []
    for run in runs:
        about = _evaluated(run.evaluation, run.path)
        owner = next((trained[place] for place in about if place in trained), None)
        if run.path.resolve() in trained or owner is None:
            kept.append(run)
        else:
            owner.evaluation = owner.evaluation or run.evaluation
    for run in kept:
        if not run.evaluation and run.path.resolve() in trained:
            run.evaluation = _beside(run)
    return kept


def _beside(run: Run) -> dict[str, Any]:
    """An evaluation of a run in the folder that one gets by default: the run's name with ``-eval``."""
    name = f"{run.path.resolve().name}-eval"
    for place in dict.fromkeys((run.path.resolve().parent / name, Path.cwd() / name)):
        found = read_object(place / _EVALUATION, Notes()) or {}
        if run.path.resolve() in _evaluated(found, place):
            return found
    return {}


def _evaluated(evaluation: dict[str, Any], place: Path) -> list[Path]:
    """Folders that an evaluation may be about: a relative one counts from where it was started."""
    model = evaluation.get("model")
    if not isinstance(model, str) or not model:
        return []
    starts = (Path.cwd(), *place.resolve().parents)
    try:
        return list(dict.fromkeys((start / model).resolve() for start in starts))
    except (ValueError, OSError, RuntimeError):
        # No file system knows such a name.
        return []


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read one run folder; a missing or damaged part leaves a gap, never an error.

    Args:
        folder: The folder.
        name: Label; the folder's name by default.

    Returns:
        What was found.
    """
    run = Run(name or folder.name or str(folder), folder)
    notes = run.notes
    run.state = _find_state(folder, notes)
    run.events = read_lines(folder / LIVE_LOG, notes)
    logged = objects(run.state.pop("log_history", None))
    live = _live_history(run.events)
    # While a run goes on, its last checkpoint is older than its log.
    run.history = live if _last_step(live) > _last_step(logged) else logged
    run.provenance = read_object(folder / "provenance.json", notes) or {}
    run.config = _read_yaml(folder / "config.yaml", notes)
    run.alarms = read_lines(folder / "alarms.jsonl", notes)
    run.samples = read_lines(folder / "samples.jsonl", notes)
    run.audit, run.advice, run.evaluation = (read_object(folder / name, notes) or {} for name in _REPORT_FILES)
    # Where `preftune eval --model RUN` leaves it.
    if not run.evaluation and not (folder / INSIDE).is_symlink():
        run.evaluation = read_object(folder / INSIDE / _EVALUATION, notes) or {}
    run.base_model = _base_model(folder, run.provenance)
    return run


def read_sweep(folder: Path) -> Sweep | None:
    """Read one sweep folder.

    Args:
        folder: Folder with ``sweep.json``.

    Returns:
        The sweep, or ``None`` where ``sweep.json`` cannot be read.
    """
    notes = Notes()
    content = read_object(folder / "sweep.json", notes)
    if content is None:
        return None
    trials = [_trial(entry, position) for position, entry in enumerate(objects(content.get("trials")))]
    sweep = Sweep(folder.name, folder, content, trials, notes=notes)
    best = mapping(content.get("best")).get("number")
    # A stable sort: the best trial first, the others in their order.
    ordered = sorted(sweep.trials, key=lambda trial: trial.get("number") != best)
    for trial in ordered:
        if len(sweep.runs) == MAX_TRIAL_RUNS:
            sweep.notes.append(f"curves of {MAX_TRIAL_RUNS} of {len(sweep.trials)} trials are drawn, the best first")
            break
        place = _trial_folder(folder, trial)
        run = read_run(place, trial_name(trial)) if place is not None else None
        if run is not None and not run.empty:
            sweep.runs.append(run)
    return sweep


def trial_name(trial: dict[str, Any]) -> str:
    """A trial's number and settings: ``trial 3 (beta 0.1, learning_rate 1e-06)``."""
    shown = ", ".join(f"{key} {_shown(value)}" for key, value in mapping(trial.get("params")).items())
    return f"trial {trial.get('number', '?')}" + (f" ({shown})" if shown else "")


def is_run(folder: Path) -> bool:
    """Whether a folder looks like a run, without reading it."""
    return any((folder / name).is_file() for name in _RUN_FILES) or bool(_checkpoints(folder))


def state_file(folder: Path) -> Path | None:
    """The ``trainer_state.json`` of a run: at its root, or else in its last checkpoint."""
    places = [folder] if (folder / STATE).is_file() else _checkpoints(folder)
    return places[0] / STATE if places else None


def is_sweep(folder: Path) -> bool:
    """Whether a folder looks like a sweep, without reading it."""
    return (folder / "sweep.json").is_file()


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Short labels for folders: their names, with as many parents as it takes to tell them apart.

    Args:
        paths: The folders.

    Returns:
        One label for each, all different where the paths are.
    """
    parts = [path.resolve().parts for path in paths]
    names: list[str] = []
    for own in parts:
        depth = 1
        while depth < len(own) and sum(other[-depth:] == own[-depth:] for other in parts) > 1:
            depth += 1
        names.append("/".join(own[-depth:]))
    return names


def _folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    if folder.is_file():
        folder = folder.parent
    if not folder.is_dir():
        raise DataError("no such folder", where="preftune report", value=os.fspath(path))
    return folder


def _refuse(folder: Path, notes: Notes) -> None:
    try:
        inside = sorted(
            entry.name for entry in folder.iterdir() if entry.is_dir() and (is_run(entry) or is_sweep(entry))
        )
    except OSError:
        inside = []
    if inside:
        shown = " ".join(str(folder / name) for name in inside[:4]) + (" ..." if len(inside) > 4 else "")
        remedy = f"runs inside it: preftune report {shown}"
    else:
        remedy = "; ".join(notes) or "give the output_dir of a run, or the folder of a sweep"
    files = ", ".join((STATE, LIVE_LOG, "provenance.json", *_REPORT_FILES))
    raise DataError(
        "nothing to report on in this folder",
        where=str(folder),
        allowed=f"a folder with checkpoint-N/{STATE}, sweep.json, or one of {files}",
        remedy=remedy,
    )


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders with a state, the last one first."""
    try:
        found = [(int(match[1]), entry) for entry in folder.iterdir() if (match := _CHECKPOINT.match(entry.name))]
    except OSError:
        return []
    return [entry for _, entry in sorted(found, reverse=True) if (entry / STATE).is_file()]


def _find_state(folder: Path, notes: Notes) -> dict[str, Any]:
    for place in [folder, *_checkpoints(folder)]:
        state = read_object(place / STATE, notes)
        if state is not None:
            if place != folder:
                notes.append(f"the log is that of {place.name}: the folder holds no {STATE} of a finished run")
            return state
    return {}


def _live_history(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log lines out of ``log.jsonl``: after a resume the later line of a step counts."""
    lines: list[dict[str, Any]] = []
    for event in events:
        logs, step = event.get("logs"), number(event.get("step", 0))
        if step is None:
            continue
        if event.get("event") == "begin":
            lines = [line for line in lines if line["step"] <= step]
        elif isinstance(logs, dict):
            lines.append({**logs, "step": event.get("step", 0), "epoch": event.get("epoch")})
    return lines


def _last_step(history: Sequence[dict[str, Any]]) -> float:
    steps = [step for line in history if (step := number(line.get("step"))) is not None]
    return max(steps, default=-1.0)


def _read_yaml(path: Path, notes: Notes) -> dict[str, Any]:
    import yaml

    text = read_text(path, notes)
    if text is None:
        return {}
    try:
        content = read_yaml(text)
    except (ValueError, yaml.YAMLError) as error:
        notes.add(path, str(error) if isinstance(error, TooMuch) else "it is not valid YAML")
        return {}
    return mapping(content)


def _base_model(folder: Path, provenance: dict[str, Any]) -> str | None:
    settings = mapping(mapping(provenance.get("settings")).get("model"))
    named = mapping(settings.get("model_name_or_path")).get("value")
    if named is None:
        adapter = read_object(folder / "adapter_config.json", Notes()) or {}
        named = adapter.get("base_model_name_or_path")
    return str(named) if named else None


def _trial(entry: dict[str, Any], position: int) -> dict[str, Any]:
    """A trial whose parts have the types that they ought to have."""
    named = entry.get("number")
    return {
        **entry,
        "number": named if isinstance(named, (int, str)) else position,
        "params": mapping(entry.get("params")),
        "metrics": mapping(entry.get("metrics")),
    }


def _trial_folder(sweep: Path, trial: dict[str, Any]) -> Path | None:
    """The trial's run folder, where it lies inside the sweep's."""
    named = trial.get("run")
    root = sweep.resolve()
    candidates = [sweep / str(named), sweep / "trials" / Path(str(named)).name] if named else []
    for place in candidates:
        # A sweep may have been moved, or written by somebody else: its paths are followed only within it.
        if place.is_dir() and place.resolve().is_relative_to(root) and place.resolve() != root:
            return place
    return None


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
