"""Held-out figures, their intervals, and the split they are taken on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, load_from_disk

from preftune.errors import ConfigError, DataError
from preftune.runs.holdout import prompt_key
from preftune.sweep.holdout import held_out, split_off
from preftune.sweep.scores import (
    ACCURACY,
    GAIN,
    MARGIN,
    OWN_TAIL,
    PER_TOKEN,
    PLAIN_MARGIN,
    TAIL,
    HeldOut,
    figure,
    held_out_of,
    left_reference,
    metrics_of,
    with_interval,
)


def tokens(prompts: list[list[int]]) -> Dataset:
    rows = [{"prompt_ids": ids, "chosen_ids": [n, 7], "rejected_ids": [n]} for n, ids in enumerate(prompts)]
    return Dataset.from_list(rows)


def test_per_pair_numbers_follow_from_the_rewards() -> None:
    rewards = np.array([[1.0, 0.5], [0.2, 0.2], [-1.0, 0.0]])
    found = held_out_of(rewards, tokens([[1], [2], [1]]), 0.5)
    assert found.prompts.tolist() == [0, 1, 0]
    # A tie is lost.
    assert found.values(ACCURACY).tolist() == [1, 0, 0]
    assert found.values(MARGIN).tolist() == [0.5, 0.0, -1.0]
    assert found.values(PLAIN_MARGIN).tolist() == [1.0, 0.0, -2.0]
    # Half the rewards over beta are (1, 0.5), (0.2, 0.2) and (-1, 0).
    first = 1 / (1 + math.exp(-1)) - 1 / (1 + math.exp(-0.5))
    assert found.values(GAIN).tolist() == pytest.approx([first, 0.0, 1 / (1 + math.exp(1)) - 0.5])
    # Nats per token; the chosen answers have two tokens, the rejected ones one.
    assert found.values(PER_TOKEN).tolist() == pytest.approx([2 / 2 - 1, 0.4 / 2 - 0.4, -2 / 2 - 0])
    assert found.means()[PER_TOKEN] == pytest.approx((0 - 0.2 - 1) / 3)
    # A policy that has left what the reference writes gains nothing, however large its margin.
    away = held_out_of(np.array([[-40.0, -80.0]]), tokens([[1]]), 1.0)
    assert away.values(ACCURACY).tolist() == [1]
    assert away.values(GAIN)[0] == pytest.approx(0, abs=1e-8)


def test_the_digest_tells_other_pairs_from_these() -> None:
    rewards = np.zeros((2, 2))
    first = held_out_of(rewards, tokens([[1], [2]]), 1.0)
    assert first.digest == held_out_of(rewards + 1, tokens([[1], [2]]), 2.0).digest
    assert first.digest != held_out_of(rewards, tokens([[1], [3]]), 1.0).digest
    # The same tokens, cut at another place.
    parts = Dataset.from_list([{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}])
    other = Dataset.from_list([{"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]}])
    assert held_out_of(rewards[:1], parts, 1.0).digest != held_out_of(rewards[:1], other, 1.0).digest


def test_files_survive_and_torn_ones_are_no_error(tmp_path: Path) -> None:
    found = held_out_of(np.arange(4.0).reshape(2, 2), tokens([[1], [2]]), 0.1)
    found.save(tmp_path)
    again = HeldOut.load(tmp_path)
    assert again is not None
    assert again.rewards.tolist() == found.rewards.tolist()
    assert again.lengths.tolist() == found.lengths.tolist() == [[2, 1], [2, 1]]
    assert (again.prompts.tolist(), again.beta, again.digest) == (found.prompts.tolist(), found.beta, found.digest)
    file = tmp_path / "held_out.npz"
    file.write_bytes(file.read_bytes()[:100])
    assert HeldOut.load(tmp_path / "absent") is None


def test_figures_carry_intervals_over_prompts() -> None:
    rng = np.random.default_rng(0)
    # Five pairs a prompt, all alike: the interval must be that of 40 prompts.
    gaps = np.repeat(rng.normal(0.3, 1, 40), 5)
    held = HeldOut(np.stack([gaps, np.zeros(200)], 1), np.ones((200, 2), int), np.repeat(np.arange(40), 5), 0.1, "x")
    found = metrics_of({"train_loss": 0.6, "eval_loss": 0.5, MARGIN: float(gaps.mean())}, held, 0)
    margin = found[MARGIN]
    assert margin["n"] == 200
    assert margin["mean"] == float(gaps.mean())
    half = (margin["high"] - margin["low"]) / 2
    assert half == pytest.approx(1.96 * gaps.std() / np.sqrt(40), rel=0.15)
    assert found["train_loss"] == {"mean": 0.6, "low": None, "high": None, "n": 0}
    assert found["eval_loss"]["n"] == 200
    assert json.dumps(found, allow_nan=False)


def test_leaving_the_reference_takes_an_effect_and_an_interval_above_the_level() -> None:
    assert left_reference({TAIL: {"mean": 0.02, "low": 0.0101, "high": 0.03, "n": 100}})
    assert not left_reference({TAIL: {"mean": 0.02, "low": 0.0099, "high": 0.03, "n": 100}})
    # Too few prompts for an interval, or no samples at all.
    assert not left_reference({TAIL: {"mean": 0.5, "low": None, "high": None, "n": 1}})
    assert not left_reference({})


@pytest.mark.parametrize("number", [100, 10_000, 1_000_000])
def test_more_samples_do_not_rule_out_a_policy_that_is_near_the_reference(number: int) -> None:
    # The interval narrows around 1.2 %, above the level: certain, and still next to nothing.
    reach = 0.02 / number**0.5
    near = {"mean": 0.012, "low": 0.012 - reach, "high": 0.012 + reach, "n": number}
    assert not left_reference({TAIL: near})
    far = {"mean": 0.03, "low": 0.03 - reach, "high": 0.03 + reach, "n": number}
    assert left_reference({TAIL: far})


@pytest.mark.parametrize("number", [100, 10_000, 1_000_000])
@pytest.mark.parametrize("own", [0.002, 0.0052, 0.0099])
def test_a_trial_is_ruled_out_by_an_effect_over_the_references_own_share(number: int, own: float) -> None:
    reach = 0.3 * own * (100 / number) ** 0.5

    def left(times: float) -> bool:
        share = {"mean": times * own, "low": times * own - reach, "high": times * own + reach, "n": number}
        return left_reference({TAIL: share, OWN_TAIL: {"mean": own, "low": own, "high": own, "n": number}})

    # A trained policy is never its reference: told from it with certainty, and still next to it.
    assert not any(left(times) for times in (1.0, 1.1, 1.5, 1.99))
    assert left(2.5)
    # Samples make it surer, and never rule out what is below the factor.
    assert left(2.1) == (number > 100)


def test_no_trial_is_ruled_out_by_a_handful_of_samples_or_an_interval_without_width() -> None:
    assert not left_reference({TAIL: {"mean": 0.25, "low": 0.25, "high": 0.25, "n": 4}})
    assert not left_reference({TAIL: {"mean": 0.25, "low": 0.25, "high": 0.25, "n": 400}})
    assert not left_reference({TAIL: {"mean": 0.25, "low": 0.2, "high": 0.3, "n": 7}})
    assert left_reference({TAIL: {"mean": 0.25, "low": 0.2, "high": 0.3, "n": 8}})


def test_the_rule_says_of_the_committed_trials_what_their_file_says() -> None:
    path = Path(__file__).resolve().parents[2] / "benchmarks/results/sweep/corner.json"
    sweeps = json.loads(path.read_text(encoding="utf-8"))["cells"]
    cells = [cell for sweep in sweeps for cell in sweep["cells"] if cell["true"] is not None]
    assert len(cells) > 200
    assert [left_reference(cell["metrics"]) for cell in cells] == [cell["left_reference"] for cell in cells]
    assert {cell["left_reference"] for cell in cells} == {True, False}


def test_what_is_not_a_number_becomes_null() -> None:
    assert figure(float("nan"), float("inf"), 1.0, 3) == {"mean": None, "low": None, "high": 1.0, "n": 3}
    assert with_interval(np.array([1.0, np.nan]), [0, 1], 0)["mean"] is None
    assert with_interval(np.array([1.0, 3.0]), [0, 0], 0) == {"mean": 2.0, "low": None, "high": None, "n": 2}
    assert metrics_of({}, None, 0) == {}


def test_accuracies_that_are_all_alike_are_not_certain() -> None:
    # Wilson by hand for 4 of 4: n / (n + z^2).
    low = 4 / (4 + 1.959964**2)
    found = with_interval(np.ones(4), [0, 1, 2, 3], 0, outcome=True)
    assert found == {"mean": 1.0, "low": pytest.approx(low), "high": 1.0, "n": 4}
    none = with_interval(np.zeros(4), [0, 1, 2, 3], 0, outcome=True)
    assert (none["low"], none["high"]) == (0.0, pytest.approx(1 - low))
    held = HeldOut(np.array([[1.0, 0.0]] * 4), np.ones((4, 2), int), np.arange(4), 0.1, "x")
    metrics = metrics_of({}, held, 0)
    assert metrics[ACCURACY]["low"] == pytest.approx(low)
    # Figures that are no yes and no, and accuracies that scatter, keep the bootstrap over prompts.
    assert metrics[MARGIN]["low"] == metrics[MARGIN]["high"] == 1.0
    mixed = np.array([1.0, 1.0, 0.0, 1.0])
    assert with_interval(mixed, [0, 1, 2, 3], 0, outcome=True) == with_interval(mixed, [0, 1, 2, 3], 0)


def test_no_prompt_is_on_both_sides() -> None:
    keys = [f"prompt {number % 50}" for number in range(400)]
    flags = held_out(keys, 0.2, 3)
    inside = {key for key, out in zip(keys, flags, strict=True) if out}
    outside = {key for key, out in zip(keys, flags, strict=True) if not out}
    assert not inside & outside
    assert len(inside) == 10
    assert flags == held_out(keys, 0.2, 3)
    assert flags != held_out(keys, 0.2, 4)


@pytest.mark.parametrize(("share", "kind"), [(0.0, ConfigError), (1.0, ConfigError), (0.9, DataError)])
def test_a_share_that_leaves_nothing_is_refused(share: float, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="eval_share"):
        held_out(["a", "b", "c"], share, 0)


def test_the_split_is_written_once_and_keeps_messages(tmp_path: Path) -> None:
    def row(number: int) -> dict[str, Any]:
        prompt = [{"role": "user", "content": f"question {number % 10}"}]
        return {"prompt": prompt, "chosen": [{"role": "assistant", "content": f"answer {number}"}]}

    dataset = Dataset.from_list([row(number) for number in range(30)])
    assert split_off(dataset, 0.2, 0, tmp_path) == (24, 6)
    parts = load_from_disk(str(tmp_path / "data"))
    keys = [{prompt_key(each) for each in parts[name]} for name in ("train", "test")]
    assert not keys[0] & keys[1]
    assert parts["test"][0]["prompt"][0]["role"] == "user"
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*"))
    assert split_off(dataset, 0.2, 0, tmp_path) == (24, 6)
    assert before == sorted(path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*"))
