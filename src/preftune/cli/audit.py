"""``preftune data audit``: what is wrong with a data set, before anything is trained on it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from preftune.config import split_command_line
from preftune.config.own import take_own
from preftune.errors import ConfigError
from preftune.verbs import ROWS

if TYPE_CHECKING:
    from rich.console import RenderableType

    from preftune.data.audit import AuditReport, Finding

VERBS = tuple(ROWS)
_STYLES = {"ok": "green", "note": "cyan", "warn": "yellow", "problem": "bold red"}

_HELP = """usage: preftune data audit --dataset_name D [--out DIR] [--config FILE.yaml] [--name value ...]

Look a data set over: duplicates, contradictions, leakage, length bias, truncation, template and special tokens,
refusals, languages, trivial answers, and an estimate of how many labels are wrong.

{flags}

Settings that concern data, tokenizer, truncation and seed count as they do in training. Without --model_name_or_path
lengths are counted in words, and truncation and template go unchecked. Bad rows are counted and left out
(on_bad_rows: skip) unless on_bad_rows says otherwise. Rows are numbered from 0 as they are loaded: `preftune data show
--on_bad_rows skip --first_row N` prints one."""


@dataclass
class _Own:
    """Flags of this verb alone.

    Attributes:
        out: Folder for audit.json; a report of the same folder shows it.
        json: Print JSON instead of the table.
        ref_model: Model that scores the pairs too; it is a second judge of the labels.
        verb: Read the settings as this verb would.
    """

    out: str | None = None
    json: bool = False
    ref_model: str | None = None
    verb: str = field(default="dpo", metadata={"choices": VERBS})

    def __post_init__(self) -> None:
        if self.out is not None and os.path.exists(self.out) and not os.path.isdir(self.out):
            raise ConfigError("not a folder", where="--out", value=self.out, remedy="name a folder")


def main(argv: Sequence[str]) -> int:
    """Run the verb."""
    line = split_command_line(argv)
    if line.help:
        from preftune.cli.help import own_lines
        from preftune.terminal.wrapping import wrapped

        print(wrapped(_HELP.format(flags="\n".join(own_lines(_Own)))))
        return 0
    own, rest = take_own(line, _Own)
    from rich.console import Console

    from preftune.cli.console import plain_warnings
    from preftune.ownership import claim_files

    # What is printed beside JSON must not end up in it.
    console = Console(stderr=own.json)
    with plain_warnings(console):
        from preftune.runs.audit import audit_data
        from preftune.runs.settings import read_settings

        settings = read_settings(own.verb, rest, on_bad_rows="skip")
        if own.out is not None:
            claim_files(own.out, "audit", ["audit.json"], "--out")
        report = audit_data(settings, console, ref_model=own.ref_model, show_progress=not own.json)
    if own.json:
        print(json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        console.print(table(report))
    if own.out is not None:
        console.print(f"wrote {report.write(own.out)}", markup=False, highlight=False, soft_wrap=True)
    return 0


def table(report: AuditReport) -> RenderableType:
    """The report for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    form = ", ".join(dict.fromkeys((report.format, report.kind)))
    head = f"{report.dataset}: {report.num_rows:,} of {report.num_read:,} rows ({form})"
    grid = Table(show_header=True, header_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    grid.add_column("", no_wrap=True)
    grid.add_column("check", no_wrap=True)
    grid.add_column("finding", overflow="fold")
    for finding in report.findings:
        # Text, not markup: data may hold square brackets.
        grid.add_row(Text(finding.severity, style=_STYLES[finding.severity]), finding.check, _told(finding))
    parts: list[RenderableType] = [Text(head, style="bold"), grid]
    if report.not_applicable:
        reasons: dict[str, list[str]] = {}
        for check, why in report.not_applicable.items():
            reasons.setdefault(why, []).append(check)
        parts += [Text(f"not checked: {', '.join(names)} ({why})", style="dim") for why, names in reasons.items()]
    parts.append(Text(f"{report.seconds:.1f} s; sources of all thresholds are in audit.json (--out)", style="dim"))
    return Group(*parts)


def _told(finding: Finding) -> Any:
    from rich.text import Text

    text = Text(finding.title)
    if finding.severity != "ok":
        text.append(f"\n{finding.detail}", style="dim")
        rows = [str(one["row"]) for one in finding.examples if "row" in one]
        places = [str(one["place"]) for one in finding.examples if one.get("place")]
        if rows:
            text.append(f"\nrows {', '.join(rows)}", style="dim")
        elif places:
            text.append(f"\n{'; '.join(places)}", style="dim")
        if finding.threshold_kind != "none":
            text.append(f"\n{finding.threshold_kind}", style="dim italic")
    return text
