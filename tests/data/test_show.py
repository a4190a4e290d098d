"""What `data show` prints."""

from __future__ import annotations

import io
from typing import Any

import pytest
from datasets import Dataset
from rich.console import Console

from preftune.data import DataOptions, prepare, prepare_sft, show
from preftune.data.token_view import Viewer, label_pair
from preftune.data.tokenise import Encoder, TokenisedPair, tokenise_pairs
from preftune.data.unpaired import prepare_unpaired
from preftune.errors import DataError
from tests.data.conftest import CHAT, PLAIN, make_tokenizer


def printed(rows: list[Any], tokenizer: Any, options: DataOptions, colour: bool = False, **settings: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, width=400, force_terminal=colour, color_system="standard" if colour else None)
    show(Dataset.from_list(rows), tokenizer, options, console=console, **settings)
    return out.getvalue()


def test_brackets_say_what_colours_say(tokenizer: Any) -> None:
    text = printed(PLAIN[:1], tokenizer, DataOptions())
    assert "the cat[+ sat on a mat</s>+]" in text
    assert "the cat[- was bright</s>-]" in text


def test_colours(tokenizer: Any) -> None:
    text = printed(PLAIN[:1], tokenizer, DataOptions(), colour=True)
    assert "\x1b[36mthe cat\x1b[0m\x1b[32m sat on a mat</s>\x1b[0m" in text
    assert "[+" not in text


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize(("max_length", "max_prompt"), [(None, None), (14, None), (6, None), (None, 3), (9, 4)])
def test_labels_are_the_real_mask(tokenizer: Any, mode: Any, max_length: int | None, max_prompt: int | None) -> None:
    options = DataOptions(max_length=max_length, max_prompt_length=max_prompt, truncation_mode=mode)
    results = [r for r in tokenise_pairs(Encoder(tokenizer), PLAIN) if isinstance(r, TokenisedPair)]
    prepared, _ = prepare(Dataset.from_list(PLAIN), tokenizer, options)
    labelled = [labels for labels, reason in (label_pair(result, options) for result in results) if reason is None]
    assert 0 < len(labelled) == len(prepared)
    for labels, row in zip(labelled, prepared, strict=True):
        other = row["prompt_ids"] if row["rejected_prompt_ids"] is None else row["rejected_prompt_ids"]
        for name, prompt in (("chosen", row["prompt_ids"]), ("rejected", other)):
            assert [token for token, label in labels[name] if label != "dropped"] == prompt + row[f"{name}_ids"]
            first = 0 if prompt else 1
            assert [token for token, label in labels[name] if label == name] == row[f"{name}_ids"][first:]


def test_text_that_a_template_could_render_says_so() -> None:
    word = "plain text, without the chat template"
    assert printed(PLAIN[:2], make_tokenizer(), DataOptions()).count(word) == 2
    assert word not in printed(PLAIN[:2], make_tokenizer(), DataOptions(plain_text="messages"))
    assert word not in printed(PLAIN[:2], make_tokenizer(template=None), DataOptions())
    assert word not in printed(CHAT[:2], make_tokenizer(), DataOptions())


def test_dropped_and_bad_rows_say_why(tokenizer: Any) -> None:
    rows = [PLAIN[6], {**PLAIN[0], "chosen": ""}]
    text = printed(rows, tokenizer, DataOptions(max_length=10))
    assert "the whole row is dropped: prompt fills max length" in text
    assert "bad row: empty_completion" in text


def test_merges_are_shown(tokenizer: Any) -> None:
    assert "the prompt alone ends with ' '" in printed([PLAIN[4]], tokenizer, DataOptions())


def test_sft_examples(tokenizer: Any) -> None:
    rows = [{"messages": [*CHAT[0]["prompt"], *CHAT[0]["chosen"]]}]
    text = printed(rows, tokenizer, DataOptions(), kind="sft", assistant_only_loss=True)
    assert "<|im_start|>assistant\n[+sat on a mat<|im_end|>\n+]" in text


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_sft_labels_are_the_real_mask(tokenizer: Any, mode: Any) -> None:
    from preftune.data.sft import Example, SftWorker

    rows = [{"prompt": "the cat", "completion": " sat on a mat"}]
    for max_length in (None, 5, 3):
        options = DataOptions(max_length=max_length, truncation_mode=mode)
        worker = SftWorker(tokenizer, options, "prompt_completion", "train")
        (example,) = worker.examples(rows)
        assert isinstance(example, Example)
        labels = worker.labels(example)
        (row,) = prepare_sft(Dataset.from_list(rows), tokenizer, options)[0]
        assert [token for token, label in labels if label != "dropped"] == row["input_ids"]
        mask = [int(label == "trained on") for _, label in labels if label != "dropped"]
        assert mask == [0, *row["loss_mask"][1:]]


LABELLED = [
    {"prompt": "the cat", "completion": " sat on a mat", "label": True},
    {"prompt": "the cat", "completion": " was bright", "label": False},
    {"prompt": "bark " * 30, "completion": "x", "label": True},
    {"prompt": "", "completion": "no no", "label": False},
    {"prompt": "dogs ", "completion": "bark", "label": True},
]


def check_against_prepared(viewer: Viewer, prepared: Any, name_of: Any) -> None:
    """The tokens and labels of rows that are kept are those of the prepared data set, in its order."""
    shown = [viewer.row(index) for index in range(len(viewer))]
    kept = [row for row in shown if row.dropped is None and row.problem is None]
    assert 0 < len(kept) == len(prepared)
    for row, one in zip(kept, prepared, strict=True):
        for name, (prompt, answer) in name_of(one).items():
            tokens = [(token, label) for token, label in row.sequences[name] if label != "dropped"]
            assert [token for token, _ in tokens] == prompt + answer
            first = 0 if prompt else 1
            assert [token for token, label in tokens if label == name] == answer[first:]
            assert {label for _, label in tokens} <= {"prompt", name}


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize(("max_length", "max_prompt"), [(None, None), (20, None), (None, 3), (24, 4)])
@pytest.mark.parametrize("source", [LABELLED, PLAIN, CHAT])
def test_labels_of_answers_are_the_real_mask(
    tokenizer: Any, mode: Any, max_length: int | None, max_prompt: int | None, source: Any
) -> None:
    options = DataOptions(max_length=max_length, max_prompt_length=max_prompt, truncation_mode=mode)
    prepared, _ = prepare_unpaired(Dataset.from_list(source), tokenizer, options)
    viewer = Viewer(Dataset.from_list(source), tokenizer, options, "labelled")
    assert len(viewer) == len(source) * (1 if source is LABELLED else 2)
    names = {1.0: "desirable", 0.0: "undesirable"}
    check_against_prepared(viewer, prepared, lambda one: {names[one["label"]]: (one["prompt_ids"], one["chosen_ids"])})


@pytest.mark.parametrize("max_length", [None, 9])
def test_enclosed_pairs_are_shown_as_they_are_prepared(max_length: int | None) -> None:
    tokenizer = make_tokenizer()
    options = DataOptions(max_length=max_length, enclose=True)
    prepared, _ = prepare(Dataset.from_list(PLAIN), tokenizer, options)
    viewer = Viewer(Dataset.from_list(PLAIN), tokenizer, options)

    def sides(one: dict[str, Any]) -> dict[str, Any]:
        other = one["prompt_ids"] if one["rejected_prompt_ids"] is None else one["rejected_prompt_ids"]
        return {"chosen": (one["prompt_ids"], one["chosen_ids"]), "rejected": (other, one["rejected_ids"])}

    check_against_prepared(viewer, prepared, sides)
    assert viewer.row(0).sequences["chosen"][0] == (tokenizer.bos_token_id, "prompt")


def test_an_end_of_sequence_that_is_appended_is_shown(tokenizer: Any) -> None:
    rows = [{"messages": [*CHAT[0]["prompt"], *CHAT[0]["chosen"]]}]
    options = DataOptions(append_eos=True)
    shown = Viewer(Dataset.from_list(rows), tokenizer, options, "sft").row(0).sequences["trained on"]
    (row,) = prepare_sft(Dataset.from_list(rows), tokenizer, options)[0]
    assert [token for token, _ in shown] == row["input_ids"]
    assert shown[-1] == (tokenizer.eos_token_id, "trained on")


def test_answers_in_the_terminal(tokenizer: Any) -> None:
    text = printed(LABELLED, tokenizer, DataOptions(max_length=10), kind="labelled")
    assert "the cat[+ sat on a mat</s>+]" in text
    assert "the cat[- was bright</s>-]" in text
    assert "the whole row is dropped: prompt fills max length" in text
    assert "desirable: " in text


def test_control_characters_do_not_reach_the_terminal(tokenizer: Any) -> None:
    text = printed([{**PLAIN[0], "chosen": " sat\x1b[2J [bold]x"}], tokenizer, DataOptions())
    assert "\x1b" not in text
    assert "\\x1b[2J [bold]x" in text


def test_rows_are_chosen(tokenizer: Any) -> None:
    text = printed(PLAIN, tokenizer, DataOptions(), start=2, num_rows=2)
    assert "train row 2" in text
    assert "train row 3" in text
    assert "train row 4" not in text
    with pytest.raises(DataError, match="no such row; got 7; allowed: 0 to 6"):
        printed(PLAIN, tokenizer, DataOptions(), start=7)
