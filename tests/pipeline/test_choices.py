"""What is chosen where nobody has: how much is held out, which verb, and whose value wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from preftune.config import split_command_line
from preftune.errors import ConfigError
from preftune.pipeline.choices import Asked, Choice, Rows, held_out_size, look_at, own_choices, settle, verb_for


@pytest.mark.parametrize(
    ("rows", "held"),
    [(2, 1), (10, 2), (60, 12), (100, 20), (250, 50), (499, 50), (500, 50), (1_700, 170), (5_000, 500), (10**6, 500)],
)
def test_a_tenth_is_held_out_within_limits(rows: int, held: int) -> None:
    """By hand: a tenth; at least 50, but no more than a fifth; at most 500."""
    assert held_out_size(rows) == held


@pytest.mark.parametrize(
    ("line", "kind", "verb"),
    [
        ([], "preference", "dpo"),
        ([], "ranked", "dpo"),
        ([], "unpaired", "kto"),
        ([], "sft", "sft"),
        (["--loss_type", "orpo"], "preference", "orpo"),
        (["--loss_type", "simpo"], "preference", "cpo"),
        (["--loss_type", "kto"], "preference", "kto"),
    ],
)
def test_rows_and_loss_choose_the_verb(line: list[str], kind: str, verb: str) -> None:
    assert verb_for(Asked(split_command_line(line)), Rows(kind, 10, False)) == verb


def test_a_named_verb_wins_and_has_to_train() -> None:
    rows = Rows("preference", 10, False)
    assert verb_for(Asked(split_command_line([]), verb="sft"), rows) == "sft"
    with pytest.raises(ConfigError, match="no training verb"):
        verb_for(Asked(split_command_line([]), verb="eval"), rows)


def test_given_wins_over_advised_over_chosen() -> None:
    own = [Choice("beta", 1, "own"), Choice("max_length", 1, "own"), Choice("seed", 1, "own")]
    advised = [Choice("beta", 2, "advised"), Choice("max_length", 2, "advised")]
    settled = settle("dpo", {"beta": 3}, [*own, *advised])
    assert {choice.name: choice.value for choice in settled.choices} == {"max_length": 2, "seed": 1}
    found = yaml.safe_load(settled.text())
    assert found == {"beta": 3, "max_length": 2, "seed": 1}


def test_without_an_adapter_none_of_its_settings_stay() -> None:
    choices = own_choices("dpo", Rows("preference", 100, False), accelerator=False)
    assert any(choice.name.startswith("lora_") for choice in choices)
    settled = settle("dpo", {"use_peft": False}, choices)
    assert not any(choice.name.startswith(("lora_", "use_peft")) for choice in settled.choices)


def test_data_with_a_test_split_are_not_divided_again() -> None:
    names = [choice.name for choice in own_choices("dpo", Rows("preference", 100, True), accelerator=True)]
    assert "test_split_size" not in names
    assert "bf16" in names


@pytest.mark.parametrize(("files", "has_test"), [(("train",), False), (("train", "test"), True)])
def test_a_folder_is_looked_at(tmp_path: Path, files: tuple[str, ...], has_test: bool) -> None:
    row = {"question": "a", "good": "b", "bad": "c"}
    for name in files:
        (tmp_path / f"{name}.jsonl").write_text("\n".join([json.dumps(row)] * 3), encoding="utf-8")
    columns = '{"question": "prompt", "good": "chosen", "bad": "rejected"}'
    values: dict[str, Any] = {"dataset_name": str(tmp_path), "dataset_columns": columns}
    assert look_at(values) == Rows("preference", 3, has_test)
