"""Turns that the model does not write are scored by neither policy nor reference; every sum against one by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from preftune import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, ORPOConfig, ORPOTrainer
from preftune.data import DataWarning
from tests.data.conftest import make_tokenizer
from tests.data.test_environment import ROWS


def tiny(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            pad_token_id=0,
        )
    )


def settings(cls: Any, folder: Path, **more: Any) -> Any:
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "environment_turns": "masked",
    }
    return cls(**{**common, **more})


def rows_of(trainer: Any) -> list[dict[str, Any]]:
    return list(trainer.train_dataset)


def by_hand(model: Any, row: dict[str, Any], side: str) -> float:
    """Log-prob of a completion's own tokens, in fp64 and without any packing."""
    ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
    mask = row.get(f"{side}_mask") or [1] * len(row[f"{side}_ids"])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return float((logps[len(row["prompt_ids"]) - 1 :] * torch.tensor(mask)).sum())


@pytest.mark.thin(1)
@pytest.mark.parametrize("mode", ["packed", "padded"])
@pytest.mark.parametrize("store", [True, False])
def test_dpo_scores_the_models_own_words(mode: str, store: bool, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    model = tiny(tokenizer)
    args = settings(DPOConfig, tmp_path, packing_mode=mode, reference_store=store, learning_rate=0.0)
    trainer = DPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
    rows = rows_of(trainer)
    expected = {side: sum(by_hand(model, row, side) for row in rows) / 2 for side in ("chosen", "rejected")}
    trainer.train()
    line = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for side, value in expected.items():
        assert line[f"logps/{side}"] == pytest.approx(value, rel=1e-5)


def test_without_the_switch_all_turns_are_scored_and_one_warning_says_so(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    model = tiny(tokenizer)
    args = settings(DPOConfig, tmp_path, environment_turns="scored", learning_rate=0.0)
    with pytest.warns(DataWarning) as said:
        trainer = DPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
    assert sum("they are scored as its own words" in str(one.message) for one in said) == 1
    rows = rows_of(trainer)
    assert all("chosen_mask" not in row for row in rows)
    trainer.train()
    line = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert line["logps/chosen"] == pytest.approx(sum(by_hand(model, row, "chosen") for row in rows) / 2, rel=1e-5)


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    ("loss", "divides"),
    [("ipo", True), ("sigmoid_norm", True), ("sigmoid", False)],
    ids=["ipo", "sigmoid_norm", "sigmoid"],
)
def test_lengths_count_scored_tokens_alone(loss: str, divides: bool, tmp_path: Path) -> None:
    """Another policy than the reference: a loss that divides by lengths divides by those that are scored."""
    tokenizer = make_tokenizer()
    reference, model = tiny(tokenizer), tiny(tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    args = settings(DPOConfig, tmp_path, loss_type=[loss], beta=0.3, learning_rate=0.0, first_step_check=False)
    trainer = DPOTrainer(
        model=model, ref_model=reference, args=args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer
    )
    losses = []
    for row in rows_of(trainer):
        ratio = {}
        for side in ("chosen", "rejected"):
            number = sum(row.get(f"{side}_mask") or [1] * len(row[f"{side}_ids"])) if divides else 1
            ratio[side] = (by_hand(model, row, side) - by_hand(reference, row, side)) / number
        gap = ratio["chosen"] - ratio["rejected"]
        losses.append((gap - 1 / (2 * 0.3)) ** 2 if loss == "ipo" else math.log1p(math.exp(-0.3 * gap)))
    trainer.train()
    line = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert line["loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)


@pytest.mark.parametrize(("config", "trainer_class"), [(KTOConfig, KTOTrainer), (ORPOConfig, ORPOTrainer)])
def test_the_other_trainers_take_the_switch(config: Any, trainer_class: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    model = tiny(tokenizer)
    # Each pair is two examples of KTO.
    args = settings(config, tmp_path, learning_rate=0.0, per_device_train_batch_size=4)
    trainer = trainer_class(model=model, args=args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
    assert "chosen_mask" in trainer.train_dataset.column_names
    trainer.train()
    line = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert math.isfinite(line["loss"])
    if config is KTOConfig:
        rows = [row for row in rows_of(trainer) if row["label"] > 0]
        expected = sum(by_hand(model, row, "chosen") for row in rows) / len(rows)
        assert line["logps/chosen"] == pytest.approx(expected, rel=1e-5)
