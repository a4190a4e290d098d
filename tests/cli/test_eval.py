"""``preftune eval`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Cli

SMALL = ("--num_prompts", "3", "--max_new_tokens", "6", "--num_resamples", "200", "--max_length", "120")


def test_evaluates_writes_and_prints(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli(
        "eval", "--model", "model", "--ref_model", "model", "--dataset_name", "pairs.jsonl", "--out", "found", *SMALL
    )
    assert code == 0, err
    document = json.loads((tmp_path / "found" / "eval.json").read_text(encoding="utf-8"))
    # A model against itself: every log-ratio is zero, every pair a tie, and ties lose.
    assert document["metrics"]["rewards/accuracies"]["mean"] == 0
    assert document["metrics"]["rewards/ties"]["mean"] == 1
    assert document["kl"]["mean"] == pytest.approx(0, abs=1e-4)
    assert document["num_pairs"] == 16
    for words in ("reward accuracy", "interval", "KL on policy samples", "chosen is longer", "saved found/eval.json"):
        assert words in out


def test_settings_from_yaml_and_default_folder(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "eval.yaml").write_text(
        "model_name_or_path: model\ndataset_name: pairs.jsonl\nnum_prompts: 0\nreference_free: true\nbeta: 2.0\n"
    )
    code, _, err = cli("eval", "--config", "eval.yaml", "--split", "train[:10]", "--num_resamples", "200")
    assert code == 0, err
    document = json.loads((tmp_path / "model-eval" / "eval.json").read_text(encoding="utf-8"))
    assert (document["num_pairs"], document["beta"]) == (10, 2.0)
    assert document["samples"] == []


def test_no_reference_is_said_in_words(cli: Cli) -> None:
    code, out, _ = cli("eval", "--model", "model", "--dataset_name", "pairs.jsonl", *SMALL)
    assert code == 0
    assert "no reference" in " ".join(out.split())
    assert "reward accuracy" not in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--dataset_name", "pairs.jsonl"), 2, "no model to evaluate"),
        (("--model", "model"), 2, "no data to evaluate on"),
        (("--model", "model", "--dataset_name", "pairs.jsonl", "--use_peft"), 2, "name the adapter's folder"),
        (("--model", "model", "--dataset_name", "pairs.jsonl", "--lora_r", "8"), 2, "no effect on an evaluation"),
        (("--model", "model", "--dataset_name", "pairs.jsonl", "--betta", "1"), 2, "did you mean beta?"),
        (("--model", "model", "--dataset_name", "pairs.jsonl", "--level", "95"), 2, "--level: not a confidence level"),
        (("--model", "model", "--dataset_name", "gone.jsonl"), 3, "no such file"),
        (("--model", "model", "--dataset_name", "single.jsonl"), 3, "4 of 4 labelled answers have no counterpart"),
        (("--model", "./gone", "--dataset_name", "pairs.jsonl", "--report_to", "tensorbord"), 2, "tensorboard, "),
        (("--model", "./gone", "--dataset_name", "pairs.jsonl"), 4, "no such"),
        (
            ("--model", "model", "--dataset_name", "pairs.jsonl", "--judge_url", "http://127.0.0.1:9/v1",
             "--judge_model", "m", "--judge_key_env", "PREFTUNE_TEST_NO_SUCH_KEY"),
            2,
            "environment variable is not set",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(cli: Cli, arguments: tuple[str, ...], code: int, words: str) -> None:
    single = [json.dumps({"prompt": f"Q {n} :", "completion": " good", "label": True}) for n in range(4)]
    Path("single.jsonl").write_text("\n".join(single), encoding="utf-8")
    found, _, err = cli("eval", *arguments)
    assert found == code
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["--lora_r", "--dry_run", "--advice", "--dataset_mixture", "--dataset_test_split"])
def test_what_is_refused_is_not_offered(cli: Cli, name: str) -> None:
    assert f"{name} " not in cli("eval", "--help")[1]
    value = "off" if name == "--advice" else "1"
    code, _, err = cli("eval", "--model", "model", "--dataset_name", "pairs.jsonl", name, value)
    assert code == 2
    assert err.startswith(f"preftune: {name}")


def test_the_table_is_seen_before_a_tracker_fails(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.integration_utils import TensorBoardCallback

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the server is gone")

    monkeypatch.setattr(TensorBoardCallback, "on_log", broken)
    flags = ("--model", "model", "--ref_model", "model", "--dataset_name", "pairs.jsonl", "--num_prompts", "0")
    code, out, err = cli("eval", *flags, "--report_to", "tensorboard")
    assert code == 6
    assert "the server is gone" in err
    assert "reward accuracy" in out
    assert "saved model-eval/eval.json" in out


def test_help_lists_every_setting(cli: Cli) -> None:
    code, out, _ = cli("eval", "--help")
    assert code == 0
    for name in ("--compare", "--judge_key_env", "--reference_free", "--num_prompts", "--report_to"):
        assert name in out


def test_a_folder_without_weights_is_told_by_its_checkpoints(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "killed" / "checkpoint-5").mkdir(parents=True)
    code, _, err = cli("eval", "--model", "killed", "--num_prompts", "0")
    assert code == 4
    assert "no weights here" in err
    assert "did you mean killed/checkpoint-5?" in err


def test_more_lost_rows_than_allowed(cli: Cli, tmp_path: Path) -> None:
    rows = (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    bad = [json.dumps({"prompt": "x", "chosen": "same", "rejected": "same"})] * 8
    (tmp_path / "some.jsonl").write_text("\n".join([*rows, *bad]), encoding="utf-8")
    common = ("eval", "--model", "model", "--dataset_name", "some.jsonl", "--num_prompts", "0")
    code, _, err = cli(*common, "--on_bad_rows", "error")
    assert code == 3
    assert "some.jsonl:17" in err
    code, _, err = cli(*common)
    assert code == 3
    assert "8 of 24 rows are lost" in err
    code, _, _ = cli(*common, "--allow_drops", "--num_resamples", "200")
    assert code == 0
    assert (tmp_path / "model-eval" / "quarantine.jsonl").exists()
