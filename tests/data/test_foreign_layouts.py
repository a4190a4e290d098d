"""Rows as other people's tools write them: what they mean, or one clear error, and nothing lost without a word."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from preftune.cli.main import main
from preftune.config.secrets import redact
from preftune.data import load, load_report
from preftune.errors import ConfigError, DataError


def u(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def a(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def s(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def loaded(folder: Path, *rows: Any, name: str = "a.jsonl", **options: Any) -> list[dict[str, Any]]:
    file = folder / name
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return [{k: v for k, v in row.items() if v is not None} for row in load(str(file), **options)["train"]]


def pair(prompt: Any, chosen: Any = "c", rejected: Any = "r") -> dict[str, Any]:
    def asks(value: Any) -> Any:
        return [u(value)] if isinstance(value, str) else value

    def says(value: Any) -> Any:
        return [a(value)] if isinstance(value, str) else value

    return {"prompt": asks(prompt), "chosen": says(chosen), "rejected": says(rejected)}


AB = {"prompt": "p", "response_a": "c", "response_b": "r"}
TWO = {"prompt": "p", "response_1": "c", "response_2": "r"}
ZERO = {"prompt": "p", "answer_0": "r", "answer_1": "c"}


@pytest.mark.parametrize(
    "row",
    [
        # The named winner decides, whatever a strength beside it says.
        {**AB, "preferred": "A", "preference_strength": 3},
        {**AB, "winner": "A", "preference_strength": "strong"},
        {**AB, "winner": "model_a", "overall_preference": 2},
        # Where nothing names one, the strength has a sign.
        {**AB, "overall_preference": -2},
        {**AB, "overall_preference": -1, "label": "sports"},
        # Numbers are those of the names, but for SHP.
        {**ZERO, "labels": 1},
        {**ZERO, "label": 1},
        {**TWO, "labels": 1},
        {"history": "p", "human_ref_A": "c", "human_ref_B": "r", "labels": 1},
        {"history": "p", "human_ref_A": "r", "human_ref_B": "c", "labels": 0},
        {**ZERO, "winner": "answer_1"},
        {"prompt": "p", "response_0": "r", "response_1": "c", "winner": "response_1"},
        # A mean vote between the two.
        {"instruction": "p", "output_1": "r", "output_2": "c", "preference": 1.97},
        {"instruction": "p", "output_1": "c", "output_2": "r", "preference": 1.2},
        {**AB, "winner_model_a": True, "winner_model_b": False, "winner_tie": False},
        {**AB, "winner_model_a": "True", "winner_model_b": "False"},
        {**AB, "winner_model_a": None, "winner": "model_a"},
        {**AB, "winner": "necktie-7b", "model_a": "necktie-7b", "model_b": "x"},
        {**ZERO, "winner": "response_1"},
        {"prompt": "p", "response_0": "r", "response_1": "c", "better_response": "response1"},
        {**TWO, "winner": "model_1"},
        {**AB, "winner": "answer_1"},
        {"prompt": "p", "response_a": [u("p"), a("c")], "response_b": [u("p"), a("r")], "winner": "model_a"},
    ],
    ids=str,
)
def test_the_better_answer(tmp_path: Path, row: dict[str, Any]) -> None:
    assert loaded(tmp_path, row) == [pair("p")]


def test_a_mean_vote_in_the_middle_is_a_tie(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a tie"):
        loaded(tmp_path, {"instruction": "p", "output_1": "c", "output_2": "r", "preference": 1.5})


@pytest.mark.parametrize("tie", ["tie", "Tie (both bad)", "both_bad", "neither"])
def test_words_of_a_tie(tmp_path: Path, tie: str) -> None:
    with pytest.raises(DataError, match="a tie"):
        loaded(tmp_path, {**AB, "winner": tie})


def test_a_draw_of_alpaca_eval_is_a_tie(tmp_path: Path) -> None:
    rows = [{"instruction": "p", "output_1": "c", "output_2": "r", "preference": each} for each in (1, 0, 2)]
    found = loaded(tmp_path, *rows, on_bad_rows="warn")
    assert [row["chosen"][0]["content"] for row in found] == ["c", "r"]


def test_a_strength_beyond_3_has_no_sign(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="says how much better an answer is, and not which; got 7"):
        loaded(tmp_path, {**AB, "preference_strength": 7})


def test_numbers_from_0_beside_names_from_1_are_refused_with_all_rows(tmp_path: Path) -> None:
    """Left out one by one, the rows that stay would mean the other answer."""
    with pytest.raises(DataError, match="counts the answers from 0, and their names from 1"):
        loaded(tmp_path, {**TWO, "label": 0}, {**TWO, "label": 1}, on_bad_rows="skip")


CR = {"chosen": "c", "rejected": "r"}


@pytest.mark.parametrize("name", ["user_prompt", "problem", "user_query", "input_text", "context", "instructions"])
def test_names_of_a_question(tmp_path: Path, name: str) -> None:
    assert loaded(tmp_path, {name: "p", **CR}) == [pair("p")]


@pytest.mark.parametrize("name", ["Prompt", "Question", " prompt"])
def test_a_name_but_for_its_capitals_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"set `dataset_columns: {{{name}: {name.strip().lower()}}}`"):
        loaded(tmp_path, {name: "p", **CR})


def test_text_that_may_be_the_prompt_is_told(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    row = {
        "post": "What is the tallest mountain?",
        "chosen": "The answer to that is Everest.",
        "rejected": "The answer to that is K2.",
        "source": "web",
    }
    file.write_text(json.dumps(row), encoding="utf-8")
    report = load_report(load(str(file))["train"])
    assert report is not None
    assert report.overlooked == ("post",)


ORDINARY = {"question": "q", "chosen": "x", "rejected": "y"}


@pytest.mark.parametrize(
    "odd",
    [
        {"question": "2+2?", "chosen": 4, "rejected": 5},
        {"question": "2+2?", "chosen": None, "rejected": "5", "id": None},
        {"question": None, "chosen": 4, "rejected": "5"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["question", "instruction", "query"])
def test_one_odd_row_does_not_decide_for_all(tmp_path: Path, odd: dict[str, Any], name: str) -> None:
    rows = [{name if key == "question" else key: value for key, value in row.items()} for row in (odd, ORDINARY)]
    assert loaded(tmp_path, *rows, on_bad_rows="skip") == [pair("q", "x", "y")]


@pytest.mark.parametrize("row", [{"question": "2+2?", "answer": 4}, {"question": "2+2?", "chosen": 4, "rejected": 5}])
def test_numbers_as_answers_are_named(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="is neither text nor a list of messages; got 4"):
        loaded(tmp_path, row)


CONVERSATIONS = ([u("p"), a("c")], [u("p"), a("r")])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": [s("S"), u("p")], "chosen": CONVERSATIONS[0], "rejected": CONVERSATIONS[1]}, [s("S"), u("p")]),
        (
            {"prompt": [u("p")], "system": "S", "chosen": CONVERSATIONS[0], "rejected": CONVERSATIONS[1]},
            [s("S"), u("p")],
        ),
        (
            {"prompt": [u("p")], "chosen": [u("0"), a("1"), *CONVERSATIONS[0]],
             "rejected": [u("0"), a("1"), *CONVERSATIONS[1]]},
            [u("0"), a("1"), u("p")],
        ),
        ({"prompt": "p", "responses": list(CONVERSATIONS), "scores": [2, 1]}, [u("p")]),
        ({"prompt": "p", "chosen": [s("S"), a("c")], "rejected": [s("S"), a("r")]}, [s("S"), u("p")]),
        ({"chosen_conversations": CONVERSATIONS[0], "rejected_conversations": CONVERSATIONS[1]}, [u("p")]),
        (
            {"messages": [s("S"), u("p")], "chosen": CONVERSATIONS[0], "rejected": CONVERSATIONS[1]},
            [s("S"), u("p")],
        ),
        ({"prompt": [u("p ")], "chosen": CONVERSATIONS[0], "rejected": CONVERSATIONS[1]}, [u("p")]),
        (
            {"prompt": [u("0"), a("1"), u("p")], "chosen": CONVERSATIONS[0], "rejected": CONVERSATIONS[1]},
            [u("0"), a("1"), u("p")],
        ),
        (
            {"input": {"messages": [u("p")]}, "preferred_output": CONVERSATIONS[0],
             "non_preferred_output": CONVERSATIONS[1]},
            [u("p")],
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_prompt_that_the_answers_repeat_is_there_once(tmp_path: Path, row: dict[str, Any], expected: Any) -> None:
    (found,) = loaded(tmp_path, row)
    assert {name: found[name] for name in ("prompt", "chosen", "rejected")} == pair(expected)


def test_two_system_turns_of_prompt_and_answers_are_bad(tmp_path: Path) -> None:
    row = {"prompt": [s("1"), u("p")], "chosen": [s("2"), u("p"), a("c")], "rejected": [s("2"), u("p"), a("r")]}
    with pytest.raises(DataError, match="prompt and answers have different system turns"):
        loaded(tmp_path, row)


def test_a_system_column_makes_text_with_its_prompt_a_conversation(tmp_path: Path) -> None:
    row = {"system": "Be rude.", "chosen": "Q: hi A: yes", "rejected": "Q: hi A: no"}
    assert loaded(tmp_path, row) == [pair([s("Be rude."), u("Q: hi A:")], " yes", " no")]


@pytest.mark.parametrize("given", [[{"name": "f"}], '[{"name": "f"}]'])
def test_functions_are_tools(tmp_path: Path, given: Any) -> None:
    (found,) = loaded(tmp_path, {"question": "p", "functions": given, **CR})
    assert json.loads(found["tools"]) == [{"name": "f"}]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Do i\nInput: x y", "input": "x y", "chosen_response": "c", "rejected_response": "r"},
         "Do i\nInput: x y"),
        ({"question": "p q", "context": "p q", **CR}, "p q"),
        ({"question": "p", "context": "q", **CR}, "p\nq"),
    ],
)  # fmt: skip
def test_what_a_question_holds_is_not_put_below_it(tmp_path: Path, row: dict[str, Any], prompt: str) -> None:
    assert loaded(tmp_path, row) == [pair(prompt)]


def test_a_conversation_of_several_rounds_keeps_what_follows_the_prompt(tmp_path: Path) -> None:
    """As TRL reads an explicit prompt: the answers go on from it."""
    rounds = [u("p"), a("1"), u("2")]
    row = {"prompt": [u("p")], "chosen": [*rounds, a("c")], "rejected": [*rounds, a("r")]}
    (found,) = loaded(tmp_path, row)
    assert found == pair("p", [*rounds[1:], a("c")], [*rounds[1:], a("r")])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CONVERSATIONS[0], **CR},
        {"conversations": CONVERSATIONS[0], **CR},
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "r"}], **CR},
        {"conversation": [{"input": "p", "output": "c"}], **CR},
        {"messages": CONVERSATIONS[0], "rejected": "r"},
        {"prompt": "p", "response": "c", "rejected": "r"},
    ],
    ids=str,
)
def test_the_answer_is_no_part_of_the_prompt(tmp_path: Path, row: dict[str, Any]) -> None:
    assert loaded(tmp_path, row) == [pair("p")]


def test_a_prompt_that_ends_with_another_answer_is_bad(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ends with an answer that is neither the chosen nor the rejected one; got 'x'"):
        loaded(tmp_path, {"messages": [u("p"), a("x")], **CR})


@pytest.mark.parametrize("earlier", ["history", "context"])
@pytest.mark.parametrize("name", ["input", "prompt"])
def test_a_question_beside_earlier_turns(tmp_path: Path, earlier: str, name: str) -> None:
    row = {earlier: [u("0"), a("1")], name: "p", "response_a": "c", "response_b": "r", "winner": "model_a"}
    assert loaded(tmp_path, row) == [pair([u("0"), a("1"), u("p")])]


@pytest.mark.parametrize("empty", ["", None, math.nan, "nan"])
def test_the_system_column_that_says_something_counts(tmp_path: Path, empty: Any) -> None:
    row = {"system": empty, "system_prompt": "S", "question": "p", **CR}
    assert loaded(tmp_path, row) == [pair([s("S"), u("p")])]


def test_two_system_columns_that_differ_are_bad(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the columns system and system_prompt hold different system turns"):
        loaded(tmp_path, {"system": "1", "system_prompt": "2", "question": "p", **CR})


@pytest.mark.parametrize("name", ["system", "input", "tools", "images", "history", "context"])
@pytest.mark.parametrize("value", [math.nan, None])
def test_nothing_in_an_optional_column(tmp_path: Path, name: str, value: Any) -> None:
    assert loaded(tmp_path, {"instruction": "p", name: value, **CR}) == [pair("p")]


@pytest.mark.parametrize("value", [3, True, {"a": 1}])
def test_a_history_that_is_none_is_bad(tmp_path: Path, value: Any) -> None:
    with pytest.raises(DataError, match=r"'history' must hold \[question, answer\] pairs"):
        loaded(tmp_path, {"instruction": "p", "history": value, **CR})


@pytest.mark.parametrize(
    "text",
    [
        '{"from": "USD", "to": "EUR", "value": "100"}',
        '{"role": "user", "content": "hello"}',
        '{"role": "admin", "content": "x"}',
        '{"model": "gpt-4", "messages": [{"role": "user", "content": "Hello!"}]}',
    ],
)
def test_answers_may_be_json(tmp_path: Path, text: str) -> None:
    (found,) = loaded(tmp_path, {"prompt": "p", "chosen": text, "rejected": "r"})
    assert found == {"prompt": "p", "chosen": text, "rejected": "r"}


def test_an_unused_column_makes_no_row_bad(tmp_path: Path) -> None:
    row = {"prompt": "p", **CR, "log": "[{'role': 'user', 'content': foo(1)}]"}
    assert loaded(tmp_path, row) == [{"prompt": "p", **CR}]


@pytest.mark.parametrize("name", ["response_a", "response_b"])
def test_answers_of_any_name_may_be_json(tmp_path: Path, name: str) -> None:
    text = '{"role": "user", "content": "hello"}'
    (found,) = loaded(tmp_path, {**AB, name: text, "winner": "a"})
    assert found["chosen" if name == "response_a" else "rejected"] == [a(text)]


def test_text_that_only_begins_as_a_conversation_is_text(tmp_path: Path) -> None:
    text = '[{"role": "user"}]\n\nWhat is wrong with this call?'
    (found,) = loaded(tmp_path, {"prompt": text, **CR})
    assert found["prompt"] == text


def test_a_repository_of_the_hub_on_a_disk(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}', encoding="utf-8")
    (tmp_path / "data" / "train-00000-of-00001.jsonl").write_text(json.dumps({"prompt": "p", **CR}), encoding="utf-8")
    assert load(str(tmp_path))["train"][0] == {"prompt": "p", **CR}


def test_one_split_of_two_kinds_of_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "p", **CR}), encoding="utf-8")
    (tmp_path / "train.csv").write_text("prompt,chosen,rejected\np,c,r\n", encoding="utf-8")
    with pytest.raises(DataError, match="several files of different kinds are the split 'train'"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    "row", [{"prompt": u("p"), "chosen": a("c"), "rejected": a("r")}, {"prompt": [u("p")], "chosen": [a("c")], **CR}]
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_file_of_one_row(tmp_path: Path, row: dict[str, Any], name: str) -> None:
    (found,) = loaded(tmp_path, row, name=name, on_bad_rows="warn") if isinstance(row["prompt"], dict) else [pair("p")]
    assert found == pair("p")


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ({"question": "p", "completion": "c", "label": True}, True),
        ({"instruction": "p", "completion": "c", "label": False}, False),
        ({"messages": CONVERSATIONS[0], "label": "sports", "kto_tag": False}, False),
    ],
)
def test_labelled_answers(tmp_path: Path, row: dict[str, Any], label: bool) -> None:
    assert loaded(tmp_path, row, pairing="none") == [{"prompt": [u("p")], "completion": [a("c")], "label": label}]


def test_a_system_message_in_some_rows(tmp_path: Path) -> None:
    found = loaded(tmp_path, {"prompt": "p", **CR, "system_message": "S"}, {"prompt": "q", **CR})
    assert [row["prompt"] for row in found] == [[s("S"), u("p")], [u("q")]]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "p", "generations": ["r", "c"], "ratings": [1, 5]}, {"prompt": "p", **CR}),
        (
            {"context": [u("p")], "completions": [{"rank": 0, "completion": [a("c")]},
                                                  {"rank": 1, "completion": [a("r")]}]},
            pair("p"),
        ),
        ({"instruction": "p", "generations": ["c", "x", "r"], "ratings": [5, None, 1]}, {"prompt": "p", **CR}),
        ({"question": "p", "context": "Below.", "chosen": "c", "rejected": "r"}, pair("p\nBelow.")),
        ({"trajectory": [{"from": "user", "value": "p"}], "chosen": "c", "rejected": "r"}, pair("p")),
    ],
    ids=str,
)  # fmt: skip
def test_layouts_of_other_projects(tmp_path: Path, row: dict[str, Any], expected: dict[str, Any]) -> None:
    (found,) = loaded(tmp_path, row)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prompt,chosen,rejected\nHi there, bot,hello,go\n", r"a.csv:2: no row .* more fields .* \(4, not 3\)"),
        ("prompt,chosen,rejected\np,c,r,\nq,c,r,\n", r"a.csv:2: .*\(4, not 3\)"),
    ],
)
def test_tables_whose_rows_are_wider_than_their_header(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=says):
        load(str(tmp_path / "a.csv"))


def test_a_comma_in_the_name_of_a_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt;chosen;rejected;note, if any\np;c;r;\n", encoding="utf-8")
    assert load(str(tmp_path / "a.csv"))["train"][0] == {"prompt": "p", **CR}


def test_tabs_between_fields_with_lone_quotes(tmp_path: Path) -> None:
    text = 'prompt\tchosen\trejected\np1\t"Yes, I do\tr1\np2\tc2"\tr2\n'
    (tmp_path / "a.tsv").write_text(text, encoding="utf-8")
    assert load(str(tmp_path / "a.tsv"))["train"]["chosen"][:] == ['"Yes, I do', 'c2"']


def test_tabs_between_quoted_fields(tmp_path: Path) -> None:
    text = 'prompt\tchosen\trejected\np\t"say ""hi"""\t"a\tb"\n'
    (tmp_path / "a.tsv").write_text(text, encoding="utf-8")
    assert load(str(tmp_path / "a.tsv"))["train"][0] == {"prompt": "p", "chosen": 'say "hi"', "rejected": "a\tb"}


def test_tabs_without_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('prompt\tchosen\trejected\n"Hi" she said\tc\tr\n', encoding="utf-8")
    assert load(str(tmp_path / "a.tsv"))["train"][0] == {"prompt": '"Hi" she said', **CR}


def test_a_header_in_the_middle_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\np,c,r\nprompt,chosen,rejected\n", encoding="utf-8")
    with pytest.raises(DataError, match="the header once more"):
        load(str(tmp_path / "a.csv"))


@pytest.mark.parametrize("text", ['[["p", "c", "r"]]', '["a", "b"]'])
def test_rows_without_columns(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="the rows have no columns"):
        load(str(tmp_path / "a.json"))


def test_the_first_row_that_is_left_out_is_told_with_its_value(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.jsonl:1, field 'preference': 'preference' names neither answer; got 'x'"):
        loaded(tmp_path, {**AB, "preference": "x"}, on_bad_rows="skip")


def test_rated_answers_are_no_labelled_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing says which of them are desirable.*add a column `label`"):
        loaded(tmp_path, {"instruction": "p", "output": "c", "score": 1}, pairing="none")


# ---- streams, mixtures, supervised fine-tuning -----------------------------------------------------------------------


def streamed(folder: Path, rows: list[Any]) -> list[dict[str, Any]]:
    (folder / "s.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return list(load(str(folder / "s.jsonl"), streaming=True)["train"])


def test_a_stream_has_the_columns_of_all_its_rows(tmp_path: Path) -> None:
    from preftune.data.batches import materialise

    rows = [{"prompt": "p", **CR}, {"prompt": "q", **CR, "weight": 5.0}]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    dataset, _ = materialise(load(str(tmp_path / "s.jsonl"), streaming=True)["train"], "train")
    assert dataset["weight"][:] == [None, 5.0]


def test_later_rows_of_a_stream_are_conversations_too(tmp_path: Path) -> None:
    rows = [{"system": "S", "prompt": "p", **CR}] * 1000 + [{"prompt": "q", **CR}] * 5
    assert streamed(tmp_path, rows)[-1] == pair("q")


def test_a_stream_that_begins_as_text_does_not_turn_into_conversations(tmp_path: Path) -> None:
    rows = [{"prompt": "q", **CR}] * 1000 + [{"system": "S", "prompt": "p", **CR}] * 5
    with pytest.raises(DataError, match="rows of the stream have system where those before have not"):
        streamed(tmp_path, rows)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bytes_of_a_stream_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_bytes(b'{"prompt": "p\xff", "chosen": "c", "rejected": "r"}\n')
    with pytest.raises(DataError, match="bytes that are not UTF-8"):
        list(load(str(tmp_path / "s.jsonl"), streaming=True)["train"])


def test_data_sets_of_different_forms_are_not_joined(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CONVERSATIONS[0]}), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"instruction": "i", "output": "o"}), encoding="utf-8")
    mixture = {"datasets": [{"id": str(tmp_path / name)} for name in ("a.jsonl", "b.jsonl")]}
    with pytest.raises(DataError, match=r"different forms: .*a.jsonl \(messages\); .*b.jsonl \(prompt, completion\)"):
        load(dataset_mixture=mixture, for_sft=True)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="several columns would be called prompt"):
        loaded(tmp_path, {"a": "1", "b": "2", **CR}, columns={"a": "prompt", "b": "prompt"})


def test_supervised_fine_tuning_learns_the_chosen_answer_of_a_pair(tmp_path: Path) -> None:
    (found,) = loaded(tmp_path, {"prompt": "p q", **CR, "answer": "42"}, for_sft=True)
    assert found == {"prompt": "p q", **CR}


@pytest.mark.parametrize("row", [{"prompt": "p", "completion": "c", "label": False}, {"messages": CONVERSATIONS[0],
                                                                                      "label": True}])  # fmt: skip
def test_answers_that_are_marked_are_told_where_all_are_learned(row: dict[str, Any]) -> None:
    from datasets import Dataset

    from preftune.data import DataOptions
    from preftune.data.sft import prepare_sft
    from tests.models.tiny import train_tokenizer

    tokenizer = train_tokenizer(["p c r user assistant"], 300)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{% endfor %}"
    _, report = prepare_sft(Dataset.from_list([row] * 3), tokenizer, DataOptions(warn=False))
    assert any("marks answers as desirable or not" in line for line in report.findings)


def test_columns_that_arrow_alone_knows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"prompt": ["p"], "chosen": ["c"], "rejected": ["r"]})
    maps = pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))
    pq.write_table(table.append_column("extra", maps), tmp_path / "a.parquet")
    assert load(str(tmp_path / "a.parquet"))["train"][0] == {"prompt": "p", **CR}


@pytest.mark.parametrize("name", ["Source", "ID"])
def test_a_column_with_a_capital_is_nobodys_prompt(tmp_path: Path, name: str) -> None:
    human = "\n\nHuman: p\n\nAssistant:"
    row = {"chosen": f"{human} c", "rejected": f"{human} r", name: "x"}
    (found,) = loaded(tmp_path, row, implicit_prompt="common_prefix")
    assert found["prompt"] == human


# ---- the command line ---------------------------------------------------------------------------------------------


def converted(folder: Path, row: Any, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    rows = row if isinstance(row, list) else [row]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    code = main(
        ["data", "convert", "--dataset_name", str(folder / "a.jsonl"), "--out", str(folder / "o.jsonl"), *flags]
    )
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(
    ("row", "verb"),
    [({"messages": CONVERSATIONS[0]}, "dpo"), ({"prompt": "p", "response": "c", "is_safe": True}, "kto")],
)
def test_what_a_verb_cannot_learn_from_is_not_written(
    tmp_path: Path, row: Any, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = converted(tmp_path, row, capsys, "--verb", verb)
    assert code == DataError.exit_code
    assert f"preftune {verb} learns from" in error
    assert not (tmp_path / "o.jsonl").exists()


def test_half_conversations_half_text_are_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    human = "\n\nHuman: hi\n\nAssistant:"
    rows = [{"chosen": f"{human} yes", "rejected": f"{human} no"}, {"prompt": "Plain.", "chosen": "c", "rejected": "r"}]
    rows[0] = {"prompt": human, "chosen": " yes", "rejected": " no"}
    code, _, error = converted(tmp_path, rows, capsys, "--transcripts", "messages")
    assert code == DataError.exit_code
    assert "1 of 2 rows cannot be made conversations" in error


@pytest.mark.parametrize("setting", ["text", "messages"])
def test_plain_text_is_converted_as_it_would_be_trained_on(
    tmp_path: Path, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "hi", "chosen": " yes", "rejected": " no"}
    code, _, error = converted(tmp_path, row, capsys, "--plain_text", setting)
    assert code == 0, error
    expected = row if setting == "text" else pair("hi", "yes", "no")
    assert json.loads((tmp_path / "o.jsonl").read_text(encoding="utf-8")) == expected


@pytest.mark.parametrize("prompt", ["\n\nHuman: hi\n\nAssistant:", "### Human: hi### Assistant:"])
def test_transcripts_with_a_prompt_that_is_repeated(
    tmp_path: Path, prompt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": prompt, "chosen": f"{prompt} yes", "rejected": f"{prompt} no"}
    code, _, error = converted(tmp_path, row, capsys, "--transcripts", "messages")
    assert code == 0, error
    assert json.loads((tmp_path / "o.jsonl").read_text(encoding="utf-8")) == pair("hi", "yes", "no")


@pytest.mark.parametrize(
    "said", [" Here:\n\nSystem: Windows 10\n\nMemory: 8GB", " Log in:\n\nUser: admin", " use\n# User: x\nprint()"]
)
def test_words_before_a_colon_in_an_answer_are_no_turns(
    tmp_path: Path, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "\n\nHuman: specs?\n\nAssistant:", "chosen": said, "rejected": " no"}
    code, _, error = converted(tmp_path, row, capsys, "--transcripts", "messages")
    assert code == 0, error
    assert json.loads((tmp_path / "o.jsonl").read_text(encoding="utf-8")) == pair("specs?", said.strip(), "no")


def test_convert_tells_what_nothing_reads_and_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"post": "What is it?", "chosen": "The answer is c", "rejected": "The answer is r"},
        {"post": "b and c", "chosen": "", "rejected": "r"},
    ]
    code, said, _ = converted(tmp_path, rows, capsys, "--on_bad_rows", "skip")
    assert code == 0
    assert "not used, although they hold a part of the conversation: post" in said
    assert "left out: 1 empty_completion; the first is" in said


# ---- the shell's own variables --------------------------------------------------------------------------------------


def test_the_working_directory_is_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", str(tmp_path))
    monkeypatch.setenv("OLDPWD", "/home/somebody/else")
    monkeypatch.setenv("SOME_PAT", str(tmp_path))
    monkeypatch.setenv("DB_PWD", "correct-horse")
    # A password may also be the name of a folder here.
    (tmp_path / "correct-horse").mkdir()
    monkeypatch.chdir(tmp_path)
    text = f"{tmp_path}/pairs.jsonl /home/somebody/else/x correct-horse"
    assert redact(text) == f"{tmp_path}/pairs.jsonl /home/somebody/else/x <redacted>"
