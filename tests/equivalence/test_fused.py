"""Adapters that are trained in one forward end where each ends alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict

from preftune import DPOConfig, DPOTrainer
from preftune.errors import PreftuneError
from preftune.training.fused import FusedTrainer
from tests.equivalence.conftest import World

CONFIGURATIONS: list[dict[str, Any]] = [
    {"beta": 0.05, "learning_rate": 1e-3},
    {"beta": 0.5, "learning_rate": 1e-2, "max_grad_norm": 0.05},
    {"loss_type": ["ipo"], "beta": 0.2, "learning_rate": 3e-3, "weight_decay": 0.1},
]


def _config(folder: Path, **settings: Any) -> DPOConfig:
    shared: dict[str, Any] = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "max_length": 128,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return DPOConfig(output_dir=str(folder), **{**shared, **settings})


def _lora(**changes: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **changes)


def _arguments(world: World) -> dict[str, Any]:
    return {
        "model": world.model,
        "processing_class": world.tokenizer,
        "train_dataset": Dataset.from_list(world.rows),
        "eval_dataset": Dataset.from_list(world.rows[:7]),
    }


def _alone(world: World, folder: Path, settings: dict[str, Any], **shared: Any) -> tuple[Any, dict[str, float]]:
    trainer = DPOTrainer(args=_config(folder, **shared, **settings), peft_config=_lora(), **_arguments(world))
    trainer.train()
    return trainer, trainer.evaluate()


@pytest.mark.thin(1)
@pytest.mark.parametrize("shared", [{}, {"max_tokens_per_row": 64}, {"gradient_checkpointing": True}])
def test_each_configuration_ends_where_it_ends_alone(world: World, tmp_path: Path, shared: dict[str, Any]) -> None:
    fused = FusedTrainer(
        configurations=CONFIGURATIONS,
        args=_config(tmp_path / "fused", **shared),
        peft_config=_lora(),
        **_arguments(world),
    )
    initial = [fused.adapter_state(0), fused.adapter_state(2)]
    assert all(torch.equal(value, initial[1][name]) for name, value in initial[0].items())
    fused.train()
    measured = fused.evaluate()
    history = [line for line in fused.state.log_history if "0/loss" in line]
    for number, settings in enumerate(CONFIGURATIONS):
        alone, expected = _alone(world, tmp_path / str(number), settings, **shared)
        weights = get_peft_model_state_dict(alone.model)
        for name, value in fused.adapter_state(number).items():
            difference = float((value - weights[name]).abs().max() / weights[name].abs().max().clamp_min(1e-12))
            assert difference <= 1e-5, (number, name, difference)
        for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/rejected", "entropy", "logits/chosen"):
            assert measured[f"eval_{number}/{name}"] == pytest.approx(expected[f"eval_{name}"], rel=1e-5, abs=1e-6)
        lines = [line for line in alone.state.log_history if "loss" in line]
        for line, reference in zip(history, lines, strict=True):
            assert line[f"{number}/loss"] == pytest.approx(reference["loss"], rel=1e-5)
            assert line[f"{number}/grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)


def test_a_configuration_that_is_lost_does_not_harm_the_others(world: World, tmp_path: Path) -> None:
    wild = {"beta": 0.1, "learning_rate": 1e30}
    fused = FusedTrainer(
        configurations=[CONFIGURATIONS[0], wild],
        args=_config(tmp_path / "fused"),
        peft_config=_lora(),
        **_arguments(world),
    )
    fused.train()
    alone, _ = _alone(world, tmp_path / "alone", CONFIGURATIONS[0])
    assert fused.lost == {1}
    assert fused.state.global_step == alone.state.global_step
    assert fused.mean_losses()[0] == pytest.approx(_train_loss(alone), rel=1e-5)
    weights = get_peft_model_state_dict(alone.model)
    for name, value in fused.adapter_state(0).items():
        assert float((value - weights[name]).abs().max()) <= 1e-5 * float(weights[name].abs().max().clamp_min(1e-12))


def _train_loss(trainer: Any) -> float:
    return float(next(line["train_loss"] for line in trainer.state.log_history if "train_loss" in line))


def test_the_active_adapter_can_be_chosen(world: World, tmp_path: Path) -> None:
    fused = FusedTrainer(
        configurations=CONFIGURATIONS[:2], args=_config(tmp_path), peft_config=_lora(), **_arguments(world)
    )
    fused.train()
    ids = torch.tensor([world.tokenizer("the cat")["input_ids"]])
    outputs = []
    for number in range(2):
        fused.use(number)
        fused.model.eval()
        with torch.no_grad():
            outputs.append(fused.model(input_ids=ids).logits)
    assert not torch.allclose(outputs[0], outputs[1])
    assert all(p.requires_grad for name, p in fused.model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize(
    ("changes", "configurations", "lora", "names"),
    [
        ({}, [{"seed": 1}], {}, "seed"),
        ({}, [{"loss_type": ["aot"]}], {}, "aot"),
        ({"disable_dropout": False}, [{}], {"lora_dropout": 0.1}, "dropout"),
        ({}, [{}], {"use_dora": True}, "DoRA"),
        ({"optim": "adafactor"}, [{}], {}, "optim"),
        ({"sync_ref_model": True}, [{}], {}, "sync_ref_model"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    world: World, tmp_path: Path, changes: Any, configurations: Any, lora: Any, names: str
) -> None:
    with pytest.raises(PreftuneError, match=names):
        FusedTrainer(
            configurations=configurations,
            args=_config(tmp_path, **changes),
            peft_config=_lora(**lora),
            **_arguments(world),
        )
