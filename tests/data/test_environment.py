"""Turns that the model does not write are masked, and transcripts made conversations, on request; else it is TRL."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from preftune.data import DataOptions, DataWarning, findings, prepare, prepare_sft, warn_findings
from preftune.data.audit.rows import read_rows
from preftune.data.printing import show
from preftune.data.token_view import Viewer
from preftune.data.transcripts import as_conversation, turns_of
from preftune.data.unpaired import prepare_unpaired
from tests.data.conftest import CHATML, TEMPLATES, assistant, make_tokenizer, user
from tests.data.test_pair_parity import our_sequences, trl_sequences
from tests.data.test_rendering import FAMILIES

TOOL = {"role": "tool", "content": "seven degrees"}
ROWS = [
    {
        "prompt": [user("the cat")],
        "chosen": [assistant("let me look"), TOOL, assistant("it is cold")],
        "rejected": [assistant("no")],
    },
    {
        "prompt": [user("dogs"), assistant("bark"), user("and at night")],
        "chosen": [assistant("yes")],
        "rejected": [assistant("sat on"), user("a mat and saw"), assistant("blue sky")],
    },
]
#: Families whose templates know tool results; the others take part in the rows of user turns.
WITH_TOOLS = ("smollm2", "llama3", "qwen3")


def own_text(ids: list[int], mask: list[int] | None, tokenizer: Any) -> str:
    kept = ids if mask is None else [i for i, bit in zip(ids, mask, strict=True) if bit]
    return str(tokenizer.decode(kept))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_models_own_words_are_scored(family: str) -> None:
    tokenizer = make_tokenizer(template=FAMILIES[family])
    rows = ROWS if family in WITH_TOOLS else [ROWS[1]]
    options = DataOptions(max_length=None, environment_turns="masked")
    masked, report = prepare(Dataset.from_list(rows), tokenizer, options)
    scored, _ = prepare(Dataset.from_list(rows), tokenizer, DataOptions(max_length=None))
    assert report.num_environment == len(rows)
    for row, ours, plain in zip(rows, masked, scored, strict=True):
        for side in ("chosen", "rejected"):
            assert ours[f"{side}_ids"] == plain[f"{side}_ids"]
            text = own_text(ours[f"{side}_ids"], ours.get(f"{side}_mask"), tokenizer)
            for turn in row[side]:
                said = turn["content"] in text
                assert said == (turn["role"] == "assistant"), (family, side, turn, text)


@pytest.mark.parametrize("template", TEMPLATES)
def test_without_the_switch_the_numbers_are_trls(template: str) -> None:
    tokenizer = make_tokenizer(template=TEMPLATES[template])
    assert our_sequences(ROWS, tokenizer, DataOptions(max_length=None)) == trl_sequences(
        ROWS, tokenizer, None, "keep_start"
    )
    dataset, report = prepare(Dataset.from_list(ROWS), tokenizer, DataOptions())
    assert "chosen_mask" not in dataset.column_names
    assert any("environment_turns: masked leaves them out" in line for line in report.findings)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("length", [45, 60, 80])
def test_masks_are_cut_with_their_tokens(mode: Any, length: int) -> None:
    tokenizer = make_tokenizer()
    options = DataOptions(max_length=None, environment_turns="masked")
    whole, _ = prepare(Dataset.from_list(ROWS), tokenizer, options)
    cut, _ = prepare(
        Dataset.from_list(ROWS),
        tokenizer,
        DataOptions(max_length=length, truncation_mode=mode, environment_turns="masked"),
    )
    again, _ = prepare(whole, tokenizer, DataOptions(max_length=length, truncation_mode=mode))
    assert cut.to_list() == again.to_list()
    for one in cut:
        for side in ("chosen", "rejected"):
            mask = one.get(f"{side}_mask")
            assert mask is None or (len(mask) == len(one[f"{side}_ids"]) and 0 in mask and 1 in mask)


def test_an_appended_end_is_scored_and_a_slow_tokenizer_is_told() -> None:
    tokenizer = make_tokenizer()
    options = DataOptions(max_length=None, environment_turns="masked", append_eos=True)
    dataset, _ = prepare(Dataset.from_list(ROWS), tokenizer, options)
    assert dataset[0]["chosen_ids"][-1] == tokenizer.eos_token_id
    assert dataset[0]["chosen_mask"][-1] == 1


def test_kto_and_sft_mask_too() -> None:
    tokenizer = make_tokenizer()
    rows = Dataset.from_list(
        [{"prompt": ROWS[0]["prompt"], "completion": ROWS[0]["chosen"], "label": bit} for bit in (True, False)]
    )
    options = DataOptions(max_length=None, environment_turns="masked")
    data, report = prepare_unpaired(rows, tokenizer, options, block=2)
    assert report.num_environment == 2
    for one in data:
        for side in ("chosen", "rejected"):
            assert "degrees" not in own_text(one[f"{side}_ids"], one[f"{side}_mask"], tokenizer)
            assert "cold" in own_text(one[f"{side}_ids"], one[f"{side}_mask"], tokenizer)
    examples, _ = prepare_sft(rows.remove_columns("label"), tokenizer, options)
    text = own_text(examples[0]["input_ids"], examples[0]["loss_mask"], tokenizer)
    assert "degrees" not in text
    assert "let me look" in text
    plain, report = prepare_sft(rows.remove_columns("label"), tokenizer, DataOptions(max_length=None))
    assert "degrees" in own_text(plain[0]["input_ids"], plain[0]["loss_mask"], tokenizer)
    assert report.findings


def test_findings_are_said_once_each() -> None:
    tokenizer = make_tokenizer()
    with pytest.warns(DataWarning) as said:
        _, report = prepare(Dataset.from_list(ROWS), tokenizer, DataOptions(warn=True), "train")
    assert [str(one.message) for one in said] == findings(report)
    assert len(findings(report)) == 2  # tools, and no end-of-sequence token
    with pytest.warns(DataWarning, match="train data set: answers of 2 rows hold turns"):
        warn_findings(report)


@pytest.mark.parametrize(
    ("weights", "says"),
    [([70, 77], "from 70 to 77"), ([0, 1], "from 0 to 1"), ([1, 1], None), ([0.5, None], "from 0.5 to 1")],
)
def test_weights_are_told_with_their_range(weights: list[Any], says: str | None) -> None:
    rows = [{"prompt": "the cat", "chosen": " sat", "rejected": " no", "weight": weight} for weight in weights]
    _, report = prepare(Dataset.from_list(rows), make_tokenizer(), DataOptions())
    told = [line for line in report.findings if "'weight' scales the loss" in line]
    assert bool(told) == (says is not None)
    assert says is None or says in told[0]


# ---- transcripts ----------------------------------------------------------------------------------------------------

HH = {
    "chosen": "\n\nHuman: the cat\n\nAssistant: sat\n\nHuman: and\n\nAssistant: saw dogs",
    "rejected": "\n\nHuman: the cat\n\nAssistant: sat\n\nHuman: and\n\nAssistant: saw no",
}
TURNS = [user("the cat"), assistant("sat"), user("and")]
TRANSCRIPTS: dict[str, dict[str, Any]] = {
    "HH": HH,
    "with a prompt": {
        "prompt": "\n\nHuman: the cat\n\nAssistant: sat\n\nHuman: and\n\nAssistant:",
        "chosen": " saw dogs",
        "rejected": " saw no",
    },
    "User, one line a turn": {
        "prompt": "User: the cat\nAssistant: sat\nUser: and\nAssistant:",
        "chosen": " saw dogs",
        "rejected": " saw no",
    },
    "Guanaco's marks": {
        "prompt": "### Human: the cat\n\n### Assistant: sat\n\n### Human: and\n\n### Assistant:",
        "chosen": " saw dogs",
        "rejected": " saw no",
    },
}


@pytest.mark.parametrize("rule", ["transcript", "common_prefix"])
@pytest.mark.parametrize("kind", TRANSCRIPTS)
def test_transcripts_become_conversations_where_there_is_a_template(kind: str, rule: Any) -> None:
    row, tokenizer = TRANSCRIPTS[kind], make_tokenizer()
    options = DataOptions(implicit_prompt=rule, transcripts="messages")
    ours, report = prepare(Dataset.from_list([row]), tokenizer, options)
    chat = {"prompt": TURNS, "chosen": [assistant("saw dogs")], "rejected": [assistant("saw no")]}
    expected, _ = prepare(Dataset.from_list([chat]), tokenizer, DataOptions())
    assert ours.to_list() == expected.to_list()
    assert report.num_transcripts == 1
    # As text on request, with a word about it, and where there is no template.
    text, report = prepare(Dataset.from_list([row]), tokenizer, DataOptions(implicit_prompt=rule))
    assert "transcripts: messages" in "".join(report.findings)
    bare, report = prepare(Dataset.from_list([row]), make_tokenizer(template=None), options)
    assert bare.to_list() == text.to_list()
    assert report.num_transcripts == 0


def test_transcripts_for_kto_and_sft() -> None:
    tokenizer = make_tokenizer()
    options = DataOptions(transcripts="messages", implicit_prompt="transcript")
    data, _ = prepare_unpaired(Dataset.from_list([HH]), tokenizer, options)
    assert [str(tokenizer.decode(one)) for one in data["chosen_ids"]] == ["saw dogs<|im_end|>\n", "saw no<|im_end|>\n"]
    examples, _ = prepare_sft(Dataset.from_list([{"text": HH["chosen"]}]), tokenizer, options)
    expected, _ = prepare_sft(
        Dataset.from_list([{"messages": [*TURNS, assistant("saw dogs")]}]), tokenizer, DataOptions()
    )
    assert examples.to_list() == expected.to_list()


PLAIN = {"prompt": "the cat", "chosen": " saw dogs", "rejected": " saw no"}
PLAIN_CHAT = {
    "prompt": [{"role": "user", "content": "the cat"}],
    "chosen": [assistant("saw dogs")],
    "rejected": [assistant("saw no")],
}


def test_plain_text_is_told_and_becomes_conversations_on_request() -> None:
    rows, tokenizer = Dataset.from_list([PLAIN, PLAIN]), make_tokenizer()
    expected, _ = prepare(Dataset.from_list([PLAIN_CHAT] * 2), tokenizer, DataOptions())
    ours, report = prepare(rows, tokenizer, DataOptions(plain_text="messages"))
    assert ours.to_list() == expected.to_list()
    assert "plain text" not in "".join(report.findings)
    assert "2 rows of plain text were made conversations" in "".join(report.warnings)
    # As it is by default, with a word about it; where there is no template, there is nothing to say.
    text, report = prepare(rows, tokenizer, DataOptions())
    (told,) = [line for line in report.findings if "plain text" in line]
    assert told.startswith("2 rows are plain text")
    assert "plain_text: messages" in told
    bare, report = prepare(rows, make_tokenizer(template=None), DataOptions(plain_text="messages"))
    assert bare.to_list() == text.to_list() != expected.to_list()
    assert "plain text" not in "".join(report.findings)


def test_plain_text_for_kto_and_sft() -> None:
    tokenizer, options = make_tokenizer(), DataOptions(plain_text="messages")
    data, report = prepare_unpaired(Dataset.from_list([PLAIN]), tokenizer, options)
    assert [str(tokenizer.decode(one)) for one in data["chosen_ids"]] == ["saw dogs<|im_end|>\n", "saw no<|im_end|>\n"]
    assert report.num_plain
    said = {"prompt": PLAIN["prompt"], "completion": PLAIN["chosen"]}
    examples, report = prepare_sft(Dataset.from_list([said]), tokenizer, options)
    chat = {"prompt": PLAIN_CHAT["prompt"], "completion": PLAIN_CHAT["chosen"]}
    expected, _ = prepare_sft(Dataset.from_list([chat]), tokenizer, DataOptions())
    assert examples.to_list() == expected.to_list()
    assert report.num_plain == 1
    # A text of one column has no question, and is nothing to wonder about.
    _, report = prepare_sft(Dataset.from_list([{"text": "the cat saw dogs"}]), tokenizer, DataOptions())
    assert not report.num_plain


def test_the_audit_reads_plain_text_as_it_would_be_trained_on() -> None:
    tokenizer = make_tokenizer()
    for setting, expected in (("text", PLAIN), ("messages", PLAIN_CHAT)):
        read = read_rows([PLAIN], DataOptions(plain_text=setting), tokenizer=tokenizer)  # type: ignore[arg-type]
        assert [row["chosen"] for row in read.rows] == [expected["chosen"]]


def test_text_that_was_rendered_already_is_not_called_plain() -> None:
    row = PLAIN | {"prompt": "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"}
    for options in (DataOptions(), DataOptions(plain_text="messages")):
        _, report = prepare(Dataset.from_list([row]), make_tokenizer(), options)
        assert not report.num_plain


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "the cat", "chosen": " sat", "rejected": " no"},
        {"prompt": "Write a play.\n\nHuman: hello\n\nAssistant: hi", "chosen": " x", "rejected": " y"},
        {"prompt": "Assistant: I am here.\n\nHuman: a\n\nAssistant:", "chosen": " x", "rejected": " y"},
        {"prompt": "Human: a", "chosen": " and b", "rejected": " and c"},
        {"text": "Human: nobody answers"},
    ],
)
def test_text_that_is_no_transcript_stays_text(row: dict[str, Any]) -> None:
    assert as_conversation(row) is None


def test_turns_of_one_speaker_are_joined_and_empty_ones_left_out() -> None:
    row = {
        "prompt": "\n\nHuman: a\n\nHuman: b\n\nAssistant:\n\nHuman: c\n\nAssistant:",
        "chosen": " x",
        "rejected": " y",
    }
    found = as_conversation(row)
    assert found is not None
    assert found["prompt"] == [user("a\n\nb\n\nc")]


@pytest.mark.thin(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_real_transcripts_turn_by_turn(family: str, preference_files: Path) -> None:
    """Every turn of the file, found by a reader of its own, is in what the model sees, in its order."""
    with gzip.open(preference_files / "hh_harmless_1700.jsonl.gz", "rt", encoding="utf-8") as file:
        raw = [json.loads(line) for line in file][:120]
    tokenizer = make_tokenizer(template=FAMILIES[family])
    options = DataOptions(max_length=None, transcripts="messages", implicit_prompt="transcript", on_bad_rows="skip")
    viewer = Viewer(Dataset.from_list(raw), tokenizer, options)
    shown = 0
    for number, row in enumerate(raw):
        view = viewer.row(number)
        if view.problem:
            continue
        shown += 1
        for side in ("chosen", "rejected"):
            text = str(tokenizer.decode([token for token, _ in view.sequences[side]]))
            position = 0
            for piece in row[side].replace("\n\nHuman:", "\n\nAssistant:").split("\n\nAssistant:"):
                if piece.strip():
                    position = text.find(piece.strip(), position)
                    assert position >= 0, (family, number, side)
            assert "Human:" not in text or "Human:" in row[side].replace("\n\nHuman:", "")
    assert shown >= 115


@pytest.mark.parametrize("kind", ["pairs", "labelled", "sft"])
@pytest.mark.parametrize("enclose", [False, True])
def test_turns_that_are_not_scored_are_shown_as_context(kind: Any, enclose: bool) -> None:
    tokenizer = make_tokenizer()
    options = DataOptions(max_length=None, environment_turns="masked", enclose=enclose and kind == "pairs")
    rows = Dataset.from_list(ROWS)
    if kind == "sft":
        rows = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS])
    viewer = Viewer(rows, tokenizer, options, kind)
    for index in range(len(viewer)):
        for name, tokens in viewer.row(index).sequences.items():
            text = str(tokenizer.decode([token for token, label in tokens if label == name]))
            assert "degrees" not in text
            assert "mat and saw" not in text
            assert text


def test_labels_of_a_transcript() -> None:
    assert [turn["role"] for turn in turns_of("System: s\n\nUser: a\n\nAssistant: b: c\nHuman: no")] == [
        "system",
        "user",
        "assistant",
    ]


def test_rows_are_shown_as_they_are_trained_on(capsys: Any) -> None:
    options = DataOptions(transcripts="messages", implicit_prompt="transcript")
    show(Dataset.from_list([HH]), make_tokenizer(template=CHATML), options)
    out = capsys.readouterr().out
    assert "[+saw dogs<|im_end|>" in out
    assert "Human:" not in out
