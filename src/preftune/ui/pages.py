"""The live page's HTML: the report's templates with a script that follows the runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from preftune import __version__
from preftune.report.html import SCRIPTS, content_policy, embed, environment, plotly_script, static, unwanted_sheets
from preftune.report.page import Page, page_payload
from preftune.ui.folders import Entry, status_of
from preftune.ui.launch import SETTINGS

_HERE = Path(__file__).parent


def index_page(root: Path, found: list[dict[str, Any]]) -> str:
    """The list of runs and sweeps.

    Args:
        root: The folder that is shown.
        found: What :func:`preftune.ui.folders.overview` says about each.

    Returns:
        HTML.
    """
    theme, style, script = static("theme.js"), _style(), "\n".join(map(_own, ("watch.js", "index.js", "launch.js")))
    return str(
        _template("index.html.j2").render(
            root=root.resolve().name or str(root),
            found=found,
            settings=SETTINGS,
            theme=Markup(theme),
            style=Markup(style),
            script=Markup(script),
            policy=content_policy([theme, script], [style], connect="'self'"),
            version=__version__,
        )
    )


def view_page(page: Page, chosen: list[Entry]) -> str:
    """Runs as a report that follows them.

    Args:
        page: Their content.
        chosen: The folders behind it.

    Returns:
        HTML.
    """
    library, theme, style = plotly_script(), static("theme.js"), _style()
    script = "\n".join([*(static(name) for name in SCRIPTS), _own("watch.js"), _own("live.js")])
    followed = [{"key": e.key, "label": e.label, "kind": e.kind, "status": status_of(e.folder)} for e in chosen]
    return str(
        _template("view.html.j2").render(
            page=page,
            followed=followed,
            policy=content_policy([theme, library, script], [style, ""], connect="'self'"),
            unwanted=unwanted_sheets(library),
            theme=Markup(theme),
            library=Markup(library),
            script=Markup(script),
            style=Markup(style),
            data=embed(page_payload(page) | {"sections": sections(page)}),
            made="",
            version=__version__,
        )
    )


def summary_part(page: Page) -> str:
    """The summary alone, for a page that is open."""
    return str(_template("part.html.j2").render(page=page))


def sections(page: Page) -> list[str]:
    """What the page has places for: when this changes, an open page has to be loaded again."""
    plots = [spec.key for spec, _ in page.plots]
    parts = ("alarms", "samples", "evaluation", "audit", "advice")
    there = [f"{view.index}:{part}:{len(getattr(view.run, part))}" for view in page.runs for part in parts]
    trials = [f"sweep:{sum(bool(t.get('metrics')) for t in view.sweep.trials)}" for view in page.sweeps]
    return [*plots, *there, *trials]


def _template(name: str) -> Any:
    from jinja2 import ChoiceLoader, FileSystemLoader

    shared = environment()
    if not isinstance(shared.loader, ChoiceLoader):
        shared.loader = ChoiceLoader([shared.loader, FileSystemLoader(_HERE / "templates")])  # type: ignore[list-item]
        shared.globals["sections"] = sections
    return shared.get_template(name)


def _style() -> str:
    return static("report.css") + "\n" + _own("ui.css")


def _own(name: str) -> str:
    return (_HERE / "static" / name).read_text(encoding="utf-8").replace("\r\n", "\n").replace("\r", "\n")
