"""``preftune data audit`` as it is called."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from preftune.cli.main import main
from preftune.data.audit import audit
from tests.cli.conftest import world
from tests.data.audit.conftest import clean_rows

__all__ = ["world"]  # a fixture

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    rows = clean_rows(80)
    rows[3]["rejected"] = rows[3]["chosen"]
    rows.append(rows[0])
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nnot json\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["data", "audit", *argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_table_and_file(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("--dataset_name", "pairs.jsonl", "--out", "found")
    assert (code, err) == (0, "")
    for word in ("pairs.jsonl: 80 of 82 rows", "duplicate_rows", "label_noise", "not checked", "heuristic"):
        assert word in out
    document = json.loads((tmp_path / "found" / "audit.json").read_text(encoding="utf-8"))
    findings = {one["check"]: one for one in document["findings"]}
    assert findings["identical_pairs"]["count"] == 1
    assert "pairs.jsonl" in findings["identical_pairs"]["examples"][0]["place"]
    assert findings["bad_rows"]["count"] == 1
    assert findings["duplicate_rows"]["count"] == 1
    assert document["lengths"]["unit"] == "words"
    assert "model_name_or_path" in document["not_applicable"]["truncation"]


def test_json_is_all_there_is_on_the_output(cli: Cli) -> None:
    code, out, _ = cli("--dataset_name", "pairs.jsonl", "--json", "--seed", "7")
    document = json.loads(out)
    assert code == 0
    assert document["settings"]["seed"] == 7


def test_model_and_reference(cli: Cli, world: Path) -> None:
    model = str(world / "model")
    arguments = ["--dataset_name", "pairs.jsonl", "--model_name_or_path", model, "--max_length", "60", "--json"]
    code, out, _ = cli(*arguments)
    plain = json.loads(out)
    assert code == 0
    assert plain["lengths"]["unit"] == "tokens"
    assert plain["settings"]["max_length"] == 60
    assert plain["lengths"]["truncation"]["num_truncated"] > 0
    code, out, _ = cli(*arguments, "--ref_model", model, "--max_length", "400")
    judged = json.loads(out)
    assert code == 0
    assert set(judged["noise"]["judges"]) == {"features", "reference", "features and reference"}


def test_the_margins_are_those_of_a_slow_computation(world: Path) -> None:
    """Log-probs of chosen less rejected: packed, and one sequence at a time in fp64."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from preftune.config import resolve
    from preftune.models.loading import load_tokenizer
    from preftune.runs.audit import data_options_of, reference_margins
    from preftune.runs.settings import cli_defaults, settings_classes

    rows = clean_rows(6)
    folder = str(world / "model")
    argv = ["--dataset_name", "x", "--model_name_or_path", folder, "--max_length", "400", "--reference_store", "false"]
    settings = resolve(argv, settings_classes("dpo")[0], defaults=cli_defaults())
    tokenizer = load_tokenizer(settings.model)
    found = reference_margins(rows, folder, tokenizer, data_options_of(settings), settings, quiet=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    for row, margins in zip(rows, found, strict=True):
        sums, means = [], []
        for side in ("chosen", "rejected"):
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = tokenizer(row["prompt"] + row[side] + "<eos>")["input_ids"]
            assert ids[: len(prompt)] == prompt
            with torch.no_grad():
                logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            scored = [float(logps[t - 1, ids[t]]) for t in range(len(prompt), len(ids))]
            sums.append(sum(scored))
            means.append(np.mean(scored))
        assert margins == pytest.approx([sums[0] - sums[1], means[0] - means[1]], abs=1e-4)


def test_refusals_of_the_command_line(cli: Cli, tmp_path: Path, world: Path) -> None:
    code, out, err = cli("--help")
    assert (code, err) == (0, "")
    assert "--ref_model" in out
    assert cli()[0] == 2
    assert cli("--dataset_name", "pairs.jsonl", "--verb", "sff")[0] == 2
    assert cli("--dataset_name", "pairs.jsonl", "--out")[0] == 2
    code, _, err = cli("--dataset_name", "pairs.jsonl", "--out", "pairs.jsonl")
    assert (code, "not a folder" in err) == (2, True)
    code, _, err = cli("--dataset_name", "pairs.jsonl", "--on_bad_rows", "error")
    assert code == 3
    assert err.count("\n") == 1
    sft = tmp_path / "sft.jsonl"
    sft.write_text(json.dumps({"prompt": "a b", "completion": " c d"}) + "\n", encoding="utf-8")
    code, _, err = cli("--dataset_name", "sft.jsonl", "--ref_model", str(world / "model"))
    assert (code, "single answers" in err) == (2, True)


def test_labelled_answers_stay_single_for_kto(cli: Cli, tmp_path: Path) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in clean_rows(20)
        for side in ("chosen", "rejected")
    ]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    kinds = {}
    for verb in ("dpo", "kto"):
        _, out, _ = cli("--dataset_name", "labels.jsonl", "--verb", verb, "--json")
        kinds[verb] = json.loads(out)["kind"]
    assert kinds == {"dpo": "preference", "kto": "unpaired"}


def test_the_command_line_finds_what_python_finds(cli: Cli) -> None:
    _, out, _ = cli("--dataset_name", "pairs.jsonl", "--json")
    shown = json.loads(out)
    rows = clean_rows(80)
    rows[3]["rejected"] = rows[3]["chosen"]
    rows.append(rows[0])
    told = audit(rows, show_progress=False).to_json()
    counts = [{one["check"]: one["count"] for one in document["findings"]} for document in (shown, told)]
    counts[0].pop("bad_rows"), counts[1].pop("bad_rows")
    assert counts[0] == counts[1]
    assert shown["noise"]["judges"] == told["noise"]["judges"]
