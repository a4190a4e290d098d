"""A run: its settings, data, model and trainer; training, and the records it leaves."""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from preftune.config import ModelConfig, Resolved, redact_argv
from preftune.data import DataWarning
from preftune.errors import ConfigError, SetupError, flat
from preftune.models.loading import load_model_and_tokenizer
from preftune.runs.data import dataset_names, load_splits
from preftune.runs.failures import trainer_errors
from preftune.runs.folder import check_paths, held_folder
from preftune.runs.mlflow import OneMlflowRun
from preftune.runs.network import go_offline_if_unreachable
from preftune.runs.records import leave_records
from preftune.runs.settings import complete_settings, snapshot_of
from preftune.runs.stopping import StopOnSignal, say_to_stderr
from preftune.training.guards import find_guards
from preftune.training.notices import Telling
from preftune.training.progress_log import LiveLog
from preftune.verbs import TRAINING


class Sources:
    """Where a run's data and model come from; runs that share them bring their own."""

    def splits(self, settings: Resolved[Any], *, with_test: bool) -> dict[str, Any]:
        """See :func:`load_splits`."""
        return load_splits(settings, with_test=with_test, may_stream=True)

    def model(self, config: ModelConfig, **keywords: Any) -> Any:
        """See :func:`preftune.models.loading.load_model_and_tokenizer`."""
        return load_model_and_tokenizer(config, **keywords)


@dataclass
class Run:
    """One run of a training verb.

    Attributes:
        verb: One of :data:`TRAINING_VERBS`.
        argv: Arguments after the verb.
        settings: Resolved settings.
        console: Where the first process prints; the others have a silent one.
        sources: Where data and model come from.
        again: Command that goes on where the run stops, where it is not its own with a checkpoint.
        snapshot: All values by role as they were resolved, before they are used up.
        has_test: Whether rows are held out; known once they are loaded.
    """

    verb: str
    argv: tuple[str, ...]
    settings: Resolved[Any]
    console: Console = field(default_factory=lambda: Console(quiet=True))
    sources: Sources = field(default_factory=Sources)
    again: str | None = None
    snapshot: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)
    has_test: bool = field(default=False, init=False)

    @property
    def args(self) -> Any:
        """The trainer's settings."""
        return self.settings.trainer

    def complete(self) -> None:
        """Fill in what follows from other settings, and keep all of them for the records.

        Raises:
            ConfigError: A setting would have no effect, a required one is missing, or a place to write into is one
                that is read.
            SetupError: The Hub is needed, and cannot be reached.
        """
        complete_settings(self.verb, self.settings)
        check_paths(self.settings)
        self.snapshot = snapshot_of(self.settings)

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Hold the output folder, and find the checkpoint to go on from, before anything is loaded.

        Without it, the trainer does so when it begins to train.

        Raises:
            ConfigError: There is no such checkpoint, or another run's results are in the folder.
            SetupError: The folder cannot be made, or another process is writing into it.
        """
        with held_folder(self.args, dry_run=self.settings.script.dry_run):
            self.snapshot = snapshot_of(self.settings)
            yield


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
    script, model, args = this.settings.script, this.settings.model, this.args
    with this.console.status("loading data"):
        offline = go_offline_if_unreachable([*dataset_names(script), model.model_name_or_path])
        splits = this.sources.splits(this.settings, with_test=_evaluates(args))
        this.has_test = "test" in splits
    if offline:
        this.console.print(offline, style="yellow", highlight=False)
    compares = TRAINING[this.verb].reference
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
    with this.console.status("preparing data"), trainer_errors(), warnings.catch_warnings():
        # The summary says it all.
        warnings.simplefilter("ignore", DataWarning)
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


def train(this: Run, trainer: Any, plan: Any, splits: Mapping[str, Any]) -> bool:
    """Train, evaluate, and leave weights and records in the output folder.

    Args:
        this: The run.
        trainer: Its trainer.
        plan: What it is going to do.
        splits: The rows by split.

    Returns:
        Whether it came to its end; a run that was stopped has left a checkpoint, and the command that goes on from it
        is printed.

    Raises:
        KeyboardInterrupt: Ctrl-C before the first step, or twice.
        PreftuneError: Training, a checkpoint that is missing in the end, or the push to the Hub failed.
    """
    stop = StopOnSignal(say_to_stderr if trainer.is_world_process_zero() else lambda text: None)
    # The command line tells all of this itself.
    trainer.remove_callback(Telling)
    guards = find_guards(trainer)
    if guards is not None:
        guards.say = lambda text: _say(this, text)
    for callback in (stop, LiveLog(), OneMlflowRun()):
        trainer.add_callback(callback)
    try:
        outcome = trainer.train(resume_from_checkpoint=this.args.resume_from_checkpoint)
    except KeyboardInterrupt:
        if not trainer.state.global_step:
            _say(this, "stopped before the first step; finished reference log-probs are kept")
        raise
    finally:
        stop.restore()
    if stop.stopped_at is not None and stop.stopped_at < trainer.state.max_steps:
        checkpoint = os.path.join(this.args.output_dir, f"checkpoint-{stop.stopped_at}")
        saved = f"saved {checkpoint}" if os.path.isdir(checkpoint) else f"checkpoint-{stop.stopped_at} was not saved"
        _say(this, f"stopped; {saved}\nto go on: {this.again or resume_command(this.verb, this.argv)}")
        end_trainer(trainer)
        return False
    results = dict(outcome.metrics)
    trainer.save_metrics("train", outcome.metrics)
    if splits.get("test") is not None:
        metrics = _last_evaluation(trainer) or trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        results |= metrics
    if guards is not None:
        _say(this, "\n".join(["guards", *(f"  {line}" for line in guards.summary())]))
    # Pushed once, below, when everything is there.
    trainer.save_model(this.args.output_dir, _internal_call=True)
    trainer.save_state()
    if trainer.is_world_process_zero():
        record(this, trainer, plan, splits, results)
    this.console.print(f"saved {this.args.output_dir}", markup=False, highlight=False)
    _push(this, trainer)
    end_trainer(trainer)
    complaint = trainer.output.complaint()
    if complaint is not None:
        raise complaint
    return True


def _last_evaluation(trainer: Any) -> dict[str, Any] | None:
    """The evaluation of the last step, if there was one and the weights are still those that it was of."""
    if trainer.args.load_best_model_at_end:
        return None
    for entry in reversed(trainer.state.log_history):
        found = {name: value for name, value in entry.items() if name.startswith("eval_")}
        if found and entry.get("step") == trainer.state.global_step:
            return found | ({"epoch": entry["epoch"]} if "epoch" in entry else {})
    return None


def record(this: Run, trainer: Any, plan: Any, splits: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Leave provenance and model card beside the weights."""
    leave_records(this.verb, this.argv, this.settings, this.snapshot, plan, splits, results)
    # A push would write the library's own card over it.
    trainer.create_model_card = lambda *args, **kwargs: None


def _say(this: Run, text: str) -> None:
    this.console.print(text, markup=False, highlight=False, soft_wrap=True)


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
    run = trainer.pop_callback(OneMlflowRun)
    if run is not None:
        run.close()
    end: Callable[[], None] | None = getattr(trainer, "end", None)  # transformers 5.18 and later
    if end is not None:
        end()
