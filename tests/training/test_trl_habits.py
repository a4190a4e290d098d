"""What scripts written for TRL do beside the plain call: other data, other settings, other moments."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import yaml
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import HfArgumentParser, T5Config, T5ForConditionalGeneration, TrainingArguments

import preftune
from preftune import ConfigError, DataError, ModelError
from tests.models.tiny import tiny_model
from tests.parity import worlds

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

KINDS = ["DPO", "SFT", "KTO"]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


def rows_of(kind: str, number: int, seed: int = 0) -> list[dict[str, Any]]:
    if kind == "KTO":
        return worlds.unpaired_rows(number, seed)
    pairs = worlds.pair_rows(number, seed)
    return [{"text": r["prompt"] + r["chosen"]} for r in pairs] if kind == "SFT" else list(pairs)


def make(library: Any, kind: str, world: Any, out: Path, data: Any, model: Any = None, **options: Any) -> Any:
    config, trainer = getattr(library, f"{kind}Config"), getattr(library, f"{kind}Trainer")
    args = config(output_dir=str(out / library.__name__), **{**worlds.DEFAULTS, **options})
    return trainer(model=model or world.path, args=args, train_dataset=data, processing_class=world.tokenizer)


def both(kind: str, world: Any, out: Path, data: Any, **options: Any) -> tuple[Any, Any]:
    """TRL's trainer and ours, in this order."""
    import trl

    theirs, ours = (make(library, kind, world, out, data, **options) for library in (trl, preftune))
    return theirs, ours


@pytest.mark.parametrize("kind", ["DPO", "KTO", "ORPO", "CPO", "SFT"])
def test_names_of_older_versions_are_understood_or_explained(kind: str, tmp_path: Path) -> None:
    config, trainer = getattr(preftune, f"{kind}Config"), getattr(preftune, f"{kind}Trainer")
    out = {"output_dir": str(tmp_path), "use_cpu": True}
    with pytest.warns(UserWarning, match="warmup_ratio: 0.1 -> warmup_steps: 0.1|warmup_ratio -> warmup_steps"):
        assert config(**out, warmup_ratio=0.1).warmup_steps == 0.1
    with pytest.warns(UserWarning, match="max_seq_length -> max_length"):
        assert config(**out, max_seq_length=77).max_length == 77
    with pytest.warns(UserWarning, match="evaluation_strategy -> eval_strategy"):
        assert config(**out, evaluation_strategy="epoch").eval_strategy == "epoch"
    with pytest.raises(ConfigError, match=r"rpo_alpha is not supported.*loss_type: \[sigmoid, sft\]"):
        config(**out, rpo_alpha=1.0)
    with pytest.raises(ConfigError, match="max_seq_length and max_length are one setting"):
        config(**out, max_seq_length=77, max_length=78)
    with pytest.raises(TypeError, match="unexpected keyword argument 'beat'"):
        config(**out, beat=1)
    assert {"output_dir", "max_length"} <= set(inspect.signature(config).parameters)
    with pytest.raises(TypeError, match=rf"^{kind}Trainer.__init__\(\) got an .*'tokenizer'; it is called proc"):
        trainer(model="m", tokenizer=None)
    with pytest.raises(TypeError, match=rf"'max_length'; it is a setting: args={kind}Config\(max_length=...\)"):
        trainer(model="m", max_length=5)
    with pytest.raises(TypeError, match=rf"^{kind}Trainer.__init__\(\) got an unexpected keyword argument 'modl'$"):
        trainer(model="m", modl=5)


def first_rows_loader(trainer: Any) -> Any:
    rows = torch.utils.data.Subset(trainer.train_dataset, [9, 3, 7, 1, 2, 5])
    return torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=trainer.data_collator)


ORDERS: dict[str, dict[str, Any]] = {
    "sequential": {
        "_get_train_sampler": lambda self, data=None: torch.utils.data.SequentialSampler(self.train_dataset)
    },
    "weighted": {
        "_get_train_sampler": lambda self, data=None: torch.utils.data.WeightedRandomSampler(
            [float(n * n) for n in range(len(self.train_dataset))], 6, generator=torch.Generator().manual_seed(3)
        )
    },
    "listed": {"_get_train_sampler": lambda self, data=None: listed([11, 4, 6, 0, 8, 10])},
    "loader": {"get_train_dataloader": first_rows_loader},
}


def listed(rows: list[int]) -> torch.utils.data.Sampler[int]:
    class Listed(torch.utils.data.Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(rows)

        def __len__(self) -> int:
            return len(rows)

    return Listed()


@pytest.mark.parametrize("patched", [False, True], ids=["subclass", "object"])
@pytest.mark.parametrize("order", ORDERS)
def test_an_order_of_the_scripts_own_in_less_than_an_epoch(
    order: str, patched: bool, world: worlds.World, tmp_path: Path
) -> None:
    logs = {}
    for library in (trl, preftune):
        kind: Any = library.DPOTrainer
        subclass = kind if patched else type("Own", (kind,), ORDERS[order])
        trainer = subclass(
            model=world.path,
            args=library.DPOConfig(
                output_dir=str(tmp_path / library.__name__),
                **{**worlds.DEFAULTS, "per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-3},
            ),
            train_dataset=Dataset.from_list(worlds.pair_rows(12, 0)),
            processing_class=world.tokenizer,
        )
        if patched:
            for name, method in ORDERS[order].items():
                setattr(trainer, name, method.__get__(trainer))
        trainer.train()
        logs[library.__name__] = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logs["trl"]) == 3
    for ours, theirs in zip(logs["preftune"], logs["trl"], strict=True):
        close(ours, theirs, ("loss", "logps/chosen", "logps/rejected", "grad_norm"))


def close(ours: dict[str, float], theirs: dict[str, float], names: Any) -> None:
    for name in names:
        assert math.isclose(ours[name], theirs[name], rel_tol=TOLERANCE, abs_tol=1e-7), name


@pytest.mark.parametrize("form", ["rows", "stream", "mapping", "own"])
def test_sft_evaluates_what_it_is_handed(world: worlds.World, tmp_path: Path, form: str) -> None:
    data, held_out = (Dataset.from_list(rows_of("SFT", 8, seed)) for seed in (0, 1))
    given: Any = {"a": held_out, "b": data} if form == "mapping" else held_out
    given = held_out.to_iterable_dataset() if form == "stream" else given
    theirs, ours = both("SFT", world, tmp_path, data)
    expected = theirs.evaluate(given)
    if form == "own":
        ours.eval_dataset = ours._prepared(held_out, world.tokenizer, "eval")
        given = ours.eval_dataset
    found = ours.evaluate(given)
    names = ["eval_a_loss", "eval_b_loss"] if form == "mapping" else ["eval_loss"]
    close(found, expected, names)


def test_a_formatting_function_serves_evaluation_too(world: worlds.World, tmp_path: Path) -> None:
    def as_text(row: Any) -> str:
        return f"{row['prompt']} {row['rejected']}"

    data = Dataset.from_list(worlds.pair_rows(8))
    args = preftune.SFTConfig(str(tmp_path), **worlds.DEFAULTS)
    trainer = preftune.SFTTrainer(
        world.path, args, train_dataset=data, processing_class=world.tokenizer, formatting_func=as_text
    )
    plain = Dataset.from_list([{"text": as_text(row)} for row in data])
    other = make(preftune, "SFT", world, tmp_path / "other", plain)
    expected = other.evaluate(plain)["eval_loss"]
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.evaluate(data.to_iterable_dataset())["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_sft_takes_plain_training_arguments(world: worlds.World, tmp_path: Path) -> None:
    args = TrainingArguments(
        str(tmp_path), learning_rate=3e-4, use_cpu=True, report_to=[], hub_token="secret", weight_decay=0.5
    )
    data = Dataset.from_list(rows_of("SFT", 8))
    trainer = preftune.SFTTrainer(world.path, args, train_dataset=data, processing_class=world.tokenizer)
    assert isinstance(trainer.args, preftune.SFTConfig)
    assert (trainer.args.learning_rate, trainer.args.weight_decay) == (3e-4, 0.5)
    assert trainer.args.hub_token == "secret"
    assert trainer.args.max_length == preftune.SFTConfig(str(tmp_path), use_cpu=True).max_length


def test_former_name_of_nll(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="chunked_nll"):
        config = preftune.SFTConfig(str(tmp_path), loss_type="chunked_nll", use_cpu=True)
    assert config.loss_type == "nll"


@pytest.mark.parametrize("column", ["assistant_masks", "completion_mask"])
def test_masks_that_would_not_be_read_are_refused(world: worlds.World, tmp_path: Path, column: str) -> None:
    data = Dataset.from_list([{"input_ids": [5, 6, 7, 8], column: [0, 0, 1, 1]}] * 4)
    import trl

    for library in (trl, preftune):
        with pytest.raises(ValueError, match="labels"):
            make(library, "SFT", world, tmp_path, data, dataset_kwargs={"skip_prepare_dataset": True})


@pytest.mark.parametrize("kind", KINDS)
def test_a_transform_is_applied_rather_than_lost(world: worlds.World, tmp_path: Path, kind: str) -> None:
    def last_first(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {
            key: [value[::-1] if isinstance(value, str) else value for value in some] for key, some in batch.items()
        }

    plain = Dataset.from_list(rows_of(kind, 8))
    mapped = make(preftune, kind, world, tmp_path, plain.map(last_first, batched=True))
    seen = make(preftune, kind, world, tmp_path, plain.with_transform(last_first))
    untouched = make(preftune, kind, world, tmp_path, plain)
    assert seen.train_dataset.to_list() == mapped.train_dataset.to_list() != untouched.train_dataset.to_list()


@pytest.mark.parametrize("kind", KINDS)
def test_splits_are_refused_and_named(world: worlds.World, tmp_path: Path, kind: str) -> None:
    data = DatasetDict({"train": Dataset.from_list(rows_of(kind, 8)), "held_out": Dataset.from_list(rows_of(kind, 8))})
    with pytest.raises(DataError, match="pass one of its splits: train, held_out"):
        make(preftune, kind, world, tmp_path, data)


@pytest.mark.thin(1)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_visited_in_its_order(world: worlds.World, tmp_path: Path, kind: str) -> None:
    data = Dataset.from_list(rows_of(kind, 60)).to_iterable_dataset()
    theirs, ours = both(kind, world, tmp_path, data, max_steps=3, num_train_epochs=1)
    theirs.train()
    ours.train()
    assert len(ours.train_dataset) == 12 + 16
    names = ("loss", "grad_norm", *(() if kind == "SFT" else ("rewards/chosen", "logps/rejected")))
    assert len(worlds.log_lines(ours)) == 3
    worlds.assert_same_logs(ours, theirs, names, TOLERANCE)
    worlds.assert_same_weights(ours, theirs, TOLERANCE)


def test_a_stream_without_end_trains(world: worlds.World, tmp_path: Path) -> None:
    def endless() -> Iterator[dict[str, Any]]:
        return itertools.cycle(rows_of("DPO", 10))

    trainer = make(preftune, "DPO", world, tmp_path, IterableDataset.from_generator(endless), max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.thin(1)
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_line_tells_of_steps_without_one(world: worlds.World, tmp_path: Path, kind: str) -> None:
    data = Dataset.from_list(rows_of(kind, 20))
    theirs, ours = both(kind, world, tmp_path, data, max_steps=3, logging_steps=2)
    expected = theirs.train()
    output = ours.train()
    name = "mean_token_accuracy" if kind == "SFT" else "rewards/chosen"
    last = ours.state.log_history[-1]
    close(last, theirs.state.log_history[-1], ["num_tokens", *(() if kind == "SFT" else (name, "logps/chosen"))])
    assert "train_runtime" in last
    # What is computed on the steps of a line alone is missing.
    costly = {"entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"}
    assert set(expected.metrics) - costly <= set(output.metrics)
    # Nothing is told twice: here the last step has a line of its own.
    again = make(preftune, kind, world, tmp_path / "again", data, max_steps=2, logging_steps=2)
    again.train()
    assert name not in again.state.log_history[-1]
    assert name in again.state.log_history[-2]


def test_experts_are_balanced_under_kto_as_in_trl(world: worlds.World, tmp_path: Path) -> None:
    path = str(tmp_path / "model")
    model = tiny_model("MixtralConfig", len(world.tokenizer), num_local_experts=4)
    model.config.router_aux_loss_coef = 0.5
    model.save_pretrained(path)
    data = Dataset.from_list(rows_of("KTO", 24))
    import trl

    theirs, ours = (make(library, "KTO", world, tmp_path, data, model=path, beta=0.5) for library in (trl, preftune))
    theirs.train()
    ours.train()
    worlds.assert_same_logs(ours, theirs, ("loss", "aux_loss", "grad_norm", "rewards/chosen", "kl"), TOLERANCE)
    worlds.assert_same_weights(ours, theirs, TOLERANCE)


@pytest.mark.thin(1)
@pytest.mark.parametrize("asked_for", [False, True])
@pytest.mark.parametrize("kind", ["ORPO", "CPO"])
def test_orpo_and_cpo_balance_experts_where_the_model_asks_for_it(
    world: worlds.World, tmp_path: Path, kind: str, asked_for: bool
) -> None:
    model = tiny_model("MixtralConfig", len(world.tokenizer), num_local_experts=4)
    model.config.router_aux_loss_coef, model.config.output_router_logits = 0.5, asked_for
    path = str(tmp_path / "model")
    model.save_pretrained(path)
    data = Dataset.from_list(rows_of("DPO", 24))
    theirs, ours = (
        make(library, kind, world, tmp_path, data, model=path)
        for library in (importlib.import_module(f"trl.experimental.{kind.lower()}"), preftune)
    )
    theirs.train()
    ours.train()
    worlds.assert_same_logs(ours, theirs, ("loss", "grad_norm", "rewards/chosen"), TOLERANCE)
    worlds.assert_same_weights(ours, theirs, TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_without_a_load_balancing_loss(world: worlds.World, tmp_path: Path, kind: str) -> None:
    """Llama 4's configuration has a weight for it, which TRL multiplies with nothing."""
    sizes: dict[str, Any] = {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64}
    model = tiny_model("Llama4TextConfig", len(world.tokenizer), **sizes)
    data = Dataset.from_list(rows_of(kind, 8))
    trainer = make(preftune, kind, world, tmp_path, data, model=model, max_steps=1)
    trainer.train()
    assert "aux_loss" not in trainer.state.log_history[0]
    with pytest.raises(ConfigError, match="router_aux_loss_coef: Llama4ForCausalLM has experts and returns no"):
        make(preftune, kind, world, tmp_path, data, model=model, router_aux_loss_coef=0.1)


@pytest.mark.parametrize("kind", ["ORPO", "CPO", "DPO"])
def test_encoder_decoder_models_are_refused(world: worlds.World, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(world.tokenizer), **sizes))
    with pytest.raises(ModelError, match="encoder-decoder"):
        make(preftune, kind, world, tmp_path, Dataset.from_list(rows_of("DPO", 4)), model=model)


@pytest.mark.parametrize("kind", ["DPO", "SFT", "KTO", "ORPO", "CPO"])
def test_parsers_made_from_the_fields_take_every_setting(tmp_path: Path, kind: str) -> None:
    from trl import TrlParser

    config = getattr(preftune, f"{kind}Config")
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--guards", "overfitting=stop"]
    for parser in (HfArgumentParser(config), TrlParser([config])):
        (parsed,) = parser.parse_args_into_dataclasses(flags)
        plain = config(output_dir=str(tmp_path), use_cpu=True, guards="overfitting=stop")
        names = [item.name for item in dataclasses.fields(config) if item.init]
        assert {name: getattr(parsed, name) for name in names} == {name: getattr(plain, name) for name in names}


@pytest.mark.thin(3)
@pytest.mark.parametrize("kind", ["DPO", "SFT", "KTO", "ORPO"])
def test_a_card_with_names_and_tags(world: worlds.World, tmp_path: Path, kind: str) -> None:
    data = Dataset.from_list(rows_of("DPO" if kind == "ORPO" else kind, 8))
    trainer = make(preftune, kind, world, tmp_path, data, max_steps=1)
    trainer.train()
    trainer.create_model_card(model_name="a name", dataset_name="org/data", tags="one")
    text = (Path(trainer.args.output_dir) / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["datasets"] == ["org/data"]
    assert {"preftune", kind.lower(), "one"} <= set(front["tags"])
    assert "# a name" in text
    assert "learning_rate" in text
    assert f"{trainer.state.log_history[-2]['loss']:.4g}" in text
    trainer.create_model_card(tags=["three", *trainer.model.model_tags])
    text = (Path(trainer.args.output_dir) / "README.md").read_text()
    tags = yaml.safe_load(text.split("---")[1])["tags"]
    assert "three" in tags
    assert len(tags) == len(set(tags))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "method", ["compute_loss", "prediction_step", "_prepare_dataset", "compute_ref_log_probs", "get_batch_loss_metrics"]
)
def test_a_loss_that_would_not_be_called_is_refused(
    world: worlds.World, tmp_path: Path, kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = type("Own", (getattr(preftune, f"{kind}Trainer"),), {method: lambda self, *args, **kwargs: None})
    monkeypatch.setattr(preftune, f"{kind}Trainer", own, raising=False)
    with pytest.raises(ConfigError, match=f"Own: {method} is overridden"):
        make(preftune, kind, world, tmp_path, Dataset.from_list(rows_of(kind, 4)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bf16_full_eval", True),
        ("batch_eval_metrics", True),
        ("include_for_metrics", ["inputs"]),
        ("eval_accumulation_steps", 2),
        ("eval_do_concat_batches", False),
        ("label_names", ["labels"]),
    ],
)
def test_settings_of_a_loop_that_is_replaced_are_told(kind: str, name: str, value: Any, tmp_path: Path) -> None:
    config = getattr(preftune, f"{kind}Config")
    with pytest.warns(UserWarning, match=f"{name} has no effect"):
        args = config(output_dir=str(tmp_path), use_cpu=True, **{name: value})
    # A model that waits for an evaluation in half precision would stay off its device.
    assert not args.bf16_full_eval


def test_fused_losses_of_liger_are_left_out_and_its_other_kernels_kept(tmp_path: Path) -> None:
    given = {"rms_norm": False, "cross_entropy": True}
    args = preftune.DPOConfig(str(tmp_path), use_cpu=True, use_liger_kernel=True, liger_kernel_config=given)
    expected = {"rms_norm": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    assert args.liger_kernel_config == expected


@pytest.mark.thin(1)
@pytest.mark.parametrize("kind", ["DPO", "SFT"])
def test_tokens_seen(world: worlds.World, tmp_path: Path, kind: str) -> None:
    data = Dataset.from_list(rows_of(kind, 12))
    options = {"include_num_input_tokens_seen": "non_padding", "max_steps": 3, "gradient_accumulation_steps": 2}
    theirs, ours = both(kind, world, tmp_path, data, **options)
    for trainer in (theirs, ours):
        trainer.train()
    assert ours.state.num_input_tokens_seen == theirs.state.num_input_tokens_seen > 0


def test_compute_metrics_is_not_called_where_only_the_loss_is_asked_for(world: worlds.World, tmp_path: Path) -> None:
    rows = Dataset.from_list(rows_of("DPO", 4))
    calls: list[Any] = []

    def compute(prediction: Any) -> dict[str, float]:
        calls.append(prediction.predictions)
        return {"own": 1.0}

    for loss_only in (False, True):
        args = preftune.DPOConfig(str(tmp_path), prediction_loss_only=loss_only, **worlds.DEFAULTS)
        trainer = preftune.DPOTrainer(
            model=world.path,
            args=args,
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=world.tokenizer,
            compute_metrics=compute,
        )
        found = trainer.evaluate()
        assert ("eval_own" in found) is not loss_only
        assert "eval_loss" in found
    assert [each.shape for each in calls] == [(4, 2)]


def test_predictions_that_are_not_kept_are_told(
    world: worlds.World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Dataset.from_list(rows_of("SFT", 4))
    trainer = make(preftune, "SFT", world, tmp_path, data)
    assert trainer.predict(trainer.train_dataset).predictions is None
    assert "no predictions" in caplog.text


def test_a_stream_is_read_until_enough_rows_are_left(world: worlds.World, tmp_path: Path) -> None:
    """Three rows of four are too long; as in TRL, later rows take their place."""
    long = "the a " * 60
    rows = [{"prompt": long if n % 4 else "the", "completion": f" film {n}"} for n in range(400)]
    visited = 5 * worlds.DEFAULTS["per_device_train_batch_size"]
    pairs: list[Any] = list(worlds.pair_rows(400, seed=3))
    pairs = [{**row, "prompt": (long if n % 4 else "") + row["prompt"]} for n, row in enumerate(pairs)]
    stream = Dataset.from_list(pairs).to_iterable_dataset()
    trainer = make(preftune, "DPO", world, tmp_path, stream, max_length=40)
    assert len(trainer.train_dataset) >= visited
    assert trainer.reports["train"].rows_read > 4 * visited
    assert not any("completely" in line for line in trainer.reports["train"].warnings)
    sft = make(preftune, "SFT", world, tmp_path, Dataset.from_list(rows).to_iterable_dataset(), max_length=40)
    assert len(sft.train_dataset) >= visited


def test_sft_shuffles_what_is_left(world: worlds.World, tmp_path: Path) -> None:
    rows = rows_of("SFT", 12)
    pairs = [{"prompt": "the " * (50 if n == 3 else 2), "completion": row["text"]} for n, row in enumerate(rows)]
    theirs, ours = both("SFT", world, tmp_path, Dataset.from_list(pairs), max_length=30, shuffle_dataset=True)
    assert len(theirs.train_dataset) == 11
    assert [row["input_ids"] for row in ours.train_dataset] == [row["input_ids"] for row in theirs.train_dataset]
    trainer_log = [both_trainers.train().training_loss for both_trainers in (theirs, ours)]
    assert trainer_log[1] == pytest.approx(trainer_log[0], rel=TOLERANCE)


def test_templates_are_text_or_files_that_exist(world: worlds.World, tmp_path: Path) -> None:
    line = "{% for m in messages %}" + "{{ m['content'] }} " * 20 + "{% endfor %}"
    rows = Dataset.from_list(
        [{"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "a"}]}]
    )
    trainer = make(preftune, "SFT", world, tmp_path, rows, chat_template=line)
    assert trainer.processing_class.chat_template == line
    with pytest.raises(ConfigError, match=r"cannot read the chat template; got 'typo\.jinja'"):
        make(preftune, "SFT", world, tmp_path, rows, chat_template="typo.jinja")


@pytest.mark.parametrize("part", ["train", "eval"])
def test_tokens_beyond_the_embeddings_are_named(world: worlds.World, tmp_path: Path, part: str) -> None:
    good, bad = ({"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 4000]})
    args = preftune.SFTConfig(str(tmp_path), **worlds.DEFAULTS)
    data = {"train": [good, good], "eval": [good, good], part: [good, bad]}
    train, held_out = (Dataset.from_list(data[name]) for name in ("train", "eval"))
    with pytest.raises(ModelError, match=f"{part} data set, row 1, input_ids: a token that the model .*; got 4000"):
        preftune.SFTTrainer(
            world.path, args, train_dataset=train, eval_dataset=held_out, processing_class=world.tokenizer
        )


def test_a_pair_without_its_weight_changes_no_other(world: worlds.World, tmp_path: Path) -> None:
    rows = [{**row, "weight": 0.0 if n else None} for n, row in enumerate(worlds.pair_rows(4))]
    for budget in (None, 8):
        trainer = make(
            preftune, "DPO", world, tmp_path, Dataset.from_list(rows), max_tokens_per_row=budget, max_steps=1
        )
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2) / 4, rel=1e-4)


def test_odpo_says_whose_score_gap_is_missing(world: worlds.World, tmp_path: Path) -> None:
    rows = [{**row, "margin": None if n == 2 else 1.0} for n, row in enumerate(worlds.pair_rows(4))]
    with pytest.raises(DataError, match="margin of row 2: this score gap cannot be used"):
        make(preftune, "DPO", world, tmp_path, Dataset.from_list(rows), loss_type="odpo")
    with pytest.raises(DataError, match="train data set: odpo needs a score gap for every pair"):
        make(preftune, "DPO", world, tmp_path, Dataset.from_list(worlds.pair_rows(4)), loss_type="odpo")


@pytest.mark.thin(1)
@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_a_longer_run_after_a_short_one(world: worlds.World, tmp_path: Path, kind: str) -> None:
    losses = []
    for trainer in both(kind, world, tmp_path, Dataset.from_list(rows_of(kind, 40)), max_steps=2):
        trainer.train()
        trainer.args.max_steps = 5
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_positions_that_depend_on_the_length(world: worlds.World, tmp_path: Path) -> None:
    """Short and long pairs in turn: the factor of a pair's rotary embedding follows from that pair alone."""
    short, long = worlds.pair_rows(4, seed=1), worlds.pair_rows(4, seed=2)
    long = [{key: f"{text} the a film" * 8 for key, text in row.items()} for row in long]
    rows = [row for both_kinds in zip(short, long, strict=True) for row in both_kinds]
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = tiny_model(
        "Phi3Config", len(world.tokenizer), rope_parameters=rope, max_position_embeddings=512, initializer_range=0.2,
        original_max_position_embeddings=64,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"per_device_train_batch_size": 1, "max_length": 400, "model": str(tmp_path / "model")}
    logs = []
    for library in (trl, preftune):
        trainer = make(library, "DPO", world, tmp_path, Dataset.from_list(rows), **options)
        trainer.train()
        logs.append(worlds.log_lines(trainer))
    assert "longrope" in trainer.verdict.reason
    for ours, theirs in zip(logs[1], logs[0], strict=True):
        close(ours, theirs, ["loss", "logps/chosen", "logps/rejected", "grad_norm"])
    # In one step with others, a pair is what it is alone.
    options |= {"per_device_train_batch_size": 4, "max_steps": 1}
    together = make(preftune, "DPO", world, tmp_path, Dataset.from_list(rows), **options)
    together.train()
    assert together.state.log_history[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)


def test_rows_longer_than_learned_positions_are_refused(world: worlds.World, tmp_path: Path) -> None:
    model = tiny_model("GPT2Config", len(world.tokenizer), n_embd=32, n_layer=2, n_head=4, max_position_embeddings=16)
    data = Dataset.from_list(worlds.pair_rows(8))
    with pytest.raises(ConfigError, match=r"max_length: .*GPT2LMHeadModel learned 16 positions.*set max_length: 16"):
        make(preftune, "DPO", world, tmp_path, data, model=model)
    make(preftune, "DPO", world, tmp_path, data, model=model, max_length=16, max_steps=1).train()


@pytest.mark.thin(1)
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_tells_the_tokens_trained_on(world: worlds.World, tmp_path: Path, kind: str) -> None:
    figures = []
    for trainer in both(kind, world, tmp_path, Dataset.from_list(rows_of(kind, 8)), max_steps=2):
        trainer.train()
        held_out = trainer.evaluate(Dataset.from_list(rows_of(kind, 8, 1)))
        figures.append((held_out["eval_num_tokens"], trainer.state.log_history[0]["num_tokens"]))
    assert figures[1] == figures[0]


@pytest.mark.parametrize("before", [None, 5, [5, 7]])
def test_another_end_of_text_is_the_models_before_training_too(
    world: worlds.World, tmp_path: Path, before: Any
) -> None:
    token = world.tokenizer.convert_ids_to_tokens(9)
    found = []
    for name in ("trl", "preftune"):
        import importlib

        from transformers import AutoModelForCausalLM, AutoTokenizer

        library = importlib.import_module(name)
        model = AutoModelForCausalLM.from_pretrained(world.path)
        model.generation_config.eos_token_id = before
        args = library.SFTConfig(str(tmp_path / name), eos_token=token, use_cpu=True, bf16=False, report_to=[])
        library.SFTTrainer(
            model,
            args,
            train_dataset=Dataset.from_list(rows_of("SFT", 4)),
            processing_class=AutoTokenizer.from_pretrained(world.path),
        )
        found.append((model.config.eos_token_id, model.generation_config.eos_token_id))
    assert found[0] == found[1]
    assert found[1][0] == 9
