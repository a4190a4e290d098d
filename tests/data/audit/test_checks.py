"""Each check finds what was planted, and stays silent on a clean set."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from preftune.data import DataOptions, load
from preftune.data.audit import Finding
from preftune.errors import DataError
from preftune.objectives import METHODS
from tests.data.audit.conftest import Look, clean_rows, sentence
from tests.data.conftest import CHATML, TEMPLATES, make_tokenizer


def found(report: Any, check: str) -> Finding:
    finding = report.finding(check)
    assert isinstance(finding, Finding), f"{check} was not made"
    return finding


def rows_of(finding: Finding) -> set[Any]:
    return {example["row"] for example in finding.examples}


@pytest.mark.thin(1)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_clean_set_gives_no_alarm(look: Look, seed: int) -> None:
    report = look(clean_rows(seed=seed), make_tokenizer(), test=clean_rows(30, seed=seed + 100))
    assert {one.check: one.severity for one in report.findings if one.severity in ("warn", "problem")} == {}
    assert report.num_rows == report.num_prompts == 120
    assert report.not_applicable == {}


def test_what_the_first_rows_show_is_a_finding_of_the_audit_too(look: Look, tmp_path: Path) -> None:
    rows = [{**row, "passage": f"It says {number}."} for number, row in enumerate(clean_rows(12))]
    finding = found(look(rows), "first_rows")
    assert finding.severity == "warn"
    # In the words of whoever is told.
    assert "'passage'; name them with `dataset.rename_columns(" in finding.detail
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    loaded = load(str(tmp_path / "rows.jsonl"), with_test=False)["train"]
    assert "'passage'; name them with `dataset_columns: {" in found(look(loaded), "first_rows").detail
    with pytest.raises(DataError, match="single messages of conversations"):
        look(
            [{"parent_id": str(number), "role": "assistant", "text": row["chosen"]} for number, row in enumerate(rows)]
        )


def test_repeated_rows_are_counted_once_each(look: Look) -> None:
    rows = clean_rows(40)
    rows += [rows[3], {**rows[3], "prompt": f"  {rows[3]['prompt']}\n"}, rows[7]]
    finding = found(look(rows), "duplicate_rows")
    assert (finding.count, finding.severity) == (3, "warn")
    assert [(one["row"], one["repeats"]) for one in finding.examples] == [(40, 3), (41, 3), (42, 7)]
    assert finding.share == pytest.approx(3 / 43)


def test_a_prompt_with_many_rows(look: Look) -> None:
    rows = clean_rows(40)
    for row in rows[:12]:
        row["prompt"] = rows[0]["prompt"]
    finding = found(look(rows), "repeated_prompts")
    assert (finding.count, finding.severity) == (12, "note")
    assert finding.examples[0]["rows"] == 12


def test_nearly_the_same_row_and_prompt(look: Look) -> None:
    rows = clean_rows(40)
    draw = random.Random(5)
    long = {name: f"{sentence(draw, 60)}" for name in ("prompt", "chosen", "rejected")}
    near = {name: text.replace(text.split()[30], "banana", 1) for name, text in long.items()}
    far = {**near, "chosen": sentence(draw, 60)}
    report = look([*rows, long, near, far])
    assert rows_of(found(report, "near_duplicate_rows")) == {41}
    assert rows_of(found(report, "near_duplicate_prompts")) == {41}
    assert found(report, "duplicate_rows").count == 0


def test_contradictions_to_the_letter_and_nearly(look: Look) -> None:
    rows = clean_rows(40)
    turned = {"prompt": rows[4]["prompt"], "chosen": rows[4]["rejected"], "rejected": rows[4]["chosen"]}
    draw = random.Random(9)
    long = {name: sentence(draw, 60) for name in ("prompt", "chosen", "rejected")}
    near = {name: text.replace(text.split()[30], "banana", 1) for name, text in long.items()}
    nearly = {"prompt": near["prompt"], "chosen": near["rejected"], "rejected": near["chosen"]}
    report = look([*rows, turned, long, nearly])
    exact = found(report, "contradictions")
    assert (exact.count, exact.severity) == (2, "warn")
    assert {exact.examples[0]["row"], exact.examples[0]["against"]} == {4, 40}
    close = found(report, "near_contradictions")
    assert (close.count, rows_of(close)) == (1, {42})
    assert report.noise["repeats"]["num_pairs"] == 1
    assert report.noise["repeats"]["disagreement"] == 1


def test_circles_are_found_and_orders_are_not(look: Look) -> None:
    rows = clean_rows(40)
    a, b, c = (f" answer {name} {rows[0]['chosen']}" for name in "abc")
    ordered = [("one", a, b), ("one", b, c), ("one", a, c)]
    circle = [("two", a, b), ("two", b, c), ("two", c, a)]
    rows += [{"prompt": p, "chosen": x, "rejected": y} for p, x, y in ordered + circle]
    finding = found(look(rows), "circles")
    assert (finding.count, finding.severity) == (3, "warn")
    assert finding.examples[0]["rows"] == [43, 44, 45]
    assert found(look(rows[:43]), "circles").severity == "ok"


def test_identical_empty_and_broken_rows_are_counted_by_place(look: Look) -> None:
    rows = clean_rows(40)
    rows[5]["rejected"] = rows[5]["chosen"]
    rows[6]["chosen"] = "  "
    rows[7]["chosen"] = None
    report = look(rows)
    assert report.num_rows == 37
    assert report.num_read == 40
    for check, row in (("identical_pairs", 5), ("empty_answers", 6), ("bad_rows", 7)):
        finding = found(report, check)
        assert (finding.count, finding.severity) == (1, "warn")
        assert f"row {row}" in finding.examples[0]["place"]
    strict = look(rows, options=DataOptions(max_dropped_share=0.05))
    assert found(strict, "bad_rows").severity == "problem"


def test_leakage(look: Look) -> None:
    train, test = clean_rows(60), clean_rows(20, seed=50)
    draw = random.Random(3)
    long = sentence(draw, 60)
    train[9]["prompt"] = long
    test[0] = {"prompt": train[2]["prompt"], "chosen": train[2]["rejected"], "rejected": train[2]["chosen"]}
    test[1] = {**test[1], "prompt": train[3]["prompt"]}
    test[2] = {**test[2], "prompt": long.replace(long.split()[30], "banana", 1)}
    report = look(train, test=test)
    expected = {"leaked_rows": ({0}, "problem"), "leaked_prompts": ({0, 1}, "warn")}
    expected["near_leaked_prompts"] = ({2}, "note")
    for check, (rows, severity) in expected.items():
        assert rows_of(found(report, check)) == rows
        assert found(report, check).severity == severity
    assert "no test split" in look(train).not_applicable["leaked_rows"]


def test_length_bias_both_ways_and_its_correlation(look: Look) -> None:
    rows = clean_rows(100)
    for row in rows:
        row["chosen"] += " and so on and on for a while with further words" if row is not rows[0] else ""
    finding = found(look(rows), "length_bias")
    assert finding.severity == "warn"
    assert "Longer" in finding.detail
    named = re.search(r"\(LD-DPO, SimPO, (\w+)\)", finding.detail)
    assert named is not None
    assert named[1] in METHODS
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    other = found(look(swapped), "length_bias")
    assert other.share == pytest.approx(1 - (finding.share or 0))
    assert "Shorter" in other.detail
    # The correlation by its definition: every pair from both sides.
    import numpy as np

    from preftune.data.audit.text import words

    gaps = np.array([len(words(row["chosen"])) - len(words(row["rejected"])) for row in rows], dtype=float)
    both = np.corrcoef(np.r_[gaps, -gaps], np.r_[np.ones(100), -np.ones(100)])[0, 1]
    assert f"correlation {both:+.2f}" in finding.detail


def test_truncation_says_what_is_lost_and_what_would_keep_it(look: Look) -> None:
    tokenizer = make_tokenizer(template=None)
    rows = clean_rows(40)
    whole = found(look(rows, tokenizer, options=DataOptions(max_length=None)), "truncation")
    assert (whole.count, whole.severity) == (0, "ok")
    report = look(rows, tokenizer, options=DataOptions(max_length=None))
    lengths = sorted(
        len(tokenizer(row["prompt"] + row[side])["input_ids"]) + 1 for row in rows for side in ("chosen", "rejected")
    )
    assert report.lengths["max_length_to_keep"]["all"] == lengths[-1]
    longest = found(look(rows, tokenizer, options=DataOptions(max_length=lengths[-1] - 1)), "truncation")
    assert longest.count == sum(length == lengths[-1] for length in lengths)
    # One token for the answer: both are cut to the same one.
    same = look(
        [{"prompt": "the cat", "chosen": " sat on a mat", "rejected": " sat at night"}] * 2,
        tokenizer,
        options=DataOptions(max_length=len(tokenizer("the cat sat")["input_ids"])),
    )
    assert same.lengths["truncation"]["num_same_after"] == 2
    assert found(same, "truncation").severity == "problem"
    ends = look(rows, tokenizer, options=DataOptions(max_length=lengths[-1] - 1)).lengths["truncation"]
    assert ends["num_end_lost"] == ends["num_truncated"] == longest.count


def test_every_row_dropped_is_a_problem_not_a_crash(look: Look) -> None:
    report = look(clean_rows(10), make_tokenizer(), options=DataOptions(max_length=2))
    assert found(report, "truncation").severity == "problem"
    assert report.lengths["truncation"]["dropped"] == {"prompt_fills_max_length": 10}


def test_boundary_merges_with_their_tokens(look: Look) -> None:
    tokenizer = make_tokenizer()
    rows = clean_rows(40)
    rows[8] = {"prompt": "the cat sa", "chosen": "t on a mat", "rejected": "w that blue sky"}
    finding = found(look(rows, tokenizer), "boundary_merges")
    assert (finding.count, rows_of(finding)) == (1, {8})
    prompt = tokenizer.convert_ids_to_tokens(tokenizer("the cat sa")["input_ids"])
    shown = finding.examples[0]["prompt_alone_ends"]
    assert shown == prompt[-len(shown) :]


def test_doubled_bos(look: Look) -> None:
    rows = clean_rows(40)
    rows[2]["prompt"] = "<s>" + rows[2]["prompt"]
    report = look(rows, make_tokenizer(adds_bos=True))
    assert rows_of(found(report, "doubled_bos")) == {2}
    assert rows_of(found(report, "special_tokens_in_text")) == {2}


def test_eos_missing_from_a_template_and_appended(look: Look) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in clean_rows(20)
    ]
    tokenizer = make_tokenizer(template=CHATML)  # ends turns with a token that is not EOS
    missing = found(look(rows, tokenizer), "missing_eos")
    assert (missing.count, missing.severity) == (20, "warn")
    appended = found(look(rows, tokenizer, options=DataOptions(append_eos=True)), "missing_eos")
    assert (appended.count, appended.severity) == (20, "note")
    assert found(look(rows, make_tokenizer(template=TEMPLATES["marked"])), "missing_eos").severity == "ok"
    failing = make_tokenizer(template="{{ raise_exception('no') if 'bread' in messages[0]['content'] }}x</s>")
    assert found(look(rows, failing), "template_errors").count == sum(
        "bread" in r["prompt"][0]["content"] for r in rows
    )


def test_a_tokenizer_without_template_is_a_finding(look: Look) -> None:
    rows = [{"prompt": [{"role": "user", "content": "a"}], "chosen": "x", "rejected": "y"}]
    roles = {"prompt": "user"}
    chats = [
        {key: [{"role": roles.get(key, "assistant"), "content": str(value)}] for key, value in row.items()}
        for row in clean_rows(5)
    ]
    report = look(chats, make_tokenizer(template=None))
    assert found(report, "tokens").severity == "problem"
    assert "chat template" in report.not_applicable["truncation"]
    assert report.lengths["unit"] == "words"
    assert len(rows) == 1


def test_marks_of_templates_and_further_turns(look: Look) -> None:
    rows = clean_rows(40)
    rows[1]["chosen"] = " fine<|im_end|>"
    rows[2]["rejected"] = " fine\n\nHuman: and then?\n\nAssistant: well"
    report = look(rows)
    assert rows_of(found(report, "special_tokens_in_text")) == {1}
    assert rows_of(found(report, "turns_in_answers")) == {2}


def test_an_answer_may_end_with_eos_itself(look: Look) -> None:
    rows = [{**row, "chosen": row["chosen"] + "</s>"} for row in clean_rows(20)]
    assert found(look(rows, make_tokenizer()), "special_tokens_in_text").count == 0


def test_refusals_by_side(look: Look) -> None:
    rows = clean_rows(60)
    for row in rows[:15]:
        row["chosen"] = " I\u2019m sorry, but I can't help with that. " + row["chosen"]
    finding = found(look(rows), "refusals")
    assert (finding.count, finding.severity) == (15, "note")
    assert finding.detail.startswith("Chosen")
    assert finding.threshold_kind == "heuristic"


def test_trivial_and_stock_answers(look: Look) -> None:
    rows = clean_rows(60)
    rows[3]["chosen"] = "..."
    rows[4]["rejected"] = " N/A "
    for row in rows[10:20]:
        row["rejected"] = " Ask somebody else about these things."
    report = look(rows)
    assert rows_of(found(report, "trivial_answers")) == {3, 4}
    stock = found(report, "stock_answers")
    assert (stock.count, stock.severity) == (10, "warn")
    assert stock.examples[0]["side"] == "rejected"


def test_layout_that_decides_the_label(look: Look) -> None:
    rows = clean_rows(60)
    for row in rows[:30]:
        row["chosen"] += "\n- one\n- two"
    assert found(look(rows), "layout_bias").severity == "note"
    for row in rows[:15]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    assert found(look(rows), "layout_bias").severity == "ok"


def test_an_answer_in_another_language(look: Look) -> None:
    english = "The weather was lovely this morning, and we walked along the river until the rain began to fall."
    german = "Das Wetter war heute Morgen wunderbar, und wir gingen am Fluss entlang, bis der Regen begann."
    rows = [{"prompt": f"{n} {english}", "chosen": f"{english} {n}", "rejected": f"so {english}"} for n in range(20)]
    assert found(look(rows), "languages").severity == "ok"
    rows[6]["chosen"] = german
    finding = found(look(rows), "languages")
    assert rows_of(finding) == {6}
    assert finding.examples[0]["prompt"] == "en"
    assert "de" in finding.examples[0]["answers"]


@pytest.mark.parametrize("num_rows", [1, 2])
def test_very_small_sets(look: Look, num_rows: int) -> None:
    report = look(clean_rows(num_rows), make_tokenizer())
    assert report.num_rows == num_rows
    assert report.noise["estimate"] is None
    assert (report.noise["low"], report.noise["high"]) == (0.0, 0.5)


def test_no_rows_is_an_error(look: Look) -> None:
    from datasets import Dataset

    with pytest.raises(DataError, match="no rows"):
        look(Dataset.from_list([]))


def test_only_bad_rows_is_a_report(look: Look) -> None:
    report = look([{"prompt": "a", "chosen": "b", "rejected": "b"}])
    assert report.num_rows == 0
    assert found(report, "identical_pairs").severity == "problem"
