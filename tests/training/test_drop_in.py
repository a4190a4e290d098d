"""What scripts do around a trainer of the same name in TRL: adapters, frozen models, searches, attributes."""

from __future__ import annotations

import copy
import importlib
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import preftune
from preftune import ConfigError, ModelError
from preftune.config.model import ModelConfig
from preftune.models.loading import peft_config_from
from tests.models.tiny import tiny_model
from tests.parity import worlds
from tests.training.test_trl_habits import make, rows_of

KINDS = ["DPO", "SFT", "KTO", "ORPO", "CPO"]
pytestmark = [
    # KTO's advice on weights, for data of a few rows.
    pytest.mark.filterwarnings("ignore:lambda_D:UserWarning"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


def data_of(kind: str, number: int = 8, seed: int = 0) -> Dataset:
    return Dataset.from_list(rows_of(kind if kind in ("SFT", "KTO") else "DPO", number, seed))


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options})


@pytest.fixture(scope="module")
def adapter(world: worlds.World, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an adapter that changes the model's output."""
    folder = str(tmp_path_factory.mktemp("adapter"))
    torch.manual_seed(3)
    model = get_peft_model(base(world), lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def base(world: worlds.World) -> Any:
    return AutoModelForCausalLM.from_pretrained(world.path)


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in worlds.log_lines(trainer)]


# ---- adapters however they are loaded -------------------------------------------------------------------------------


def loaded(world: worlds.World, adapter: str, how: str) -> Any:
    if how == "folder":
        return adapter
    if how == "AutoModel":
        return AutoModelForCausalLM.from_pretrained(adapter)
    if how == "load_adapter":
        model = base(world)
        model.load_adapter(adapter, adapter_name="mine")
        return model
    return PeftModel.from_pretrained(base(world), adapter, is_trainable=True)


@pytest.mark.thin(1)
@pytest.mark.filterwarnings("ignore:the adapter .* is trained:UserWarning")
@pytest.mark.parametrize("how", ["folder", "AutoModel", "load_adapter"])
@pytest.mark.parametrize("kind", ["DPO", "SFT", "KTO"])
def test_an_adapter_goes_on_training_however_it_was_loaded(
    world: worlds.World, adapter: str, tmp_path: Path, kind: str, how: str
) -> None:
    trainers = [
        make(preftune, kind, world, tmp_path / way, data_of(kind), model=loaded(world, adapter, way), max_steps=3)
        for way in ("PeftModel", how)
    ]
    for trainer in trainers:
        trainer.train()
    if kind == "DPO":
        assert losses(trainers[1])[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(trainers[1]) == pytest.approx(losses(trainers[0]), rel=1e-6)
    # The adapter has moved, the base model has not, and what is saved is the adapter.
    whole = base(world).state_dict()
    for name, value in trainers[1].model.get_base_model().state_dict().items():
        if "lora" not in name:
            assert torch.equal(value, whole[name.replace(".base_layer", "")]), name
    trainers[1].save_model(str(tmp_path / "saved"))
    # PEFT saves an adapter with a name into a folder of it.
    saved = tmp_path / "saved" / ("mine" if how == "load_adapter" else "")
    assert (saved / "adapter_model.safetensors").is_file()
    again = PeftModel.from_pretrained(base(world), str(saved))
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(again(ids).logits, trainers[1].model.eval()(ids).logits, atol=1e-5)


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    "options", [{}, {"target_modules": "all-linear"}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}]
)
def test_add_adapter_is_get_peft_model(world: worlds.World, tmp_path: Path, options: dict[str, Any]) -> None:
    models = []
    for own in (True, False):
        model = base(world)
        torch.manual_seed(4)
        if own:
            model.add_adapter(lora(**options))
        else:
            model = get_peft_model(model, lora(**options))
        models.append(model)
    found = []
    for number, model in enumerate(models):
        trainer = make(preftune, "DPO", world, tmp_path / str(number), data_of("DPO"), model=model, max_steps=3)
        trainer.train()
        found.append(losses(trainer))
    assert found[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][2] < found[0][0] - 1e-3


# PEFT's own, which pytest.warns gives out once more.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_what_is_trained_is_told_where_it_changes(world: worlds.World, adapter: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(adapter)
    with pytest.warns(UserWarning, match="the adapter default is trained and the base model is not"):
        trainer = make(preftune, "DPO", world, tmp_path, data_of("DPO"), model=model)
    assert all(("lora" in name) == p.requires_grad for name, p in trainer.model.named_parameters())


@pytest.mark.filterwarnings("ignore:the adapter .* is trained:UserWarning")
@pytest.mark.parametrize("how", ["AutoModel", "PeftModel"])
def test_a_second_adapter_on_top_is_refused(world: worlds.World, adapter: str, tmp_path: Path, how: str) -> None:
    args = preftune.DPOConfig(str(tmp_path), **worlds.DEFAULTS)
    model, data = loaded(world, adapter, how), data_of("DPO")
    with pytest.raises(ConfigError, match="already carries an adapter"):
        preftune.DPOTrainer(model, args=args, train_dataset=data, processing_class=world.tokenizer, peft_config=lora())


def test_modules_that_do_not_exist_are_told_with_the_remedy(world: worlds.World, tmp_path: Path) -> None:
    args = preftune.DPOConfig(str(tmp_path), **worlds.DEFAULTS)
    wrong = lora(target_modules="q_proj,v_proj")
    with pytest.raises(ConfigError, match=r"peft_config: .*q_proj,v_proj.*several are a list"):
        preftune.DPOTrainer(
            world.path, args=args, train_dataset=data_of("DPO"), processing_class=world.tokenizer, peft_config=wrong
        )


# ---- runs that cannot learn -----------------------------------------------------------------------------------------


def nothing_trained(world: worlds.World, adapter: str, how: str) -> Any:
    model = base(world)
    if how == "frozen":
        return model.requires_grad_(False)
    model = PeftModel.from_pretrained(model, adapter)
    if how == "idle":
        model.load_adapter(adapter, "other", is_trainable=True)
    return model


@pytest.mark.parametrize("how", ["inference", "frozen", "idle"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:default is trained, and of the model's other adapters:UserWarning")
def test_a_run_that_cannot_learn_is_refused(
    world: worlds.World, adapter: str, tmp_path: Path, kind: str, how: str
) -> None:
    model = nothing_trained(world, adapter, how)
    trainer = make(preftune, kind, world, tmp_path, data_of(kind), model=model)
    remedy = "requires_grad_" if how == "frozen" else "is_trainable=True"
    with pytest.raises(ModelError, match=f"model: .*{remedy}"):
        trainer.train()
    # Only its training is of no use.
    assert "eval_loss" in trainer.evaluate(data_of(kind, 4, 1))


# ---- the best model's metric ----------------------------------------------------------------------------------------


def evaluating(
    kind: str, world: worlds.World, out: Path, held_out: Any, metric: str | None, compute: Any = None, **more: Any
) -> Any:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 1}
    options = {**worlds.DEFAULTS, **best, "eval_steps": 1, "max_steps": 2, "metric_for_best_model": metric, **more}
    keywords: dict[str, Any] = {} if compute is None else {"compute_metrics": compute}
    config, trainer = getattr(preftune, f"{kind}Config"), getattr(preftune, f"{kind}Trainer")
    return trainer(
        model=world.path,
        args=config(str(out), **options),
        train_dataset=data_of(kind),
        eval_dataset=held_out,
        processing_class=world.tokenizer,
        **keywords,
    )


@pytest.mark.parametrize(
    ("kind", "metric", "said"),
    [
        ("DPO", "rewards/accuracy", r"allowed: .*eval_rewards/accuracies.*did you mean eval_rewards/accuracies\?"),
        ("DPO", "eval_los", r"did you mean eval_loss\?"),
        ("SFT", "eval_mean_token_acuracy", r"did you mean eval_mean_token_accuracy\?"),
        ("KTO", "rewards/margin", r"did you mean eval_rewards/margins\?"),
        ("ORPO", "nll", r"did you mean eval_nll_loss\?"),
        ("CPO", "accuracy", "metric_for_best_model: no evaluation has this figure"),
    ],
)
def test_a_metric_that_no_evaluation_has_is_refused_before_training(
    world: worlds.World, tmp_path: Path, kind: str, metric: str, said: str
) -> None:
    trainer = evaluating(kind, world, tmp_path, data_of(kind, 6, 1), metric)
    with pytest.raises(ConfigError, match=said):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("metric", [None, "loss", "eval_rewards/margins"])
def test_of_several_sets_one_has_to_be_named(world: worlds.World, tmp_path: Path, metric: str | None) -> None:
    held_out = {"a": data_of("DPO", 4, 1), "b": data_of("DPO", 4, 2)}
    trainer = evaluating("DPO", world, tmp_path, held_out, metric)
    with pytest.raises(ConfigError, match=r"each of several a set's own.*eval_a_loss.*eval_b_rewards/margins"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    ("kind", "metric", "named"),
    [
        ("DPO", "loss", False),
        ("DPO", "rewards/accuracies", False),
        ("DPO", "eval_b_loss", True),
        ("DPO", "b_rewards/chosen", True),
        ("KTO", "rewards/rejected", False),
        ("SFT", "eval_entropy", False),
    ],
)
def test_metrics_that_exist_are_taken(world: worlds.World, tmp_path: Path, kind: str, metric: str, named: bool) -> None:
    held_out: Any = data_of(kind, 6, 1)
    trainer = evaluating(kind, world, tmp_path, {"a": held_out, "b": held_out} if named else held_out, metric)
    trainer.train()
    assert trainer.state.best_metric is not None


def test_metrics_of_the_users_own(world: worlds.World, tmp_path: Path) -> None:
    def compute(prediction: Any) -> dict[str, float]:
        return {"own": float(len(prediction.predictions))}

    def whole(prediction: Any) -> dict[str, float]:
        assert len(prediction.predictions) == 12
        return {"own": 1.0}

    held_out = data_of("DPO", 12, 1)
    trainer = evaluating("DPO", world, tmp_path / "a", held_out, "own", compute)
    trainer.train()
    assert trainer.state.best_metric == 12.0
    with pytest.raises(ConfigError, match=r"did you mean eval_own\?"):
        evaluating("DPO", world, tmp_path / "b", held_out, "own_one", compute).train()
    # It does not take a few rows, which is its own affair.
    evaluating("DPO", world, tmp_path / "c", held_out, "own", whole).train()


def test_looking_for_a_metric_changes_no_number(world: worlds.World, tmp_path: Path) -> None:
    logs = []
    for metric in ("loss", "rewards/margins"):
        out, held_out = tmp_path / metric, data_of("DPO", 6, 1)
        trainer = evaluating("DPO", world, out, held_out, metric, load_best_model_at_end=False)
        trainer.train()
        timed = ("runtime", "per_second")
        logs.append([{k: v for k, v in x.items() if not k.endswith(timed)} for x in trainer.state.log_history])
    assert logs[0] == logs[1]


# ---- searches, and what is changed after the trainer was made -------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_of_transformers_is_refused_at_once(world: worlds.World, tmp_path: Path, kind: str) -> None:
    trainer = make(preftune, kind, world, tmp_path, data_of(kind))
    with pytest.raises(ConfigError, match=r"hyperparameter_search: not available.*preftune sweep"):
        trainer.hyperparameter_search(hp_space=lambda trial: {"beta": 0.3}, n_trials=2, direction="minimize")
    trainer.model_init = lambda: base(world)
    with pytest.raises(ConfigError, match="model_init: another model"):
        trainer.train()
    trainer.model_init = None
    with pytest.raises(ConfigError, match="trial: another model"):
        trainer.train(trial={"learning_rate": 1.0})
    trainer.model = base(world)
    with pytest.raises(ConfigError, match=r"trainer\.model: it was replaced"):
        trainer.train()


@pytest.mark.thin(1)
@pytest.mark.parametrize("kind", ["ORPO", "CPO"])
@pytest.mark.parametrize("form", ["none", "trial", "nothing"])
def test_model_init_makes_the_model(world: worlds.World, tmp_path: Path, kind: str, form: str) -> None:
    makers: dict[str, Any] = {"none": lambda: base(world), "trial": lambda trial: base(world), "nothing": lambda: None}
    args = getattr(preftune, f"{kind}Config")(str(tmp_path), **{**worlds.DEFAULTS, "max_steps": 2})
    given = {"args": args, "train_dataset": data_of(kind), "processing_class": world.tokenizer}
    trainer_class = getattr(preftune, f"{kind}Trainer")
    if form == "nothing":
        with pytest.raises(ConfigError, match="model_init: returned no model"):
            trainer_class(model_init=makers[form], **given)
        return
    trainer = trainer_class(model_init=makers[form], **given)
    trainer.train()
    plain = make(preftune, kind, world, tmp_path / "plain", data_of(kind), max_steps=2)
    plain.train()
    assert losses(trainer) == losses(plain)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("DPO", "beta", 0.5),
        ("DPO", "loss_type", ["ipo"]),
        ("KTO", "desirable_weight", 2.0),
        ("CPO", "simpo_gamma", 1.0),
    ],
)
def test_settings_that_would_not_act_any_more_are_refused(
    world: worlds.World, tmp_path: Path, kind: str, name: str, value: Any
) -> None:
    trainer = make(preftune, kind, world, tmp_path, data_of(kind))
    with pytest.raises(ConfigError, match=rf"trainer\.{name}: is read when the trainer is made"):
        setattr(trainer, name, value)
    setattr(trainer.args, name, value)
    with pytest.raises(ConfigError, match=rf"args\.{name}: was .* when the trainer was made"):
        trainer.train()


def test_a_list_that_is_changed_in_place_counts_as_changed(world: worlds.World, tmp_path: Path) -> None:
    trainer = make(preftune, "DPO", world, tmp_path, data_of("DPO"), loss_type=["sigmoid"])
    trainer.args.loss_type[0] = "ipo"
    with pytest.raises(ConfigError, match=r"args\.loss_type"):
        trainer.train()


# ---- predict --------------------------------------------------------------------------------------------------------


@pytest.mark.thin(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["rows", "stream", "own"])
def test_predict_takes_what_evaluate_takes(world: worlds.World, tmp_path: Path, kind: str, form: str) -> None:
    trainer = make(preftune, kind, world, tmp_path, data_of(kind), max_steps=2)
    trainer.train()
    raw = data_of(kind, 6, 1)
    given = {"rows": raw, "stream": raw.to_iterable_dataset(), "own": trainer.train_dataset}[form]
    expected = trainer.evaluate(given)
    found = trainer.predict(given).metrics
    assert found["test_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)


def test_predict_of_raw_rows_gives_rewards(world: worlds.World, tmp_path: Path) -> None:
    trainer = preftune.DPOTrainer(
        world.path,
        args=preftune.DPOConfig(str(tmp_path), **{**worlds.DEFAULTS, "max_steps": 2}),
        train_dataset=data_of("DPO"),
        processing_class=world.tokenizer,
        compute_metrics=lambda prediction: {"pairs": float(len(prediction.predictions))},
    )
    trainer.train()
    found = trainer.predict(data_of("DPO", 6, 1), metric_key_prefix="held")
    assert found.metrics["held_pairs"] == 6.0
    margins = found.predictions[:, 0] - found.predictions[:, 1]
    assert float(margins.mean()) == pytest.approx(found.metrics["held_rewards/margins"], rel=1e-5)


# ---- attributes -----------------------------------------------------------------------------------------------------

ATTRIBUTES = {
    "DPO": [
        *("beta", "loss_types", "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef"),
        *("label_smoothing", "use_weighting", "precompute_ref_logps", "aux_loss_enabled", "router_aux_loss_coef"),
    ],
    "KTO": [
        *("beta", "loss_type", "desirable_weight", "undesirable_weight", "precompute_ref_logps", "aux_loss_enabled"),
        "router_aux_loss_coef",
    ],
    "SFT": ["aux_loss_enabled", "router_aux_loss_coef"],
    "ORPO": ["beta", "max_length", "aux_loss_enabled", "aux_loss_coef", "is_encoder_decoder"],
    "CPO": [
        *("beta", "label_smoothing", "loss_type", "cpo_alpha", "alpha", "max_length"),
        *("aux_loss_enabled", "aux_loss_coef", "is_encoder_decoder"),
    ],
}


def trls(kind: str) -> Any:
    return importlib.import_module(f"trl.experimental.{kind.lower()}" if kind in ("ORPO", "CPO") else "trl")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_attributes_are_what_they_are_in_trl(world: worlds.World, tmp_path: Path, kind: str, experts: bool) -> None:
    model = world.path
    if experts:
        mixture = tiny_model("MixtralConfig", len(world.tokenizer), num_local_experts=4)
        mixture.config.router_aux_loss_coef, mixture.config.output_router_logits = 0.25, True
        model = str(tmp_path / "experts")
        mixture.save_pretrained(model)
    libraries = (preftune, trls(kind))
    ours, theirs = (make(each, kind, world, tmp_path, data_of(kind), model=model) for each in libraries)
    for name in ATTRIBUTES[kind]:
        # Of a model without experts TRL may read a weight that multiplies nothing.
        if experts or not name.endswith("aux_loss_coef"):
            assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.tokenizer is ours.processing_class
    with pytest.raises(AttributeError, match="has no attribute 'no_such_thing'"):
        ours.no_such_thing  # noqa: B018


@pytest.mark.thin(1)
@pytest.mark.parametrize("how", ["full", "adapter", "given"])
def test_the_reference_that_follows_can_be_looked_at(world: worlds.World, tmp_path: Path, how: str) -> None:
    options: dict[str, Any] = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
    args = preftune.DPOConfig(str(tmp_path), **{**worlds.DEFAULTS, **options, "max_steps": 2, "learning_rate": 0.01})
    keywords: dict[str, Any] = {"adapter": {"peft_config": lora()}, "given": {"ref_model": base(world)}}.get(how, {})
    trainer = preftune.DPOTrainer(
        base(world), args=args, train_dataset=data_of("DPO"), processing_class=world.tokenizer, **keywords
    )
    before = copy.deepcopy(trainer.ref_model.state_dict())
    assert set(before) == set(trainer.model.state_dict())
    trainer.train()
    moved = 0
    for name, policy in trainer.model.named_parameters():
        value = trainer.ref_model.get_parameter(name)
        assert torch.allclose(value, 0.5 * (before[name] + policy.detach()), atol=1e-6), name
        moved += not torch.equal(value, before[name])
    assert moved > 2
    ids = torch.tensor([[5, 6, 7, 8]])
    assert not torch.allclose(trainer.ref_model(ids).logits, trainer.model.eval()(ids).logits, atol=1e-4)


def test_the_usual_reference_is_no_model(world: worlds.World, tmp_path: Path) -> None:
    trainer = make(preftune, "DPO", world, tmp_path, data_of("DPO"))
    assert trainer.ref_model is None
    with pytest.raises(ConfigError, match=r"trainer\.ref_model: the reference is chosen"):
        trainer.ref_model = base(world)


# ---- settings of another kind ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("given", ["SFT", "DPO", "KTO", "trl", "dict", "path"])
@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_another_kind_are_refused(world: worlds.World, tmp_path: Path, kind: str, given: str) -> None:
    if given == kind or (kind, given) == ("SFT", "trl"):
        # Equal kinds; and SFT takes those that are a kind of transformers' settings, as TRL's are.
        return
    if given in ("dict", "path"):
        args: Any = {"output_dir": "out"} if given == "dict" else "out"
    else:
        module: Any = trls(kind) if given == "trl" else preftune
        args = getattr(module, f"{kind if given == 'trl' else given}Config")(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ConfigError, match=rf"args: settings of another kind; .*from preftune import {kind}Config"):
        getattr(preftune, f"{kind}Trainer")(
            model=world.path, args=args, train_dataset=data_of(kind), processing_class=world.tokenizer
        )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("q_proj,v_proj", {"q_proj", "v_proj"}),
        ("q_proj, v_proj", {"q_proj", "v_proj"}),
        (["q_proj,", "v_proj"], {"q_proj", "v_proj"}),
        ("q_proj v_proj k_proj", {"q_proj", "v_proj", "k_proj"}),
        (["q_proj,v_proj"], {"q_proj", "v_proj"}),
        ("q_proj", {"q_proj"}),
        ("all-linear", "all-linear"),
        (r".*self_attn\.(q|v)_proj", r".*self_attn\.(q|v)_proj"),
    ],
)
def test_target_modules_as_people_write_them(given: Any, expected: Any) -> None:
    config: Any = peft_config_from(ModelConfig(use_peft=True, lora_target_modules=given))
    assert config is not None
    assert config.target_modules == expected


# ---- what is said ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_finding_is_a_warning(world: worlds.World, tmp_path: Path, kind: str) -> None:
    rows = rows_of(kind if kind in ("SFT", "KTO") else "DPO", 8)
    for row in rows[:3]:
        row.update({"text": ""} if kind == "SFT" else {"prompt": "the a film " * 60})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = make(preftune, kind, world, tmp_path, Dataset.from_list(rows), max_length=64)
    findings = trainer.reports["train"].findings
    assert findings
    for line in findings:
        assert sum(line in str(each.message) for each in said) == 1, line


@pytest.mark.parametrize("kind", ["DPO", "SFT", "KTO"])
def test_padded_rows_that_nobody_asked_for_are_told(world: worlds.World, tmp_path: Path, kind: str) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    sizes: dict[str, Any] = {"max_position_embeddings": 512, "original_max_position_embeddings": 8}
    model = tiny_model("Phi3Config", len(world.tokenizer), rope_parameters=rope, **sizes)
    with pytest.warns(UserWarning, match="sequences are padded, not packed: .*longrope"):
        make(preftune, kind, world, tmp_path, data_of(kind), model=model)
    # Those that were asked for are not.
    assert not make(preftune, kind, world, tmp_path, data_of(kind), model=model, packing_mode="padded").verdict.ok


@pytest.mark.parametrize("new_name", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_a_setting_under_its_former_name_acts_without_a_word(tmp_path: Path, new_name: bool, given: bool) -> None:
    name = "activation_checkpointing" if new_name else "gradient_checkpointing"
    options: dict[str, Any] = {name: given, f"{name}_kwargs": {"use_reentrant": False}}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        args = preftune.DPOConfig(str(tmp_path), use_cpu=True, **options)
    assert (args.gradient_checkpointing, args.activation_checkpointing) == (given, given)
    assert args.gradient_checkpointing_kwargs == args.activation_checkpointing_kwargs == {"use_reentrant": False}
    assert preftune.DPOConfig(str(tmp_path), use_cpu=True).activation_checkpointing is True


@pytest.mark.thin(1)
@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_run_warns_of_nothing(world: worlds.World, tmp_path: Path, kind: str) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = make(preftune, kind, world, tmp_path, data_of(kind), max_steps=1, save_strategy="steps")
        trainer.train()
        trainer.evaluate(data_of(kind, 4, 1))
        trainer.save_model(str(tmp_path / "saved"))
    texts = [f"{each.category.__name__}: {each.message}" for each in said]
    # KTO's advice, and what few rows of plain text have.
    assert not [text for text in texts if "lambda_D" not in text and "DataWarning" not in text]
