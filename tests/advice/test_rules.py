"""Advised settings: each number against its published source, worked out here by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from preftune.advice import Case, Lengths, Noise, advise
from preftune.advice.case import Setting
from preftune.advice.labels import label_state
from preftune.advice.published import contradiction, rows_for, table
from preftune.advice.scaling import rate_at_size
from preftune.errors import ConfigError
from preftune.objectives import METHODS

SEVEN = 7_000_000_000


def settings(case: Case) -> dict[str, Setting]:
    return {setting.field: setting for setting in advise(case).settings}


def paired(name: str) -> str:
    spec = METHODS[name]
    if not spec.paired:
        return "kto"
    return "dpo" if spec.needs_reference else "cpo"


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_is_advised_with_its_own_published_numbers(name: str) -> None:
    found = settings(Case(paired(name), (name,), SEVEN, num_pairs=60_000))
    for field, wanted in METHODS[name].defaults.items():
        if field == "beta":
            assert found["beta"].value == wanted
            assert found["beta"].low is not None
            assert found["beta"].high is not None
            assert found["beta"].low <= float(wanted) <= found["beta"].high
        if field == "batch_size":
            product = found["per_device_train_batch_size"].value * found["gradient_accumulation_steps"].value
            assert product == wanted
        if field in METHODS[name].knobs:
            assert found[field].value == wanted
    for setting in found.values():
        assert setting.kind in ("published", "heuristic", "computed")
        assert setting.reason
        assert all(source.name and source.says for source in setting.sources)


@pytest.mark.parametrize(
    ("method", "size", "lora", "wanted"),
    [
        ("sigmoid", 7e9, False, 1e-6),  # 2305.18290
        ("sigmoid", 7e9, True, 5e-6),  # alignment-handbook, zephyr-7b-beta, QLoRA
        ("sigmoid", 1.7e9, False, 1e-6),  # alignment-handbook, SmolLM2
        ("sigmoid_norm", 8e9, False, 5e-7),  # 2411.15124, 8B
        ("simpo", 8.03e9, False, 1e-6),  # SimPO, llama-3-8b-instruct-simpo.yaml
        ("apo_zero", 7e9, False, 2e-7),  # 2408.06266
        ("cpo", 7e9, True, 1e-4),  # 2401.08417 trains an adapter
        ("cpo", 7e9, False, 1e-5),
        ("nca_pair", 7e9, False, 5e-6),  # 2402.05369
    ],
)
def test_learning_rates_at_published_sizes(method: str, size: float, lora: bool, wanted: float) -> None:
    found = settings(Case(paired(method), (method,), int(size), lora))["learning_rate"]
    assert found.value == pytest.approx(wanted, rel=0.02)
    assert found.low is not None
    assert found.high is not None
    # The range holds the advice, at its end where nobody published more.
    assert found.low <= found.value <= found.high
    assert found.low < found.high


def test_rate_passes_through_its_anchors_and_falls_with_size() -> None:
    # Tulu 3: 5e-7 at 8B, 2e-7 at 70B. Learning table: 2.5e-4 at half a million. Nothing beyond either end.
    assert rate_at_size(5e-7, 70e9, 8e9) == pytest.approx(2e-7)
    assert rate_at_size(5e-7, 700e9, 8e9) == pytest.approx(2e-7)
    assert rate_at_size(1e-6, 5e5) == pytest.approx(2.5e-4)
    assert rate_at_size(1e-6, 5e4) == pytest.approx(2.5e-4)
    sizes = np.geomspace(1e5, 1e11, 40)
    rates = [rate_at_size(1e-6, float(size)) for size in sizes]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(rates))
    # Half way in log size is half way in log rate.
    middle = math.sqrt(5e5 * 7e9)
    assert rate_at_size(1e-6, middle) == pytest.approx(math.sqrt(1e-6 * 2.5e-4))


def test_the_rule_is_within_a_factor_of_three_of_a_recipe_it_was_not_made_from() -> None:
    # SmolLM2-1.7B was trained at 1e-6 (alignment-handbook), a published row that the anchors do not contain.
    row = next(row for row in table() if row.source == "recipe smollm2-dpo" and row.field == "learning_rate")
    assert row.num_parameters == 1.7e9
    assert row.value == 1e-6
    # The paper's rate, carried down from 7B.
    assert 1 / 3 < rate_at_size(1e-6, 1.7e9) / row.value < 3


@pytest.mark.parametrize(
    ("share", "state", "epochs"),
    # Two annotators who each err at share e agree on (1 - e)^2 + e^2: 0.58, 0.68, 0.905.
    [(0.3, "noisy", 1), (0.2, "mixed", 2), (0.05, "clean", 3), (None, "unknown", 1)],
)
def test_epochs_follow_the_agreement_of_annotators(share: float | None, state: str, epochs: int) -> None:
    noise = None if share is None else Noise(share, share, share)
    assert label_state(noise) == state
    assert settings(Case("dpo", ("sigmoid",), SEVEN, noise=noise))["num_train_epochs"].value == epochs
    if share == 0.3:
        assert noise is not None
        assert noise.agreement == pytest.approx(0.58)


def test_smoothing_is_the_share_of_flipped_labels_where_there_surely_are_some() -> None:
    def smoothing(method: str, estimate: float, low: float, high: float) -> Any:
        found = settings(Case("dpo", (method,), SEVEN, noise=Noise(estimate, low, high)))
        return found["label_smoothing"].value if "label_smoothing" in found else None

    assert smoothing("sigmoid", 0.3, 0.2, 0.4) == 0.3
    assert smoothing("robust", 0.15, 0.1, 0.25) == 0.15
    assert smoothing("sigmoid", 0.04, 0.0, 0.12) == 0.0  # cannot be told from none
    assert smoothing("sigmoid", 0.49, 0.45, 0.5) == 0.4  # robust would divide by 1 - 2e
    assert smoothing("exo_pair", 0.3, 0.2, 0.4) == 1e-3  # another meaning of the same word
    assert smoothing("ipo", 0.3, 0.2, 0.4) is None  # has no such setting


def test_noisy_labels_change_the_loss_of_plain_dpo_only() -> None:
    noise = Noise(0.3, 0.2, 0.4)
    assert settings(Case("dpo", ("sigmoid",), SEVEN, noise=noise))["loss_type"].value == "robust"
    assert "loss_type" not in settings(Case("dpo", ("sigmoid",), SEVEN))
    assert "loss_type" not in settings(Case("dpo", ("ipo",), SEVEN, noise=noise))
    assert "loss_type" not in settings(Case("dpo", ("sigmoid", "sft"), SEVEN, noise=noise))


def test_sources_that_disagree_are_named() -> None:
    said = settings(Case("dpo", ("sigmoid",), SEVEN))["beta"].contradiction
    assert said is not None
    for name in ("zephyr-7b-dpo-full", "smollm2-dpo", "users' practice", "Hugging Face"):
        assert name in said
    assert settings(Case("dpo", ("sppo_hard",), SEVEN))["beta"].contradiction is None


def test_contradiction_needs_ranges_that_lie_apart() -> None:
    rows = rows_for("beta", Case("cpo", ("simpo",), SEVEN))
    assert [row.number for row in rows] == ["2", "2.5", "2 to 10"]
    assert contradiction(rows) is None


def test_small_data_get_small_batches_and_large_data_the_published_ones() -> None:
    def step(count: int, processes: int = 1) -> int:
        found = settings(Case("dpo", ("sigmoid",), SEVEN, num_pairs=count, num_processes=processes))
        each: int = found["per_device_train_batch_size"].value * found["gradient_accumulation_steps"].value
        return each * processes

    assert step(60_000) == step(60_000, 4) == 64
    assert step(1_700) == 16  # 17 pairs a step would be a hundred steps
    assert step(50) == 8


@pytest.mark.parametrize(("pairs", "promised"), [(50, False), (1_700, True)])
def test_a_hundred_steps_are_promised_only_where_there_are_as_many(pairs: int, promised: bool) -> None:
    found = settings(Case("dpo", ("sigmoid",), SEVEN, num_pairs=pairs))["per_device_train_batch_size"]
    assert ("about 100 steps" in found.reason) is promised


def test_max_length_covers_the_data_or_says_that_the_model_cannot() -> None:
    draw = np.random.default_rng(0)
    prompt, chosen, rejected = (draw.integers(10, 400, 1000) for _ in range(3))
    lengths = Lengths(prompt, chosen, rejected)
    longest = np.sort(prompt + np.maximum(chosen, rejected))
    found = settings(Case("dpo", ("sigmoid",), SEVEN, lengths=lengths))["max_length"]
    assert found.value % 64 == 0
    assert (longest > found.value).mean() <= 0.005
    assert (longest > found.value - 64).mean() > 0.005
    assert found.low == math.ceil(longest[949] / 64) * 64
    assert found.high == math.ceil(longest[-1] / 64) * 64
    short = settings(Case("dpo", ("sigmoid",), SEVEN, lengths=lengths, max_positions=256))["max_length"]
    assert short.value == short.high == 256
    ten = np.full(20, 10)
    same = Lengths(ten, ten, ten)
    alike = settings(Case("dpo", ("sigmoid",), SEVEN, lengths=same))["max_length"]
    assert (alike.low, alike.value, alike.high) == (64, 64, 64)
    assert f"{(longest > 256).mean():.1%}" in short.reason


def test_mixtures_take_their_recipe() -> None:
    found = settings(Case("dpo", ("sigmoid", "bco_pair", "sft"), 8_000_000_000))
    assert found["beta"].value == 0.1
    assert found["learning_rate"].value == pytest.approx(5e-6, rel=0.1)


@pytest.mark.parametrize("bad", [(-0.1, 0, 0), (0.6, 0.5, 0.6), (0.3, 0.35, 0.4)])
def test_impossible_noise_is_refused(bad: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="noise"):
        Noise(*bad)
