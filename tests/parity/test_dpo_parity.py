"""The drop-in promise: in fp32, with the same seed, the trainer's numbers are TRL's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.parity.conftest import Setting

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

TOLERANCE = 1e-4


def train(library: str, setting: Setting, out: Path, **options: Any) -> Any:
    """Train with TRL's or our trainer, everything but the import being the same."""
    if library == "trl":
        from trl import DPOConfig, DPOTrainer
    else:
        from preftune import DPOConfig, DPOTrainer
    lora = options.pop("lora", False)
    defaults: dict[str, Any] = {
        "output_dir": str(out / library),
        "per_device_train_batch_size": 2,
        "max_steps": 20,
        "logging_steps": 1,
        "learning_rate": 1e-4,
        "max_length": 512,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 7,
    }
    trainer = DPOTrainer(
        model=setting.path,
        args=DPOConfig(**{**defaults, **options}),
        train_dataset=setting.dataset,
        processing_class=setting.tokenizer,
        peft_config=peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear") if lora else None,
    )
    trainer.train()
    return trainer


def log_lines(trainer: Any) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def assert_same_logs(ours: Any, theirs: Any, beta: float = 0.1) -> None:
    """Loss, rewards, log-probs and gradient norm of every step.

    A reward is ``beta`` times a difference of two sums of log-probs, which TRL adds up in fp32: near zero its own
    rounding, ``beta * eps * |sum|``, is larger than any relative tolerance on the difference, so that its scale
    is the sums'.
    """
    mine, others = log_lines(ours), log_lines(theirs)
    assert len(mine) == len(others) > 0
    for a, b in zip(mine, others, strict=True):
        scale = beta * (abs(b["logps/chosen"]) + abs(b["logps/rejected"]))
        for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
            assert math.isclose(a[name], b[name], rel_tol=TOLERANCE), (a["step"], name, a[name], b[name])
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            close = math.isclose(a[name], b[name], rel_tol=TOLERANCE, abs_tol=2e-6 * scale)
            assert close, (a["step"], name, a[name], b[name])
        assert a["num_tokens"] == b["num_tokens"]


def assert_same_weights(ours: Any, theirs: Any) -> None:
    """Trained weights, measured against the size of what they are part of."""
    mine, others = dict(ours.model.named_parameters()), dict(theirs.model.named_parameters())
    assert {n for n, p in mine.items() if p.requires_grad} == {n for n, p in others.items() if p.requires_grad}
    for name, parameter in mine.items():
        difference = float((parameter - others[name]).norm())
        assert difference <= TOLERANCE * max(float(others[name].norm()), 1e-3), (name, difference)


# Any two of the three choices meet.
@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("data", "lora", "accumulation"),
    [("hh", False, 1), ("hh", True, 4), ("dpo_en", False, 4), ("dpo_en", True, 1)],
)
def test_twenty_steps_agree(
    settings: dict[str, Setting], tmp_path: Path, data: str, lora: bool, accumulation: int
) -> None:
    """TRL with its reference beside it, ours with the reference beside it and from the store."""
    options = {
        "lora": lora,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 2 if accumulation > 1 else 4,
    }
    theirs = train("trl", settings[data], tmp_path, **options)
    for stored in (False, True):
        place = tmp_path / f"stored-{stored}"
        more = {"precompute_ref_log_probs": stored, "reference_store": stored}
        ours = train("preftune", settings[data], place, **options, **more)
        assert_same_logs(ours, theirs)
        assert_same_weights(ours, theirs)


@pytest.mark.slow
def test_a_reference_that_trl_computes_beforehand(settings: dict[str, Setting], tmp_path: Path) -> None:
    options = {"precompute_ref_log_probs": True, "per_device_train_batch_size": 4}
    theirs, ours = (train(library, settings["hh"], tmp_path, **options) for library in ("trl", "preftune"))
    assert_same_logs(ours, theirs)
    assert_same_weights(ours, theirs)


def test_store_and_live_reference_agree(settings: dict[str, Setting], tmp_path: Path) -> None:
    live = train("preftune", settings["hh"], tmp_path, reference_store=False, max_steps=8)
    stored = train("preftune", settings["hh"], tmp_path, reference_store=True, max_steps=8)
    assert_same_logs(stored, live)
    assert_same_weights(stored, live)


@pytest.mark.thin(1)
@pytest.mark.parametrize("loss", ["hinge", "ipo", "robust", "apo_zero", "aot", "sft", "sigmoid_norm"])
def test_other_losses_agree(settings: dict[str, Setting], tmp_path: Path, loss: str) -> None:
    options: dict[str, Any] = {"loss_type": [loss], "max_steps": 4, "per_device_train_batch_size": 4}
    if loss == "robust":
        options["label_smoothing"] = 0.1
    theirs = train("trl", settings["hh"], tmp_path, **options)
    ours = train("preftune", settings["hh"], tmp_path, **options)
    assert_same_logs(ours, theirs)
    assert_same_weights(ours, theirs)


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    "options",
    [
        {"ld_alpha": 0.5},
        {"use_weighting": True},
        {"f_divergence_type": "js_divergence"},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6},
        {"truncation_mode": "keep_end", "max_length": 64},
    ],
    ids=["ld", "wpo", "js", "mpo", "tr-dpo", "keep_end"],
)
def test_options_agree(settings: dict[str, Setting], tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"max_steps": 6, "per_device_train_batch_size": 4, **options}
    theirs = train("trl", settings["hh"], tmp_path, **options)
    ours = train("preftune", settings["hh"], tmp_path, **options)
    assert_same_logs(ours, theirs)
    assert_same_weights(ours, theirs)


def test_evaluation_agrees(settings: dict[str, Setting], tmp_path: Path) -> None:
    """On a whole number of batches, where TRL's mean of batch means is the mean over pairs."""
    trainers = [train(library, settings["hh"], tmp_path, max_steps=2) for library in ("trl", "preftune")]
    held_out = settings["hh"].dataset.select(range(8))
    theirs, ours = (trainer.evaluate(held_out) for trainer in trainers)
    for name in ("eval_loss", "eval_logps/chosen", "eval_logps/rejected", "eval_rewards/margins"):
        assert math.isclose(theirs[name], ours[name], rel_tol=TOLERANCE, abs_tol=2e-5), name
    assert theirs["eval_rewards/accuracies"] == ours["eval_rewards/accuracies"]
    assert torch.isfinite(torch.tensor(ours["eval_entropy"]))
