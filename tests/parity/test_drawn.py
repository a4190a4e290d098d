"""The comparison of runs drawn at random, in small, and that it would notice what it looks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity import drawn

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.mark.thin(2)
@pytest.mark.parametrize("seed", range(6))
def test_a_drawn_run_is_trls(tmp_path: Path, seed: int) -> None:
    run = drawn.draw(seed)
    drawn.save_model(run, tmp_path / "model", drawn.tokenizer_of(run))
    theirs, ours = (drawn.train(library, run, tmp_path) for library in ("trl", "preftune"))
    assert not list(drawn.differences(run, ours, theirs)), run


def test_the_same_seed_draws_the_same_run() -> None:
    assert [drawn.draw(seed) for seed in range(50)] == [drawn.draw(seed) for seed in range(50)]
    assert {drawn.draw(seed).verb for seed in range(50)} == {"DPO", "KTO", "SFT", "ORPO", "CPO"}


@pytest.mark.parametrize("name", ["loss", "grad_norm", "rewards/margins", "eval_logps/chosen"])
def test_a_wrong_figure_is_noticed(name: str) -> None:
    run = drawn.Drawn(0, "LlamaConfig", "DPO", "explicit", options={"beta": 0.1})
    line = {"loss": 0.6, "grad_norm": 2.0, "rewards/margins": 0.1, "logps/chosen": -50.0, "eval_logps/chosen": -50.0}
    assert not list(drawn.differences(run, [line], [line]))
    assert list(drawn.differences(run, [{**line, name: line[name] * 1.01}], [line]))
    assert list(drawn.differences(run, [{k: v for k, v in line.items() if k != name}], [line]))
    assert list(drawn.differences(run, [], [line]))
