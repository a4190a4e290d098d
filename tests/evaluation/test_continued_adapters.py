"""Runs that went on from an adapter: what they are compared with after training is what training compared with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from preftune.chat.session import open_session
from preftune.cli.main import main
from preftune.models.tuned import find_tuned

RUN = (
    *("--max_steps", "6", "--per_device_train_batch_size", "4", "--learning_rate", "3e-2", "--use_cpu", "true"),
    *("--report_to", "none", "--advice", "false", "--disable_tqdm", "true", "--test_split_size", "8"),
    *("--eval_strategy", "steps", "--eval_steps", "6", "--seed", "3", "--bf16", "false"),
)


def train(folder: Path, model: str, out: str, *more: str) -> dict[str, float]:
    """A run within the folder; returns the figures of its last evaluation."""
    line = ["dpo", "--model_name_or_path", model, "--dataset_name", "pairs.jsonl", "--output_dir", out, *RUN, *more]
    assert main(line) == 0
    state = json.loads((folder / out / "trainer_state.json").read_text(encoding="utf-8"))
    return next(line for line in reversed(state["log_history"]) if "eval_rewards/margins" in line)


def evaluated(run: str, *more: str) -> dict[str, Any]:
    assert main(["eval", "--model", run, "--num_prompts", "0", *more]) == 0
    found: dict[str, Any] = json.loads((Path(run) / "eval" / "eval.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A model, an adapter on it, and a run that went on from the adapter."""
    from tests.faults.worlds import build, make_pairs

    folder = tmp_path_factory.mktemp("continued")
    build(folder)
    rows = "".join(json.dumps(row) + "\n" for row in make_pairs(40))
    (folder / "pairs.jsonl").write_text(rows, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(folder, "model", "first", "--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear")
        return folder, train(folder, "first", "second")


def test_the_adapter_that_training_went_on_from_is_the_reference(
    runs: tuple[Path, dict[str, float]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, trained = runs
    monkeypatch.chdir(folder)
    found = evaluated("second")
    assert found["ref_model"] == "first"
    margin = found["metrics"]["rewards/margins"]["mean"]
    assert margin == pytest.approx(trained["eval_rewards/margins"], rel=1e-4)
    # Compared with the base it is another figure altogether.
    otherwise = evaluated("second", "--ref_model", "model")["metrics"]["rewards/margins"]["mean"]
    assert abs(otherwise - margin) > 0.1 * abs(margin)
    # And from another folder, where neither adapter nor base has its name.
    (folder / "elsewhere").mkdir(exist_ok=True)
    monkeypatch.chdir(folder / "elsewhere")
    assert evaluated("../second")["metrics"]["rewards/margins"]["mean"] == pytest.approx(margin, rel=1e-6)
    sides = {side.label: side for side in open_session(find_tuned("../second"))[0].sides}
    assert not sides["reference"].adapter_off
    assert sides["reference"].model is not sides["tuned"].model


def test_one_that_is_gone_is_told(
    runs: tuple[Path, dict[str, float]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = runs
    monkeypatch.chdir(folder)
    shutil.copytree(folder / "first", folder / "kept")
    (folder / "first").rename(folder / "gone")
    try:
        assert evaluated("second")["ref_model"] == "second without its adapter"
        told = " ".join(capsys.readouterr().out.split())
        assert "training began from first, which is not here" in told
        assert evaluated("second", "--ref_model", "kept")["ref_model"] == "kept"
        assert "which is not here" not in capsys.readouterr().out
        assert main(["eval", "--model", "second", "--ref_model", "keptt", "--num_prompts", "0"]) == 4
        assert capsys.readouterr().err.startswith("preftune: ref_model: ")
    finally:
        (folder / "gone").rename(folder / "first")


def test_an_adapter_without_its_base_names_the_base(
    runs: tuple[Path, dict[str, float]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = runs
    monkeypatch.chdir(folder)
    (folder / "model").rename(folder / "moved")
    try:
        assert main(["eval", "--model", "first", "--num_prompts", "0"]) == 4
        said = capsys.readouterr().err
        assert "adapter's base model" in said
        assert "got 'model'" in said
    finally:
        (folder / "moved").rename(folder / "model")
