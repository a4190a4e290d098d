"""The page about data of other projects names every format, and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

from preftune.data.formats import FORMATS
from preftune.data.reading import SUFFIXES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")


def test_every_format_and_every_kind_of_file_is_on_the_page() -> None:
    for name in FORMATS:
        assert f"`{name}`" in PAGE, name
    for suffix in SUFFIXES:
        for part in suffix.removeprefix(".").split("."):
            assert f"`.{part}`" in PAGE, suffix


def test_every_test_on_the_page_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    missing = {name for name in named if f"def {name}(" not in code}
    assert len(named) > 30
    assert not missing
