"""``preftune sft``, ``dpo`` and the other verbs that train."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from preftune.config import split_command_line
from preftune.config.own import take_own
from preftune.runs.launcher import Processes, launch, this_program
from preftune.verbs import PAIR_VERBS

if TYPE_CHECKING:
    from preftune.runs.run import Run


def main(verb: str, argv: Sequence[str]) -> int:
    """Train, or start the processes that do."""
    line = split_command_line(argv)
    if line.help:
        from preftune.cli.help import help_of, sections_of
        from preftune.cli.help_table import sections_of_verb

        print(help_of(verb, [*sections_of_verb(verb), *sections_of({"several processes": Processes})]))
        return 0
    processes, line = take_own(line, Processes)
    if (number := processes.to_launch()) is not None:
        return launch(number, this_program(verb, *argv), lambda text: print(f"preftune: {text}", file=sys.stderr))
    from rich.console import Console

    from preftune.cli.console import plain_warnings

    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    with plain_warnings(console):
        # What the libraries say while they are imported is for their developers, too.
        from preftune.runs.run import Run
        from preftune.runs.settings import read_settings

        processes.check_devices()
        this = Run(verb, tuple(argv), read_settings(verb, line), console)
        code = run_training(this)
        if code == 0:
            _how_to_go_on(this)
        _leave_the_others()
        return code


def _leave_the_others() -> None:
    """End what joins the processes; threads that still serve it when Python ends abort the process."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _how_to_go_on(this: Run) -> None:
    """The command that comes next."""
    from preftune.config import redact_argv
    from preftune.runs.next_steps import after_training, without_flag

    if this.settings.script.dry_run:
        words = without_flag(this.argv, "dry_run")
        lines = [f"next: {shlex.join(redact_argv(['preftune', this.verb, *words]))}"]
    else:
        streamed = this.settings.script.dataset_streaming
        lines = after_training(this.verb, this.args.output_dir, held_out=this.has_test, streamed=streamed)
    for text in lines:
        this.console.print(text, markup=False, highlight=False, soft_wrap=True)


def run_training(this: Run) -> int:
    """Train, and draw around it.

    Args:
        this: The run, its settings as they were read.

    Returns:
        0, or 130 where it was stopped.
    """
    from transformers.utils.logging import disable_progress_bar

    from preftune.cli.advise import show_at_start
    from preftune.cli.panel import summary
    from preftune.cli.progress import replace_progress
    from preftune.cli.verbs import INTERRUPTED
    from preftune.models.path import without_trial
    from preftune.runs.failures import foreseen
    from preftune.runs.run import build_trainer, train
    from preftune.runs.settings import settings_classes

    # Bars for files that are read in a blink bury those that tell something.
    disable_progress_bar()
    with foreseen(this.args):
        this.complete()
        dry_run = this.settings.script.dry_run
        with this.begun():
            # A plan does without the trial of the model's attention, which takes as long as all the rest.
            with without_trial() if dry_run else nullcontext():
                trainer, splits = build_trainer(this, settings_classes(this.verb)[1])
            plan = trainer.plan()
            paired, notes = this.verb in PAIR_VERBS, this.settings.notes
            output_dir = str(this.args.output_dir)
            this.console.print(summary(plan, paired=paired, output_dir=output_dir, verb=this.verb, notes=notes))
            show_at_start(this, trainer, plan)
            if dry_run:
                this.console.print("dry run: nothing was trained", highlight=False)
                return 0
            progress = replace_progress(trainer, this.console)
            try:
                return 0 if train(this, trainer, plan, splits) else INTERRUPTED
            finally:
                progress.close()
