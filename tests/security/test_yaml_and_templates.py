"""Files that would run something are refused in one line, and nothing runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from preftune.report.files import Notes
from preftune.report.read import read_run
from tests.security.conftest import Cli

TAGS = (
    "!!python/object/apply:os.system ['touch ran']",
    "!!python/object/new:os.system ['touch ran']",
    "!!python/name:os.system",
    "!!python/module:antigravity",
)
ESCAPES = (
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__']['__import__']('os').system('touch ran') }}",
    "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
    "{% import 'os' as os %}{{ os.system('touch ran') }}",
    "{% include '/etc/passwd' %}",
)
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("place", ["value", "nested", "whole"])
def test_configurations_hold_plain_values_only(tag: str, place: str, cli: Cli) -> None:
    text = {"value": f"beta: {tag}\n", "nested": f"model_init_kwargs:\n  a: [{tag}]\n", "whole": f"{tag}\n"}[place]
    Path("c.yaml").write_text(text)
    for verb in (("dpo",), ("data", "show"), ("eval",), ("advise",), ("sweep", "--out", "o")):
        code, _, err = cli(*verb, "--config", "c.yaml")
        assert code == 2, err
        assert err.count("\n") == 1
        assert "c.yaml" in err
    assert not Path("ran").exists()


def test_values_on_the_command_line_are_plain_too(cli: Cli) -> None:
    code, _, err = cli("dpo", "--model_init_kwargs", "a: " + TAGS[0], "--model_name_or_path", "model")
    assert code == 2
    assert err.count("\n") == 1
    assert not Path("ran").exists()


def test_a_copied_recipe_that_was_tampered_with(cli: Cli) -> None:
    assert cli("recipes", "copy", "kto", "mine.yaml")[0] == 0
    with Path("mine.yaml").open("a") as file:
        file.write(f"\nrun_name: {TAGS[0]}\n")
    code, _, err = cli("kto", "--config", "mine.yaml")
    assert code == 2
    assert err.count("\n") == 1
    assert not Path("ran").exists()


@pytest.mark.parametrize("tag", TAGS)
def test_a_report_leaves_a_hostile_config_out(tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(f"beta: {tag}\n")
    run = read_run(tmp_path)
    assert run.config == {}
    assert run.notes == Notes(["config.yaml was left out: it is not valid YAML"])
    assert not Path("ran").exists()


def chat_rows(path: Path) -> None:
    def turn(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    rows = [
        {"prompt": turn("user", f"film {i}"), "chosen": turn("assistant", " nice"), "rejected": turn("assistant", " b")}
        for i in range(4)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("escape", ESCAPES)
@pytest.mark.parametrize("source", ["setting", "model"])
def test_templates_cannot_leave_the_sandbox(escape: str, source: str, world: Path, cli: Cli) -> None:
    chat_rows(Path("chat.jsonl"))
    model = "model"
    settings = ["--dataset_name", "chat.jsonl"]
    if source == "setting":
        settings += ["--chat_template", escape + PLAIN]
    else:
        # As it comes with somebody's model.
        model = "theirs"
        Path(model).mkdir()
        for file in (world / "model").iterdir():
            (Path(model) / file.name).write_bytes(file.read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = escape + PLAIN
        tokenizer.save_pretrained(model)
    # Bad rows are shown by one verb and stop the other.
    code, out, err = cli("data", "show", "--model_name_or_path", model, *settings)
    said = (out + err).lower()
    assert code != 0 or "template" in said
    assert "traceback" not in said
    assert "<class" not in said
    assert "root:" not in said
    code, out, err = cli("dpo", "--model_name_or_path", model, *settings, "--output_dir", "o", "--report_to", "none")
    assert code in (2, 3), (out, err)
    assert "template" in err
    assert len([line for line in err.splitlines() if line.startswith("preftune: ")]) == 1
    assert "Traceback" not in err
    assert not Path("ran").exists()


def test_pages_escape_and_never_compile_what_a_run_says() -> None:
    from preftune.report.html import environment

    made = environment()
    assert made.autoescape is True
    text = "<b>{{ 7*7 }}</b>{% import 'os' as os %}"
    # Exactly the templates in the package are compiled, and they show texts as texts.
    shown = made.from_string("{{ text }}").render(text=text)
    assert shown == "&lt;b&gt;{{ 7*7 }}&lt;/b&gt;{% import &#39;os&#39; as os %}"
    package = Path(__file__).resolve().parents[2] / "src" / "preftune"
    for file in package.rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        assert "from_string(" not in source, file
        assert "jinja2.Template" not in source, file
        assert not re.search(r"import Template\b", source), file
    for file in package.rglob("*.j2"):
        source = file.read_text(encoding="utf-8")
        assert "autoescape" not in source, file
        assert "|safe" not in source.replace(" ", ""), file
