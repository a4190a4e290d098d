"""Sizes without weights against the real thing, and estimates against hand counts."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import preftune
from preftune.advice import Case, Lengths, advise
from preftune.advice.machines import MACHINES, Machine, find_machine
from preftune.advice.memory import Plan, estimate_memory, operations
from preftune.advice.shapes import config_of_size, load_config, shape_of
from preftune.errors import ConfigError, ModelError
from preftune.models.forward import RowForward
from preftune.models.head import probe_head
from preftune.training.memory import activation_bytes_per_token
from tests.models.tiny import SIZES, tiny_model
from tests.parity import worlds

ADAPTER = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
CARD = Machine("card", 80 << 30, 300e12, 20e12, "a test")


def config(name: str, **sizes: Any) -> Any:
    import transformers

    return getattr(transformers, name)(vocab_size=97, **{**SIZES, **sizes})


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        *((name, False) for name in ("LlamaConfig", "Qwen2Config", "Gemma2Config", "GPT2Config")),
        *((name, True) for name in ("LlamaConfig", "Qwen2Config", "Gemma2Config")),
    ],
)
def test_parameters_are_those_of_the_real_model(name: str, adapter: bool) -> None:
    real = tiny_model(name)
    sizes = real.config
    if adapter:
        real = get_peft_model(real, copy.deepcopy(ADAPTER))
    found = shape_of(sizes, lora=ADAPTER if adapter else None)
    assert found.num_parameters == sum(p.numel() for p in real.parameters())
    assert found.num_trainable == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert found.weight_bytes == 4 * found.num_parameters


@pytest.mark.parametrize("adapter", [False, True])
def test_traced_activations_are_near_what_the_trainer_measures(adapter: bool) -> None:
    sizes = config("LlamaConfig", hidden_size=64, intermediate_size=160, num_hidden_layers=3)
    model: Any = AutoModelForCausalLM.from_config(sizes)
    if adapter:
        model = get_peft_model(model, copy.deepcopy(ADAPTER))
    model.train()
    measured = activation_bytes_per_token(RowForward(model, True, "auto", probe_head(model), 0), nullcontext)
    lora = ADAPTER if adapter else None
    found = shape_of(sizes, lora=lora)
    assert found.exact
    # Stock attention repeats keys and values for grouped heads, which the packed kernel does not.
    assert found.activation_bytes == pytest.approx(measured, rel=0.2)
    # Matrix products keep half as much under autocast, norms as much as before.
    half = shape_of(sizes, lora=lora, half=True)
    assert 0.5 < half.activation_bytes / found.activation_bytes < 0.9


def test_a_model_of_a_given_size_has_about_that_size() -> None:
    for wanted in (5e5, 1e8, 7e9, 7e10):
        assert shape_of(config_of_size(wanted)).num_parameters == pytest.approx(wanted, rel=0.25)


def test_memory_is_the_sum_of_its_causes() -> None:
    shape = shape_of(config("LlamaConfig"))
    plan = Plan(8, 100, 1, prompt=20.0, completion=60.0, longest_row=100)
    found = estimate_memory(shape, plan, CARD)
    n = shape.num_parameters
    assert found["gradients"] == found["weights"] == 4 * n
    assert found["optimizer"] == 8 * n
    assert found["copies"] == 0
    assert found["row_tokens"] == 8 * 80
    scored = 8 * 60
    # Three tiles of fp32 logits; kept probabilities and the matrix's gradient, as the head trains.
    assert found["head"] == 3 * 4 * scored * 97 + 4 * scored * 97 + 4 * 97 * 32
    causes = ("weights", "reference", "gradients", "optimizer", "copies", "activations", "head")
    assert found["total"] == sum(found[cause] for cause in causes)
    assert found["store_bytes"] == 4 * 100 * 60


def test_half_precision_copies_and_quantised_weights_are_counted() -> None:
    sizes = config("LlamaConfig", tie_word_embeddings=False)
    half = shape_of(sizes, half=True)
    # Every matrix but the embedding table, in two bytes: norms stay in fp32.
    norms = (2 * 2 + 1) * 32
    assert half.cast_bytes == 2 * (half.num_parameters - norms - 97 * 32)
    full, four = shape_of(sizes, lora=ADAPTER), shape_of(sizes, lora=ADAPTER, bits=4)
    frozen = full.body_matmul - full.num_trainable + 0
    adapters_in_head = full.body_matmul - four.body_matmul
    assert adapters_in_head == 0
    assert full.weight_bytes - four.weight_bytes == pytest.approx(frozen * (4 - 0.5625), rel=0.01)


def test_operations_are_counted_by_hand() -> None:
    sizes = config("LlamaConfig", num_hidden_layers=1)
    shape = shape_of(sizes)
    # q 32x32, k and v 16x32 each, o 32x32, three MLP matrices of 64x32.
    body = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 64 * 32
    assert shape.body_matmul == body
    step, reference = operations(shape, Plan(1, 1, 1, prompt=10.0, completion=20.0, longest_row=30))
    seen = 10 * 10 / 2 + 2 * (10 * 10 + 10 * 10 / 2)
    forward = 2 * body * 30 + 2 * 97 * 32 * 20 + 4 * 32 * seen
    assert reference == pytest.approx(forward)
    assert step == pytest.approx(3 * forward)


def test_an_adapter_needs_less_and_a_longer_run_takes_longer() -> None:
    draw = np.random.default_rng(0)
    prompt, chosen, rejected = (draw.integers(50, 400, 200) for _ in range(3))
    lengths = Lengths(prompt, chosen, rejected)
    given = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "num_train_epochs": 1, "bf16": True}
    sizes = config_of_size(1e9)
    case = Case("dpo", ("sigmoid",), 10**9, num_pairs=10_000, lengths=lengths, given=given)
    full = advise(case, shape_of(sizes, half=True), MACHINES["h200"])
    adapter = advise(case, shape_of(sizes, half=True, lora=ADAPTER), MACHINES["h200"])
    # Gradients, two moments and half-precision copies of a billion parameters: fourteen bytes each.
    assert full.memory["total"] - adapter.memory["total"] > 12 * 0.9e9
    assert adapter.time["seconds"] < full.time["seconds"]
    assert full.time["low"] < full.time["seconds"] < full.time["high"]
    slower = advise(case, shape_of(sizes, half=True), MACHINES["a100-80g"])
    assert slower.time["seconds"] == pytest.approx(full.time["seconds"] * 989 / 312)


def test_unknown_names_are_refused_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match="h100-80g"):
        find_machine("h1000")
    with pytest.raises(ModelError, match="--num_parameters"):
        load_config("./nowhere")
    assert find_machine("cpu").fp32 > 0


def test_the_summary_of_a_training_expects_what_was_advised(tmp_path: Path) -> None:
    world = worlds.World(tmp_path)
    data = Dataset.from_list(worlds.pair_rows(32))
    args = preftune.DPOConfig(output_dir=str(tmp_path / "out"), **worlds.DEFAULTS)
    trainer = preftune.DPOTrainer(world.path, args=args, train_dataset=data, processing_class=world.tokenizer)
    told, lengths = trainer.plan().memory, trainer.lengths
    assert lengths is not None
    plan = Plan(
        pairs_per_step=4,
        num_pairs=32,
        num_epochs=1,
        prompt=lengths.prompt.mean(),
        completion=lengths.completion.mean(),
        longest_row=lengths.longest_row,
    )
    advised = estimate_memory(shape_of(trainer.model.config), plan, CARD)
    assert told.weights == advised["weights"]
    assert told.gradients == advised["gradients"]
    assert told.optimizer == advised["optimizer"]
    assert told.head == pytest.approx(advised["head"], rel=0.1)
    assert told.activations == pytest.approx(advised["activations"], rel=0.3)
