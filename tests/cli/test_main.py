"""Verbs, exit codes, start-up time: the command line as a shell sees it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time

import pytest

import preftune
from preftune.cli.main import VERBS, main
from preftune.errors import SetupError


def shell(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "preftune", *argv], capture_output=True, text=True, timeout=120)


def test_a_typing_error_exits_2_with_one_line_that_names_the_field() -> None:
    done = shell("dpo", "--learning_ratee", "1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "learning_rate?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["dpoo"], "did you mean `preftune dpo`?"),
        (["--frob"], "--frob"),
        (["data", "shwo"], "did you mean `preftune data show`?"),
        (["data"], "no action"),
        (["data", "show", "--num_rows", "0"], "1 or more"),
        (["data", "show", "--verb", "x"], "dpo, orpo, cpo, kto, sft"),
        (["cache", "frob"], "frob"),
        (["methods", "sigmoidd"], "did you mean sigmoid?"),
        (["cite"], "RUN|METHOD"),
        (["cite", "nothing"], "nothing"),
    ],
)
def test_wrong_verbs_and_actions(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "remedy"),
    [
        (["run", "pairs.jsonl"], "accelerate launch -m preftune dpo"),
        (["sweep", "--out", "x"], "--workers N"),
        (["data", "select", "--out", "x"], "unset WORLD_SIZE"),
        (["data", "audit"], "without torchrun"),
        (["eval"], "without torchrun"),
        (["export", "x"], "without torchrun"),
    ],
)
def test_verbs_that_do_not_divide_their_work_say_so(
    argv: list[str], remedy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(argv) == SetupError.exit_code
    said = capsys.readouterr().err
    assert f"preftune {argv[0]} runs in one process" in said
    assert remedy in said
    assert said.count("\n") == 1
    assert main([argv[0], "--help"]) == 0


def test_letters_that_the_output_does_not_know_do_not_end_the_program() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "preftune", "methods", "sigmoid"]
    done = subprocess.run(command, capture_output=True, timeout=120, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"?" in done.stdout
    assert b"sigmoid" in done.stdout


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("argv", [["methods"], ["methods", "--json"], ["cite", "sigmoid"]])
def test_an_output_that_takes_no_more_is_one_line(argv: list[str], unbuffered: str) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "preftune", *argv]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, env=environment)
    assert done.returncode == 6
    assert done.stderr.startswith("preftune: standard output: cannot write (No space left on device)")
    assert done.stderr.count("\n") == 1


def test_other_failures_of_the_system_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: list[str]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("preftune.cli.main._dispatch", fail)
    with pytest.raises(OSError, match="No space left"):
        main(["methods"])


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == main([]) == 0
    out = capsys.readouterr().out
    for verb in VERBS:
        assert f"\n  {verb} " in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"preftune {preftune.__version__}"


@pytest.mark.parametrize("verb", ["dpo", "sft"])
def test_help_of_a_training_verb_explains_every_field(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    import dataclasses

    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    config = {"dpo": preftune.DPOConfig, "sft": preftune.SFTConfig}[verb]
    for field in dataclasses.fields(config):
        assert out.count(f"\n  --{field.name} ") == 1, field.name
    own = out.split("from transformers.TrainingArguments")[0].split("training:")[1].splitlines()
    heads = [number for number, line in enumerate(own) if line.startswith("  --")]
    for number, end in zip(heads, [*heads[1:], len(own)], strict=True):
        assert any(line.startswith("      ") for line in own[number + 1 : end]), own[number]


def test_only_the_first_process_reports_a_wrong_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["dpoo"]) == 2
    assert capsys.readouterr().err == ""


def test_help_and_import_stay_light() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'numpy', 'rich', 'yaml', 'accelerate', 'peft', 'huggingface_hub'}"
    program = (
        "import sys, preftune; from preftune.cli.main import main; main(['--help']);"
        f"found = sorted({heavy} & set(sys.modules)); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60)


def test_help_takes_less_than_three_tenths_of_a_second() -> None:
    # The best of several: the limit is about our imports, not about what else the machine is doing.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    best = float("inf")
    for _ in range(7):
        started = time.perf_counter()
        command = [sys.executable, "-m", "preftune", "--help"]
        subprocess.run(command, check=True, capture_output=True, timeout=60, env=environment)
        best = min(best, time.perf_counter() - started)
    print(f"preftune --help: {best:.3f} s")
    assert best < 0.3


def test_names_are_exported_lazily_and_completely() -> None:
    for name in preftune.__all__:
        assert getattr(preftune, name) is not None
        assert name in dir(preftune)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = preftune.Nothing
