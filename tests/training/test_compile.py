"""``torch_compile``: the same numbers, the model untouched outside training, and clear words where it cannot work."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from datasets import Dataset
from peft import LoraConfig
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

import preftune
from preftune import ConfigError
from preftune.training.fused import FusedTrainer
from tests.models.tiny import tiny_model
from tests.parity import worlds

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    # Of torch's own modules, as they are first imported; `pytest.warns` raises it again without the module's name.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

# Adam would divide gradients that are zero but for rounding by their own size.
SGD: dict[str, Any] = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1}
CHEAP: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def forget_compiled() -> None:
    torch._dynamo.reset()
    counters.clear()


def make(library: Any, world: Any, out: Path, *, peft: bool = False, model: Any = None, **options: Any) -> Any:
    args = library.DPOConfig(output_dir=str(out), **{**worlds.DEFAULTS, **SGD, **options})
    data = Dataset.from_list(worlds.pair_rows(24, 0))
    torch.manual_seed(0)
    adapter = LoraConfig(target_modules="all-linear", r=4) if peft else None
    return library.DPOTrainer(
        model=model or world.path,
        args=args,
        train_dataset=data,
        eval_dataset=data.select(range(5)),
        processing_class=world.tokenizer,
        peft_config=adapter,
    )


def outcome(trainer: Any) -> tuple[list[float], dict[str, float], dict[str, torch.Tensor]]:
    trainer.train()
    losses = [x for line in trainer.state.log_history for x in (line.get("loss"), line.get("grad_norm")) if x]
    held_out = {k: v for k, v in trainer.evaluate().items() if "rewards" in k or k == "eval_loss"}
    weights = {k: v.detach() for k, v in trainer.model.named_parameters() if v.requires_grad}
    return losses, held_out, weights


def assert_same(ours: Any, expected: Any) -> None:
    assert ours[0] == pytest.approx(expected[0], rel=1e-5)
    assert ours[1] == pytest.approx(expected[1], rel=1e-4, abs=1e-6)
    for name, weight in expected[2].items():
        assert (ours[2][name] - weight).norm() <= 1e-5 * weight.norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True, "checkpoint_policy": "always", "peft": True},
        {"activation_offloading": True},
        {"packing_mode": "padded"},
        {"reference_store": False, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_compiled_layers_give_the_same_numbers(world: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    expected = outcome(make(preftune, world, tmp_path / "plain", **options))
    assert not counters["stats"]
    ours = outcome(make(preftune, world, tmp_path / "compiled", **options, **CHEAP))
    # Layers share their code, and rows of other lengths need no new one.
    assert 3 <= counters["stats"]["unique_graphs"] <= 12
    assert_same(ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Gemma2Config", "Qwen3Config", "MixtralConfig"])
def test_other_architectures(world: Any, tmp_path: Path, name: str) -> None:
    def run(folder: str, **options: Any) -> Any:
        model = tiny_model(name, vocab_size=len(world.tokenizer))
        return outcome(make(preftune, world, tmp_path / folder, model=model, **options))

    expected = run("plain")
    assert_same(run("compiled", **CHEAP), expected)
    assert counters["stats"]["unique_graphs"] >= 2


@pytest.mark.slow
def test_inductor_agrees_with_trl(world: Any, tmp_path: Path) -> None:
    trl = importlib.import_module("trl")
    theirs, ours = make(trl, world, tmp_path / "trl"), make(preftune, world, tmp_path / "ours", torch_compile=True)
    for trainer in (theirs, ours):
        trainer.train()
    assert counters["stats"]["unique_graphs"] >= 3
    for expected, found in zip(theirs.state.log_history[:3], ours.state.log_history[:3], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_the_model_is_itself_again_afterwards(world: Any, tmp_path: Path) -> None:
    trainer = make(preftune, world, tmp_path, save_strategy="steps", save_steps=3, **CHEAP)
    trainer.train()
    layers = [m for m in trainer.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert layers
    assert all(part._compiled_call_impl is None for layer in layers for part in layer.children())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], weight)
    graphs = counters["stats"]["unique_graphs"]
    trainer.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
def test_accelerates_own_configuration_asks_for_it_too(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    trainer = make(preftune, world, tmp_path)
    trainer.train()
    assert type(trainer.model_wrapped) is type(trainer.model)
    assert counters["stats"]["unique_graphs"] >= 3
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "cudagraphs")
    with pytest.raises(ConfigError, match="dynamo_backend: does not suit packed rows"):
        make(preftune, world, tmp_path / "graphs")


@pytest.mark.parametrize(("mode", "instead"), [("reduce-overhead", "default"), ("max-autotune", "no-cudagraphs")])
def test_cuda_graphs_are_left_out_and_told(world: Any, tmp_path: Path, mode: str, instead: str) -> None:
    with pytest.warns(UserWarning, match=f"torch_compile_mode: {mode} -> .*{instead}"):
        make(preftune, world, tmp_path, torch_compile_mode=mode)


@pytest.mark.parametrize(
    ("name", "allowed"), [("torch_compile_backend", "inductor"), ("torch_compile_mode", "reduce-overhead")]
)
def test_an_unknown_choice_is_named(tmp_path: Path, name: str, allowed: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*bogus.*{allowed}"):
        preftune.DPOConfig(**{"output_dir": str(tmp_path), name: "bogus"})  # type: ignore[arg-type]


def test_no_compiler_is_one_clear_error(world: Any, tmp_path: Path) -> None:
    inductor = importlib.import_module("torch._inductor.config")
    trainer = make(preftune, world, tmp_path, torch_compile=True)
    with (
        inductor.patch({"force_disable_caches": True, "cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ConfigError, match=r"torch_compile: .*no-such-compiler.*leave torch_compile out"),
    ):
        trainer.train()


def test_a_model_without_known_layers_is_refused(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preftune.models.compiled._layers", lambda model: [])
    with pytest.raises(ConfigError, match=r"which of its modules are layers.*LlamaForCausalLM"):
        make(preftune, world, tmp_path, **CHEAP)


def test_a_shared_forward_refuses_it(world: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="torch_compile"):
        FusedTrainer(
            configurations=[{"beta": 0.1}, {"beta": 0.3}],
            args=preftune.DPOConfig(output_dir=str(tmp_path), **{**worlds.DEFAULTS, **CHEAP}),
            peft_config=LoraConfig(target_modules="all-linear", r=4),
            model=world.path,
            train_dataset=Dataset.from_list(worlds.pair_rows(4, 0)),
            processing_class=world.tokenizer,
        )
