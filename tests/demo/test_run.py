"""The whole demo, small: files, numbers that agree with each other, and an honest exit code."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from preftune.demo.run import main, run_demo
from preftune.demo.training import DemoSettings
from preftune.demo.world import World
from preftune.errors import ConfigError, SetupError, TrainingError

# What `--quick` runs, for two betas.
SMALL = DemoSettings(betas=(0.1, 1.0)).quick()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    from rich.console import Console

    out = tmp_path_factory.mktemp("demo")
    printed = io.StringIO()
    results = run_demo(out, SMALL, seed=1, console=Console(file=printed, width=80))
    return out, results, printed.getvalue()


@pytest.mark.slow
def test_the_reward_rises_by_more_than_its_interval(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, results, _ = finished
    assert results["risen"]
    assert results["dpo"]["reward"]["low"] > results["sft"]["reward"]["high"]
    assert results["rise"]["low"] > 0
    assert results["dpo"]["kl"] > results["dpo"]["kl_interval"]["low"] > 0
    assert results["dpo"]["accuracy_interval"]["low"] > 0.5
    strong, weak = sorted(results["betas"], key=lambda run: -run["beta"])
    assert strong["kl_interval"]["high"] < weak["kl_interval"]["low"]


@pytest.mark.slow
def test_files_say_what_was_returned(finished: tuple[Path, dict[str, Any], str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, results, _ = finished
    assert json.loads((out / "demo.json").read_text()) == json.loads(json.dumps(results))
    assert (out / "reward_kl.png").read_bytes().startswith(b"\x89PNG")
    world = World(1)
    rows = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) > 950
    for row in rows:
        assert row["reward_chosen"] == world.reward(row["prompt"] + row["chosen"]) > row["reward_rejected"]
    samples = json.loads((out / "samples.json").read_text())
    for sample in samples:
        for side in ("before", "after"):
            text = sample["prompt"] + sample[side]["completion"]
            assert sample[side]["reward"] == pytest.approx(world.reward(text))
    assert len((out / "samples.md").read_text().splitlines()) == len(samples) + 6
    for name in ("sft", "dpo_beta_0.1", "dpo_beta_1"):
        model = AutoModelForCausalLM.from_pretrained(out / name)
        assert len(AutoTokenizer.from_pretrained(out / name)) == model.config.vocab_size


@pytest.mark.slow
def test_the_account_fits_eighty_columns(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, results, printed = finished
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if line.strip().startswith("beta 0.1"))
    reward = results["dpo"]["reward"]
    assert f"{reward['mean']:.3f} [{reward['low']:.3f}, {reward['high']:.3f}]" in row
    assert f"rose by {results['rise']['mean']:.3f}" in printed


def test_exit_code_is_honest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []

    def pretend(risen: bool) -> None:
        def run(out: Path, settings: DemoSettings, seed: int) -> dict[str, Any]:
            seen.append((settings, seed))
            return {"risen": risen}

        monkeypatch.setattr("preftune.demo.run.run_demo", run)

    pretend(True)
    assert main(["--out", str(tmp_path / "a"), "--betas", "1", "0.2", "1", "--seed", "4"]) == 0
    assert seen[-1][0].betas == (0.2, 1.0)
    assert seen[-1][1] == 4
    pretend(False)
    assert main(["--out", str(tmp_path / "b"), "--quick"]) == 1
    assert seen[-1][0] == DemoSettings().quick()


def test_nothing_learned_is_not_called_a_rise(tmp_path: Path) -> None:
    settings = DemoSettings(
        betas=(0.1,),
        num_reviews=1600,
        sft_epochs=1,
        num_layers=1,
        num_prompts=32,
        dpo_epochs=1,
        dpo_learning_rate=1e-9,
        num_eval_prompts=20,
    )
    results = run_demo(tmp_path, settings, seed=0)
    assert not results["risen"]
    assert results["dpo"]["kl"] == pytest.approx(0.0, abs=1e-3)


def test_a_model_that_writes_nothing_is_said_so(tmp_path: Path) -> None:
    settings = DemoSettings(
        num_reviews=100, sft_epochs=1, hidden_size=32, num_layers=1, num_prompts=8, num_eval_prompts=8
    )
    with pytest.raises(TrainingError, match="nothing that could be told apart"):
        run_demo(tmp_path, settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--betas", "0"], "beta must be above 0"),
        (["--seed", "-1"], "seed must be 0 or more"),
        (["--bets", "1"], "--bets"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["--out", str(tmp_path), *arguments])


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(SetupError, match="taken"):
        main(["--out", str(tmp_path / "taken")])


def test_the_store_of_the_user_is_respected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from preftune.demo.run import _store_within

    monkeypatch.delenv("PREFTUNE_CACHE")
    with _store_within(tmp_path):
        assert os.environ["PREFTUNE_CACHE"] == str(tmp_path / "references")
    assert "PREFTUNE_CACHE" not in os.environ
    monkeypatch.setenv("PREFTUNE_CACHE", "elsewhere")
    with _store_within(tmp_path):
        assert os.environ["PREFTUNE_CACHE"] == "elsewhere"
