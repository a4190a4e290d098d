"""The fuzzing in small, and that it would notice what it looks for."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.fuzz_tally import Tally, WrongError

from benchmarks import fuzz, fuzz_guided, fuzz_losses, fuzz_packing, loss_formulas, stale
from preftune.objectives import METHODS, numerics
from preftune.packing import rows


def good(tally: Tally) -> None:
    assert tally.num_bad == 0, tally.examples
    assert tally.accepted


def test_every_method_has_a_formula_of_its_own() -> None:
    assert {*loss_formulas.PAIRWISE, *loss_formulas.JOINT, *loss_formulas.SINGLE} == set(METHODS)


def test_losses_under_extremes(tmp_path: Path) -> None:
    tally = Tally()
    fuzz_losses.fuzz_losses(tally, 4 * len(METHODS), 7, tmp_path)
    good(tally)


def test_packing_under_extremes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_packing, "LONG", 5000)
    tally = Tally()
    fuzz_packing.fuzz_packing(tally, 40, 7, tmp_path)
    good(tally)


@pytest.mark.slow
def test_a_row_of_a_hundred_thousand_tokens(tmp_path: Path) -> None:
    tally = Tally()
    fuzz_packing.fuzz_long_rows(tally, 1, 0, tmp_path)
    good(tally)


# ---- what it would notice -------------------------------------------------------------------------------------------


def test_a_wrong_loss_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one part in a million, in one method."""
    spec = METHODS["ipo"]
    off = replace(spec, function=lambda batch, **knobs: spec.function(batch, **knobs) * (1 + 1e-6))
    monkeypatch.setattr("preftune.objectives.compose.METHODS", {**METHODS, "ipo": off})
    tally = Tally()
    fuzz_losses.fuzz_losses(tally, 3 * len(METHODS), 0, tmp_path)
    assert tally.wrong
    assert all("'ipo'" in example["input"] for example in tally.examples)


def test_a_gradient_that_is_cut_off_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def clamped(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x.clamp(max=numerics.MAX_EXPONENT))

    monkeypatch.setattr("preftune.objectives.logistic.guarded_exp", clamped)
    tally = Tally()
    fuzz_losses.fuzz_losses(tally, 10 * len(METHODS), 0, tmp_path)
    assert tally.wrong
    assert all("'discopop'" in example["input"] for example in tally.examples)


@pytest.mark.parametrize("part", ["source", "target_slot", "position_ids"])
def test_an_integer_off_by_one_is_noticed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = rows.build_row

    def off(*arguments: Any) -> Any:
        row = plain(*arguments)
        changed = getattr(row, part).copy()
        changed[len(changed) // 2] += 1
        return replace(row, **{part: changed})

    draw = random.Random(0)
    pairs = fuzz_packing._pairs(draw, 30, 3)
    fuzz_packing.check_arrangement(pairs, 1000)
    monkeypatch.setattr(fuzz_packing, "build_row", off)
    with pytest.raises(WrongError):
        fuzz_packing.check_arrangement(pairs, 1000)


def test_texts_that_change_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [{"prompt": "e\u0301 \u202e\u0000", "chosen": "\U0001d518", "rejected": "\U0010fffd"}]
    assert fuzz_packing.check_texts(texts, tmp_path / "a.jsonl") == 0
    lone = [{"prompt": "a", "chosen": "\ud800", "rejected": "b"}, *texts]
    assert fuzz_packing.check_texts(lone, tmp_path / "b.jsonl") == 0
    dumps = json.dumps
    # As if the rows were normalised on their way in.
    monkeypatch.setattr(json, "dumps", lambda row: dumps(row).replace("e\\u0301", "\\u00e9"))
    with pytest.raises(WrongError, match="came back"):
        fuzz_packing.check_texts(texts, tmp_path / "c.jsonl")


def test_a_traceback_a_long_error_and_a_lost_row_are_counted() -> None:
    from preftune.errors import DataError

    def fail(error: Exception) -> None:
        raise error

    tally = Tally()
    tally.attempt("a", lambda: fail(KeyError("x")))
    tally.attempt("b", lambda: fail(DataError("fine")))
    tally.attempt("c", lambda: 2)
    tally.attempt("d", lambda: fail(WrongError("1, exactly 2")))
    assert (tally.inputs, tally.tracebacks, tally.refused, tally.silent_drops, tally.wrong) == (4, 1, 1, 2, 1)
    assert [example["input"] for example in tally.examples] == ["'a'", "'c'", "'d'"]


# ---- guided, and what is kept ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", fuzz_guided.TARGETS)
def test_the_seeds_of_every_target(name: str, tmp_path: Path) -> None:
    """What coverage starts from is taken: at least one seed passes, and none ends in a traceback."""
    target, seeds = fuzz_guided.TARGETS[name]
    tally = Tally()
    for seed in seeds:
        tally.attempt(seed, lambda s=seed: target(s, tmp_path))  # type: ignore[misc]
    assert tally.num_bad == 0, tally.examples
    assert tally.accepted or name == "checkpoint manifests"


@pytest.mark.slow
@pytest.mark.extras
def test_guided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_guided, "TARGETS", {"sweep params": fuzz_guided.TARGETS["sweep params"]})
    good(fuzz_guided.run_guided(3, 0))


def test_one_kind_leaves_the_others_of_the_same_code_as_they_are(tmp_path: Path) -> None:
    out = tmp_path / "fuzz.json"
    kinds = [{"kind": "rows", "inputs": 3}, {"kind": "losses", "inputs": 4}]
    for digest, kept in ((stale.digest(fuzz.PATTERNS), [kinds[0]]), ("of other code", [])):
        out.write_text(json.dumps({stale.KEY: {"digest": digest}, "kinds": kinds}), encoding="utf-8")
        fuzz.write_kind(out, {"kind": "losses", "inputs": 9})
        written = json.loads(out.read_text(encoding="utf-8"))
        assert written["kinds"] == [*kept, {"kind": "losses", "inputs": 9}]
        assert stale.why_stale(written) is None
