"""The page: nothing in it runs, nothing leaves it, nothing breaks it."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import preftune
from preftune.errors import SetupError
from preftune.report import build
from preftune.report.html import embed, render
from preftune.report.page import gather
from preftune.report.read import read_all
from tests.report.folders import HOSTILE, make_run, make_sweep, make_trl_run, write_json


class Elements(HTMLParser):
    """Tags with their attributes, and the text of every script and style."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=False)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag if tag in self.inline else ""
        if self._inside:
            self.inline[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.inline[self._inside][-1] += data


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    make_run(folder / "run", text=HOSTILE)
    return build([folder / "run"], folder / "out" / "r.html", title=HOSTILE).read_text(encoding="utf-8")


def test_no_text_becomes_an_element(hostile: str) -> None:
    tags = {tag for tag, _ in Elements(hostile).found}
    assert "img" not in tags
    assert "b" not in tags
    assert "{{ 7*7 }}" in hostile
    assert 'onerror="' not in hostile.replace("&#34;", "'").split("<script", 1)[0]


def test_nothing_is_fetched_and_no_attribute_runs_code(hostile: str) -> None:
    for tag, attributes in Elements(hostile).found:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert "style" not in attributes, tag
        address = attributes.get("src") or attributes.get("href") or "#"
        assert address.startswith("#") or address == "data:,", (tag, address)


def test_the_policy_names_every_script_and_style_and_no_other(hostile: str) -> None:
    page = Elements(hostile)
    policy = next(a["content"] for tag, a in page.found if tag == "meta" and a.get("http-equiv")) or ""
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert (
        directives["default-src"]
        == directives["connect-src"]
        == directives["base-uri"]
        == directives["form-action"]
        == "'none'"
    )
    scripts = [a.get("type") for tag, a in page.found if tag == "script"]
    running = [text for text, kind in zip(page.inline["script"], scripts, strict=True) if kind is None]

    def hashes(texts: list[str]) -> set[str]:
        return {f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts}

    assert set(directives["script-src"].split()) == hashes(running)
    assert set(directives["style-src-elem"].split()) == hashes([*page.inline["style"], ""])
    assert "unsafe-eval" not in policy


def test_data_cannot_leave_its_element() -> None:
    text = str(embed({"a": HOSTILE + "<!--<script>"}))
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == {"a": HOSTILE + "<!--<script>"}


def test_a_folder_of_every_kind_makes_a_page(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", beta=0.5, seed=1)
    make_trl_run(tmp_path / "trl", checkpoint=60)
    make_sweep(tmp_path / "sweep", third_field=True)
    runs, sweeps = read_all([tmp_path / name for name in ("a", "b", "trl", "sweep")])
    page = gather(runs, sweeps)
    text = render(page)
    assert page.title == "4 runs and sweeps compared"
    assert {name for name, _ in page.differences} >= {"beta"}
    for section in ("summary", "sweep", "curves", "alarms", "samples", "evaluation", "audit", "advice", "settings"):
        assert f'<section id="{section}"' in text
    # Nothing that the templates ask for is missing under another name.
    assert "Undefined" not in text.split("<script>")[1]


def test_differences_in_the_final_figures(tmp_path: Path) -> None:
    for name, loss in (("a", 0.5), ("b", 0.75)):
        write_json(tmp_path / name / "trainer_state.json", {"log_history": [{"step": 1, "loss": loss}]})
    table = gather(*read_all([tmp_path / "a", tmp_path / "b"])).final
    assert table is not None
    assert table.rows == [["Loss", "0.5", "0.75 (+0.25)"]]


def _mutations(draw: random.Random, value: Any) -> Any:
    """The same structure with parts taken out or replaced by something of another type."""
    wrong: list[Any] = [None, "text", 3, -1e300, True, [], {}, [None], {"mean": "x"}, [[1]], HOSTILE]
    if draw.random() < 0.12:
        return draw.choice(wrong)
    if isinstance(value, dict):
        return {key: _mutations(draw, entry) for key, entry in value.items() if draw.random() > 0.1}
    if isinstance(value, list):
        return [_mutations(draw, entry) for entry in value]
    return value


@pytest.mark.parametrize("seed", range(40))
def test_result_files_of_any_shape_make_a_page(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    make_run(tmp_path / "run", num_steps=6)
    make_sweep(tmp_path / "sweep", with_runs=False)
    for path in [*(tmp_path / "run").iterdir(), tmp_path / "sweep" / "sweep.json"]:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            path.write_text("".join(json.dumps(_mutations(draw, row)) + "\n" for row in rows))
        else:
            content = _mutations(draw, json.loads(path.read_text()))
            # The outermost type is tested elsewhere.
            write_json(path, content if isinstance(content, dict) else {"log_history": [{"step": 1, "loss": 1}]})
    (tmp_path / "run" / "trainer_state.json").exists() or make_trl_run(tmp_path / "run")
    runs, sweeps = read_all([tmp_path / "run", tmp_path / "sweep"])
    assert "</html>" in render(gather(runs, sweeps))


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    make_trl_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="the report cannot be written"):
        build([tmp_path / "run"], tmp_path / "file" / "report.html")


def test_the_page_says_which_version_made_it(hostile: str) -> None:
    assert f"by preftune {preftune.__version__}" in hostile


def test_long_lists_are_folded(tmp_path: Path) -> None:
    text = render(gather(*read_all([make_run(tmp_path / "run")])))
    # Samples of the last step are on the page; those of earlier ones, and checks that found nothing, behind a line.
    older = re.findall(r'<details class="older"><summary>([^<]*)</summary>', text)
    assert older == ["Step 0: 1 sample", "1 check found nothing to do"]
    assert "Sources disagree:" in text
