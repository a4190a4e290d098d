"""Settings of the DPO trainer reach the objective, or are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from preftune import ConfigError, DPOConfig, DPOTrainer, SFTConfig
from preftune.objectives import METHODS
from tests.equivalence.conftest import make_rows
from tests.models.tiny import tiny_model, train_tokenizer

CHANGED: dict[str, tuple[str, Any]] = {
    "label_smoothing": ("sigmoid", 0.2),
    "discopop_tau": ("discopop", 0.5),
    "ipo_normalize": ("ipo", False),
    "dpop_lambda": ("dpop", 5.0),
    "odpo_alpha": ("odpo", 0.5),
    "odpo_transform": ("odpo", "identity"),
    "sft_average": ("sft", "pair_tokens"),
}


@pytest.mark.parametrize(("name", "case"), CHANGED.items(), ids=list(CHANGED))
def test_a_knob_reaches_the_method_that_has_it(tmp_path: Path, name: str, case: tuple[str, Any]) -> None:
    loss, value = case
    options: dict[str, Any] = {name: value}
    config = DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, loss_type=[loss], **options)
    assert config.build_objective().knobs[loss][name] == value


@pytest.mark.parametrize("name", sorted(set(CHANGED) - {"label_smoothing"}))
def test_a_knob_is_refused_where_no_method_has_it(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {name: CHANGED[name][1]}
    with pytest.raises(ConfigError, match=name):
        DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, loss_type=["hinge"], **options)


def test_the_changed_values_are_not_the_defaults() -> None:
    for name, (loss, value) in CHANGED.items():
        assert METHODS[loss].knobs[name].default != value


@pytest.mark.parametrize("loss", ["dpop", "odpo"])
def test_methods_beyond_trl_train(tmp_path: Path, loss: str) -> None:
    rows: list[dict[str, Any]] = [{**row, "margin": 1.0 + n % 3} for n, row in enumerate(make_rows(8))]
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in rows], 300)
    trainer = DPOTrainer(
        model=tiny_model("LlamaConfig", len(tokenizer)),
        args=DPOConfig(
            output_dir=str(tmp_path), bf16=False, use_cpu=True, loss_type=[loss], max_steps=2, logging_steps=1,
            per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 2
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"precompute_ref_log_probs": True, "reference_store": False}, "precompute_ref_log_probs"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **options)


def test_what_has_no_effect_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="precompute_ref_batch_size has no effect"):
        DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, precompute_ref_batch_size=4)
    with pytest.warns(UserWarning, match="eval_packing has no effect"):
        SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, eval_packing=False)
