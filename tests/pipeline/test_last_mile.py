"""What comes after a training, and settings that would do nothing: said, and never another run's figures."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from preftune.cli.main import main
from preftune.data.audit.proportions import share_of
from preftune.evaluation.metrics import Summary
from preftune.models.tuned import find_tuned
from preftune.runs.earlier_run import rows_of_run
from tests.export.conftest import pair_rows
from tests.pipeline.conftest import Shell

TRAIN = "preftune dpo --model_name_or_path base --learning_rate 1e-3 --report_to none --save_strategy no --seed 1"


def trained(shell: Shell, data: str, out: str, *flags: str) -> str:
    words = f"--dataset_name {data} --output_dir {out} --max_steps 2 --test_split_size 0.2 {' '.join(flags)}"
    return shell(f"{TRAIN} {words}")


def evaluated(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "eval" / "eval.json").read_text(encoding="utf-8"))
    return found


def rows_file(path: Path, number: int) -> Path:
    path.write_text("\n".join(map(json.dumps, pair_rows(number))), encoding="utf-8")
    return path


@pytest.mark.parametrize("change", ["more rows", "other rows", "gone"])
def test_rows_that_are_no_longer_those_held_out_are_not_evaluated_on(
    shell: Shell, place: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    file = rows_file(place / "d.jsonl", 40)
    trained(shell, "d.jsonl", "run")
    shell("preftune eval --model run --num_prompts 0")
    before = (place / "run" / "eval" / "eval.json").read_bytes()
    if change == "more rows":
        rows_file(file, 60)
    elif change == "other rows":
        rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pair_rows(40)]
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        file.unlink()
    assert main(["eval", "--model", "run", "--num_prompts", "0"]) == 2
    said = capsys.readouterr().err
    assert ("its data have changed since" if change != "gone" else "its data cannot be read") in said
    assert "set --dataset_name" in said
    assert (place / "run" / "eval" / "eval.json").read_bytes() == before


def test_the_data_of_a_run_are_found_from_another_directory(
    shell: Shell, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where a file of that name with other rows lies in that directory."""
    rows_file(place / "d.jsonl", 40)
    trained(shell, "d.jsonl", "run")
    shell("preftune eval --model run --num_prompts 0")
    expected = evaluated(place / "run")["metrics"]
    for name in ("empty", "other"):
        (place / name).mkdir()
    rows_file(place / "other" / "d.jsonl", 60)
    for name in ("empty", "other"):
        monkeypatch.chdir(place / name)
        shell("preftune eval --model ../run --num_prompts 0")
        assert evaluated(place / "run")["metrics"] == expected


@pytest.mark.parametrize(
    "flags",
    ["--max_length 64", "--max_length 56 --truncation_mode keep_end", "--transcripts messages", ""],
)
def test_other_rows_become_tokens_as_in_the_training_of_the_run(shell: Shell, place: Path, flags: str) -> None:
    """Evaluated by name, the rows held out give the figures that the run's own do; what is said otherwise counts."""
    rows = [{**row, "chosen": row["chosen"] * 12, "rejected": row["rejected"] * 9} for row in pair_rows(40)]
    (place / "d.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    trained(shell, "d.jsonl", "run", flags)
    shell("preftune eval --model run --num_prompts 0")
    expected = evaluated(place / "run")
    kept = rows_of_run(find_tuned(place / "run"))
    (place / "held.jsonl").write_text("\n".join(map(json.dumps, kept)), encoding="utf-8")
    shell("preftune eval --model run --num_prompts 0 --dataset_name held.jsonl")
    by_name = evaluated(place / "run")
    for found in ("metrics", "num_pairs"):
        assert by_name[found] == expected[found]
    settings = by_name["settings"]
    assert isinstance(settings, dict)
    assert settings["max_length"] == (int(flags.split()[1]) if "max_length" in flags else 1024)
    shell("preftune eval --model run --num_prompts 0 --dataset_name held.jsonl --max_length 60")
    assert evaluated(place / "run")["settings"]["max_length"] == 60  # type: ignore[index]


def test_an_adapter_that_has_learned_nothing_is_compared_with_its_base(shell: Shell, place: Path) -> None:
    trained(shell, "pairs.jsonl", "run", "--use_peft", "--learning_rate 0")
    said = shell("preftune eval --model run --num_prompts 0")
    found = evaluated(place / "run")
    assert "without its adapter" in str(found["ref_model"])
    assert found["metrics"]["rewards/margins"]["mean"] == 0.0  # type: ignore[index]
    assert "without a reference" not in said


@pytest.mark.parametrize("before", [True, False])
def test_a_run_does_not_go_on_with_an_adapter_more_or_less(
    shell: Shell, place: Path, capsys: pytest.CaptureFixture[str], before: bool
) -> None:
    flags = shlex.split(f"{TRAIN} --dataset_name pairs.jsonl --output_dir run --save_strategy steps --save_steps 1")[1:]
    with_adapter, without = ["--use_peft"], list[str]()
    first, second = (with_adapter, without) if before else (without, with_adapter)
    assert main([*flags, "--max_steps", "1", *first]) == 0
    capsys.readouterr()
    assert main([*flags, "--max_steps", "2", "--resume_from_checkpoint", "true", *second]) == 2
    said = capsys.readouterr().err
    assert f"adapter default {'there -> none' if before else 'none -> new'}" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--lora_r 64", "lora_r has no effect without use_peft"),
        ("--lora_target_modules q_proj", "lora_target_modules has no effect without use_peft"),
        ("--bnb_4bit_quant_type fp4", "bnb_4bit_quant_type has no effect without load_in_4bit"),
        ("--eval_steps 10", "eval_steps has no effect without eval_strategy: steps"),
    ],
)
def test_a_setting_without_the_one_it_needs_is_told(shell: Shell, place: Path, flags: str, says: str) -> None:
    said = shell(f"{TRAIN} --dataset_name pairs.jsonl --output_dir run --dry_run {flags}")
    assert says in " ".join(said.replace("│", " ").split())
    assert "lora_r has no effect" not in shell(
        f"{TRAIN} --dataset_name pairs.jsonl --output_dir run --dry_run --use_peft --lora_r 4"
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--gradient_checkpointing_kwargs notadict", "gradient_checkpointing_kwargs: not a mapping"),
        ("--dataloader_num_workers -1", "dataloader_num_workers"),
        ("--use_peft --lora_alpha 0", "lora_alpha: out of range"),
    ],
)
def test_values_of_the_wrong_kind_are_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], flags: str, says: str
) -> None:
    words = shlex.split(f"{TRAIN} --dataset_name pairs.jsonl --output_dir run {flags}")[1:]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new"), [("lora_rank", "lora_r"), ("cutoff_len", "max_length"), ("lr", "learning_rate")]
)
def test_names_of_other_projects_are_translated(shell: Shell, place: Path, old: str, new: str) -> None:
    (place / "c.yaml").write_text(f"{old}: 64\nuse_peft: true\n", encoding="utf-8")
    line = TRAIN.replace("--learning_rate 1e-3", "")
    said = shell(f"{line} --config c.yaml --dataset_name pairs.jsonl --output_dir run --dry_run")
    assert f"{old} -> {new}" in " ".join(said.replace("│", " ").split())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--max_prompt_length 10", "max_prompt_length 10 and max_length"),
        ("--max_length 64 --truncation_mode keep_end", "what is cut off the beginning of a prompt is not read"),
        ("--max_length 64", "teaches not to stop"),
    ],
)
def test_what_truncation_takes_away_is_told_as_it_is(shell: Shell, place: Path, flags: str, says: str) -> None:
    said = shell(f"{TRAIN} --dataset_name pairs.jsonl --output_dir run --dry_run --max_dropped_share 1 {flags}")
    told = " ".join(said.replace("│", " ").split())
    assert says in told
    assert ("teaches not to stop" in told) is (says == "teaches not to stop")


def test_a_dry_run_leaves_nothing(shell: Shell, place: Path) -> None:
    rows = [*pair_rows(12), {"prompt": "x", "chosen": "", "rejected": "y"}]
    (place / "bad.jsonl").write_text("\n".join(map(json.dumps, rows[-1:] * 2)), encoding="utf-8")
    text = [{"prompt": "p q", "chosen": f"c {n}", "rejected": "r"} for n in range(30)]
    (place / "bad.jsonl").write_text("\n".join(map(json.dumps, [*text, rows[-1]])), encoding="utf-8")
    before = sorted(path.name for path in place.iterdir())
    shell(f"{TRAIN} --dataset_name bad.jsonl --output_dir run --dry_run")
    assert sorted(path.name for path in place.iterdir()) == before


def test_the_home_of_a_model_is_understood(shell: Shell, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    (place / "c.yaml").write_text("model_name_or_path: ~/base\n", encoding="utf-8")
    line = TRAIN.replace("--model_name_or_path base", "--config c.yaml")
    assert "packed" in shell(f"{line} --dataset_name ~/pairs.jsonl --output_dir run --dry_run")


def test_printed_commands_can_be_copied(shell: Shell, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = shell("preftune data convert --dataset_name pairs.jsonl --out o.jsonl --model_name_or_path base")
    line = next(line for line in said.splitlines() if line.startswith("next: "))
    assert "--model_name_or_path base" in line
    shell(line.removeprefix("next: "))
    (place / "advised.yaml").write_text("mine: 1\n", encoding="utf-8")
    said = shell("preftune advise --dataset_name pairs.jsonl --model_name_or_path base")
    assert "--write advised-2.yaml" in " ".join(said.split())


def test_a_finished_run_is_evaluated_again_where_that_is_asked_for(shell: Shell, place: Path) -> None:
    line = "preftune run pairs.jsonl --model base --out g --max_steps 2 --max_new_tokens 8"
    shell(f"{line} --num_prompts 1")
    shell(f"{line} --num_prompts 2")
    assert evaluated(place / "g")["settings"]["num_prompts"] == 2  # type: ignore[index]


def test_a_report_of_what_is_not_there_names_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "report.html").write_text("mine", encoding="utf-8")
    assert main(["report", "nothere"]) == 2
    assert "no such folder; got 'nothere'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["methods"], ["recipes", "list"]])
def test_a_reader_that_goes_is_no_failure(words: list[str]) -> None:
    command = f"{shlex.quote(sys.executable)} -m preftune {' '.join(words)} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "80"}
    )
    assert done.stdout.splitlines()[-1] == "0", done.stderr


def test_rows_without_a_prompt_are_rows_of_their_own() -> None:
    flags = [n % 10 == 0 for n in range(60)]
    assert share_of(flags, [""] * 60) == share_of(flags)


def test_the_interval_of_a_share_stays_within_it() -> None:
    shares = [0.0] * 10 + [0.02, 0.03]
    found = Summary().share(shares, list(range(12)))
    assert 0.0 <= found["low"] <= found["mean"] <= found["high"] <= 1.0
