"""KTO: the baseline belongs to the whole step, however it is split; and what is warned of or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset

from preftune import ConfigError, DataError, KTOConfig, KTOTrainer
from preftune.data import DataOptions
from preftune.data.unpaired import prepare_unpaired
from tests.parity import worlds


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


def balanced(number: int) -> list[dict[str, Any]]:
    return [{**row, "label": n % 2 == 0} for n, row in enumerate(worlds.unpaired_rows(number))]


def train(world: Any, out: Path, rows: list[Any], **options: Any) -> Any:
    data = Dataset.from_list(rows)
    return worlds.train(KTOTrainer, KTOConfig, out, world.path, world.tokenizer, data, **{"max_steps": 4, **options})


WHOLE = {"per_device_train_batch_size": 8, "beta": 0.5}


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"max_tokens_per_row": 20},
        {"packing_mode": "padded"},
        {"reference_store": False},
    ],
    ids=["one by one", "accumulation", "budget", "padded", "live reference"],
)
def test_the_split_of_a_step_changes_nothing(world: worlds.World, tmp_path: Path, options: dict[str, Any]) -> None:
    rows = balanced(22)
    whole, split = (train(world, tmp_path, rows, **{**WHOLE, **more}) for more in ({}, options))
    names = tuple(sorted(set(worlds.log_lines(whole)[0]) - {"step", "epoch"}))
    assert {"loss", "grad_norm", "kl", "rewards/margins", "entropy", "logits/rejected"} <= set(names)
    assert any(line["kl"] > 1e-3 for line in worlds.log_lines(whole))
    worlds.assert_same_logs(split, whole, names, 1e-5)
    worlds.assert_same_weights(split, whole, 1e-5)


def test_the_first_step_by_hand(world: worlds.World, tmp_path: Path) -> None:
    """Policy and reference agree: rewards and baseline are 0, and every loss is half its weight."""
    rows = balanced(8)
    trainer = train(world, tmp_path, rows, **WHOLE, max_steps=1, desirable_weight=1.25, undesirable_weight=1.0)
    line = worlds.log_lines(trainer)[0]
    assert line["loss"] == pytest.approx((4 * 1.25 + 4 * 1.0) / 2 / 8, abs=1e-6)
    assert line["kl"] == pytest.approx(0.0, abs=1e-6)
    assert line["rewards/margins"] == pytest.approx(0.0, abs=1e-6)


def test_the_baseline_by_hand(world: worlds.World, tmp_path: Path) -> None:
    """From the trained model's and the initial model's own logits, over completions moved on by one."""
    from transformers import AutoModelForCausalLM

    rows = balanced(8)
    trainer = train(world, tmp_path, rows, **WHOLE, reference_store=False)
    initial = AutoModelForCausalLM.from_pretrained(world.path)
    examples = list(trainer.train_dataset)

    def score(model: Any, prompt: list[int], completion: list[int]) -> float:
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            logps = model(ids).logits.double().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        return float(logps[len(prompt) - 1 :].sum())

    total = 0.0
    for number, example in enumerate(examples):
        other = examples[number - 1]["chosen_ids"]
        total += score(trainer.model, example["prompt_ids"], other) - score(initial, example["prompt_ids"], other)
    found = trainer.evaluate(Dataset.from_list(rows))["eval_kl"]
    assert total > 0.1
    assert found == pytest.approx(total / 8, rel=1e-4)


def test_evaluation_does_not_depend_on_its_batches(world: worlds.World, tmp_path: Path) -> None:
    held_out = Dataset.from_list(balanced(14))
    found = [
        train(world, tmp_path, balanced(16), **WHOLE, reference_store=False, per_device_eval_batch_size=size).evaluate(
            held_out
        )
        for size in (2, 14)
    ]
    assert found[0]["eval_kl"] > 1e-3
    for name, value in found[1].items():
        if name.startswith("eval_") and "runtime" not in name and "per_second" not in name:
            assert found[0][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_lora_uses_the_initial_adapter_as_reference(world: worlds.World, tmp_path: Path) -> None:
    trainer = KTOTrainer(
        model=world.path,
        args=KTOConfig(output_dir=str(tmp_path), **{**worlds.DEFAULTS, "max_steps": 3}),
        train_dataset=Dataset.from_list(balanced(12)),
        processing_class=world.tokenizer,
        peft_config=peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    trainer.train()
    lines = worlds.log_lines(trainer)
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert lines[-1]["rewards/margins"] != 0.0


def test_weights_of_examples_scale_the_loss(world: worlds.World, tmp_path: Path) -> None:
    rows = balanced(8)
    weighted = train(world, tmp_path, [{**row, "weight": 0.5} for row in rows], **WHOLE, max_steps=1)
    assert worlds.log_lines(weighted)[0]["loss"] == pytest.approx(0.25, abs=1e-6)


@pytest.mark.parametrize(
    ("num_desirable", "weight", "warns"), [(6, 1.0, False), (8, 0.7, True), (8, 1.0, False), (10, 1.0, True)]
)
def test_the_rule_for_the_weights_is_a_warning(
    world: worlds.World, tmp_path: Path, num_desirable: int, weight: float, warns: bool
) -> None:
    """Equation 8: lambda_D n_D / (lambda_U n_U) between 1 and 4/3, both included; here with six undesirable ones."""
    rows = [{**row, "label": n < num_desirable} for n, row in enumerate(worlds.unpaired_rows(num_desirable + 6))]

    def make() -> KTOTrainer:
        return KTOTrainer(
            model=world.path,
            args=KTOConfig(output_dir=str(tmp_path), **worlds.DEFAULTS, desirable_weight=weight),
            train_dataset=Dataset.from_list(rows),
            processing_class=world.tokenizer,
        )

    if warns:
        with pytest.warns(UserWarning, match=r"outside \[1, 4/3\]"):
            make()
    else:
        make()  # a warning would be an error here


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"train_sampling_strategy": "random"}, "shuffle the data before training"),
        ({"per_device_train_batch_size": 1}, "2 or more examples in a step"),
        ({"loss_type": "bco"}, "allowed: kto, apo_zero_unpaired"),
        ({"desirable_weight": -1.0}, "desirable_weight"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "cannot be precomputed"),
        ({"beta": -0.1}, "beta"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KTOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "loss_type": "apo_zero_unpaired", "train_sampling_strategy": "random"},
    ],
)
def test_what_needs_no_other_examples_is_allowed(tmp_path: Path, settings: dict[str, Any]) -> None:
    KTOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_random_order_without_kl_trains(world: worlds.World, tmp_path: Path) -> None:
    options = {"loss_type": "apo_zero_unpaired", "train_sampling_strategy": "random"}
    trainer = train(world, tmp_path, balanced(16), **options)
    assert all("kl" not in line for line in worlds.log_lines(trainer))


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_each_sequence_is_cut_for_itself(world: worlds.World, mode: str) -> None:
    rows = worlds.unpaired_rows(12)
    options = DataOptions(max_length=17, truncation_mode=mode)  # type: ignore[arg-type]
    cut, report = prepare_unpaired(Dataset.from_list(rows), world.tokenizer, options, block=4)
    whole, _ = prepare_unpaired(Dataset.from_list(rows), world.tokenizer, DataOptions(max_length=None), block=4)
    assert len(cut) == len(whole) == 12
    assert report.num_truncated > 0
    part = slice(None, 17) if mode == "keep_start" else slice(-17, None)
    for number, (a, b) in enumerate(zip(cut, whole, strict=True)):
        other = whole[number // 4 * 4 + (number - 1) % 4]["chosen_ids"]
        assert b["rejected_ids"] == other
        prompt = a["prompt_ids"] if a["rejected_prompt_ids"] is None else a["rejected_prompt_ids"]
        assert a["prompt_ids"] + a["chosen_ids"] == (b["prompt_ids"] + b["chosen_ids"])[part]
        assert prompt + a["rejected_ids"] == (b["prompt_ids"] + other)[part]


def test_prepared_data_are_taken_as_they_are(world: worlds.World) -> None:
    once, _ = prepare_unpaired(Dataset.from_list(balanced(6)), world.tokenizer, DataOptions(), block=3)
    twice, report = prepare_unpaired(once, world.tokenizer, DataOptions(), block=2)
    assert twice[:] == once[:]
    assert report.format == "tokenised"


def test_rows_without_labels_are_refused(world: worlds.World) -> None:
    with pytest.raises(DataError, match="labelled answers are needed"):
        prepare_unpaired(Dataset.from_list([{"text": "a film"}]), world.tokenizer, DataOptions())


def test_bad_rows_are_counted_once(world: worlds.World) -> None:
    rows = [*balanced(4), {"prompt": "a", "completion": "", "label": True}]
    with pytest.raises(DataError, match="row 4"):
        prepare_unpaired(Dataset.from_list(rows), world.tokenizer, DataOptions())
    kept, report = prepare_unpaired(Dataset.from_list(rows), world.tokenizer, DataOptions(on_bad_rows="skip"))
    assert (len(kept), report.rows_kept, report.bad_rows) == (4, 4, {"empty_completion": 1})
    pairs = [*worlds.pair_rows(3), {"prompt": "a", "chosen": "", "rejected": " b"}]
    kept, report = prepare_unpaired(Dataset.from_list(pairs), world.tokenizer, DataOptions(on_bad_rows="warn"))
    assert (len(kept), report.bad_rows) == (8, {"empty_completion": 1})


def test_compute_metrics_gets_rewards_and_labels(world: worlds.World, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def metrics(prediction: Any) -> dict[str, float]:
        seen["labels"] = prediction.label_ids.tolist()
        return {"mean": float(prediction.predictions.mean())}

    rows = balanced(6)
    trainer = KTOTrainer(
        model=world.path,
        args=KTOConfig(output_dir=str(tmp_path), **worlds.DEFAULTS),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=world.tokenizer,
        compute_metrics=metrics,
    )
    assert trainer.evaluate()["eval_mean"] == pytest.approx(0.0, abs=1e-6)
    assert seen["labels"] == [row["label"] for row in rows]
