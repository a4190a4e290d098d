"""Settings of the DPO trainer reach the objective, or are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from preftune import ConfigError, DPOConfig, DPOTrainer, SFTConfig
from preftune.errors import SetupError
from preftune.objectives import METHODS
from tests.equivalence.conftest import make_rows
from tests.models.tiny import tiny_model, train_tokenizer


def trainer_of(rows: list[dict[str, Any]], out: Path, **options: Any) -> DPOTrainer:
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in rows], 300)
    return DPOTrainer(
        model=tiny_model("LlamaConfig", len(tokenizer)),
        args=DPOConfig(
            output_dir=str(out), bf16=False, use_cpu=True, max_steps=2, logging_steps=1, save_strategy="no",
            per_device_train_batch_size=4, report_to=[], disable_tqdm=True, **options,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip


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


@pytest.mark.thin(1)
@pytest.mark.parametrize("loss", ["dpop", "odpo"])
def test_methods_beyond_trl_train(tmp_path: Path, loss: str) -> None:
    rows: list[dict[str, Any]] = [{**row, "margin": 1.0 + n % 3} for n, row in enumerate(make_rows(8))]
    trainer = trainer_of(rows, tmp_path, loss_type=[loss], learning_rate=1e-2)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 2
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"precompute_ref_log_probs": True, "reference_store": False}, "precompute_ref_log_probs"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers.*dataloader_num_workers"),
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


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"optim": "galore_adamw"}, SetupError, "^optim: .*galore_torch"),
        ({"optim": "adalomo"}, ConfigError, "^optim: .*inside the backward pass"),
        ({"optim": "galore_adamw_layerwise"}, ConfigError, "^optim: .*backward pass.*galore_adamw, or another"),
        ({"optim": "sgd", "optim_args": "momentum"}, ConfigError, r"^optim_args: .*'momentum'.*key=value"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, ConfigError, "^lr_scheduler_type: .*num_decay_steps"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, ConfigError, "^lr_scheduler_type: .*min_lr"),
        ({"lr_scheduler_kwargs": {"bogus": 1}}, ConfigError, "^lr_scheduler_type: linear .*bogus"),
        ({"use_liger_kernel": True}, SetupError, "^use_liger_kernel: .*pip install liger-kernel"),
    ],
    ids=str,
)
def test_optimizer_and_schedule_are_looked_at_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_liger_kernel_available", lambda *_: False)
    with pytest.raises(error, match=match):
        trainer_of(make_rows(4), tmp_path, **options)


def test_options_that_optimizer_or_schedule_do_not_read_are_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="optim_args: bar=3 changes nothing in sgd") as seen:
        trainer_of(make_rows(4), tmp_path, optim="sgd", optim_args="momentum=0.9,bar=3")
    assert not [w for w in seen if "momentum" in str(w.message)]
    with pytest.warns(UserWarning, match="lr_scheduler_kwargs has no effect with constant"):
        trainer_of(make_rows(4), tmp_path, lr_scheduler_type="constant", lr_scheduler_kwargs={"min_lr": 1e-7})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"learning_rate": -1}, "^learning_rate: value too small; got -1; allowed: 0 or more"),
        ({"per_device_eval_batch_size": 0}, "^per_device_eval_batch_size: value too small"),
        ({"neftune_noise_alpha": -5.0}, "^neftune_noise_alpha: value too small"),
        ({"max_length": "abc"}, "^max_length: not a number; got 'abc'"),
        ({"dataset_num_proc": 0}, "^dataset_num_proc: value too small"),
        ({"loss_weights": 0.5}, "^loss_weights: not a list of numbers; got 0.5"),
        ({"loss_type": None}, "^loss_type: no loss is named"),
    ],
    ids=str,
)
def test_values_out_of_range_are_named(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ref_model_mixup_alpha": 0.3}, "ref_model_mixup_alpha has no effect without sync_ref_model"),
        ({"ref_model_sync_steps": 7}, "ref_model_sync_steps has no effect without sync_ref_model"),
        ({"attention_backend": "sdpa", "packing_mode": "padded"}, "attention_backend has no effect"),
    ],
    ids=str,
)
def test_settings_that_need_another_are_told(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.warns(UserWarning, match=match):
        DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **options)
