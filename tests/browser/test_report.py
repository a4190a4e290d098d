"""The report in a real browser: drawn, quiet, closed, accessible, fast."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preftune.report import build
from tests.browser.conftest import Watched, axe_violations
from tests.report.folders import HOSTILE, make_run, make_sweep, make_trl_run, write_json

Tab = Callable[..., Watched]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of every kind: one run, several, sweeps; hostile text in the first."""
    folder = tmp_path_factory.mktemp("pages")
    make_run(folder / "hostile", text=HOSTILE)
    make_run(folder / "a")
    make_run(folder / "b", beta=0.5, seed=1)
    make_trl_run(folder / "trl")
    make_sweep(folder / "sweep")
    make_sweep(folder / "three", third_field=True)
    kinds = {"hostile": ["hostile"], "several": ["a", "b", "trl"], "sweep": ["sweep"], "three": ["three"]}
    return {kind: build([folder / name for name in names], folder / f"{kind}.html") for kind, names in kinds.items()}


@pytest.mark.parametrize("kind", ["hostile", "several", "sweep", "three"])
def test_every_plot_is_drawn_quietly_and_without_a_request(watched: Tab, pages: dict[str, Path], kind: str) -> None:
    tab = watched().open(pages[kind])
    places, drawn = tab.count_plots()
    assert places == drawn
    assert places >= 9
    assert tab.complaints == []
    # The page itself, its empty icon, and pictures that it draws itself.
    outside = [url for url in tab.requests if not url.startswith(("data:", "blob:")) and url != pages[kind].as_uri()]
    assert outside == []


def test_text_of_a_model_executes_nothing(watched: Tab, pages: dict[str, Path]) -> None:
    tab = watched().open(pages["hostile"])
    tab.count_plots()
    tab.page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert tab.page.title() == "hostile · preftune report"
    assert tab.page.locator("img").count() == 0
    assert "</script><img src=x" in tab.page.locator("#samples").inner_text()
    # Were a script to come in all the same, the policy would stop it.
    tab.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
    tab.page.evaluate(
        "() => { const s = document.createElement('script'); s.text = 'document.title = 2'; document.body.append(s); }"
    )
    assert tab.page.title() == "hostile · preftune report"


@pytest.mark.parametrize(
    ("kind", "scheme", "width"),
    [
        pytest.param("hostile", "light", 1280, marks=pytest.mark.slow),
        pytest.param("several", "dark", 1280, marks=pytest.mark.slow),
        pytest.param("three", "light", 390, marks=pytest.mark.slow),
        ("sweep", "dark", 390),
    ],
)
def test_accessible(watched: Tab, pages: dict[str, Path], kind: str, scheme: str, width: int) -> None:
    tab = watched(color_scheme=scheme, width=width).open(pages[kind])
    tab.count_plots()
    assert axe_violations(tab.page) == []
    overflow = tab.page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert overflow <= 0


def test_the_theme_follows_the_system_until_it_is_switched(watched: Tab, pages: dict[str, Path]) -> None:
    page = watched(color_scheme="dark").open(pages["several"]).page
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(colour)
    page.emulate_media(color_scheme="light")
    page.wait_for_function("() => document.documentElement.dataset.theme === 'light'")
    light = page.evaluate(colour)
    assert light != dark
    page.get_by_role("button", name="Switch between light and dark").click()
    assert page.evaluate(colour) == dark


def test_axis_smoothing_runs_and_zoom(watched: Tab, pages: dict[str, Path]) -> None:
    page = watched().open(pages["several"]).page
    page.evaluate("preftune.drawAll()")
    of_loss = "document.querySelector('[data-plot=loss]')"
    lines = page.evaluate(f"{of_loss}.data.length")
    for value, title in (("tokens", "tokens"), ("time", "seconds (spread evenly over steps)"), ("step", "step")):
        page.get_by_label(value if value != "step" else "steps", exact=True).check()
        assert page.evaluate(f"{of_loss}.layout.xaxis.title.text") == title
    page.get_by_label("smooth training lines").check()
    assert page.evaluate(f"{of_loss}.data.length") == lines + 3
    page.get_by_label("smooth training lines").uncheck()
    page.locator("input[name=run][value='0']").uncheck()
    assert page.evaluate(f"{of_loss}.data.length") < lines
    page.evaluate(f"Plotly.relayout({of_loss}, {{'xaxis.range[0]': 10, 'xaxis.range[1]': 20}})")
    page.wait_for_function("() => document.querySelector('[data-plot=entropy]').layout.xaxis.range?.[1] === 20")
    page.get_by_role("button", name="Reset zoom").click()
    assert page.evaluate(f"{of_loss}.layout.xaxis.autorange") is not False


def test_keyboard_reaches_content_and_controls(watched: Tab, pages: dict[str, Path]) -> None:
    page = watched().open(pages["hostile"]).page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.locator("input[name=axis]").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("preftune.state.axis") == "tokens"


def test_prints_every_plot_in_light_colours(watched: Tab, pages: dict[str, Path], tmp_path: Path) -> None:
    page = watched(color_scheme="dark").open(pages["several"]).page
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert page.evaluate("document.querySelectorAll('.plot:not(.drawn)').length") == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.pdf(path=tmp_path / "page.pdf", prefer_css_page_size=True)


def test_without_javascript_every_figure_is_in_a_table(watched: Tab, pages: dict[str, Path]) -> None:
    tab = watched(java_script_enabled=False)
    tab.page.goto(pages["several"].as_uri())
    assert "The plots need JavaScript" in tab.page.locator("noscript").inner_text()
    assert tab.page.locator("#curves details table").count() == tab.page.locator("#curves .plot").count()


def make_long_run(folder: Path, num_values: int = 200_000) -> Path:
    """A run with ten metrics, `num_values` in all, and one spike in each that must stay visible."""
    draw = np.random.default_rng(0)
    metrics: tuple[str, ...] = ("loss", "grad_norm", "learning_rate", "entropy", "logps/chosen", "logps/rejected")
    metrics += ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    num_lines = num_values // len(metrics)
    values = draw.normal(size=(num_lines, len(metrics)))
    values[num_lines // 3] = 50.0
    rows: list[dict[str, Any]] = [dict(zip(metrics, row.tolist(), strict=True)) for row in values]
    for step, row in enumerate(rows, start=1):
        row["step"] = step
    write_json(folder / "trainer_state.json", {"log_history": rows, "global_step": num_lines})
    return folder


def test_two_hundred_thousand_points_open_in_under_two_seconds(
    watched: Tab, tmp_path: Path, record_property: Any
) -> None:
    out = build([make_long_run(tmp_path / "run")], tmp_path / "long.html")
    measured = [measure(watched(), out) for _ in range(3)]
    best = min(measured, key=lambda times: times["cpu"])
    record_property("seconds", json.dumps(best))
    print("seconds:", json.dumps(measured))
    # Processor time of the page's thread: other programs on this machine cannot make it longer.
    assert best["cpu"] < 2


def measure(tab: Watched, out: Path) -> dict[str, float]:
    """Seconds until something is painted, until all that is on the screen is drawn, and until every plot is."""
    session = tab.page.context.new_cdp_session(tab.page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    tab.open(out)
    drawn = "new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(performance.now()))))"
    ready = tab.page.evaluate(drawn)
    metrics = {entry["name"]: entry["value"] for entry in session.send("Performance.getMetrics")["metrics"]}
    paint = tab.page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    start = tab.page.evaluate("performance.now()")
    tab.page.evaluate("preftune.drawAll()")
    rest = tab.page.evaluate("performance.now()") - start
    times = {"first paint": paint, "ready": ready, "all plots": ready + rest}
    return {name: round(value / 1000, 3) for name, value in times.items()} | {"cpu": round(metrics["TaskDuration"], 3)}


def test_spikes_stay_visible_and_zooming_brings_back_every_point(watched: Tab, tmp_path: Path) -> None:
    out = build([make_long_run(tmp_path / "run", 50_000)], tmp_path / "long.html")
    page = watched().open(out).page
    page.evaluate("preftune.drawAll()")
    loss = "document.querySelector('[data-plot=loss]')"
    shown = page.evaluate(f"{loss}.data[0].y")
    assert len(shown) <= 1200
    assert max(shown) == 50.0
    page.evaluate(f"Plotly.relayout({loss}, {{'xaxis.range[0]': 100, 'xaxis.range[1]': 200}})")
    # Steps 100 to 200, and the one before, so that the line comes in from the edge.
    page.wait_for_function(f"() => {loss}.data[0].x.length === 102")
