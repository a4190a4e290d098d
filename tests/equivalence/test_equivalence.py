"""Equivalence classes: what must not change the result, and by how much it does."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from preftune import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from tests.equivalence.conftest import World

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TOLERANCE = 1e-5
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 0.05,
    # Plain gradient steps: an adaptive optimizer would hide a gradient that is wrong by a factor.
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}


def load(world: World) -> Any:
    # In fp64: an fp32 weight cannot even hold 1e-5 of the update it receives.
    return AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float64)


def train(world: World, out: Path, lora: bool = False, **options: Any) -> Any:
    trainer = DPOTrainer(
        model=load(world),
        args=DPOConfig(output_dir=str(out), **{**COMMON, **options}),
        train_dataset=datasets.Dataset.from_list(world.rows),
        processing_class=world.tokenizer,
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )
    trainer.train()
    return trainer


def updates(trainer: Any, world: World) -> dict[str, torch.Tensor]:
    """How far every trained parameter moved from where it started."""
    start = dict(load(world).named_parameters())
    return {
        n: p.detach() - start[n].detach() for n, p in trainer.model.named_parameters() if p.requires_grad and n in start
    }


def assert_same_updates(one: Any, other: Any, world: World) -> None:
    mine, others = updates(one, world), updates(other, world)
    assert mine
    for name, update in mine.items():
        assert float((update - others[name]).norm()) <= TOLERANCE * float(others[name].norm()), name


@pytest.fixture(scope="module")
def baseline(world: World, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(world, tmp_path_factory.mktemp("baseline"), packing_mode="padded")


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    "options",
    [
        {"packing_mode": "packed"},
        {"packing_mode": "packed", "max_tokens_per_row": 1},
        {"packing_mode": "packed", "max_tokens_per_row": 97},
        {"packing_mode": "packed", "max_tokens_per_row": 100_000},
        {"packing_mode": "packed", "attention_backend": "reference"},
        {"packing_mode": "packed", "attention_backend": "sdpa"},
        {"packing_mode": "padded", "max_tokens_per_row": 60},
        {"gradient_checkpointing": True, "checkpoint_policy": "always"},
        {"gradient_checkpointing": False},
        {"activation_offloading": True},
        {"reference_store": False},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_tokens_per_row": 120},
    ],
    ids=lambda options: ", ".join(f"{k}={v}" for k, v in options.items()),
)
def test_every_way_to_compute_a_step_moves_the_weights_alike(
    world: World, tmp_path: Path, baseline: Any, options: dict[str, Any]
) -> None:
    trainer = train(world, tmp_path, **options)
    assert_same_updates(trainer, baseline, world)
    for a, b in zip(trainer.state.log_history, baseline.state.log_history, strict=True):
        for name in {"loss", "rewards/margins", "logps/chosen", "logps/rejected", "entropy"} & set(a):
            assert math.isclose(a[name], b[name], rel_tol=TOLERANCE, abs_tol=2e-6), name


def test_an_unequal_last_accumulation_still_weighs_every_pair_alike(world: World, tmp_path: Path) -> None:
    """Forty pairs in steps of 24: the second step holds 16, in micro-batches of five, five, five and one."""
    split = train(world, tmp_path / "a", per_device_train_batch_size=5, gradient_accumulation_steps=5, max_steps=2)
    whole = train(world, tmp_path / "b", per_device_train_batch_size=25, max_steps=2)
    assert_same_updates(split, whole, world)


@pytest.mark.thin(1)
@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_losses_that_join_the_batch_do_not_depend_on_its_split(world: World, tmp_path: Path, loss: str) -> None:
    whole = train(world, tmp_path / "a", loss_type=[loss])
    for number, options in enumerate(
        [{"max_tokens_per_row": 90}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}]
    ):
        split = train(world, tmp_path / str(number), False, loss_type=[loss], **options)
        assert_same_updates(split, whole, world)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("store", [True, False])
def test_the_loss_starts_at_ln_2(world: World, tmp_path: Path, lora: bool, store: bool) -> None:
    trainer = train(world, tmp_path, lora=lora, reference_store=store, max_steps=1)
    line = trainer.state.log_history[0]
    assert math.isclose(line["loss"], math.log(2), abs_tol=1e-6)
    assert abs(line["rewards/margins"]) < 1e-5


def test_a_trained_adapter_is_its_own_reference(world: World, tmp_path: Path) -> None:
    """SFT with an adapter, then DPO on the same adapter: the reference is the SFT model, not the bare base."""
    sft = SFTTrainer(
        model=world.model,
        args=SFTConfig(output_dir=str(tmp_path / "sft"), **{**COMMON, "learning_rate": 1.0, "max_steps": 4}),
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": r["prompt"], "completion": r["chosen"]} for r in world.rows]
        ),
        processing_class=world.tokenizer,
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    sft.train()
    moved = [p for n, p in sft.model.named_parameters() if "lora_B" in n]
    assert any(bool(p.detach().abs().max() > 1e-4) for p in moved)
    for store in (True, False):
        trainer = DPOTrainer(
            model=sft.model,
            args=DPOConfig(output_dir=str(tmp_path / "dpo"), **{**COMMON, "max_steps": 1, "reference_store": store}),
            train_dataset=datasets.Dataset.from_list(world.rows),
            processing_class=world.tokenizer,
        )
        trainer.train()
        assert math.isclose(trainer.state.log_history[0]["loss"], math.log(2), abs_tol=1e-6)


def test_a_wrong_reference_is_noticed_at_the_first_step(world: World, tmp_path: Path) -> None:
    trainer = DPOTrainer(
        model=world.model,
        args=DPOConfig(output_dir=str(tmp_path), **COMMON),
        train_dataset=datasets.Dataset.from_list(world.rows),
        processing_class=world.tokenizer,
    )
    trainer.prepare_reference()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    with pytest.warns(UserWarning, match="policy and reference differ"):
        trainer.train()


@pytest.mark.slow
def test_two_processes_end_with_one_processs_weights(world: World, tmp_path: Path) -> None:
    """Over gloo, with rows of uneven number and length on the two processes."""
    flags = (
        f"--model_name_or_path {world.model} --dataset_name {world.file} --gradient_accumulation_steps 2 --max_steps 4 "
        "--learning_rate 1e-3 --bf16 false --use_cpu true --report_to none --save_strategy no --logging_steps 1 "
        "--max_tokens_per_row 80"
    ).split()
    launcher = [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "preftune",
    ]  # fmt: skip
    runs = {"two": [*launcher, "dpo", "--per_device_train_batch_size", "2"]}
    runs["one"] = ["preftune", "dpo", "--per_device_train_batch_size", "4"]
    logs: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for name, command in runs.items():
        out = tmp_path / name
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PREFTUNE_CACHE": str(tmp_path / f"{name}-cache")}
        done = subprocess.run(
            [sys.executable, "-m", *command, *flags, "--output_dir", str(out)],
            env=environment, capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        history = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        logs[name] = [line for line in history if "loss" in line]
        weights[name] = load_file(out / "model.safetensors")
    for name, one in weights["one"].items():
        assert float((weights["two"][name] - one).norm()) <= TOLERANCE * float(one.norm()), name
    for a, b in zip(logs["two"], logs["one"], strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=TOLERANCE)
        assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=TOLERANCE)
        assert a["num_tokens"] == b["num_tokens"]
