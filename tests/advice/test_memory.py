"""Sizes without weights against the real thing, and estimates against hand counts."""

from __future__ import annotations

import copy
import gc
import weakref
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
from preftune.advice.advisor import workload_of
from preftune.errors import ConfigError, ModelError
from preftune.models.forward import RowForward
from preftune.models.head import probe_head
from preftune.models.shapes import config_of_size, load_config, shape_of
from preftune.training.estimate import Workload, estimate_memory, estimate_time, operations, optimizer_bytes
from preftune.training.machines import MACHINES, Machine, find_machine
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


def test_measuring_keeps_no_weights() -> None:
    model: Any = AutoModelForCausalLM.from_config(config("LlamaConfig", hidden_size=64, num_hidden_layers=2))
    model.train()
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    assert activation_bytes_per_token(RowForward(model, True, "auto", probe_head(model), 0), nullcontext) > 0
    del model
    gc.collect()
    assert [weight() for weight in weights] == [None] * len(weights)


def test_a_model_of_a_given_size_has_about_that_size() -> None:
    for wanted in (5e5, 1e8, 7e9, 7e10):
        assert shape_of(config_of_size(wanted)).num_parameters == pytest.approx(wanted, rel=0.25)


def test_memory_is_the_sum_of_its_causes() -> None:
    shape = shape_of(config("LlamaConfig"))
    work = Workload(8, 100, 13, prompt=20.0, completion=60.0, longest_row=100)
    found = estimate_memory(shape, work, CARD)
    n = shape.num_parameters
    assert found.gradients == found.weights == 4 * n
    assert found.optimizer == 8 * n
    assert found.copies == 0
    assert found.row_tokens == 8 * 80
    scored = 8 * 60
    # Three tiles of fp32 logits; kept probabilities and the matrix's gradient, as the head trains.
    assert found.head == 3 * 4 * scored * 97 + 4 * scored * 97 + 4 * 97 * 32
    assert found.total == sum(found.causes.values())
    assert found.store == 4 * 100 * 60


@pytest.mark.parametrize(
    ("optim", "each"),
    [
        ("adamw_torch", 8.0),
        ("adamw_torch_fused", 8.0),
        ("adamw_8bit", 2.03125),
        ("adamw_bnb_8bit", 2.03125),
        ("paged_adamw_8bit", 0.0),
        ("adafactor", 0.01),
        ("sgd", 0.0),
        ("rmsprop", 4.0),
    ],
)
def test_optimizers_keep_what_they_keep(optim: str, each: float) -> None:
    assert optimizer_bytes(optim, 4 * 1000, 1000) == round(1000 * each)


def test_recomputed_activations_are_the_inputs_of_the_layers_and_one_layer() -> None:
    shape = shape_of(config("LlamaConfig", num_hidden_layers=6))
    rows: dict[str, Any] = {"prompt": 20.0, "completion": 60.0, "longest_row": 100}
    kept = estimate_memory(shape, Workload(8, 100, 13, **rows, checkpointing="off"), CARD)
    again = estimate_memory(shape, Workload(8, 100, 13, **rows, checkpointing="always"), CARD)
    assert not kept.checkpointed
    assert again.checkpointed
    layer = shape.activation_bytes / 6
    assert again.activations == round((6 * 32 * 4 + 1.5 * layer) * 640)
    assert kept.activations == round((shape.activation_bytes + layer) * 640)
    # Where they fit, "needed" keeps them; where they do not, it recomputes.
    needed = Workload(8, 100, 13, **rows, checkpointing="needed")
    assert estimate_memory(shape, needed, CARD) == kept
    small = Machine("small", shape.weight_bytes + 3 * shape.trainable_bytes + 10_000, 1e12, 1e12, "a test")
    assert estimate_memory(shape, needed, small).checkpointed


def test_references_and_shards_are_counted() -> None:
    shape = shape_of(config("LlamaConfig"))
    rows: dict[str, Any] = {"prompt": 20.0, "completion": 60.0, "longest_row": 100}
    plain = estimate_memory(shape, Workload(8, 100, 13, **rows), CARD)
    assert plain.reference == 0
    assert estimate_memory(shape, Workload(8, 100, 13, **rows, copies=1), CARD).reference == shape.trainable_bytes
    assert estimate_memory(shape, Workload(8, 100, 13, **rows, separate_reference=7), CARD).reference == 7
    halves = estimate_memory(shape, Workload(8, 100, 13, **rows, sharded=2), CARD)
    for cause in ("weights", "gradients", "optimizer"):
        assert getattr(halves, cause) == getattr(plain, cause) // 2


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
    found = operations(shape, Workload(1, 1, 1, prompt=10.0, completion=20.0, longest_row=30))
    seen = 10 * 10 / 2 + 2 * (10 * 10 + 10 * 10 / 2)
    forward = 2 * body * 30 + 2 * 97 * 32 * 20 + 4 * 32 * seen
    assert found.forward == pytest.approx(forward)
    assert found.step == pytest.approx(3 * forward)
    assert found.thin == 0
    # An adapter: gradients of the frozen matrices are not formed, those of its own are.
    shape = shape_of(sizes, lora=ADAPTER)
    found = operations(shape, Workload(1, 1, 1, prompt=10.0, completion=20.0, longest_row=30))
    assert found.thin == pytest.approx(6 * shape.num_trainable * 30)
    assert found.step == pytest.approx(2 * forward)


def test_an_adapter_needs_less_and_a_longer_run_takes_longer() -> None:
    draw = np.random.default_rng(0)
    prompt, chosen, rejected = (draw.integers(50, 400, 200) for _ in range(3))
    lengths = Lengths(prompt, chosen, rejected)
    given = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "num_train_epochs": 1, "bf16": True}
    sizes = config_of_size(1e9)
    case = Case("dpo", ("sigmoid",), 10**9, num_pairs=10_000, lengths=lengths, given=given)
    full = advise(case, shape_of(sizes, half=True), MACHINES["h200"])
    adapter = advise(case, shape_of(sizes, half=True, lora=ADAPTER), MACHINES["h200"])
    assert full.memory is not None
    assert adapter.memory is not None
    # Gradients, two moments and half-precision copies of a billion parameters: fourteen bytes each.
    assert full.memory.total - adapter.memory.total > 12 * 0.9e9
    assert full.time is not None
    assert adapter.time is not None
    assert adapter.time.seconds < full.time.seconds
    assert full.time.low < full.time.seconds < full.time.high
    slower = advise(case, shape_of(sizes, half=True), MACHINES["a100-80g"])
    assert slower.time is not None
    assert slower.time.seconds == pytest.approx(full.time.seconds * 989 / 312)


def test_unknown_names_are_refused_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match="h100-80g"):
        find_machine("h1000")
    with pytest.raises(ModelError, match="--num_parameters"):
        load_config("./nowhere")
    assert find_machine("cpu").fp32 > 0


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_summary_of_a_training_expects_what_was_advised(tmp_path: Path, peft: bool, checkpointing: bool) -> None:
    world = worlds.World(tmp_path)
    data = Dataset.from_list(worlds.pair_rows(32))
    settings = {**worlds.DEFAULTS, "gradient_checkpointing": checkpointing, "checkpoint_policy": "always"}
    args = preftune.DPOConfig(output_dir=str(tmp_path / "out"), **settings)
    lora = copy.deepcopy(ADAPTER) if peft else None
    trainer = preftune.DPOTrainer(
        world.path, args=args, train_dataset=data, processing_class=world.tokenizer, peft_config=lora
    )
    plan, lengths = trainer.plan(), trainer.lengths
    assert lengths is not None
    shape = shape_of(load_config(str(world.path)), lora=ADAPTER if peft else None)
    batch = args.per_device_train_batch_size
    case = Case(
        "dpo",
        ("sigmoid",),
        shape.num_parameters,
        peft,
        num_pairs=32,
        lengths=Lengths(
            lengths.prompt, lengths.sequences[:, 0] - lengths.prompt, lengths.sequences[:, 1] - lengths.prompt
        ),
        given={
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "num_train_epochs": args.num_train_epochs,
            "max_length": args.max_length,
            "gradient_checkpointing": checkpointing,
            "checkpoint_policy": "always",
            "max_steps": args.max_steps,
            "bf16": args.bf16,
        },
    )
    machine = find_machine("cpu")
    work = workload_of(case, shape)
    advised, seconds = estimate_memory(shape, work, machine), estimate_time(shape, work, machine)
    assert plan.memory.causes == advised.causes
    assert plan.memory.row_tokens == advised.row_tokens
    assert plan.time is not None
    assert plan.time.step_seconds == pytest.approx(seconds.step_seconds)
    assert plan.time.seconds == pytest.approx(seconds.seconds)
    assert plan.time.num_steps == seconds.num_steps == plan.num_steps
