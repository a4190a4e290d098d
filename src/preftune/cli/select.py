"""``preftune data select``: leave the pairs out that a model does not learn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.config import CommandLine, split_command_line
from preftune.config.own import take_own
from preftune.errors import ConfigError
from preftune.verbs import PAIR_VERBS

if TYPE_CHECKING:
    from rich.console import Console

    from preftune.runs.selection import Selection

KEPT, LEFT_OUT, FOUND, BAD = "selected.jsonl", "left_out.jsonl", "selection.json", "quarantine.jsonl"

_HELP = """usage: preftune data select --dataset_name D --model_name_or_path M --out DIR [--keep S] [--name value ...]

Rank pairs by how well a model learns them: trained on one half, it judges the other, both ways. The share with the
largest margins goes to DIR/selected.jsonl, the others to DIR/left_out.jsonl, all margins to DIR/selection.json. It
costs one training. Whether fewer pairs serve better, only an evaluation tells: train with both.

{flags}

All other settings are those of the verb, for the two trainings."""


@dataclass
class _Own:
    """Flags of this verb alone.

    Attributes:
        out: Folder for the pairs that are kept, and those that are not.
        keep: Share of the pairs to keep; arXiv 2502.09650 keeps one half.
        verb: Train as this verb would.
    """

    out: str = ""
    keep: float = 0.75
    verb: str = field(default="dpo", metadata={"choices": PAIR_VERBS})

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError("out of range", where="--keep", value=self.keep, allowed="above 0, at most 1")


def main(argv: Sequence[str]) -> int:
    """Run the verb."""
    line = split_command_line(argv)
    if line.help:
        from preftune.cli.help import own_lines
        from preftune.terminal.wrapping import wrapped

        print(wrapped(_HELP.format(flags="\n".join(own_lines(_Own)))))
        return 0
    own, rest = take_own(line, _Own)
    if not own.out or os.path.isfile(own.out):
        raise ConfigError("no folder to write to", where="--out", value=own.out or None, remedy="name a folder")
    from rich.console import Console

    from preftune.cli.console import plain_warnings
    from preftune.files import json_text
    from preftune.ownership import claim_files

    console = Console()
    with plain_warnings(console):
        from transformers.utils.logging import disable_progress_bar

        from preftune.runs.selection import select_pairs

        # Bars for files that are read in a blink bury those that tell something.
        disable_progress_bar()
        folder = claim_files(own.out, "select", (KEPT, LEFT_OUT, FOUND, BAD), "--out")
        os.makedirs(own.out, exist_ok=True)
        folder.remove_file(BAD)
        found = select_pairs(
            own.verb,
            rest,
            console,
            keep=own.keep,
            quarantine_path=os.path.join(own.out, BAD),
            watch=lambda half, trainer: _begin(console, half, trainer),
        )
        folder.seal([BAD])
        for name, kept in ((KEPT, True), (LEFT_OUT, False)):
            folder.put_text(name, _lines(found, kept=kept))
        folder.put_text(FOUND, json_text({"keep": own.keep, "verb": own.verb, **found.as_dict()}))
    for text in [*_told(found, own), _next(own, rest)]:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def _begin(console: Console, half: int, trainer: Any) -> None:
    """Say how long a training takes, and draw its bar."""
    from preftune.cli.progress import replace_progress
    from preftune.terminal.units import duration, plural

    plan = trainer.plan()
    seconds = getattr(plan.time, "seconds", 0.0)
    takes = f", about {duration(seconds)}" if seconds else ""
    console.print(f"half {half + 1} of 2: {plural(plan.num_pairs, 'pair')}{takes}", highlight=False)
    replace_progress(trainer, console)


def _lines(found: Selection, *, kept: bool) -> str:
    import json

    from preftune.data.export import rows_of_columns

    rows = rows_of_columns(found.part(kept=kept))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _told(found: Selection, own: _Own) -> list[str]:
    from preftune.terminal.units import plural

    share = found.accuracy
    out = [
        f"kept {int(found.kept.sum()):,} of {plural(len(found.kept), 'pair')}; models trained on the other half find "
        f"the chosen answer of {100 * share.mean:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}] more likely "
        "than before"
    ]
    if not found.tells:
        out.append(
            "! they do no better than chance on pairs they have not seen, so that the order tells nothing: keep all "
            "pairs, or train longer (num_train_epochs, learning_rate)"
        )
    out.append(f"wrote {own.out}: {KEPT}, {LEFT_OUT}, {FOUND}")
    return out


def _next(own: _Own, line: CommandLine) -> str:
    """The training on what was kept, with the settings of the trainings that judged."""
    from preftune.config import redact_argv
    from preftune.runs.next_steps import command

    given = [text for config in line.configs for text in ("--config", config)]
    for name, values, _ in line.flags:
        # How the source was read does not fit the rows that were written.
        given += [] if name.startswith("dataset_") else [f"--{name}", *values]
    kept = ("--dataset_name", Path(own.out, KEPT))
    line_of = command(*redact_argv([own.verb, *map(str, kept), *given]))
    return f"judge a training on what was kept beside one on all pairs\nnext: {line_of}"
