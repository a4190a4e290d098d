"""What an audit found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from preftune.errors import SetupError
from preftune.files import finite
from preftune.ownership import put_json

Severity = Literal["ok", "note", "warn", "problem"]
SEVERITIES: tuple[Severity, ...] = ("ok", "note", "warn", "problem")


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: Name of the check.
        severity: ``ok``, ``note`` (worth knowing), ``warn`` (look at it), or ``problem`` (training suffers).
        title: The result in a few words, figures included.
        detail: What it means, and what can be done.
        count: Rows that are affected.
        share: Their share of the rows that were looked at.
        low: Lower end of the share's 95 % interval.
        high: Upper end.
        examples: A few of them: ``row`` and whatever shows the point.
        source: Where the threshold or the definition comes from; ``heuristic: ...`` where nobody has published one.
        threshold_kind: ``published``, ``heuristic`` or ``none`` (nothing is compared with a number).
    """

    check: str
    severity: Severity
    title: str
    detail: str
    count: int | None = None
    share: float | None = None
    low: float | None = None
    high: float | None = None
    examples: tuple[Mapping[str, Any], ...] = ()
    source: str = "counted"
    threshold_kind: Literal["published", "heuristic", "none"] = "none"


@dataclass(frozen=True)
class AuditReport:
    """All results of one audit.

    Attributes:
        dataset: Name of the data set.
        kind: ``preference``, ``unpaired`` or ``sft``.
        format: Format of the rows.
        num_rows: Rows that were looked at; bad rows are left out.
        num_read: Rows found at the source.
        num_prompts: Distinct prompts.
        findings: One entry per check that applies, in the order in which they ran.
        not_applicable: Check -> why it was not made.
        lengths: Unit, statistics by part, quantiles of whole sequences, and what truncation does.
        noise: Estimate of the label noise, the judges behind it, and what it cannot know.
        settings: What the audit was made with.
        seconds: How long it took.
    """

    dataset: str
    kind: str
    format: str
    num_rows: int
    num_read: int
    num_prompts: int
    findings: tuple[Finding, ...]
    not_applicable: Mapping[str, str] = field(default_factory=dict)
    lengths: Mapping[str, Any] = field(default_factory=dict)
    noise: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def finding(self, check: str) -> Finding | None:
        """The finding of one check; ``None`` where it was not made."""
        return next((one for one in self.findings if one.check == check), None)

    def worst(self) -> Severity:
        """The gravest severity of all findings."""
        return max((one.severity for one in self.findings), key=SEVERITIES.index, default="ok")

    def to_json(self) -> dict[str, Any]:
        """All fields as values that JSON can hold; numbers that are not finite become null."""
        document: dict[str, Any] = finite(asdict(self))
        return document

    def lines(self) -> list[str]:
        """Everything that is not in order, in words."""
        return [f"{one.severity}: {one.title}. {one.detail}" for one in self.findings if one.severity != "ok"]

    def write(self, folder: str | Path) -> Path:
        """Write ``audit.json`` into a folder, which is made if need be; a reader never sees half a file.

        Returns:
            The file.

        Raises:
            SetupError: It cannot be written.
        """
        path = Path(folder) / "audit.json"
        try:
            put_json(path, asdict(self))
        except OSError as error:
            raise SetupError(
                f"cannot write ({error.strerror})", where=str(path), remedy="choose another --out"
            ) from error
        return path
