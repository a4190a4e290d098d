"""The study: which trials there are, and who works on which.

Every trial of the plan has a *slot*. A slot's trial is put into the study as waiting, and whoever turns it to running
first has it: storages do that in one step. Where two processes put the same slot's trial in at the same time, the one
with the lower number counts and the other is struck out by whoever claims it, so that no lock is needed. A trial whose
process died is closed as abandoned and put in again as the next *attempt* of its slot; if the process had noted the
outcome before it died, that outcome is kept and nothing is run again.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.sweep import runner
from preftune.sweep.liveness import Watcher, identity
from preftune.sweep.locks import one_at_a_time
from preftune.sweep.plan import Plan
from preftune.sweep.runner import Outcome
from preftune.sweep.space import Cell
from preftune.sweep.storage import open_storage, pruner_of

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

#: A trial whose process died this often is not tried again: it probably is what kills them.
MAX_DEATHS = 3
_ABANDONED, _DUPLICATE, _LOST = "abandoned", "duplicate", "its process died"


@dataclass(frozen=True)
class Claim:
    """A trial that this worker alone may run.

    Attributes:
        slot: Its number in the plan.
        attempt: How many processes gave it up before.
        params: Its settings.
        handle: The study's own object.
        fresh_folder: Whether an earlier process may still write to the usual run folder.
    """

    slot: int
    attempt: int
    params: Cell
    handle: Trial
    fresh_folder: bool = False


@dataclass(frozen=True)
class SlotState:
    """The state of a trial.

    Attributes:
        slot: Its number in the plan.
        state: ``waiting``, ``running``, or the state of its outcome.
        params: Its settings, as far as they are known.
        outcome: What became of it, once it is done with.
        beat: The last sign of life of a running one: ``{"step", "num_steps", "count"}``.
    """

    slot: int
    state: str
    params: Cell
    outcome: Outcome | None = None
    beat: dict[str, Any] | None = None


class Board:
    """The study of one sweep, as one worker sees it.

    Args:
        plan: The sweep.
        folder: Its folder.
        watcher: Tells dead workers from live ones.
    """

    def __init__(self, plan: Plan, folder: Path, watcher: Watcher | None = None) -> None:
        import optuna

        self.plan = plan
        self._folder = folder
        self._storage = open_storage(plan.storage, folder)
        self._watcher = watcher or Watcher()
        self._me = identity()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study: Study = optuna.create_study(
                storage=self._storage,
                study_name=plan.study,
                direction=_direction(plan.direction),
                load_if_exists=True,
                pruner=pruner_of(plan.pruner),
            )
        self._study_id = self._storage.get_study_id_from_name(plan.study)

    # ---- reading ---------------------------------------------------------------------------------------------------

    def _attempts(self) -> dict[int, list[FrozenTrial]]:
        """Per slot its attempts in order; of doubles only the one that counts."""
        found: dict[int, dict[int, FrozenTrial]] = {slot: {} for slot in range(self.plan.num_trials)}
        for trial in self._study.get_trials(deepcopy=False):
            slot, attempt = trial.user_attrs.get("slot"), trial.user_attrs.get("attempt")
            if slot in found and attempt is not None:
                # Numbers ascend, so the first one seen has the lowest.
                found[slot].setdefault(attempt, trial)
        return {slot: [each[number] for number in sorted(each)] for slot, each in found.items()}

    def states(self) -> list[SlotState]:
        """The state of every trial, by slot."""
        found = []
        for slot, attempts in self._attempts().items():
            last = attempts[-1] if attempts else None
            outcome = None if last is None else _outcome(last)
            params = self._params(slot, last)
            if last is None or (last.state.is_finished() and outcome is None) or last.state.name == "WAITING":
                found.append(SlotState(slot, "waiting", params))
            elif not last.state.is_finished():
                found.append(SlotState(slot, "running", params, None, last.user_attrs.get("beat")))
            else:
                found.append(SlotState(slot, outcome.state if outcome else "waiting", params, outcome))
        return found

    def _params(self, slot: int, trial: FrozenTrial | None) -> Cell:
        if self.plan.cells:
            return dict(self.plan.cells[slot])
        return dict(trial.params) if trial is not None else {}

    def is_done(self) -> bool:
        """Whether every trial has an outcome."""
        return all(state.outcome is not None for state in self.states())

    # ---- keeping the study in order --------------------------------------------------------------------------------

    def tend(self, retry_failed: bool = False) -> list[str]:
        """Put missing trials in, and those of dead processes in again.

        Args:
            retry_failed: Run failed trials once more.

        Returns:
            Lines for the user.
        """
        told = []
        for slot, attempts in self._attempts().items():
            if not attempts:
                self._enqueue(slot, 0, {})
                continue
            last = attempts[-1]
            if last.state.name == "RUNNING":
                told += self._take_over(slot, attempts)
            elif last.state.is_finished():
                outcome = _outcome(last)
                if outcome is None or (retry_failed and outcome.state == runner.FAILED):
                    self._enqueue(slot, len(attempts), dict(last.params))
        return told

    def _enqueue(self, slot: int, attempt: int, params: Cell, fresh_folder: bool = False) -> None:
        fixed = dict(self.plan.cells[slot]) if self.plan.cells else params
        attrs = {"slot": slot, "attempt": attempt, "fresh_folder": fresh_folder}
        self._study.enqueue_trial(fixed, user_attrs=attrs)

    def _take_over(self, slot: int, attempts: list[FrozenTrial]) -> list[str]:
        """Deal with a running trial whose process may be dead."""
        last = attempts[-1]
        owner = last.user_attrs.get("owner")
        if not self._watcher.is_dead(last.number, owner, last.user_attrs.get("beat")):
            return []
        noted = _noted(last)
        if noted is not None:
            # It had finished its work, and only the closing word is missing.
            self._close(last.number, noted)
            return []
        deaths = sum(each.user_attrs.get("end") == _LOST for each in attempts) + 1
        if deaths >= MAX_DEATHS:
            self._close(last.number, Outcome(runner.FAILED, f"the process that ran it died {deaths} times"))
            return [f"trial {slot} is given up: the process that ran it died {deaths} times"]
        pid = (owner or {}).get("pid")
        hangs = pid in self.hung
        if self._abandon(last.number, _LOST):
            fresh = hangs or not _same_machine(owner, self._me)
            self._enqueue(slot, len(attempts), dict(last.params), fresh_folder=fresh)
        why = f"its process ({pid}) is there and does nothing" if hangs else "its process has died"
        return [f"trial {slot} is run again: {why}"]

    @property
    def hung(self) -> set[int]:
        """Processes of this machine that were given up although they are still there."""
        return self._watcher.hung

    def _abandon(self, number: int, end: str) -> bool:
        """Close a trial that nobody finished; false where somebody else did it first."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        try:
            self._storage.set_trial_user_attr(trial_id, "end", end)
            return self._storage.set_trial_state_values(trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            return False

    # ---- working ---------------------------------------------------------------------------------------------------

    def claim(self, limit: int = 1) -> list[Claim]:
        """Take up to ``limit`` waiting trials, each for this worker alone."""
        claims: list[Claim] = []
        while len(claims) < limit:
            with self._claiming():
                claim = self._claim_one()
            if claim is None:
                break
            claims.append(claim)
        return claims

    def _claiming(self) -> contextlib.AbstractContextManager[None]:
        # SQLite cannot lock the row that it reads: two processes would both find it waiting and both take it.
        if (self.plan.storage or "").startswith("sqlite"):
            return one_at_a_time(self._folder / "claim.lock")
        return contextlib.nullcontext()

    def _claim_one(self) -> Claim | None:
        import optuna
        from optuna.trial import TrialState

        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        for trial in sorted(waiting, key=lambda each: (each.user_attrs.get("slot", 0), each.number)):
            trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                if not self._storage.set_trial_state_values(trial_id, state=TrialState.RUNNING):
                    continue
                slot, attempt = int(trial.user_attrs["slot"]), int(trial.user_attrs["attempt"])
                if self._is_double(trial.number, slot, attempt):
                    self._abandon(trial.number, _DUPLICATE)
                    continue
                # A study object remembers the trials that it saw first; a new one sees what there is now.
                study = optuna.load_study(
                    study_name=self.plan.study,
                    storage=self._storage,
                    sampler=self._sampler(slot),
                    pruner=pruner_of(self.plan.pruner),
                )
                # Where it caches, it knows only the trials that it has read.
                study.get_trials(deepcopy=False)
                handle = optuna.Trial(study, trial_id)
                handle.set_user_attr("owner", self._me)
                params = {dimension.name: dimension.suggest(handle) for dimension in self.plan.dimensions}
                return Claim(slot, attempt, params, handle, bool(trial.user_attrs.get("fresh_folder")))
        return None

    def _sampler(self, slot: int) -> Any:
        """Draws from slot and history alone, so that it does not matter which worker asks."""
        import numpy as np
        import optuna

        (seed,) = np.random.SeedSequence([self.plan.seed, slot]).generate_state(1)
        return optuna.samplers.TPESampler(seed=int(seed))

    def _is_double(self, number: int, slot: int, attempt: int) -> bool:
        """Whether the same trial is in the study under a lower number, or has gone on without this one."""
        for other in self._study.get_trials(deepcopy=False):
            if other.user_attrs.get("slot") != slot or other.number == number:
                continue
            same, later = other.user_attrs.get("attempt") == attempt, other.user_attrs.get("attempt", -1) > attempt
            if later or (same and other.number < number):
                return True
        return False

    def known(self, claim: Claim) -> Outcome | None:
        """The outcome of an earlier trial with the same settings, which would only be computed again."""
        for state in self.states():
            if state.slot != claim.slot and state.params == claim.params and state.state == runner.COMPLETE:
                assert state.outcome is not None
                number = state.slot if state.outcome.same_as is None else state.outcome.same_as
                return Outcome.from_json(state.outcome.to_json() | {"same_as": number, "seconds": 0.0})
        return None

    def beat(self, claim: Claim, beat: dict[str, Any]) -> None:
        """Leave a sign of life."""
        from optuna.exceptions import UpdateFinishedTrialError

        # Somebody may have given this worker up in the meantime.
        with contextlib.suppress(UpdateFinishedTrialError):
            claim.handle.set_user_attr("beat", beat)

    def report(self, claim: Claim, value: float, step: int) -> bool:
        """Tell the held-out metric at a step; returns whether the pruner would stop here."""
        claim.handle.report(value, step)
        return bool(claim.handle.should_prune())

    def finish(self, claim: Claim, outcome: Outcome) -> bool:
        """Enter an outcome; false where this worker had been given up and the trial has gone on without it."""
        return self._close(claim.handle.number, outcome)

    def release(self, claim: Claim) -> None:
        """Give a trial back that was interrupted."""
        if self._abandon(claim.handle.number, "released"):
            self._enqueue(claim.slot, claim.attempt + 1, claim.params)

    def _close(self, number: int, outcome: Outcome) -> bool:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        value = outcome.metrics.get(self.plan.metric, {}).get("mean")
        values = [float(value)] if outcome.state == runner.COMPLETE and value is not None else None
        ends = {runner.PRUNED: TrialState.PRUNED, runner.STOPPED: TrialState.PRUNED, runner.DIVERGED: TrialState.PRUNED}
        state = TrialState.COMPLETE if values else ends.get(outcome.state, TrialState.FAIL)
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        try:
            # The outcome first: from here on it is never run again, whatever happens to this process.
            self._storage.set_trial_user_attr(trial_id, "outcome", outcome.to_json())
            return self._storage.set_trial_state_values(trial_id, state, values)
        except UpdateFinishedTrialError:
            return False

    @contextlib.contextmanager
    def released_on_error(self, claims: list[Claim]) -> Iterator[Callable[[Claim], None]]:
        """Give back what is not finished when the block is left by an error or Ctrl-C.

        Yields:
            To be called with each claim that is finished.
        """
        open_claims = list(claims)
        try:
            yield open_claims.remove
        except BaseException:
            for claim in open_claims:
                self.release(claim)
            raise


def _noted(trial: FrozenTrial) -> Outcome | None:
    stored = trial.user_attrs.get("outcome")
    return None if stored is None else Outcome.from_json(dict(stored))


def _outcome(trial: FrozenTrial) -> Outcome | None:
    """What became of a closed trial; ``None`` for one that was abandoned."""
    return _noted(trial) if trial.state.is_finished() and "end" not in trial.user_attrs else None


def _same_machine(owner: Any, me: dict[str, Any]) -> bool:
    return bool(owner) and owner.get("machine") == me["machine"]


def _direction(name: str) -> Any:
    from optuna.study import StudyDirection

    return StudyDirection[name.upper()]
