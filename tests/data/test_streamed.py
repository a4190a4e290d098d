"""Streams of files: the rows that loading gives, piece by piece, and what a stream cannot do."""

from __future__ import annotations

import gzip
import json
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest

from preftune.cli.main import main
from preftune.data import load, streamed
from preftune.errors import ConfigError, DataError
from preftune.training import streams

ROWS = [{"prompt": f"p{n}", "chosen": f" c{n}", "rejected": f" r{n}", "extra": n} for n in range(11)]
CALL = {"type": "function", "function": {"name": "look", "arguments": {}}}
CHATS = [
    {
        "prompt": [{"role": "user", "content": f"p{n}"}],
        "chosen": [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "look", "arguments": {key: n}}}]}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for n, key in enumerate(["city", "place", "city", "time", "place"])
]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "BLOCK", 3)


def lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def as_lines(path: Path, rows: list[Any]) -> str:
    lines(path / "rows.jsonl", rows)
    return str(path / "rows.jsonl")


def as_packed(path: Path, rows: list[Any]) -> str:
    with gzip.open(path / "rows.ndjson.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path / "rows.ndjson.gz")


def as_parquet(path: Path, rows: list[Any]) -> str:
    datasets.Dataset.from_list(rows).to_parquet(str(path / "rows.parquet"))
    return str(path / "rows.parquet")


def as_saved(path: Path, rows: list[Any]) -> str:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(path / "saved"))
    return str(path / "saved")


def as_parts(path: Path, rows: list[Any]) -> str:
    (path / "folder").mkdir()
    for number, part in enumerate((rows[:4], rows[4:])):
        lines(path / "folder" / f"train-0000{number}-of-00002.jsonl", part)
    lines(path / "folder" / "test.jsonl", rows[:2])
    return str(path / "folder")


CONTAINERS: list[Callable[[Path, list[Any]], str]] = [as_lines, as_packed, as_parquet, as_saved, as_parts]


@pytest.mark.parametrize("rows", [ROWS, CHATS], ids=["texts", "calls"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_the_rows_are_those_that_loading_gives(
    container: Callable[[Path, list[Any]], str], rows: list[Any], tmp_path: Path
) -> None:
    name = container(tmp_path, rows)
    expected = load(name, with_test=False)["train"].to_list()
    stream = load(name, streaming=True)["train"]
    assert isinstance(stream, datasets.IterableDataset)
    found = list(stream)
    assert len(found) == len(rows)
    columns = ("prompt", "chosen", "rejected")
    if rows is ROWS:
        assert [{name: row[name] for name in columns} for row in found] == [
            {name: row[name] for name in columns} for row in expected
        ]
    else:
        arguments = [row["chosen"][-1]["tool_calls"][0]["function"]["arguments"] for row in found]
        assert arguments == [{"city": 0}, {"place": 1}, {"city": 2}, {"time": 3}, {"place": 4}]
    # And again from the beginning.
    assert list(stream) == found


def test_columns_are_renamed_and_looked_into(tmp_path: Path) -> None:
    lines(tmp_path / "rows.jsonl", [{"q": "why", "a": {"good": " so", "bad": " no"}}] * 5)
    names = {"q": "prompt", "a.good": "chosen", "a.bad": "rejected"}
    found = list(load(str(tmp_path / "rows.jsonl"), columns=names, streaming=True)["train"])
    assert found == [{"prompt": "why", "chosen": " so", "rejected": " no"}] * 5


def test_what_the_first_rows_show_is_told_once(tmp_path: Path) -> None:
    lines(tmp_path / "rows.jsonl", [{**row, "passage": f"It says {row['extra']}."} for row in ROWS])
    with pytest.warns(UserWarning, match=r"rows\.jsonl: not used, although .*'passage'; name them with `dataset_col"):
        stream = load(str(tmp_path / "rows.jsonl"), streaming=True)["train"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(stream)) == len(ROWS)
    # What cannot be used is refused before anything is built.
    lines(tmp_path / "rows.jsonl", [{"prompt": "p", "chosen": 1, "rejected": "r"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:1"):
        load(str(tmp_path / "rows.jsonl"), streaming=True)


def test_a_bad_line_is_named_wherever_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    texts = [json.dumps(row) for row in ROWS]
    texts[7] = "{broken"
    path.write_text("\n".join(texts), encoding="utf-8")
    stream = load(str(path), streaming=True)["train"]
    with pytest.raises(DataError, match=r"rows\.jsonl:8"):
        list(stream)
    aside = tmp_path / "aside.jsonl"
    stream = load(str(path), streaming=True, on_bad_rows="skip", quarantine_path=str(aside))["train"]
    with pytest.warns(UserWarning, match=r"rows\.jsonl:8: malformed JSON.*left out and kept in .*aside\.jsonl"):
        kept = list(stream)
    assert [row["prompt"] for row in kept] == [row["prompt"] for row in ROWS if row["extra"] != 7]
    # It is read again, and the row is kept aside and told of once.
    assert list(stream) == kept
    assert len(aside.read_text(encoding="utf-8").splitlines()) == 1
    # Of a file that ends in one, too.
    path.write_text("\n".join([*texts[:7], "{broken"]), encoding="utf-8")
    with pytest.warns(UserWarning, match=r"rows\.jsonl:8"):
        assert len(list(load(str(path), streaming=True, on_bad_rows="skip")["train"])) == 7


@pytest.mark.parametrize(
    ("name", "split", "error", "message"),
    [
        ("rows.csv", "train", DataError, r"cannot be read piece by piece.*rows\.csv.*preftune data convert"),
        ("rows.json", "train", DataError, r"cannot be read piece by piece"),
        ("rows.jsonl", "train[:10]", ConfigError, "end it with max_steps"),
        ("rows.jsonl", "train_prefs", ConfigError, "no such split.*allowed: train"),
        ("nothing.jsonl", "train", DataError, "no such file.*did you mean"),
        ("empty.jsonl", "train", DataError, "holds no rows"),
        ("cut.jsonl.gz", "train", DataError, "cannot be read"),
    ],
)
def test_what_a_stream_cannot_do(name: str, split: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    lines(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected\na,b,c\n", encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("\n\n", encoding="utf-8")
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(error, match=message):
        list(load(str(tmp_path / name), split=split, streaming=True)["train"])


def test_a_mixture_is_drawn_from_by_weight(tmp_path: Path) -> None:
    for name in "ab":
        lines(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{n}", "chosen": "c", "rejected": "r"} for n in range(40)])
    entries = [{"id": str(tmp_path / "a.jsonl"), "weight": 0.6}, {"id": str(tmp_path / "b.jsonl"), "weight": 0.2}]
    stream = load(dataset_mixture={"datasets": entries, "seed": 3}, streaming=True)["train"]
    drawn = Counter(row["prompt"][0] for row in islice(stream, 4 * 40))
    # Three of four, give or take four standard deviations of a binomial share over 160 draws.
    assert abs(drawn["a"] / sum(drawn.values()) - 0.75) < 4 * (0.75 * 0.25 / 160) ** 0.5
    assert {row["prompt"] for row in stream} == {f"{name}{n}" for name in "ab" for n in range(40)}
    assert list(stream) == list(load(dataset_mixture={"datasets": entries, "seed": 3}, streaming=True)["train"])
    assert list(stream) != list(load(dataset_mixture={"datasets": entries, "seed": 4}, streaming=True)["train"])
    with pytest.raises(ConfigError, match="cannot be divided"):
        load(dataset_mixture={"datasets": entries, "test_split_size": 0.1}, streaming=True)
    for value in ("abc", 1.5, -1, True):
        for streaming in (True, False):
            with pytest.raises(ConfigError, match=r"dataset_mixture\.seed: not a seed"):
                load(dataset_mixture={"datasets": entries, "seed": value}, streaming=streaming)
    with pytest.raises(ConfigError, match="nothing to train on"):
        load(dataset_mixture={"datasets": [{**entries[0], "weight": 0}]}, streaming=True)


def test_a_mixture_keeps_messages_as_they_are_and_makes_text_messages(tmp_path: Path) -> None:
    named = [{**row, "prompt": [{"role": "user", "name": "Bob", "content": f"q{n}"}]} for n, row in enumerate(CHATS)]
    for name, rows in (("calls", CHATS), ("named", named), ("texts", ROWS)):
        lines(tmp_path / f"{name}.jsonl", rows)
    entries = [{"id": str(tmp_path / f"{name}.jsonl")} for name in ("calls", "named", "texts")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = list(load(dataset_mixture={"datasets": entries[:2]}, streaming=True)["train"])
    # No message has the fields of another.
    assert all(row in [*CHATS, *named] for row in found)
    with pytest.warns(UserWarning, match="text is made a question and its answer"):
        found = list(load(dataset_mixture={"datasets": entries}, streaming=True)["train"])
    assert {row["prompt"][0]["content"] for row in found} == {f"{kind}{n}" for kind in "pq" for n in range(5)} | {
        f"p{n}" for n in range(11)
    }
    # Supervised examples of two forms are refused, as without a stream.
    lines(tmp_path / "plain.jsonl", [{"text": "all of it"}] * 3)
    lines(tmp_path / "asked.jsonl", [{"prompt": "p", "completion": " c"}] * 3)
    pieces = [{"id": str(tmp_path / f"{name}.jsonl")} for name in ("plain", "asked")]
    for streaming in (True, False):
        with pytest.raises(DataError, match=r"different forms: .*plain\.jsonl \(text\); .*\(prompt, completion\)"):
            load(dataset_mixture={"datasets": pieces}, streaming=streaming, for_sft=True)
    # Rows of one file are told apart too; a source of which nothing can be used ends the draws.
    lines(tmp_path / "both.jsonl", [ROWS[0], CHATS[0]])
    with pytest.warns(UserWarning, match="text is made a question"):
        kept = list(load(str(tmp_path / "both.jsonl"), streaming=True)["train"])
    assert kept[0]["chosen"] == [{"role": "assistant", "content": "c0"}]
    lines(tmp_path / "empty.jsonl", [{"prompt": "p", "chosen": "", "rejected": ""}] * 3)
    mixture = {"datasets": [entries[2], {"id": str(tmp_path / "empty.jsonl")}]}
    told = pytest.warns(UserWarning, match=r"empty\.jsonl:1.*left out")
    with told, pytest.raises(DataError, match=r"empty\.jsonl: the stream holds no rows that can be used"):
        list(load(dataset_mixture=mixture, streaming=True, on_bad_rows="skip")["train"])


# ---- on the command line ---------------------------------------------------------------------------------------------

RUN = (
    *("dpo", "--model_name_or_path", "{world}/model", "--dataset_name", "{world}/pairs.jsonl", "--max_steps", "5"),
    *("--per_device_train_batch_size", "2", "--report_to", "none", "--use_cpu", "true", "--advice", "false"),
    *("--train_sampling_strategy", "sequential", "--learning_rate", "1e-2", "--disable_tqdm", "true"),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.faults.worlds import build, make_pairs

    folder = tmp_path_factory.mktemp("streamed")
    build(folder)
    lines(folder / "pairs.jsonl", make_pairs(40))
    return folder


def run(world: Path, out: Path, *more: str) -> int:
    return main([*(word.format(world=world) for word in RUN), "--output_dir", str(out), *more])


@pytest.mark.parametrize("late", [False, True])
def test_a_run_learns_the_same_from_a_stream_and_goes_on_in_it(
    world: Path, tmp_path: Path, late: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(streams, "MOST_ROWS_AHEAD", 0 if late else 1 << 30)
    assert run(world, tmp_path / "loaded") == 0
    expected = (tmp_path / "loaded" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert run(world, tmp_path / "streamed", "--streaming") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "dataset_streaming" in told
    assert f"preftune eval --model {tmp_path / 'streamed'} --dataset_name" in told
    assert (tmp_path / "streamed" / "model.safetensors").read_bytes() == expected
    record = json.loads((tmp_path / "streamed" / "provenance.json").read_text(encoding="utf-8"))
    assert record["data"]["train"]["stream"] is True
    again = tmp_path / "again"
    assert run(world, again, "--streaming", "--save_steps", "3") == 0
    (again / "model.safetensors").unlink()
    for late_folder in again.glob("checkpoint-5"):
        late_folder.rename(tmp_path / "set aside")
    assert run(world, again, "--streaming", "--save_steps", "3", "--resume_from_checkpoint", "true") == 0
    assert (again / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("verb", ["sft", "kto"])
def test_single_answers_are_streamed_too(world: Path, tmp_path: Path, verb: str) -> None:
    from tests.faults.worlds import make_pairs

    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in make_pairs(12)]
    rows[1::2] = [row | {"label": False} for row in rows[1::2]]
    lines(tmp_path / "rows.jsonl", [{k: v for k, v in row.items() if verb == "kto" or k != "label"} for row in rows])
    argv = [word.format(world=world) for word in RUN]
    argv[0], argv[argv.index("--dataset_name") + 1] = verb, str(tmp_path / "rows.jsonl")
    found = []
    for more in ((), ("--streaming",)):
        out = tmp_path / f"out{len(more)}"
        assert main([*argv, "--output_dir", str(out), *more]) == 0
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--test_split_size", "0.2"), "a stream cannot be divided"),
        (("--eval_strategy", "epoch"), "name dataset_test_split"),
    ],
)
def test_settings_that_a_stream_does_not_go_with(
    argv: tuple[str, ...], message: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(world, tmp_path / "out", "--streaming", *argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("verb", [("data", "audit"), ("data", "show"), ("advise",)])
def test_other_verbs_need_all_rows(verb: tuple[str, ...], world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*verb, "--dataset_name", str(world / "pairs.jsonl"), "--model_name_or_path", str(world / "model")]
    assert main([*argv, "--streaming"]) == 2
    assert "only training reads a stream" in capsys.readouterr().err
