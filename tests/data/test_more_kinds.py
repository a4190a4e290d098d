"""Kinds of files and rows that people of this trade have, beyond those of the first pages: each read as it is meant."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pytest
from datasets import Dataset

from preftune.data import DataOptions, load, load_report, prepare, prepare_sft
from preftune.data.formats import FORMATS, NOT_USED, column_uses
from preftune.data.unpaired import prepare_unpaired
from preftune.errors import DataError
from tests.data.conftest import CHATML, assistant, make_tokenizer, user
from tests.data.test_layouts import PAIR, SYSTEM, read, write
from tests.data.test_rendering import FAMILIES, pair, shown

# ---- containers -----------------------------------------------------------------------------------------------------

TWO = [PAIR, PAIR | {"prompt": "q", "chosen": "c, d"}]
LINES = [json.dumps(row) for row in TWO]
CONTAINERS: dict[str, tuple[str, str]] = {
    "commas between lines": (".jsonl", ",\n".join(LINES) + ",\n"),
    "an array with a comma left over": (".json", "[\n" + ",\n".join(LINES) + ",\n]"),
    "objects without a line end": (".json", "".join(LINES)),
    "pretty-printed objects": (".jsonl", "\n".join(json.dumps(row, indent=2) for row in TWO)),
    "pretty-printed objects with commas": (".json", ",\n".join(json.dumps(row, indent=2) for row in TWO)),
    "what Python prints": (".jsonl", "\n".join(map(repr, TWO))),
    "line ends of old Macintoshes": (".jsonl", "\r".join(LINES)),
    "line ends of Windows and empty lines": (".jsonl", "\r\n\r\n".join(LINES)),
    "a comment above": (".json", "// exported\n" + json.dumps(TWO)),
    "an answer of a service": (".json", json.dumps({"result": {"data": TWO, "total": 2}})),
    "rows by name": (".json", json.dumps({"a1": TWO[0], "b2": TWO[1]})),
    "rows by name, some of them numbers": (".json", json.dumps({"row-1": TWO[0], "2": TWO[1]}, indent=1)),
    "Excel's first line": (".csv", 'sep=;\nprompt;chosen;rejected\np é;c;r\nq;"c, d";r\n'),
    "spaces around names": (".csv", 'prompt, chosen ,rejected\np é,c,r\nq,"c, d",r\n'),
    "another ending": (".jsonlines", "\n".join(LINES)),
    "an ending in capitals": (".JSONL", "\n".join(LINES)),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_json_and_csv_as_people_have_them(kind: str, tmp_path: Path) -> None:
    ending, text = CONTAINERS[kind]
    (tmp_path / f"a{ending}").write_bytes(text.encode())
    assert load(str(tmp_path / f"a{ending}"))["train"].to_list() == TWO


def _zst(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": _zst
}  # fmt: skip


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("named", [True, False])
def test_packed_files(packed: str, ending: str, named: bool, tmp_path: Path) -> None:
    texts = {".jsonl": LINES[0], ".json": json.dumps([PAIR]), ".csv": "prompt,chosen,rejected\np é,c,r\n"}
    path = tmp_path / f"a{ending}{packed if named else ''}"
    path.write_bytes(PACK[packed](texts[ending].encode()))
    assert load(str(path))["train"].to_list() == [PAIR]


def test_arrow_in_both_of_its_forms(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([PAIR])
    pyarrow.feather.write_feather(table, str(tmp_path / "a.feather"))
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
        out.write_table(table)
    with pa.OSFile(str(tmp_path / "c.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    for name in ("a.feather", "b.arrow", "c.arrow"):
        assert load(str(tmp_path / name))["train"].to_list() == [PAIR]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        ("a.json", b"\n<!doctype html><html>404</html>", "a web page"),
        ("a.csv", b"PK\x03\x04rest", "a packed archive or a sheet"),
        ("a.json", b"PAR1rest", "a Parquet file under another name"),
        ("a.db", b"SQLite format 3\x00", "sqlite3 -json"),
        ("a.tar", b"x", "unpack it first"),
        ("a.jsonl", b"hello\nthere\n", r"a\.jsonl:1: no line can be read: malformed JSON"),
        (
            "a.jsonl",
            b'{"prompt": "p", "prompt": "q", "chosen": "c", "rejected": "r"}',
            "two values are called 'prompt'",
        ),
        ("a.csv", b"prompt,chosen,chosen\np,c,d\n", r"two columns have the same name; got \['chosen'\]"),
        ("a.csv", b"Prompt,CHOSEN,rejected\np,c,r\n", r"dataset_columns: \{Prompt: prompt, CHOSEN: chosen\}"),
    ],
)
def test_what_is_no_data_says_what_it_is(name: str, data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=says):
        load(str(tmp_path / name))


def test_the_same_value_twice_harms_nobody(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "prompt": "p", "chosen": "c", "rejected": "r"}\n')
    assert load(str(tmp_path / "a.jsonl"))["train"].to_list() == [PAIR | {"prompt": "p"}]


@pytest.mark.parametrize("field", ["conversation", "summaries", "turns"])
def test_the_list_of_one_row_is_not_taken_for_the_rows(field: str, tmp_path: Path) -> None:
    row = {"info": "i", field: [{"input": "p", "output": "c"}, {"input": "q", "output": "d"}]}
    name = write(tmp_path / "a.jsonl", [row])
    if field == "summaries":
        with pytest.raises(DataError, match="match no known data format"):
            load(name)
        return
    expected = [user("p"), assistant("c"), user("q"), assistant("d")]
    assert load(name, for_sft=True)["train"].to_list() == [{"messages": expected}]


# ---- layouts --------------------------------------------------------------------------------------------------------

# What is in the file; prompt, chosen and rejected as they are meant.
PAIRS: dict[str, tuple[dict[str, Any], Any, Any, Any]] = {
    "axolotl, conversation": (
        {"conversation": [user("p")], "chosen": assistant("c"), "rejected": assistant("r")},
        [user("p")],
        "c",
        "r",
    ),
    "a dialogue beside answers of text": (
        {"dialogue": [user("p"), assistant("a"), user("q")], "chosen": "c", "rejected": "r"},
        [user("p"), assistant("a"), user("q")],
        "c",
        "r",
    ),
    "Capybara, whole conversations beside one": (
        {
            "conversation": [{"input": "p", "output": ""}],
            "chosen": [user("p"), assistant("c")],
            "rejected": [user("p"), assistant("r")],
        },
        [user("p")],
        "c",
        "r",
    ),
    "LLaMA-Factory's first form": ({"instruction": "p", "input": "", "output": ["c", "r"]}, [user("p")], "c", "r"),
    "AlpacaFarm": (
        {"instruction": "p", "input": "i", "output_1": "r", "output_2": "c", "preference": 2},
        [user("p\ni")],
        "c",
        "r",
    ),
    "instruction and input under other answers": (
        {"instruction": "p", "input": "i", "chosen_response": "c", "rejected_response": "r"},
        [user("p\ni")],
        "c",
        "r",
    ),
    "winner and loser": ({"prompt": "p", "winner": "c", "loser": "r"}, [user("p")], "c", "r"),
    "good and bad": ({"question": "p", "bad_answer": "r", "good_answer": "c"}, [user("p")], "c", "r"),
    "better and worse": ({"query": "p", "worse_response": "r", "better_response": "c"}, [user("p")], "c", "r"),
    "two programs": ({"problem": "p", "chosen_code": "c", "rejected_code": "r", "error": "e"}, [user("p")], "c", "r"),
    "context messages": (
        {"context_messages": [user("p"), assistant("a"), user("q")], "chosen": "c", "rejected": "r"},
        [user("p"), assistant("a"), user("q")],
        "c",
        "r",
    ),
    "align-anything": (
        {"question": "p", "response_1": "r", "response_2": "c", "overall_response": 2, "response_1_model": "m"},
        [user("p")],
        "c",
        "r",
    ),
    "question and context": (
        {"question": "p", "context": "i", "chosen_answer": "c", "rejected_answer": "r", "system_message": "s"},
        [SYSTEM, user("p\ni")],
        "c",
        "r",
    ),
    "a conversation as context": (
        {"question": "q", "context": [user("p"), assistant("a")], "response_j": "c", "response_k": "r"},
        [user("p"), assistant("a"), user("q")],
        "c",
        "r",
    ),
    "summaries": ({"prompt": "p", "summary_0": "r", "summary_1": "c", "choice": 1}, [user("p")], "c", "r"),
    "a model's name wins": (
        {"prompt": "p", "response_a": "r", "response_b": "c", "winner": "Y-7", "model_a": "x", "model_b": "y-7"},
        [user("p")],
        "c",
        "r",
    ),
    "answers in camel case": (
        {"prompt": "p", "responseA": "c", "responseB": "r", "preferred": "A"},
        [user("p")],
        "c",
        "r",
    ),
    "earlier turns beside a prompt of votes": (
        {"history": [["q", "a"]], "prompt": "p", "response_a": "c", "response_b": "r", "winner": "model_a"},
        [user("q"), assistant("a"), user("p")],
        "c",
        "r",
    ),
    "text above answers of messages": (
        {"prompt": "p", "chosen": json.dumps(assistant("c")), "rejected": json.dumps(assistant("r"))},
        [user("p")],
        "c",
        "r",
    ),
    "encoded twice": (
        {
            "prompt": json.dumps(json.dumps([user("p")])),
            "chosen": json.dumps([assistant("c")]),
            "rejected": json.dumps([assistant("r")]),
        },
        [user("p")],
        "c",
        "r",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PAIRS)
def test_more_pairs_of_other_projects(kind: str, tmp_path: Path) -> None:
    row, prompt, chosen, rejected = PAIRS[kind]
    plain = {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    assert read(tmp_path, row) == plain
    # The same from memory, as the Python classes get it.
    tokenizer = make_tokenizer()
    ours, report = prepare(Dataset.from_list([row]), tokenizer, DataOptions(on_bad_rows="warn"))
    assert ours.to_list() == prepare(Dataset.from_list([plain]), tokenizer, DataOptions())[0].to_list()
    assert not any("although they hold" in line for line in report.findings)


SFT: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "Dolly": (
        {"instruction": "p", "context": "i", "response": "c", "category": "x"},
        [user("p\ni"), assistant("c")],
    ),
    "instruction, input, response": (
        {"instruction": "p", "input": "i", "response": "c"},
        [user("p\ni"), assistant("c")],
    ),
    "WildChat": (
        {"conversation": [user("p") | {"language": "English"}, assistant("c") | {"toxic": False}], "turn": 1},
        [user("p"), assistant("c")],
    ),
    "XTuner": (
        {"conversation": [{"system": "s", "input": "p", "output": "c"}]},
        [SYSTEM, user("p"), assistant("c")],
    ),
    "messages as a record of JSON": (
        {"messages": json.dumps({"messages": [user("p"), assistant("c")]})},
        [user("p"), assistant("c")],
    ),
    "nan as the system turn": ({"system": "nan", "instruction": "p", "output": "c"}, [user("p"), assistant("c")]),
    "prompt text, completion messages": ({"prompt": "p", "completion": [assistant("c")]}, [user("p"), assistant("c")]),
}


@pytest.mark.parametrize("kind", SFT)
def test_more_examples_of_other_projects(kind: str, tmp_path: Path) -> None:
    row, expected = SFT[kind]
    (found,) = load(write(tmp_path / "a.jsonl", [row]), for_sft=True)["train"].to_list()
    turns = found.get("messages") or [*found["prompt"], *found["completion"]]
    assert [{key: turn[key] for key in ("role", "content")} for turn in turns] == expected
    text = make_tokenizer().decode(
        prepare_sft(Dataset.from_list([row]), make_tokenizer(), DataOptions())[0][0]["input_ids"]
    )
    assert all(turn["content"] in text for turn in expected)


@pytest.mark.parametrize("words", [(1, -1), ("+1", "-1"), ("desirable", "undesirable"), ("thumbs_up", "thumbs_down"),
                                   ("chosen", "rejected"), ("Liked", "Disliked")])  # fmt: skip
def test_labels_in_words(words: tuple[Any, Any]) -> None:
    rows = [{"messages": [user("p"), assistant("c")], "label": word} for word in words]
    data, _ = prepare_unpaired(Dataset.from_list(rows), make_tokenizer(), DataOptions())
    assert data["label"][:] == [1.0, 0.0]


def test_the_label_is_named_after_loading_too(tmp_path: Path) -> None:
    rows = [{"messages": [user("p"), assistant("c")], "label": "four stars", "id": 1}] * 2
    train = load(write(tmp_path / "a.jsonl", rows), pairing="none")["train"]
    with pytest.raises(DataError, match="'label' holds 'four stars': write true or false"):
        prepare_unpaired(train, make_tokenizer(), DataOptions())


@pytest.mark.parametrize("word", ["both_bad", "bothbad", "Both are good", "tie (bothbad)", "draw"])
def test_ties_in_words(word: str, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response_a": "x", "response_b": "y", "winner": one} for one in (word, "model_b")]
    train = load(write(tmp_path / "a.jsonl", rows), on_bad_rows="skip")["train"]
    report = load_report(train)
    assert report is not None
    assert report.bad_rows == {"no_preference": 1}


def test_answers_without_a_score_are_not_compared(tmp_path: Path) -> None:
    answers = [{"response": text, "overall_score": score} for text, score in (("a", "N/A"), ("b", 2.0), ("c", 7.0))]
    name = write(tmp_path / "a.jsonl", [{"instruction": "p", "completions": answers}])
    (found,) = load(name)["train"].to_list()
    assert (found["chosen"], found["rejected"]) == ("c", "b")
    name = write(tmp_path / "a.jsonl", [{"instruction": "p", "completions": answers[:2]}])
    with pytest.raises(DataError, match="not a finite number"):
        load(name)


@pytest.mark.parametrize("value", [[], None, ""])
@pytest.mark.parametrize("column", ["images", "image", "videos", "audios"])
def test_columns_of_images_that_hold_none_are_no_images(
    column: str, value: Any, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{**PAIR, column: value}] * 2
    assert len(load(write(tmp_path / "a.jsonl", rows))["train"]) == 2
    assert len(prepare(Dataset.from_list(rows), tokenizer, DataOptions())[0]) == 2
    with pytest.raises(DataError, match=rf"vision-language data are not supported; got \['{column}'\]"):
        load(write(tmp_path / "a.jsonl", [*rows, {**PAIR, column: ["x"]}]))


# ---- columns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({**PAIR, "context": "read this first"}, ["context"]),
        (
            {
                "chosen": "this is the answer c",
                "rejected": "this is the answer r",
                "dialog_turns": [user("what is it?")],
            },
            ["dialog_turns"],
        ),
        ({**PAIR, "input": json.dumps([user("elsewhere")]), "id": "1"}, ["input"]),
        ({**PAIR, "messages": [user("p é"), assistant("c")]}, []),
        ({**PAIR, "context": "", "tools": None, "source": "x"}, []),
    ],
)
def test_a_part_of_the_conversation_is_not_overlooked(
    row: dict[str, Any], names: list[str], tokenizer: Any, tmp_path: Path
) -> None:
    _, told = prepare(Dataset.from_list([row]), tokenizer, DataOptions())
    train = load(write(tmp_path / "a.jsonl", [row]))["train"]
    _, after_loading = prepare(train, tokenizer, DataOptions())
    for report in (told, after_loading):
        found = [line for line in report.findings if "although they hold a part of the conversation" in line]
        assert len(found) == bool(names)
        assert all(repr(name) in found[0] for name in names)


def test_only_one_of_two_names_is_used() -> None:
    row = {"prompt": "p", "response_a": "x", "response_b": "y", "winner": "a", "query": "q"}
    uses = column_uses(FORMATS["two_answers"], list(row))
    assert uses["query"] == NOT_USED
    uses = column_uses(FORMATS["rated"], ["prompt", "response", "score", "helpfulness"])
    assert (uses["score"], uses["helpfulness"]) == (NOT_USED, "which answer is better")


def test_numbers_that_change_the_loss_are_told(tokenizer: Any) -> None:
    rows = [{**PAIR, "margin": 0.5 * n, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for n in range(3)]
    _, report = prepare(Dataset.from_list(rows), tokenizer, DataOptions())
    assert any("score gaps of the pairs are from 0 to 1" in line for line in report.warnings)
    assert any("ref_chosen_logps and ref_rejected_logps are left aside" in line for line in report.warnings)
    assert not [line for line in report.findings if "plain text" not in line]


# ---- what a template makes of them ----------------------------------------------------------------------------------

THOUGHT = "two and two"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("template", ["qwen3", "llama3", "smollm2", "gpt-oss"])
def test_thoughts_are_rendered_or_the_row_is_bad(key: str, template: str) -> None:
    text = FAMILIES.get(template) or CHATML.replace("{{ m['content'] }}", "{{ m.thinking or '' }}{{ m['content'] }}")
    row = pair(chosen=[assistant("four") | {key: THOUGHT}], rejected=[assistant("five") | {key: THOUGHT}])
    if template in ("llama3", "smollm2"):
        with pytest.raises(DataError, match="the chat template leaves out what the assistant says; got 'two and two'"):
            shown(row, text)
        return
    _, chosen, rejected = shown(row, text)
    assert THOUGHT in chosen
    assert THOUGHT in rejected


def test_thoughts_of_earlier_answers_are_left_out_on_purpose() -> None:
    before = [user("the cat"), assistant("sat") | {"reasoning_content": "hmm dogs"}, user("and")]
    prompt, *_ = shown(pair(prompt=before), FAMILIES["qwen3"])
    assert "sat" in prompt
    assert "hmm" not in prompt


@pytest.mark.parametrize("role", ["developer", "function", "ipython"])
@pytest.mark.parametrize("template", ["qwen3", "llama3", "smollm2"])
def test_roles_that_a_template_calls_otherwise(role: str, template: str) -> None:
    turn = {"role": role, "content": "dogs bark at night"}
    before = [turn, user("the cat")] if role == "developer" else [user("the cat"), assistant("sat"), turn]
    assert "dogs bark at night" in shown(pair(prompt=before), FAMILIES[template])[0]


TOOL = {"type": "function", "function": {"name": "look_up", "description": "d", "parameters": {}}}


@pytest.mark.parametrize("template", ["llama3", "gemma", "smollm2", "qwen3"])
@pytest.mark.parametrize("form", ["list", "JSON text", "bare"])
def test_tools_are_rendered_or_the_row_is_bad(template: str, form: str) -> None:
    tools: Any = {"list": [TOOL], "JSON text": json.dumps([TOOL]), "bare": [TOOL["function"]]}[form]
    row = pair(tools=tools)
    if template == "qwen3":
        assert "look_up" in shown(row, FAMILIES[template])[0]
        return
    with pytest.raises(DataError, match="the chat template does not write the tools; got 'look_up'"):
        shown(row, FAMILIES[template])
    tokenizer = make_tokenizer(template=FAMILIES[template])
    _, report = prepare(Dataset.from_list([row], on_mixed_types="use_json"), tokenizer, DataOptions(on_bad_rows="warn"))
    assert report.bad_rows == {"tools_lost": 1}


def test_assistant_turns_alone_are_looked_at_too() -> None:
    drops = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] != 'system' else '' }}")
    rows = Dataset.from_list([{"messages": [SYSTEM | {"content": "be kind"}, user("the cat"), assistant("sat")]}])
    with pytest.raises(DataError, match="leaves out what the system says"):
        prepare_sft(rows, make_tokenizer(template=drops), DataOptions(), assistant_only_loss=True)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"trainable": False}, {"loss": False}])
def test_turns_marked_as_not_to_be_trained_on_are_told(mark: dict[str, Any], tokenizer: Any) -> None:
    turns = [user("the cat"), assistant("sat") | mark, user("and"), assistant("dogs")]
    _, report = prepare_sft(
        Dataset.from_list([{"messages": turns}], on_mixed_types="use_json"), tokenizer, DataOptions()
    )
    assert any("1 rows mark turns as not to be trained on" in line for line in report.findings)


def test_what_stops_a_run_names_the_first_row_and_the_remedy(tokenizer: Any, tmp_path: Path) -> None:
    rows = [PAIR] * 3 + [PAIR | {"chosen": ""}, PAIR | {"rejected": "c"}]
    data = load(write(tmp_path / "a.jsonl", rows), on_bad_rows="skip")["train"]
    with pytest.raises(DataError) as caught:
        prepare(data, tokenizer, DataOptions(on_bad_rows="skip", max_dropped_share=0.1))
    assert "a.jsonl:4, field 'chosen': 'chosen' is empty" in str(caught.value)
    assert "max_length" not in str(caught.value)
    with pytest.raises(DataError) as caught:
        prepare(Dataset.from_list(rows), tokenizer, DataOptions(on_bad_rows="skip", max_dropped_share=0.1))
    assert "row 3 (the first is 0), field 'chosen': 'chosen' is empty" in str(caught.value)
