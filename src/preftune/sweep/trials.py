"""One trial of a sweep: the run that the training verb would do with these settings, on shared model and data."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Hashable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from preftune.bars import take_bars
from preftune.config import CommandLine, ModelConfig, Resolved
from preftune.errors import DataError, ModelError, PreftuneError, TrainingError, flat
from preftune.runs.data import load_splits
from preftune.runs.failures import foreseen
from preftune.runs.mlflow import OneMlflowRun
from preftune.runs.run import Run, Sources, build_trainer, end_trainer, record
from preftune.runs.settings import read_settings, settings_classes
from preftune.sweep import runner
from preftune.sweep.locks import one_at_a_time
from preftune.sweep.plan import BASE_NAME, Plan, write_yaml
from preftune.sweep.result import remove_weights, trial_settings
from preftune.sweep.runner import Observer, Outcome, TrialSpec
from preftune.sweep.scores import KL, OWN_TAIL, TAIL, HeldOut, held_out_of, metrics_of, with_interval
from preftune.sweep.shared import Base, Shelf, sharing
from preftune.sweep.space import as_flag
from preftune.sweep.trackers import grouped
from preftune.sweep.watch import Watch
from preftune.sweep.worker import begin_folder
from preftune.training.progress_log import LiveLog

#: Settings of the adapter: they do not touch the base that is loaded.
_ADAPTER = ("lora_", "use_rslora", "use_dora")
#: Settings that decide which rows are loaded.
_ROWS = ("dataset_format", "on_bad_rows", "seed")
#: Longest sample: what has left the reference shows in its first tokens, and drawing takes long.
_SAMPLE_TOKENS = 64
#: Samples drawn at once, and for models of more parameters than that: their key-value caches take memory.
_BATCH, _SMALL_BATCH, _LARGE_MODEL = 64, 16, 1_000_000_000


class SharedSources(Sources):
    """Rows and base model, loaded once per process.

    Args:
        shelf: Where they are kept.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self.base: Base | None = None

    def splits(self, settings: Resolved[Any], *, with_test: bool) -> dict[str, Any]:
        """The rows, loaded on first use."""
        own = tuple(str(getattr(settings.trainer, name)) for name in _ROWS)
        key = (_values(settings.script, skip=("quarantine_path", "dry_run")), with_test, own)
        return dict(self._shelf.get("rows", key, lambda: load_splits(settings, with_test=with_test)))

    def model(self, config: ModelConfig, **keywords: Any) -> Any:
        """A fresh start from the base, which is loaded on first use."""
        from preftune.models.loading import peft_config_from

        def make() -> Base:
            return Base(Sources.model(self, config, **keywords))

        # One base at a time: a second one may not fit.
        self.base = self._shelf.get("base", base_key(config, keywords), make, 1)
        return self.base.fresh(peft_config_from(config))


def base_key(config: ModelConfig, keywords: Any = ()) -> Hashable:
    """What decides which base is loaded."""
    skip = tuple(item.name for item in fields(config) if item.name.startswith(_ADAPTER))
    return (_values(config, skip=skip), repr(keywords))


def _values(holder: Any, skip: Sequence[str]) -> str:
    return repr([(item.name, getattr(holder, item.name)) for item in fields(holder) if item.name not in skip])


class PairTrials:
    """Runs the trials of paired methods one after the other.

    Args:
        plan: The sweep.
        folder: Its folder.
    """

    max_trials = 1

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.shelf = Shelf()
        self.sources = SharedSources(self.shelf)
        self._num_done = 0

    def run(self, trials: Sequence[TrialSpec], observer: Observer) -> list[Outcome]:
        """Run trials."""
        if not self._num_done:
            # What the libraries made while they were imported outlives every trial. Looking through that
            # for garbage takes a tenth of a small one.
            gc.collect()
            gc.freeze()
        return [self._run_one(trial, observer) for trial in trials]

    def _run_one(self, trial: TrialSpec, observer: Observer) -> Outcome:
        started = time.monotonic()
        begin_folder(self.folder, trial.folder)
        try:
            outcome = self._train(trial, observer)
            self._num_done += 1
        except (DataError, ModelError) as error:
            if not self._num_done:
                # Data or model cannot be used at all: no trial would fare better.
                raise
            outcome = Outcome(runner.FAILED, str(error))
        except TrainingError as error:
            outcome = Outcome(runner.DIVERGED, str(error))
        except PreftuneError as error:
            outcome = Outcome(runner.FAILED, str(error))
        except Exception as error:
            (trial.folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
            reason = f"{type(error).__name__}: {flat(error)[:200]}; see {trial.folder / 'error.txt'}"
            outcome = Outcome(runner.FAILED, reason)
        finally:
            _free_memory()
        outcome.seconds = time.monotonic() - started
        return outcome

    # ---- one trial -------------------------------------------------------------------------------------------------

    def settings(self, trial: TrialSpec) -> Run:
        """The trial's settings, as if they had been given to its verb."""
        verb, place = self.plan.verb, self.folder.resolve().name
        flags = [(name, as_flag(value), f"--param {name}") for name, value in trial.params.items()]
        flags += [("output_dir", (str(trial.folder),), "--out"), ("disable_tqdm", ("true",), "--out")]
        if "run_name" not in self.plan.base:
            flags.append(("run_name", (f"{place}-{trial.number:03d}",), "--out"))
        if "project" not in self.plan.base:
            flags.append(("project", (place,), "--out"))
        line = CommandLine((str(self.folder / BASE_NAME),), tuple(flags))
        resolved = read_settings(verb, line)
        argv = tuple(text for name, values, _ in flags for text in (f"--{name}", *values))
        return Run(verb, ("--config", line.configs[0], *argv), resolved, sources=self.sources)

    def _train(self, trial: TrialSpec, observer: Observer) -> Outcome:
        this = self.settings(trial)
        with grouped(self.folder.resolve().name, this.args.report_to, self.folder):
            return self._train_one(this, trial, observer)

    def _train_one(self, this: Run, trial: TrialSpec, observer: Observer) -> Outcome:
        write_yaml(trial.folder / "config.yaml", trial_settings(self.plan, trial.params, trial.folder))
        rewards: list[Any] = []

        def collect(prediction: Any) -> dict[str, float]:
            rewards[:] = [prediction.predictions]
            return {}

        with foreseen(this.args):
            this.complete()
            key = (base_key(this.settings.model), this.args.chat_template, this.args.pad_token)
            trainer_class = sharing(settings_classes(self.plan.verb)[1], self.shelf, key, collect)
            trainer, splits = build_trainer(this, trainer_class)
            known: list[HeldOut] = []

            def pairs() -> HeldOut:
                # Every evaluation sees the same pairs: their tokens are gone through once.
                if not known:
                    known.append(held_out_of(rewards[0], trainer.eval_dataset, this.args.beta))
                return known[0].with_rewards(rewards[0])

            watch = Watch(trial, observer, self.plan.diverge_factor, lambda: pairs().means())
            results = self._fit(trial, trainer, watch)
            held = pairs() if "eval_loss" in results else None
            metrics = metrics_of(results, held, self.plan.seed)
            if watch.state == runner.COMPLETE and metrics.get(self.plan.metric, {}).get("mean") is None:
                watch.state, watch.reason = runner.DIVERGED, f"{self.plan.metric} is not a number"
            if watch.state == runner.COMPLETE:
                metrics |= self._sampled(trainer)
            self._leave(this, trial, trainer, splits, results, held, keep=watch.state == runner.COMPLETE)
        reference = getattr(trainer, "reference", None)
        return Outcome(
            watch.state,
            watch.reason,
            metrics,
            num_scored=0 if reference is None else reference.num_scored,
            num_found=0 if reference is None else reference.num_found,
            num_steps=trainer.state.global_step,
        )

    def _fit(self, trial: TrialSpec, trainer: Any, watch: Watch) -> dict[str, Any]:
        take_bars(trainer)
        trainer.add_callback(watch)
        trainer.add_callback(LiveLog())
        trainer.add_callback(OneMlflowRun())
        with one_at_a_time(self.folder / "reference.lock"):
            trainer.prepare_reference()
        fitted = trainer.train()
        trainer.save_metrics("train", fitted.metrics)
        results = dict(fitted.metrics)
        watch.look_at_alarms(trial.folder)
        if watch.state in (runner.COMPLETE, runner.STOPPED):
            evaluated = trainer.evaluate()
            trainer.save_metrics("eval", evaluated)
            results |= evaluated
        return results

    def _leave(
        self,
        this: Run,
        trial: TrialSpec,
        trainer: Any,
        splits: Any,
        results: Any,
        held: HeldOut | None,
        *,
        keep: bool,
    ) -> None:
        if held is not None:
            held.save(trial.folder)
        if keep and self.plan.keep != "none":
            trainer.save_model(str(trial.folder))
        elif self.plan.keep != "all":
            remove_weights(trial.folder)
        trainer.save_state()
        record(this, trainer, trainer.plan(), splits, results)
        end_trainer(trainer)

    def _sampled(self, trainer: Any) -> dict[str, dict[str, Any]]:
        """How far the policy's own samples are from the reference.

        Nothing where the tokenizer has no end of text, or for fewer than two prompts.
        """
        from preftune.evaluation.sampling import continue_prompts, summed_ratios, tail_shares

        if not self.plan.num_samples or trainer.processing_class.eos_token_id is None:
            return {}
        # Tokens as they were trained on: with the chat template's own special tokens, and truncated.
        distinct = dict.fromkeys(tuple(ids) for ids in trainer.eval_dataset["prompt_ids"] if len(ids))
        prompts = list(distinct)[: self.plan.num_samples]
        if len(prompts) < 2:
            return {}
        longest = int(np.percentile([len(ids) for ids in trainer.eval_dataset["chosen_ids"]], 95))
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        batch_size = _SMALL_BATCH if model.num_parameters() > _LARGE_MODEL else _BATCH
        samples = continue_prompts(
            model,
            trainer.processing_class,
            prompts,
            max_new_tokens=min(max(longest, 1), _SAMPLE_TOKENS),
            seed=self.plan.seed,
            batch_size=batch_size,
        )
        assert self.sources.base is not None
        seen = tail_shares(
            self.sources.base.reference.to(model.device),
            [(sample.prompt_ids, sample.token_ids) for sample in samples],
            batch_size=batch_size,
        )
        ratios = summed_ratios(samples, [logps for logps, _, _ in seen])
        shares, own = (np.array([each[column] for each in seen]) for column in (1, 2))
        found = {KL: ratios, TAIL: shares, OWN_TAIL: own}
        return {name: with_interval(v, range(len(samples)), self.plan.seed) for name, v in found.items()}


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
