"""Code beside weights runs only when asked for, and then that of one known commit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from preftune.config import ModelConfig
from preftune.errors import ModelError
from preftune.models import trust
from preftune.models.loading import load_model_and_tokenizer, load_tokenizer
from preftune.models.shapes import load_config
from tests.security.conftest import NEW, OLD, Cli, Coder, write_coder


def load(**settings: Any) -> Any:
    return load_model_and_tokenizer(ModelConfig(**settings))


def test_without_the_setting_no_code_runs(coder: Coder) -> None:
    with pytest.raises(ModelError, match="pass --trust_remote_code with a pinned --model_revision") as caught:
        load(model_name_or_path=coder.name)
    assert "\n" not in str(caught.value)
    assert trust.trusted_code() == []


def test_a_branch_is_loaded_at_one_commit_that_is_said_once_and_recorded(coder: Coder) -> None:
    said = rf"{coder.name} is loaded, and its code run, at commit {OLD} .*--model_revision {OLD} pins it"
    with pytest.warns(UserWarning, match=said):
        loaded = load(model_name_or_path=coder.name, trust_remote_code=True)
    assert type(loaded.model).made_of == OLD
    # The branch moves while the process lives: whatever is loaded now belongs to what was loaded before, silently.
    coder.move("main", NEW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load(
            model_name_or_path=coder.name, ref_model_name_or_path=coder.name, trust_remote_code=True, dtype="float32"
        )
        assert load_config(coder.name, trust_remote_code=True).made_of == OLD
    assert type(again.model).made_of == type(again.ref_model).made_of == OLD
    assert trust.trusted_code() == [{"name": coder.name, "asked": "main", "commit": OLD}]


def test_a_pinned_commit_needs_no_look_up(coder: Coder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_look_up", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(model_name_or_path=coder.name, model_revision=NEW, trust_remote_code=True)
    assert type(loaded.model).made_of == NEW
    assert trust.trusted_code() == [{"name": coder.name, "asked": NEW, "commit": NEW}]


def test_the_hub_is_asked_before_the_copy_on_the_disk(coder: Coder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def model_info(self: Any, name: str, *, revision: str, token: Any) -> Any:
        asked.append((name, revision))
        return SimpleNamespace(sha=NEW)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    with pytest.warns(UserWarning, match=NEW):
        loaded = load(model_name_or_path=coder.name, trust_remote_code=True)
    assert type(loaded.model).made_of == NEW
    assert asked == [(coder.name, "main")]


@pytest.mark.parametrize("loader", [load_tokenizer, load_model_and_tokenizer])
def test_a_commit_that_cannot_be_found_out_is_refused(loader: Any, coder: Coder) -> None:
    config = ModelConfig(model_name_or_path=coder.name, model_revision="stable", trust_remote_code=True)
    with pytest.raises(ModelError, match=r"'stable' cannot be found out .*--model_revision, or download") as caught:
        loader(config)
    assert "\n" not in str(caught.value)


def test_the_reference_has_a_commit_of_its_own(coder: Coder) -> None:
    settings = {"model_name_or_path": coder.name, "model_revision": NEW, "trust_remote_code": True}
    with pytest.warns(UserWarning, match=f"--ref_model_revision {OLD} pins it"):
        loaded = load(ref_model_name_or_path=coder.name, **settings)
    assert (type(loaded.model).made_of, type(loaded.ref_model).made_of) == (NEW, OLD)
    settings |= {"ref_model_revision": "stable", "ref_model_name_or_path": coder.name}
    with pytest.raises(ModelError, match=r"ref_model_name_or_path: .*--ref_model_revision"):
        load(**settings)


def test_a_local_folder_is_named(world: Path, coder: Coder, tmp_path: Path) -> None:
    write_coder(world / "model", tmp_path / "own", "local")
    with pytest.warns(UserWarning, match=rf"Python code in the folder {tmp_path / 'own'} is run"):
        loaded = load(model_name_or_path=str(tmp_path / "own"), trust_remote_code=True)
    assert type(loaded.model).made_of == "local"
    assert trust.trusted_code() == [{"name": str(tmp_path / "own"), "asked": None, "commit": None}]
    with warnings.catch_warnings():
        # Recipes allow code everywhere; a folder without any is no reason for a word.
        warnings.simplefilter("error")
        load(model_name_or_path=str(world / "model"), trust_remote_code=True)


def test_a_folder_whose_code_lies_on_the_hub(world: Path, coder: Coder, tmp_path: Path) -> None:
    classes = {
        "AutoConfig": f"{coder.name}--coder.CoderConfig",
        "AutoModelForCausalLM": f"{coder.name}--coder.CoderForCausalLM",
    }
    write_coder(world / "model", tmp_path / "saved", "local", classes)
    with pytest.warns(UserWarning, match=f"{coder.name} is loaded, and its code run, at commit {OLD}"):
        loaded = load(model_name_or_path=str(tmp_path / "saved"), trust_remote_code=True)
    assert type(loaded.model).made_of == OLD
    coder.move("main", NEW)
    assert type(load(model_name_or_path=str(tmp_path / "saved"), trust_remote_code=True).model).made_of == OLD
    classes["AutoConfig"] = "another/place--coder.CoderConfig"
    write_coder(world / "model", tmp_path / "spread", "local", classes)
    with pytest.raises(ModelError, match="spread over several repositories"):
        load(model_name_or_path=str(tmp_path / "spread"), trust_remote_code=True)


def test_an_adapter_s_base_is_pinned_too(world: Path, coder: Coder, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    plain = load(model_name_or_path=str(world / "model")).model
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": coder.name}))
    settings = {"model_name_or_path": str(tmp_path / "adapter"), "tokenizer_name_or_path": str(world / "model")}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = load(trust_remote_code=True, **settings)
    assert sum(f"at commit {OLD}" in str(each.message) for each in said) == 1
    coder.move("main", NEW)
    again = load(trust_remote_code=True, **settings)
    assert type(loaded.model.base_model.model).made_of == type(again.model.base_model.model).made_of == OLD
    with pytest.raises(ModelError, match="brings its own Python code"):
        load(**settings)


@pytest.mark.filterwarnings("always:trust_remote_code:UserWarning")
def test_a_published_recipe_s_settings_go_on_running(coder: Coder, cli: Cli) -> None:
    run = ["--max_steps", "1", "--report_to", "none", "--save_strategy", "no", "--output_dir", "out"]
    given = ["--trust_remote_code", "true", "--model_revision", "main", "--dataset_name", "pairs.jsonl"]
    code, _, err = cli("dpo", "--model_name_or_path", coder.name, *given, *run)
    assert code == 0, err
    assert err.count(f"--model_revision {OLD} pins it") == 1
    record = json.loads(Path("out/provenance.json").read_text())
    assert record["trusted_code"] == [{"name": coder.name, "asked": "main", "commit": OLD}]
    given[3], run[-1] = "stable", "other"
    code, _, err = cli("dpo", "--model_name_or_path", coder.name, *given, *run)
    assert code == 4
    assert err.count("\n") == 1
    assert "cannot be found out" in err


@pytest.mark.parametrize("verb", [("advise",), ("data", "show"), ("eval",)], ids=lambda verb: verb[-1])
def test_every_verb_that_loads_refuses_what_it_cannot_pin(verb: tuple[str, ...], coder: Coder, cli: Cli) -> None:
    settings = ["--model_name_or_path", coder.name, "--trust_remote_code", "true", "--model_revision", "stable"]
    code, _, err = cli(*verb, *settings, "--dataset_name", "pairs.jsonl")
    assert code == 4, err
    assert "cannot be found out" in err
    assert "Traceback" not in err
