"""Every row of the table with every variant of its knobs, and batches to put through them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from preftune.objectives import DIVERGENCES, METHODS, Knob, Objective, PairLogps, UnpairedLogps, build_objective

# Values beside the default for each knob; those of a knob without an entry follow from its range.
VARIANTS: dict[str, tuple[Any, ...]] = {
    "label_smoothing": (0.1, 0.4),
    "f_divergence_type": tuple(name for name in DIVERGENCES if name != "reverse_kl"),
    "f_alpha_divergence_coef": (),  # varied together with alpha_divergence
    "discopop_tau": (0.5, 1.0, 3.0),
    "dpop_lambda": (0.0, 5.0),
    "odpo_alpha": (0.0, 0.3),
    "odpo_transform": ("identity",),
    "ipo_normalize": (False,),
    "bco_running_delta": (True,),
    "sft_average": ("pair_tokens",),
    "simpo_gamma": (0.0, 1.4),
    "cpo_alpha": (0.0, 1.0, 0.5),
    "alpha": (0.25, -0.5),
    "desirable_weight": (1.33,),
    "undesirable_weight": (0.5,),
}


def _of_range(knob: Knob) -> tuple[Any, ...]:
    """Values beside the default that a knob allows."""
    if knob.kind == "flag":
        return (not knob.default,)
    if knob.kind == "choice":
        return tuple(choice for choice in knob.choices if choice != knob.default)
    near = (2.0 * knob.default, 0.5 * knob.default, knob.default + 0.25, knob.default - 0.25)
    allowed = [value for value in near if value != knob.default and knob.low < value < knob.high]
    assert allowed, f"{knob.name} needs values in VARIANTS"
    return tuple(allowed[:2])


for _knob in (knob for spec in METHODS.values() for knob in spec.knobs.values()):
    VARIANTS.setdefault(_knob.name, _of_range(_knob))

# A variant that has an effect only beside another setting.
COMPANIONS: dict[tuple[str, str], dict[str, Any]] = {("simpo", "sft_average"): {"cpo_alpha": 1.0}}


def _all_cases() -> list[tuple[str, dict[str, Any]]]:
    cases: list[tuple[str, dict[str, Any]]] = []
    for name, spec in METHODS.items():
        cases.append((name, {}))
        for knob in spec.knobs:
            companion = COMPANIONS.get((name, knob), {})
            cases += [(name, {**companion, knob: value}) for value in VARIANTS[knob]]
        if "f_alpha_divergence_coef" in spec.knobs:
            alphas = (0.0, 0.9999999, 1.0, 2.0, -1.0)
            cases += [
                (name, {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}) for alpha in alphas
            ]
    return cases


CASES = _all_cases()
PAIR_CASES = [case for case in CASES if METHODS[case[0]].paired]
UNPAIRED_CASES = [case for case in CASES if not METHODS[case[0]].paired]


def case_id(value: Any) -> str:
    """Readable test ids."""
    if isinstance(value, dict):
        return ",".join(f"{key}={entry}" for key, entry in value.items()) or "default"
    return str(value)


def objective_of(case: tuple[str, dict[str, Any]], beta: float = 0.3) -> Objective:
    """The objective of a case."""
    return build_objective(case[0], beta=beta, **case[1])


def call(objective: Objective, batch: PairLogps | UnpairedLogps) -> Tensor:
    """Losses of a batch with the step-wide numbers that the objective asks for."""
    delta = 0.2 if objective.uses_running_delta else None
    kl = 0.7 if objective.uses_kl else None
    return objective(batch, bco_delta=delta, kl=kl).loss


def pairs(num_pairs: int, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any) -> PairLogps:
    """Plausible pairs: log-probs below zero, log-ratios of a few nats, margins that every method accepts."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(num_pairs, generator=generator, dtype=torch.float64)

    values: dict[str, Any] = {
        "chosen_logps": draw(-30.0, -5.0),
        "rejected_logps": draw(-30.0, -5.0),
        "ref_chosen_logps": draw(-30.0, -5.0),
        "ref_rejected_logps": draw(-30.0, -5.0),
        "chosen_lengths": torch.randint(3, 20, (num_pairs,), generator=generator),
        "rejected_lengths": torch.randint(3, 20, (num_pairs,), generator=generator),
        "margins": draw(0.1, 1.0),
    }
    values = {name: value.to(dtype) if value.is_floating_point() else value for name, value in values.items()}
    return PairLogps(**{**values, **overrides})


def labelled(num_examples: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> UnpairedLogps:
    """Plausible labelled completions, both labels present from two examples on."""
    generator = torch.Generator().manual_seed(seed)
    logps, ref_logps = (-5.0 - 25.0 * torch.rand(2, num_examples, generator=generator, dtype=torch.float64)).to(dtype)
    return UnpairedLogps(logps=logps, ref_logps=ref_logps, labels=torch.arange(num_examples) % 3 != 1)


def extreme_logps(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Policy chosen, policy rejected and reference log-probs: every pair of log-ratios out of -1e4 ... 1e4."""
    ratios = (-1e4, -100.0, -33.0, 0.0, 33.0, 100.0, 1e4)
    chosen, rejected = torch.tensor(list(itertools.product(ratios, ratios)), dtype=dtype).unbind(1)
    reference = torch.full_like(chosen, -1e4)
    return reference + chosen, reference + rejected, reference


def gradients(loss: Callable[[Tensor, Tensor], Tensor], chosen: Tensor, rejected: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the summed loss."""
    leaves = tuple(leaf.clone().requires_grad_() for leaf in (chosen, rejected))
    grads = torch.autograd.grad(loss(*leaves).sum(), leaves, allow_unused=True)
    return tuple(torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, leaves, strict=True))
