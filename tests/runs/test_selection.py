"""Pairs that a model learns, by models that have not seen them: on rules that are known, and on labels without one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from preftune.cli.main import main
from preftune.config import split_command_line
from preftune.errors import ConfigError, DataError
from preftune.runs.selection import easiest, halves_of, select_pairs
from tests.parity import worlds

NAN = float("nan")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return worlds.World(tmp_path_factory.mktemp("world")).path


def words(draw: random.Random, number: int) -> str:
    return " ".join(draw.choice(worlds.WORDS) for _ in range(number))


def ruled(number: int, turned: set[int]) -> list[dict[str, str]]:
    """Chosen answers end with "great", rejected ones with "dull", but for those that are turned round."""
    draw = random.Random(1)
    rows = []
    for n in range(number):
        answers = [f" {words(draw, 3)} {last}" for last in ("great", "dull")]
        chosen, rejected = answers[::-1] if n in turned else answers
        rows.append({"prompt": f"{words(draw, 6)} :", "chosen": chosen, "rejected": rejected})
    return rows


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def flags(model: str, data: Path, **more: object) -> list[str]:
    settings = {"model_name_or_path": model, "dataset_name": data, "bf16": "false", "max_length": 64, "beta": 0.1}
    settings |= {"learning_rate": 3e-3, "per_device_train_batch_size": 8, "num_train_epochs": 4, **more}
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def test_all_pairs_of_a_prompt_are_in_one_half() -> None:
    keys = [f"p{n // 3}" for n in range(60)]
    halves = halves_of(keys, seed=3)
    assert {tuple(halves[n : n + 3]) for n in range(0, 60, 3)} == {(0, 0, 0), (1, 1, 1)}
    assert halves.sum() == 30
    assert (halves_of(keys, seed=4) != halves).any()


@pytest.mark.parametrize("keys", [[], ["same"] * 40, [str(n) for n in range(15)]])
def test_halves_that_are_too_small_are_refused(keys: list[str]) -> None:
    with pytest.raises(DataError, match="too few pairs"):
        halves_of(keys, seed=0)


def test_the_easiest_of_each_half_are_kept() -> None:
    margins = np.array([5.0, 1.0, 3.0, NAN, -1.0, 40.0, 30.0, -2.0, 10.0])
    halves = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1])
    assert np.flatnonzero(easiest(margins, halves, 0.5)).tolist() == [0, 2, 5, 6]
    assert np.flatnonzero(easiest(margins, halves, 1.0)).tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert np.flatnonzero(easiest(margins, halves, 0.25)).tolist() == [0, 5]


def test_labels_that_were_turned_round_are_left_out(model: str, tmp_path: Path) -> None:
    turned = set(random.Random(5).sample(range(80), 16))
    line = split_command_line(flags(model, written(tmp_path, ruled(80, turned))))
    found = select_pairs("dpo", line, Console(quiet=True), keep=0.8)
    assert found.tells
    left_out = set(np.flatnonzero(~found.kept).tolist())
    assert len(left_out) == 16
    # Drawn at random 3 of 16 would be turned, and 10 or more less than once in ten thousand times.
    assert len(left_out & turned) >= 14


def test_models_do_not_judge_what_they_have_seen(model: str, tmp_path: Path) -> None:
    """Labels without a rule can be learned by heart, and help with no other pair."""
    rows = worlds.pair_rows(80, seed=2)
    draw = random.Random(7)
    for row in rows:
        row["chosen"], row["rejected"] = (f" {words(draw, 5)}" for _ in range(2))
    line = split_command_line(flags(model, written(tmp_path, rows), learning_rate=1e-2, num_train_epochs=6))
    found = select_pairs("dpo", line, Console(quiet=True), keep=0.5)
    assert not found.tells
    assert 0.3 < found.accuracy.mean < 0.7


@pytest.mark.thin(1)
@pytest.mark.parametrize("verb", ["dpo", "orpo", "cpo"])
def test_the_verb_writes_what_it_kept_and_left_out(
    verb: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ruled(40, {1, 2})
    rows[5]["rejected"] = rows[5]["chosen"]  # cannot be used
    out = tmp_path / "out"
    command = ["data", "select", "--verb", verb, "--out", str(out), "--keep", "0.75", "--use_peft", "--lora_r", "4"]
    assert main([*command, *flags(model, written(tmp_path, rows), lora_target_modules="all-linear")]) == 0
    said = capsys.readouterr().out
    assert "half 1 of 2" in said
    followed = f"--dataset_name {out}/selected.jsonl --use_peft --lora_r 4 --model_name_or_path {model}"
    assert f"next: preftune {verb} {followed}" in said
    kept, left = (
        [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]
        for name in ("selected.jsonl", "left_out.jsonl")
    )
    assert len(kept) + len(left) == 39
    assert len(kept) in (29, 30)
    assert {tuple(row[name] for name in ("prompt", "chosen", "rejected")) for row in [*kept, *left]} == {
        tuple(row.values()) for n, row in enumerate(rows) if n != 5
    }
    found = json.loads((out / "selection.json").read_text(encoding="utf-8"))
    assert found["num_kept"] == len(kept)
    assert sorted(row["held_out_margin"] for row in left) == sorted(
        value for value, is_kept in zip(found["margins"], found["kept"], strict=True) if not is_kept
    )
    assert sorted(each.name for each in out.iterdir()) == [
        ".preftune", "left_out.jsonl", "quarantine.jsonl", "selected.jsonl", "selection.json",
    ]  # fmt: skip
    # Once more into the same folder: its own files are replaced.
    assert main([*command, *flags(model, tmp_path / "pairs.jsonl", lora_target_modules="all-linear")]) == 0


def test_what_somebody_else_wrote_is_left_alone(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "selected.jsonl").write_text("mine")
    data = written(tmp_path, ruled(20, set()))
    assert main(["data", "select", "--out", str(tmp_path), *flags(model, data)]) == ConfigError.exit_code
    assert "selected.jsonl" in capsys.readouterr().err
    assert (tmp_path / "selected.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--keep", "0"], "--keep"),
        (["--keep", "1.5"], "--keep"),
        (["--verb", "sft"], "--verb"),
        (["--output_dir", "x"], "output_dir"),
        (["--save_strategy", "epoch"], "save_strategy"),
        (["--test_split_size", "0.1"], "test_split_size"),
        (["--push_to_hub", "true"], "push_to_hub"),
        (["--generation_steps", "4"], "generation_steps"),
        (["--dataset_streaming", "true"], "dataset_streaming"),
    ],
)
def test_what_has_no_place_here_is_refused(
    more: list[str], said: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(tmp_path, ruled(20, set()))
    command = ["data", "select", "--out", str(tmp_path / "out"), *flags(model, data), *more]
    assert main(command) == ConfigError.exit_code
    assert said in capsys.readouterr().err


def test_what_a_file_of_settings_brings_along_is_named(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = flags(model, written(tmp_path, ruled(20, set())), num_train_epochs=1)
    settings = dict(zip([name[2:] for name in given[::2]], given[1::2], strict=True))
    settings |= {"output_dir": "elsewhere", "eval_strategy": "steps", "save_strategy": "steps"}
    settings |= {"eval_on_start": "true", "load_best_model_at_end": "true"}
    config = tmp_path / "run.yaml"
    config.write_text("".join(f"{name}: {value}\n" for name, value in settings.items()), encoding="utf-8")
    assert main(["data", "select", "--out", str(tmp_path / "out"), "--config", str(config)]) == 0
    assert (
        "without effect here: output_dir, eval_strategy, eval_on_start, load_best_model_at_end"
        in capsys.readouterr().out
    )
    assert not Path("elsewhere").exists()


def test_single_answers_are_refused(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = written(tmp_path, [{"prompt": "a", "completion": " b", "label": n % 2 == 0} for n in range(20)])
    command = ["data", "select", "--out", str(tmp_path / "out"), *flags(model, data, pairing="none")]
    assert main(command) == DataError.exit_code
    assert "pairs" in capsys.readouterr().err
