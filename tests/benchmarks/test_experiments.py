"""The experiments over seeds: what they plan, the words on their pages, and a tiny run of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from benchmarks import advice, corner, detection, flips, grid, guards, stale, toy
from preftune.sweep.scores import ACCURACY, KL, PER_TOKEN, TAIL, HeldOut
from preftune.training.guards import GUARD_NAMES

ROOT = Path(__file__).resolve().parents[2]
STAMP = {stale.KEY: {"date": "2026-01-01"}}


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def page(folder: Path, *names: str) -> Path:
    path = folder / "page.md"
    path.write_text("".join(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in names))
    return path


# ---- guards by the size of the fault ----


def test_ten_trainings_of_each_size_and_sixty_healthy_ones_in_worlds_of_their_own() -> None:
    plan = detection.plan()
    healthy = [each for each in plan if not each[0]]
    assert len(healthy) >= 60
    assert len({(case.label, world) for _, _, case, world, _ in healthy}) == len(healthy)
    sizes: dict[tuple[str, float], set[int]] = {}
    for guard, size, _, world, _ in plan:
        if guard:
            sizes.setdefault((guard, size), set()).add(world)
    assert {guard for guard, _ in sizes} == set(GUARD_NAMES)
    assert all(len(worlds) == 10 for worlds in sizes.values())
    # Worlds in which thresholds were chosen have no part in it.
    assert min(world for _, _, _, world, _ in plan) >= 10
    assert len({seed for *_, seed in plan}) == len(plan)
    for dial in detection.DIALS:
        assert list(dial.sizes) == sorted(dial.sizes)
        assert all(dial.case(size).guard == dial.guard for size in dial.sizes)


def test_dials_turn_what_they_say() -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "longer"} for _ in range(8)]
    turned = detection.partly(guards.longer_wins, 0.25, rows)
    assert [row["chosen"] for row in turned] == ["longer"] * 2 + ["a"] * 6
    assert len(detection.first(3, rows)) == 3
    few = {size: detection.DIALS[5].case(size).rows(rows * 200) for size in detection.DIALS[5].sizes}
    assert [len(each) for each in few.values()] == [384, 192, 96]
    dial = next(dial for dial in detection.DIALS if dial.guard == "reward_jump")
    assert [dial.case(size).fields["learning_rate"] for size in dial.sizes] == [2.5e-4, 5e-4, 1e-3, 2e-3]


@pytest.mark.parametrize(
    ("rates", "start"),
    [
        ([(1, 0, 10), (2, 9, 10), (4, 10, 10)], 2),
        ([(1, 10, 10), (2, 5, 10), (4, 10, 10)], 4),
        ([(1, 0, 10), (2, 8, 10), (4, 7, 10)], None),
        ([(1, 1, 1)], None),
        ([], None),
    ],
)
def test_a_fault_is_found_from_the_size_on_that_the_rule_says(
    rates: list[tuple[float, int, int]], start: float | None
) -> None:
    assert detection.found_from(rates) == start


def test_the_page_of_the_guards_says_rates_with_intervals() -> None:
    def cell(guard: str, size: float, seed: int, spoke: bool) -> dict[str, Any]:
        alarms = [{"guard": guard or "overfitting", "step": 4, "message": "what was seen"}] if spoke else []
        ended = {"steps": 9, "last": {"eval_rewards/accuracies": 0.6, "generation/kl": 1 + seed % 2}}
        return {
            "guard": guard,
            "size": str(float(size)),
            "world": 20,
            "seed": seed,
            "alarms": alarms,
            "label": "fine",
            **ended,
        }

    # As json gives a plan's sizes: those of a dial are kept as they are written there.
    cells = [cell("", 0, seed, seed == 3) for seed in range(60)]
    for size, hits in ((1, 0), (2, 4), (4, 10), (8, 10)):
        for seed in range(10):
            cells.append({**cell("reward_jump", size, seed, seed < hits), "size": str(size)})
    cells[-1]["alarms"].append({"guard": "overfitting", "step": 8, "message": ""})
    cells.append({**cell("non_finite", float("inf"), 0, False)})
    text = detection.render({"cells": cells, **STAMP})
    assert "1: 0 of 10 (0 to 28 %); 2: 4 of 10 (17 to 69 %); 4: 10 of 10 (72 to 100 %)" in text
    assert "`reward_jump` from 4 on" in text
    assert "| 1 of 60 (0 to 9 %) |" in text
    assert "not measured" in text
    lines = text.splitlines()
    assert "| `reward_jump` | step 4 of 9 | what was seen | `overfitting` (1 of 10) |" in lines
    assert "| `non_finite` | **did not speak** |  | - |" in lines
    assert "| fine | 60 | 0.60 | 1.50 | `overfitting` (1) |" in lines


# ---- sweeps whose best cell is a corner ----


def sweep_cell(world: str, number: int, seed: int, sweet: int) -> dict[str, Any]:
    rates = corner.GRIDS[world]["learning_rate"]
    # Truth rises with the rate, a little with a lower beta.
    cells = []
    for index, (beta, rate) in enumerate((b, r) for b in corner.GRIDS[world]["beta"] for r in rates):
        reward = {"reward": {"mean": 0.5 + 0.05 * rates.index(rate) - 0.01 * beta + 0.001 * (seed % 3)}}
        params = {"beta": beta, "learning_rate": rate}
        cells.append({"number": index, "params": params, "true": reward, "left_reference": False})
    found = {"cells": cells, "sweet_spot": sweet, "highest_mean": 2, "truly_best": 2, "within": sweet == 2}
    found["before"] = {"reward": {"mean": 0.45}}
    grid_of = corner.GRIDS[world]
    return {
        "world": world,
        "num_samples": number,
        "seed": seed,
        "rewards": corner.picks(found, grid_of),
        "corner": corner.is_corner(found, grid_of),
        **found,
    }


def test_what_each_way_picks_and_what_it_loses() -> None:
    cell = sweep_cell("timid", 100, 0, sweet=2)
    # Trial 1 is the middle rate at the lowest beta, trial 2 the highest rate.
    assert cell["rewards"] == pytest.approx(
        {"best": 0.5995, "sweet spot": 0.5995, "middle rate, lowest beta": 0.5495, "highest held-out mean": 0.5995}
    )
    assert cell["corner"]
    cells = [sweep_cell("timid", number, seed, 2) for number in (100, 1000) for seed in range(8)]
    text = corner.render({"cells": cells, **STAMP})
    assert "| timid | 100 | 8 of 8 | 8 of 8 (68 to 100 %) | 0.000 | 0.050 | 0.000 | 0 |" in text
    assert "sweet spot against middle rate, lowest beta; timid, 1,000 samples | +0.050" in text
    assert "8 of 8 | better |" in text
    assert "1,000 samples against 100; timid | +0.000 [+0.000, +0.000] | 0 of 8 | no difference can be told |" in text
    few = corner.render({"cells": cells[:3], **STAMP})
    assert "nothing is concluded from 3 seeds" in few


# ---- beta against learning rate ----


def test_an_interaction_is_told_where_all_seeds_agree() -> None:
    up, down = {"mean": 0.2, "low": 0.1, "high": 0.3}, {"mean": -0.2, "low": -0.3, "high": -0.1}
    none = {"mean": 0.0, "low": -0.1, "high": 0.1}
    assert "adds more" in grid.told([up, up])
    assert "adds less" in grid.told([down, down, down])
    for seeds in ([up, none], [up, down], [none]):
        assert grid.told(seeds) == "no interaction can be told"
    assert "cannot be told" in grid.told([up, None])


def test_the_contrast_is_that_of_the_four_corners(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    trials: list[dict[str, Any]] = []
    margins: dict[tuple[float, float], float] = {}
    for beta in grid.GRID["beta"]:
        for rate in grid.GRID["learning_rate"]:
            rewards = rng.normal(size=(40, 2))
            held = HeldOut(rewards * beta, np.full((40, 2), 5), np.arange(40), beta, "x")
            (tmp_path / f"{len(trials)}").mkdir()
            held.save(tmp_path / f"{len(trials)}")
            margins[beta, rate] = float((rewards[:, 0] - rewards[:, 1]).mean()) / 5
            trials.append({"params": {"beta": beta, "learning_rate": rate}, "run": str(len(trials))})
    found = grid.interaction(trials, tmp_path)
    assert found is not None
    expected = margins[0.3, 8e-4] - margins[0.3, 5e-5] - margins[0.05, 8e-4] + margins[0.05, 5e-5]
    assert found["mean"] == pytest.approx(expected)
    assert found["low"] < found["mean"] < found["high"]
    assert grid.interaction(trials[1:], tmp_path) is None


def test_the_page_of_the_grid_names_the_sweet_spot() -> None:
    metrics = {name: {"mean": 0.5} for name in ("train_loss", ACCURACY, PER_TOKEN, KL, TAIL)}
    cells = [
        {
            "beta": beta,
            "learning_rate": rate,
            "seed": seed,
            "metrics": metrics,
            "left_reference": False,
            "sweet_spot": (beta, rate) == (0.1, 2e-4),
            "interaction": {"mean": 0.0, "low": -0.1, "high": 0.1},
        }
        for seed in range(3)
        for beta in grid.GRID["beta"]
        for rate in grid.GRID["learning_rate"]
    ]
    head = {"grid": grid.GRID, "model": "m", "num_pairs": 256, "num_held_out": 128, "rows": "hh"}
    text = grid.render({"cells": cells, **head, **STAMP})
    assert "The sweet spot is beta 0.1, learning rate 0.0002 (3 of 3 seeds)" in text
    assert "no interaction can be told" in text
    assert "| 0.1 | 0.0002 | 0.500 0.500 0.500 |" in text


# ---- advice ----


def test_the_recipe_that_advice_is_compared_with_is_the_published_one() -> None:
    found = advice.recipe_fields()
    content = yaml.safe_load((ROOT / "src/preftune/recipes/smollm2-dpo.yaml").read_text())
    assert (found["beta"], found["learning_rate"]) == (content["beta"], content["learning_rate"]) == (0.5, 1e-6)
    assert (found["num_train_epochs"], found["per_device_train_batch_size"]) == (2, 128)
    assert set(found) <= set(advice.FIELDS)
    assert len(advice.SEEDS) >= 8


# ---- tiny runs ----


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_tiny_run_of_the_guards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = detection.plan(1, 1)
    few = [each for each in whole if each[0] in ("", "non_finite")]
    monkeypatch.setattr(detection, "plan", lambda *counts: few)
    out, place = tmp_path / "detection.json", page(tmp_path, "detection")
    line = ["--out", str(out), "--document", str(place), "--quick", "--pretrained", "0"]
    assert detection.main(line) == 0
    report = json.loads(out.read_text())
    assert [cell["guard"] for cell in report["cells"]] == [each[0] for each in few]
    assert all(cell["processor_seconds"] > 0 for cell in report["cells"])
    assert "`non_finite`" in place.read_text()
    monkeypatch.setattr(guards, "run_case", None)  # nothing is missing
    assert detection.main([*line, "--go_on"]) == 0
    assert json.loads(out.read_text())["cells"] == report["cells"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_tiny_sweep_with_a_corner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corner, "GRIDS", {"timid": {"beta": (0.1,), "learning_rate": (1e-4, 1e-3)}})
    out, place = tmp_path / "corner.json", page(tmp_path, "corner")
    line = ["--out", str(out), "--document", str(place), "--quick", "--seeds", "1", "--samples", "20", "40"]
    assert corner.main(line) == 0
    cells = json.loads(out.read_text())["cells"]
    assert [cell["num_samples"] for cell in cells] == [20, 40]
    assert [cell["cells"][0]["metrics"][TAIL]["n"] for cell in cells] == [20, 40]
    assert cells[0]["rewards"]["best"] >= cells[0]["rewards"]["sweet spot"]
    assert "timid" in place.read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_tiny_grid_on_rows_of_hh(tmp_path: Path) -> None:
    out, place = tmp_path / "grid.json", page(tmp_path, "grid")
    line = ["--out", str(out), "--document", str(place), "--quick", "--seeds", "1", "--work", str(tmp_path / "work")]
    assert grid.main(line) == 0
    report = json.loads(out.read_text())
    assert len(report["cells"]) == 9
    assert sum(cell["sweet_spot"] for cell in report["cells"]) == 1
    assert report["cells"][0]["interaction"] is not None
    assert "llama-1m, random" in place.read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_tiny_turned_labels_on_rows_of_hh(tmp_path: Path) -> None:
    out, place = tmp_path / "flips.json", tmp_path / "flips.md"
    line = ["--out", str(out), "--document", str(place), "--quick"]
    assert flips.main([*line, "--gain_seeds"]) == 0
    cells = json.loads(out.read_text())["cells"]
    assert len(cells) == len(flips.JUDGES) * len(flips.LEVELS) * len(flips.ESTIMATE_SEEDS)
    assert {len(cell["judges"]) for cell in cells if cell["name"] != "words"} == {3}
    assert "What methods gain" not in place.read_text()
    assert flips.main([*line, "--go_on", "--gain_seeds", "0"]) == 0
    assert json.loads(out.read_text())["cells"][: len(cells)] == cells
    assert "nothing is concluded from 1 seed" in place.read_text()


def test_turning_labels_turns_a_share_and_nothing_else() -> None:
    rows = [{"prompt": n, "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(10)]
    got, which = flips.turned(rows, 0.3, 1)
    assert which.sum() == 3
    for row, own, new in zip(rows, which, got, strict=True):
        assert new == ({**row, "chosen": row["rejected"], "rejected": row["chosen"]} if own else row)
    assert flips.turned(rows, 0.0, 1)[0] == rows


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_tiny_comparison_of_advice(tmp_path: Path) -> None:
    out = tmp_path / "advice.json"
    given = [1], (0.0,), (advice.SCALED, advice.RECIPE_SCALED), 1, "told", out
    report = advice.run(*given, settings=toy.tiny_settings())
    assert [cell["contender"] for cell in report["cells"]] == [advice.SCALED, advice.RECIPE_SCALED]
    assert report["cells"][1]["fields"]["beta"] == 0.5
    again = advice.run(*given, go_on=True, settings=toy.tiny_settings())
    assert again["cells"] == json.loads(json.dumps(report["cells"]))
