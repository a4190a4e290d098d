"""Every kind of PEFT adapter that keeps the sequence as it is trains as in TRL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trl
from datasets import Dataset

import preftune
from preftune import ModelError
from tests.parity import worlds

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA: dict[str, Any] = {"r": 4, "target_modules": EVERYWHERE, **TASK}
KINDS: dict[str, Callable[[], Any]] = {
    "rank-stabilised": lambda: peft.LoraConfig(use_rslora=True, **LORA),
    "DoRA": lambda: peft.LoraConfig(use_dora=True, **LORA),
    "LoRA with bias": lambda: peft.LoraConfig(lora_bias=True, **LORA),
    "LoRA and head": lambda: peft.LoraConfig(**{**LORA, "target_modules": ["q_proj"]}, modules_to_save=["lm_head"]),
    "LoRA, embeddings and head": lambda: peft.LoraConfig(
        **{**LORA, "target_modules": ["q_proj"]}, modules_to_save=["embed_tokens", "lm_head"]
    ),
    "LoRA and tokens": lambda: peft.LoraConfig(
        **{**LORA, "target_modules": ["q_proj"]}, trainable_token_indices={"embed_tokens": list(range(3, 40))}
    ),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK
    ),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"], **TASK),
    "OFT": lambda: peft.OFTConfig(oft_block_size=8, target_modules=EVERYWHERE, **TASK),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=EVERYWHERE, **TASK),
    "LoKr": lambda: peft.LoKrConfig(r=4, target_modules=EVERYWHERE, **TASK),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=EVERYWHERE, **TASK),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"], **TASK),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


def make(library: Any, world: Any, out: Path, adapter: Any) -> Any:
    rows = Dataset.from_list(worlds.pair_rows(16))
    options = {**worlds.DEFAULTS, "max_steps": 3, "optim": "sgd", "learning_rate": 0.2}
    torch.manual_seed(0)
    return library.DPOTrainer(
        model=world.path,
        args=library.DPOConfig(output_dir=str(out / library.__name__), **options),
        train_dataset=rows,
        eval_dataset=rows.select(range(5)),
        processing_class=world.tokenizer,
        peft_config=adapter,
    )


@pytest.mark.thin(3)
@pytest.mark.parametrize("kind", list(KINDS))
def test_steps_and_evaluation_are_trls(world: Any, tmp_path: Path, kind: str) -> None:
    found = []
    for library in (trl, preftune):
        trainer = make(library, world, tmp_path, KINDS[kind]())
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        found.append([line[name] for line in lines for name in ("loss", "grad_norm")])
        found[-1].append(trainer.evaluate()["eval_loss"])
    assert trainer.verdict.ok, trainer.verdict.reason
    assert len(found[0]) == 7
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_reference_is_the_policy_as_it_begins(world: Any, tmp_path: Path, init: Any) -> None:
    trainer = make(preftune, world, tmp_path, peft.LoraConfig(init_lora_weights=init, **LORA))
    trainer.train()
    # Whatever the adapter does to the base at the start: log-ratios begin at zero.
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931472, rel=1e-5)


@pytest.mark.parametrize(
    "adapter",
    [peft.PromptTuningConfig(num_virtual_tokens=4, **TASK), peft.PrefixTuningConfig(num_virtual_tokens=4, **TASK)],
    ids=["prompt", "prefix"],
)
def test_prompt_learning_is_refused(world: Any, tmp_path: Path, adapter: Any) -> None:
    with pytest.raises(ModelError, match=r"peft_config: prompt learning.*LoRA"):
        make(preftune, world, tmp_path, adapter)
