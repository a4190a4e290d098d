"""Supervised fine-tuning against TRL's trainer: every figure of every step, and the final weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.models.tiny import tiny_model
from tests.parity import worlds

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

TOLERANCE = 1e-4
FIGURES = ("loss", "grad_norm", "num_tokens")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"completion_only_loss": False},
        {"loss_type": "dft"},
        {"gradient_accumulation_steps": 3, "max_steps": 4},
        {"loss_type": "dft", "gradient_accumulation_steps": 3, "max_steps": 4},
        {"max_length": 12},
        {"max_length": 12, "truncation_mode": "keep_end"},
        {"train_sampling_strategy": "group_by_length"},
        {"shuffle_dataset": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "defaults",
)
def test_steps_are_trls(world: worlds.World, tmp_path: Path, options: dict[str, Any]) -> None:
    import trl

    import preftune

    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in worlds.pair_rows(22)]
    both: list[tuple[Any, Any]] = [(preftune.SFTTrainer, preftune.SFTConfig), (trl.SFTTrainer, trl.SFTConfig)]
    ours, theirs = (
        worlds.train(trainer, config, tmp_path, world.path, world.tokenizer, Dataset.from_list(rows), **options)
        for trainer, config in both
    )
    worlds.assert_same_logs(ours, theirs, FIGURES, TOLERANCE)
    worlds.assert_same_weights(ours, theirs, TOLERANCE)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_class_of_another_name_counts_first_tokens(world: worlds.World, tmp_path: Path, accumulation: int) -> None:
    """``GPT2LMHeadModel``: transformers does not know that its loss shifts the labels."""
    import trl

    import preftune

    path = str(tmp_path / "model")
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    tiny_model("GPT2Config", len(world.tokenizer), **dropouts).save_pretrained(path)
    data = Dataset.from_list([{"text": row["prompt"] + row["chosen"]} for row in worlds.pair_rows(22)])
    options = {"gradient_accumulation_steps": accumulation, "max_steps": 4}
    both: list[tuple[Any, Any]] = [(preftune.SFTTrainer, preftune.SFTConfig), (trl.SFTTrainer, trl.SFTConfig)]
    ours, theirs = (
        worlds.train(trainer, config, tmp_path, path, world.tokenizer, data, **options) for trainer, config in both
    )
    worlds.assert_same_logs(ours, theirs, FIGURES, TOLERANCE)


def test_the_text_of_a_formatting_function_is_trained_on(world: worlds.World, tmp_path: Path) -> None:
    """As TRL trains on the same text in a column; other columns, which TRL would read instead, are left out."""
    import trl

    import preftune

    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in worlds.pair_rows(16)]

    def written(row: dict[str, str]) -> str:
        return f"the film {row['prompt']} plot {row['completion']}"

    args = preftune.SFTConfig(output_dir=str(tmp_path), **worlds.DEFAULTS)
    ours = preftune.SFTTrainer(
        world.path, args, None, Dataset.from_list(rows), processing_class=world.tokenizer, formatting_func=written
    )
    ours.train()
    texts = Dataset.from_list([{"text": written(row)} for row in rows])
    theirs = worlds.train(trl.SFTTrainer, trl.SFTConfig, tmp_path, world.path, world.tokenizer, texts)
    worlds.assert_same_logs(ours, theirs, FIGURES, TOLERANCE)
