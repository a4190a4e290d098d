"""The callback that holds a run's guards: shows them evidence, passes alarms on, and survives a restart."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from preftune.training.guards.alarm import ALARMS, Alarm, up_to_step, write_lines
from preftune.training.guards.base import Guard, Reading
from preftune.training.guards.evidence import Generation, HeldOut, Moments, Window
from preftune.training.guards.table import GUARDS

_LOG = logging.getLogger("preftune.guards")
#: What guards lack, by what they need.
_LACKING = {
    "heldout": "nothing is evaluated during training (set eval_strategy, and give evaluation data)",
    "generations": "nothing is sampled from the policy (set generation_steps)",
}
#: Guards of the training itself; those of held-out data are kept per data set, under its name.
_RUN = ""


class Guards(TrainerCallback, ExportableState):
    """A run's guards.

    Every guard watches training and samples once, and each held-out data set once more. What they know is part of the
    checkpoints, so that a resumed run raises the alarms that it would have raised without the interruption.

    Args:
        actions: ``warn`` or ``stop`` by name of the guard; guards not named are off.
        output_dir: Folder of ``alarms.jsonl``; none is written where it is empty.

    Attributes:
        active: Whether training has begun.
        alarms: What was said so far, that of a resumed run included.
        say: Gets a line for every alarm; by default the logger ``preftune.guards``.
        lacking: Guards that cannot fire in this run, and what they lack.
    """

    def __init__(self, actions: dict[str, str], output_dir: str = "") -> None:
        self.actions = actions
        self.output_dir = output_dir
        self.active = False
        self.alarms: list[dict[str, Any]] = []
        self.say: Callable[[str], None] = _LOG.warning
        self.lacking: dict[str, str] = {}
        self._reset()

    def _reset(self) -> None:
        self._guards: dict[str, dict[str, Guard]] = {}
        self._since: dict[str, Moments] = {}
        self._before = Moments()
        self._generation: Generation | None = None
        self._stop = False
        self._resumed_at = 0

    def set_sources(self, *, heldout: bool, generations: bool) -> None:
        """Say what evidence the run is going to have."""
        there = {"": True, "heldout": heldout, "generations": generations}
        self.lacking = {name: _LACKING[GUARDS[name].needs] for name in self.actions if not there[GUARDS[name].needs]}

    # ---- evidence -------------------------------------------------------------------------------------------------

    def observe(self, evidence: Window | HeldOut | Generation, *, writes: bool = True) -> dict[str, float]:
        """Show evidence to the guards.

        Args:
            evidence: What was seen.
            writes: Whether this process writes files and speaks; all processes come to the same decisions.

        Returns:
            Figures for the log line: ``guards/<name>`` is 1 where a guard fired.
        """
        if isinstance(evidence, HeldOut) and evidence.step and evidence.step == self._resumed_at:
            # With eval_on_start a resumed run evaluates once more than one that was not interrupted.
            return {}
        if isinstance(evidence, Window):
            found = self._ask(_RUN, evidence)
            self._before = self._before + evidence.pairs
            self._since = {split: since + evidence.pairs for split, since in self._since.items()}
        elif isinstance(evidence, HeldOut):
            since = self._since.get(evidence.split, self._before)
            evidence = replace(evidence, train=since, generation=self._generation)
            self._since[evidence.split] = Moments()
            found = self._ask(evidence.split, evidence)
        else:
            self._generation = evidence
            found = self._ask(_RUN, evidence)
        return self._raise(found, evidence, writes)

    def _ask(self, split: str, evidence: Window | HeldOut | Generation) -> list[tuple[Guard, Reading]]:
        guards = self._guards.setdefault(split, {name: GUARDS[name]() for name in GUARDS if name in self.actions})
        readings = [(guard, guard.observe(evidence)) for guard in guards.values()]
        return [(guard, reading) for guard, reading in readings if reading is not None]

    def _raise(
        self, found: Iterable[tuple[Guard, Reading]], evidence: Window | HeldOut | Generation, writes: bool
    ) -> dict[str, float]:
        figures: dict[str, float] = {}
        for guard, reading in found:
            alarm = Alarm(
                guard=guard.name,
                step=evidence.step,
                epoch=evidence.epoch,
                action=self.actions[guard.name],
                message=reading.message,
                evidence=reading.evidence,
                cause=reading.cause or guard.cause,
                remedy=reading.remedy or guard.remedy,
                source=reading.source or guard.source,
                threshold_kind=guard.threshold_kind,
                time=time.time(),
                split=evidence.split if isinstance(evidence, HeldOut) else "",
            )
            self.alarms.append(alarm.as_dict())
            self._stop = self._stop or alarm.action == "stop"
            figures[f"guards/{guard.name}"] = 1.0
            if writes:
                self.say(alarm.line() + ("; training stops here" if alarm.action == "stop" else ""))
        if figures:
            figures["guards/alarms"] = float(len(self.alarms))
            if writes:
                self._write()
        return figures

    def _write(self) -> None:
        if self.output_dir:
            write_lines(Path(self.output_dir) / ALARMS, self.alarms)

    def summary(self) -> list[str]:
        """What the guards have to say at the end of a run, a line each."""
        lines = []
        for name in self.actions:
            own = [alarm for alarm in self.alarms if alarm["guard"] == name]
            if own:
                steps = ", ".join(str(alarm["step"]) for alarm in own)
                lines.append(f"{name}: {own[-1]['message']} (step {steps})")
        quiet = [
            name
            for name in self.actions
            if name not in self.lacking and all(alarm["guard"] != name for alarm in self.alarms)
        ]
        if quiet:
            lines.append(f"silent: {', '.join(quiet)}")
        for reason in dict.fromkeys(self.lacking.values()):
            names = [name for name, why in self.lacking.items() if why == reason]
            lines.append(f"not watched: {', '.join(names)}: {reason}")
        return lines

    # ---- callback -------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin anew, or go on where the checkpoint was saved."""
        self.active = True
        name = type(self).__name__
        others: Any = state.stateful_callbacks
        kept = (others or {}).get(name)
        path = Path(self.output_dir) / ALARMS
        if state.global_step and isinstance(kept, Mapping):
            self.memory = kept["attributes"]["memory"]
            self._resumed_at = state.global_step
            self.alarms = up_to_step(path, state.global_step) if self.output_dir else []
        else:
            self._reset()
            self.alarms = []
        if others is not None:
            # transformers writes into the entry of every callback, and expects it to be there.
            others.setdefault(name, self.state())
        if state.is_world_process_zero:
            self._write()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop where a guard asked for it, with a checkpoint if the run keeps any."""
        if self._stop:
            self._stop = False
            control.should_training_stop = True
            control.should_save = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"

    # ---- state ----------------------------------------------------------------------------------------------------

    @property
    def memory(self) -> dict[str, Any]:
        """All that is remembered, as JSON values."""
        return {
            "guards": {
                split: {name: guard.state() for name, guard in guards.items()} for split, guards in self._guards.items()
            },
            "since": {split: since.as_list() for split, since in self._since.items()},
            "before": self._before.as_list(),
            "generation": None if self._generation is None else self._generation.as_dict(),
        }

    @memory.setter
    def memory(self, kept: Mapping[str, Any]) -> None:
        self._reset()
        for split, states in kept["guards"].items():
            self._guards[split] = {name: GUARDS[name]() for name in GUARDS if name in self.actions}
            for name, guard in self._guards[split].items():
                if name in states:
                    guard.load(states[name])
        self._since = {split: Moments.from_list(values) for split, values in kept["since"].items()}
        self._before = Moments.from_list(kept["before"])
        generation = kept["generation"]
        self._generation = None if generation is None else Generation.from_dict(generation)

    def state(self) -> dict[str, Any]:
        """For ``trainer_state.json``."""
        return {
            "args": {"actions": self.actions, "output_dir": self.output_dir},
            "attributes": {"memory": self.memory, "lacking": self.lacking},
        }


def find_guards(run: Any) -> Guards | None:
    """A trainer's guards; transformers may have put fresh ones in their place when it restored a checkpoint."""
    return next((each for each in run.callback_handler.callbacks if isinstance(each, Guards)), None)
