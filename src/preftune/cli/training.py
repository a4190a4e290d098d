"""What the training verbs share: settings, data, model, summary, training, and the records left."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields
from typing import Any

from rich.console import Console

from preftune.cli.failures import flat, foreseen, plain_warnings, trainer_errors
from preftune.cli.main import INTERRUPTED, VERBS
from preftune.config import ModelConfig, Resolved, ScriptConfig, redact_argv, resolve, split_command_line
from preftune.config.fields import fields_of
from preftune.errors import ConfigError, SetupError

#: Verbs that train, those with most settings last.
TRAINING_VERBS = ("sft", "orpo", "cpo", "kto", "dpo")
#: Verbs whose examples are pairs, and verbs that compare with a reference.
_PAIRED, _WITH_REFERENCE = ("dpo", "orpo", "cpo"), ("dpo", "kto")
#: Settings that name a model or tokenizer.
_MODELS = ("model_name_or_path", "ref_model_name_or_path", "tokenizer_name_or_path")


class Sources:
    """Where a run's data and model come from; runs that share them bring their own."""

    def splits(self, settings: Resolved[Any], *, with_test: bool) -> dict[str, Any]:
        """See :func:`load_splits`."""
        return load_splits(settings, with_test=with_test)

    def model(self, config: ModelConfig, **keywords: Any) -> Any:
        """See :func:`preftune.models.loading.load_model_and_tokenizer`."""
        from preftune.models.loading import load_model_and_tokenizer

        return load_model_and_tokenizer(config, **keywords)


@dataclass
class Run:
    """One run of a training verb.

    Attributes:
        verb: One of :data:`TRAINING_VERBS`.
        argv: Arguments after the verb.
        settings: Resolved settings.
        snapshot: All values by role as they were resolved, before they are used up.
        console: Where the first process prints; the others have a silent one.
        sources: Where data and model come from.
    """

    verb: str
    argv: tuple[str, ...]
    settings: Resolved[Any]
    snapshot: dict[str, dict[str, Any]]
    console: Console
    sources: Sources = field(default_factory=lambda: Sources())

    @property
    def args(self) -> Any:
        """The trainer's settings."""
        return self.settings.trainer


def run(verb: str, argv: Sequence[str]) -> int:
    """Train.

    Args:
        verb: One of :data:`TRAINING_VERBS`.
        argv: Arguments after the verb.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        PreftuneError: Any foreseen failure.
    """
    line = split_command_line(argv)
    config_class, trainer_class = settings_classes(verb)
    if line.help:
        from preftune.cli.help import render

        groups = {"data and behaviour": ScriptConfig, "model": ModelConfig, "training": config_class}
        print(render(verb, VERBS[verb], groups, cli_defaults()))
        return 0
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    with plain_warnings(console):
        settings = resolve(line, config_class, defaults=cli_defaults(), elsewhere=lambda name: _other_verb(verb, name))
        return _run(Run(verb, tuple(argv), settings, {}, console), trainer_class)


def _run(this: Run, trainer_class: type[Any]) -> int:
    from transformers.utils.logging import disable_progress_bar

    from preftune.cli.advise import show_at_start

    # Bars for files that are read in a blink bury those that tell something.
    disable_progress_bar()
    with foreseen(this.args):
        complete_settings(this)
        dry_run = this.settings.script.dry_run
        with _output_dir(this.args.output_dir, kept=not dry_run), run_begun(this):
            this.snapshot.update(snapshot_of(this.settings))
            trainer, splits = build_trainer(this, trainer_class)
            plan = trainer.plan()
            _show(this, plan)
            show_at_start(this, trainer, plan)
            if dry_run:
                this.console.print("dry run: nothing was trained", highlight=False)
                return 0
            return _train(this, trainer, plan, splits)


# ---- settings -----------------------------------------------------------------------------------------------------


def settings_classes(verb: str) -> tuple[type[Any], type[Any]]:
    """Settings class and trainer class of a training verb."""
    from preftune import training

    prefix = verb.upper()
    return getattr(training, f"{prefix}Config"), getattr(training, f"{prefix}Trainer")


def cli_defaults() -> dict[str, Any]:
    """Where the command line refuses, while the Python classes, like TRL's, warn and go on.

    Transcripts of the HH kind are answered after their last shared ``Assistant:``, not after the first letters that two
    answers happen to share. On a machine without accelerator the processor is meant, so that nobody has to say so.
    """
    import torch

    return {
        "on_bad_rows": "error",
        "max_dropped_share": 0.1,
        "implicit_prompt": "transcript",
        "existing_output": "refuse",
        "use_cpu": not torch.accelerator.is_available(),
    }


def _other_verb(verb: str, name: str) -> str | None:
    others = [other for other in reversed(TRAINING_VERBS) if other != verb]
    return next((other for other in others if name in fields_of(settings_classes(other)[0])), None)


def snapshot_of(settings: Resolved[Any]) -> dict[str, dict[str, Any]]:
    """All values by role, as they stand at this moment."""
    holders = {"script": settings.script, "model": settings.model, "trainer": settings.trainer}
    return {
        role: {item.name: getattr(holder, item.name) for item in fields(holder) if item.init}
        for role, holder in holders.items()
    }


def complete_settings(this: Run) -> None:
    """Fill in what follows from other settings, and refuse what would have no effect."""
    script, args, origins = this.settings.script, this.args, this.settings.origins
    script.require_dataset()
    name = this.settings.model.require_model()
    if script.allow_drops:
        args.max_dropped_share = None
    if origins["output_dir"].kind == "default":
        args.output_dir = f"{name.rstrip('/').split('/')[-1]}-{this.verb.upper()}"
    complete_pairing(this.verb, this.settings)
    if args.on_bad_rows == "skip" and args.quarantine_path is None:
        args.quarantine_path = script.quarantine_path = os.path.join(args.output_dir, "quarantine.jsonl")
    if args.do_predict:
        raise ConfigError("there is no test run", where="do_predict", value=True, remedy="set do_eval")
    if origins["do_train"].kind != "default" and not args.do_train:
        raise ConfigError("without training there is nothing to do", where="do_train", value=False, remedy="--dry_run")
    if args.push_to_hub and not script.dry_run:
        _require_hub()
    check_paths(this.settings)


def check_paths(settings: Resolved[Any]) -> None:
    """Refuse places to write into that are, hold or lie in models, data or the cache.

    Raises:
        ConfigError: Naming both settings.
    """
    from preftune.config.paths import cache_home
    from preftune.ownership import check_places
    from preftune.training.checkpoints.output import is_result

    args, read = settings.trainer, places_read(settings)
    # A folder of the name of a file cannot be made, which is said later.
    written = {"output_dir": None if os.path.isfile(args.output_dir) else args.output_dir}
    check_places(written, read)
    check_places(written, {"PREFTUNE_CACHE": str(cache_home())}, may_hold=True)
    quarantine = args.quarantine_path
    check_places({"quarantine_path": quarantine}, read)
    if quarantine is None:
        return
    if os.path.isdir(quarantine):
        raise ConfigError("not a file", where="quarantine_path", value=quarantine, remedy="name a file")
    beside = os.path.realpath(os.path.dirname(quarantine)) == os.path.realpath(args.output_dir)
    if beside and is_result(os.path.basename(quarantine)):
        why = "a result of the run has this name"
        raise ConfigError(why, where="quarantine_path", value=quarantine, remedy="name another file")


def places_read(settings: Resolved[Any]) -> dict[str, str | None]:
    """Models and data by the setting that names them, wherever they are."""
    script, model, args = settings.script, settings.model, settings.trainer
    read: dict[str, str | None] = {name: getattr(model, name) for name in _MODELS if getattr(model, name, None)}
    read |= {
        f"dataset_name {name}" if script.dataset_name is None else "dataset_name": name
        for name in dataset_names(script)
    }
    read |= {name: str(getattr(args, name)) for name in ("chat_template_path",) if getattr(args, name, None)}
    return read


@contextmanager
def run_begun(this: Run) -> Iterator[None]:
    """Hold the output folder, and find the checkpoint to go on from, before anything is loaded.

    Raises:
        ConfigError: There is no such checkpoint, or another run's results are in the folder.
        SetupError: Another process is writing into it.
    """
    from preftune.ownership import holding
    from preftune.training.checkpoints.output import begin_early
    from preftune.training.checkpoints.trainer import resume_point

    args, dry_run = this.args, this.settings.script.dry_run
    first = os.environ.get("RANK", "0") == "0"
    if first and not args.resume_from_checkpoint:
        # Nothing is left in a folder that is refused.
        begin_early(args, None, dry=True)
    with holding(args.output_dir) if first and not dry_run else nullcontext():
        manifest = resume_point(args.resume_from_checkpoint, args.output_dir)
        args.resume_from_checkpoint = None if manifest is None else str(manifest.folder)
        if first:
            begin_early(args, manifest, dry=dry_run)
        yield


def complete_pairing(verb: str, settings: Resolved[Any]) -> None:
    """Single answers are what kto learns from, unless somebody wants pairs made of them."""
    if verb == "kto" and settings.origins["pairing"].kind == "default":
        settings.script.pairing = "none"


def _require_hub() -> None:
    """A run that cannot be pushed in the end should say so at the beginning."""
    from preftune.cli.network import hub_answers, is_offline

    if is_offline() or not hub_answers():
        raise SetupError(
            "the Hub cannot be reached",
            where="push_to_hub",
            value=True,
            remedy="leave push_to_hub out and run hf upload afterwards",
        )


@contextmanager
def _output_dir(path: str, *, kept: bool) -> Iterator[None]:
    """Find out now, not after training, that results cannot be written; a dry run leaves no folder behind."""
    missing, place = [], os.path.abspath(path)
    while not os.path.lexists(place):
        missing.append(place)
        place = os.path.dirname(place)
    try:
        try:
            os.makedirs(path, exist_ok=True)
        except OSError as error:
            raise SetupError(f"cannot make the folder ({error.strerror})", where="output_dir", value=path) from error
        yield
    finally:
        for folder in [] if kept else missing:
            # What is not empty belongs to somebody.
            with suppress(OSError):
                os.rmdir(folder)


# ---- data, model, trainer -----------------------------------------------------------------------------------------


def build_trainer(this: Run, trainer_class: type[Any]) -> tuple[Any, dict[str, Any]]:
    """Load data and model, and make the trainer.

    Args:
        this: The run, with its settings completed.
        trainer_class: Class of the trainer.

    Returns:
        The trainer, and the rows by split.

    Raises:
        PreftuneError: Data, model or settings cannot be used.
    """
    from preftune.cli.network import go_offline_if_unreachable

    script, model, args = this.settings.script, this.settings.model, this.args
    with this.console.status("loading data"):
        offline = go_offline_if_unreachable([*dataset_names(script), model.model_name_or_path])
        splits = this.sources.splits(this.settings, with_test=_evaluates(args))
    if offline:
        this.console.print(offline, style="yellow", highlight=False)
    compares = this.verb in _WITH_REFERENCE
    with this.console.status("loading model"):
        loaded = this.sources.model(model, model_init_kwargs=args.model_init_kwargs, with_reference=compares)
    if not compares and model.ref_model_name_or_path:
        raise ConfigError(f"{this.verb} has no reference model", where="ref_model_name_or_path", remedy="leave it out")
    # They are used up; the trainer would otherwise warn that they come too late.
    args.model_init_kwargs = None
    if hasattr(args, "dataset_text_field"):
        # Loading has given it this name.
        args.dataset_text_field = "text"
    keywords: dict[str, Any] = {"ref_model": loaded.ref_model} if compares else {}
    with this.console.status("preparing data"), trainer_errors():
        trainer = trainer_class(
            model=loaded.model,
            args=args,
            train_dataset=splits["train"],
            eval_dataset=splits.get("test"),
            processing_class=loaded.tokenizer,
            peft_config=loaded.peft_config,
            **keywords,
        )
    if script.ignore_bias_buffers:
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if str(buffer.dtype) == "torch.bool"
        ]
    return trainer, splits


def _evaluates(args: Any) -> bool:
    return str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no" or bool(args.do_eval)


def dataset_names(script: ScriptConfig) -> list[str]:
    """Names of all datasets that the settings mention."""
    if script.dataset_mixture:
        entries = script.dataset_mixture.get("datasets")
        return [str(entry.get("id")) for entry in entries or [] if isinstance(entry, Mapping)]
    return [*(script.dataset_mixer or {}), *([script.dataset_name] if script.dataset_name else [])]


def reading_of(args: Any) -> dict[str, Any]:
    """How a verb's settings want the columns of its data to be read."""
    if isinstance(args, settings_classes("sft")[0]):
        return {"for_sft": True}
    return {"implicit_prompt": args.implicit_prompt}


def load_splits(settings: Resolved[Any], *, with_test: bool) -> dict[str, Any]:
    """Load the data that the settings name.

    Args:
        settings: Resolved settings.
        with_test: Whether the run evaluates.

    Returns:
        ``train``, and ``test`` if it is asked for.

    Raises:
        ConfigError: If there is no test split to evaluate on.
        DataError: If the data cannot be found, read or used.
    """
    from preftune.data import load

    script, args = settings.script, settings.trainer
    common: dict[str, Any] = {
        "columns": script.dataset_columns,
        "dataset_format": args.dataset_format,
        "pairing": script.pairing,
        "on_bad_rows": args.on_bad_rows,
        "seed": args.seed,
        "with_test": with_test,
        **reading_of(args),
    }
    name, quarantine = script.dataset_name, args.quarantine_path
    if name is None:
        several = {key: getattr(script, key) for key in ("dataset_mixture", "dataset_mixer", "dataset_splits")}
        splits = load(**several, dataset_config=script.dataset_config, quarantine_path=quarantine, **common)
    else:
        common["dataset_config"] = script.dataset_config
        text = getattr(args, "dataset_text_field", "text")
        if text != "text" and not script.dataset_columns:
            common["columns"] = {text: "text"}
        splits = load(name, split=script.dataset_train_split, quarantine_path=quarantine, **common)
        if with_test and ("test" not in splits or settings.origins["dataset_test_split"].kind != "default"):
            splits["test"] = load(name, split=script.dataset_test_split, **common)["train"]
    if with_test and "test" not in splits:
        raise ConfigError(
            "evaluation is switched on, and the data have no test split",
            where="eval_strategy",
            remedy="set test_split_size in dataset_mixture, or eval_strategy: 'no'",
        )
    return splits


# ---- training and what follows -------------------------------------------------------------------------------------


def _show(this: Run, plan: Any) -> None:
    from preftune.cli.panel import summary

    panel = summary(plan, paired=this.verb in _PAIRED, output_dir=str(this.args.output_dir), notes=this.settings.notes)
    this.console.print(panel)


def _train(this: Run, trainer: Any, plan: Any, splits: Mapping[str, Any]) -> int:
    from preftune.cli.callbacks import StopOnSignal, replace_progress, say_to_stderr
    from preftune.cli.trackers import OneMlflowRun
    from preftune.training.guards import find_guards
    from preftune.training.live import LiveLog

    stop = StopOnSignal(say_to_stderr if trainer.is_world_process_zero() else lambda text: None)
    progress = replace_progress(trainer, this.console)
    guards = find_guards(trainer)
    if guards is not None:
        guards.say = lambda text: this.console.print(text, markup=False, highlight=False, soft_wrap=True)
    trainer.add_callback(stop)
    trainer.add_callback(LiveLog())
    trainer.add_callback(OneMlflowRun())
    try:
        outcome = trainer.train(resume_from_checkpoint=this.args.resume_from_checkpoint)
    except KeyboardInterrupt:
        if not trainer.state.global_step:
            this.console.print("stopped before the first step; finished reference log-probs are kept", highlight=False)
        raise
    finally:
        progress.close()
        stop.restore()
    if stop.stopped_at is not None and stop.stopped_at < trainer.state.max_steps:
        checkpoint = os.path.join(this.args.output_dir, f"checkpoint-{stop.stopped_at}")
        saved = f"saved {checkpoint}" if os.path.isdir(checkpoint) else f"checkpoint-{stop.stopped_at} was not saved"
        this.console.print(
            f"stopped; {saved}\nto go on: {resume_command(this.verb, this.argv)}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        end_trainer(trainer)
        return INTERRUPTED
    results = dict(outcome.metrics)
    trainer.save_metrics("train", outcome.metrics)
    if splits.get("test") is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        results |= metrics
    if guards is not None:
        lines = "\n".join(["guards", *(f"  {line}" for line in guards.summary())])
        this.console.print(lines, markup=False, highlight=False, soft_wrap=True)
    # Pushed once, below, when everything is there.
    trainer.save_model(this.args.output_dir, _internal_call=True)
    trainer.save_state()
    if trainer.is_world_process_zero():
        leave_records(this, trainer, plan, splits, results)
    this.console.print(f"saved {this.args.output_dir}", markup=False, highlight=False)
    _push(this, trainer)
    end_trainer(trainer)
    complaint = trainer.output.complaint()
    if complaint is not None:
        raise complaint
    return 0


def resume_command(verb: str, argv: Sequence[str]) -> str:
    """The same command line, going on from the last checkpoint."""
    kept: list[str] = []
    skipping = False
    for token in argv:
        if token.startswith("--"):
            skipping = token.partition("=")[0].replace("-", "_") == "__resume_from_checkpoint"
        if not skipping:
            kept.append(token)
    # It is printed, and what is printed ends up in logs.
    return shlex.join(redact_argv(["preftune", verb, *kept, "--resume_from_checkpoint", "true"]))


def leave_records(this: Run, trainer: Any, plan: Any, splits: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Provenance and model card beside the weights."""
    from preftune.cli.records import make_card
    from preftune.training import card, provenance

    data = {
        split: {"names": dataset_names(this.settings.script), **provenance.describe_dataset(dataset)}
        for split, dataset in splits.items()
    }
    document = provenance.collect(
        argv=[this.verb, *this.argv],
        settings=this.snapshot,
        origins=this.settings.origins,
        plan=plan,
        data=data,
        results=results,
        notes=this.settings.notes,
        num_processes=this.args.world_size,
    )
    provenance.write(this.args.output_dir, document)
    made = make_card(
        this.verb, this.snapshot, this.settings.origins, plan, dataset_names(this.settings.script), results
    )
    card.write(this.args.output_dir, made)
    # A push would write the library's own card over it.
    trainer.create_model_card = lambda *args, **kwargs: None


def _last_figures(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the last training line said about rewards and the like."""
    last: Mapping[str, Any] = next((entry for entry in reversed(history) if "loss" in entry), {})
    return {name: value for name, value in last.items() if "/" in name or name == "entropy"}


def _push(this: Run, trainer: Any) -> None:
    if not this.args.push_to_hub:
        return
    try:
        trainer.push_to_hub(commit_message="End of training")
    except Exception as error:
        # Whatever the network does, the run itself is complete and on disk.
        raise SetupError(
            f"the push failed ({flat(error)[:200]}); everything is in {this.args.output_dir}",
            where="push_to_hub",
            remedy=f"run hf upload {this.args.hub_model_id or 'REPOSITORY'} {this.args.output_dir}",
        ) from error


def end_trainer(trainer: Any) -> None:
    """End what goes on beside a trainer: trackers and process groups."""
    from preftune.cli.trackers import OneMlflowRun

    run = trainer.pop_callback(OneMlflowRun)
    if run is not None:
        run.close()
    end: Callable[[], None] | None = getattr(trainer, "end", None)  # transformers 5.18 and later
    if end is not None:
        end()
