"""Files that can be read without a fault, and be read wrongly: what their first rows show, and what is made of them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from preftune.data import DataOptions, load, prepare
from preftune.data.loader import load_report
from preftune.data.unpaired import prepare_unpaired
from preftune.errors import ConfigError, DataError
from tests.data.conftest import make_tokenizer
from tests.data.test_rendering import FAMILIES


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(tmp_path: Path, rows: list[dict[str, Any]], **more: Any) -> Dataset:
    return load(lines(tmp_path / "rows.jsonl", rows), **more)["train"]


def said(value: Any) -> str:
    return value if isinstance(value, str) else value[-1]["content"]


def told(data: Dataset) -> str:
    report = load_report(data)
    assert report is not None
    return "\n".join([*report.findings, *report.overlooked])


def prepared(kind: Any, rows: Any) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data, report = kind(rows, make_tokenizer(template=FAMILIES["smollm2"]), DataOptions(max_length=None))
    return data, report


LONG = ("GOOD " * 20, "worse " * 20)
AB = {"prompt": "p", "response_a": "GOOD", "response_b": "worse"}


@pytest.mark.parametrize(
    "row",
    [
        {**AB, "chosen": "response_a", "rejected": "response_b"},
        {"prompt": "p", "A": "GOOD", "B": "worse", "chosen": "A", "rejected": "B"},
        {"prompt": "p", "chosen": "gpt-4", "rejected": "l2", "chosen_text": "A GOOD one", "rejected_text": "worse"},
        {**AB, "model_a": "gpt-4", "model_b": "llama-7b", "chosen": "gpt-4", "rejected": "llama-7b"},
        {"prompt": "p", "responses": [{"id": "r2", "text": "worse"}, {"id": "r1", "text": "GOOD"}], "chosen": "r1",
         "rejected": "r2"},
        {"question": "p", "answer_a": "worse", "answer_b": "GOOD", "preferred": "b", "dispreferred": "a"},
        {"question": "p", "option_a": "GOOD", "option_b": "worse", "accepted": "option_a", "rejected": "option_b"},
        {"prompt": "p", "response_0": "worse", "response_1": "GOOD", "chosen": "1", "rejected": "0"},
        {"prompt": "p", "chosen_text": "GOOD", "rejected_text": "worse", "chosen": "0.9", "rejected": "0.1"},
        {"prompt": "p", "chosen_text": "GOOD at 8", "rejected_text": "worse", "chosen": 8, "rejected": 2},
        {"prompt": "p", "chosen_response": "A GOOD one", "rejected_response": "worse", "chosen": "A", "rejected": "B"},
        {**AB, "chosen": "GOOD", "rejected": "worse"},
        {"prompt": "p", "response_a": LONG[1], "response_b": LONG[0], "chosen": LONG[0], "rejected": LONG[1]},
        {"prompt": "p", "reply_a": "GOOD", "reply_b": "worse", "chosen": "reply_a", "rejected": "reply_b"},
        {"prompt": "p", "gpt4_output": "GOOD", "llama_output": "worse", "chosen": "gpt4_output",
         "rejected": "llama_output"},
        {"prompt": "p", "responses": {"gpt-4": "GOOD", "l2": "worse"}, "chosen": "gpt-4", "rejected": "l2"},
        {"prompt": "p", "outputs": [{"model": "x1", "output": "worse"}, {"model": "x2", "output": "GOOD"}],
         "chosen": "x2", "rejected": "x1"},
        {**AB, "response_b": "mid", "response_c": "worse", "chosen": "a", "rejected": "c"},
        {"messages": [user("p")], "response_a": "GOOD", "response_b": "worse", "chosen": "response_a",
         "rejected": "response_b"},
        {"prompt": "p", "conversation_a": [user("p"), assistant("worse")],
         "conversation_b": [user("p"), assistant("GOOD")], "chosen": "b", "rejected": "a"},
        {"prompt": "p", "chosen": "GOOD;", "rejected": "worse;", "chosen_output": "[12]", "rejected_output": "[13]"},
        {"prompt": "p", "chosen": "GOOD(2)", "rejected": "worse(2)", "chosen_output": "4", "rejected_output": "5"},
    ],
)  # fmt: skip
def test_chosen_and_rejected_may_name_the_answers(tmp_path: Path, row: dict[str, Any]) -> None:
    (first, *_) = read(tmp_path, [row, row])
    assert said(first["prompt"]) == "p"
    assert "GOOD" in said(first["chosen"])
    assert "GOOD" not in said(first["rejected"])
    assert "worse" in said(first["rejected"])
    assert first["prompt"] != first["chosen"]
    assert len(first["chosen"]) == 1 or isinstance(first["chosen"], str)


def test_names_that_contradict_each_other_are_a_bad_row(tmp_path: Path) -> None:
    good = {**AB, "chosen": "response_a", "rejected": "response_b"}
    data = read(tmp_path, [good, good, {**good, "rejected": "response_a"}], on_bad_rows="skip")
    report = load_report(data)
    assert report is not None
    assert (len(data), report.bad_rows) == (2, {"not_a_label": 1})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "response": "an answer", "chosen": True, "rejected": False},
        {"prompt": "p", "response": "an answer", "chosen": "True", "rejected": "False"},
        {"prompt": "p", "output_long": "an answer", "chosen": "1", "rejected": "0"},
        {"prompt": "p", "completion": "an answer", "chosen": 0.9, "rejected": 0.1},
    ],
)
def test_values_are_no_answers_where_answers_stand_beside_them(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"hold(s)? numbers or truth values|is neither text"):
        read(tmp_path, [row, row])


def test_short_answers_are_answers(tmp_path: Path) -> None:
    about = {"source": "sums", "reference_answer": "Two and two are four.", "answer_type": "whole number"}
    data = read(tmp_path, [{"prompt": "2 + 2", "chosen": "4", "rejected": "5", **about}] * 2)
    assert (data[0]["chosen"], data[0]["rejected"]) == ("4", "5")
    rows = [{"prompt": "Grass? A) B) C)", "A": "blue", "B": "green", "C": "red", "chosen": "B", "rejected": "A"}] * 2
    assert read(tmp_path, rows)[0]["chosen"] == "B"
    row = {
        "prompt": "Is it?",
        "chosen": "true",
        "rejected": "false",
        "text_id": "a text of 3",
        "essay_text": "It is so.",
    }
    assert read(tmp_path, [row, row])[0]["chosen"] == "true"


@pytest.mark.parametrize("names", [["good", "bad"], ["desirable", "undesirable"], ["True", "False"], ["1", "0"]])
@pytest.mark.parametrize("container", ["memory", "parquet", "saved"])
def test_a_class_is_the_word_it_stands_for(tmp_path: Path, names: list[str], container: str) -> None:
    features = Features({"prompt": Value("string"), "completion": Value("string"), "label": ClassLabel(names=names)})
    rows = [{"prompt": f"p{n}", "completion": f"c{n}", "label": n % 2} for n in range(4)]
    data = Dataset.from_list(rows, features=features)
    if container == "parquet":
        data.to_parquet(str(tmp_path / "a.parquet"))
        data = load(str(tmp_path / "a.parquet"), pairing="none")["train"]
    elif container == "saved":
        data.save_to_disk(str(tmp_path / "a"))
        data = load(str(tmp_path / "a"), pairing="none")["train"]
    found, _ = prepared(prepare_unpaired, data)
    assert [bool(label) for label in found["label"]] == [True, False, True, False]


def test_a_winner_that_is_a_class_names_its_answer() -> None:
    features = Features(
        {name: Value("string") for name in ("prompt", "response_1", "response_2")}
        | {"winner": ClassLabel(names=["response_1", "response_2"])}
    )
    rows = [{"prompt": "p", "response_1": "a", "response_2": "b", "winner": n} for n in (0, 1)]
    found, _ = prepared(prepare, Dataset.from_list(rows, features=features).shuffle(seed=1).select([0, 1]))
    assert len(found) == 2
    assert found["chosen_ids"][0] != found["chosen_ids"][1]


@pytest.mark.parametrize("word", ["output_", "answer_", "summary", "response"])
@pytest.mark.parametrize("field", ["preference", "label", "choice"])
def test_votes_of_0_and_1_on_answers_1_and_2_have_two_readings(tmp_path: Path, field: str, word: str) -> None:
    rows = [{"instruction": "p", f"{word}1": "a", f"{word}2": "b", field: n} for n in (0, 1, 0, 1)]
    with pytest.raises(DataError, match="counts the answers from 0, and their names from 1"):
        read(tmp_path, rows, on_bad_rows="skip")
    names = {f"{word}1": "response_0", f"{word}2": "response_1", "instruction": "prompt", field: field}
    found = load(str(tmp_path / "rows.jsonl"), columns=names)["train"]
    assert [said(row["chosen"]) for row in found] == ["a", "b", "a", "b"]


def test_votes_of_0_and_1_on_answers_0_and_1_have_one(tmp_path: Path) -> None:
    rows = [{"instruction": "p", "output_0": "a", "output_1": "b", "preference": n} for n in (0, 1)]
    assert [said(row["chosen"]) for row in read(tmp_path, rows)] == ["a", "b"]
    decided = [{**R12, "winner": "response_1", "preference": n} for n in (0, 1)]
    assert [said(row["chosen"]) for row in read(tmp_path, decided)] == ["GOOD", "GOOD"]
    topic = {"prompt": "p", "response_0": "a", "response_1": "b", "preference": "safety", "better_response_id": 1}
    assert said(read(tmp_path, [topic, topic])[0]["chosen"]) == "b"


def test_a_draw_of_alpaca_eval_is_a_draw(tmp_path: Path) -> None:
    rows = [
        {"instruction": f"p{n}", "output_1": "a", "output_2": "b", "preference": v} for n, v in enumerate((0, 1, 2))
    ]
    data = read(tmp_path, rows)
    assert [said(row["chosen"]) for row in data] == ["a", "b"]


def test_scores_beside_two_outputs_say_which_is_better(tmp_path: Path) -> None:
    row = {"instruction": "p", "input": "", "output": ["worse", "GOOD"], "scores": [1, 5]}
    assert said(read(tmp_path, [row, row])[0]["chosen"]) == "GOOD"
    with pytest.raises(DataError, match="'label' beside it may say which is better"):
        read(tmp_path, [{"instruction": "p", "output": ["worse", "GOOD"], "label": 1}] * 2)


R12 = {"prompt": "p", "response_1": "GOOD", "response_2": "worse"}


@pytest.mark.parametrize(
    "more", [{"overall_preference": -2, "label": 2}, {"score_1": 9, "score_2": 2, "label": 2}, {"rating_1": 9,
    "rating_2": 2, "labels": "response_2"}],
)  # fmt: skip
def test_a_label_that_contradicts_the_scores_decides_nothing(tmp_path: Path, more: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="name different answers as the better one"):
        read(tmp_path, [{**R12, **more}] * 2)


@pytest.mark.parametrize("more", [{"winner": "unclear", "label": 2}, {"winner": "", "score_1": 2, "score_2": 9}])
def test_who_did_not_decide_is_not_decided_for(tmp_path: Path, more: dict[str, Any]) -> None:
    sure = {**R12, "winner": "response_1", "label": 1, "score_1": 2, "score_2": 1}
    data = read(tmp_path, [sure, sure, {**sure, **more}], on_bad_rows="skip")
    report = load_report(data)
    assert report is not None
    assert (len(data), report.bad_rows) == (2, {"not_a_label": 1})


def test_a_strength_that_is_never_below_0_is_told(tmp_path: Path) -> None:
    row = {**R12, "preference_strength": 2}
    assert "no value of 'preference_strength' is below 0" in told(read(tmp_path, [row, row]))
    assert told(read(tmp_path, [row, {**row, "preference_strength": -1}])) == ""


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "2 + 2", "answer": "4", "output": "It is 4."}, "It is 4."),
        ({"problem": "2 + 2", "completion": "It is 4.", "answer": "4"}, "It is 4."),
        ({"problem": "2 + 2", "solution": "It is 4.", "answer": "4"}, "It is 4."),
        ({"question": "2 + 2", "answer": "4"}, "4"),
        ({"question": "2 + 2", "answer": "It is 4.", "solution": "4"}, "It is 4."),
        ({"question": "2 + 2", "answer": "print(2 + 2)", "output": "4"}, "print(2 + 2)"),
        ({"question": "q", "answer": "print('x' * 20)", "output": "x" * 20}, "print('x' * 20)"),
        (
            {"question": "q", "answer": "It cannot be done, I am afraid.", "output": "error: no " * 9},
            "It cannot be done, I am afraid.",
        ),
        ({"problem": "q", "solution": "print(1)", "output": "1 and 2 and 3"}, "print(1)"),
    ],
)
def test_the_whole_answer_is_learned_and_not_its_result(tmp_path: Path, row: dict[str, Any], answer: str) -> None:
    assert said(read(tmp_path, [row, row], for_sft=True)[0]["completion"]) == answer
    (labelled, *_) = read(tmp_path, [{**row, "label": True}] * 2, pairing="none")
    assert said(labelled["completion"]) == answer


def test_labels_that_disagree_are_a_bad_row(tmp_path: Path) -> None:
    row = {"prompt": "p", "completion": "c", "label": 1, "kto_tag": False}
    with pytest.raises(DataError, match="say the opposite of each other"):
        read(tmp_path, [row, row], pairing="none")
    assert read(tmp_path, [{**row, "label": 2}] * 2, pairing="none")[0]["label"] is False


@pytest.mark.parametrize(
    ("row", "says", "never"),
    [
        (
            {"prompt": "p", "completion": "c", "is_toxic": True},
            "'is_toxic' is true where something is wrong",
            "{is_toxic",
        ),
        ({"prompt": "p", "response": "c", "is_harmful": True, "is_safe": False}, "{is_safe: label}", "{is_harmful"),
        ({"prompt": "p", "redacted": False, "completion": "c", "thumbs_up": True}, "{thumbs_up: label}", "{redacted"),
        ({"prompt": "p", "completion": "c", "ok": True, "seen": True}, "'seen' may be meant as well", "{seen"),
        ({"prompt": "p", "completion": "c", "is_hallucinated": True}, "is true where something is wrong", "{is_hall"),
        ({"prompt": "p", "completion": "c", "downvoted": True}, "is true where something is wrong", "{downvoted"),
    ],
)
def test_a_remedy_never_turns_labels_round(tmp_path: Path, row: dict[str, Any], says: str, never: str) -> None:
    with pytest.raises(DataError) as caught:
        prepared(prepare_unpaired, read(tmp_path, [row, row], pairing="none"))
    assert says in str(caught.value)
    assert never not in str(caught.value)


def test_a_second_rating_is_told(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "response": "a", "helpfulness": 2, "overall_score": 9},
        {"prompt": "p", "response": "b", "helpfulness": 4, "overall_score": 1},
    ]
    assert "'overall_score' hold ratings too" in told(read(tmp_path, rows))
    ranked = {"prompt": "p", "responses": ["a", "b"], "scores": [0.2, 0.1], "ranks": [2, 1]}
    assert "scores and ranks of 2 of the first 2 rows disagree" in told(read(tmp_path, [ranked, ranked]))
    assert told(read(tmp_path, [{**ranked, "ranks": [1, 2]}] * 2)) == ""
    tied = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [5, 5, 1], "ranks": [2, 1, 3]}
    assert told(read(tmp_path, [tied, tied])) == ""


def test_a_ranking_from_0_has_two_readings(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ranks of the answers, or their order"):
        read(tmp_path, [{"prompt": "p", "responses": ["a", "b", "c"], "ranking": [2, 0, 1]}] * 2)


def test_several_ratings_of_one_answer_are_its_mean(tmp_path: Path) -> None:
    rated = [("A", 5), ("A", 1), ("B", 3), ("B", 4)]
    (pair,) = read(tmp_path, [{"prompt": "p", "response": text, "rating": score} for text, score in rated])
    assert (said(pair["chosen"]), said(pair["rejected"])) == ("B", "A")


def test_a_vote_on_the_first_turn_judges_the_first_answer(tmp_path: Path) -> None:
    sides = {side: [user("q"), assistant(side), user("more"), assistant(f"{side} 2")] for side in "ab"}
    row = {"conversation_a": sides["a"], "conversation_b": sides["b"], "winner": "model_b"}
    (first, *_) = read(tmp_path, [{**row, "turn": 1}] * 2)
    assert (first["chosen"], first["rejected"]) == ([assistant("b")], [assistant("a")])
    assert len(read(tmp_path, [{**row, "turn": 2}] * 2)[0]["chosen"]) == 3


@pytest.mark.parametrize(
    "row",
    [
        {"问题": "中国的首都是哪里", "chosen": "北京。", "rejected": "上海。"},
        {"post": "What is it?", "chosen": "A cat.", "rejected": "It is."},
        {"post": "What is it?", "chosen": "The cat.", "rejected": "The dog."},
        {"turns_before": ["What is it?"], "chosen": "A cat.", "rejected": "It is."},
        {"task": {"text": "What is it?"}, "chosen": "A cat.", "rejected": "It is."},
    ],
)
def test_answers_without_a_prompt_are_refused_where_a_column_may_be_it(tmp_path: Path, row: dict[str, Any]) -> None:
    name = next(iter(row))
    with pytest.raises(DataError, match="prompts would be empty") as caught:
        read(tmp_path, [row, row])
    assert f"`dataset_columns: {{{name}: prompt}}`" in str(caught.value)
    with pytest.raises(DataError, match="prompts would be empty") as caught:
        prepared(prepare, Dataset.from_list([row, row]))


def test_texts_without_a_prompt_may_have_columns_about_them(tmp_path: Path) -> None:
    rows = [
        {"chosen": f"{n} good", "rejected": f"a{n} bad", "source": "the open web", "id": f"row-{n}"} for n in range(8)
    ]
    assert "the prompt of 8 of the first 8 rows is empty" in told(read(tmp_path, rows))


def test_empty_prompts_are_told(tmp_path: Path) -> None:
    rows = [{"prompt": text, "chosen": f"c{n}", "rejected": "r"} for n, text in enumerate(("p", "", " "))]
    assert "the prompt of 2 of the first 3 rows is empty" in told(read(tmp_path, rows))
    asked = [{"prompt": [user("")], "chosen": [assistant("c")], "rejected": [assistant("r")]}] * 2
    assert "the prompt of 2 of the first 2 rows is empty" in told(read(tmp_path, asked))


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "q", "initial_reason_steps": "Step 1: think it over.", "chosen": "c", "rejected": "r"},
         "initial_reason_steps"),
        ({"instruction": "Summarise.", "document": "A text.", "chosen": "c", "rejected": "r"}, "document"),
        ({"instruction": "Pick one.", "choices": ["a b", "c d"], "chosen": "c", "rejected": "r"}, "choices"),
        ({"prompt": "Q", "sys_prompt": "Be kind.", "chosen": "c", "rejected": "r"}, "sys_prompt"),
        ({"prompt": "Sum up:", "input": "A long text.", "chosen": "c", "rejected": "r"}, "input"),
    ],
)  # fmt: skip
def test_a_part_of_the_question_that_is_not_read_is_told(tmp_path: Path, row: dict[str, Any], name: str) -> None:
    assert name in told(read(tmp_path, [row, row]))


@pytest.mark.parametrize("prompt", ["Does it follow?", "Translate {premise} into French.", "Sum up: {{ premise }}"])
def test_where_all_prompts_are_alike_the_question_is_elsewhere(tmp_path: Path, prompt: str) -> None:
    def rows(name: str) -> list[dict[str, Any]]:
        asks = f"{prompt} {{n}}" if "{" in prompt else prompt
        return [{"prompt": asks, "chosen": "c", "rejected": "r", name: f"snow fell {n}"} for n in range(4)]

    assert "premise" in told(read(tmp_path, rows("premise")))
    if "{" not in prompt:
        assert "review_text" in told(read(tmp_path, rows("review_text")))
    for name in ("critique", "annotator_notes", "model_rationale", "generations", "source_url", "prompt_id"):
        assert told(read(tmp_path, rows(name))) == ""


@pytest.mark.parametrize(
    "more",
    [
        {"prompt_id": "a b", "labelling_prompt": "Rate these two.", "original_prompt": "What is this, then?"},
        {"reasoning": "low", "code": "EN", "schema": "v1", "context": "n/a", "persona": "none", "input": "markdown"},
        {"preference_statement": "The first is a little better, since it says more. " * 4, "num_steps": "3 steps"},
        {"annotators": [{"role": "expert", "text": "fine"}], "ground_truth": "It is a cat, as everybody can see. " * 5},
        {"response_3": "another one", "completion_c": "one more", "knowledge": "biology of cats", "intent": "to ask"},
        {"labelling_prompt": [{"role": "system", "content": "Judge."}, {"role": "user", "content": "This one."}]},
        {"url": "https://a.example/File:Map.png", "author_photo": "b.png", "avatar": "a.jpg", "title": "report.gif"},
    ],
)  # fmt: skip
def test_ordinary_columns_are_no_finding(tmp_path: Path, more: dict[str, Any]) -> None:
    rows = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No idea.", **more} for n in range(6)]
    assert told(read(tmp_path, rows)) == ""


def test_one_row_about_marks_is_no_finding(tmp_path: Path) -> None:
    rows = [{"question": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No idea."} for n in range(9)]
    rows += [{"question": "What are <|im_start|> and <video>?", "chosen": "Marks.", "rejected": "No idea."}]
    rows += [{"question": "Hello", "chosen": "Hello! How are you?", "rejected": "Hello there."}]
    assert told(read(tmp_path, rows)) == ""


def test_the_remedy_for_text_below_a_prompt_works(tmp_path: Path) -> None:
    row = {"prompt": "Sum up:", "input": "A long text.", "chosen": "c", "rejected": "r"}
    _, report = prepared(prepare, read(tmp_path, [row, row]))
    assert "`dataset_columns: {prompt: question}`" in "".join(report.findings)
    path = str(tmp_path / "rows.jsonl")
    renamed = load(path, columns={"prompt": "question", "input": "input", "chosen": "chosen", "rejected": "rejected"})
    assert said(renamed["train"][0]["prompt"]) == "Sum up:\nA long text."


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "Be a pirate.\n\nHi", "chosen": [user("Hi"), assistant("c")], "rejected": [user("Hi"),
          assistant("r")]}, "holds text that is in no turn"),
        ({"question": "<|im_start|>user\nQ<|im_end|>", "chosen": "c", "rejected": "r"}, "marks of a chat template"),
        ({"question": "[INST] Q [/INST]", "chosen": "c", "rejected": "r"}, "marks of a chat template"),
        ({"question": "Q of two", "chosen": "Q of two\nc", "rejected": "Q of two\nr"}, "begin with the question"),
        ({"history": [user("Hi"), assistant("Yo"), user("Q")], "question": "Q", "chosen": "c", "rejected": "r"},
         "ask the same question twice"),
        ({"prompt": "q", "tools": [{"type": "function", "function": {"name": "f"}}], "chosen": "c", "rejected": "r"},
         "the tools of 2 of the first 2 rows are not used"),
        ({"prompt": "<image>\nWhat is in it?", "chosen": "c", "rejected": "r"}, "<image> in the text stands for"),
        ({"chosen": "USER: Q ASSISTANT: The answer.", "rejected": "USER: Q ASSISTANT: The other."},
         "their shared words are taken as a part of the prompt"),
    ],
)  # fmt: skip
def test_what_a_run_would_learn_by_mistake_is_told(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    assert says in told(read(tmp_path, [row, row]))
    _, report = prepared(prepare, Dataset.from_list([row, row], on_mixed_types="use_json"))
    assert says in "".join(report.findings)


def test_transcripts_among_other_prompts_are_told(tmp_path: Path) -> None:
    rows = [
        {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " c", "rejected": " r"},
        {"prompt": "You are kind.\n\nHuman: Q\n\nAssistant:", "chosen": " c", "rejected": " r"},
    ]
    assert "1 of the first 2 prompts are transcripts" in told(read(tmp_path, rows))


def test_an_empty_answer_within_a_conversation_is_told(tmp_path: Path) -> None:
    rows = [
        {"messages": [user("q"), assistant(""), user("q"), assistant("c")]},
        {"messages": [user("q"), assistant("a")]},
    ]
    assert "an answer within 1 of the first 2 rows is empty" in told(read(tmp_path, rows, for_sft=True))


@pytest.mark.parametrize(
    "more",
    [{"image_path": "a.png"}, {"img": "data:image/png;base64,AAAA"}, {"picture": {"bytes": None, "path": "a.jpg"}},
     {"sound": "clips/1.wav"}, {"image_url": "https://a.example/b.jpg?size=2"}],
)  # fmt: skip
def test_pictures_and_sounds_under_any_name_are_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="holds pictures or sounds"):
        read(tmp_path, [{"prompt": "What is in it?", "chosen": "c", "rejected": "r", **more}] * 2)


def test_messages_of_a_tree_are_no_texts(tmp_path: Path) -> None:
    rows = [{"message_id": "1", "parent_id": None, "text": "q", "role": "prompter"}] * 2
    with pytest.raises(DataError, match="single messages of conversations"):
        read(tmp_path, rows, for_sft=True)


def test_turns_are_shared_by_what_they_say(tmp_path: Path) -> None:
    def turns(answer: str, numbers: str) -> list[dict[str, str]]:
        said = [user("Hi"), assistant("Yo"), user("Q"), assistant(answer)]
        return [{**turn, "id": number} for turn, number in zip(said, numbers, strict=True)]

    (first, *_) = read(tmp_path, [{"chosen": turns("c", "1234"), "rejected": turns("r", "5678")}] * 2)
    assert [turn["content"] for turn in first["prompt"]] == ["Hi", "Yo", "Q"]


def test_text_and_conversations_of_one_mixture_are_all_conversations(tmp_path: Path) -> None:
    texts = [{"prompt": "p", "chosen": "c", "rejected": "r"}] * 2
    transcripts = [
        {"prompt": "\n\nHuman: x\n\nAssistant: y\n\nHuman: z\n\nAssistant:", "chosen": " c", "rejected": " r"}
    ] * 2
    chats = [{"prompt": "q", "chosen": [user("q"), assistant("c")], "rejected": [user("q"), assistant("r")]}] * 3
    parts: tuple[list[dict[str, Any]], ...] = (texts, chats, transcripts)
    names = [lines(tmp_path / f"{n}.jsonl", rows) for n, rows in enumerate(parts)]
    mixture = {"datasets": [{"id": name} for name in names], "shuffle": False}
    data = load(dataset_mixture=mixture)["train"]
    assert data[0]["prompt"] == [user("p")]
    assert data[0]["chosen"] == [assistant("c")]
    assert [turn["content"] for turn in data[6]["prompt"]] == ["x", "y", "z"]
    assert "4 of 7 rows are text and the others conversations" in told(data)


def test_a_setting_of_the_command_line_is_no_remedy_in_python() -> None:
    rows = [{"Prompt": "p", "chosen": "c", "rejected": "r"}] * 2
    with pytest.raises(DataError, match=r"dataset_columns: \{Prompt: prompt\}"):
        prepared(prepare, Dataset.from_list(rows))
    row = {"prompt": "Sum up:", "input": "A long text.", "chosen": "c", "rejected": "r"}
    _, report = prepared(prepare, Dataset.from_list([row, row]))
    assert "dataset.rename_columns({'prompt': 'question'})" in "".join(report.findings)


def test_columns_of_a_mixture_are_given_to_its_data_sets(tmp_path: Path) -> None:
    name = lines(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r"}])
    with pytest.raises(ConfigError, match="give it to a data set of the mixture, as `columns`"):
        load(dataset_mixture={"datasets": [{"id": name}]}, columns={"a": "b"})


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "p", "completion": "c", "label": "maybe"}, "use true or false"),
        ({**R12, "preference": "A is better"}, "write model_a, model_b or tie"),
        ({"prompt": "p", "chosen": ["a", "b"], "rejected": ["c"]}, "is a list of 2 texts"),
    ],
)
def test_the_remedy_is_told_where_every_row_is_bad(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, [row, row], on_bad_rows="skip")
    assert says in str(caught.value)


def test_a_file_that_is_no_pairs_shows_its_own_columns(tmp_path: Path) -> None:
    row = {"question_body": "q", "answer1_body": "a", "answer2_body": "b", "score": [1, 2], "text": "t"}
    with pytest.raises(DataError) as caught:
        prepared(prepare, read(tmp_path, [row, row]))
    assert all(name in str(caught.value) for name in row)


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.csv", "prompt,chosen,rejected\np,c,r\n,,\n , ,\n", 1),
        ("a.csv", '"prompt","chosen","rejected"\n"a, b", "c, d", "e"\n', 1),
        ("a.csv", '"prompt",chosen,rejected\n"a\nb","c","d"\n', 1),
        ("a.txt", '{"prompt": "p", "chosen": "c", "rejected": "r"}\n', 1),
        ("rows", '[{"prompt": "p", "chosen": "c", "rejected": "r"}]', 1),
        ("a.json", '{"columns": ["prompt", "chosen", "rejected"], "index": [0], "data": [["p", "c", "r"]]}', 1),
        ("a.json", '{"meta": {"v": 1}, "data": {"examples": [{"prompt": "p", "chosen": "c", "rejected": "r"}]}}', 1),
        ("a.json", '{"name": "x", "preferences": [{"prompt": "p", "chosen": "c", "rejected": "r"}]}', 1),
    ],
)
def test_sheets_and_files_as_programs_write_them(tmp_path: Path, name: str, content: str, rows: int) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    data = load(str(tmp_path / name))["train"]
    assert len(data) == rows
    assert set(data.column_names) == {"prompt", "chosen", "rejected"}


def test_a_header_may_hold_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt;chosen;"rejected\nanswer"\np;c;r\n', encoding="utf-8")
    with pytest.raises(DataError, match="match no known data format"):
        load(str(tmp_path / "a.csv"))


@pytest.mark.parametrize("name", ["train-00000-of-00001.parquet", "a.arrow", "train.jsonl.gz", "a.jsonl"])
def test_a_pointer_of_git_lfs_is_named_under_any_suffix(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", encoding="utf-8")
    with pytest.raises(DataError, match="git lfs pull"):
        load(str(tmp_path / name))


def test_the_setting_of_a_split_is_named(tmp_path: Path) -> None:
    name = lines(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r"}])
    with pytest.raises(ConfigError, match="set dataset_train_split"):
        load(name, split="test")


@pytest.mark.parametrize(
    ("row", "chosen"),
    [
        ({"input_text": "p", "candidate_0": "a", "candidate_1": "b", "choice": 1}, "b"),
        ({"prompt": "p", "response_chosen": "b", "response_rejected": "a"}, "b"),
        ({"prompt": "p", "response_0": "a", "response_1": "b", "safer_response_id": 1}, "b"),
        ({**R12, "rating_1": "1/10", "rating_2": "9/10"}, "worse"),
        ({**R12, "rating_1": "4,5", "rating_2": "3,5"}, "GOOD"),
        ({**R12, "rating_1": "2 stars", "rating_2": "5 stars"}, "worse"),
        ({"prompt": "[3, 2, 1]", "response_a": "a", "response_b": "b", "winner": "model_b"}, "b"),
        ({"input": "p", "preferred_output": "b", "non_preferred_output": "a"}, "b"),
        ({"prompt": "p", "chosen": [{"type": "text", "text": "b"}], "rejected": [{"type": "text", "text": "a"}]}, "b"),
        ({"instruction": "p", "input": 3, "chosen": "b", "rejected": "a"}, "b"),
    ],
)
def test_what_is_meant_is_plain(tmp_path: Path, row: dict[str, Any], chosen: str) -> None:
    assert said(read(tmp_path, [row, row])[0]["chosen"]) == chosen


def test_rows_that_share_no_turn_are_bad_rows(tmp_path: Path) -> None:
    row = {"chosen": [assistant("c")], "rejected": [assistant("r")]}
    with pytest.raises(DataError, match="holds no messages"):
        read(tmp_path, [row, row])
    good = {"chosen": [user("q"), assistant("c")], "rejected": [user("q"), assistant("r")]}
    other = {"chosen": [user("q1"), assistant("c")], "rejected": [user("q2"), assistant("r")]}
    assert len(read(tmp_path, [good] * 4 + [other], on_bad_rows="skip")) == 4


@pytest.mark.parametrize("layout", ["ultrafeedback", "arena", "messages"])
def test_turns_are_shared_in_every_layout(tmp_path: Path, layout: str) -> None:
    def turns(answer: str, number: int) -> list[dict[str, str]]:
        whole = [user("Hi"), assistant("Yo"), user("Q"), assistant(answer)]
        return [{**turn, "id": f"{number}-{place}"} for place, turn in enumerate(whole)]

    a, b = turns("c", 1), turns("r", 2)
    rows: dict[str, dict[str, Any]] = {
        "ultrafeedback": {"prompt": "Hi", "chosen": a, "rejected": b},
        "arena": {"conversation_a": a, "conversation_b": b, "winner": "model_a"},
        "messages": {"messages": a, "rejected_messages": b},
    }
    row = rows[layout]
    assert [turn["content"] for turn in read(tmp_path, [row, row])[0]["prompt"]] == ["Hi", "Yo", "Q"]


def test_a_number_with_a_comma_for_thousands_is_no_rating(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response": "a", "score": "1,250"}, {"prompt": "p", "response": "b", "score": "340"}]
    with pytest.raises(DataError, match="not a finite number"):
        read(tmp_path, rows)
    parts = [{**R12, "rating_1": "3/5", "rating_2": "4/10"}] * 2
    assert said(read(tmp_path, parts)[0]["chosen"]) == "GOOD"


@pytest.mark.parametrize("number", [1, 1.0, "1"])
def test_the_number_of_a_turn_however_it_is_written(tmp_path: Path, number: Any) -> None:
    sides = {side: [user("q"), assistant(side), user("more"), assistant(f"{side} 2")] for side in "ab"}
    row = {"conversation_a": sides["a"], "conversation_b": sides["b"], "winner": "model_b", "turn": number}
    assert read(tmp_path, [row, row])[0]["chosen"] == [assistant("b")]


def test_classes_of_a_stream_are_words_too() -> None:
    features = Features(
        {"prompt": Value("string"), "completion": Value("string"), "label": ClassLabel(names=["no", "yes"])}
    )
    rows = [{"prompt": f"p{n}", "completion": f"c{n}", "label": 1 - n % 2} for n in range(4)]
    stream = Dataset.from_list(rows, features=features).to_iterable_dataset()
    found, _ = prepared(prepare_unpaired, stream)
    assert [bool(label) for label in found["label"]] == [True, False, True, False]


@pytest.mark.parametrize(
    "words",
    [("good", "bad"), ("positive", "negative"), ("Y", "N"), ("T", "F"), ("correct", "incorrect"), ("👍", "👎"),
     ("thumbs up", "thumbs down")],
)  # fmt: skip
def test_labels_as_people_write_them(tmp_path: Path, words: tuple[str, str]) -> None:
    rows = [{"prompt": "p", "completion": f"c{n}", "label": word} for n, word in enumerate(words)]
    assert [row["label"] for row in read(tmp_path, rows, pairing="none")] == [True, False]


def test_one_short_row_does_not_make_names_of_answers(tmp_path: Path) -> None:
    def row(chosen: str, rejected: str) -> dict[str, Any]:
        return {
            "prompt": "List.",
            "chosen": chosen,
            "rejected": rejected,
            "chosen_output": "a b",
            "rejected_output": "not",
        }

    rows = [row("ls", "dir"), *(row(f"ls -la {n}", f"cat {n}") for n in range(20))]
    data = read(tmp_path, rows, on_bad_rows="skip")
    assert (len(data), data[1]["chosen"]) == (21, "ls -la 0")


def test_words_that_differ_from_row_to_row_are_no_names(tmp_path: Path) -> None:
    rows = [
        {"question": "Q", "chosen": f"City{n}", "rejected": f"Town{n}", "chosen_text": "It is a capital.",
         "rejected_text": "Many people would say so, too."}
        for n in range(8)
    ]  # fmt: skip
    with pytest.raises(DataError, match="may both be the answers"):
        read(tmp_path, rows)
    path, wanted = str(tmp_path / "rows.jsonl"), ["question", "chosen", "rejected"]
    assert said(load(path, columns=wanted)["train"][0]["chosen"]) == "City0"


def test_letters_are_the_answers_to_a_question_that_lists_them(tmp_path: Path) -> None:
    row = {"question": "Is it? A. yes B. no", "answer_a": "yes", "answer_b": "no", "chosen": "B", "rejected": "A"}
    assert said(read(tmp_path, [row, row])[0]["chosen"]) == "B"


def test_a_sorted_file_is_looked_through_for_its_votes(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response_1": "a", "response_2": "b", "preference": int(n > 119)} for n in range(240)]
    with pytest.raises(DataError, match="counts the answers from 0"):
        read(tmp_path, rows, on_bad_rows="skip")
    with pytest.raises(DataError, match="counts the answers from 0"):
        prepared(prepare, Dataset.from_list(rows))


@pytest.mark.parametrize("scores", [("4/5", "3"), ("90%", "0.95"), ("8/10", "7")])
def test_ratings_in_two_notations_are_refused(tmp_path: Path, scores: tuple[str, str]) -> None:
    rows = [{"prompt": "p", "response": f"r{score}", "score": score} for score in scores]
    with pytest.raises(DataError, match="written in two ways"):
        read(tmp_path, rows)


def test_names_of_answers_do_not_hide_that_the_prompt_is_elsewhere(tmp_path: Path) -> None:
    row = {"post": "What is it?", "response_a": "A cat.", "response_b": "Dogs.", "chosen": "response_a"}
    with pytest.raises(DataError, match=r"dataset_columns: \{post: prompt\}"):
        read(tmp_path, [{**row, "rejected": "response_b"}] * 3)


@pytest.mark.parametrize(
    "prompt", ["Show that $\\frac{a}{b}$ is 3.", "What is <Foo bar={x} /> {n}?", "Tell me a joke."]
)
def test_braces_and_equal_prompts_make_no_questions_of_notes(tmp_path: Path, prompt: str) -> None:
    about = {"expected": "9 or so", "worker": "w 1", "created_at": "May 2", "repo": "a b", "user": "u 1", "key": "k 1"}
    rows = [{"question": prompt, "chosen": f"c{n}", "rejected": "r", **{k: f"{v}{n}" for k, v in about.items()}}
            for n in range(6)]  # fmt: skip
    assert told(read(tmp_path, rows)) == ""


def test_na_may_be_sodium(tmp_path: Path) -> None:
    row = {"instruction": "Name the element.", "input": "Na", "output": "Sodium"}
    assert said(read(tmp_path, [row, row], for_sft=True)[0]["prompt"]) == "Name the element.\nNa"


def test_names_of_answers_beside_a_short_prompt_and_notes_are_no_finding(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{n} + 2", "chosen_text": "It is so, I think.", "rejected_text": "Who knows?", "chosen": "A",
         "rejected": "B", "rationale": f"note {n} about it", "remarks": f"the {n}th of many"}
        for n in range(6)
    ]  # fmt: skip
    data = read(tmp_path, rows)
    assert (said(data[0]["prompt"]), said(data[0]["chosen"]), told(data)) == ("0 + 2", "It is so, I think.", "")


def test_small_letters_are_choices_too(tmp_path: Path) -> None:
    row = {"question": "Is it? a. yes b. no", "answer_a": "yes", "answer_b": "no", "chosen": "b", "rejected": "a"}
    assert said(read(tmp_path, [row, row])[0]["chosen"]) == "b"


def test_a_transform_is_applied_to_rows_with_classes() -> None:
    features = Features(
        {name: Value("string") for name in ("prompt", "completion")} | {"label": ClassLabel(names=["n", "y"])}
    )
    rows = [{"prompt": "p", "completion": "c", "label": 1}, {"prompt": "q", "completion": "d", "label": 0}]

    def louder(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return batch | {"completion": [f"{text}!" for text in batch["completion"]]}

    found, report = prepared(prepare_unpaired, Dataset.from_list(rows, features=features).with_transform(louder))
    assert [bool(label) for label in found["label"]] == [True, False]
    assert "the transform of the data set" in "".join(report.warnings)


def test_a_stray_quote_in_a_header_is_a_part_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('size 5",chosen,rejected\n' + "p,c,r\n" * 3, encoding="utf-8")
    assert len(load(str(tmp_path / "a.csv"))["train"]) == 3
