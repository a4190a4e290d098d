"""The live page in a real browser: it follows, compares, asks, and keeps quiet."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from preftune.ui.server import doorway
from tests.browser.conftest import Watched, axe_violations
from tests.report.folders import HOSTILE, history, make_run, make_sweep, write_json
from tests.ui.conftest import Server, start, world
from tests.ui.test_rows import run_folder

Tab = Callable[..., Watched]

__all__ = ["world"]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server over two runs, one with hostile text, and a sweep."""
    root = tmp_path_factory.mktemp("live")
    make_run(root / "one", num_steps=20)
    make_run(root / "hostile", text=HOSTILE, num_steps=20)
    make_sweep(root / "sweep", with_runs=False)
    process, server = start(root)
    with process:
        yield server
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


def check(tab: Watched, server: Server) -> None:
    """No complaint, and no request to anywhere else."""
    assert tab.complaints == []
    assert [url for url in tab.requests if not url.startswith((server.address, "data:", "blob:"))] == []


def test_the_list_follows_the_folder_and_leads_to_a_comparison(watched: Tab, live: Server) -> None:
    tab = watched().open(live.address)
    page = tab.page
    assert page.locator("#list tr").count() == 3
    assert axe_violations(page) == []
    page.get_by_text("connected", exact=True).wait_for()
    make_run(live.root / "later", num_steps=5)
    page.get_by_role("link", name="later").wait_for()
    for name in ("one", "hostile"):
        page.get_by_label(f"compare {name}").check()
    page.get_by_role("button", name="Compare the marked ones").click()
    page.wait_for_function(
        "() => document.documentElement.dataset.ready === 'true' && !!document.getElementById('curves')"
    )
    assert page.locator("h1").inner_text() == "2 runs compared"
    places, drawn = tab.count_plots()
    assert places == drawn
    assert page.title() == "2 runs compared · preftune live"
    check(tab, live)
    shutil.rmtree(live.root / "later")


def test_an_open_page_grows_with_its_run_and_outlives_it(watched: Tab, live: Server) -> None:
    folder = make_run(live.root / "growing", num_steps=10)
    tab = watched().open(f"{live.address}view?id={live.key('growing')}")
    page = tab.page
    page.wait_for_function("() => document.documentElement.dataset.refreshed")
    page.evaluate("preftune.drawAll()")
    last = "() => document.querySelector('[data-plot=entropy]').data[0].x.at(-1)"
    assert page.evaluate(last) == 10
    write_json(folder / "trainer_state.json", {"global_step": 30, "max_steps": 30, "log_history": history(30)})
    page.wait_for_function(f"() => ({last})() === 30")
    shutil.rmtree(folder)
    page.get_by_text("the folder has vanished").wait_for()
    assert page.locator("[data-entry] .status").inner_text() == "gone"
    # What was read stays; the one refused request is the browser's own note about the folder that is gone.
    assert page.evaluate(last) == 30
    assert [line for line in tab.complaints if "404" not in line] == []


def test_buttons_of_a_run_that_does_not_go_on_are_off(watched: Tab, live: Server) -> None:
    tab = watched().open(f"{live.address}view?id={live.key('hostile')}")
    tab.page.wait_for_function("() => document.documentElement.dataset.refreshed")
    assert tab.page.get_by_role("button", name="Stop hostile").is_disabled()
    assert tab.page.get_by_role("button", name="Save a checkpoint of hostile").is_disabled()
    tab.page.get_by_label("Prompt", exact=True).fill("Hello")
    tab.page.get_by_role("button", name="Answer").click()
    tab.page.get_by_text("holds no weights").wait_for()
    assert tab.page.title() == "hostile · preftune live"
    assert [line for line in tab.complaints if "409" not in line] == []


@pytest.mark.slow
def test_labelled_answers_are_browsed_with_their_masks(watched: Tab, live: Server, world: Path) -> None:
    folder = make_run(live.root / "kto", num_steps=5)
    run_folder(folder, world, "kto", world / "pairs.jsonl", pairing="none", max_length=24)
    tab = watched(width=390).open(f"{live.address}view?id={live.key('kto')}")
    page = tab.page
    page.get_by_role("button", name="Show rows").click()
    page.locator(".row-card").first.wait_for(timeout=120_000)
    assert "undesirable, trained on" in page.locator("#rows-legend").inner_text()
    assert page.locator("#rows-status").inner_text() == "32 rows; showing 0 to 19"
    # The first half are the chosen answers of 16 pairs, the others the rejected ones.
    assert page.locator(".row-card .tok.chosen").count() == 16
    assert page.locator(".row-card .tok.rejected").count() == 4
    page.get_by_role("button", name="Next").click()
    page.get_by_text("32 rows; showing 20 to 31").wait_for()
    assert axe_violations(page) == []
    check(tab, live)
    shutil.rmtree(folder)


def test_twelve_tabs_of_one_browser_all_follow(watched: Tab, live: Server) -> None:
    """Browsers open six connections to a server: a tab that held one would leave the seventh waiting for ever."""
    folder = make_run(live.root / "crowd", num_steps=5)
    first = watched().open(f"{live.address}view?id={live.key('crowd')}")
    tabs = [first.page]
    for _ in range(11):
        page = first.page.context.new_page()
        page.goto(f"{live.address}view?id={live.key('crowd')}", timeout=20_000)
        tabs.append(page)
    for page in tabs:
        page.get_by_text("connected", exact=True).wait_for(timeout=20_000)
    shutil.rmtree(folder)
    for page in tabs:
        page.bring_to_front()
        page.get_by_text("the folder has vanished").wait_for(timeout=20_000)


def test_the_file_that_open_shows_leads_to_the_page(watched: Tab, live: Server) -> None:
    tab = watched()
    with doorway(live.address) as shown:
        tab.page.goto(shown)
        tab.page.wait_for_url(live.address)
        tab.page.get_by_text("connected", exact=True).wait_for()
    assert [line for line in tab.complaints if "favicon" not in line] == []


def test_at_most_twelve_runs_are_compared(watched: Tab, live: Server) -> None:
    for number in range(13):
        make_run(live.root / "many" / f"run-{number:02d}", num_steps=3)
    tab = watched().open(live.address)
    for number in range(13):
        box = tab.page.get_by_label(f"compare many/run-{number:02d}")
        box.click()
        assert box.is_checked() == (number < 12)
    assert tab.page.locator("#limit").inner_text() == "At most 12 fit side by side."
    check(tab, live)
    shutil.rmtree(live.root / "many")


def test_a_folder_that_comes_back_is_followed_again(watched: Tab, live: Server) -> None:
    folder = make_run(live.root / "moving", num_steps=5)
    tab = watched().open(f"{live.address}view?id={live.key('moving')}")
    page = tab.page
    page.wait_for_function("() => document.documentElement.dataset.refreshed")
    away = folder.rename(live.root.parent / "away")
    page.get_by_text("the folder has vanished").wait_for()
    away.rename(folder)
    page.get_by_text("connected", exact=True).wait_for()
    assert page.locator("[data-entry] .status").inner_text() == "unknown"
    shutil.rmtree(folder)


@pytest.mark.slow
def test_the_live_page_is_accessible(watched: Tab, live: Server) -> None:
    tab = watched(width=390, color_scheme="dark").open(f"{live.address}view?id={live.key('one')}")
    tab.page.wait_for_function("() => document.documentElement.dataset.refreshed")
    tab.count_plots()
    assert axe_violations(tab.page) == []
    assert tab.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
