"""Folders with one value that nobody expects: a report comes out of them, and the live page's list too."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from preftune.errors import PreftuneError
from preftune.report import build
from preftune.report.html import render
from preftune.report.page import gather, page_payload
from preftune.report.read import read_run, read_sweep
from preftune.ui.folders import find, overview
from tests.report.folders import history, make_run, make_sweep, write_json, write_lines

SEEDS = range(int(os.environ.get("PREFTUNE_HOSTILE_SEEDS", "8")))


def nested(depth: int, inner: Any = 1) -> Any:
    value = inner
    for _ in range(depth):
        value = [value]
    return value


VALUES: list[Any] = [
    None,
    True,
    "",
    "text",
    "12",
    -1,
    0,
    1e308,
    -1e308,
    5e-324,
    10**30,
    float("nan"),
    float("inf"),
    [],
    {},
    [None],
    [[1, "a"], {"b": None}],
    {"mean": "x", "low": None},
    {"mean": 1, "low": [], "high": {}},
    {"value": {"value": {}}},
    nested(60),
    {"a": nested(40)},
    "\ud800\udfff",
    "\u202e\x00\x1b[2J",
    "</script><script>alert(1)</script>",
    "x" * 10_000,
    "1e999",
    [1] * 300,
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place inside a JSON value."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inside:
        yield from places(entry, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    if not path:
        return other
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], other)
    return copy


def spoil(path: Path, draw: random.Random) -> str:
    """Put an odd value into one place of a JSON or JSON-lines file, or odd bytes into the file."""
    if draw.random() < 0.1:
        data = bytearray(path.read_bytes())
        for _ in range(draw.choice((1, 20))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        return "bytes"
    other = draw.choice(VALUES)
    try:
        lines = path.read_text("utf-8").strip().split("\n") if path.suffix == ".jsonl" else [path.read_text("utf-8")]
        number = draw.randrange(len(lines))
        content = json.loads(lines[number])
    except ValueError:
        return "damaged before"
    spot = draw.choice([place for place in places(content) if len(place) < 6])
    lines[number] = json.dumps(replaced(content, spot, other))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{path.name} {spot}: {str(other)[:40]!r}"


def page_of(folder: Path) -> str:
    sweep = read_sweep(folder) if (folder / "sweep.json").is_file() else None
    runs, sweeps = ([], [sweep]) if sweep is not None else ([read_run(folder)], [])
    return render(gather(runs, sweeps))


@pytest.mark.parametrize("seed", SEEDS)
def test_one_odd_value_anywhere(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    for trial in range(25):
        root = tmp_path / str(trial)
        run = make_run(root / "run", num_steps=4, eval_every=2)
        lines = history(4, eval_every=2)
        events = [{"event": "begin", "step": 0, "max_steps": 4, "pid": 99999, "started": 1.0, "machine": "m"}]
        events += [{"time": float(n), "step": line["step"], "epoch": 1.0, "logs": line} for n, line in enumerate(lines)]
        write_lines(run / "log.jsonl", events)
        sweep = make_sweep(root / "sweep", with_runs=False)
        files = sorted(path for path in root.rglob("*") if path.suffix in (".json", ".jsonl"))
        what = [spoil(draw.choice(files), draw) for _ in range(draw.choice((1, 1, 3)))]
        for folder in (run, sweep):
            try:
                assert "<!doctype html>" in page_of(folder).lower(), what
            except PreftuneError as error:
                odd = not str(error).isprintable()
            else:
                odd = False
            assert not odd, what
        for entry in find(root).values():
            json.dumps(overview(entry), allow_nan=False)
        json.dumps(page_payload(gather([read_run(run)], [])), allow_nan=False)


@pytest.mark.parametrize("depth", [63, 64, 65, 600, 990, 5_000, 200_000])
def test_nested_values(depth: int, tmp_path: Path) -> None:
    deep = "[" * depth + "]" * depth
    run = make_run(tmp_path / "run", num_steps=3)
    for name in ("log.jsonl", "alarms.jsonl", "samples.jsonl"):
        with (run / name).open("a") as file:
            file.write(f'{{"event": "begin", "step": 1, "max_steps": {deep}, "logs": {{"loss": {deep}}}}}\n')
    for name in ("eval.json", "audit.json", "advice.json", "provenance.json"):
        (run / name).write_text(f'{{"metrics": {{"accuracy": {deep}}}, "settings": {deep}, "findings": {deep}}}')
    (run / "config.yaml").write_text(f"beta: {deep}\n")
    assert "<!doctype html>" in page_of(run).lower()
    assert [overview(entry)["label"] for entry in find(tmp_path).values()] == ["run"]


def bomb(levels: int = 9, width: int = 9) -> str:
    """A billion values in a few hundred bytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "text", [bomb(), bomb(4, 60), "a: &a [*a]\n", "a: &a {b: *a}\n", "a: [" * 2000, "a: 1\n" * 400_000]
)
def test_yaml_that_grows_is_left_out_in_no_time(text: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=3)
    (run / "config.yaml").write_text(text)
    started = time.process_time()
    found = read_run(run)
    html = render(gather([found], []))
    assert found.config == {}
    assert any(note.startswith("config.yaml was left out") for note in found.notes)
    assert time.process_time() - started < 10
    assert len(html) < 20_000_000


def test_pipes_devices_and_folders_in_the_place_of_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=3)
    for name in ("log.jsonl", "config.yaml", "eval.json", "adapter_config.json"):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
    (run / "audit.json").unlink()
    (run / "audit.json").mkdir()
    (run / "advice.json").unlink()
    (run / "advice.json").symlink_to("/dev/zero")
    assert "<!doctype html>" in page_of(run).lower()
    build([run], tmp_path / "page.html")


def test_a_sweep_s_trials_of_all_kinds(tmp_path: Path) -> None:
    for number, value in enumerate(VALUES):
        folder = tmp_path / str(number)
        write_json(
            folder / "sweep.json", {"trials": [value, {"params": value, "metrics": {"x": value}}], "best": value}
        )
        assert "<!doctype html>" in page_of(folder).lower()
