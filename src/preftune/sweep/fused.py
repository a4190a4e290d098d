"""Several trials of a sweep in one forward: LoRA adapters over one frozen base, each ending where it ends alone."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from preftune.bars import take_bars
from preftune.files import replace_text
from preftune.ownership import RunFolder, active, new_id
from preftune.runs.failures import foreseen
from preftune.runs.run import Run, build_trainer, end_trainer, record
from preftune.sweep import runner
from preftune.sweep.locks import one_at_a_time
from preftune.sweep.plan import Plan, write_yaml
from preftune.sweep.result import trial_settings
from preftune.sweep.runner import Observer, Outcome, TrialSpec
from preftune.sweep.scores import held_out_of, metrics_of
from preftune.sweep.shared import sharing
from preftune.sweep.trackers import grouped, replay, take_trackers
from preftune.sweep.trials import PairTrials, base_key
from preftune.sweep.watch import Watch
from preftune.sweep.worker import begin_folder
from preftune.training.provenance import plain


class FusedTrials(PairTrials):
    """Runs as many trials at once as the plan says, in one forward.

    A trial whose loss or gradient stops being finite is not updated any more and is run again by
    itself, so that its end is told as it would be alone.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        super().__init__(plan, folder)
        self.max_trials = plan.fuse

    def run(self, trials: Sequence[TrialSpec], observer: Observer) -> list[Outcome]:
        """Run trials."""
        if len(trials) == 1:
            return super().run(trials, observer)
        started = time.monotonic()
        for trial in trials:
            begin_folder(self.folder, trial.folder)
        found = self._train_together(trials, observer)
        self._num_done += len(trials)
        seconds = (time.monotonic() - started) / len(trials)
        outcomes = []
        for trial, outcome in zip(trials, found, strict=True):
            if outcome is None:
                outcomes += super().run([trial], observer)
            else:
                outcomes.append(replace(outcome, seconds=seconds))
        return outcomes

    def _train_together(self, trials: Sequence[TrialSpec], observer: Observer) -> list[Outcome | None]:
        from preftune.training.fused import FusedTrainer

        runs = [self.settings(trial) for trial in trials]
        names = [dimension.name for dimension in self.plan.dimensions]
        changes = [{name: getattr(run.args, name) for name in names} for run in runs]

        class Configured(FusedTrainer):
            def __init__(self, **keywords: Any) -> None:
                super().__init__(configurations=changes, **keywords)

        rewards: list[Any] = []

        def collect(prediction: Any) -> dict[str, float]:
            rewards[:] = [prediction.predictions]
            return {}

        first = runs[0]
        with foreseen(first.args):
            for run in runs:
                run.complete()
            key = (base_key(first.settings.model), first.args.chat_template, first.args.pad_token)
            trainer, splits = build_trainer(first, sharing(Configured, self.shelf, key, collect))
            trackers = take_trackers(trainer)
            watches = [Watch(trial, observer, self.plan.diverge_factor) for trial in trials]
            history = self._fit_together(trainer, watches)
            outcomes: list[Outcome | None] = []
            for number, (trial, run) in enumerate(zip(trials, runs, strict=True)):
                if number in trainer.lost or watches[number].state != runner.COMPLETE:
                    outcomes.append(None)
                    continue
                held = held_out_of(rewards[0][:, number], trainer.eval_dataset, run.args.beta)
                results = own_lines(history[-1:], number)[0] | {"train_loss": trainer.mean_losses()[number]}
                metrics = metrics_of(results, held, self.plan.seed)
                trainer.use(number)
                metrics |= self._sampled(trainer)
                held.save(trial.folder)
                lines = own_lines(history, number)
                self._leave_one(run, trial, trainer, splits, results, lines, number)
                with grouped(self.folder.resolve().name, run.args.report_to, self.folder):
                    replay([kind() for kind in trackers], run.args, trainer.model, trainer.state, lines)
                reference = trainer.reference
                outcome = Outcome(runner.COMPLETE, "", metrics, num_steps=trainer.state.global_step)
                if reference is not None and not number:
                    # The reference was looked up once for all of them.
                    outcome.num_scored, outcome.num_found = reference.num_scored, reference.num_found
                outcomes.append(outcome)
            end_trainer(trainer)
        return outcomes

    def _fit_together(self, trainer: Any, watches: Sequence[Watch]) -> list[dict[str, Any]]:
        """Train and evaluate. Returns the log lines, the last one those of the final evaluation."""
        take_bars(trainer)
        trainer.add_callback(_Shared(watches))
        with one_at_a_time(self.folder / "reference.lock"):
            trainer.prepare_reference()
        trainer.train()
        trainer.evaluate()
        return [dict(line) for line in trainer.state.log_history]

    def _leave_one(
        self,
        this: Run,
        trial: TrialSpec,
        trainer: Any,
        splits: Any,
        results: Mapping[str, Any],
        history: list[dict[str, Any]],
        number: int,
    ) -> None:
        """What a trial by itself leaves in its folder."""
        from safetensors.torch import save_file

        write_yaml(trial.folder / "config.yaml", trial_settings(self.plan, trial.params, trial.folder))
        folder = active(trial.folder) or RunFolder.open(trial.folder, new_id())
        if self.plan.keep != "none":
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in trainer.adapter_state(number).items()}
            save_file(state, str(trial.folder / "adapter_model.safetensors"), metadata={"format": "pt"})
            folder.note(["adapter_model.safetensors"])
            trainer.model.peft_config[trainer.names[0]].save_pretrained(str(trial.folder))
            trainer.processing_class.save_pretrained(str(trial.folder))
        replace_text(trial.folder / "all_results.json", json.dumps(plain(dict(results)), indent=4) + "\n")
        replace(trainer.state, log_history=history).save_to_json(str(trial.folder / "trainer_state.json"))
        record(this, trainer, trainer.plan(), splits, results)


def own_lines(history: Sequence[Mapping[str, Any]], number: int) -> list[dict[str, Any]]:
    """Log lines as one configuration alone would have written them: its own figures, and what all share."""
    return [_own_line(line, number) for line in history]


def _own_line(line: Mapping[str, Any], number: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in line.items():
        prefix = "eval_" if key.startswith("eval_") else ""
        owner, slash, rest = key.removeprefix(prefix).partition("/")
        if not (slash and owner.isdigit()):
            found.setdefault(key, value)
        elif int(owner) == number:
            found[prefix + rest] = value
    return found


class _Shared(Watch):
    """Hands every watch the lines of its own trial; a trial that is given up does not stop the others."""

    def __init__(self, watches: Sequence[Watch]) -> None:
        self.watches = watches

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell how far each is."""
        for watch in self.watches:
            watch.on_step_end(args, state, replace(control), **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Look for divergence, trial by trial."""
        for number, watch in enumerate(self.watches):
            watch.on_log(args, state, replace(control), _own_line(logs or {}, number), **kwargs)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Nothing is pruned."""
