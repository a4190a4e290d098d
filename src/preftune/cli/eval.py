"""``preftune eval``: what a model is worth on held-out pairs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from preftune.config import ModelConfig, Resolved, ScriptConfig, resolve, split_command_line
from preftune.errors import ConfigError, SetupError
from preftune.evaluation.config import EvalConfig

if TYPE_CHECKING:
    from preftune.data import DataOptions
    from preftune.evaluation import EvalResult
    from preftune.models.tuned import Tuned

#: Settings of training that could not act here.
_TRAINING_ONLY = (
    *("dataset_train_split", "dataset_test_split", "dataset_mixture", "dataset_mixer", "dataset_splits"),
    *("advice", "ignore_bias_buffers", "dry_run", "use_peft", "lora_r", "lora_alpha", "lora_dropout"),
    *(
        "lora_target_modules",
        "lora_target_parameters",
        "lora_modules_to_save",
        "lora_task_type",
        "use_rslora",
        "use_dora",
    ),
)
#: As in training: a few rows that cannot be used are left out, named and kept aside.
_DEFAULTS = {"on_bad_rows": "skip"}
_INSTEAD = {
    "dataset_test_split": "set split",
    "dataset_train_split": "set split",
    "use_peft": "name the adapter's folder",
}


def main(argv: Sequence[str]) -> int:
    """Run the verb."""
    line = split_command_line(argv)
    if line.help:
        from preftune.cli.help import render, sections_of

        groups = {"evaluation": EvalConfig, "data": ScriptConfig, "model": ModelConfig}
        print(render("eval", sections_of(groups, _DEFAULTS, _TRAINING_ONLY)))
        return 0
    from rich.console import Console

    from preftune.cli.console import plain_warnings
    from preftune.runs.failures import foreseen

    console = Console()
    with plain_warnings(console):
        settings = resolve(line, EvalConfig, defaults=_DEFAULTS)
        _complete(settings)
        with foreseen(SimpleNamespace(output_dir=settings.trainer.out)):
            _evaluate(settings, console)
    return 0


def _complete(settings: Resolved[EvalConfig]) -> None:
    """Fill in what follows from other settings, and refuse what would have no effect."""
    config, model, origins = settings.trainer, settings.model, settings.origins
    for name in _TRAINING_ONLY:
        if origins[name].kind != "default":
            raise ConfigError(
                "has no effect on an evaluation", where=origins[name].where, remedy=_INSTEAD.get(name, "leave it out")
            )
    for ours, theirs in (("model", "model_name_or_path"), ("ref_model", "ref_model_name_or_path")):
        if getattr(model, theirs) and getattr(config, ours):
            raise ConfigError(f"both {ours} and {theirs} are set", where="model", remedy="keep one of them")
        setattr(config, ours, getattr(config, ours) or getattr(model, theirs))
    if not config.model:
        raise ConfigError("no model to evaluate", where="model", remedy="set --model")
    if config.out is None:
        # A report on the run finds it there.
        inside, name = os.path.join(config.model, "eval"), os.path.basename(os.path.normpath(config.model))
        config.out = inside if _is_run(config.model) else f"{name}-eval"
    try:
        os.makedirs(config.out, exist_ok=True)
    except OSError as error:
        raise SetupError(f"cannot make the folder ({error.strerror})", where="out", value=config.out) from error
    _check_places(settings)


def _is_run(model: str) -> bool:
    """Whether a model is what a run left, with its record."""
    return os.path.isfile(os.path.join(model, "provenance.json"))


def _run_of(settings: Resolved[EvalConfig]) -> Tuned | None:
    """The run whose model is evaluated, and the model that it was tuned from as the reference of full weights."""
    from preftune.models.tuned import find_tuned

    config = settings.trainer
    # A folder without weights is told now, with the checkpoint that may be meant.
    tuned = find_tuned(str(config.model)) if os.path.isdir(str(config.model)) else None
    if tuned is None or not _is_run(str(config.model)):
        return None
    if config.ref_model is None and not config.reference_free:
        config.ref_model = tuned.reference
    if settings.origins["bf16"].kind == "default":
        # So that figures are those of the training.
        config.bf16 = bool(tuned.setting("trainer", "bf16", False))
    return tuned


def _data(settings: Resolved[EvalConfig], tuned: Tuned | None) -> Any:
    """What to evaluate on: what was named, or what the run held out."""
    from preftune.runs.earlier_run import rows_of_run

    config, name = settings.trainer, settings.script.dataset_name
    if name is not None:
        return name
    rows = "no data to evaluate on" if tuned is None else rows_of_run(tuned)
    if isinstance(rows, str):
        raise ConfigError(rows, where="dataset_name", remedy="set --dataset_name to a file of held-out pairs")
    for name in ("split", "source_column"):
        if getattr(config, name) is not None:
            raise ConfigError("belongs to data given by name", where=name, remedy="set --dataset_name too")
    return rows


def _options(settings: Resolved[EvalConfig], tuned: Tuned | None, quarantine: str | None) -> DataOptions:
    """How rows become tokens: as in the run's training, whatever the rows, but for what this call says."""
    from preftune.data import DataOptions
    from preftune.runs.earlier_run import options_of_run

    config, script = settings.trainer, settings.script
    own_way = DataOptions(transcripts="messages") if tuned is None else options_of_run(tuned)
    lengths = ("max_length", "truncation_mode")
    said = {name: getattr(config, name) for name in lengths if settings.origins[name].kind != "default"}
    options = replace(
        own_way,
        on_bad_rows=script.on_bad_rows,  # type: ignore[arg-type]
        # What a run held out has been read by now.
        dataset_format="auto" if script.dataset_name is None else script.dataset_format,
        quarantine_path=quarantine,
        max_dropped_share=None if script.allow_drops else 0.1,
        **said,
    )
    for name in lengths:
        setattr(config, name, getattr(options, name))
    return options


def _check_places(settings: Resolved[EvalConfig]) -> None:
    """Refuse a folder whose files of these names are not an earlier evaluation's.

    It may be the model's own folder, where a report finds them.
    """
    from preftune.evaluation.files import RESULTS, claim
    from preftune.ownership import check_places

    config, script, quarantine = settings.trainer, settings.script, settings.script.quarantine_path
    read = {name: getattr(config, name) for name in ("model", "ref_model", "compare", "judge_labels")}
    read |= {"dataset_name": script.dataset_name, "tokenizer_name_or_path": settings.model.tokenizer_name_or_path}
    check_places({"quarantine_path": quarantine}, read)
    claim(str(config.out))
    if quarantine is not None and os.path.basename(quarantine) in RESULTS:
        raise ConfigError("a result has this name", where="quarantine_path", value=quarantine, remedy="name another")


def _evaluate(settings: Resolved[EvalConfig], console: Any) -> None:
    from transformers.utils.logging import disable_progress_bar

    from preftune.data.quarantine import begin as begin_quarantine
    from preftune.evaluation.endpoint import JUDGE, SERVER, key_from
    from preftune.evaluation.run import evaluate
    from preftune.evaluation.table import show
    from preftune.runs.network import go_offline_if_unreachable
    from preftune.runs.next_steps import report as report_command

    disable_progress_bar()
    config, script, model = settings.trainer, settings.script, settings.model
    # A missing key should be said now, not after an hour of scoring.
    key_from(config.judge_key_env, JUDGE)
    key_from(config.sampling_key_env, SERVER)
    offline = go_offline_if_unreachable([config.model, config.ref_model, config.compare, script.dataset_name])
    for note in (*([offline] if offline else []), *settings.notes):
        console.print(note, style="yellow", highlight=False, markup=False)
    quarantine = script.quarantine_path
    if script.on_bad_rows == "skip" and quarantine is None:
        quarantine = os.path.join(str(config.out), "quarantine.jsonl")
        begin_quarantine(quarantine)
    tuned = _run_of(settings)
    for note in tuned.notes if tuned is not None and config.ref_model is None else ():
        console.print(note, style="yellow", highlight=False, markup=False)
    dataset, options = _data(settings, tuned), _options(settings, tuned, quarantine)

    def told(result: EvalResult) -> None:
        # A tracker may fail after this, and what was found is seen all the same.
        show(result, console)
        path = os.path.join(str(config.out), "eval.json")
        # A report on the run shows what lies within it.
        run, out = os.path.realpath(str(config.model)), os.path.realpath(str(config.out))
        shown = [str(config.out)] if tuned is None else [str(config.model)]
        shown += [str(config.out)] if tuned is not None and os.path.commonpath([run, out]) != run else []
        for text in (f"saved {path}", f"next: {report_command(*shown)}"):
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    try:
        evaluate(
            config.model,
            dataset,
            ref_model=config.ref_model,
            compare=config.compare,
            config=replace(config),
            model_config=model,
            data_options=options,
            dataset_config=script.dataset_config,
            columns=script.dataset_columns,
            pairing=script.pairing,
            show_progress=True,
            on_result=told,
        )
    except KeyboardInterrupt:
        console.print("stopped; what is finished is kept, and the same command goes on from there", highlight=False)
        raise
