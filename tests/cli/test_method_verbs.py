"""``preftune orpo``, ``cpo`` and ``kto`` from the command line to the files they leave."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from preftune.cli.main import main

from .conftest import Cli

MODEL = ("--model_name_or_path", "model", "--per_device_train_batch_size", "4")
PAIRS = (*MODEL, "--dataset_name", "pairs.jsonl")


@pytest.mark.parametrize(
    ("verb", "options", "title", "paper"),
    [
        ("orpo", (), "preftune orpo", "2403.07691"),
        ("cpo", (), "preftune cpo", "2401.08417"),
        ("cpo", ("--loss_type", "simpo", "--beta", "2", "--cpo_alpha", "0"), "preftune cpo: simpo", "2405.14734"),
        ("kto", (), "preftune kto", "2402.01306"),
    ],
)
def test_a_run_trains_and_can_be_cited(cli: Cli, verb: str, options: tuple[str, ...], title: str, paper: str) -> None:
    code, out, err = cli(verb, *PAIRS, *options, "--max_steps", "2", "--output_dir", "out", "--logging_steps", "1")
    assert code == 0, err
    assert title in out
    assert ("│ reference" in out) is (verb == "kto"), out
    assert Path("out/model.safetensors").exists()
    document = json.loads(Path("out/provenance.json").read_text())
    assert document["command"][1] == verb
    assert paper in Path("out/README.md").read_text()
    code, out, err = cli("cite", "out")
    assert code == 0, err
    assert out.count("@misc") == 1
    assert paper in out


def test_kto_leaves_labelled_answers_unpaired(cli: Cli) -> None:
    rows = [{"prompt": "a film :", "completion": f" {word}", "label": word == "great"} for word in ("great", "dull")]
    Path("labelled.jsonl").write_text("\n".join(map(json.dumps, rows * 4)), encoding="utf-8")
    code, out, err = cli("kto", *MODEL, "--dataset_name", "labelled.jsonl", "--max_steps", "1", "--output_dir", "out")
    assert code == 0, err
    assert "8 of 8 rows" in out
    assert "labelled answers" in Path("out/README.md").read_text()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["orpo", *PAIRS, "--loss_type", "sigmoid"], "preftune dpo"),
        (["orpo", *PAIRS, "--ref_model_name_or_path", "model"], "orpo has no reference model"),
        (["cpo", *PAIRS, "--loss_type", "kto"], "sigmoid, hinge, ipo, simpo, alphapo"),
        (["cpo", *PAIRS, "--simpo_gamma", "1"], "simpo_gamma"),
        (["cpo", *PAIRS, "--loss_type", "hinge", "--label_smoothing", "0.1"], "label_smoothing"),
        (["kto", *PAIRS, "--train_sampling_strategy", "random"], "train_sampling_strategy"),
        (["kto", *PAIRS, "--per_device_train_batch_size", "1"], "2 or more examples in a step"),
        (["dpo", *PAIRS, "--cpo_alpha", "1"], "preftune cpo"),
    ],
)
def test_wrong_settings_are_one_line(cli: Cli, argv: list[str], says: str) -> None:
    code, _, err = cli(*argv)
    assert code == 2, err
    assert says in err
    assert err.count("preftune: ") == 1


@pytest.mark.parametrize("verb", ["orpo", "cpo", "kto"])
def test_help_explains_every_field(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    from preftune.runs.settings import settings_classes

    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    for field in dataclasses.fields(settings_classes(verb)[0]):
        assert out.count(f"\n  --{field.name} ") == 1, field.name
    own = out.split("from transformers.TrainingArguments")[0].split("training:")[1].splitlines()
    heads = [number for number, line in enumerate(own) if line.startswith("  --")]
    for number, end in zip(heads, [*heads[1:], len(own)], strict=True):
        assert any(line.startswith("      ") for line in own[number + 1 : end]), own[number]
