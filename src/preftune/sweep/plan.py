"""The sweep as it was begun, kept in its folder, so that every worker and every later call does the same trials."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preftune.errors import ConfigError, SetupError
from preftune.files import replace_text
from preftune.ownership import put_text
from preftune.sweep.space import Cell, Dimension
from preftune.version import __version__

FILE_NAME = "plan.json"
BASE_NAME = "base.yaml"
#: What a later call may change: none of it alters what a trial computes.
_MAY_CHANGE = frozenset({"keep", "fuse", "preftune", "cwd", "storage", "study"})


@dataclass(frozen=True)
class Plan:
    """Everything that decides which trials there are and what each computes.

    Attributes:
        verb: Training verb whose trials these are.
        method: Losses, as ``preftune methods`` names them.
        base: Settings of every trial that are not defaults, by name.
        dimensions: What is searched.
        search: ``grid``, ``random`` or ``tpe``.
        cells: Settings of each trial; empty for ``tpe``, which chooses as it goes.
        num_trials: Number of trials.
        seed: Of sampler, held-out split and bootstrap.
        metric: Which metric decides.
        direction: ``maximize`` or ``minimize``.
        pruner: ``none``, or a pruner of Optuna on the held-out metric.
        diverge_factor: A loss this many times the first one counts as blown up.
        num_samples: Samples drawn from each trial, one for each of as many held-out prompts; 0 for none.
        eval_share: Share of the prompts held out, where the data have no test split.
        keep: Whose weights are kept: ``best``, ``all`` or ``none``.
        fuse: How many LoRA trials share one forward.
        storage: Database URL; ``None`` for a journal file in the folder.
        study: Name of the study in its storage.
        cwd: Folder that relative paths count from.
        preftune: Version that began the sweep.
    """

    verb: str
    method: str
    base: dict[str, Any]
    dimensions: tuple[Dimension, ...]
    search: str
    cells: tuple[Cell, ...]
    num_trials: int
    seed: int
    metric: str
    direction: str
    pruner: str = "none"
    diverge_factor: float = 10.0
    num_samples: int = 0
    eval_share: float | None = None
    keep: str = "best"
    fuse: int = 1
    storage: str | None = None
    study: str = "preftune"
    cwd: str = field(default_factory=os.getcwd)
    preftune: str = __version__

    def to_json(self) -> dict[str, Any]:
        """For ``plan.json``."""
        stored = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return stored | {
            "dimensions": {each.name: each.to_json() for each in self.dimensions},
            "cells": list(self.cells),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Plan:
        """What :meth:`to_json` wrote."""
        dimensions = tuple(Dimension.from_json(name, each) for name, each in stored["dimensions"].items())
        return cls(**{**stored, "dimensions": dimensions, "cells": tuple(stored["cells"])})


def study_name(folder: Path, plan: Plan) -> str:
    """A name that two sweeps in one database do not share."""
    text = json.dumps(plan.to_json() | {"cwd": "", "study": "", "preftune": ""}, sort_keys=True, default=str)
    return f"{folder.resolve().name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def read_plan(folder: Path) -> Plan | None:
    """The plan of a sweep that was begun in ``folder``; ``None`` where there is none.

    Raises:
        ConfigError: The file is not a plan.
    """
    try:
        text = (folder / FILE_NAME).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return Plan.from_json(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            "not the plan of a sweep", where=str(folder / FILE_NAME), remedy="remove the file, or set another --out"
        ) from error


def nothing_begun(folder: Path) -> ConfigError:
    """The error where a folder is named alone, as for going on, and holds no sweep."""
    remedy = "check the name; or, to begin one, add the trials' settings: --config FILE.yaml or --name value"
    return ConfigError("no sweep was begun here", where="--out", value=str(folder), remedy=remedy)


def settle_plan(folder: Path, plan: Plan) -> Plan:
    """Begin a sweep in ``folder``, or join the one that was begun there.

    Of several workers that start at once one writes the plan, and the others compare theirs with it.

    Returns:
        The plan that counts.

    Raises:
        ConfigError: Another sweep lives in this folder.
        SetupError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The settings first: whoever sees the plan must find them.
        if not os.path.lexists(folder / FILE_NAME) and not os.path.lexists(folder / BASE_NAME):
            write_yaml(folder / BASE_NAME, plan.base)
        else:
            check_base(folder, read_plan(folder) or plan)
        text = _text(plan)
        if _create(folder / FILE_NAME, text):
            return plan
    except OSError as error:
        raise SetupError(f"cannot write ({error.strerror})", where="--out", value=str(folder)) from error
    begun = read_plan(folder)
    assert begun is not None
    return change_plan(folder, begun, Plan.from_json(json.loads(text)))


def check_base(folder: Path, plan: Plan) -> None:
    """Refuse a file of settings that is not the one that the sweep has written: every trial reads it.

    Raises:
        ConfigError: It is another one, or missing.
    """
    try:
        same = (folder / BASE_NAME).read_text(encoding="utf-8") == _yaml(plan.base)
    except (OSError, ValueError):
        same = False
    if not same:
        raise ConfigError(
            f"{BASE_NAME} does not hold the settings of this sweep",
            where="--out",
            value=str(folder),
            remedy="move the file, or name a new folder",
        )


def change_plan(folder: Path, begun: Plan, asked: Plan) -> Plan:
    """Change what may change of a sweep that was begun, for every worker from now on.

    Returns:
        The plan that counts.

    Raises:
        ConfigError: What is asked for is another sweep.
        SetupError: The folder cannot be written.
    """
    compare(begun, asked, folder)
    plan = dataclasses.replace(begun, keep=asked.keep, fuse=asked.fuse)
    if plan != begun:
        try:
            replace_text(folder / FILE_NAME, _text(plan))
        except OSError as error:
            raise SetupError(f"cannot write ({error.strerror})", where="--out", value=str(folder)) from error
    return plan


def compare(begun: Plan, asked: Plan, folder: Path) -> None:
    """Refuse a plan whose trials are not those of the sweep that was begun in ``folder``.

    Raises:
        ConfigError: Naming the first difference.
    """
    for item in dataclasses.fields(Plan):
        before, now = getattr(begun, item.name), getattr(asked, item.name)
        if item.name in _MAY_CHANGE or before == now:
            continue
        if item.name == "base":
            name = next(key for key in sorted({*before, *now}) if before.get(key) != now.get(key))
            what, before, now = f"a sweep with another {name}", before.get(name), now.get(name)
        elif item.name == "dimensions":
            what, before, now = "a sweep of other values", *("; ".join(map(str, each)) for each in (before, now))
        else:
            what = f"a sweep with another {item.name}"
        raise ConfigError(
            f"{what} was begun in this folder ({before!r})",
            where="--out",
            value=now,
            remedy=f"go on with it: preftune sweep --out {folder}; or set another --out",
        )


def _text(plan: Plan) -> str:
    return json.dumps(plan.to_json(), indent=2, ensure_ascii=False, default=str) + "\n"


def _create(path: Path, text: str) -> bool:
    """Write a file that must not exist yet, in one step. Returns whether this call made it."""
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    beside.write_text(text, encoding="utf-8")
    try:
        os.link(beside, path)
    except FileExistsError:
        return False
    except OSError:
        # No hard links here: what remains is a short gap in which two could both believe to be first.
        if path.exists():
            return False
        os.replace(beside, path)
        return True
    finally:
        beside.unlink(missing_ok=True)
    return True


def write_yaml(path: Path, settings: Mapping[str, Any], comment: str = "") -> None:
    """Write settings as a file that ``--config`` takes."""
    put_text(path, "".join(f"# {line}\n" for line in comment.splitlines()) + _yaml(settings))


def _yaml(settings: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, width=120)
