"""Published recipes run under the names they were written with: accepted, translated, and each said once."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from preftune import ConfigError, DPOConfig
from preftune.config import Resolved, resolve
from preftune.config.fields import fields_of_all
from preftune.config.legacy import TABLE
from preftune.config.model import ModelConfig
from preftune.config.script import ScriptConfig

from .conftest import config_of
from .published_keys import HANDBOOK, TRL, VALUES

pytestmark = pytest.mark.filterwarnings("ignore:pad_to_multiple_of has no effect")

EVERY = {**{f"handbook {name}": row for name, row in HANDBOOK.items()}, **{f"trl {n}": row for n, row in TRL.items()}}
# Folded into `dataset_mixture`, whose origin names them.
FOLDED = {"datasets", "test_split_size"}


def from_file(folder: Path, settings: dict[str, Any], config: type[Any]) -> Resolved[Any]:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return resolve(["--config", str(file), "--use_cpu"], config)


def test_every_name_has_a_value_and_every_value_a_use() -> None:
    used = {name for _, names in EVERY.values() for name in names.split()}
    assert used | {"dtype"} == set(VALUES)
    for recipe, (_, names) in EVERY.items():
        assert len(set(names.split())) == len(names.split()), recipe


@pytest.mark.parametrize(("verb", "names"), EVERY.values(), ids=list(EVERY))
def test_a_published_recipe_is_accepted(verb: str, names: str, tmp_path: Path) -> None:
    config = config_of(verb)
    written = names.split()
    found = from_file(tmp_path, {name: VALUES[name] for name in written}, config)
    today = fields_of_all({"script": ScriptConfig, "model": ModelConfig, "trainer": config})
    for name in written:
        said = [note for note in found.notes if re.match(rf"{name}\b", note)]
        if name in FOLDED:
            assert found.script.dataset_mixture is not None
            assert found.origins["dataset_mixture"].translated_from == "datasets"
        elif name in today:
            assert said == [], name
            assert found.origins[name].kind == "file", name
        else:
            assert len(said) == 1, name
            new = TABLE[name].new
            if new is not None:
                assert found.origins[new].translated_from == name
                assert found.origins[new].where.startswith(str(tmp_path / "recipe.yaml"))
    translated = [name for name in written if name not in today and name not in FOLDED]
    assert len(found.notes) == len(translated)


def test_values_arrive(tmp_path: Path) -> None:
    names = " ".join((HANDBOOK["pref_align_scan/dpo"][1], "max_length preprocessing_num_workers"))
    found = from_file(tmp_path, {name: VALUES[name] for name in names.split()}, DPOConfig)
    assert found.model.dtype == "float32"
    assert found.script.dataset_mixer == {"c/d": 1.0}
    args = found.trainer
    assert (args.warmup_steps, args.hub_revision, args.dataset_num_proc) == (0.1, "v1", 2)
    assert (args.learning_rate, args.beta, args.max_prompt_length, args.loss_type) == (5e-7, 0.2, 32, ["sigmoid"])
    assert (args.eval_strategy, args.push_to_hub) == ("steps", False)


def test_datasets_of_trl_become_a_mixture(tmp_path: Path) -> None:
    found = from_file(tmp_path, {name: VALUES[name] for name in ("datasets", "test_split_size")}, DPOConfig)
    entry = {"id": "c/d", "config": "e", "split": "train", "columns": ["chosen", "rejected"]}
    assert found.script.dataset_mixture == {"datasets": [entry], "shuffle": False, "test_split_size": 0.1}


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("num_processes", 4, "start with preftune VERB --num_processes N --config FILE"),
        ("accelerate_config", "zero2", "start with accelerate launch --config_file CONFIG -m preftune"),
    ],
)
def test_what_is_no_setting_of_a_run_is_refused_with_the_way_to_do_it(
    tmp_path: Path, name: str, value: Any, remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        from_file(tmp_path, {name: value}, DPOConfig)
    assert f"{name} is not supported" in str(caught.value)
    assert remedy in str(caught.value)
    assert "recipe.yaml:1" in str(caught.value)


@pytest.mark.parametrize("verb", ["dpo", "sft", "kto", "cpo", "orpo"])
def test_every_setting_of_the_installed_trl_is_known(verb: str) -> None:
    import trl
    from transformers import TrainingArguments

    config = config_of(verb)
    theirs: Any = getattr(trl, f"{verb.upper()}Config", None)
    if theirs is None:
        theirs = getattr(importlib.import_module(f"trl.experimental.{verb}"), f"{verb.upper()}Config")
    known = {*fields_of_all({"script": ScriptConfig, "model": ModelConfig, "trainer": config}), *TABLE}
    for holder in (theirs, trl.ModelConfig, trl.ScriptArguments, TrainingArguments):
        for field in dataclasses.fields(holder):
            assert field.name in known, field.name
