"""``preftune advise``: settings with reasons, and what looks risky, before anything is loaded or trained."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.config import Resolved, split_command_line
from preftune.config.own import take_own
from preftune.errors import ConfigError, SetupError, flat
from preftune.files import finite
from preftune.verbs import PREFERENCE_VERBS

if TYPE_CHECKING:
    from preftune.advice import Advice
    from preftune.runs.run import Run

VERBS = PREFERENCE_VERBS

_HELP = """usage: preftune advise [--config FILE.yaml ...] [--name value ...] [--json] [--verbose] [--write OUT.yaml]

Advise on a run: beta, learning rate, epochs, label smoothing, batch, warm-up, adapter and max_length, each with range,
reason and sources; risks of the settings that are set; memory and time with the advised ones. Nothing is trained; of a
model, only config.json and the tokenizer are read.

{flags}

All other settings are those of the verbs that learn preferences: {verbs}."""


@dataclass
class _Own:
    """Flags of this verb alone.

    Attributes:
        verb: Which training, such as dpo; found from loss_type and the other settings by default.
        json: Print JSON, as in advice.json.
        write: File for the advised configuration, with the reasons as comments.
        out: Folder for advice.json.
        machine: Whose memory and speed to reckon with: this, cpu, h200, h100-80g, a100-80g, a100-40g, l40s, a10,
            rtx-4090 or rtx-3090.
        num_parameters: Number of parameters, such as 7e9, in place of a model that is not at hand.
        num_pairs: Number of pairs, in place of data that are not at hand.
        noise: Share of flipped labels in [0, 0.5], in place of an audit.
        audit: An audit.json or its folder; by default that of output_dir, if there is one.
        verbose: Also print every reason, with its sources and where they disagree.
    """

    verb: str | None = None
    json: bool = False
    write: str | None = None
    out: str | None = None
    machine: str | None = None
    num_parameters: float | None = None
    num_pairs: int | None = None
    noise: float | None = None
    audit: str | None = None
    verbose: bool = False

    def __post_init__(self) -> None:
        for name in ("num_parameters", "num_pairs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError("out of range", where=f"--{name}", value=value, allowed="1 or more")
        if self.noise is not None and self.audit is not None:
            raise ConfigError("both --noise and --audit are given", where="preftune advise", remedy="keep one of them")
        if self.verb is not None and self.verb not in VERBS:
            allowed = ", ".join(VERBS)
            raise ConfigError("nothing is advised for this verb", where="--verb", value=self.verb, allowed=allowed)


def main(argv: Sequence[str]) -> int:
    """Run the verb."""
    line = split_command_line(argv)
    if line.help:
        from preftune.cli.help import own_lines
        from preftune.terminal.wrapping import wrapped

        print(wrapped(_HELP.format(flags="\n".join(own_lines(_Own)), verbs=", ".join(VERBS))))
        return 0
    own, rest = take_own(line, _Own)
    from rich.console import Console

    from preftune.advice.terminal import show
    from preftune.cli.console import plain_warnings

    console = Console(stderr=own.json)
    with plain_warnings(console):
        from preftune.advice.inputs import Known, advise_on, find_verb
        from preftune.ownership import claim_files
        from preftune.runs.settings import read_settings

        verb = own.verb or find_verb(rest)
        if verb == "orpo":
            # ORPO has one loss, and no setting for it.
            rest = replace(rest, flags=tuple(flag for flag in rest.flags if flag[:2] != ("loss_type", ("orpo",))))
        settings = read_settings(verb, rest, on_bad_rows="warn")
        if own.out:
            claim_files(own.out, "advise", ["advice.json"], "--out")
        known = Known(own.machine, own.num_parameters, own.num_pairs, own.noise, own.audit)
        with console.status("reading configuration and data"):
            advice, notes = advise_on(verb, settings, known)
        # A file that cannot be written is said before the table, not below it.
        written = _written(advice, settings, own)
        if own.json:
            print(json.dumps(finite(advice.as_dict()), indent=2, ensure_ascii=False, allow_nan=False))
        else:
            following = _following(verb, argv, own, advice)
            show(console, advice, [*settings.notes, *notes], verbose=own.verbose, following=following)
        for path in written:
            console.print(f"wrote {path}", markup=False, highlight=False)
    return 0


def _following(verb: str, argv: Sequence[str], own: _Own, advice: Advice) -> str:
    """The command that goes on from here: writing the file, or training with settings that need no change."""
    if own.write:
        return shlex.join(["preftune", verb, "--config", own.write])
    given = advice.case.given
    settled = all(each.field == "loss_type" or given.get(each.field) == each.value for each in advice.settings)
    if settled and not advice.flags and replace(own, verb=None, verbose=False) == _Own():
        return shlex.join(["preftune", verb, *(word for word in argv if word not in ("--verb", own.verb, "--verbose"))])
    words = [word for word in argv if word != "--verbose"]
    names = ["advised.yaml", *(f"advised-{number}.yaml" for number in range(2, 100))]
    free = next(name for name in names if not os.path.lexists(name))
    return shlex.join(["preftune", "advise", *words, "--write", free])


def _written(advice: Advice, settings: Resolved[Any], own: _Own) -> list[str]:
    """Write the files that are asked for."""
    from preftune.advice.yaml_file import configuration, write_configuration
    from preftune.ownership import put_json
    from preftune.runs.settings import explicit

    written = []
    if own.out:
        path = Path(own.out) / "advice.json"
        try:
            put_json(path, advice.as_dict())
        except OSError as error:
            why = f"cannot write into the folder ({error.strerror})"
            raise SetupError(why, where="--out", value=own.out) from error
        written.append(str(path))
    if own.write:
        write_configuration(configuration(advice, explicit(settings)), own.write)
        written.append(own.write)
    return written


def show_at_start(this: Run, trainer: Any, plan: Any) -> None:
    """Print at most a few lines of warnings before a training, and leave ``advice.json``; never in its way.

    Args:
        this: The run.
        trainer: Its trainer.
        plan: What it is going to do.
    """
    if not this.settings.script.advice:
        return
    if this.verb not in VERBS:
        if this.settings.origins["advice"].kind != "default":
            this.console.print(f"nothing is advised for {this.verb}", style="dim", highlight=False)
        return
    from preftune.advice import inputs
    from preftune.ownership import may_put, put_json

    try:
        advice = inputs.advise_at_start(this, trainer, plan)
        for line in advice.lines():
            this.console.print(f"! {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        path = Path(this.args.output_dir) / "advice.json"
        if not this.settings.script.dry_run and trainer.is_world_process_zero() and may_put(path):
            put_json(path, advice.as_dict())
    except Exception as error:
        # An advice is no reason for a run to fail, whatever is wrong with it.
        text = f"no advice.json ({type(error).__name__}: {flat(error)[:200]})"
        this.console.print(text, style="dim", markup=False, highlight=False)
