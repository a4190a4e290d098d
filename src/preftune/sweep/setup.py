"""From the command line to the plan of a sweep: settings, what is searched, and the held-out pairs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preftune.config import CommandLine, ModelConfig, Resolved, ScriptConfig, redact
from preftune.config.fields import fields_of_all
from preftune.config.secrets import REDACTED
from preftune.errors import ConfigError, DataError, PreftuneError, SetupError
from preftune.ownership import HOME, check_places
from preftune.runs.data import load_splits
from preftune.runs.folder import places_read
from preftune.runs.settings import explicit, read_settings, settings_classes
from preftune.sweep import space
from preftune.sweep.holdout import FOLDER, check_split, split_off
from preftune.sweep.locks import beginning
from preftune.sweep.options import Options
from preftune.sweep.plan import (
    BASE_NAME,
    FILE_NAME,
    Plan,
    change_plan,
    check_base,
    compare,
    nothing_begun,
    read_plan,
    settle_plan,
    study_name,
)
from preftune.sweep.proposal import propose
from preftune.sweep.scores import ACCURACY, GAIN, KL, LOWER_IS_BETTER, MARGIN, PAIRED, PER_TOKEN, TAIL
from preftune.sweep.space import Dimension, as_flag

#: Settings that a sweep sets itself, or that would part the trials' held-out pairs.
_NOT_SEARCHED = ("output_dir", "resume_from_checkpoint", "do_eval", "do_train", "do_predict", "dry_run", "push_to_hub")
_SOURCE = ("dataset_name", "dataset_config", "dataset_mixture", "dataset_mixer", "dataset_splits", "dataset_columns")
_DATA = (*_SOURCE, "dataset_format", "dataset_train_split", "dataset_test_split", "pairing", "quarantine_path")
#: Settings that mean one run.
_OF_ONE_RUN = ("output_dir", "dry_run", "resume_from_checkpoint", "disable_tqdm")
_EVAL_SHARE = 0.1
_NUM_TRIALS = 20
_NUM_SAMPLES = 100


def begin(options: Options, line: CommandLine, folder: Path) -> tuple[Plan, tuple[str, ...]]:
    """Begin a sweep in ``folder``, go on with the one there, or join it.

    Args:
        options: The sweep's flags.
        line: The trials' settings.
        folder: The sweep's folder.

    Returns:
        The plan that counts, and lines for the user.

    Raises:
        PreftuneError: Settings, data or folder cannot be used.
    """
    begun = read_plan(folder)
    if not (line.configs or line.flags or options.param):
        if begun is None:
            raise nothing_begun(folder)
        return _go_on(begun, options, folder), ()
    asked, notes = make_plan(options, line)
    check_places({"--out": str(folder)}, _read_places(asked, line, folder))
    if options.dry_run:
        return asked, tuple(notes)
    _check_folder(folder)
    with beginning(folder):
        asked, more = _with_held_out(asked, folder, line)
        asked = dataclasses.replace(asked, study=study_name(folder, asked))
        plan = settle_plan(folder, dataclasses.replace(asked, storage=_writable(options.storage)))
    return dataclasses.replace(plan, storage=options.storage or plan.storage), (*notes, *more)


def _go_on(begun: Plan, options: Options, folder: Path) -> Plan:
    """The plan that was begun, with what the flags change of it; what they cannot change is refused."""
    own = options.named & {item.name for item in dataclasses.fields(Plan)} - {"storage"}
    given = {name: getattr(options, name) for name in own}
    asked = dataclasses.replace(begun, **{name: value for name, value in given.items() if value is not None})
    compare(begun, asked, folder)
    check_base(folder, begun)
    if begun.base.get("dataset_name") == str((folder / FOLDER).resolve()):
        check_split(folder)
    if asked.fuse > 1:
        _check_fused(asked, use_peft=bool(asked.base.get("use_peft")))
    if begun.storage == "" and not options.storage:
        raise ConfigError(
            "the study's database asks for a password, which is not kept in the folder",
            where="--storage",
            remedy="name the URL again",
        )
    plan = asked if options.dry_run else change_plan(folder, begun, asked)
    return dataclasses.replace(plan, storage=options.storage or begun.storage)


def _writable(url: str | None) -> str | None:
    """The URL as it may be kept on disk: empty where it holds a password."""
    return url if url is None or redact(url) == url else ""


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"cannot make the folder ({error.strerror})", where="--out", value=str(folder)) from error
    known = re.compile(rf"{re.escape(HOME)}|{FOLDER}|\.?({BASE_NAME}|{FILE_NAME})(\.[0-9a-f]{{32}}\.tmp)?")
    strangers = [path.name for path in folder.iterdir() if not known.fullmatch(path.name)]
    if strangers and not (folder / FILE_NAME).exists():
        raise ConfigError(
            f"the folder holds other files ({', '.join(sorted(strangers)[:3])})",
            where="--out",
            value=str(folder),
            remedy="name a new folder",
        )


# ---- settings ------------------------------------------------------------------------------------------------------


def _refuse_secrets(base: Mapping[str, Any]) -> None:
    """Workers read the settings from files in the folder, and a secret does not belong there."""
    for name, value in base.items():
        if REDACTED in str(redact(value, name)):
            raise ConfigError(
                "a secret would be written into the sweep's folder",
                where=name,
                value=redact(value, name),
                remedy="run hf auth login, or set HF_TOKEN in the environment, and leave it out",
            )


def make_plan(options: Options, line: CommandLine) -> tuple[Plan, list[str]]:
    """What the command line asks for, every trial's settings checked.

    Raises:
        ConfigError: A setting is wrong, alone or in one of the combinations.
    """
    config_class = settings_classes(options.verb)[0]
    settings = read_settings(options.verb, line)
    settings.script.require_dataset()
    settings.model.require_model()
    if settings.trainer.push_to_hub:
        raise ConfigError(
            "trials are not pushed", where="push_to_hub", value=True, remedy="push the sweet spot when it is found"
        )
    base = {name: value for name, value in explicit(settings).items() if name not in _OF_ONE_RUN}
    _refuse_secrets(base)
    # Trials compare held-out pairs at their end, and go on from no checkpoint unless the settings want some.
    if str(getattr(settings.trainer.eval_strategy, "value", settings.trainer.eval_strategy)) == "no":
        base["do_eval"] = True
    base.setdefault("save_strategy", "no")
    classes = {"script": ScriptConfig, "model": ModelConfig, "trainer": config_class}
    dimensions = space.parse_params(options.param, fields_of_all(classes))
    notes = [*settings.notes, *_unused(settings)]
    if not dimensions:
        dimensions, reasons = _proposed(settings, base, options.verb)
        notes += reasons
    for dimension in dimensions:
        if dimension.name in (*_NOT_SEARCHED, *_DATA):
            raise ConfigError("cannot be searched", where="--param", value=dimension.name)
        base.pop(dimension.name, None)
    search, cells, number = _cells(options, dimensions, settings.trainer.seed)
    with_reference = options.verb == "dpo" and any(
        spec.needs_reference for spec in settings.trainer.build_objective().specs
    )
    num_samples = (_NUM_SAMPLES if with_reference else 0) if options.num_samples is None else options.num_samples
    # A search or a pruner goes by what held-out pairs say on the way, before any samples are drawn.
    sampled = num_samples > 0 and search != "tpe" and options.pruner == "none"
    metric = options.metric or (ACCURACY if not with_reference else PER_TOKEN if sampled else GAIN)
    plan = Plan(
        verb=options.verb,
        method=" + ".join(_methods(settings.trainer)),
        base=base,
        dimensions=dimensions,
        search=search,
        cells=tuple(cells),
        num_trials=number,
        seed=int(settings.trainer.seed),
        metric=metric,
        direction="minimize" if metric in LOWER_IS_BETTER else "maximize",
        pruner=options.pruner,
        diverge_factor=options.diverge_factor,
        num_samples=num_samples,
        eval_share=options.eval_share,
        keep=options.keep,
        fuse=options.fuse,
    )
    if plan.fuse > 1:
        _check_fused(plan, use_peft=bool(settings.model.use_peft))
    _check_metric(plan, options, settings, notes)
    _check_cells(plan, line)
    return plan, notes


def _check_fused(plan: Plan, *, use_peft: bool) -> None:
    """Refuse what trials in one forward cannot do; what only the trainer knows is refused by it."""
    from preftune.training.fused import FUSABLE

    strangers = [each.name for each in plan.dimensions if each.name not in FUSABLE]
    why = remedy = None
    if plan.verb != "dpo":
        why, remedy = f"trials of {plan.verb} do not share a forward", "leave --fuse out"
    elif not use_peft:
        why, remedy = "only LoRA trials share a forward", "set use_peft: true, or leave --fuse out"
    elif strangers:
        why = f"{', '.join(strangers)} cannot differ between trials in one forward"
        remedy = f"search {', '.join(FUSABLE[:6])} and the like, or leave --fuse out"
    elif plan.pruner != "none":
        why, remedy = "trials in one forward cannot be stopped one by one", "leave --pruner or --fuse out"
    if why is not None:
        raise ConfigError(why, where="--fuse", value=plan.fuse, remedy=remedy)


def _unused(settings: Resolved[Any]) -> list[str]:
    """Settings that mean one run: refused as flags, told where a file that was written for a run brings them.

    Raises:
        ConfigError: One of them is given as a flag.
    """
    remedies = {
        "output_dir": "--out is the folder of the sweep",
        "resume_from_checkpoint": "preftune sweep --out DIR goes on with a sweep",
        "dry_run": "--dry_run shows the trials, and stops",
    }
    notes = []
    for name, remedy in remedies.items():
        origin = settings.origins[name]
        value = getattr(settings.script if name == "dry_run" else settings.trainer, name)
        if origin.kind == "default" or not value:
            continue
        if origin.kind == "flag":
            raise ConfigError("a sweep does not use it", where=origin.where, value=value, remedy=remedy)
        notes.append(f"{name} ({origin.where}) is not used: {remedy}")
    return notes


def _methods(args: Any) -> list[str]:
    return list(args.build_objective().names)


def _proposed(settings: Resolved[Any], base: Mapping[str, Any], verb: str) -> tuple[tuple[Dimension, ...], list[str]]:
    """The method's own grid, around what is advised for this model."""
    given = {name: base[name] for name in ("beta", "learning_rate") if base.get(name) is not None}
    methods, adapter = _methods(settings.trainer), bool(settings.model.use_peft)
    found = propose(methods, given, adapter=adapter, advised=_advised(settings, verb, methods, adapter))
    return found.dimensions, list(found.reasons)


def _advised(settings: Resolved[Any], verb: str, methods: Sequence[str], adapter: bool) -> dict[str, tuple[float, str]]:
    """Beta and learning rate for a model of this size, with the reason."""
    from preftune.advice import Case, advise
    from preftune.models.shapes import empty_model, load_config

    model = settings.model
    try:
        config = load_config(
            model.require_model(), revision=model.model_revision, trust_remote_code=model.trust_remote_code
        )
        size = int(empty_model(config).num_parameters())
    except (PreftuneError, ValueError, OSError):
        # The published values will do; what is wrong with the model is said when it is loaded.
        return {}
    advice = advise(Case(verb, tuple(methods), size, lora=adapter))
    return {
        each.field: (float(each.value), each.reason)
        for each in advice.settings
        if each.field in ("beta", "learning_rate")
    }


def _cells(options: Options, dimensions: Sequence[Dimension], seed: int) -> tuple[str, list[space.Cell], int]:
    ranges = any(dimension.is_range for dimension in dimensions)
    search = options.search or ("tpe" if ranges or options.num_trials is not None else "grid")
    if search == "grid":
        cells = space.grid(dimensions)
        if options.num_trials is not None:
            raise ConfigError(
                f"a grid has as many trials as combinations ({len(cells)})",
                where="--num_trials",
                value=options.num_trials,
                remedy="leave it out, or --search random",
            )
        return search, cells, len(cells)
    number = options.num_trials or _NUM_TRIALS
    if search == "random":
        cells = space.draw(dimensions, number, seed)
        return search, cells, len(cells)
    return search, [], number


def _check_metric(plan: Plan, options: Options, settings: Resolved[Any], notes: list[str]) -> None:
    known = (*PAIRED, "eval_loss", "train_loss", *((KL, TAIL) if plan.num_samples else ()))
    if plan.metric not in known:
        remedy = "set --num_samples 100" if plan.metric in (KL, TAIL) else None
        raise ConfigError(
            "unknown metric", where="--metric", value=plan.metric, allowed=", ".join(known), remedy=remedy
        )
    searched = {dimension.name for dimension in plan.dimensions}
    if plan.metric in (MARGIN, "eval_loss", "train_loss") and searched & {"beta", "loss_type"}:
        notes.append(f"{plan.metric} is on another scale for every beta and loss; {ACCURACY} compares them fairly")
    if options.pruner != "none" and plan.metric in ("train_loss", KL, TAIL):
        raise ConfigError(
            "pruning compares held-out figures on the way, and this one is taken at the end",
            where="--metric",
            value=plan.metric,
            allowed=", ".join((*PAIRED, "eval_loss")),
            remedy="take another metric, or leave --pruner out",
        )
    if options.pruner != "none" and plan.base.get("eval_strategy") in (None, "no"):
        raise ConfigError(
            "pruning compares held-out figures on the way, and none are taken",
            where="--pruner",
            value=options.pruner,
            remedy="set eval_strategy: steps and eval_steps in the settings",
        )


def _check_cells(plan: Plan, line: CommandLine) -> None:
    """Build every trial's settings now: a mistake in the last one should not show after hours."""
    cells = list(plan.cells)
    if not cells:
        ends = [Dimension(d.name, d.values or _ends(d)) for d in plan.dimensions]
        cells = [{d.name: value for d, value in zip(ends, values, strict=True)} for values in _corners(ends)]
    searched = {dimension.name for dimension in plan.dimensions}
    kept = tuple(flag for flag in line.flags if flag[0] not in searched)
    for cell in cells:
        flags = tuple((name, as_flag(value), f"--param {name}") for name, value in cell.items())
        read_settings(plan.verb, CommandLine(line.configs, kept + flags))


def _ends(dimension: Dimension) -> tuple[float | int, ...]:
    ends = (dimension.low, dimension.high)
    return tuple(int(end) for end in ends) if dimension.integer else ends


def _corners(dimensions: Sequence[Dimension]) -> list[tuple[Any, ...]]:
    """Each value of each field once, the other fields at their first."""
    first = [dimension.values[0] for dimension in dimensions]
    found = [tuple(first)]
    for place, dimension in enumerate(dimensions):
        found += [(*first[:place], value, *first[place + 1 :]) for value in dimension.values[1:]]
    return found


# ---- held-out pairs ------------------------------------------------------------------------------------------------


def _with_held_out(plan: Plan, folder: Path, line: CommandLine) -> tuple[Plan, list[str]]:
    """Make sure that there are held-out pairs: a test split, or prompts that are held out for the whole sweep."""
    settings = _trial_like(plan, line)
    share, notes = plan.eval_share, []
    if share is None:
        try:
            load_splits(settings, with_test=True)
            return plan, []
        except (ConfigError, DataError):
            if settings.origins["dataset_test_split"].kind != "default":
                raise
            share = _EVAL_SHARE
    splits = load_splits(settings, with_test=False)
    begun = (folder / FILE_NAME).exists()
    num = _saved_split(splits["train"], share, plan.seed, folder)
    if not begun:
        notes.append(f"held out: {num[1]:,} pairs of {share:.0%} of the prompts; {num[0]:,} pairs to train on")
    base = {name: value for name, value in plan.base.items() if name not in _DATA}
    base["dataset_name"] = str((folder / FOLDER).resolve())
    return dataclasses.replace(plan, base=base, eval_share=share), notes


def _read_places(plan: Plan, line: CommandLine, folder: Path) -> dict[str, str | None]:
    """Models and data of the trials; pairs that this sweep has held out may be named as the data."""
    read = places_read(_trial_like(plan, line))
    return {name: path for name, path in read.items() if path != str((folder / FOLDER).resolve())}


def _saved_split(dataset: Any, share: float, seed: int, folder: Path) -> tuple[int, int]:
    try:
        return split_off(dataset, share, seed, folder)
    except OSError as error:
        raise SetupError(
            f"the held-out pairs cannot be saved ({error.strerror or error})",
            where="--out",
            value=str(folder),
            remedy="free some space, or set another --out",
        ) from error


def _trial_like(plan: Plan, line: CommandLine) -> Resolved[Any]:
    searched = {dimension.name for dimension in plan.dimensions}
    kept = tuple(flag for flag in line.flags if flag[0] not in searched)
    return read_settings(plan.verb, CommandLine(line.configs, kept))
