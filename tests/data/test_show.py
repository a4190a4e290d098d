"""What `data show` prints."""

from __future__ import annotations

import io
from typing import Any

import pytest
from datasets import Dataset
from rich.console import Console

from preftune.data import DataOptions, prepare, show
from preftune.data.show import label_pair
from preftune.data.tokenise import Encoder, TokenisedPair, tokenise_pairs
from preftune.errors import DataError
from tests.data.test_pair_parity import CHAT, PLAIN


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


def test_dropped_and_bad_rows_say_why(tokenizer: Any) -> None:
    rows = [PLAIN[6], {**PLAIN[0], "chosen": ""}]
    text = printed(rows, tokenizer, DataOptions(max_length=10))
    assert "the whole row is dropped: prompt_fills_max_length" in text
    assert "bad row: empty_completion" in text


def test_merges_are_shown(tokenizer: Any) -> None:
    assert "the prompt alone ends with ' '" in printed([PLAIN[4]], tokenizer, DataOptions())


def test_sft_examples(tokenizer: Any) -> None:
    rows = [{"messages": [*CHAT[0]["prompt"], *CHAT[0]["chosen"]]}]
    text = printed(rows, tokenizer, DataOptions(), sft=True, assistant_only_loss=True)
    assert "<|im_start|>assistant\n[+sat on a mat<|im_end|>\n+]" in text


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_sft_labels_are_the_real_mask(tokenizer: Any, mode: Any) -> None:
    from preftune.data import prepare_sft
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
