"""Layouts of other trainers and of published data, each read as its project means it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from datasets import Dataset

from preftune.data import DataOptions, load, load_report, prepare
from preftune.data.formats import FORMATS, NOT_USED, column_uses, detect
from preftune.data.formats.base import BadRow
from preftune.data.unpaired import prepare_unpaired
from preftune.errors import ConfigError, DataError
from tests.data.conftest import assistant, make_tokenizer, user

SYSTEM = {"role": "system", "content": "s"}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(tmp_path: Path, row: dict[str, Any], **keywords: Any) -> dict[str, Any]:
    """The one row of a file, without fields that are null."""
    rows = load(write(tmp_path / "a.jsonl", [row]), **keywords)["train"].to_list()
    return {key: value for key, value in rows[0].items() if value is not None}


# What is in the file, and the pair that is meant: prompt, chosen, rejected.
PAIRS: dict[str, tuple[dict[str, Any], Any, Any, Any]] = {
    "axolotl chat_template": (
        {"messages": [user("p")], "chosen": assistant("c"), "rejected": assistant("r")},
        [user("p")],
        "c",
        "r",
    ),
    "LLaMA-Factory, answers as text": (
        {"conversations": [{"from": "human", "value": "p"}], "chosen": "c", "rejected": "r"},
        [user("p")],
        "c",
        "r",
    ),
    "ms-swift rejected_response": (
        {"messages": [SYSTEM, user("p"), assistant("c")], "rejected_response": "r"},
        [SYSTEM, user("p")],
        "c",
        "r",
    ),
    "ms-swift, several rejected": (
        {"messages": [user("p"), assistant("c")], "rejected_response": ["r", "q"]},
        [user("p")],
        "c",
        "r",
    ),
    "ms-swift rejected_messages": (
        {"messages": [user("p"), assistant("c")], "rejected_messages": [user("p"), assistant("r")]},
        [user("p")],
        "c",
        "r",
    ),
    "ms-swift query and response": ({"query": "p", "response": "c", "rejected_response": "r"}, [user("p")], "c", "r"),
    "distilabel, argilla's Orca": (
        {"system": "s", "input": "p", "chosen": "c", "rejected": "r", "status": "x"},
        [SYSTEM, user("p")],
        "c",
        "r",
    ),
    "distilabel chosen_response": (
        {"prompt": "p", "chosen_response": "c", "rejected_response": "r"},
        [user("p")],
        "c",
        "r",
    ),
    "Stack Exchange": ({"question": "p", "response_j": "c", "response_k": "r"}, [user("p")], "c", "r"),
    "OpenAI": (
        {
            "input": {"messages": [SYSTEM, user("p")]},
            "preferred_output": [assistant("c")],
            "non_preferred_output": [assistant("r")],
        },
        [SYSTEM, user("p")],
        "c",
        "r",
    ),
    "SHP, A": ({"history": "p", "human_ref_A": "c", "human_ref_B": "r", "labels": 1}, [user("p")], "c", "r"),
    "SHP, B": ({"history": "p", "human_ref_A": "r", "human_ref_B": "c", "labels": 0}, [user("p")], "c", "r"),
    "arena conversations": (
        {
            "conversation_a": [user("p"), assistant("r")],
            "conversation_b": [user("p"), assistant("c")],
            "winner": "model_b",
        },
        [user("p")],
        "c",
        "r",
    ),
    "arena votes": (
        {
            "prompt": "p",
            "response_a": "c",
            "response_b": "r",
            "winner_model_a": 1,
            "winner_model_b": 0,
            "winner_tie": 0,
        },
        [user("p")],
        "c",
        "r",
    ),
    "HelpSteer2 preference": (
        {"prompt": "p", "response_1": "c", "response_2": "r", "preference_strength": -2},
        [user("p")],
        "c",
        "r",
    ),
    "HelpSteer3": (
        {"context": [user("p")], "response1": "r", "response2": "c", "overall_preference": 3},
        [user("p")],
        "c",
        "r",
    ),
    "PKU-SafeRLHF": (
        {"prompt": "p", "response_0": "r", "response_1": "c", "better_response_id": 1, "safer_response_id": 0},
        [user("p")],
        "c",
        "r",
    ),
    "WebGPT": (
        {"question": {"full_text": "p"}, "answer_0": "r", "answer_1": "c", "score_0": -0.5, "score_1": 0.5},
        [user("p")],
        "c",
        "r",
    ),
    "prompt repeated in the answers": (
        {"prompt": [user("p")], "chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]},
        [user("p")],
        "c",
        "r",
    ),
    "messages and answers of text": ({"prompt": [user("p")], "chosen": "c", "rejected": "r"}, [user("p")], "c", "r"),
    "system beside text": (
        {"system": "s", "prompt": "p", "chosen": "c", "rejected": "r"},
        [SYSTEM, user("p")],
        "c",
        "r",
    ),
    "history of messages beside messages": (
        {"history": [user("q"), assistant("a")], "prompt": [user("p")], "chosen": "c", "rejected": "r"},
        [user("q"), assistant("a"), user("p")],
        "c",
        "r",
    ),
    "system_prompt beside a system turn of the same words": (
        {"system_prompt": "s", "prompt": [SYSTEM, user("p")], "chosen": "c", "rejected": "r"},
        [SYSTEM, user("p")],
        "c",
        "r",
    ),
    "whole records as JSON text, with their tools": (
        {
            "chosen": json.dumps({"messages": [user("p"), assistant("c")], "tools": None}),
            "rejected": json.dumps({"messages": [user("p"), assistant("r")], "tools": None}),
        },
        [user("p")],
        "c",
        "r",
    ),
    "system beside messages and rejected_messages": (
        {
            "system": "s",
            "messages": [user("p"), assistant("c")],
            "rejected_messages": [user("p"), assistant("r")],
        },
        [SYSTEM, user("p")],
        "c",
        "r",
    ),
    "role human and gpt beside content": (
        {
            "prompt": [{"role": "Human", "content": "p"}],
            "chosen": [{"role": "gpt", "content": "c"}],
            "rejected": [{"role": "MODEL", "content": "r"}],
        },
        [user("p")],
        "c",
        "r",
    ),
    "from and content": (
        {
            "prompt": [{"from": "user", "content": "p"}],
            "chosen": [{"role": "assistant", "value": "c"}],
            "rejected": [{"speaker": "bot", "text": "r"}],
        },
        [user("p")],
        "c",
        "r",
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_of_other_projects(kind: str, tmp_path: Path) -> None:
    row, prompt, chosen, rejected = PAIRS[kind]
    expected = {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    assert read(tmp_path, row) == expected


@pytest.mark.parametrize("kind", PAIRS)
def test_the_same_from_arrow(kind: str) -> None:
    """A data set in memory, as the Python classes get it: Arrow gives all rows the same fields."""
    row, prompt, chosen, rejected = PAIRS[kind]
    tokenizer = make_tokenizer()
    plain = {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    ours, _ = prepare(Dataset.from_list([row]), tokenizer, DataOptions())
    expected, _ = prepare(Dataset.from_list([plain]), tokenizer, DataOptions())
    assert ours.to_list() == expected.to_list()


@pytest.mark.parametrize(
    "row",
    [
        {"conversation_a": [user("p"), assistant("x")], "conversation_b": [user("p"), assistant("y")], "winner": "tie"},
        {"prompt": "p", "response_a": "x", "response_b": "y", "winner": "tie (bothbad)"},
        {
            "prompt": "p",
            "response_a": "x",
            "response_b": "y",
            "winner_model_a": 0,
            "winner_model_b": 0,
            "winner_tie": 1,
        },
        {"prompt": "p", "response_1": "x", "response_2": "y", "preference_strength": 0},
        {"prompt": "p", "responses": ["x", "y"], "scores": [3, 3]},
    ],
)
@pytest.mark.parametrize("policy", ["skip", "warn"])
def test_ties_are_left_out_and_are_nobodys_fault(row: dict[str, Any], policy: Any, tmp_path: Path) -> None:
    wins = [dict(row) for _ in range(2)]
    for one in wins:
        one |= {"winner": "model_a"} if "winner" in one else {}
        one |= {"winner_model_a": 1, "winner_tie": 0} if "winner_tie" in one else {}
        one |= {"preference_strength": -1} if "preference_strength" in one else {}
        one |= {"scores": [3, 1]} if "scores" in one else {}
    name = write(tmp_path / "a.jsonl", [row, wins[0], row, wins[1], row])
    train = load(name, on_bad_rows=policy)["train"]
    options = DataOptions(on_bad_rows=policy, max_dropped_share=0.1)
    dataset, report = prepare(train, make_tokenizer(), options)
    assert len(dataset) == 2
    assert "3 ties left out: neither answer is preferred" in report.findings
    assert not any("bad rows" in line for line in report.findings)
    # The same rows, straight into the Python class.
    dataset, report = prepare(Dataset.from_list([row, *wins]), make_tokenizer(), options)
    assert (len(dataset), report.bad_rows) == (2, {"no_preference": 1})


def test_only_ties_is_no_data(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", [{"prompt": "p", "response_a": "x", "response_b": "y", "winner": "tie"}])
    with pytest.raises(DataError, match=r"no usable rows \(1 no_preference"):
        load(name, on_bad_rows="skip")


def test_rated_answers_of_one_prompt_are_compared(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "p", "response": "a", "helpfulness": 1, "verbosity": 4},
        {"prompt": "p", "response": "b", "helpfulness": 4, "verbosity": 1},
        {"prompt": "q", "response": "c", "helpfulness": 4, "verbosity": 1},
        {"prompt": "r", "response": "d", "helpfulness": 2, "verbosity": 1},
        {"prompt": "r", "response": "e", "helpfulness": 2, "verbosity": 1},
    ]
    train = load(write(tmp_path / "a.jsonl", rows), on_bad_rows="skip")["train"]
    assert train.to_list() == [{"prompt": "p", "chosen": "b", "rejected": "a", "margin": 3.0}]
    report = load_report(train)
    assert report is not None
    assert report.columns["verbosity"] == NOT_USED
    assert any("1 rated answers have no other answer to the same prompt" in note for note in report.notes)
    dataset, told = prepare(Dataset.from_list(rows), make_tokenizer(), DataOptions(on_bad_rows="skip"))
    assert len(dataset) == 1
    assert told.bad_rows == {"no_preference": 1}


LABELLED: dict[str, dict[str, Any]] = {
    "LLaMA-Factory": {"messages": [user("p"), assistant("c")], "label": True},
    "ShareGPT": {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "c"}], "kto_tag": True},
    "Alpaca": {"instruction": "p", "input": "", "output": "c", "kto_tag": True},
    "ms-swift": {"query": "p", "response": "c", "label": "yes"},
    "TRL with kto_tag": {"prompt": [user("p")], "completion": [assistant("c")], "kto_tag": 1},
    "as JSON text": {"messages": json.dumps([user("p"), assistant("c")]), "label": "true"},
}


@pytest.mark.parametrize("kind", LABELLED)
def test_labelled_answers_of_other_trainers(kind: str, tmp_path: Path) -> None:
    row = LABELLED[kind]
    other = row | {name: False for name in ("label", "kto_tag") if name in row}
    expected = [{"prompt": [user("p")], "completion": [assistant("c")], "label": label} for label in (True, False)]
    name = write(tmp_path / "a.jsonl", [row, other])
    assert load(name, pairing="none")["train"].to_list() == expected
    data, _ = prepare_unpaired(Dataset.from_list([row, row]), make_tokenizer(), DataOptions())
    assert data["label"][:] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [user("p"), assistant("c")], "thumbs_up": True}, r"columns: \{thumbs_up: label\}"),
        ({"prompt": "p", "completion": "c", "my_label": "good"}, r"columns: \{my_label: label\}"),
        ({"messages": [user("p"), assistant("c")], "label": "maybe"}, "'label' holds 'maybe': write true or false"),
        ({"prompt": "p", "completion": "c"}, "name the column with"),
    ],
)
def test_a_missing_label_is_named(row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        prepare_unpaired(Dataset.from_list([row]), make_tokenizer(), DataOptions())


@pytest.mark.parametrize(
    "turns",
    [[user("q")], [assistant("a"), user("q")], [{"role": "tool", "content": "t"}]],
    ids=["user", "ends", "tool"],
)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_answers_that_cannot_be_meant(turns: list[Any], side: str, tmp_path: Path) -> None:
    good = {"prompt": [user("p")], "chosen": [assistant("c")], "rejected": [assistant("r")]}
    name = write(tmp_path / "a.jsonl", [good, good | {side: turns}])
    with pytest.raises(DataError, match=rf"a\.jsonl:2, field '{side}'"):
        load(name)
    assert len(load(name, on_bad_rows="skip")["train"]) == 1
    # TRL trains on it, so that its drop-in class goes on and says so.
    _, report = prepare(
        Dataset.from_list([good, good | {side: turns}]), make_tokenizer(), DataOptions(on_bad_rows="warn")
    )
    assert sum(report.bad_rows.values()) == 1


# ---- columns --------------------------------------------------------------------------------------------------------


def test_nested_fields(tmp_path: Path) -> None:
    row = {"data": {"q": "p", "answers": [{"text": "c"}, {"text": "r"}]}, "meta": json.dumps({"who": "s"}), "id": 1}
    columns = {
        "data.q": "question",
        "data.answers.0.text": "chosen",
        "data.answers.1.text": "rejected",
        "meta.who": "system",
    }
    assert read(tmp_path, row, columns=columns)["prompt"] == [SYSTEM, user("p")]
    names = ["a.prompt", "a.chosen", "a.rejected"]
    assert read(tmp_path, {"a": PAIR}, columns=names) == PAIR
    with pytest.raises(ConfigError, match=r"no such column: other\.q"):
        read(tmp_path, row, columns={"other.q": "question"})


@pytest.mark.parametrize("name", FORMATS)
def test_every_column_a_format_reads_is_told(name: str) -> None:
    """What a format asks a row for is what it says that it uses."""
    from tests.data.test_formats import CASES

    class Watching(dict[str, Any]):
        asked: ClassVar[set[str]] = set()

        def __getitem__(self, key: str) -> Any:
            self.asked.add(key)
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            self.asked.add(key)
            return super().get(key, default)

    spec = FORMATS[name]
    for _, raw, _ in (case for case in CASES if case[0] == name):
        watching = Watching(raw)
        Watching.asked.clear()
        spec.convert(watching)
        silent = Watching.asked & set(raw) - set(spec.uses)
        assert not silent, f"{name} reads {silent} and does not say so"
        assert set(column_uses(spec, list(raw))) == set(raw)
    assert set(spec.required) <= set(spec.uses)


def test_a_format_with_a_wrong_row_says_which_field() -> None:
    with pytest.raises(BadRow) as caught:
        FORMATS["two_answers"].convert({"prompt": "p", "response_a": "x", "response_b": "y", "winner": "gpt-4"})
    assert (caught.value.reason, caught.value.field) == ("not_a_label", "winner")
    with pytest.raises(BadRow, match="does not end with an answer"):
        FORMATS["labelled_messages"].convert({"messages": [user("p")], "label": True})


def test_a_table_of_labels_is_not_taken_for_feedback() -> None:
    row = {"messages": [user("p"), assistant("c")], "label": "sports"}
    spec = detect(list(row), row)
    assert spec is not None
    assert spec.name == "messages"


# ---- containers -----------------------------------------------------------------------------------------------------

PAIR = {"prompt": "p é", "chosen": "c", "rejected": "r"}
CHAT = {"prompt": [user("p é")], "chosen": [assistant("c")], "rejected": [assistant("r")]}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv"])
def test_encodings(encoding: str, ending: str, tmp_path: Path) -> None:
    texts = {
        ".json": json.dumps([PAIR], ensure_ascii=False),
        ".jsonl": json.dumps(PAIR, ensure_ascii=False) + "\n",
        ".csv": "prompt,chosen,rejected\np é,c,r\n",
    }
    path = tmp_path / f"a{ending}"
    path.write_bytes(texts[ending].encode(encoding))
    assert load(str(path))["train"].to_list() == [PAIR]


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        (".json", json.dumps({"data": [PAIR]})),
        (".json", json.dumps({"version": 1, "examples": [PAIR]}, indent=2)),
        (".json", json.dumps({key: [value] for key, value in PAIR.items()})),
        (".json", json.dumps({key: {"0": value} for key, value in PAIR.items()})),
        (".json", json.dumps(PAIR, indent=2)),
        (".json", json.dumps({"features": [], "rows": [{"row_idx": 0, "row": PAIR, "truncated_cells": []}]})),
        (".jsonl", json.dumps([PAIR], indent=1)),
        (".ndjson", json.dumps(PAIR)),
        (".csv", "prompt;chosen;rejected\np é;c;r\n"),
        (".tsv", "prompt\tchosen\trejected\np é\tc\tr\n"),
        (".csv", ",prompt,chosen,rejected\n0,p é,c,r\n"),
    ],
)
def test_containers(ending: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{ending}"
    path.write_text(text, encoding="utf-8")
    assert load(str(path))["train"].to_list() == [PAIR]


def test_conversations_without_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([[{"from": "human", "value": "p"}, {"from": "gpt", "value": "c"}]]), encoding="utf-8")
    assert load(str(path), for_sft=True)["train"].to_list() == [{"messages": [user("p"), assistant("c")]}]


def test_several_answers_on_one_side_are_refused(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": ["c", "d"], "rejected": "r"}])
    with pytest.raises(DataError, match="'chosen' is a list of 2 texts"):
        load(name)


def test_pairs_without_a_prompt(tmp_path: Path) -> None:
    rows = [{"chosen": "Avast!", "rejected": "Good day."}]
    dataset, _ = prepare(load(write(tmp_path / "a.jsonl", rows))["train"], make_tokenizer(), DataOptions())
    assert dataset[0]["prompt_ids"] == []


def test_conversations_in_columns_and_in_rows_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({key: [value] for key, value in CHAT.items()}), encoding="utf-8")
    assert load(str(path))["train"].to_list() == [CHAT]
    path.write_text(json.dumps(CHAT, indent=1), encoding="utf-8")
    assert load(str(path))["train"].to_list() == [CHAT]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_conversations_in_a_sheet(ending: str, tmp_path: Path) -> None:
    """Pandas writes what Python prints, a database JSON, numpy lists without commas."""
    numpy = "[{'role': 'user', 'content': 'p é'}\n {'role': 'assistant', 'content': \"it's\"}\n"
    numpy += " {'role': 'user', 'content': 'q'}]"
    path = tmp_path / f"a.{ending}"
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, delimiter="\t" if ending == "tsv" else ",")
        out.writerow(CHAT)
        out.writerow([numpy, repr(CHAT["chosen"]), json.dumps(CHAT["rejected"])])
    rows = load(str(path))["train"].to_list()
    assert rows == [CHAT | {"prompt": [user("p é"), assistant("it's"), user("q")]}]


@pytest.mark.parametrize(
    ("name", "says"),
    [("a.xlsx", "save the sheet as CSV"), ("a.txt", "rename it to .jsonl"), ("a.zst", "unpack it first")],
)
def test_other_kinds_of_files_say_what_to_do(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=says):
        load(str(tmp_path / name))


def test_several_tables_in_one_file_are_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": [PAIR], "test": [PAIR]}), encoding="utf-8")
    with pytest.raises(DataError, match="holds several tables: train, test; write one file per split"):
        load(str(path))


def test_a_folder_of_one_file_and_a_folder_of_the_hub(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", [PAIR])
    assert len(load(str(tmp_path))["train"]) == 1
    (tmp_path / "repo" / "data").mkdir(parents=True)
    Dataset.from_list([PAIR]).to_parquet(str(tmp_path / "repo" / "data" / "train-00000-of-00001.parquet"))
    assert len(load(str(tmp_path / "repo"))["train"]) == 1


def test_a_transform_is_applied() -> None:
    def shout(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {key: [text.upper() for text in values] for key, values in batch.items()}

    rows = Dataset.from_list([{"prompt": "the cat", "chosen": " sat", "rejected": " no"}])
    tokenizer = make_tokenizer()
    ours, report = prepare(rows.with_transform(shout), tokenizer, DataOptions())
    assert tokenizer.decode(ours[0]["prompt_ids"]) == "THE CAT"
    assert any("transform" in line for line in report.warnings)
