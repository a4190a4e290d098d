"""Token ids, boundaries and truncation of pairs against TRL's own preparation and collator."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

from preftune.data import DataOptions, prepare
from tests.data.conftest import CHAT, PLAIN, TEMPLATES, assistant, make_tokenizer, user

Sequence = tuple[list[int], list[int]]


def trl_sequences(
    rows: list[dict[str, Any]], tokenizer: Any, max_length: int | None, mode: str
) -> list[list[Sequence]]:
    """``[(ids, completion mask) of chosen, of rejected]`` per row, from TRL."""
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode=mode)
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    prepare_dataset: Any = DPOTrainer._prepare_dataset
    prepared = prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, "train")
    collator = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=mode)
    out = []
    for row in prepared:
        batch = collator([row])
        pair = []
        for i in range(2):
            length = int(batch["attention_mask"][i].sum())
            pair.append((batch["input_ids"][i, :length].tolist(), batch["completion_mask"][i, :length].tolist()))
        out.append(pair)
    return out


def our_sequences(rows: list[dict[str, Any]], tokenizer: Any, options: DataOptions) -> list[list[Sequence]]:
    dataset, _ = prepare(Dataset.from_list(rows), tokenizer, options)
    out = []
    for row in dataset:
        prompt = row["prompt_ids"]
        other = prompt if row["rejected_prompt_ids"] is None else row["rejected_prompt_ids"]
        out.append(
            [
                (p + c, [0] * len(p) + [1] * len(c))
                for p, c in ((prompt, row["chosen_ids"]), (other, row["rejected_ids"]))
            ]
        )
    return out


def scored(pair: list[Sequence]) -> bool:
    """Whether a loss falls on both sequences; nothing predicts a first token."""
    return all(sum(mask[1:]) > 0 for _, mask in pair)


IMPLICIT_PLAIN = [
    {"chosen": "the cat sat on a mat", "rejected": "the cat sat at night"},
    {"chosen": "the cat", "rejected": "the cat sat"},  # one is the beginning of the other
    {"chosen": "the cat sat ", "rejected": "no"},  # nothing shared, and TRL looks at the last character
    {"chosen": "the sky", "rejected": "dogs"},
    {"chosen": "\n\nHuman: a\n\nAssistant: the cat", "rejected": "\n\nHuman: a\n\nAssistant: the dogs"},
]
IMPLICIT_CHAT = [
    {"chosen": [user("the cat"), assistant("sat")], "rejected": [user("the cat"), assistant("bark")]},
    {
        "chosen": [user("a"), assistant("b"), user("c"), assistant("yes")],
        "rejected": [user("a"), assistant("b"), user("c"), assistant("no"), user("d"), assistant("e")],
    },
]
LENGTHS = [None, 1, 2, 3, 7, 12, 20, 33, 1024]


@pytest.mark.thin(20)
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", LENGTHS)
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("rows", [PLAIN, IMPLICIT_PLAIN], ids=["explicit", "implicit"])
def test_plain_text_equals_trl(rows: list[Any], adds_bos: bool, max_length: int | None, mode: str) -> None:
    _compare(rows, make_tokenizer(adds_bos=adds_bos), max_length, mode)


@pytest.mark.thin(30)
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", LENGTHS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("rows", [CHAT, IMPLICIT_CHAT], ids=["explicit", "implicit"])
def test_conversations_equal_trl(rows: list[Any], template: str, max_length: int | None, mode: str) -> None:
    _compare(rows, make_tokenizer(adds_bos=True, template=TEMPLATES[template]), max_length, mode)


def _compare(rows: list[Any], tokenizer: Any, max_length: int | None, mode: str) -> None:
    from preftune.errors import DataError

    expected = [pair for pair in trl_sequences(rows, tokenizer, max_length, mode) if scored(pair)]
    options = DataOptions(max_length=max_length, truncation_mode=mode, on_bad_rows="warn")  # type: ignore[arg-type]
    if not expected:
        with pytest.raises(DataError, match="no row is left"):
            prepare(Dataset.from_list(rows), tokenizer, options)
        return
    assert our_sequences(rows, tokenizer, options) == expected


def test_bad_rows_that_trl_trains_on_equal_trl(tokenizer: Any) -> None:
    rows = [
        {"prompt": "the cat", "chosen": "", "rejected": " sat"},
        {"prompt": "the cat", "chosen": " sat", "rejected": " sat"},
    ]
    options = DataOptions(max_length=None, on_bad_rows="warn")
    assert our_sequences(rows, tokenizer, options) == trl_sequences(rows, tokenizer, None, "keep_start")
    _, report = prepare(Dataset.from_list(rows), tokenizer, options)
    assert report.bad_rows == {"empty_completion": 1, "identical_pair": 1}
    assert any("2 bad rows kept" in line for line in report.warnings)


def test_tools_and_template_arguments_equal_trl() -> None:
    tokenizer = make_tokenizer(template=TEMPLATES["merging"])
    tools = [{"type": "function", "function": {"name": "cat", "parameters": {"type": "object"}}}]
    rows = [
        {**CHAT[0], "tools": tools, "chat_template_kwargs": {"shout": "yes "}},
        {**CHAT[1], "tools": tools, "chat_template_kwargs": {"shout": "no "}},
    ]
    ours = our_sequences(rows, tokenizer, DataOptions(max_length=None))
    assert ours == trl_sequences(rows, tokenizer, None, "keep_start")
    assert ours[0][0][0] != our_sequences(CHAT[:1], tokenizer, DataOptions(max_length=None))[0][0][0]


def test_tools_as_json_text_equal_trl() -> None:
    tokenizer = make_tokenizer(template=TEMPLATES["merging"])
    rows = [{**CHAT[0], "tools": '[{"type": "function"}]'}]
    assert our_sequences(rows, tokenizer, DataOptions(max_length=None)) == trl_sequences(
        rows, tokenizer, None, "keep_start"
    )


def test_arguments_of_the_call_itself_equal_trl(tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(CHAT[0]["prompt"], add_generation_prompt=True)["input_ids"]
    length = len(prompt) + 1
    rows = [{**CHAT[0], "chat_template_kwargs": {"truncation": True, "max_length": length}}]
    ours = our_sequences(rows, tokenizer, DataOptions(max_length=None))
    assert ours == trl_sequences(rows, tokenizer, None, "keep_start")
    assert [len(ids) for ids, _ in ours[0]] == [length, length]


def test_own_chat_template_replaces_the_tokenizers(tokenizer: Any) -> None:
    other = make_tokenizer(template=TEMPLATES["thinking"])
    options = DataOptions(max_length=None, chat_template=TEMPLATES["thinking"])
    assert our_sequences(CHAT, tokenizer, options) == trl_sequences(CHAT, other, None, "keep_start")


def test_several_batches_and_processes_give_the_same(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from preftune.data import batches

    rows = [{**PLAIN[i % 7], "margin": i / 2} for i in range(41)]
    whole, report = prepare(Dataset.from_list(rows), tokenizer, DataOptions(max_length=12))
    monkeypatch.setattr(batches, "BATCH_SIZE", 7)
    pieces, _ = prepare(Dataset.from_list(rows), tokenizer, DataOptions(max_length=12))
    monkeypatch.setattr(batches, "MIN_ROWS_FOR_PROCESSES", 10)
    shared, shared_report = prepare(Dataset.from_list(rows), tokenizer, DataOptions(max_length=12, num_proc=2))
    assert 0 < len(whole) < 41
    assert whole[:] == pieces[:] == shared[:]
    assert shared_report == report


text = st.text(alphabet="the catsonmbluy \n.é日<s>/", max_size=24)


@given(
    rows=st.lists(st.fixed_dictionaries({"prompt": text, "chosen": text, "rejected": text}), min_size=1, max_size=4),
    max_length=st.one_of(st.none(), st.integers(1, 20)),
    mode=st.sampled_from(["keep_start", "keep_end"]),
)
def test_any_text_equals_trl(rows: list[dict[str, str]], max_length: int | None, mode: str) -> None:
    _compare(rows, _plain_tokenizer(), max_length, mode)


_made: list[Any] = []


def _plain_tokenizer() -> Any:
    if not _made:
        _made.append(make_tokenizer())
    return _made[0]


@given(
    prompt=st.lists(st.integers(0, 9), max_size=9),
    chosen=st.lists(st.integers(0, 9), max_size=9),
    rejected=st.lists(st.integers(0, 9), max_size=9),
    max_length=st.one_of(st.none(), st.integers(1, 20)),
    mode=st.sampled_from(["keep_start", "keep_end"]),
)
def test_truncation_equals_trls_collator(
    prompt: list[int], chosen: list[int], rejected: list[int], max_length: int | None, mode: str
) -> None:
    from preftune.data.truncation import TokenPair, truncate

    collator = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=mode)
    batch = collator([{"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}])
    expected = []
    for i in range(2):
        length = int(batch["attention_mask"][i].sum())
        expected.append((batch["input_ids"][i, :length].tolist(), batch["completion_mask"][i, :length].tolist()))
    pair, reason = truncate(TokenPair(prompt, chosen, rejected), max_length, None, mode)
    if not scored(expected):
        assert pair is None
        assert reason is not None
        return
    assert pair is not None
    other = pair.prompt if pair.rejected_prompt is None else pair.rejected_prompt
    ours = [(p + c, [0] * len(p) + [1] * len(c)) for p, c in ((pair.prompt, pair.chosen), (other, pair.rejected))]
    assert ours == expected
    again, _ = truncate(pair, max_length, None, mode)
    assert again == pair


@pytest.mark.parametrize(("mode", "expected"), [("keep_end", [3, 4]), ("keep_start", [1, 2])])
def test_max_prompt_length_keeps_one_end_of_the_prompt(mode: str, expected: list[int]) -> None:
    from preftune.data.truncation import TokenPair, truncate

    pair, _ = truncate(TokenPair([1, 2, 3, 4], [5, 6, 7], [8]), None, 2, mode)
    assert pair == TokenPair(expected, [5, 6, 7], [8])


def test_keep_end_may_leave_two_prompts() -> None:
    from preftune.data.truncation import TokenPair, truncate

    pair, _ = truncate(TokenPair([1, 2, 3, 4], [5, 6, 7], [8]), 4, None, "keep_end")
    assert pair == TokenPair([4], [5, 6, 7], [8], rejected_prompt=[2, 3, 4])


def test_keep_end_inside_a_completion_leaves_no_prompt(tokenizer: Any) -> None:
    row = {"prompt": "the cat", "chosen": " sat on a mat", "rejected": " no"}
    dataset, report = prepare(
        Dataset.from_list([row]), tokenizer, DataOptions(max_length=3, truncation_mode="keep_end")
    )
    assert dataset[0]["prompt_ids"] == []
    assert len(dataset[0]["chosen_ids"]) == 3
    assert dataset[0]["rejected_prompt_ids"] == tokenizer("the cat")["input_ids"][-1:]
    assert report.num_truncated == 1
    assert report.num_prompt_tokens == 1


def test_reasons_for_dropping() -> None:
    from preftune.data.truncation import EMPTY, NOT_SCORED, PROMPT_FILLS, TokenPair, truncate

    assert truncate(TokenPair([1, 2], [3], [4]), 2, None, "keep_start") == (None, PROMPT_FILLS)
    assert truncate(TokenPair([1, 2], [3], []), 9, None, "keep_start") == (None, EMPTY)
    assert truncate(TokenPair([], [3], [4, 5]), 9, None, "keep_start") == (None, NOT_SCORED)
    assert truncate(TokenPair([1, 2], [3], [4]), 1, None, "keep_end") == (None, NOT_SCORED)
