"""The whole matrix of methods and options, step by step against TRL, on rows of real preference data."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.parity.conftest import hh_rows
from tests.parity.matrix import CASES, TOLERANCE, Case, Ground, measure, train

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="module")
def ground(preference_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("ground"), hh_rows(preference_files))


def test_no_case_is_there_twice_and_every_loss_of_trl_is_there() -> None:
    from trl import DPOConfig

    assert len({case.name for case in CASES}) == len(CASES)
    told = str(DPOConfig.__dataclass_fields__["loss_type"].metadata["help"])
    losses = {name for case in CASES if case.verb == "dpo" for name in case.options.get("loss_type", ["sigmoid"])}
    mentioned = {name for name in losses if f"`{name}`" in told or f"'{name}'" in told}
    assert mentioned == losses
    divergences = {case.options.get("f_divergence_type", "reverse_kl") for case in CASES if case.verb == "dpo"}
    assert divergences == {"reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"}


@pytest.mark.thin(16)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_three_steps_agree(case: Case, ground: Ground, tmp_path: Path) -> None:
    found = measure(case, ground, tmp_path)
    assert found.worst <= TOLERANCE, found
    # A reward of zero throughout would be compared with nothing.
    assert found.moved > 1e-2, found


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm"])
def test_label_smoothing_acts_where_trl_ignores_it(ground: Ground, tmp_path: Path, loss: str) -> None:
    """A deliberate difference: TRL takes the setting and trains as without it; here it is cDPO.

    At the first step all log-ratios are zero: the loss is ln 2 either way, and the gradient, by hand, is that of the
    plain loss times 1 - 2 epsilon.
    """
    options = {"loss_type": [loss], "max_grad_norm": 0.0}
    plain, smoothed = (Case(loss, "dpo", {**options, "label_smoothing": e}) for e in (0.0, 0.2))
    with_trl, without_trl = (train(case, "trl", ground, tmp_path) for case in (smoothed, plain))
    assert [line["loss"] for line in with_trl.lines] == [line["loss"] for line in without_trl.lines]
    ours = train(smoothed, "preftune", ground, tmp_path)
    assert math.isclose(ours.lines[0]["loss"], math.log(2), rel_tol=1e-5)
    for name, gradient in without_trl.gradients[0].items():
        torch.testing.assert_close(ours.gradients[0][name], 0.6 * gradient, rtol=TOLERANCE, atol=1e-6)
    assert abs(ours.lines[2]["loss"] - with_trl.lines[2]["loss"]) > 1e-4
