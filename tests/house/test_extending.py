"""The examples of docs/extending.md, carried out on a copy of the sources: a loss, a data format, a verb."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "extending.md"
_BLOCK = re.compile(r"^<!-- extend: (\w+) (\S+) -->\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)

SCRIPT = """
import sys, json
from preftune.cli.main import main
train = ["dpo", "--model_name_or_path", "model", "--dataset_name", "cards.jsonl", "--max_steps", "2",
         "--logging_steps", "1", "--per_device_train_batch_size", "4", "--bf16", "false", "--use_cpu"]
own = ["--loss_type", "wide_hinge", "--hinge_width", "1.5"]
mixed = ["--loss_type", "wide_hinge", "sft", "--loss_weights", "1", "0.2"]
codes = [
    main([*train, *own, "--output_dir", "own"]),
    main([*train, *mixed, "--output_dir", "mixed"]),
    main([*train, "--loss_type", "sigmoid", "--hinge_width", "1.5", "--output_dir", "refused"]),
    main(["methods", "wide_hinge", "--json"]),
    main(["cite", "own"]),
    main(["lengths", "cards.jsonl"]),
    main(["lengths"]),
]
print("codes", codes)
from preftune.sweep.space import parse_params
from preftune.training.fused import FUSABLE
assert "hinge_width" in FUSABLE
"""


def extended(folder: Path) -> Path:
    """A copy of the sources with every change of the page made."""
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    blocks = _BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) == PAGE.read_text(encoding="utf-8").count("<!-- extend:") == 8
    for what, name, code in blocks:
        path = folder / name
        if what == "create":
            assert not path.exists()
            path.write_text(code, encoding="utf-8")
            continue
        text = path.read_text(encoding="utf-8")
        if what == "append":
            text = f"{text.rstrip()}\n\n\n{code}"
        else:
            lines = code.splitlines()
            old, new = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
            assert f"\n{old}\n" in text, (name, old)
            text = text.replace(f"\n{old}\n", f"\n{new}\n", 1)
        path.write_text(text, encoding="utf-8")
    return folder / "src"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The changed sources, a tiny model and a file of cards."""
    from tests.models.tiny import save_tiny_model, train_tokenizer

    folder = tmp_path_factory.mktemp("extended")
    extended(folder)
    cards = [f"What is {n} and {n}?\n+ It is {2 * n}.\n- No idea{'!' * (n % 3)}" for n in range(12)]
    tokenizer = train_tokenizer(cards, 300)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    save_tiny_model(folder / "model", tokenizer)
    rows = "".join(json.dumps({"card": card}) + "\n" for card in cards)
    (folder / "cards.jsonl").write_text(rows, encoding="utf-8")
    return folder


def run(place: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{place / 'src'}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, *command], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def test_the_examples_do_what_the_page_says(place: Path) -> None:
    said = run(place, "-c", SCRIPT)
    assert "codes [0, 0, 2, 0, 0, 0, 2]" in said, said[-3000:]
    lines = [json.loads(line) for line in (place / "own" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["logs"]["loss"] for line in lines if "loss" in line.get("logs", {})]
    # Before the first update policy and reference are the same: every pair costs the whole width.
    assert losses[0] == pytest.approx(1.5, abs=1e-6)
    assert "hinge_width: sigmoid does not take this setting; got 1.5; allowed: 1.0; it works with wide_hinge" in said
    assert '"name": "wide_hinge"' in said
    assert "@misc{zhao2023slic" in said
    assert "chosen: median 9 characters" in said
    assert not (place / "refused").exists()


@pytest.mark.slow
def test_the_new_row_passes_the_tests_of_every_row(place: Path) -> None:
    tests = str(ROOT / "tests" / "objectives" / "test_matrix.py")
    options = ("-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "-o", f"pythonpath={place / 'src'}")
    said = run(place, "-m", "pytest", *options, tests, "-k", "wide_hinge")
    assert " passed" in said


def test_the_changed_sources_keep_the_house_rules(place: Path) -> None:
    config = ("--config", str(ROOT / "pyproject.toml"))
    changed = [str(place / name) for _, name, _ in _BLOCK.findall(PAGE.read_text(encoding="utf-8"))]
    run(place, "-m", "ruff", "check", *config, *changed)
    run(place, "-m", "ruff", "format", "--check", *config, *changed)
