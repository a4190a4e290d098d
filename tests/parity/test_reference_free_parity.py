"""ORPO, CPO, SimPO and AlphaPO against TRL's trainers: every figure of every step, and the final weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.data.conftest import make_tokenizer
from tests.models.tiny import tiny_model
from tests.parity import worlds
from tests.parity.conftest import hh_rows

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

TOLERANCE = 1e-4
FIGURES = (
    "loss",
    "grad_norm",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "nll_loss",
)
ORPO_FIGURES = (*FIGURES, "log_odds_ratio", "log_odds_chosen")
METHODS: dict[str, dict[str, Any]] = {
    "cpo": {},
    "cpo_smoothed": {"label_smoothing": 0.1, "beta": 0.3},
    "hinge": {"loss_type": "hinge", "beta": 0.05},
    "ipo": {"loss_type": "ipo"},
    "cpo_simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.3},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0},
    "alphapo": {"loss_type": "alphapo", "beta": 2.0, "alpha": 0.25},
    "ipo_reshaped": {"loss_type": "ipo", "alpha": -0.5},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


def classes(method: str) -> list[tuple[Any, Any]]:
    """Trainer and settings classes, TRL's first."""
    if method == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        import preftune

        return [(ORPOTrainer, ORPOConfig), (preftune.ORPOTrainer, preftune.ORPOConfig)]
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    import preftune

    return [(CPOTrainer, CPOConfig), (preftune.CPOTrainer, preftune.CPOConfig)]


def compare(method: str, world: Any, rows: list[Any], out: Path, names: tuple[str, ...], **options: Any) -> list[Any]:
    theirs, ours = (
        worlds.train(trainer, config, out, world.path, world.tokenizer, Dataset.from_list(rows), **options)
        for trainer, config in classes(method)
    )
    worlds.assert_same_logs(ours, theirs, names, TOLERANCE)
    worlds.assert_same_weights(ours, theirs, TOLERANCE)
    return [theirs, ours]


@pytest.mark.thin(1)
@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_orpo(world: worlds.World, tmp_path: Path, mode: str) -> None:
    (trl_trainer, trl_config), (trainer, config) = classes("orpo")
    rows = Dataset.from_list(worlds.pair_rows(20))
    place = (tmp_path, world.path, world.tokenizer, rows)
    theirs = worlds.train(trl_trainer, trl_config, *place, beta=0.25)
    ours = worlds.train(trainer, config, *place, beta=0.25, packing_mode=mode)
    assert ours.verdict.ok is (mode == "packed")
    worlds.assert_same_logs(ours, theirs, ORPO_FIGURES, TOLERANCE)
    worlds.assert_same_weights(ours, theirs, TOLERANCE)


@pytest.mark.thin(3)
@pytest.mark.parametrize("method", METHODS)
def test_cpo_and_its_losses(world: worlds.World, tmp_path: Path, method: str) -> None:
    options = METHODS[method]
    without = options.get("cpo_alpha") == 0.0 or method == "alphapo"
    # TRL logs 0 for a supervised term that it does not use; the likelihood is worth knowing all the same.
    names = tuple(name for name in FIGURES if not (without and name == "nll_loss"))
    compare("cpo", world, worlds.pair_rows(20), tmp_path, names, **options)


@pytest.mark.thin(1)
@pytest.mark.parametrize("method", ["orpo", "cpo"])
def test_truncation(world: worlds.World, tmp_path: Path, method: str) -> None:
    """No prompt fills the length, so that TRL's average is one over some tokens."""
    rows = [row for row in worlds.pair_rows(60) if len(world.tokenizer(row["prompt"])["input_ids"]) < 14][:20]
    names = ORPO_FIGURES if method == "orpo" else FIGURES
    theirs, ours = compare(method, world, rows, tmp_path, names, max_length=16)
    assert any(len(row["chosen_input_ids"]) == 16 for row in theirs.train_dataset)
    assert max(len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in ours.train_dataset) == 16


@pytest.mark.thin(1)
@pytest.mark.parametrize("method", ["orpo", "cpo"])
def test_conversations(world: worlds.World, tmp_path: Path, method: str) -> None:
    """The template ends turns with a line end; TRL puts the end-of-sequence token behind it."""
    template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    world.tokenizer.chat_template = template
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
            "rejected": [{"role": "assistant", "content": row["rejected"].strip()}],
        }
        for row in worlds.pair_rows(20)
    ]
    theirs, ours = compare(method, world, rows, tmp_path, FIGURES)
    eos, bos = world.tokenizer.eos_token_id, world.tokenizer.bos_token_id
    for a, b in zip(theirs.train_dataset, ours.train_dataset, strict=True):
        assert a["chosen_input_ids"] == b["prompt_ids"] + b["chosen_ids"]
        assert b["prompt_ids"][0] == bos
        assert b["chosen_ids"][-1] == eos


@pytest.mark.thin(1)
@pytest.mark.parametrize("method", ["orpo", "cpo"])
def test_prompts_that_end_with_the_begin_of_an_answer(world: worlds.World, tmp_path: Path, method: str) -> None:
    world.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "it was"}],
            "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
            "rejected": [{"role": "assistant", "content": row["rejected"].strip()}],
        }
        for row in worlds.pair_rows(20)
    ]
    theirs, ours = compare(method, world, rows, tmp_path, FIGURES)
    for a, b in zip(theirs.train_dataset, ours.train_dataset, strict=True):
        assert a["chosen_input_ids"] == b["prompt_ids"] + b["chosen_ids"]


@pytest.mark.thin(1)
@pytest.mark.parametrize("method", ["orpo", "cpo"])
def test_a_tokenizer_that_ends_texts_itself(tmp_path: Path, method: str) -> None:
    from tokenizers import processors

    own = worlds.World(tmp_path / "own")
    eos, number = own.tokenizer.eos_token, own.tokenizer.eos_token_id
    own.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", pair=f"$A {eos} $B {eos}", special_tokens=[(eos, number)]
    )
    assert own.tokenizer("the a")["input_ids"][-1] == number
    theirs, ours = compare(method, own, worlds.pair_rows(20), tmp_path, FIGURES)
    for a, b in zip(theirs.train_dataset, ours.train_dataset, strict=True):
        assert a["chosen_input_ids"] == b["prompt_ids"] + b["chosen_ids"]


@pytest.mark.thin(1)
@pytest.mark.parametrize("method", ["orpo", "cpo"])
def test_real_rows(preference_files: Path, tmp_path: Path, method: str) -> None:
    from tests.parity.conftest import Setting

    rows = hh_rows(preference_files)[:20]
    setting = Setting(tmp_path, rows)
    names = ORPO_FIGURES if method == "orpo" else FIGURES
    compare(method, setting, rows, tmp_path, names, max_length=512, learning_rate=1e-4)


@pytest.mark.thin(1)
@pytest.mark.parametrize("method", ["orpo", "cpo"])
def test_evaluation(world: worlds.World, tmp_path: Path, method: str) -> None:
    """On one batch, since TRL's supervised term is a mean of batch means."""
    held_out = Dataset.from_list(worlds.pair_rows(8, seed=1))
    results = []
    for trainer_class, config_class in classes(method):
        args = config_class(output_dir=str(tmp_path), **worlds.DEFAULTS)
        trainer = trainer_class(
            model=world.path,
            args=args,
            train_dataset=held_out,
            eval_dataset=held_out,
            processing_class=world.tokenizer,
        )
        results.append(trainer.evaluate())
        results[-1] |= trainer.state.log_history[-1]
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen", "eval_nll_loss"):
        assert results[1][name] == pytest.approx(results[0][name], rel=TOLERANCE, abs=1e-6), name


def test_accumulation_is_one_batch_where_trl_averages_means(world: worlds.World, tmp_path: Path) -> None:
    """A deliberate difference: tokens weigh the same in whatever micro-batch they come."""
    rows = worlds.pair_rows(16)
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2}
    whole = {"per_device_train_batch_size": 8, "max_steps": 2}
    (trl_trainer, trl_config), (trainer, config) = classes("orpo")
    results = {
        name: worlds.train(t, c, tmp_path / name, world.path, world.tokenizer, Dataset.from_list(rows), **options)
        for name, t, c, options in (
            ("trl whole", trl_trainer, trl_config, whole),
            ("trl split", trl_trainer, trl_config, split),
            ("ours whole", trainer, config, whole),
            ("ours split", trainer, config, split),
        )
    }
    first = {name: worlds.log_lines(result)[0]["loss"] for name, result in results.items()}
    assert first["ours split"] == pytest.approx(first["ours whole"], rel=1e-6)
    assert first["ours whole"] == pytest.approx(first["trl whole"], rel=TOLERANCE)
    assert abs(first["trl split"] - first["trl whole"]) > 2 * TOLERANCE * abs(first["trl whole"])


def test_a_prompt_that_fills_the_length_is_dropped_where_trl_has_no_number(world: worlds.World, tmp_path: Path) -> None:
    rows = [*worlds.pair_rows(7), {"prompt": "the film " * 20 + ":", "chosen": " good", "rejected": " bad"}]
    options = {"max_length": 30, "max_steps": 1, "per_device_train_batch_size": 8}
    theirs, ours = (
        worlds.train(t, c, tmp_path, world.path, world.tokenizer, Dataset.from_list(rows), **options)
        for t, c in classes("orpo")
    )
    assert not torch.isfinite(torch.tensor(worlds.log_lines(theirs)[0]["logps/chosen"]))
    assert torch.isfinite(torch.tensor(worlds.log_lines(ours)[0]["logps/chosen"]))
    assert ours.reports["train"].dropped == {"prompt_fills_max_length": 1}


def trl_row(tokenizer: Any, row: dict[str, str]) -> dict[str, list[int]]:
    """A row as TRL's ORPO trainer tokenises it; its CPO trainer has the same code."""
    from trl.experimental.orpo import ORPOTrainer

    oracle: Any = SimpleNamespace(processing_class=tokenizer, is_encoder_decoder=False, max_length=99)
    oracle.build_tokenized_answer = lambda *texts: ORPOTrainer.build_tokenized_answer(oracle, *texts)
    found: dict[str, list[int]] = ORPOTrainer.tokenize_row(oracle, row)
    return found


def ours_prepared(tokenizer: Any, rows: list[dict[str, str]], out: Path) -> Any:
    import preftune

    trainer = preftune.ORPOTrainer(
        model=tiny_model("LlamaConfig", len(tokenizer)),
        args=preftune.ORPOConfig(output_dir=str(out), **worlds.DEFAULTS),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return trainer.train_dataset


@pytest.mark.parametrize(("adds_bos", "bos"), [(False, "<s>"), (True, "<s>"), (False, None)])
def test_sequences_begin_and_end_as_trls(tmp_path: Path, adds_bos: bool, bos: str | None) -> None:
    """Against TRL's own tokenisation of a row, also for answers that carry the end-of-sequence token already."""
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    tokenizer.bos_token = bos
    rows = [
        {"prompt": "the cat", "chosen": " sat on a mat", "rejected": " was bright"},
        {"prompt": "the sky", "chosen": " bark</s>", "rejected": " no"},
        {"prompt": "", "chosen": "yes yes", "rejected": "no no"},
    ]
    ours_all = ours_prepared(tokenizer, rows, tmp_path)
    for row, ours in zip(rows, ours_all, strict=True):
        theirs = trl_row(tokenizer, row)
        for side in ("chosen", "rejected"):
            assert ours["prompt_ids"] + ours[f"{side}_ids"] == theirs[f"{side}_input_ids"]
            scored = [label for label in theirs[f"{side}_labels"] if label != -100]
            assert ours[f"{side}_ids"] == scored


def test_a_token_merged_in_one_answer_is_scored_in_both(tmp_path: Path) -> None:
    """A deliberate difference: TRL then begins one completion a token later than the other."""
    tokenizer = make_tokenizer()
    row = {"prompt": "dogs ", "chosen": "bark", "rejected": "!"}
    theirs = trl_row(tokenizer, row)
    ours_all = ours_prepared(tokenizer, [row], tmp_path)
    ours = ours_all[0]
    assert ours["prompt_ids"] + ours["rejected_ids"] == theirs["rejected_input_ids"]
    scored = [label for label in theirs["rejected_labels"] if label != -100]
    assert len(ours["rejected_ids"]) > len(scored)
    assert ours["rejected_ids"][-len(scored) :] == scored


@pytest.mark.parametrize("method", ["orpo", "cpo"])
def test_settings_have_trls_names_and_defaults(method: str) -> None:
    """But for those of transformers itself, and the learning-rate keywords and bf16 that depend on the machine."""
    import dataclasses
    import inspect

    (trl_trainer, trl_config), (trainer, config) = classes(method)
    theirs = {f.name: f for f in dataclasses.fields(trl_config)}
    ours = {f.name: f for f in dataclasses.fields(config)}
    assert set(theirs) <= set(ours)
    for name, item in theirs.items():
        if name not in ("lr_scheduler_kwargs", "bf16"):
            assert ours[name].default == item.default, name
    assert list(inspect.signature(trainer).parameters) == list(inspect.signature(trl_trainer).parameters)
