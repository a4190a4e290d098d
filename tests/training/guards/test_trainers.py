"""Guards and samples inside real trainings: what they leave behind, what they do not touch, and resuming."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from preftune import (
    ConfigError,
    CPOConfig,
    CPOTrainer,
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    ORPOConfig,
    ORPOTrainer,
    SFTConfig,
    SFTTrainer,
)
from preftune.training.guards import GUARD_NAMES, Guards, find_guards
from tests.parity import worlds

CLASSES: dict[str, tuple[Any, Any]] = {
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "cpo": (CPOTrainer, CPOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
    "sft": (SFTTrainer, SFTConfig),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


def build(world: worlds.World, verb: str, out: Path, num: int = 24, **options: Any) -> Any:
    trainer_class, config_class = CLASSES[verb]
    rows: dict[str, Any] = {"kto": worlds.unpaired_rows, "sft": lambda n, s=0: _sft_rows(n, s)}
    make = rows.get(verb, worlds.pair_rows)
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    args = config_class(output_dir=str(out), **{**worlds.DEFAULTS, **evaluated, **options})
    trainer = trainer_class(
        model=world.path,
        args=args,
        train_dataset=Dataset.from_list(make(num)),
        eval_dataset=Dataset.from_list(make(40, 1)),
        processing_class=world.tokenizer,
    )
    found = find_guards(trainer)
    if found is not None:
        found.say = lambda line: None
    return trainer


def _sft_rows(number: int, seed: int) -> list[dict[str, str]]:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in worlds.pair_rows(number, seed)]


def guards_of(trainer: Any) -> Guards:
    found = find_guards(trainer)
    assert found is not None
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


SAMPLED: dict[str, Any] = {"generation_steps": 2, "num_generations": 6, "generation_max_new_tokens": 8}
#: A rate at which the tiny model falls apart at once.
WILD: dict[str, Any] = {"learning_rate": 0.1, "max_steps": 8}


@pytest.mark.thin(1)
@pytest.mark.parametrize("verb", ["dpo", "kto", "cpo", "orpo"])
def test_samples_and_guards_change_no_bit_of_the_training(world: worlds.World, tmp_path: Path, verb: str) -> None:
    plain = build(world, verb, tmp_path / "plain", guards="off")
    assert find_guards(plain) is None
    watched = build(world, verb, tmp_path / "watched", **SAMPLED)
    for trainer in (plain, watched):
        trainer.train()
    for (name, mine), (_, other) in zip(watched.model.named_parameters(), plain.model.named_parameters(), strict=True):
        assert torch.equal(mine, other), name
    kept = [
        [{k: v for k, v in line.items() if "runtime" not in k and "per_second" not in k} for line in part]
        for part in (worlds.log_lines(watched), worlds.log_lines(plain))
    ]
    assert [{k: v for k, v in line.items() if not k.startswith("guards/")} for line in kept[0]] == kept[1]
    samples = lines(tmp_path / "watched" / "samples.jsonl")
    assert [line["step"] for line in samples[::6]] == [0, 2, 4, 5]
    drawn = [line for line in watched.state.log_history if "generation/kl" in line]
    assert [line["step"] for line in drawn] == [0, 2, 4, 5]
    assert drawn[0]["generation/kl"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_samples_are_scored_as_a_slow_computation_scores_them(world: worlds.World, tmp_path: Path, peft: bool) -> None:
    """Log-probs of the samples from the models' own logits, one text at a time, in fp64."""
    from peft import LoraConfig

    trainer = DPOTrainer(
        model=world.path,
        args=DPOConfig(str(tmp_path), **{**worlds.DEFAULTS, "learning_rate": 1e-2, **SAMPLED}),
        train_dataset=Dataset.from_list(worlds.pair_rows(24)),
        processing_class=world.tokenizer,
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM") if peft else None,
    )
    drawn: list[Any] = []
    generations: Any = trainer.generations
    draw = generations._draw

    def noted(model: Any) -> Any:
        drawn.append(draw(model))
        return drawn[-1]

    generations._draw = noted
    trainer.train()
    records = [line for line in lines(tmp_path / "samples.jsonl") if line["step"] == 5]
    reference = AutoModelForCausalLM.from_pretrained(world.path).double().eval()
    policy = trainer.model.double().eval()
    assert len(records) == len(drawn[-1]) == 6
    for record, sample in zip(records, drawn[-1], strict=True):
        prompt, answer = sample.prompt_ids, sample.token_ids
        assert (record["completion"], record["num_tokens"]) == (sample.text, len(answer))
        for model, name in ((policy, "logp"), (reference, "ref_logp")):
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            total = float(logits.log_softmax(-1)[range(len(answer)), answer].detach().sum())
            assert record[name] == pytest.approx(total, abs=1e-3)
        p = logits.softmax(-1).detach()  # of the reference, the last of the two
        far = [float(row[row <= row[token]].sum()) <= 0.01 for row, token in zip(p, answer, strict=True)]
        assert record["tail_share"] == pytest.approx(sum(far) / len(far))
    assert any(abs(record["logp"] - record["ref_logp"]) > 0.1 for record in records)
    logged = next(line for line in trainer.state.log_history if line["step"] == 5 and "generation/kl" in line)
    assert logged["generation/tail_share"] == pytest.approx(sum(r["tail_share"] for r in records) / len(records))
    by_hand = sum(record["logp"] - record["ref_logp"] for record in records) / len(records)
    assert logged["generation/kl"] == pytest.approx(by_hand)


def test_alarms_are_told_everywhere(world: worlds.World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(world, "dpo", tmp_path, **WILD, **SAMPLED)
    said: list[str] = []
    guards_of(trainer).say = said.append
    trainer.train()
    alarms = lines(tmp_path / "alarms.jsonl")
    assert alarms
    fields = {"guard", "step", "epoch", "action", "message", "evidence", "cause", "remedy", "source", "threshold_kind"}
    for alarm in alarms:
        assert fields | {"time"} <= set(alarm)
        assert alarm["guard"] in GUARD_NAMES
        assert alarm["action"] == "warn"
        assert alarm["threshold_kind"] in ("published", "heuristic")
        assert alarm["evidence"]
    assert len(said) == len(alarms)
    for alarm, line in zip(alarms, said, strict=True):
        assert alarm["guard"] in line
        assert alarm["remedy"] in line
    logged = {
        (line["step"], name.removeprefix("guards/"))
        for line in trainer.state.log_history
        for name in line
        if name.startswith("guards/") and name != "guards/alarms"
    }
    assert logged == {(alarm["step"], alarm["guard"]) for alarm in alarms}
    summary = "\n".join(guards_of(trainer).summary())
    assert all(alarm["guard"] in summary for alarm in alarms)


def test_stop_ends_the_training_with_a_checkpoint(world: worlds.World, tmp_path: Path) -> None:
    trainer = build(world, "dpo", tmp_path, **WILD, **SAMPLED, save_strategy="steps", guards="stop")
    trainer.train()
    first = lines(tmp_path / "alarms.jsonl")[0]
    assert first["action"] == "stop"
    assert trainer.state.global_step == first["step"] < 8
    assert (tmp_path / f"checkpoint-{first['step']}").is_dir()


@pytest.mark.thin(1)
@pytest.mark.parametrize("restore", [False, True], ids=["ours", "by transformers"])
@pytest.mark.parametrize("verb", ["dpo", "cpo"])
def test_a_resumed_run_says_what_an_uninterrupted_one_says(
    world: worlds.World, tmp_path: Path, verb: str, restore: bool
) -> None:
    options: dict[str, Any] = {**WILD, **SAMPLED, "save_strategy": "steps", "save_steps": 3, "save_total_limit": None}
    whole = build(world, verb, tmp_path, **options)
    whole.train()
    told, drawn = lines(tmp_path / "alarms.jsonl"), lines(tmp_path / "samples.jsonl")
    assert any(alarm["step"] > 3 for alarm in told) or verb == "cpo"
    again = build(world, verb, tmp_path, **options, restore_callback_states_from_checkpoint=restore)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for alarm in (*told, *(found := lines(tmp_path / "alarms.jsonl"))):
        alarm.pop("time")
    assert found == told
    assert lines(tmp_path / "samples.jsonl") == drawn
    kept = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text(encoding="utf-8"))
    assert set(kept["stateful_callbacks"]["Guards"]) == {"args", "attributes"}


def test_a_new_run_in_the_same_folder_begins_anew(world: worlds.World, tmp_path: Path) -> None:
    build(world, "dpo", tmp_path, **WILD).train()
    assert lines(tmp_path / "alarms.jsonl")
    with pytest.warns(UserWarning, match="held the results of an earlier run"):
        build(world, "dpo", tmp_path, learning_rate=1e-6).train()
    assert lines(tmp_path / "alarms.jsonl") == []
    assert lines(tmp_path / "earlier-1" / "alarms.jsonl")


def test_not_a_number_is_told_by_every_trainer(world: worlds.World, tmp_path: Path) -> None:
    for verb in ("sft", "orpo"):
        trainer = build(world, verb, tmp_path / verb, guards={"default": "off", "non_finite": "warn"})
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(math.nan)
        # Other safeguards may stop such a run; the guard has spoken by then.
        with contextlib.suppress(Exception):
            trainer.train()
        assert [alarm["guard"] for alarm in lines(tmp_path / verb / "alarms.jsonl")][:1] == ["non_finite"]


def test_guards_that_will_see_nothing_say_so(world: worlds.World, tmp_path: Path) -> None:
    blind: dict[str, Any] = {"eval_strategy": "no", "eval_on_start": False}
    with pytest.warns(UserWarning, match=r"guards\.overfitting has no effect: nothing is evaluated"):
        trainer = build(world, "dpo", tmp_path, guards={"overfitting": "stop"}, **blind)
    summary = "\n".join(guards_of(trainer).summary())
    assert "not watched: over_optimisation: nothing is sampled" in summary
    with pytest.raises(ConfigError, match=r"guards\.overfitting"):
        build(world, "sft", tmp_path, guards={"overfitting": "stop"})


def test_several_sets_of_held_out_data_are_watched_apart(world: worlds.World, tmp_path: Path) -> None:
    args = DPOConfig(str(tmp_path), **{**worlds.DEFAULTS, **WILD, "eval_strategy": "steps", "eval_steps": 4})
    trainer = DPOTrainer(
        model=world.path,
        args=args,
        train_dataset=Dataset.from_list(worlds.pair_rows(24)),
        eval_dataset={name: Dataset.from_list(worlds.pair_rows(40, seed)) for seed, name in enumerate("ab", 1)},
        processing_class=world.tokenizer,
    )
    guards_of(trainer).say = lambda line: None
    trainer.train()
    memory = guards_of(trainer).memory["guards"]
    assert set(memory) == {"", "eval_a", "eval_b"}
    assert memory["eval_a"]["overfitting"]["memory"]["pairs"] != memory["eval_b"]["overfitting"]["memory"]["pairs"]
