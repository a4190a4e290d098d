"""ORPO and CPO: what does not change the result, what is refused, and how sequences begin and end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset

from preftune import ConfigError, CPOConfig, CPOTrainer, ORPOConfig, ORPOTrainer
from tests.models.tiny import tiny_model
from tests.parity import worlds

VERBS: dict[str, tuple[Any, Any]] = {"orpo": (ORPOTrainer, ORPOConfig), "cpo": (CPOTrainer, CPOConfig)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


def train(world: Any, verb: str, out: Path, rows: list[Any], **options: Any) -> Any:
    data = Dataset.from_list(rows)
    return worlds.train(*VERBS[verb], out, world.path, world.tokenizer, data, **{"max_steps": 2, **options})


@pytest.mark.thin(1)
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 8, "max_tokens_per_row": 40},
        {"per_device_train_batch_size": 8, "packing_mode": "padded"},
        {"per_device_train_batch_size": 8, "checkpoint_policy": "always"},
    ],
    ids=["accumulation", "budget", "padded", "recomputed"],
)
def test_the_split_of_a_step_changes_nothing(
    world: worlds.World, tmp_path: Path, verb: str, options: dict[str, Any]
) -> None:
    rows = worlds.pair_rows(16)
    whole = train(world, verb, tmp_path, rows, per_device_train_batch_size=8)
    split = train(world, verb, tmp_path, rows, **options)
    names = tuple(sorted(set(worlds.log_lines(whole)[0]) - {"step", "epoch"}))
    assert {"loss", "grad_norm", "nll_loss", "entropy", "logits/rejected"} <= set(names)
    worlds.assert_same_logs(split, whole, names, 1e-5)
    worlds.assert_same_weights(split, whole, 1e-5)


@pytest.mark.thin(1)
@pytest.mark.parametrize("verb", VERBS)
def test_evaluation_does_not_depend_on_its_batches(world: worlds.World, tmp_path: Path, verb: str) -> None:
    rows = worlds.pair_rows(14)
    whole, split = (
        train(world, verb, tmp_path, rows, max_steps=1, per_device_eval_batch_size=size).evaluate(
            Dataset.from_list(rows)
        )
        for size in (14, 3)
    )
    for name, value in whole.items():
        if "runtime" not in name and "per_second" not in name:
            assert split[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_orpo_learns_from_the_prompt_and_cpo_does_not(world: worlds.World, tmp_path: Path) -> None:
    """By hand: the token mean over prompt and chosen answer, from the model's own logits."""
    rows = worlds.pair_rows(4)
    for verb in VERBS:
        trainer = train(world, verb, tmp_path, rows, max_steps=1, learning_rate=0.0)
        total, number = torch.zeros(()), 0
        for example in trainer.train_dataset:
            prompt, ids = len(example["prompt_ids"]), torch.tensor([example["prompt_ids"] + example["chosen_ids"]])
            with torch.no_grad():
                logps = trainer.model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            first = 0 if verb == "orpo" else prompt - 1
            total, number = total - logps[first:].sum(), number + len(logps) - first
        assert worlds.log_lines(trainer)[0]["nll_loss"] == pytest.approx(float(total / number), rel=1e-5)


@pytest.mark.parametrize("verb", VERBS)
def test_lora_trains_the_adapter_alone(world: worlds.World, tmp_path: Path, verb: str) -> None:
    trainer_class, config_class = VERBS[verb]
    trainer = trainer_class(
        model=world.path,
        args=config_class(output_dir=str(tmp_path), **{**worlds.DEFAULTS, "max_steps": 2}),
        train_dataset=Dataset.from_list(worlds.pair_rows(8)),
        processing_class=world.tokenizer,
        peft_config=peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert trainer.reference is None


def test_pair_weights_scale_the_gradient(world: worlds.World, tmp_path: Path) -> None:
    rows = worlds.pair_rows(8)
    plain = train(world, "cpo", tmp_path, rows, per_device_train_batch_size=8, max_steps=1)
    halved = train(
        world, "cpo", tmp_path, [{**row, "weight": 0.5} for row in rows], per_device_train_batch_size=8, max_steps=1
    )
    a, b = (worlds.log_lines(trainer)[0] for trainer in (plain, halved))
    assert b["loss"] == pytest.approx(a["loss"] / 2, rel=1e-5)
    assert b["grad_norm"] == pytest.approx(a["grad_norm"] / 2, rel=1e-4)


def test_compute_metrics_gets_rewards(world: worlds.World, tmp_path: Path) -> None:
    seen = {}

    def metrics(prediction: Any) -> dict[str, float]:
        seen["shape"] = prediction.predictions.shape
        return {"mine": float((prediction.predictions[:, 0] > prediction.predictions[:, 1]).mean())}

    data = Dataset.from_list(worlds.pair_rows(6))
    trainer = CPOTrainer(
        model=world.path,
        args=CPOConfig(output_dir=str(tmp_path), **worlds.DEFAULTS),
        train_dataset=data,
        eval_dataset=data,
        processing_class=world.tokenizer,
        compute_metrics=metrics,
    )
    found = trainer.evaluate()
    assert seen["shape"] == (6, 2)
    assert found["eval_mine"] == pytest.approx(found["eval_rewards/accuracies"])


def test_model_init_makes_the_model(world: worlds.World, tmp_path: Path) -> None:
    made = []

    def model_init() -> Any:
        made.append(tiny_model("LlamaConfig", len(world.tokenizer)))
        return made[-1]

    trainer = ORPOTrainer(
        args=ORPOConfig(output_dir=str(tmp_path), **worlds.DEFAULTS),
        train_dataset=Dataset.from_list(worlds.pair_rows(4)),
        processing_class=world.tokenizer,
        model_init=model_init,
    )
    assert trainer.model is made[0]


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"preprocess_logits_for_metrics": len}, "preprocess_logits_for_metrics"),
        ({"model_init": len}, "model_init"),
        ({"model": None}, "model"),
        ({"data_collator": len}, "data_collator"),
    ],
)
def test_arguments_without_effect_are_refused(
    world: worlds.World, tmp_path: Path, arguments: dict[str, Any], where: str
) -> None:
    given = {
        "model": world.path,
        "args": CPOConfig(output_dir=str(tmp_path), **worlds.DEFAULTS),
        "train_dataset": Dataset.from_list(worlds.pair_rows(4)),
        "processing_class": world.tokenizer,
    }
    with pytest.raises(ConfigError, match=f"^{where}:"):
        CPOTrainer(**{**given, **arguments})


@pytest.mark.parametrize(
    ("config", "settings", "says"),
    [
        (ORPOConfig, {"beta": 0.0}, "beta: the value is not allowed"),
        (ORPOConfig, {"generate_during_eval": True}, "generate_during_eval"),
        (ORPOConfig, {"is_encoder_decoder": True}, "is_encoder_decoder"),
        (ORPOConfig, {"implicit_prompt": "x"}, "implicit_prompt"),
        (ORPOConfig, {"max_prompt_length": 0}, "max_prompt_length"),
        (CPOConfig, {"loss_type": "kto_pair"}, "KTOTrainer"),
        (CPOConfig, {"loss_type": "sigmod"}, "allowed: sigmoid, hinge, ipo, simpo, alphapo"),
        (CPOConfig, {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
        (CPOConfig, {"simpo_gamma": 1.0}, "simpo_gamma"),
        (CPOConfig, {"loss_type": "alphapo", "alpha": 0.25, "cpo_alpha": 0.5}, "alphapo has no supervised term"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, config: Any, settings: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("config", "settings", "says"),
    [
        (ORPOConfig, {"padding_value": 0}, "padding_value has no effect"),
        (CPOConfig, {"loss_type": "alphapo"}, "alphapo is SimPO"),
    ],
)
def test_settings_without_effect_are_said(tmp_path: Path, config: Any, settings: Any, says: str) -> None:
    with pytest.warns(UserWarning, match=says):
        config(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_alphapo_sets_the_supervised_term_off_as_in_trl(tmp_path: Path) -> None:
    args = CPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, loss_type="alphapo", alpha=0.25)
    assert args.cpo_alpha == 0.0
    assert args.build_objective().names == ("alphapo",)


def test_checkpoints_resume(world: worlds.World, tmp_path: Path) -> None:
    rows = worlds.pair_rows(16)
    through = train(world, "orpo", tmp_path / "a", rows, max_steps=4)
    train(world, "orpo", tmp_path / "b", rows, max_steps=4, save_strategy="steps", save_steps=2)
    (checkpoint,) = (tmp_path / "b").rglob("checkpoint-2")
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 2
    resumed = ORPOTrainer(
        model=world.path,
        args=ORPOConfig(output_dir=str(tmp_path / "b"), **{**worlds.DEFAULTS, "max_steps": 4}),
        train_dataset=Dataset.from_list(rows),
        processing_class=world.tokenizer,
    )
    resumed.train(resume_from_checkpoint=str(checkpoint))
    worlds.assert_same_weights(resumed, through, 1e-6)
