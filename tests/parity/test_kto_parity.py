"""KTO and unpaired APO-zero against TRL's trainer: every figure of every step, and the final weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.parity import worlds
from tests.parity.conftest import Setting, hh_rows

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

TOLERANCE = 1e-4
KTO = {"loss_type": "kto"}
APO = {"loss_type": "apo_zero_unpaired"}
FIGURES = (
    "loss",
    "grad_norm",
    "kl",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "num_tokens",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


def classes() -> list[tuple[Any, Any]]:
    """Trainer and settings classes, TRL's first."""
    from trl import KTOConfig, KTOTrainer

    import preftune

    return [(KTOTrainer, KTOConfig), (preftune.KTOTrainer, preftune.KTOConfig)]


def compare(
    world: Any, rows: list[Any], out: Path, ours_only: dict[str, Any] | None = None, **options: Any
) -> list[Any]:
    both = []
    for number, (trainer, config) in enumerate(classes()):
        given = {**options, **(ours_only or {})} if number else options
        both.append(worlds.train(trainer, config, out, world.path, world.tokenizer, Dataset.from_list(rows), **given))
    theirs, ours = both
    names = tuple(n for n in FIGURES if n != "kl") if options.get("loss_type") == "apo_zero_unpaired" else FIGURES
    worlds.assert_same_logs(ours, theirs, names, TOLERANCE)
    worlds.assert_same_weights(ours, theirs, TOLERANCE)
    return both


@pytest.mark.thin(2)
@pytest.mark.parametrize("stored", [False, True], ids=["live", "stored"])
@pytest.mark.parametrize("method", [KTO, APO], ids=["kto", "apo"])
def test_five_steps(world: worlds.World, tmp_path: Path, method: dict[str, str], stored: bool) -> None:
    options = {**method, "desirable_weight": 1.2, "undesirable_weight": 0.7, "beta": 0.3}
    options |= {"precompute_ref_log_probs": stored}
    theirs, _ = compare(world, worlds.unpaired_rows(22), tmp_path, {"reference_store": stored}, **options)
    if method is KTO:
        # Otherwise the baseline would not have been compared.
        assert any(line["kl"] > 1e-3 for line in worlds.log_lines(theirs))


def test_an_epoch_that_ends_in_a_partial_batch(world: worlds.World, tmp_path: Path) -> None:
    compare(world, worlds.unpaired_rows(11), tmp_path, max_steps=6, per_device_train_batch_size=4)


def test_padded_path(world: worlds.World, tmp_path: Path) -> None:
    ours = compare(world, worlds.unpaired_rows(20), tmp_path, {"packing_mode": "padded"})[1]
    assert not ours.verdict.ok


def test_truncation_cuts_an_exchanged_completion_by_the_prompt_it_gets(world: worlds.World, tmp_path: Path) -> None:
    theirs, ours = compare(world, worlds.unpaired_rows(24), tmp_path, max_length=11)
    assert 0 < len(ours.train_dataset) == len(theirs.train_dataset) < 24
    for a, b in zip(theirs.train_dataset, ours.train_dataset, strict=True):
        assert (a["prompt_ids"] + a["KL_completion_ids"])[:11] == b["prompt_ids"] + b["rejected_ids"]
        assert (a["prompt_ids"] + a["completion_ids"])[:11] == b["prompt_ids"] + b["chosen_ids"]


def test_pairs_are_taken_apart(world: worlds.World, tmp_path: Path) -> None:
    theirs, ours = compare(world, worlds.pair_rows(10), tmp_path, per_device_train_batch_size=5, max_steps=4)
    assert ours.train_dataset["label"] == [1.0] * 10 + [0.0] * 10
    assert [bool(label) for label in ours.train_dataset["label"]] == list(theirs.train_dataset["label"])


def test_pairs_of_more_than_one_block_keep_trls_order(world: worlds.World, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} :", "chosen": f" a{n}", "rejected": f" b{n}"} for n in range(1003)]
    theirs, ours = (
        trainer(
            model=world.path,
            args=config(output_dir=str(tmp_path), **worlds.DEFAULTS),
            train_dataset=Dataset.from_list(rows),
            processing_class=world.tokenizer,
        )
        for trainer, config in classes()
    )
    assert ours.train_dataset["chosen_ids"][:] == theirs.train_dataset["completion_ids"][:]
    assert ours.train_dataset["rejected_ids"][:] == theirs.train_dataset["KL_completion_ids"][:]


def test_conversations(world: worlds.World, tmp_path: Path) -> None:
    world.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"].strip()}],
            "label": row["label"],
        }
        for row in worlds.unpaired_rows(20)
    ]
    compare(world, rows, tmp_path)


def test_real_rows(preference_files: Path, tmp_path: Path) -> None:
    rows = hh_rows(preference_files)[:20]
    unpaired = [
        {"prompt": row["prompt"], "completion": row["chosen" if n % 2 else "rejected"], "label": bool(n % 2)}
        for n, row in enumerate(rows)
    ]
    compare(Setting(tmp_path, rows), unpaired, tmp_path, max_length=512, learning_rate=1e-4)


def test_reference_that_follows_the_policy(world: worlds.World, tmp_path: Path) -> None:
    options: dict[str, Any] = {"sync_ref_model": True, "ref_model_sync_steps": 2}
    compare(world, worlds.unpaired_rows(20), tmp_path, **options)


def test_evaluation(world: worlds.World, tmp_path: Path) -> None:
    """On one batch, since TRL takes a baseline per batch, and the exchange among training-sized batches."""
    held_out = Dataset.from_list(worlds.unpaired_rows(8, seed=1))
    results = []
    for trainer_class, config_class in classes():
        trainer = worlds.train(
            trainer_class,
            config_class,
            tmp_path,
            world.path,
            world.tokenizer,
            Dataset.from_list(worlds.unpaired_rows(16)),
            max_steps=2,
            per_device_train_batch_size=8,
            precompute_ref_log_probs=False,
            **({} if trainer_class.__module__.startswith("trl") else {"reference_store": False}),
        )
        results.append(trainer.evaluate(held_out))
    for name in ("eval_loss", "eval_kl", "eval_rewards/chosen", "eval_logps/rejected", "eval_rewards/margins"):
        assert results[1][name] == pytest.approx(results[0][name], rel=TOLERANCE, abs=2e-5), name


def test_settings_have_trls_names_and_defaults() -> None:
    import dataclasses
    import inspect

    (trl_trainer, trl_config), (trainer, config) = classes()
    theirs = {f.name: f for f in dataclasses.fields(trl_config)}
    ours = {f.name: f for f in dataclasses.fields(config)}
    assert set(theirs) <= set(ours)
    for name, item in theirs.items():
        if name not in ("lr_scheduler_kwargs", "bf16"):
            assert ours[name].default == item.default, name
    assert list(inspect.signature(trainer).parameters) == list(inspect.signature(trl_trainer).parameters)
