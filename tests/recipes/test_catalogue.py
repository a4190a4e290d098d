"""The shipped files: they resolve as they are, say where their numbers come from, and hold the published numbers."""

from __future__ import annotations

import re
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from preftune.config import Resolved, resolve
from preftune.objectives import find_method
from preftune.recipes import RECIPES, Recipe

from .conftest import Cli, config_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
ALL = pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))

# Read off the published configurations: settings of the trainer, then examples per step over all devices.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "zephyr-7b-dpo-full": (
        {"beta": 0.01, "learning_rate": 5e-7, "num_train_epochs": 1, "lr_scheduler_type": "cosine",
         "warmup_steps": 0.1, "max_length": 1024, "max_prompt_length": 512, "seed": 42},
        128,
    ),
    "zephyr-7b-dpo-qlora": (
        {"beta": 0.01, "learning_rate": 5e-6, "num_train_epochs": 1, "lr_scheduler_type": "cosine",
         "warmup_steps": 0.1, "max_length": 1024, "max_prompt_length": 512, "optim": "paged_adamw_32bit"},
        128,
    ),
    "zephyr-7b-sft-full": (
        {"learning_rate": 2e-5, "num_train_epochs": 1, "lr_scheduler_type": "cosine", "warmup_steps": 0.1,
         "max_length": 2048, "seed": 42},
        128,
    ),
    "laptop-dpo": (
        {"beta": 0.1, "learning_rate": 1e-4, "num_train_epochs": 1, "lr_scheduler_type": "cosine", "warmup_steps": 0.1,
         "max_length": 1024},
        8,
    ),
    "zephyr-gemma-dpo": (
        {"beta": 0.05, "learning_rate": 5e-7, "num_train_epochs": 2, "lr_scheduler_type": "cosine",
         "warmup_steps": 0.1, "max_length": 1024, "max_prompt_length": 512},
        128,
    ),
    "smollm2-dpo": (
        {"beta": 0.5, "learning_rate": 1e-6, "num_train_epochs": 3, "lr_scheduler_type": "cosine",
         "warmup_steps": 0.1, "max_length": 1024, "max_prompt_length": 512},
        128,
    ),
    "smollm3-apo-zero": (
        {"beta": 0.05, "learning_rate": 1e-6, "num_train_epochs": 1, "lr_scheduler_type": "cosine_with_min_lr",
         "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": 0.1, "max_length": 24576, "max_grad_norm": 0.2},
        32,
    ),
    "tulu3-dpo-norm": (
        {"beta": 5.0, "learning_rate": 5e-7, "num_train_epochs": 1, "lr_scheduler_type": "linear",
         "warmup_steps": 0.1, "max_length": 2048, "weight_decay": 0.0},
        128,
    ),
    "mpo": (
        {"loss_weights": [0.8, 0.2, 1.0], "beta": 0.1, "learning_rate": 5e-6, "num_train_epochs": 1,
         "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "weight_decay": 0.05, "max_length": 6144},
        256,
    ),
    "rpo": (
        {"loss_weights": [1.0, 0.2], "beta": 0.5, "learning_rate": 5e-7, "num_train_epochs": 2,
         "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": 0.03,
         "adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.0, "max_length": 1024},
        128,
    ),
    "zephyr-141b-orpo": (
        {"beta": 0.05, "learning_rate": 5e-6, "num_train_epochs": 3, "lr_scheduler_type": "inverse_sqrt",
         "warmup_steps": 100, "max_length": 2048, "max_prompt_length": 1792, "optim": "adamw_bnb_8bit"},
        32,
    ),
    "simpo-llama3": (
        {"beta": 2.5, "simpo_gamma": 2.5 * 0.55, "cpo_alpha": 0.0, "learning_rate": 1e-6, "num_train_epochs": 1,
         "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "max_length": 2048, "max_prompt_length": 1800},
        128,
    ),
    "kto": (
        {"beta": 0.1, "learning_rate": 5e-7, "num_train_epochs": 1, "lr_scheduler_type": "cosine", "warmup_steps": 0.1,
         "desirable_weight": 1.0, "undesirable_weight": 1.0},
        16,
    ),
}  # fmt: skip


def resolved(recipe: Recipe, folder: Path) -> Resolved[Any]:
    file = folder / recipe.file_name
    file.write_text(recipe.text(), encoding="utf-8")
    return resolve(["--config", str(file), "--use_cpu", "--output_dir", str(folder / "out")], config_of(recipe.verb))


def test_table_and_files_agree() -> None:
    shipped = {item.name for item in files("preftune.recipes").iterdir() if item.name.endswith((".yaml", ".yml"))}
    assert shipped == {recipe.file_name for recipe in RECIPES.values()}
    assert set(PUBLISHED) == set(RECIPES)
    assert all(name == recipe.name for name, recipe in RECIPES.items())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["package-data"]["preftune.recipes"] == ["*.yaml"]


@ALL
def test_it_says_how_to_run_it_and_where_its_numbers_come_from(recipe: Recipe) -> None:
    lines = recipe.text().splitlines()
    assert lines[0] == f"# preftune {recipe.verb} --config {recipe.file_name}"
    comment = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    assert re.search(r"Sources?: ", comment)
    assert "Published: " in comment
    for number in re.findall(r"arXiv:\d{4}\.\d{5}", recipe.source):
        assert number in comment, number
    assert max(map(len, lines)) <= 120
    assert not any(line != line.rstrip() or "\t" in line for line in lines)


@ALL
def test_it_resolves_under_the_names_of_today(recipe: Recipe, tmp_path: Path) -> None:
    found = resolved(recipe, tmp_path)
    assert found.notes == ()
    found.script.require_dataset()
    found.model.require_model()
    assert not found.trainer.push_to_hub
    for name in yaml.safe_load(recipe.text()):
        assert name == "output_dir" or found.origins[name].kind == "file", name


@ALL
def test_it_holds_the_published_numbers(recipe: Recipe, tmp_path: Path) -> None:
    found = resolved(recipe, tmp_path).trainer
    expected, examples = PUBLISHED[recipe.name]
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value), name
    said = re.search(r"# (\d+) (?:pairs|answers|examples) per step on (\d+|one) device", recipe.text())
    assert said is not None
    devices = 1 if said[2] == "one" else int(said[2])
    assert int(said[1]) == examples
    assert found.per_device_train_batch_size * found.gradient_accumulation_steps * devices == examples


@ALL
def test_it_trains_with_the_method_that_the_table_names(recipe: Recipe, tmp_path: Path) -> None:
    for name in recipe.method:
        assert find_method(name).name == name
    found = resolved(recipe, tmp_path).trainer
    # The loss of supervised fine-tuning has TRL's name among its settings.
    loss_type = "sft" if recipe.verb == "sft" else getattr(found, "loss_type", recipe.verb)
    assert tuple([loss_type] if isinstance(loss_type, str) else loss_type) == recipe.method


def test_adapter_and_quantisation_of_qlora(tmp_path: Path) -> None:
    model = resolved(RECIPES["zephyr-7b-dpo-qlora"], tmp_path).model
    assert (model.use_peft, model.load_in_4bit, model.lora_r, model.lora_alpha) == (True, True, 128, 128)
    assert isinstance(model.lora_target_modules, list)
    assert len(model.lora_target_modules) == 7


def test_smollm3_mixes_two_parts() -> None:
    mixture = yaml.safe_load(RECIPES["smollm3-apo-zero"].text())["dataset_mixture"]["datasets"]
    assert [entry["weight"] for entry in mixture] == [0.5, 0.25]
    assert {entry["id"] for entry in mixture} == {"HuggingFaceTB/smoltalk2"}


def test_the_chat_template_renders_turns_as_zephyr_does() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = yaml.safe_load(RECIPES["zephyr-141b-orpo"].text())["chat_template"]
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
    ]

    def rendered(turns: list[dict[str, str]], ask: bool) -> str:
        texts = render_jinja_template(
            conversations=[turns], chat_template=template, add_generation_prompt=ask, eos_token="</s>"
        )[0]
        return str(texts[0])

    prompt = rendered(messages[:2], True)
    assert prompt == "<|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\n"
    assert rendered(messages, False) == prompt + "Hello!</s>\n"


def test_list_names_every_recipe_with_its_verb(cli: Cli) -> None:
    import json

    code, out, _ = cli("recipes", "list")
    assert code == 0
    for recipe in RECIPES.values():
        assert re.search(rf"^{recipe.name} +{recipe.verb} ", out, re.MULTILINE)
    code, out, _ = cli("recipes", "list", "--json")
    assert code == 0
    assert {row["name"]: row["verb"] for row in json.loads(out)} == {r.name: r.verb for r in RECIPES.values()}


def test_show_prints_the_file(cli: Cli) -> None:
    code, out, err = cli("recipes", "show", "mpo")
    assert (code, err) == (0, "")
    assert out == files("preftune.recipes").joinpath("mpo.yaml").read_text(encoding="utf-8")
    assert cli("recipes", "show", "mpo.yaml")[1] == out


def test_copy_writes_the_file_and_says_how_to_run_it(cli: Cli) -> None:
    code, out, err = cli("recipes", "copy", "kto")
    assert (code, err) == (0, "")
    assert Path("kto.yaml").read_text(encoding="utf-8") == RECIPES["kto"].text()
    assert "preftune kto --config kto.yaml" in out
    Path("a folder").mkdir()
    assert "preftune dpo --config 'a folder/mpo.yaml'" in cli("recipes", "copy", "mpo", "a folder")[1]
    assert cli("recipes", "copy", "mpo", "mine.yaml")[0] == 0
    assert Path("mine.yaml").read_bytes() == Path("a folder/mpo.yaml").read_bytes()


def test_copy_never_overwrites(cli: Cli) -> None:
    Path("mpo.yaml").write_text("beta: 1\n", encoding="utf-8")
    code, out, err = cli("recipes", "copy", "mpo")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "mpo.yaml: the file exists" in err
    assert Path("mpo.yaml").read_text(encoding="utf-8") == "beta: 1\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["show", "mpoo"], "did you mean mpo?"),
        (["copy", "nothing-like-it"], "allowed: zephyr-7b-dpo-full, "),
        (["copy", "mpo", "no/such/folder/x.yaml"], "cannot write the file"),
        (["show", "../catalogue"], "no such recipe"),
        (["frob"], "frob"),
        ([], "list|show|copy"),
    ],
)
def test_wrong_arguments_are_one_line(cli: Cli, argv: list[str], says: str) -> None:
    code, out, err = cli("recipes", *argv)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert says in err
