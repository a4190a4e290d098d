"""A real browser, without a window, that reports everything it complains about and asks for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Watched:
    """A tab and what went on in it.

    Attributes:
        page: Playwright's page.
        complaints: Errors and warnings of the console, and exceptions.
        requests: Addresses that were asked for.
    """

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, target: Path | str) -> Watched:
        """Open a file or an address, and wait for the page's script."""
        self.page.goto(target.resolve().as_uri() if isinstance(target, Path) else target)
        self.page.wait_for_function("() => document.documentElement.dataset.ready === 'true'")
        return self

    def count_plots(self) -> tuple[int, int]:
        """Places for plots, and those with something drawn in them."""
        self.page.evaluate("preftune.drawAll()")
        marks = ".scatterlayer path, .scatterlayer .point, .heatmaplayer image, .barlayer path"
        script = f"""() => {{
            const places = [...document.querySelectorAll('[data-plot]')];
            return [places.length, places.filter((place) => place.querySelector('{marks}')).length];
        }}"""
        places, drawn = self.page.evaluate(script)
        return places, drawn


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The system's Chromium."""
    from playwright import sync_api

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("no Chromium on this machine: install it with the system's package manager")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def watched(chromium: Any) -> Iterator[Any]:
    """Makes tabs: ``watched(color_scheme="dark", width=390)``."""
    contexts = []

    def make(*, color_scheme: str = "light", width: int = 1280, height: int = 900, **options: Any) -> Watched:
        viewport = {"width": width, "height": height}
        context = chromium.new_context(color_scheme=color_scheme, viewport=viewport, **options)
        contexts.append(context)
        tab = Watched(context.new_page())

        def complain(line: Any) -> None:
            if line.type in ("error", "warning"):
                tab.complaints.append(line.text)

        tab.page.on("console", complain)
        tab.page.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.page.on("request", lambda request: tab.requests.append(request.url))
        return tab

    yield make
    for context in contexts:
        context.close()


def axe_violations(page: Any) -> list[str]:
    """What axe-core finds wrong with a page: rule and element."""
    import axe_playwright_python as module

    script = Path(module.__file__).parent / "axe.min.js"
    # Through the debugger, as the page's own policy lets no other script in.
    page.evaluate(script.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")
    return [f"{rule['id']}: {node['html'][:160]}" for rule in found["violations"] for node in rule["nodes"]]
