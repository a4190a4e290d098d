"""The order that examples are visited in: transformers' samplers, on prepared data."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import preftune
from preftune import ConfigError
from tests.parity import worlds

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

STRATEGIES = ["group_by_length", "batch_rebalance", "sequential", "random"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


def sft(library: Any, world: Any, out: Path, **options: Any) -> Any:
    rows = Dataset.from_list([{"text": row["prompt"] + row["chosen"]} for row in worlds.pair_rows(24)])
    args = library.SFTConfig(output_dir=str(out), **{**worlds.DEFAULTS, "max_steps": 8, **options})
    return library.SFTTrainer(model=world.path, args=args, train_dataset=rows, processing_class=world.tokenizer)


def dpo(world: Any, out: Path, **options: Any) -> preftune.DPOTrainer:
    args = preftune.DPOConfig(output_dir=str(out), **{**worlds.DEFAULTS, "max_steps": 4, **options})
    rows = Dataset.from_list(worlds.pair_rows(24))
    return preftune.DPOTrainer(model=world.path, args=args, train_dataset=rows, processing_class=world.tokenizer)


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.thin(2)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_visits_in_trls_order(world: Any, tmp_path: Path, strategy: str) -> None:
    trl = importlib.import_module("trl")
    found = []
    for library in (trl, preftune):
        trainer = sft(library, world, tmp_path / library.__name__, train_sampling_strategy=strategy)
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert len({round(x, 5) for x in found[0]}) == 8  # another order would show


@pytest.mark.thin(1)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_goes_on_in_the_same_order(world: Any, tmp_path: Path, strategy: str) -> None:
    options = {"train_sampling_strategy": strategy, "save_strategy": "steps", "save_steps": 2, "max_steps": 8}
    whole = dpo(world, tmp_path / "whole", **options)
    whole.train()
    for step in (2, 6):  # within the first epoch, and at the end of it
        again = dpo(world, tmp_path / f"again{step}", **options)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert losses(again) == losses(whole)


def test_pairs_are_grouped_by_the_tokens_of_prompt_and_both_answers(world: Any, tmp_path: Path) -> None:
    trainer = dpo(world, tmp_path, train_sampling_strategy="group_by_length")
    expected = [
        len(world.tokenizer(row["prompt"] + row["chosen"])["input_ids"])
        + len(world.tokenizer(row["rejected"])["input_ids"])
        + 2  # both answers end with the end-of-sequence token
        for row in worlds.pair_rows(24)
    ]
    assert list(trainer._get_train_sampler().lengths) == expected


def test_an_order_that_cannot_be_foreseen_has_every_reference(world: Any, tmp_path: Path) -> None:
    options = {"accelerator_config": {"use_seedable_sampler": False}, "max_steps": 2}
    trainer = dpo(world, tmp_path, **options)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931472, rel=1e-6)


def test_dispatched_batches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"accelerator_config: .*dispatch_batches"):
        preftune.DPOConfig(output_dir=str(tmp_path), accelerator_config={"dispatch_batches": True})
