"""One HTML file that needs nothing else: styles, scripts and data inside, the network switched off."""

from __future__ import annotations

import base64
import datetime
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from preftune.errors import SetupError
from preftune.report import page as pages
from preftune.report import parts
from preftune.report.files import objects
from preftune.report.page import Page, page_payload
from preftune.report.settings import text_of
from preftune.report.tables import figure, interval, is_interval, level_of, title_of
from preftune.version import __version__

_HERE = Path(__file__).parent
#: Scripts of the page in the order in which they run; the last one starts it.
SCRIPTS = ("core.js", "curves.js", "maps.js", "page.js")
# JSON may hold these characters as escapes only, so that no text in it can end its element or be taken for markup.
_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}
# Empty style elements are what plotly adds before it fills them through the style sheet's own interface.
_EMPTY = ""


def render(page: Page) -> str:
    """The page as HTML.

    Args:
        page: Its content.

    Returns:
        The text of the file.

    Raises:
        SetupError: plotly is missing.
    """
    style, script = static("report.css"), "\n".join(static(name) for name in SCRIPTS)
    library, theme = plotly_script(), static("theme.js")
    made = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            page=page,
            policy=content_policy([theme, library, script], [style, _EMPTY]),
            unwanted=unwanted_sheets(library),
            theme=Markup(theme),
            library=Markup(library),
            script=Markup(script),
            style=Markup(style),
            data=embed(page_payload(page)),
            made=made,
            version=__version__,
        )
    )


def content_policy(scripts: Iterable[str], styles: Iterable[str], *, connect: str = "'none'") -> str:
    """A content security policy that runs these scripts and nothing else.

    Args:
        scripts: Text of every script element.
        styles: Text of every style element.
        connect: Where scripts may connect to.

    Returns:
        The policy. Style *attributes* are allowed: plotly sets some on the elements it draws, and they can neither run
        code nor, without images or fonts from outside, send anything away. Templates never put data into one.
    """
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(map(_hash, scripts))}",
            f"style-src-elem {' '.join(map(_hash, styles))}",
            "style-src-attr 'unsafe-inline'",
            # Heat maps are drawn as images inside the page, and saved pictures come from there too.
            "img-src data: blob:",
            f"connect-src {connect}",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def unwanted_sheets(library: str) -> list[str]:
    """Names of style sheets for kinds of plots that are not on the page: the library adds none whose name is taken."""
    return sorted(set(re.findall(r'getElementById\("([0-9a-f]{64})"\)', library)))


def embed(content: Any) -> Markup:
    """JSON for a ``script`` element of type ``application/json``.

    Args:
        content: What ``json.dumps`` takes.

    Returns:
        The text, in which no character can end the element.
    """
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.translate(_ESCAPES))


@lru_cache(maxsize=1)
def plotly_script() -> str:
    """The plotting library that comes with the plotly package.

    Returns:
        JavaScript for one script element.

    Raises:
        SetupError: The package is missing.
    """
    spec = importlib.util.find_spec("plotly")
    path = Path(spec.origin).parent / "package_data" / "plotly.min.js" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise SetupError("the plots need plotly", where="preftune report", remedy="pip install plotly")
    text = _one_kind_of_line_end(path.read_text(encoding="utf-8"))
    if "</script" in text.lower() or "<!--" in text:
        raise SetupError(
            "this plotly cannot be put into a page", where=str(path), remedy="pip install --upgrade plotly"
        )
    return text


@lru_cache(maxsize=1)
def environment() -> Environment:
    """Templates with every value escaped; what a result file does not carry shows as nothing."""
    made = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals.update(
        eval_tables=parts.eval_tables,
        eval_facts=parts.eval_facts,
        level_of=level_of,
        audit_facts=parts.audit_facts,
        advice_facts=parts.advice_facts,
        text_of=text_of,
        title_of=title_of,
        figure=figure,
        interval=interval,
        is_interval=is_interval,
        objects=objects,
        entries=parts.entries,
        provenance_facts=parts.provenance_facts,
        max_alarms=pages.MAX_ALARMS,
    )
    return made


@lru_cache(maxsize=16)
def static(name: str) -> str:
    """A style sheet or script of the page, as a browser reads it."""
    return _one_kind_of_line_end((_HERE / "static" / name).read_text(encoding="utf-8"))


def _one_kind_of_line_end(text: str) -> str:
    """Browsers make every line end a line feed before they compute the hash."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
