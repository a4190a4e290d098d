"""Flags of a sweep: what is searched, how, where, and what is kept."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from preftune.config import CommandLine
from preftune.config.fields import fields_of
from preftune.config.own import take_own
from preftune.errors import ConfigError
from preftune.verbs import PAIR_VERBS, TRAINING

VERBS = PAIR_VERBS
_OTHERS = tuple(verb for verb in TRAINING if verb not in VERBS)
SEARCHES, PRUNERS, KEEPS = ("grid", "random", "tpe"), ("none", "median", "halving"), ("best", "all", "none")
#: Holds the storage's URL for workers: on a command line everybody on the machine could read a password.
STORAGE_VARIABLE = "PREFTUNE_SWEEP_STORAGE"


@dataclass
class Options:
    """Flags of the sweep itself; all others are settings of the trials.

    Attributes:
        param: A field and its values, ``beta=0.05,0.1,0.2``, or a range, ``learning_rate=1e-6..1e-4:log``; once per
            field. By default the method's own 3x3 grid of beta and learning rate.
        out: Folder of the sweep. Naming the folder of an earlier one goes on with it, or joins it.
        verb: Training verb of the trials: dpo, orpo or cpo.
        search: grid, random or tpe; by default grid where all values are listed, else tpe.
        num_trials: Number of trials of random and tpe; 20 by default.
        workers: Processes on this machine that share the trials.
        storage: Database URL of the study, such as postgresql://...; by default a journal file in the folder.
        ray: Run the trials on a Ray cluster: its address, or local to start one here. --workers is then the number of
            trials at a time.
        eval_share: Share of the prompts to hold out; by default a test split, or a tenth where there is none.
        metric: Which figure decides. Where rewards are log-ratios to a reference, by default
            eval_rewards/margins_per_token if trials are sampled, eval_preference_gain if not, or if the search or a
            pruner goes by it on the way; else eval_rewards/accuracies.
        pruner: Stop trials whose held-out metric falls behind: none, median or halving. Needs eval_strategy.
        diverge_factor: A loss this many times the first one, twice in a row, ends a trial as diverged (heuristic).
        num_samples: Sample each trial on this many held-out prompts, to see how far it has moved and whether it has
            left what the reference writes; 100 by default where there is a reference, 0 for none.
        keep: Whose weights are kept: best, all or none.
        fuse: Train up to this many LoRA trials in one forward over the shared base; each ends where it ends alone. What
            is searched must then be settings of the loss or of the optimizer, such as beta and learning_rate.
        retrain_best: Train the sweet spot once more, into OUT/best.
        retry_failed: Run failed trials of an earlier call once more.
        dry_run: Show the trials, and stop.
        as_worker: For the processes that --workers starts.
    """

    param: list[str] = dataclasses.field(default_factory=list)
    out: str | None = None
    verb: str = "dpo"
    search: str | None = None
    num_trials: int | None = None
    workers: int = 1
    storage: str | None = None
    ray: str | None = None
    eval_share: float | None = None
    metric: str | None = None
    pruner: str = "none"
    diverge_factor: float = 10.0
    num_samples: int | None = None
    keep: str = "best"
    fuse: int = 1
    retrain_best: bool = False
    retry_failed: bool = False
    dry_run: bool = False
    as_worker: bool = False
    #: Names of the flags that were given.
    named: frozenset[str] = dataclasses.field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        """Check the values that do not depend on the trials."""
        for name, allowed in (("verb", VERBS), ("search", SEARCHES), ("pruner", PRUNERS), ("keep", KEEPS)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                remedy = f"{' and '.join(_OTHERS)} have no held-out pairs to compare" if value in _OTHERS else None
                raise ConfigError(
                    "unknown value", where=f"--{name}", value=value, allowed=", ".join(allowed), remedy=remedy
                )
        for name, least in (("workers", 1), ("num_trials", 1), ("num_samples", 0), ("fuse", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError("out of range", where=f"--{name}", value=value, allowed=f"{least} or more")
        if self.num_samples == 1:
            raise ConfigError("one prompt has no interval", where="--num_samples", value=1, allowed="0, or 2 or more")
        if self.diverge_factor <= 1:
            raise ConfigError("out of range", where="--diverge_factor", value=self.diverge_factor, allowed="above 1")
        if self.eval_share is not None and not 0 < self.eval_share < 1:
            raise ConfigError(
                "not a share", where="--eval_share", value=self.eval_share, allowed="more than 0, less than 1"
            )


def read_options(line: CommandLine) -> tuple[Options, CommandLine]:
    """Tell the sweep's flags from the trials' settings.

    Raises:
        ConfigError: A value does not fit its flag.
    """
    options, rest = take_own(line, Options, storage=os.environ.get(STORAGE_VARIABLE))
    options.named = frozenset(name for name, _, _ in line.flags if name in fields_of(Options))
    return options, rest
