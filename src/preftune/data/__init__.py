"""Rows of any known format to tokenised pairs and SFT examples."""

from __future__ import annotations

from preftune.data.options import DataOptions
from preftune.data.preference import prepare
from preftune.data.printing import show
from preftune.data.report import DataWarning, PrepareReport, findings, warn_findings
from preftune.data.sft import prepare_sft
from preftune.data.sources import LoadReport, load, load_report

__all__ = [
    "DataOptions",
    "DataWarning",
    "LoadReport",
    "PrepareReport",
    "findings",
    "load",
    "load_report",
    "prepare",
    "prepare_sft",
    "show",
    "warn_findings",
]
