"""Steps on trained weights, by TRL and by preftune, in fp32: logs and weights."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.real.conftest import pair_rows

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

BATCH = 2
TOLERANCE = 5e-4
#: Rewards are beta times differences of sums of hundreds of nats, which TRL takes in fp32.
REWARD_FLOOR = 2e-5


def train(
    library: str, folder: str, out: Path, lora: bool, steps: int, *, dtype: torch.dtype = torch.float32, **more: Any
) -> tuple[Any, list[dict[str, float]]]:
    torch.manual_seed(0)
    module = importlib.import_module(library)
    args = module.DPOConfig(
        output_dir=str(out), per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=1e-4 if lora else 1e-6,
        use_cpu=True, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        **({"bf16": False} | more),
    )  # fmt: skip
    config = peft.LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules="all-linear") if lora else None
    trainer = module.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
        args=args,
        train_dataset=Dataset.from_list(pair_rows(steps * BATCH)),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=config,
    )
    trainer.train()
    return trainer.model, [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    ("lora", "more"), [(False, {}), (True, {"reference_store": False})], ids=["full", "lora, live"]
)
def test_twenty_steps_are_trls(smollm2: str, tmp_path: Path, lora: bool, more: dict[str, Any]) -> None:
    steps = 20
    theirs, expected = train("trl", smollm2, tmp_path / "trl", lora, steps)
    ours, got = train("preftune", smollm2, tmp_path / "preftune", lora, steps, packing_mode="packed", **more)
    assert len(got) == len(expected) == steps
    for mine, its in zip(got, expected, strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
            assert mine[name] == pytest.approx(its[name], rel=TOLERANCE), name
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert mine[name] == pytest.approx(its[name], rel=TOLERANCE, abs=REWARD_FLOOR), name
    assert got[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert got[0]["rewards/margins"] == 0.0
    assert abs(got[-1]["rewards/margins"]) > 100 * REWARD_FLOOR  # it moved: equality means something
    reference = {name: parameter.detach() for name, parameter in theirs.named_parameters()}
    differences = {
        name: float((parameter.detach() - reference[name]).norm() / reference[name].norm())
        for name, parameter in ours.named_parameters()
        if parameter.requires_grad
    }
    worst = max(differences, key=lambda name: differences[name])
    assert differences[worst] <= TOLERANCE, worst


def test_half_precision_starts_at_ln_2_or_says_why(smollm2: str, tmp_path: Path) -> None:
    """What a sequence is padded to depends on those beside it, and the pass of the reference has others."""
    for precision in ({"bf16": True}, {"dtype": torch.bfloat16}):
        _, lines = train("preftune", smollm2, tmp_path / "packed", False, 1, **precision, packing_mode="packed")
        assert lines[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
        assert lines[0]["rewards/margins"] == 0.0
        with pytest.warns(UserWarning, match="before the first update, which is rounding"):
            _, lines = train("preftune", smollm2, tmp_path / "padded", False, 1, **precision, packing_mode="padded")
        assert 0 < abs(lines[0]["rewards/margins"]) < 0.05


def test_compiled_layers_train_the_same(smollm2: str, tmp_path: Path) -> None:
    """Of trained weights: packed all the same, from ln 2 on, to what fusing rounds otherwise."""
    plain, expected = train("preftune", smollm2, tmp_path / "plain", False, 3, packing_mode="packed")
    ours, got = train("preftune", smollm2, tmp_path / "compiled", False, 3, packing_mode="packed", torch_compile=True)
    assert got[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    for mine, its in zip(got, expected, strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
            assert mine[name] == pytest.approx(its[name], rel=TOLERANCE), name
    reference = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        assert float((parameter - reference[name]).norm()) <= TOLERANCE * float(reference[name].norm()), name
