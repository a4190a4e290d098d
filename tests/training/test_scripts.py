"""What scripts do around a trainer: hooks, patches, loops and folders of their own."""

from __future__ import annotations

import functools
import pickle
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

import preftune
from preftune import ConfigError
from preftune.training.batch import Batch
from tests.models.tiny import train_tokenizer
from tests.parity import worlds

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))


def dpo(world: worlds.World, out: Path, model: Any = None, library: Any = preftune, **more: Any) -> Any:
    given = {"train_dataset": Dataset.from_list(list(worlds.pair_rows(12)))}
    given |= {name: more.pop(name) for name in ("train_dataset", "eval_dataset", "callbacks") if name in more}
    settings = {**worlds.DEFAULTS, "max_steps": 3, **more}
    args = library.DPOConfig(output_dir=str(out), **settings)
    return library.DPOTrainer(model or world.path, args=args, processing_class=world.tokenizer, **given)


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


# ---- models that compute otherwise than their weights say ------------------------------------------------------------


def hooked(world: worlds.World) -> Any:
    model = AutoModelForCausalLM.from_pretrained(world.path)
    model.model.norm.register_forward_hook(lambda module, given, output: output * 0.5)
    return model


def scaled(world: worlds.World) -> Any:
    model = AutoModelForCausalLM.from_pretrained(world.path)
    for layer in model.model.layers:
        layer.self_attn.scaling *= 3.0
    return model


def plain(world: worlds.World) -> Any:
    return AutoModelForCausalLM.from_pretrained(world.path)


@pytest.mark.parametrize(("first", "second"), [(hooked, plain), (plain, hooked), (scaled, plain), (plain, scaled)])
def test_what_another_model_of_these_weights_has_stored_is_not_taken(
    world: worlds.World, tmp_path: Path, first: Any, second: Any
) -> None:
    dpo(world, tmp_path / "a", first(world)).train()
    trainer = dpo(world, tmp_path / "b", second(world))
    with pytest.warns(UserWarning, match="log-probs stored for this model differ by .* they are forgotten"):
        trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931472, abs=1e-5)
    alone = dpo(world, tmp_path / "c", second(world), reference_store=False)
    alone.train()
    assert losses(trainer) == pytest.approx(losses(alone), rel=1e-4)


@pytest.mark.filterwarnings("error:the log-probs stored")
def test_what_the_same_model_has_stored_is_taken(world: worlds.World, tmp_path: Path) -> None:
    dpo(world, tmp_path / "a").train()
    trainer = dpo(world, tmp_path / "b")
    trainer.train()
    assert trainer.reference.num_scored == 0
    assert trainer.reference.num_found > 0


# ---- losses of a script's own ----------------------------------------------------------------------------------------


def triple(self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
    return 3 * type(self).compute_loss(self, model, inputs)


def test_a_loss_put_into_a_trainer_is_refused(world: worlds.World, tmp_path: Path) -> None:
    trainer = dpo(world, tmp_path)
    trainer.compute_loss = types.MethodType(triple, trainer)
    with pytest.raises(ConfigError, match=r"compute_loss is overridden, and never called.*row_terms"):
        trainer.train()


@pytest.mark.parametrize("loss", [triple, functools.wraps(preftune.DPOTrainer.compute_loss)(lambda *given: None)])
def test_a_loss_put_into_the_class_is_refused(
    world: worlds.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: Any
) -> None:
    monkeypatch.setattr(preftune.DPOTrainer, "compute_loss", loss)
    with pytest.raises(ConfigError, match="DPOTrainer: compute_loss is overridden"):
        dpo(world, tmp_path)


@pytest.mark.parametrize("name", ["_prepare_inputs", "autocast_smart_context_manager", "_get_eval_sampler"])
def test_methods_that_nothing_calls_are_refused(world: worlds.World, tmp_path: Path, name: str) -> None:
    kind = type("Own", (preftune.DPOTrainer,), {name: lambda self, *given: None})
    with pytest.raises(ConfigError, match=f"Own: {name} is overridden"):
        kind(world.path, args=preftune.DPOConfig(output_dir=str(tmp_path), **worlds.DEFAULTS))


def test_a_loop_of_ones_own_is_trls(world: worlds.World, tmp_path: Path) -> None:
    found: list[list[float]] = []
    for library in (trl, preftune):
        trainer = dpo(world, tmp_path / library.__name__, library=library)
        trainer.create_optimizer_and_scheduler(num_training_steps=3)
        found.append([])
        for batch in trainer.get_train_dataloader():
            trainer.model.train()
            loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            found[-1].append(loss.item())
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert abs(found[1][1] - found[1][0]) > 1e-3


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_model_is_saved_where_a_script_says(world: worlds.World, tmp_path: Path) -> None:
    """A folder that holds another model: the next one to load it gets the new one, and the old one is not lost."""
    final = tmp_path / "final"
    AutoModelForCausalLM.from_pretrained(world.path).save_pretrained(final)
    (final / "notes.txt").write_text("mine", encoding="utf-8")
    before = load_file(final / "model.safetensors")
    trainer = dpo(world, tmp_path / "out")
    trainer.train()
    with pytest.warns(UserWarning, match="held the results of an earlier run.*they are now in"):
        trainer.save_model(str(final))
    now = AutoModelForCausalLM.from_pretrained(final).state_dict()
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(now[name], weight), name
    kept = load_file(final / "earlier-1" / "model.safetensors")
    assert all(torch.equal(kept[name], weight) for name, weight in before.items())
    assert (final / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_a_model_among_what_would_make_room_is_refused(world: worlds.World, tmp_path: Path) -> None:
    dpo(world, tmp_path, save_strategy="steps", save_steps=3).train()
    trainer = dpo(world, tmp_path, str(tmp_path / "checkpoint-3"))
    with pytest.raises(ConfigError, match=r"output_dir: the model was loaded from .*checkpoint-3, and what is there"):
        trainer.train()
    assert (tmp_path / "checkpoint-3" / "model.safetensors").is_file()


# ---- figures and settings --------------------------------------------------------------------------------------------


class WinRate(TrainerCallback):
    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics["eval_win_rate"] = float(state.global_step)


def test_the_best_model_by_a_figure_of_a_callback(world: worlds.World, tmp_path: Path) -> None:
    settings = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_win_rate", "greater_is_better": True,
    }  # fmt: skip
    held_out = Dataset.from_list(list(worlds.pair_rows(6, 1)))
    trainer = dpo(world, tmp_path, eval_dataset=held_out, callbacks=[WinRate()], **settings)
    trainer.train()
    assert trainer.state.best_metric == 3.0


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_what_train_returns(world: worlds.World, tmp_path: Path, strategy: str) -> None:
    theirs = dpo(world, tmp_path / "trl", library=trl, logging_strategy=strategy).train().metrics
    ours = dpo(world, tmp_path / "preftune", logging_strategy=strategy).train().metrics
    assert set(theirs) <= set(ours)
    assert ours["epoch"] == theirs["epoch"]


def test_settings_stay_the_callers(world: worlds.World, tmp_path: Path) -> None:
    rows = Dataset.from_list(list(worlds.pair_rows(12)))
    args: Any = preftune.DPOConfig(output_dir=str(tmp_path), **{**worlds.DEFAULTS, "max_steps": 3})
    before = args.to_dict()
    preftune.DPOTrainer(
        world.path, args=args, train_dataset=rows.to_iterable_dataset(), processing_class=world.tokenizer
    )
    assert args.to_dict() == before


def test_a_length_that_only_an_encoder_knows_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="max_completion_length has no effect"):
        preftune.ORPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_completion_length=64)


@pytest.mark.parametrize("restore", [True, False])
def test_callbacks_are_restored_as_they_were_made_where_asked_for(
    world: worlds.World, tmp_path: Path, restore: bool
) -> None:
    settings = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "max_steps": 2,
    }  # fmt: skip
    held_out = Dataset.from_list(list(worlds.pair_rows(6, 1)))
    first = EarlyStoppingCallback(early_stopping_patience=3, early_stopping_threshold=0.5)
    dpo(world, tmp_path, eval_dataset=held_out, callbacks=[first], **settings).train()
    second = EarlyStoppingCallback(early_stopping_patience=1)
    again = dpo(
        world, tmp_path, eval_dataset=held_out, callbacks=[second], restore_callback_states_from_checkpoint=restore,
        **settings,
    )  # fmt: skip
    again.train(resume_from_checkpoint=True)
    expected = (3, 0.5) if restore else (1, 0.0)
    assert (second.early_stopping_patience, second.early_stopping_threshold) == expected


# ---- a chat template with tokens of its own --------------------------------------------------------------------------


@pytest.fixture
def template(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer(["nice film"], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "template")
    return tmp_path / "template"


def chats() -> Iterator[dict[str, Any]]:
    for row in worlds.pair_rows(8):
        turns = (("user", row["prompt"]), ("assistant", row["chosen"]))
        yield {"messages": [{"role": role, "content": text} for role, text in turns]}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_template_brings_its_tokens(world: worlds.World, tmp_path: Path, template: Path) -> None:
    found = []
    for library in (trl, preftune):
        args = library.SFTConfig(
            output_dir=str(tmp_path / library.__name__), chat_template_path=str(template), **worlds.DEFAULTS
        )
        trainer = library.SFTTrainer(world.path, args=args, train_dataset=Dataset.from_list(list(chats())))
        ids = [list(row["input_ids"]) for row in trainer.train_dataset]
        rows = trainer.model.get_input_embeddings().weight.shape[0]
        found.append((trainer.processing_class.eos_token, rows, trainer.model.config.eos_token_id, ids))
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tokens_that_an_adapter_would_not_learn_are_refused(
    world: worlds.World, tmp_path: Path, template: Path
) -> None:
    from peft import LoraConfig

    args = preftune.SFTConfig(output_dir=str(tmp_path), chat_template_path=str(template), **worlds.DEFAULTS)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="chat_template_path: brings tokens that the model has no embeddings for"):
        preftune.SFTTrainer(world.path, args=args, train_dataset=Dataset.from_list(list(chats())), peft_config=lora)


def test_a_batch_says_that_it_holds_no_tensors() -> None:
    assert not hasattr(Batch(), "keys")
    with pytest.raises(AttributeError, match=r"no 'input_ids': it holds examples, .* see Batch\.examples"):
        Batch().input_ids  # noqa: B018
    assert pickle.loads(pickle.dumps(Batch([{}], [1]))).sizes == [1]
