"""SFT token ids and loss masks against TRL's own preparation."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trl
from datasets import Dataset
from trl.trainer.sft_trainer import SFTTrainer

from preftune.data import DataOptions, prepare_sft
from preftune.errors import ConfigError, DataError
from tests.data.conftest import CHATML, MARKED, TEMPLATES, THINKING, assistant, make_tokenizer, user

TALK = [user("the cat"), assistant("sat on"), user("a mat"), assistant("and saw that " * 4)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "the cat sat on a mat"}, {"text": "dogs bark</s>"}, {"text": "no " * 30}],
    "prompt_completion": [
        {"prompt": "the cat", "completion": " sat"},
        {"prompt": "the ca", "completion": "t on a mat and saw that"},
        {"prompt": "bark " * 20, "completion": "x</s>"},
    ],
    "messages": [{"messages": TALK}, {"messages": [{"role": "system", "content": "dogs"}, *TALK[:2]]}],
    "chat_completion": [
        {"prompt": TALK[:3], "completion": TALK[3:]},
        {"prompt": TALK[:1], "completion": TALK[1:]},
    ],
    "conversations": [
        {"conversations": [{"from": "user", "value": "the cat"}, {"from": "assistant", "value": "sat"}]},
    ],
}


def trl_labels(rows: list[Any], tokenizer: Any, **settings: Any) -> list[tuple[list[int], list[int]]]:
    """``(ids, mask)`` per row, from TRL."""
    only = settings.pop("completion_only_loss", None)
    first = rows[0]
    trainer = SimpleNamespace(
        _tokenizer=tokenizer,
        completion_only_loss="prompt" in first and "completion" in first if only is None else only,
        chat_template=None,
    )
    defaults = {
        "dataset_num_proc": None,
        "dataset_text_field": "text",
        "assistant_only_loss": False,
        "max_length": None,
        "truncation_mode": "keep_start",
        "shuffle_dataset": False,
    }
    args = SimpleNamespace(**{**defaults, **settings})
    prepare_dataset: Any = SFTTrainer._prepare_dataset
    out = prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, False, None, "train")
    pairs = [(row["input_ids"], [int(label != -100) for label in row["labels"]]) for row in out]
    return [(ids, mask) for ids, mask in pairs if any(mask[1:])]


def ours(rows: list[Any], tokenizer: Any, options: DataOptions, **settings: Any) -> list[tuple[list[int], list[int]]]:
    dataset, _ = prepare_sft(Dataset.from_list(rows), tokenizer, options, **settings)
    return [(row["input_ids"], row["loss_mask"]) for row in dataset]


@pytest.mark.thin(30)
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 3, 9, 14, 1024])
@pytest.mark.parametrize("only", [None, True, False])
@pytest.mark.parametrize("kind", ROWS)
def test_masks_equal_trl(kind: str, only: bool | None, max_length: int | None, mode: Any) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    expected = trl_labels(ROWS[kind], tokenizer, completion_only_loss=only, max_length=max_length, truncation_mode=mode)
    options = DataOptions(max_length=max_length, truncation_mode=mode)
    if not expected:
        with pytest.raises(DataError, match="no row is left"):
            prepare_sft(Dataset.from_list(ROWS[kind]), tokenizer, options, completion_only_loss=only)
        return
    assert ours(ROWS[kind], tokenizer, options, completion_only_loss=only) == expected


@pytest.mark.parametrize("only", [None, True, False])
@pytest.mark.parametrize("kind", ["messages", "chat_completion"])
def test_assistant_masks_of_marked_templates_equal_trl(kind: str, only: bool | None) -> None:
    tokenizer = make_tokenizer(template=MARKED)
    settings: dict[str, Any] = {"completion_only_loss": only, "assistant_only_loss": True}
    expected = trl_labels(ROWS[kind], tokenizer, **settings)
    result = ours(ROWS[kind], tokenizer, DataOptions(max_length=None), **settings)
    assert result == expected
    assert all(0 < sum(mask) < len(mask) for _, mask in result)


def test_assistant_masks_without_markers_cover_the_turns() -> None:
    tokenizer = make_tokenizer(template=CHATML)
    dataset, report = prepare_sft(
        Dataset.from_list(ROWS["messages"]), tokenizer, DataOptions(max_length=None), assistant_only_loss=True
    )
    row = dataset[0]
    spans, current = [], []
    for token, bit in zip(row["input_ids"], row["loss_mask"], strict=True):
        if bit:
            current.append(token)
        elif current:
            spans.append(tokenizer.decode(current))
            current = []
    spans.append(tokenizer.decode(current))
    assert spans == ["sat on<|im_end|>\n", "and saw that " * 4 + "<|im_end|>\n"]
    assert any("no {% generation %} markers" in line for line in report.warnings)


def test_assistant_masks_without_markers_equal_trls_with_markers() -> None:
    # The same rendering, once with the markers round the whole turn and once without any.
    marked = CHATML.replace(
        "{{ m['content'] }}<|im_end|>\n{% endfor %}",
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>\n{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}",
    )
    assert len(re.findall("generation %}", marked)) == 2
    rows = [*ROWS["messages"], {"messages": [assistant("dogs"), user("bark"), assistant("no"), assistant("yes")]}]
    expected = trl_labels(rows, make_tokenizer(template=marked), assistant_only_loss=True)
    result = ours(rows, make_tokenizer(template=CHATML), DataOptions(max_length=None), assistant_only_loss=True)
    assert result == expected


def test_generation_prompt_longer_than_the_turn_header() -> None:
    tokenizer = make_tokenizer(template=THINKING)
    ((ids, mask),) = ours(ROWS["messages"][1:], tokenizer, DataOptions(max_length=None), assistant_only_loss=True)
    assert tokenizer.decode([token for token, bit in zip(ids, mask, strict=True) if bit]) == "sat on</s>"


def test_template_that_rewrites_earlier_turns_is_refused() -> None:
    changing = "{% for m in messages %}{{ m['content'] }}{% if loop.last %}</s>{% else %}-{% endif %}{% endfor %}"
    tokenizer = make_tokenizer(template=changing)
    with pytest.raises(DataError, match=r"row 0 .* renders earlier turns differently"):
        prepare_sft(Dataset.from_list(ROWS["messages"]), tokenizer, DataOptions(), assistant_only_loss=True)


STOCK = Path(trl.__file__).parent / "chat_templates"


def _marked(template: str, messages: list[dict[str, str]]) -> list[str]:
    """The stretches of text that are trained on."""
    tokenizer = make_tokenizer(template=template)
    row = {"messages": messages}
    ((ids, mask),) = ours([row], tokenizer, DataOptions(max_length=None), assistant_only_loss=True)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    runs: list[list[int]] = []
    for before, token, bit in zip([0, *mask], ids, mask, strict=False):
        if bit and not before:
            runs.append([])
        if bit:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def test_a_template_that_keeps_thoughts_of_the_last_turn_alone() -> None:
    thinking = (STOCK / "qwen3.jinja").read_text(encoding="utf-8")
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nsat on"},
        {"role": "user", "content": "the dog"},
        {"role": "assistant", "content": "sat on"},
        {"role": "user", "content": "the mat"},
        {"role": "assistant", "content": "<think>\nwell\n</think>\n\nthe end"},
    ]
    assert _marked(thinking, turns) == [
        "sat on<|im_end|>\n",
        "sat on<|im_end|>\n",
        "<think>\nwell\n</think>\n\nthe end<|im_end|>\n",
    ]
    # Nothing is thought, and the conversation ends with the user.
    assert _marked(thinking, [*turns[3:5], turns[1]]) == ["sat on<|im_end|>\n"]
    assert _marked(thinking, turns[3:5]) == ["<think>\n\n</think>\n\nsat on<|im_end|>\n"]


@pytest.mark.parametrize(
    ("family", "first", "last"),
    [
        ("qwen3_5_think", "<|im_end|>\n", "<|im_end|>\n"),  # the generation prompt opens a thought
        ("phi3", "", "<|end|>\n</s>"),  # an end of text where no generation prompt stands
        ("llama3", "<|eot_id|>", "<|eot_id|>"),
    ],
)
def test_stock_templates_of_several_turns(family: str, first: str, last: str) -> None:
    template = (STOCK / f"{family}.jinja").read_text(encoding="utf-8")
    for space in ("", " "):  # some templates strip what the assistant says
        found = [
            text.removeprefix("\n</think>\n\n") for text in _marked(template, [*TALK[:3], assistant("saw" + space)])
        ]
        assert found[0] == "sat on" + first
        assert found[1] in ("saw" + last, "saw" + space + last)


def test_assistant_only_needs_conversations(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="assistant_only_loss needs conversations"):
        prepare_sft(Dataset.from_list(ROWS["text"]), tokenizer, DataOptions(), assistant_only_loss=True)


def test_completion_only_without_completion_is_said(tokenizer: Any) -> None:
    _, report = prepare_sft(Dataset.from_list(ROWS["text"]), tokenizer, DataOptions(), completion_only_loss=True)
    assert any("completion_only_loss has no effect" in line for line in report.warnings)


def test_max_prompt_length_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="max_prompt_length is for preference pairs"):
        prepare_sft(Dataset.from_list(ROWS["text"]), tokenizer, DataOptions(max_prompt_length=3))


def test_other_text_column(tokenizer: Any) -> None:
    rows = [{"story": row["text"]} for row in ROWS["text"]]
    expected = trl_labels(rows, tokenizer, dataset_text_field="story")
    assert ours(rows, tokenizer, DataOptions(max_length=None), dataset_text_field="story") == expected


def test_tokenised_rows_keep_their_masks(tokenizer: Any) -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 1, 0]}]
    for only in (None, True, False):
        expected = trl_labels(rows, tokenizer, completion_only_loss=only, max_length=3)
        assert ours(rows, tokenizer, DataOptions(max_length=3), completion_only_loss=only) == expected
    labels = [{"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}]
    assert ours(labels, tokenizer, DataOptions()) == [([5, 6, 7], [0, 1, 0])]


def test_prepared_examples_pass_through(tokenizer: Any) -> None:
    first, _ = prepare_sft(Dataset.from_list(ROWS["prompt_completion"]), tokenizer, DataOptions(max_length=12))
    second, report = prepare_sft(first, tokenizer, DataOptions(max_length=12))
    assert second[:] == first[:]
    assert report.format == "tokenised"


def test_preference_rows_train_on_the_chosen_answer(tokenizer: Any) -> None:
    pairs = [{"prompt": "the cat", "chosen": " sat", "rejected": " sat"}]
    dataset, report = prepare_sft(Dataset.from_list(pairs), tokenizer, DataOptions())
    assert dataset[0]["input_ids"] == tokenizer("the cat sat</s>")["input_ids"]
    assert sum(dataset[0]["loss_mask"]) == len(tokenizer(" sat</s>")["input_ids"])
    assert any("chosen answers are trained on" in line for line in report.warnings)


@pytest.mark.parametrize("template", TEMPLATES)
def test_eos_is_appended_only_where_it_is_missing(template: str) -> None:
    tokenizer = make_tokenizer(template=TEMPLATES[template])
    plain, before = prepare_sft(Dataset.from_list(ROWS["messages"]), tokenizer, DataOptions())
    fixed, after = prepare_sft(Dataset.from_list(ROWS["messages"]), tokenizer, DataOptions(append_eos=True))
    missing = template in ("chatml", "merging")
    assert before.num_eos_missing == after.num_eos_missing == (2 if missing else 0)
    assert (before.num_eos_appended, after.num_eos_appended) == (0, 2 if missing else 0)
    for one, other in zip(plain, fixed, strict=True):
        assert other["input_ids"] == one["input_ids"] + [tokenizer.eos_token_id] * missing
        assert other["loss_mask"] == one["loss_mask"] + [1] * missing
