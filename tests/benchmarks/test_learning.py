"""The toy's benches: every method has a row that can be trained, and the documents say what the figures say."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import preftune
from benchmarks import learning, noise, noise_page, toy
from preftune.demo.pairs import Pair
from preftune.demo.training import DemoSettings
from preftune.objectives import METHODS

TINY = dataclasses.replace(
    DemoSettings(),
    num_reviews=1200,
    hidden_size=64,
    num_layers=1,
    sft_epochs=2,
    num_prompts=96,
    dpo_epochs=1,
    num_eval_prompts=48,
    samples_per_prompt=1,
)
MACHINE = {
    "processor": "a processor",
    "accelerator": None,
    "num_cores": 2,
    "num_threads": 1,
    "memory_bytes": 8e9,
    "cpu_capability": "AVX512",
    "system": "a system",
    "python": "3.11",
    "versions": {"torch": "2"},
    "commit": None,
    "matmul_flops_per_second": {"fp32": 1e11},
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The benches set the number of threads of the process; what it was is put back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def part(mean: float, error: float = 0.01) -> dict[str, float]:
    return {"mean": mean, "low": mean - 2 * error, "high": mean + 2 * error, "standard_error": error}


def scores(reward: float, kl: float = 2.0, grammatical: float = 0.9, rise: float | None = None) -> dict[str, Any]:
    return {
        "reward": part(reward),
        "kl": part(kl),
        "accuracy": part(0.7),
        "rise": part(reward - 0.5 if rise is None else rise),
        "length": 30.0,
        "grammatical": grammatical,
    }


def report_of(cells: list[dict[str, Any]], seeds: tuple[int, ...] = (0,)) -> dict[str, Any]:
    reference = {**scores(0.5, kl=0.0), "num_pairs": 40, "num_prompts": 12}
    settings = {**dataclasses.asdict(TINY), "betas": list(TINY.betas)}
    return {
        "settings": settings,
        "common": toy.COMMON,
        "machine": MACHINE,
        "references": {str(seed): reference for seed in seeds},
        "cells": cells,
    }


def noise_cells(seed: int, reward: float = 0.6) -> list[dict[str, Any]]:
    return [
        {"method": method, "noise": level, "seed": seed, **scores(reward - level / 2)}
        for level in noise.LEVELS
        for method in noise.METHODS
        if not noise.is_plain(method, level)
    ]


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_has_a_row_with_its_published_settings(method: str, tmp_path: Path) -> None:
    recipe = learning.published_recipe(method)
    config = getattr(preftune, f"{recipe.trainer}Config")(
        **{**toy.COMMON, **recipe.fields, "output_dir": str(tmp_path)}
    )
    objective = config.build_objective()
    assert objective.names == (method,)
    published = METHODS[method].defaults
    assert objective.beta == published.get("beta", recipe.fields.get("beta", 0.1))
    for name, value in published.items():
        if name in METHODS[method].knobs:
            assert objective.knobs[method][name] == value


def test_rows_carry_what_the_method_reads() -> None:
    pairs = [Pair("p", " good", " bad", 0.8, 0.6, False), Pair("q", " fine", " poor", 0.7, 0.2, False)]
    gaps = learning.rows_for(learning.published_recipe("odpo"), pairs, 0)
    assert [row["margin"] for row in gaps] == pytest.approx([0.2, 0.5])
    wins = learning.rows_for(learning.published_recipe("sppo_soft"), pairs, 0)
    # 2 p - 1 with p the logistic function of ten times the gap.
    assert [row["margin"] for row in wins] == pytest.approx([2 / (1 + math.exp(-10 * gap)) - 1 for gap in (0.2, 0.5)])
    single = learning.rows_for(learning.published_recipe("kto"), pairs, 0)
    assert sorted((row["completion"], row["label"]) for row in single) == [
        (" bad", False),
        (" fine", True),
        (" good", True),
        (" poor", False),
    ]
    assert "margin" not in learning.rows_for(learning.published_recipe("sigmoid"), pairs, 0)[0]


def test_pooling_adds_errors_in_quadrature_and_leaves_a_single_seed_alone() -> None:
    one = toy.pooled([scores(0.6)])
    assert one["reward"] == part(0.6)
    two = toy.pooled([{**scores(0.5), "reward": part(0.5, 0.03)}, {**scores(0.7), "reward": part(0.7, 0.04)}])
    assert two["seeds"] == 2
    assert two["reward"]["mean"] == pytest.approx(0.6)
    assert two["reward"]["standard_error"] == pytest.approx(0.025)
    assert two["reward"]["high"] - 0.6 == pytest.approx(1.96 * 0.025, rel=1e-4)


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (scores(0.6), "yes"),
        (scores(0.53, rise=0.03), "intervals before and after overlap"),
        (scores(0.5, kl=0.1), "hardly moved"),
        (
            scores(0.3, kl=20.0, grammatical=0.4),
            "no: it fell. sentences of the world fell from 90 to 40 %",
        ),
    ],
)
def test_the_verdict_follows_the_figures(after: dict[str, Any], words: str) -> None:
    assert words in learning.verdict(scores(0.5, kl=0.0), after)


@pytest.mark.parametrize(("tau", "sign"), [(0.05, 1), (1.0, -1)])
def test_the_slope_of_discopop_where_training_starts_is_what_its_rows_say(tau: float, sign: int) -> None:
    def loss(h: float) -> float:
        mix = 1 / (1 + math.exp(-h / tau))
        return (1 - mix) * math.log1p(math.exp(-h)) + mix * math.exp(-h)

    assert math.copysign(1, loss(1e-4) - loss(-1e-4)) == sign
    assert learning.published_recipe("discopop").fields["discopop_tau"] == 0.05
    assert next(r for r in learning.recipes() if r.label == "discopop, adjusted").fields["discopop_tau"] == 1.0


def test_the_learning_table_counts_and_names_what_is_missing() -> None:
    common = {"trainer": "DPO", "note": "", "seed": 0, "fields": {"loss_type": "sigmoid", "beta": 0.1}}
    text = learning.render(
        report_of(
            [
                {"label": "hinge", "method": "hinge", **common, **scores(0.5, kl=0.1)},
                {"label": "sigmoid", "method": "sigmoid", **common, **scores(0.6)},
            ]
        )
    )
    assert "With published settings 1 of 2 methods" in text
    assert text.index("| `sigmoid` |") < text.index("| `hinge` |")
    assert "0.600 [0.580, 0.620]" in text
    assert "Not measured: `sigmoid_norm`" in text


def test_the_learning_table_says_what_its_seeds_say() -> None:
    common = {"trainer": "DPO", "note": "", "label": "sigmoid", "method": "sigmoid"}
    cells = [
        {**common, "seed": seed, "fields": {"loss_type": "sigmoid", "beta": 0.1}, **scores(reward)}
        for seed, reward in enumerate((0.61, 0.64, 0.58))
    ]
    one, three = learning.render(report_of(cells[:1])), learning.render(report_of(cells, (0, 1, 2)))
    assert "from one seed (0); how much a row varies from one training run to the next is not in them" in one
    assert "single seeds" not in one
    assert "from 3 seeds (0, 1, 2); how much a row varies from one training run to the next is in the column" in three
    assert "| 0.610 0.640 0.580 |" in three


def test_noise_pools_complete_seeds_only(tmp_path: Path) -> None:
    report = report_of([*noise_cells(0), *noise_cells(1, 0.62), *noise_cells(2)[:-1]], (0, 1, 2))
    assert noise_page.complete_seeds(report) == [0, 1]
    text = noise_page.render(report)
    assert "2 seeds (0, 1)" in text
    assert "| 40% | 0.410" in text
    assert "DPO: above the SFT model beyond the intervals at 0%, 10%" in text
    # Equal on both seeds, and two seeds would not do anyway.
    assert "| robust at 20% | +0.000 [+0.000, +0.000] | 0 of 2 | nothing is concluded from 2 seeds |" in text
    assert "2 seeds do not decide between these losses" in text
    assert "was tuned for a method or a level" in text
    noise_page.plot(report, tmp_path / "images" / "noise.png")
    assert (tmp_path / "images" / "noise.png").read_bytes().startswith(b"\x89PNG")


def test_the_share_of_flips_is_told_to_the_robust_loss_alone() -> None:
    smoothing = {method: noise.fields_of(method, 0.3).get("label_smoothing") for method in noise.METHODS}
    assert smoothing == {"DPO": None, "cDPO 0.1": 0.1, "cDPO 0.2": 0.2, "robust": 0.3, "IPO": None}


def eight_seeds(gain: dict[str, float], scatter: float = 0.004) -> dict[str, Any]:
    """Cells in which methods gain on DPO by so much at every level, more or less."""
    wobble = [1, -1, 0.5, -0.5, 0.2, -0.2, 0.8, -0.8]
    cells = []
    for seed in range(8):
        for cell in noise_cells(seed):
            if cell["method"] != "DPO":
                shift = gain.get(cell["method"], 0.0) + scatter * wobble[seed]
                cell = {**cell, **scores(cell["reward"]["mean"] + shift)}
            cells.append({**cell, "stage": "verdict", "rate": 1.0})
    return report_of(cells, tuple(range(8)))


def test_words_about_methods_follow_the_rule_that_was_laid_down() -> None:
    text = noise_page.render(eight_seeds({"IPO": 0.02, "cDPO 0.2": -0.02}))
    assert "| IPO at 30% | +0.020 [+0.018, +0.022] | 8 of 8 | better |" in text
    assert "| cDPO 0.2 at 10% | -0.020 [-0.022, -0.018] | 0 of 8 | worse |" in text
    assert "| robust at 30% | +0.000 [-0.002, +0.002] | 4 of 8 | no difference can be told |" in text
    assert "Against DPO: cDPO 0.2 at 0% worse; IPO at 0% better;" in text
    none = noise_page.render(eight_seeds({}))
    assert "No difference between these losses and DPO can be told at any level; none is larger than 0.002" in none


def test_rates_are_chosen_on_seeds_that_have_no_part_in_the_verdict() -> None:
    assert not set(noise.TUNING) & set(noise.SEEDS)
    assert len(noise.SEEDS) >= 8
    report = eight_seeds({})
    for rate, reward in ((0.4, 0.51), (1.0, 0.56), (2.5, 0.56)):
        for level in noise.TUNED_AT:
            report["cells"].append(
                {"stage": "tuning", "method": "IPO", "noise": level, "rate": rate, "seed": 200, **scores(reward)}
            )
    assert noise_page.best_rates(report) == {"IPO": 1.0}
    assert noise_page.complete_seeds(report) == list(range(8))
    with pytest.raises(SystemExit):
        noise.main(["--tuning", "200", "--seeds", "200", "220"])


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_noise_study_that_was_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, trained = tmp_path / "noise.json", list[dict[str, Any]]()
    monkeypatch.setattr(noise, "METHODS", ("DPO", "robust"))
    monkeypatch.setattr(noise, "RATES", (1.0, 2.5))
    honest = toy.train

    def train(*given: Any) -> Any:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(given[3])
        return honest(*given)

    monkeypatch.setattr(toy, "train", train)
    sizes = toy.tiny_settings()
    with pytest.raises(KeyboardInterrupt):
        noise.run(sizes, (0.0, 0.2), [1], [2], 1, out)
    assert not out.exists()
    monkeypatch.setattr(toy, "train", honest)
    report = noise.run(sizes, (0.0, 0.2), [1], [2], 1, out, go_on=True)
    assert json.loads(out.read_text()) == report
    assert not out.with_suffix(".part").exists()
    stages = [cell["stage"] for cell in report["cells"]]
    # Tuning: two rates of DPO at two levels and of robust at one; then each with its own rate.
    assert (stages.count("tuning"), stages.count("verdict")) == (6, 3)
    assert trained == [cell["fields"] for cell in report["cells"][:3]]
    assert all(cell["processor_seconds"] > 0 for cell in report["cells"])
    assert "No difference" not in noise_page.render(report)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_tiny_run_fills_the_file_and_a_second_one_adds_to_it(tmp_path: Path) -> None:
    out = tmp_path / "learning.json"
    first = learning.run(TINY, [learning.published_recipe("sigmoid")], [0], 1, out)
    second = learning.run(TINY, [learning.published_recipe(name) for name in ("kto", "simpo")], [0], 1, out, True)
    assert [cell["label"] for cell in second["cells"]] == ["sigmoid", "kto", "simpo"]
    assert second["cells"][0] == first["cells"][0]
    assert json.loads(out.read_text()) == second
    for cell in second["cells"]:
        assert cell["kl"]["mean"] != 0
        assert cell["reward"]["low"] <= cell["reward"]["mean"] <= cell["reward"]["high"]
    assert second["references"]["0"]["kl"]["mean"] == 0
    assert "| `kto` | KTO |" in learning.render(second)
