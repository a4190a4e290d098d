"""References that the user names: another model, given or by path, or another adapter of the same model."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from preftune import ConfigError, DPOConfig, KTOConfig, KTOTrainer, ModelError
from preftune.kernels.head import TokenScores
from preftune.packing import PackedRow
from tests.models.tiny import save_tiny_model, train_tokenizer
from tests.parity import worlds
from tests.training.oracle import Pairs, assert_same_training, model_of, slow_steps, train
from tests.training.test_by_hand import BETA, PLAIN_ROWS, reverse_kl


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def small(world: worlds.World, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reference of another size with the same tokens."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return save_tiny_model(tmp_path_factory.mktemp("small"), world.tokenizer, initializer_range=0.3, **sizes)


@pytest.mark.thin(2)
@pytest.mark.parametrize("form", ["path", "model"])
@pytest.mark.parametrize("options", [{}, {"reference_store": False}, {"precompute_ref_log_probs": True}], ids=str)
def test_another_model(world: worlds.World, tmp_path: Path, small: str, form: str, options: dict[str, Any]) -> None:
    start, policy, reference = model_of(world), model_of(world), model_of(world, small)
    given = small if form == "path" else model_of(world, small)
    trainer = train(model_of(world), world, PLAIN_ROWS, tmp_path, beta=BETA, ref_model=given, **options)
    losses = slow_steps(policy, lambda: reference, list(trainer.train_dataset), reverse_kl)
    assert_same_training(trainer, losses, policy, start)
    assert abs(losses[0] - math.log(2)) > 1e-2
    assert "the given ref_model" in trainer.plan().reference


def test_another_model_beside_an_adapter(world: worlds.World, tmp_path: Path, small: str) -> None:
    start = peft.get_peft_model(model_of(world), lora())
    policy, reference = copy.deepcopy(start), model_of(world, small)
    trainer = train(copy.deepcopy(start), world, PLAIN_ROWS, tmp_path, beta=BETA, ref_model=small)
    losses = slow_steps(policy, lambda: reference, list(trainer.train_dataset), reverse_kl)
    assert_same_training(trainer, losses, policy, start)


def test_a_given_reference_of_the_same_shape_can_follow(world: worlds.World, tmp_path: Path) -> None:
    start, policy, reference = model_of(world), model_of(world), model_of(world)
    with torch.no_grad():
        for p in reference.parameters():
            p *= 1.05
    given = copy.deepcopy(reference)
    sync = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6}
    trainer = train(model_of(world), world, PLAIN_ROWS, tmp_path, beta=BETA, ref_model=given, **sync)

    def follow(step: int) -> None:
        if step % 2 == 0:
            with torch.no_grad():
                for mine, other in zip(reference.parameters(), policy.parameters(), strict=True):
                    mine.copy_(0.6 * other + 0.4 * mine)

    losses = slow_steps(policy, lambda: reference, list(trainer.train_dataset), reverse_kl, follow)
    assert_same_training(trainer, losses, policy, start)


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 3, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "up_proj"], **options})


def two_adapters(world: worlds.World) -> Any:
    """A model with the adapters ``policy`` and ``reference``, both trained and different, the first one active."""
    model = peft.get_peft_model(model_of(world), lora(), adapter_name="policy")
    model.add_adapter("reference", lora())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    model.set_adapter("policy")
    return model


def alone(world: worlds.World, model: Any, name: str) -> Any:
    """A plain model with one adapter merged into it."""
    merged = copy.deepcopy(model)
    merged.set_adapter(name)
    return merged.merge_and_unload()


@pytest.mark.parametrize("options", [{}, {"reference_store": False}], ids=["stored", "live"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "active"])
def test_another_adapter(world: worlds.World, tmp_path: Path, options: dict[str, Any], named: bool) -> None:
    start = two_adapters(world)
    policy, reference = copy.deepcopy(start), alone(world, start, "reference")
    names = {"ref_adapter_name": "reference", **({"model_adapter_name": "policy"} if named else {})}
    given = copy.deepcopy(start)
    if named:
        given.set_adapter("reference")
    trainer = train(given, world, PLAIN_ROWS, tmp_path, beta=BETA, **names, **options)
    losses = slow_steps(policy, lambda: reference, list(trainer.train_dataset), reverse_kl)
    assert_same_training(trainer, losses, policy, start)
    assert abs(losses[0] - math.log(2)) > 1e-3
    mine, begun = dict(trainer.model.named_parameters()), dict(start.named_parameters())
    for name, p in mine.items():
        if ".reference." in name:
            assert torch.equal(p, begun[name]), name
        assert p.requires_grad == (".policy." in name), name
    assert trainer.model.active_adapter == "policy"
    assert "the adapter reference" in trainer.plan().reference


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_that_plays_no_part_is_said(world: worlds.World, tmp_path: Path) -> None:
    """Without a word about it the reference is the trained adapter as it was, and the loss starts at ln 2."""
    with pytest.warns(UserWarning, match="reference plays no part"):
        trainer = train(two_adapters(world), world, PLAIN_ROWS, tmp_path)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("precompute", [False, True])
def test_an_adapter_folder_goes_on_training_and_is_its_own_reference(
    world: worlds.World, tmp_path: Path, precompute: bool
) -> None:
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(world.path), lora())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    trainer = train(str(folder), world, PLAIN_ROWS, tmp_path, precompute_ref_log_probs=precompute)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    # Against the bare base, as adapter off would be, the loss starts elsewhere.
    base = train(str(folder), world, PLAIN_ROWS, tmp_path, ref_model=world.path)
    assert abs(base.state.log_history[0]["loss"] - math.log(2)) > 1e-3


def test_an_adapter_folder_as_reference(world: worlds.World, tmp_path: Path) -> None:
    model = two_adapters(world)
    model.save_pretrained(tmp_path / "adapters", selected_adapters=["reference"])
    folder = str(tmp_path / "adapters" / "reference")
    reference = alone(world, model, "reference")
    trainer = train(model_of(world), world, PLAIN_ROWS, tmp_path, beta=BETA, ref_model=folder)
    with torch.no_grad():
        pairs = Pairs(model_of(world), reference, list(trainer.train_dataset)[:4])
    expected = reverse_kl(pairs).mean()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected), rel=1e-5)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sync_ref_model": True, "ref_adapter_name": "reference"}, "ref_adapter_name: a reference that follows"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "cannot be precomputed"),
        ({"loss_type": ["simpo"], "sync_ref_model": True}, "sync_ref_model: simpo has no reference"),
        (
            {"loss_type": ["simpo"], "precompute_ref_log_probs": True},
            "precompute_ref_log_probs: simpo has no reference",
        ),
        ({"loss_type": ["cpo"], "ref_adapter_name": "x"}, "ref_adapter_name: cpo has no reference"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)
    assert says in str(caught.value)


def test_references_that_cannot_be(world: worlds.World, tmp_path: Path, small: str) -> None:
    other = train_tokenizer(["the film"], 270)
    few = save_tiny_model(tmp_path / "few", other)
    adapted = peft.get_peft_model(model_of(world), lora())
    model = model_of(world)
    refused: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (model, {"ref_model": model}, ModelError, "the same object"),
        (model, {"ref_model": few}, ModelError, "does not know all of the tokenizer's tokens"),
        (model, {"ref_model": str(tmp_path / "absent")}, ModelError, "cannot be loaded"),
        (
            model,
            {"ref_model": small, "sync_ref_model": True},
            ConfigError,
            "sync_ref_model: the given reference cannot",
        ),
        (adapted, {"ref_model": small, "sync_ref_model": True}, ConfigError, "sync_ref_model: the given reference"),
        (model, {"ref_model": small, "loss_type": ["simpo"]}, ConfigError, "ref_model: simpo has no reference"),
        (model, {"ref_adapter_name": "reference"}, ConfigError, "allowed: none: the model has no adapters"),
        (adapted, {"ref_adapter_name": "reference"}, ConfigError, "allowed: default"),
        (adapted, {"ref_adapter_name": "default"}, ConfigError, "cannot be the reference as well"),
        (two_adapters(world), {"ref_adapter_name": "reference", "ref_model": small}, ConfigError, "two references"),
    ]
    for policy, options, kind, says in refused:
        with pytest.raises(kind) as caught:
            train(policy, world, PLAIN_ROWS, tmp_path, **options)
        assert says in str(caught.value), says
        assert "\n" not in str(caught.value)


def test_prompt_learning_is_refused(world: worlds.World, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ModelError, match="prompt learning is not supported"):
        train(model_of(world), world, PLAIN_ROWS, tmp_path, peft_config=config)


# ---- the reference pass ----------------------------------------------------------------------------------------------


def test_a_single_answer_is_scored_once(world: worlds.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpaired APO has no exchanged completions: the reference runs over every token exactly once."""
    from preftune.training.reference import Reference

    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))
    tokens: list[int] = []
    plain = Reference.row_scores

    def counting(self: Reference, row: PackedRow, **options: bool) -> TokenScores:
        tokens.append(row.num_tokens)
        return plain(self, row, **options)

    monkeypatch.setattr(Reference, "row_scores", counting)
    rows = worlds.unpaired_rows(12)
    trainer = KTOTrainer(
        model=world.path,
        args=KTOConfig(
            output_dir=str(tmp_path),
            loss_type="apo_zero_unpaired",
            desirable_weight=0.75,
            **{**worlds.DEFAULTS, "max_steps": 3},
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=world.tokenizer,
    )
    trainer.prepare_reference()
    examples: list[Any] = list(trainer.train_dataset)  # type: ignore[arg-type]
    needed = sum(len(e["prompt_ids"]) + len(e["chosen_ids"]) for e in examples)
    assert sum(tokens) == needed
    model = model_of(world)
    for example in examples:
        with torch.no_grad():
            expected = float(Pairs(model, model, [example]).w)
        assert example["ref_chosen_logps"] == pytest.approx(expected, rel=1e-5)
        assert example["ref_rejected_logps"] == example["ref_chosen_logps"]
