"""One self-contained HTML page about runs and sweeps: ``preftune.report.build(paths, out)``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from preftune.report.page import Page

__all__ = ["build", "write"]


def build(paths: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Write a report on runs and sweeps as one HTML file that needs no network.

    Args:
        paths: Run folders (of preftune, TRL or any transformers ``Trainer``) and sweep folders, in any number.
        out: The file; its folder is made where it is missing.
        title: Heading; made from the names of the folders by default.

    Returns:
        Path of the file.

    Raises:
        DataError: A folder does not exist or holds nothing to report on.
        SetupError: plotly is missing, or the file cannot be written.
    """
    write(paths, out, title=title)
    return Path(out)


def write(paths: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str], *, title: str | None = None) -> Page:
    """Write a report as :func:`build` does.

    Args:
        paths: As of :func:`build`.
        out: The file.
        title: Heading.

    Returns:
        The page's content.

    Raises:
        DataError: A folder does not exist or holds nothing to report on.
        SetupError: plotly is missing, or the file cannot be written.
    """
    from preftune.errors import SetupError
    from preftune.files import replace_text
    from preftune.report.html import render
    from preftune.report.page import gather
    from preftune.report.read import read_all

    page = gather(*read_all(paths), title)
    text = render(page)
    target = Path(out)
    try:
        replace_text(target, text)
    except OSError as error:
        raise SetupError(
            f"the report cannot be written ({error.strerror})",
            where="out",
            value=str(out),
            remedy="choose another file",
        ) from error
    return page
