"""The matrix test: what must hold for every row of the table. A new row is tested without writing a test."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.objectives.cases import (
    PAIR_CASES,
    UNPAIRED_CASES,
    VARIANTS,
    call,
    case_id,
    extreme_logps,
    gradients,
    labelled,
    objective_of,
    pairs,
)
from torch import Tensor

from preftune.errors import ConfigError, DataError
from preftune.objectives import METHODS, PAPERS, PairLogps, UnpairedLogps, build_objective

Case = tuple[str, dict[str, Any]]

every_pair_case = pytest.mark.parametrize("case", PAIR_CASES, ids=lambda case: "-".join(map(case_id, case)))
every_unpaired_case = pytest.mark.parametrize("case", UNPAIRED_CASES, ids=lambda case: "-".join(map(case_id, case)))
every_method = pytest.mark.parametrize("name", METHODS)


@every_method
def test_row_and_function_agree(name: str) -> None:
    spec = METHODS[name]
    assert spec.name == name
    parameters = inspect.signature(spec.function).parameters
    batch, *rest = parameters.values()
    assert batch.name == "batch"
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in rest)
    # Step-wide numbers come from the engine, and the running delta is a switch of the objective.
    taken = set(parameters) - {"batch", "beta", "kl", "delta"}
    assert taken == set(spec.knobs) - {"bco_running_delta"}
    for knob in taken:
        assert parameters[knob].default == spec.knobs[knob].default, knob
    assert spec.formula
    assert spec.paper is PAPERS[spec.bibtex_key]
    assert spec.function.__doc__ is not None
    assert "Source" in spec.function.__doc__
    assert bool(spec.defaults) == bool(spec.defaults_source)


def test_every_knob_has_variants() -> None:
    knobs = {knob for spec in METHODS.values() for knob in spec.knobs}
    assert knobs == set(VARIANTS)


@every_pair_case
def test_shape_and_dtype(case: Case) -> None:
    for num_pairs in (0, 1, 5):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            loss = call(objective_of(case), pairs(num_pairs, dtype=dtype))
            assert loss.shape == (num_pairs,)
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert loss.isfinite().all()


@every_pair_case
def test_half_precision_computes_in_float32(case: Case) -> None:
    half = pairs(6, dtype=torch.bfloat16)
    single = PairLogps(
        chosen_logps=half.chosen_logps.float(),
        rejected_logps=half.rejected_logps.float(),
        ref_chosen_logps=half.ref_logps[0].float(),
        ref_rejected_logps=half.ref_logps[1].float(),
        chosen_lengths=half.chosen_lengths,
        rejected_lengths=half.rejected_lengths,
        margins=half.margins,
    )
    assert torch.equal(call(objective_of(case), half), call(objective_of(case), single))


@every_pair_case
def test_gradcheck(case: Case) -> None:
    base = pairs(6, seed=3)
    objective = objective_of(case)

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return call(objective, replace(base, chosen_logps=chosen, rejected_logps=rejected))

    inputs = [leaf.clone().requires_grad_() for leaf in (base.chosen_logps, base.rejected_logps)]
    assert torch.autograd.gradcheck(loss, inputs, atol=1e-6, rtol=1e-5)


@every_pair_case
@pytest.mark.parametrize("beta", [0.001, 5.0])
def test_finite_at_extremes(case: Case, beta: float) -> None:
    chosen, rejected, reference = (column.repeat(2) for column in extreme_logps())
    objective = objective_of(case, beta=beta)
    lengths = torch.tensor([1, 200]).repeat_interleave(len(chosen) // 2)

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        batch = PairLogps(
            chosen_logps=chosen,
            rejected_logps=rejected,
            ref_chosen_logps=reference,
            ref_rejected_logps=reference,
            chosen_lengths=lengths,
            rejected_lengths=lengths,
            margins=torch.full(chosen.shape, 0.5),
        )
        return call(objective, batch)

    assert loss(chosen, rejected).isfinite().all()
    for gradient in gradients(loss, chosen, rejected):
        assert gradient.isfinite().all()


@every_pair_case
def test_separable_exactly_when_the_table_says_so(case: Case) -> None:
    whole, objective = pairs(7, seed=5), objective_of(case)
    batches = [whole.select(slice(0, 3)), whole.select(torch.tensor([5, 3])), whole.select(torch.tensor([6, 4]))]
    split = torch.stack([call(objective, batch).sum() for batch in batches]).sum()
    same = torch.isclose(split, call(objective, whole).sum(), rtol=1e-12)
    assert bool(same) is objective.separable


@every_pair_case
def test_permutation_of_pairs(case: Case) -> None:
    whole, objective = pairs(7, seed=6), objective_of(case)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    loss, permuted = call(objective, whole), call(objective, whole.select(order))
    if objective.separable:
        torch.testing.assert_close(permuted, loss[order], rtol=1e-12, atol=0)
    else:
        torch.testing.assert_close(permuted.sum(), loss.sum(), rtol=1e-12, atol=0)


@every_pair_case
def test_reference_is_needed_exactly_when_the_table_says_so(case: Case) -> None:
    objective = objective_of(case)
    free = replace(pairs(4), ref_chosen_logps=None, ref_rejected_logps=None)
    if objective.needs_reference:
        with pytest.raises(DataError, match="reference"):
            call(objective, free)
    else:
        assert torch.equal(call(objective, free), call(objective, pairs(4)))


@every_method
def test_lengths_enter_exactly_when_the_table_says_so(name: str) -> None:
    spec = METHODS[name]
    if not spec.paired:
        assert not spec.needs_lengths
        return
    batch = pairs(4)
    longer = replace(batch, chosen_lengths=batch.chosen_lengths + 1, rejected_lengths=batch.rejected_lengths + 3)
    objective = build_objective(name, beta=0.3)
    assert torch.equal(call(objective, batch), call(objective, longer)) is not spec.needs_lengths


@every_pair_case
def test_margins_enter_exactly_when_the_table_says_so(case: Case) -> None:
    objective = objective_of(case)
    without = replace(pairs(4), margins=None)
    if "margins" in objective.requires:
        with pytest.raises(DataError, match="margin"):
            call(objective, without)
        with pytest.raises(DataError, match="margin"):
            METHODS[case[0]].function(without, beta=0.1)
    else:
        assert torch.equal(call(objective, without), call(objective, pairs(4)))


@every_pair_case
def test_better_chosen_gives_smaller_loss_near_the_reference(case: Case) -> None:
    """Every method must at least agree on the direction: a step along its gradient separates the pair."""
    base = pairs(1)
    same = {"ref_chosen_logps": base.chosen_logps, "ref_rejected_logps": base.rejected_logps}
    batch = replace(base, **same, margins=torch.full((1,), 0.5))
    objective = objective_of(case, beta=0.1)
    up, down = gradients(
        lambda chosen, rejected: call(objective, replace(batch, chosen_logps=chosen, rejected_logps=rejected)),
        batch.chosen_logps,
        batch.rejected_logps,
    )
    if case[0] == "sft":
        assert (up < 0).all()
    elif case[0] == "discopop" and case[1].get("discopop_tau", 0.05) < (1 - math.log(2)) / 3:
        # No defect: at h = 0 the slope of eq. 5 is (1 - log 2) / (4 tau) - 3/4, positive for so small a tau. The
        # published loss has a local minimum on either side.
        assert (up > down).all()
    else:
        assert (up < down).all()


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan"), float("inf"), True, "0.1", None])
def test_beta_is_checked(beta: Any) -> None:
    for name in METHODS:
        with pytest.raises(ConfigError, match="beta"):
            build_objective(name, beta=beta)


@every_unpaired_case
@pytest.mark.parametrize("num_examples", [0, 1, 6])
def test_unpaired_shape_gradcheck_and_order(case: Case, num_examples: int) -> None:
    batch, objective = labelled(num_examples), objective_of(case)
    loss = call(objective, batch)
    assert loss.shape == (num_examples,)
    if not num_examples:
        return
    single = torch.cat(
        [
            call(objective, UnpairedLogps(logps=a[None], ref_logps=b[None], labels=c[None]))
            for a, b, c in zip(batch.logps, batch.ref_logps, batch.labels, strict=True)
        ]
    )
    torch.testing.assert_close(loss, single, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(
        lambda logps: call(objective, replace(batch, logps=logps)), [batch.logps.clone().requires_grad_()]
    )


@every_unpaired_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unpaired_finite_at_extremes(case: Case, dtype: torch.dtype) -> None:
    logps = torch.tensor([-2e4, -1e4, 0.0, -2e4, -1e4, 0.0]).to(dtype).requires_grad_()
    batch = UnpairedLogps(
        logps=logps,
        ref_logps=torch.full((6,), -1e4, dtype=dtype),
        labels=torch.tensor([True, True, True, False, False, False]),
    )
    loss = call(objective_of(case, beta=5.0), batch)
    assert loss.isfinite().all()
    assert loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss.sum(), [logps])
    assert gradient.isfinite().all()
