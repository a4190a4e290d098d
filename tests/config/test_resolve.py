"""From command line to the three settings objects, with TRL's own parser as the oracle where it knows the form."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preftune import ConfigError, DPOConfig, SFTConfig
from preftune.config import Resolved, resolve

pytestmark = pytest.mark.filterwarnings("ignore:pad_to_multiple_of has no effect")

CPU = ["--use_cpu"]


def dpo(*argv: str) -> Resolved[DPOConfig]:
    return resolve([*CPU, *argv], DPOConfig)


@pytest.mark.parametrize(
    "argv",
    [
        ["--beta", "0.3", "--learning_rate", "1e-6"],
        ["--beta=0.3", "--max_steps=5"],
        ["--bf16", "false", "--seed", "7"],
        ["--bf16", "False", "--gradient_checkpointing", "true"],
        ["--loss_type", "sigmoid", "ipo", "--loss_weights", "0.5", "2"],
        ["--lr_scheduler_type", "cosine", "--warmup_steps", "0.1"],
        ["--lr_scheduler_kwargs", '{"min_lr": 1e-7}', "--optim", "adamw_torch"],
        ["--eval_strategy", "steps", "--eval_steps", "0.5"],
        ["--max_length", "512", "--truncation_mode", "keep_end"],
        ["--report_to", "none", "--logging_steps", "0.25"],
        ["--model_init_kwargs", '{"a": {"b": [1, 2]}}'],
        ["--save_strategy", "no", "--per_device_train_batch_size", "3"],
        pytest.param(
            ["--include_for_metrics", "inputs", "loss"],
            marks=pytest.mark.filterwarnings("ignore:include_for_metrics has no effect"),
        ),
    ],
)
def test_reads_what_trl_reads(argv: list[str]) -> None:
    from trl import DPOConfig as TheirConfig
    from trl import TrlParser

    argv = ["--use_cpu", "--output_dir", "out", *argv]
    (theirs,) = TrlParser((TheirConfig,)).parse_args_and_config(argv)
    ours = resolve(argv, DPOConfig).trainer
    shared = {f.name for f in dataclasses.fields(TheirConfig)} & {f.name for f in dataclasses.fields(DPOConfig)}
    assert "beta" in shared
    # One is an object without equality; the other TRL replaces by what it derives from it.
    for name in sorted(shared - {"accelerator_config", "pad_to_multiple_of"}):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize(
    "argv",
    [["--use_peft", "--lora_r", "8"], ["--lora_target_modules", "q", "v"], ["--lora_target_modules", "all-linear"], []],
)
def test_model_settings_are_trls(argv: list[str]) -> None:
    from trl import ModelConfig as TheirConfig
    from trl import TrlParser

    (theirs,) = TrlParser((TheirConfig,)).parse_args_and_config(argv)
    ours = dpo(*argv).model
    for field in dataclasses.fields(TheirConfig):
        assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


def test_flags_win_over_files_and_later_files_over_earlier(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("beta: 0.1\nmax_length: 10\nseed: 1\n", encoding="utf-8")
    (tmp_path / "b.yaml").write_text("beta: 0.2\nmax_length: 20\n", encoding="utf-8")
    found = dpo("--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml"), "--beta", "0.3")
    assert (found.trainer.beta, found.trainer.max_length, found.trainer.seed) == (0.3, 20, 1)
    assert str(found.origins["beta"]) == "flag --beta"
    assert str(found.origins["max_length"]) == f"file {tmp_path / 'b.yaml'}:2"
    assert found.origins["label_smoothing"].kind == "default"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--bf16"], True),
        (["--bf16", "false"], False),
        (["--no_bf16"], False),
        (["--no-bf16"], False),
        (["--bf16=no"], False),
    ],
)
def test_switches(argv: list[str], expected: bool) -> None:
    assert dpo(*argv).trainer.bf16 is expected


def test_yaml_gotchas(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("learning_rate: 1e-6\neval_strategy: no\nrun_name: 2024\nlr_scheduler_kwargs: {min_lr: 1e-7}\n")
    args = dpo("--config", str(file)).trainer
    assert args.learning_rate == 1e-6
    assert args.eval_strategy == "no"
    assert args.run_name == "2024"
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-7}


def test_defaults_of_the_command_line_reach_both_owners() -> None:
    found = resolve(CPU, DPOConfig, defaults={"on_bad_rows": "skip", "no_such_field": 1})
    assert found.script.on_bad_rows == found.trainer.on_bad_rows == "skip"
    assert (
        resolve([*CPU, "--on_bad_rows", "error"], DPOConfig, defaults={"on_bad_rows": "skip"}).trainer.on_bad_rows
        == "error"
    )


def test_repeated_flags() -> None:
    assert dpo("--loss_type", "sigmoid", "--loss_type", "ipo").trainer.loss_type == ["sigmoid", "ipo"]
    found = dpo("--beta", "0.1", "--beta", "0.2")
    assert found.trainer.beta == 0.2
    assert any("twice" in note for note in found.notes)


def test_trls_list_of_datasets_becomes_a_mixture(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("datasets:\n  - {path: a, name: c, split: 'train[:5]'}\n  - {path: b}\ntest_split_size: 0.1\n")
    assert dpo("--config", str(file)).script.dataset_mixture == {
        "datasets": [{"id": "a", "config": "c", "split": "train[:5]"}, {"id": "b"}],
        "shuffle": False,
        "test_split_size": 0.1,
    }
    found = dpo("--config", str(file), "--test_split_size", "20").script.dataset_mixture
    assert found is not None
    assert found["test_split_size"] == 20


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--learning_ratee", "1"], ["--learning_ratee", "did you mean learning_rate?"]),
        (["--a_b_c", "1", "--betta", "2"], ["'a_b_c'", "'betta' (did you mean beta?)"]),
        (["--beta", "x"], ["--beta", "not a number", "'x'", "allowed: a number"]),
        (["--max_steps", "1.5"], ["--max_steps", "not an integer"]),
        (["--eval_strategy", "step"], ["--eval_strategy", "no, steps, epoch", "did you mean steps?"]),
        (["--dtype", "float61"], ["--dtype", "bfloat16", "did you mean float16?"]),
        (["--beta"], ["--beta", "needs a value"]),
        (["--beta", "1", "2"], ["--beta", "takes one value"]),
        (["--no_bf16", "x"], ["--no_bf16", "takes no value"]),
        (["--lora_r", "0"], ["--lora_r", "1 or more"]),
        (["--load_in_4bit", "--load_in_8bit"], ["load_in_8bit", "load_in_4bit"]),
        (["--fp16", "--bf16"], ["--bf16", "fp16"]),
        (["--eval_strategy", "steps", "--logging_steps", "0"], ["--logging_steps", "non-zero"]),
        (["--loss_type", "sigmoidd"], ["--loss_type", "did you mean sigmoid?"]),
        (["--dataset_name", "a", "--dataset_mixer", '{"b": 1}'], ["dataset_name", "dataset_mixer"]),
        (["--dataset_splits", "train"], ["dataset_splits", "dataset_mixer"]),
        (["--torch_dtype", "float32", "--dtype", "float32"], ["dtype is set twice"]),
        (["--parallelism_config", "{}"], ["--parallelism_config", "Python script"]),
    ],
)
def test_mistakes_are_one_line_that_names_them(argv: list[str], says: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        dpo(*argv)
    line = str(caught.value)
    assert "\n" not in line
    for words in says:
        assert words in line


def test_mistakes_in_files_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("seed: 1\nbeta: much\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"r\.yaml:2 \(beta\): not a number; got 'much'"):
        dpo("--config", str(file))
    file.write_text("seed: 1\nlora_r: 0\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"r\.yaml:2 \(lora_r\)"):
        dpo("--config", str(file))
    file.write_text("seed: 1\ntorch_dtype: float61\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"r\.yaml:2 \(torch_dtype\)"):
        dpo("--config", str(file))


def test_a_setting_of_another_verb_is_called_so() -> None:
    with pytest.raises(ConfigError, match="setting of `preftune dpo`"):
        resolve([*CPU, "--beta", "1"], SFTConfig, elsewhere=lambda name: "dpo" if name == "beta" else None)


def test_secrets_never_stand_in_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve([*CPU, "--hub_token", "hf_abcdefghijklmnopqrstuvwxyz", "more"], DPOConfig)
    assert "hf_abc" not in str(caught.value)


names = [f.name for f in dataclasses.fields(DPOConfig)]
typo = st.builds(
    lambda name, i, c: name[: i % len(name)] + c + name[i % len(name) :],
    st.sampled_from(names),
    st.integers(0, 30),
    st.sampled_from("abcxyz_"),
)


@pytest.mark.filterwarnings("ignore:.* has no effect:UserWarning")
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from(names) | typo | st.text(max_size=8), max_size=4), st.lists(st.text(max_size=6), max_size=4)
)
def test_any_command_line_resolves_or_is_one_line(flags: list[str], values: list[str]) -> None:
    argv: list[Any] = []
    for number, flag in enumerate(flags):
        # These read files of that name, or wait for other processes.
        if flag in ("config", "deepspeed", "fsdp", "fsdp_config", "accelerator_config", "help", "parallelism_config"):
            continue
        argv += [f"--{flag}", *values[number : number + 1]]
    said = ""
    try:
        resolve([*CPU, *argv], DPOConfig)
    except ConfigError as error:
        said = str(error)
    assert "\n" not in said


@pytest.mark.parametrize("source", ["--dataset_name", "--config"])
def test_settings_of_a_files_own_data_do_not_meet_other_data(tmp_path: Path, source: str) -> None:
    """Split names and columns of a recipe belong to the data that it names."""
    recipe, other = tmp_path / "recipe.yaml", tmp_path / "other.yaml"
    recipe.write_text("dataset_name: hub/set\ndataset_train_split: train_sft\ndataset_columns: [chosen]\nbeta: 0.2\n")
    other.write_text("dataset_name: mine.jsonl\n")
    found = dpo("--config", str(recipe), source, "mine.jsonl" if source == "--dataset_name" else str(other))
    assert found.script.dataset_name == "mine.jsonl"
    assert found.script.dataset_train_split == "train"
    assert found.script.dataset_columns is None
    assert found.origins["dataset_train_split"].kind == "default"
    assert found.trainer.beta == 0.2
    (note,) = found.notes
    for name in ("dataset_train_split", "dataset_columns"):
        assert name in note


def test_settings_beside_the_newer_data_count(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dataset_name: hub/set\ndataset_train_split: train_sft\n")
    found = dpo("--config", str(recipe), "--dataset_name", "mine", "--dataset_train_split", "train[:9]")
    assert found.script.dataset_train_split == "train[:9]"
    assert dpo("--config", str(recipe)).script.dataset_train_split == "train_sft"
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text("dataset_mixture:\n  datasets: [{id: a}]\n")
    assert dpo("--config", str(mixture), "--dataset_name", "mine").script.dataset_mixture is None
    # A file that names no data gives settings for whatever data there are.
    plain = tmp_path / "plain.yaml"
    plain.write_text("dataset_train_split: train_prefs\n")
    assert dpo("--config", str(plain), "--dataset_name", "mine").script.dataset_train_split == "train_prefs"


@pytest.mark.parametrize(
    ("value", "told"), [("1e-4x", "did you mean 1e-4?"), ("0.1.2", "did you mean 0.1?"), ("much", "a number")]
)
def test_a_number_with_something_behind_it_is_recognised(value: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)) as caught:
        dpo("--learning_rate", value)
    assert "did you mean 1e-6" not in str(caught.value)
