"""Provenance file and model card."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from preftune.config import Origin
from preftune.training import card, provenance

TOKEN = "hf_" + "c3" * 17
CARD = card.Card(title="out", verb="dpo", base_model="org/model", datasets=["org/data"], methods=["sigmoid"])


def test_collects_what_is_needed_and_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "from-the-environment")
    monkeypatch.setenv("SOME_VARIABLE", "also-from-the-environment")
    document = provenance.collect(
        argv=["dpo", "--hub_token", TOKEN, "--beta", "0.2"],
        settings={"trainer": {"beta": 0.2, "hub_token": "plain-secret", "seed": 7, "note": f"x {TOKEN}"}},
        origins={"beta": Origin("flag", "--beta"), "seed": Origin("file", "r.yaml:3", "data_seed")},
        results={"loss": math.nan, "reward": np.float32(0.5)},
        data={"train": {"num_rows": 1}},
    )
    path = provenance.write(tmp_path, document)
    text = path.read_text(encoding="utf-8")
    for secret in (TOKEN, "plain-secret", "from-the-environment"):
        assert secret not in text
    read = json.loads(text)
    assert read["settings"]["trainer"]["beta"] == {"value": 0.2, "from": "flag --beta"}
    assert read["settings"]["trainer"]["seed"]["from"] == "file r.yaml:3 (written as data_seed)"
    assert read["settings"]["trainer"]["hub_token"]["value"] == "<redacted>"
    assert read["command"][-2:] == ["--beta", "0.2"]
    assert (read["seed"], read["results"]) == (7, {"loss": "nan", "reward": 0.5})
    assert {"python", "torch", "transformers"} <= set(read["versions"])
    assert not list(tmp_path.glob("*.tmp"))


def test_digest_follows_content_and_order() -> None:
    rows = [{"a": "é", "b": 1}, {"a": "\ud800", "b": None}]
    expected = hashlib.sha256()
    for text in ('{"a":"é","b":1}\n', '{"a":"\ud800","b":null}\n'):
        expected.update(text.encode("utf-8", "surrogatepass"))
    assert provenance.describe_dataset(rows) == {
        "num_rows": 2,
        "columns": ["a", "b"],
        "sha256": expected.hexdigest(),
    }
    assert provenance.describe_dataset(rows[::-1])["sha256"] != expected.hexdigest()


def test_git_state(tmp_path: Path) -> None:
    assert provenance.git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    state = provenance.git_state(tmp_path)
    assert state is not None
    assert len(state["commit"]) == 40
    assert state["changed"] is False


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
    )
)
def test_anything_becomes_json(value: Any) -> None:
    json.dumps(provenance.plain(value), allow_nan=False)


def test_the_card_names_method_paper_data_and_figures() -> None:
    text = card.render(
        dataclasses.replace(
            CARD,
            papers=[("A Paper", "https://example.org/1")],
            settings={"beta": 0.1, "loss_type": ["a", "b"]},
            metrics={"eval_loss": 0.123456, "nested": {}},
            data_lines=["train: 90 of 100 rows"],
            versions={"torch": "2.13.0"},
        )
    )
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "org/model"
    assert front["datasets"] == ["org/data"]
    assert front["library_name"] == "transformers"
    for line in (
        "- A Paper: <https://example.org/1>",
        "| beta | 0.1 |",
        "| eval_loss | 0.1235 |",
        "- train: 90 of 100 rows",
    ):
        assert line in text
    assert "nested" not in text


@pytest.mark.parametrize(
    ("settings", "template", "words"),
    [
        (
            {"r": 8, "lora_alpha": 16, "target_modules": ["v_proj", "q_proj"]},
            True,
            (
                "A LoRA adapter of rank 8 (alpha 16; q_proj, v_proj) for",
                "AutoPeftModelForCausalLM",
                "apply_chat_template",
            ),
        ),
        (
            {"r": 4, "lora_alpha": 4, "use_dora": True, "target_modules": "all-linear"},
            False,
            ("A DoRA adapter of rank 4 (alpha 4; all-linear) for", "AutoPeftModelForCausalLM", 'tokenizer("Hello!"'),
        ),
        (None, True, ("A version of org/model", "AutoModelForCausalLM.from_pretrained", "apply_chat_template")),
    ],
    ids=["LoRA", "DoRA", "full"],
)
def test_a_written_card_says_how_to_use_the_model(
    tmp_path: Path, settings: dict[str, Any] | None, template: bool, words: tuple[str, ...]
) -> None:
    if settings is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if template:
        (tmp_path / "chat_template.jinja").write_text("x", encoding="utf-8")
    found = dataclasses.replace(CARD, is_adapter=settings is not None, title='a "b"\n')
    text = card.write(tmp_path, found).read_text(encoding="utf-8")
    for word in words:
        assert word in text
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert '"path/to/a-b-"' in code


def test_local_paths_do_not_become_dead_links(tmp_path: Path) -> None:
    local = dataclasses.replace(CARD, base_model=str(tmp_path), datasets=["data.jsonl", "./x", str(tmp_path)])
    front = yaml.safe_load(card.render(local).split("---")[1])
    assert "base_model" not in front
    assert "datasets" not in front


HOSTILE = "</td><script>x</script> [l](javascript:a) ![i](http://e) `c` **b** | x\n# h\n---\nlicense: mit"


@pytest.mark.parametrize("field", ["title", "base_model", "datasets", "settings", "metrics", "data_lines", "papers"])
def test_values_stay_text(field: str) -> None:
    filled: dict[str, Any] = {
        "title": HOSTILE,
        "base_model": HOSTILE,
        "datasets": [HOSTILE],
        "settings": {HOSTILE: HOSTILE},
        "metrics": {HOSTILE: HOSTILE},
        "data_lines": [HOSTILE],
        "papers": [(HOSTILE, f"javascript:{HOSTILE}")],
    }
    text = card.render(dataclasses.replace(CARD, **{field: filled[field]}))
    _, front, body = text.split("---\n", 2)
    assert "license" not in yaml.safe_load(front)
    assert "<script" not in body
    assert "](" not in body.replace("\\](", "")
    assert not any(line.startswith("# h") for line in body.splitlines())
    assert "<javascript" not in body


@given(st.text(st.characters(codec="utf-8")))
def test_escaping_loses_nothing(text: str) -> None:
    shown = html.unescape(card.escape(text)).replace("\\", "")
    assert shown == " ".join(text.split()).replace("\\", "")
    assert "\n" not in card.escape(text)
