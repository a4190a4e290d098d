"""From a raw file to a model in use, with no command but those that the step before has printed."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from preftune.report.read import read_all
from tests.browser.conftest import Watched, chromium, watched
from tests.pipeline.conftest import Shell, following, start

__all__ = ["chromium", "watched"]

#: So that the tiny model answers in little time.
SHORT = "--num_prompts 4 --max_new_tokens 8"


@pytest.fixture
def one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("was it good\n"))


def test_one_command_leads_to_chat_and_export(shell: Shell, place: Path, one_question: None) -> None:
    said = shell(f"preftune run pairs.jsonl --model base --out tuned {SHORT}")
    for heading in ("\ndata\n", "\nsettings\n", "\ntraining\n", "\nevaluation\n", "\nreport\n"):
        assert heading in said
    assert "held out" in said
    # Every default is shown, and is a setting that can be given.
    assert "test_split_size" in said
    assert "beta " in said
    assert (place / "tuned" / "report.html").is_file()
    (run,), _ = read_all([place / "tuned"])
    assert run.evaluation["num_pairs"] == 12
    assert run.audit
    assert shell(following(said, "chat"))
    assert "tuned/export" in shell(following(said, "export"))
    assert (place / "tuned" / "export" / "model.safetensors").is_file()
    again = shell(f"preftune run pairs.jsonl --model base --out tuned {SHORT}")
    assert "going on in tuned" in again
    assert "\ntraining\n" not in again


def test_every_step_prints_the_next(shell: Shell, place: Path, one_question: None) -> None:
    common = "--model_name_or_path base --dataset_name pairs.jsonl --output_dir out --use_peft --test_split_size 0.2"
    planned = shell(f"preftune dpo {common} --max_steps 4 --learning_rate 1e-3 --dry_run")
    assert "dry run" in planned
    trained = shell(following(planned, "dpo"))
    evaluated = shell(f"{following(trained, 'eval')} {SHORT}")
    assert "interval" in evaluated.split("\n")[-4]
    (run,), _ = read_all([place / "out"])
    assert run.evaluation["num_pairs"] == 12
    reported = shell(following(evaluated, "report"))
    assert (place / "report.html").is_file()
    assert shell(following(reported, "chat"))
    # What was printed leads on; export stands beside it in the docs of serving.
    assert "To serve it" in shell("preftune export out")


def test_without_a_converter_the_model_is_there_and_the_reason_said(
    shell: Shell, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from preftune.cli.main import main

    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    said = shell("preftune run pairs.jsonl --model base --out tuned --max_steps 2 --no_audit --no_evaluate")
    assert main([*following(said, "export").split()[1:], "--gguf", "q8_0"]) == 6
    error = capsys.readouterr().err
    assert "convert_hf_to_gguf.py" in error
    assert "everything else is in tuned/export" in error
    assert (place / "tuned" / "export" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_page_of_a_whole_path_in_a_browser(shell: Shell, place: Path, watched: Callable[..., Watched]) -> None:
    shell(f"preftune run pairs.jsonl --model base --out tuned {SHORT}")
    for width, scheme in ((1280, "light"), (390, "dark")):
        tab = watched(color_scheme=scheme, width=width).open(place / "tuned" / "report.html")
        places, drawn = tab.count_plots()
        assert places
        assert drawn == places
        assert not tab.complaints
        # Nothing is fetched from elsewhere.
        assert all(request.startswith(("file:", "data:", "blob:")) for request in tab.requests)
        text = tab.page.inner_text("body")
        for word in ("held-out", "pairs.jsonl", "tuned"):
            assert word in text
        assert tab.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


# bfloat16 rounds otherwise beside other rows, which the run says.
@pytest.mark.filterwarnings("ignore:policy and reference differ .* which is rounding:UserWarning")
@pytest.mark.parametrize(("rows", "verb"), [("answers", "kto"), ("chats", "sft")])
def test_rows_choose_the_method(shell: Shell, place: Path, rows: str, verb: str) -> None:
    said = shell(f"preftune run {rows}.jsonl --model base --out tuned --max_steps 3 {SHORT}")
    assert f"preftune {verb}" in said
    record = json.loads((place / "tuned" / "provenance.json").read_text(encoding="utf-8"))
    assert record["command"][1] == verb
    assert record["data"]["test"]["num_rows"] > 0
    assert following(said, "chat")


def test_what_is_given_wins_over_what_is_advised(shell: Shell, place: Path) -> None:
    flags = "--beta 0.37 --no_use_peft --test_split_size 5 --max_steps 2 --no_evaluate --no_audit"
    shell(f"preftune run pairs.jsonl --model base --out tuned {flags}")
    record = json.loads((place / "tuned" / "provenance.json").read_text(encoding="utf-8"))
    trainer, model = record["settings"]["trainer"], record["settings"]["model"]
    assert trainer["beta"]["value"] == 0.37
    assert trainer["max_steps"]["value"] == 2
    assert model["use_peft"]["value"] is False
    assert record["data"]["test"]["num_rows"] == 5
    assert not (place / "tuned" / "eval").exists()
    assert not (place / "tuned" / "audit.json").exists()


def test_a_dry_run_leaves_nothing(shell: Shell, place: Path) -> None:
    before = sorted(path.name for path in place.iterdir())
    said = shell("preftune run pairs.jsonl --model base --out tuned --dry_run")
    assert "memory" in said
    assert following(said, "run") == "preftune run pairs.jsonl --model base --out tuned"
    assert sorted(path.name for path in place.iterdir()) == before


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("run pairs.jsonl", "no model to tune"),
        ("run --model base", "no data to train on"),
        ("run nothing.jsonl --model base", "nothing.jsonl"),
        ("run pairs.jsonl --model base --learning_ratee 1", "did you mean learning_rate?"),
        ("run pairs.jsonl --model base --num_prompts -1", "0 or more"),
        ("run pairs.jsonl --model base --verb tune", "allowed: dpo"),
        ("run pairs.jsonl --dataset_name pairs.jsonl --model base", "both DATA and --dataset_name"),
    ],
)
def test_a_mistake_is_one_line(place: Path, capsys: pytest.CaptureFixture[str], line: str, told: str) -> None:
    from preftune.cli.main import main

    code = main(line.split())
    error = capsys.readouterr().err
    assert code in (2, 3)
    assert told in error
    assert error.count("\n") == 1
    assert not (place / "base-DPO").exists()


def test_another_run_in_the_folder_is_not_touched(
    shell: Shell, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from preftune.cli.main import main

    line = "run pairs.jsonl --model base --out tuned --max_steps 2 --no_audit --no_evaluate"
    shell("preftune run pairs.jsonl --model base --out tuned --max_steps 1 --no_audit --no_evaluate")
    before = (place / "tuned" / "provenance.json").read_bytes()
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert "max_steps" in error
    assert "preftune run pairs.jsonl" in error
    assert (place / "tuned" / "provenance.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("seen", ["step 1/", "scoring "])
def test_ctrl_c_and_the_printed_command_goes_on(place: Path, seen: str) -> None:
    # So much that there is time to interrupt the evaluation; a pretrained model takes its time.
    steps, prompts, tokens = (6, 8, 64) if os.environ.get("PREFTUNE_FIRST_HOUR_MODEL") else (60, 40, 800)
    line = f"preftune run pairs.jsonl --model base --out tuned --max_steps {steps} --logging_steps 1"
    line += f" --num_prompts {prompts} --max_new_tokens {tokens}"
    process = start(line, place)
    assert process.stdout is not None
    told = ""
    for text in process.stdout:
        told += text
        if text.startswith(seen):
            process.send_signal(signal.SIGINT)
            break
    rest_of_it, _ = process.communicate(timeout=240)
    told += rest_of_it
    assert process.returncode == 130, told
    assert "Traceback" not in told
    go_on = next(text for text in told.split("\n") if "to go on: " in text).partition("to go on: ")[2]
    assert go_on == line
    rest = start(go_on, place)
    out, _ = rest.communicate(timeout=300)
    assert rest.returncode == 0, out
    # Steps that were done are not done again.
    assert f"step 1/{steps}" not in out
    assert following(out, "export")
    assert (place / "tuned" / "eval" / "eval.json").is_file()
