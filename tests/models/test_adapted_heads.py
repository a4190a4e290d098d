"""Adapters of every kind, on the language-model head too: packed rows against plain separate forwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from preftune.models.forward import RowForward
from preftune.models.gate import check_declared
from preftune.models.head import find_head, head_parameters
from preftune.models.packing_probe import probe
from preftune.packing import build_row, pair_trees
from tests.models.tiny import tiny_model
from tests.parity import worlds
from tests.training.oracle import assert_same_training, logps_of, model_of, slow_steps, train
from tests.training.test_by_hand import BETA, PLAIN_ROWS, reverse_kl

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

LINEAR = ["q_proj", "v_proj", "up_proj"]


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 3, "task_type": "CAUSAL_LM", "target_modules": [*LINEAR, "lm_head"], **options})


# The adapter, and whether the fused head takes it; else the model's own head runs on the scored positions.
KINDS: dict[str, tuple[Callable[[], Any], bool]] = {
    "lora": (lora, True),
    "lora, no head": (lambda: lora(target_modules=LINEAR), True),
    "rslora": (lambda: lora(use_rslora=True, lora_alpha=7), True),
    "lora, all-linear": (lambda: lora(target_modules="all-linear"), True),
    "lora, embeddings": (lambda: lora(target_modules=[*LINEAR, "embed_tokens"]), True),
    "saved head": (lambda: lora(target_modules=LINEAR, modules_to_save=["lm_head"]), True),
    "dora": (lambda: lora(use_dora=True), False),
    "lora with bias": (lambda: lora(lora_bias=True), False),
    "ia3": (
        lambda: peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj", "lm_head"], feedforward_modules=["down_proj"]
        ),
        False,
    ),
    "loha": (lambda: peft.LoHaConfig(task_type="CAUSAL_LM", r=3, target_modules=[*LINEAR, "lm_head"]), False),
    "lokr": (lambda: peft.LoKrConfig(task_type="CAUSAL_LM", r=3, target_modules=[*LINEAR, "lm_head"]), False),
    "oft": (
        lambda: peft.OFTConfig(
            task_type="CAUSAL_LM", r=0, oft_block_size=4, target_modules=["q_proj", "v_proj"], use_cayley_neumann=False
        ),
        True,
    ),
    "vera": (lambda: peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "o_proj"]), True),
}


def adapted(kind: str, tied: bool) -> Any:
    """An fp64 model with an adapter whose every parameter matters."""
    model = peft.get_peft_model(tiny_model("LlamaConfig", tie_word_embeddings=tied).double(), KINDS[kind][0]())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise.to(parameter.dtype))
    return model.double().eval()


def draw(length: int, seed: int) -> Any:
    return torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed)).numpy()


@pytest.mark.thin(3)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: str, packed: bool, tied: bool) -> None:
    model = adapted(kind, tied)
    assert (head_parameters(find_head(model)) is not None) is KINDS[kind][1]
    assert check_declared(model).ok
    assert probe(model).ok
    pairs = [(draw(5, 1), draw(4, 2), draw(7, 3)), (draw(3, 4), draw(6, 5), draw(2, 6))]
    trees = [tree for n, pair in enumerate(pairs) for tree in pair_trees(*pair, None, (2 * n, 2 * n + 1))]
    forward = RowForward.of(model, packed=packed)
    watched = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = torch.linspace(-1.0, 2.0, 19, dtype=torch.float64)

    def gradients(values: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad((values * weights).sum(), list(watched.values()), allow_unused=True)
        return {name: torch.zeros(1) if g is None else g for name, g in zip(watched, found, strict=True)}

    with forward.active():
        got = forward(build_row(trees, range(2)))[0].logps
        mine = gradients(got.double())
    plain = torch.cat([logps_of(model, list(prompt), list(answer)) for prompt, *both in pairs for answer in both])
    torch.testing.assert_close(got.double(), plain, rtol=1e-5, atol=1e-5)
    others = gradients(plain)
    size = max(float(g.norm()) for g in others.values())
    assert size > 0
    for name, expected in others.items():
        assert float((mine[name] - expected).norm()) <= 1e-5 * max(float(expected.norm()), 1e-2 * size), name


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


@pytest.mark.thin(1)
@pytest.mark.parametrize("kind", ["lora", "saved head", "dora", "lora with bias", "ia3", "loha"])
def test_training_steps(world: worlds.World, tmp_path: Path, kind: str) -> None:
    """Four steps of DPO: the reference is the model as it was, the head's adapter included."""
    torch.manual_seed(0)
    start = peft.get_peft_model(model_of(world), KINDS[kind][0]()).double()
    policy = copy.deepcopy(start)
    trainer = train(copy.deepcopy(start), world, PLAIN_ROWS, tmp_path, beta=BETA, gradient_checkpointing=False)
    assert trainer.plan().path == "packed"
    losses = slow_steps(policy, lambda: start, list(trainer.train_dataset), reverse_kl)
    assert_same_training(trainer, losses, policy, start)
    moved = dict(trainer.model.named_parameters())
    in_head = [n for n, p in start.named_parameters() if "lm_head" in n and p.requires_grad]
    assert any(not torch.equal(moved[name], p) for name, p in start.named_parameters() if name in in_head)
