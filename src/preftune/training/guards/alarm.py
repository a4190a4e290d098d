"""An alarm, and the file that alarms are kept in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from preftune.files import finite
from preftune.ownership import put_text

#: Beside the checkpoints.
ALARMS = "alarms.jsonl"


@dataclass(frozen=True)
class Alarm:
    """What a guard said.

    Attributes:
        guard: Name of the guard.
        step: Optimizer step.
        epoch: Epochs.
        action: ``warn`` or ``stop``.
        message: What was seen.
        evidence: The figures behind it.
        cause: What it probably means.
        remedy: What to do.
        source: Paper or experience that it rests on.
        threshold_kind: ``published`` where the source gives the whole rule, else ``heuristic``.
        time: Seconds since 1970.
        split: Name of the held-out data it is about; empty for training and samples.
    """

    guard: str
    step: int
    epoch: float
    action: str
    message: str
    evidence: dict[str, float | str]
    cause: str
    remedy: str
    source: str
    threshold_kind: str
    time: float
    split: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what is not a number is null."""
        record: dict[str, Any] = finite(asdict(self))
        return record

    def line(self) -> str:
        """One line for a log."""
        kind = "published threshold" if self.threshold_kind == "published" else "heuristic threshold"
        where = f" ({self.split})" if self.split not in ("", "eval") else ""
        return (
            f"guard {self.guard}{where} at step {self.step}: {self.message}; likely cause: {self.cause}; "
            f"remedy: {self.remedy} [{self.source}; {kind}]"
        )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; a line that is torn is left out, and a missing file has none."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON-lines file in one go: readers see the old or the new one, never half of it."""
    text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    put_text(path, text)


def up_to_step(path: Path, step: int) -> list[dict[str, Any]]:
    """Records of a JSON-lines file that a run resumed after ``step`` is not going to write again."""
    return [record for record in read_lines(path) if isinstance(record.get("step"), int) and record["step"] <= step]
