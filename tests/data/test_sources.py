"""Files, folders, saved data sets, mixtures and the mixer."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, concatenate_datasets

from preftune.data import load, load_report
from preftune.errors import ConfigError, DataError

ROWS = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(10)]


def write_jsonl(path: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return str(path)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    name = path.name
    if name.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".parquet"):
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        text = json.dumps(rows, indent=1) if ".json" in name and ".jsonl" not in name else ""
        text = text or "\n".join(json.dumps(row) for row in rows)
        data = text.encode("utf-8")
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz", "a.parquet", "a.csv"])
def test_every_kind_of_file(tmp_path: Path, name: str) -> None:
    rows = [*ROWS, {"prompt": 'line\none, "quoted"\u2028x', "chosen": "日本", "rejected": "é"}]
    data = load(write(tmp_path / name, rows))
    assert list(data) == ["train"]
    assert data["train"].to_list() == rows


def test_json_lines_in_a_json_file(tmp_path: Path) -> None:
    assert load(write_jsonl(tmp_path / "a.json"))["train"].to_list() == ROWS


def test_saved_data_sets_and_their_test_split(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    assert load(str(tmp_path / "one"))["train"].to_list() == ROWS
    both = DatasetDict({"train_prefs": Dataset.from_list(ROWS), "test_prefs": Dataset.from_list(ROWS[:2])})
    both.save_to_disk(str(tmp_path / "two"))
    data = load(str(tmp_path / "two"), split="train_prefs")
    assert data["train"].to_list() == ROWS
    assert data["test"].to_list() == ROWS[:2]
    with pytest.raises(ConfigError, match="no such split; got 'train'; allowed: train_prefs, test_prefs"):
        load(str(tmp_path / "two"))


def test_folder_of_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", ROWS[:6])
    write_jsonl(tmp_path / "train-00001-of-00002.jsonl", ROWS[6:])
    write_jsonl(tmp_path / "test.jsonl", ROWS[:3])
    data = load(str(tmp_path))
    assert data["train"].to_list() == ROWS
    assert data["test"].to_list() == ROWS[:3]


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train[:3]", ROWS[:3]), ("train[2:4]", ROWS[2:4]), ("train[50%:]", ROWS[5:]), ("train[-1:]", ROWS[-1:])],
)
def test_slices_of_local_files(tmp_path: Path, split: str, expected: list[Any]) -> None:
    assert load(write_jsonl(tmp_path / "a.jsonl"), split=split)["train"].to_list() == expected


def test_columns_are_kept_or_renamed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "x", "good": "c", "bad": "r", "prompt": "old", "n": 1}])
    renamed = load(path, columns={"q": "prompt", "good": "chosen", "bad": "rejected"})
    assert renamed["train"].to_list() == [{"prompt": "x", "chosen": "c", "rejected": "r"}]
    with pytest.raises(ConfigError, match=r"no such column: chosen.*write the mapping as \{their name: our name\}"):
        load(path, columns={"prompt": "q", "chosen": "good", "rejected": "bad"})
    with pytest.raises(ConfigError, match="no such column: qq"):
        load(path, columns=["qq"])
    kept = load(write_jsonl(tmp_path / "b.jsonl", [{"messages": "x", "text": "t"}]), columns=["text"])
    assert kept["train"].to_list() == [{"text": "t"}]


def test_different_tools_stay_apart(tmp_path: Path) -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    tools = [[{"name": "f", "parameters": {"a": "int"}}], [{"name": "g", "parameters": {"b": "int"}}]]
    rows = [
        {
            "prompt": [{"role": "user", "content": "p"}],
            "chosen": [{"role": "assistant", "content": "c"}],
            "rejected": [{"role": "assistant", "tool_calls": calls}],
            "tools": tools[0],
        },
        {
            "prompt": [{"role": "user", "content": "p", "name": "n"}],
            "chosen": [{"role": "assistant", "content": "c"}],
            "rejected": [{"role": "assistant", "content": "r"}],
            "tools": tools[1],
        },
    ]
    data = load(write_jsonl(tmp_path / "a.jsonl", rows))["train"]
    assert [json.loads(row["tools"]) for row in data] == tools
    assert data[0]["rejected"] == rows[0]["rejected"]
    assert data[0]["prompt"] == rows[0]["prompt"]


def test_malformed_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(ROWS[0]), '{"prompt": "p", "chosen"', "", json.dumps(ROWS[1]).replace("p1", "caf\\u00e9")]
    data = "\n".join(lines).encode() + b'\n{"prompt": "caf\xe9", "chosen": "c", "rejected": "r"}\n'
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.jsonl:2, field 'line': malformed JSON"):
        load(str(path))
    quarantine = tmp_path / "q.jsonl"
    quarantine.write_text("somebody else's\n")
    with pytest.raises(ConfigError, match="not written as a quarantine file"):
        load(str(path), on_bad_rows="skip", quarantine_path=str(quarantine))
    assert quarantine.read_text() == "somebody else's\n"
    quarantine.unlink()
    # From an earlier run.
    load(str(path), on_bad_rows="skip", quarantine_path=str(quarantine))
    train = load(str(path), on_bad_rows="skip", quarantine_path=str(quarantine))["train"]
    assert train["prompt"][:] == ["p0", "café"]
    entries = [json.loads(line) for line in quarantine.read_text(encoding="ascii").splitlines()]
    assert [(entry["place"], entry["reason"]) for entry in entries] == [
        (f"{path}:2", "malformed_json"),
        (f"{path}:5", "invalid_utf8"),
    ]
    assert entries[0]["row"] == lines[1]
    report = load_report(train)
    assert report is not None
    assert (report.rows_read, report.num_lost) == (4, 2)
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        load(str(path), on_bad_rows="warn")


def test_invalid_utf8_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"prompt": "p", "chosen": "c", "rejected": "r"}\n{"prompt": "caf\xe9", "chosen": "c", "rejected": "r"}'
    )
    with pytest.raises(DataError, match=r"a\.jsonl:2, field 'prompt': 'prompt' is not valid text .*UTF-8"):
        load(str(path))


def test_malformed_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"prompt": "p"},\n {"prompt": ]')
    with pytest.raises(DataError, match=r"a\.json:2: malformed JSON"):
        load(str(tmp_path / "a.json"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": 1}' * 50)[:-9])
    with pytest.raises(DataError, match=r"b\.jsonl\.gz: the file cannot be read"):
        load(str(tmp_path / "b.jsonl.gz"))
    (tmp_path / "c.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"c\.parquet: not a readable parquet file"):
        load(str(tmp_path / "c.parquet"))
    (tmp_path / "d.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no rows"):
        load(str(tmp_path / "d.jsonl"))
    (tmp_path / "e.csv").write_text("prompt,chosen,rejected\np,c,r\np,c\n")
    with pytest.raises(DataError, match=r"e\.csv:3, field 'row': fewer fields"):
        load(str(tmp_path / "e.csv"))
    (tmp_path / "f.txt").write_text("x")
    with pytest.raises(DataError, match="unknown kind of file"):
        load(str(tmp_path / "f.txt"))


def test_missing_files_and_folders(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "prefs.jsonl")
    with pytest.raises(DataError, match=r"no such file.*did you mean .*prefs\.jsonl"):
        load(str(tmp_path / "pref.jsonl"))
    with pytest.raises(DataError, match="does not exist either"):
        load(str(tmp_path / "sub" / "pref.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder holds no data set"):
        load(str(tmp_path / "empty"))


def test_bytes_in_parquet_that_are_not_text(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    good, bad = pa.array([b"p0", b"caf\xe9"]).view(pa.utf8()), pa.array(["c", "c"])
    pq.write_table(pa.table({"prompt": good, "chosen": bad, "rejected": pa.array(["r", "r"])}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 1 \(the first is 0\).*not UTF-8"):
        load(str(tmp_path / "a.parquet"))
    assert load(str(tmp_path / "a.parquet"), on_bad_rows="skip")["train"]["prompt"][:] == ["p0"]


def test_ranked_and_unpaired_files(tmp_path: Path) -> None:
    ranked = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 2, 3]}])
    assert len(load(ranked)["train"]) == 1
    assert len(load(ranked, pairing="all")["train"]) == 3
    with pytest.raises(ConfigError, match="nothing says which of them are desirable"):
        load(ranked, pairing="none")
    rows = [{"prompt": "p", "completion": c, "label": c == "a"} for c in "abc"]
    labelled = write_jsonl(tmp_path / "b.jsonl", rows)
    paired = load(labelled)["train"]
    assert paired.to_list() == [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    report = load_report(paired)
    assert report is not None
    assert "1 of 3 labelled answers have no counterpart" in report.notes[0]
    assert load(labelled, pairing="none")["train"].to_list() == rows


def test_mixture_keeps_the_rows_that_datasets_would(tmp_path: Path) -> None:
    first, second = write_jsonl(tmp_path / "a.jsonl"), write_jsonl(tmp_path / "b.jsonl", ROWS[:6])
    mixture = {
        "datasets": [
            {
                "id": first,
                "config": None,
                "split": "train",
                "columns": ["prompt", "chosen", "rejected"],
                "weight": 0.55,
            },
            {"id": second, "weight": 0.5},
        ],
        "seed": 7,
        "test_split_size": 0.25,
    }
    parts = [
        Dataset.from_list(rows).shuffle(seed=7).select(range(int(len(rows) * weight)))
        for rows, weight in ((ROWS, 0.55), (ROWS[:6], 0.5))
    ]
    expected = concatenate_datasets(parts).shuffle(seed=7).train_test_split(test_size=0.25, seed=7)
    data = load(dataset_mixture=mixture)
    assert {name: data[name].to_list() for name in data} == {name: expected[name].to_list() for name in expected}
    assert len(data["train"]) + len(data["test"]) == 5 + 3


def test_mixture_without_seed_uses_the_argument(tmp_path: Path) -> None:
    mixture = {"datasets": [{"id": write_jsonl(tmp_path / "a.jsonl")}]}
    order = np.random.default_rng(3).permutation(10)
    assert load(dataset_mixture=mixture, seed=3)["train"].to_list() == [ROWS[i] for i in order]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"datasets": []}, "must list at least one"),
        ({"dataset": 1}, "unknown key; got 'dataset'.*did you mean 'datasets'"),
        ({"test_split_size": 1.5}, "share or a number of rows"),
        ({"test_split_size": 10}, "1 to 9 rows"),
        ({"datasets": [{"config": "x"}]}, "needs an id"),
        ({"datasets": [{"id": "a.jsonl", "wait": 1}]}, r"datasets\[0\]: unknown key; got 'wait'.*'weight'"),
    ],
)
def test_malformed_mixtures(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    mixture = {"datasets": [{"id": write_jsonl(tmp_path / "a.jsonl")}], **change}
    with pytest.raises(ConfigError, match=message):
        load(dataset_mixture=mixture)


def test_mixture_weight_must_be_a_share(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"datasets\[0\].weight: not a share"):
        load(dataset_mixture={"datasets": [{"id": write_jsonl(tmp_path / "a.jsonl"), "weight": 2}]})


def test_mixer_takes_the_first_fraction_of_train_and_all_of_test(tmp_path: Path) -> None:
    for name, rows in (("one", ROWS), ("two", ROWS[:5])):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", rows)
        write_jsonl(tmp_path / name / "test.jsonl", rows[:2])
    mixer = {str(tmp_path / "one"): 0.55, str(tmp_path / "two"): 1.0}
    data = load(dataset_mixer=mixer, dataset_splits=["train", "test"])
    expected = concatenate_datasets([Dataset.from_list(ROWS[:5]), Dataset.from_list(ROWS[:5])]).shuffle(seed=42)
    assert data["train"].to_list() == expected.to_list()
    assert sorted(row["prompt"] for row in data["test"]) == ["p0", "p0", "p1", "p1"]
    assert list(load(dataset_mixer=mixer, dataset_splits=["train"])) == ["train"]
    assert list(load(dataset_mixer={write_jsonl(tmp_path / "a.jsonl"): 1.0})) == ["train"]
    with pytest.raises(ConfigError, match="not a share"):
        load(dataset_mixer={str(tmp_path / "one"): -0.1})
    with pytest.raises(ConfigError, match="contain either train or test"):
        load(dataset_mixer=mixer, dataset_splits=["validation"])
    with pytest.raises(ConfigError, match="nothing to train on"):
        load(dataset_mixer={str(tmp_path / "one"): 0.0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no data set given"),
        ({"dataset_name": "a", "dataset_mixer": {"b": 1.0}}, "say exactly once what to load"),
        ({"dataset_mixer": {"a": 1.0}, "streaming": True}, "dataset_mixer does not go with streaming"),
        ({"dataset_name": "a", "dataset_splits": ["train"]}, "belongs to dataset_mixer"),
        ({"dataset_name": "a", "dataset_format": "hhh"}, "unknown data format"),
        ({"dataset_name": "a", "pairing": "some"}, "unknown pairing"),
        ({"dataset_name": "a", "on_bad_rows": "x"}, "unknown on_bad_rows"),
        ({"dataset_name": "a", "quarantine_path": "q.jsonl"}, "only written with on_bad_rows: skip"),
        ({"dataset_mixture": {"datasets": []}, "columns": ["a"]}, "columns does not go with dataset_mixture"),
        ({"dataset_mixer": {"a": 1.0}, "dataset_config": "c"}, "dataset_config does not go with dataset_mixer"),
    ],
)
def test_contradicting_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(**arguments)


def test_configuration_of_a_local_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no configurations"):
        load(write_jsonl(tmp_path / "a.jsonl"), dataset_config="x")


def test_hub_failures_are_one_line() -> None:
    with pytest.raises(DataError, match="cannot be loaded from the Hub") as caught:
        load("preftune-tests/not-there")
    assert "\n" not in str(caught.value)


def test_hub_splits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    splits = {"train_prefs": Dataset.from_list(ROWS), "test_prefs": Dataset.from_list(ROWS[:1])}
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> Dataset:
        asked.append((name, config, split))
        return splits[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: list(splits))
    data = load("some/name", dataset_config="c", split="train_prefs")
    assert asked == [("some/name", "c", "train_prefs"), ("some/name", "c", "test_prefs")]
    assert data["test"].to_list() == ROWS[:1]
