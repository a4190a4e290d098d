"""Losses under extremes: log-ratios up to +-1e4, lengths from one to 1e5, equal completions, every knob.

Value and gradient in fp64 and the value in fp32 are compared with the formulas of :mod:`benchmarks.loss_formulas` with
a hundred digits. The tolerance is what rounding may do: a few units in the last place of the inputs, carried through by
the gradient. Everything has to be finite.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.fuzz_tally import Tally, WrongError
from benchmarks.loss_formulas import Pair
from mpmath import mp, mpf
from torch import Tensor

from benchmarks import loss_formulas as formulas
from preftune.objectives import METHODS, Objective, PairLogps, UnpairedLogps, build_objective

RATIOS = (-1e4, -1e3, -100.0, -33.0, -32.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 32.0, 33.0, 100.0, 1e3, 1e4)
LENGTHS = (1, 1, 2, 3, 17, 1000, 100_000)
BETAS = (1e-3, 0.01, 0.1, 0.5, 1.0, 5.0, 10.0)
#: Units in the last place that values may be off by; sums of a dozen rounded operations.
ULPS = 256
#: Of the difference quotient: slopes reach 1e14 and turn within its inverse.
_STEP = mpf(10) ** -32


def draw_knobs(name: str, draw: random.Random) -> dict[str, Any]:
    """Settings of a method, each left alone half of the time."""
    ranges: dict[str, Any] = {
        "label_smoothing": lambda: draw.choice([1e-3, 0.1, 0.49]),
        "f_divergence_type": lambda: draw.choice(["forward_kl", "js_divergence", "alpha_divergence"]),
        "f_alpha_divergence_coef": lambda: draw.choice([-1.0, 0.0, 0.999999, 1.0, 1.5, 2.0]),
        "discopop_tau": lambda: draw.choice([0.01, 0.5, 1.0, 3.0]),
        "dpop_lambda": lambda: draw.choice([0.0, 5.0, 1000.0]),
        "odpo_alpha": lambda: draw.choice([0.0, 0.3, 100.0]),
        "odpo_transform": lambda: "identity",
        "ipo_normalize": lambda: False,
        "bco_running_delta": lambda: True,
        "sft_average": lambda: "pair_tokens",
        "simpo_gamma": lambda: draw.choice([0.0, 1.4, 10.0]),
        "cpo_alpha": lambda: draw.choice([0.0, 0.5, 5.0]),
        "alpha": lambda: draw.choice([-0.5, 0.01, 0.25, 1.0]),
        "desirable_weight": lambda: 1.33,
        "undesirable_weight": lambda: 0.5,
    }
    return {knob: ranges[knob]() for knob in METHODS[name].knobs if draw.random() < 0.5}


def fuzz_losses(tally: Tally, examples: int, start: int, folder: Path) -> None:
    """Every method in turn, with drawn knobs and pairs."""
    draw = random.Random(f"losses {start}")
    names = sorted(METHODS)
    for number in range(examples):
        name = names[(start + number) % len(names)]
        knobs, beta, size = draw_knobs(name, draw), draw.choice(BETAS), draw.randint(1, 4)
        kind = draw.choice(["extreme", "extreme", "equal", "wide"])
        columns = _columns(draw, size, kind)
        what = {"method": name, "beta": beta, **knobs, **columns}
        check = _check_single if name in formulas.SINGLE else _check_pairs
        seed = draw.random()
        tally.attempt(what, partial(check, name, beta, knobs, columns, seed), weight=size)


def _columns(draw: random.Random, size: int, kind: str) -> dict[str, list[float]]:
    """Log-probs, lengths and margins as numbers that fp32 holds exactly."""

    def ratio() -> float:
        return draw.choice(RATIOS) if kind != "wide" else draw.choice([-1, 1]) * 10 ** draw.uniform(-6, 4)

    found: dict[str, list[float]] = {name: [] for name in ("w", "l", "ref_w", "ref_l", "n_w", "n_l", "gap")}
    for _ in range(size):
        reference = [
            draw.choice([-2e4, -1.2e4, -1e4]) if kind != "wide" else -(10 ** draw.uniform(-3, 4)) for _ in "wl"
        ]
        ratios = [ratio(), ratio()]
        lengths = [draw.choice(LENGTHS), draw.choice(LENGTHS)]
        if kind == "equal":
            reference, ratios, lengths = [reference[0]] * 2, [ratios[0]] * 2, [lengths[0]] * 2
        # A log-prob is never above 0.
        policy = [min(a + b, 0.0) for a, b in zip(reference, ratios, strict=True)]
        for key, value in zip(("w", "l", "ref_w", "ref_l"), (*policy, *reference), strict=True):
            found[key].append(float(torch.tensor(value, dtype=torch.float32)))
        found["n_w"].append(float(lengths[0]))
        found["n_l"].append(float(lengths[1]))
        found["gap"].append(float(torch.tensor(draw.choice([1e-6, 0.25, 0.5, 1.0]), dtype=torch.float32)))
    return found


def _objective(name: str, beta: float, knobs: dict[str, Any]) -> Objective:
    return build_objective(name, beta=beta, **knobs)


def _check_pairs(name: str, beta: float, knobs: dict[str, Any], columns: dict[str, list[float]], seed: float) -> None:
    objective = _objective(name, beta, knobs)
    delta = (seed - 0.5) * 2e3 if objective.uses_running_delta else None
    told = {**knobs, "delta": delta or 0.0}
    for dtype in (torch.float64, torch.float32):
        leaves = [torch.tensor(columns[key], dtype=dtype, requires_grad=True) for key in ("w", "l")]
        batch = PairLogps(
            chosen_logps=leaves[0],
            rejected_logps=leaves[1],
            ref_chosen_logps=torch.tensor(columns["ref_w"], dtype=dtype),
            ref_rejected_logps=torch.tensor(columns["ref_l"], dtype=dtype),
            chosen_lengths=torch.tensor(columns["n_w"]),
            rejected_lengths=torch.tensor(columns["n_l"]),
            margins=torch.tensor(columns["gap"], dtype=dtype),
        )
        loss = objective(batch, bco_delta=delta).loss
        grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        slopes = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
        _finite(loss, *slopes)
        mean = sum(columns["n_w"]) / len(columns["n_w"])
        rounding = torch.finfo(dtype).eps
        rows = ({key: values[number] for key, values in columns.items()} for number in range(len(columns["w"])))
        pairs = [Pair(**row, mean_tokens=mean, rounding=rounding) for row in rows]
        if name in formulas.JOINT:
            _compare_joint(name, pairs, beta, told, loss, rounding)
            continue
        for number, pair in enumerate(pairs):
            _compare_pair(name, pair, beta, told, float(loss[number]), [float(s[number]) for s in slopes], rounding)


def _finite(*tensors: Tensor) -> None:
    for tensor in tensors:
        if not bool(tensor.isfinite().all()):
            raise WrongError(f"not finite in {tensor.dtype}: {tensor.tolist()}")


def _compare_pair(
    name: str, pair: Pair, beta: float, knobs: dict[str, Any], loss: float, slopes: list[float], rounding: float
) -> None:
    function = formulas.PAIRWISE[name]
    value = function(pair, beta, knobs)
    moves = [(pair.moved(pair.w + s, pair.l), pair.moved(pair.w, pair.l + s)) for s in (_STEP, -_STEP)]
    exact = [
        (function(up, beta, knobs) - function(down, beta, knobs)) / (2 * _STEP) for up, down in zip(*moves, strict=True)
    ]
    sizes = (abs(pair.w) + abs(pair.ref_w), abs(pair.l) + abs(pair.ref_l))
    shift = abs(knobs.get("delta", 0.0)) / beta
    room = 1 + abs(value) + sum(abs(g) * (size + shift) for g, size in zip(exact, sizes, strict=True))
    if name == "discopop":
        # log m and h are both large where their difference is not.
        h = abs(formulas.difference(pair, beta, knobs)) * (1 + 1 / mpf(knobs.get("discopop_tau", 0.05)))
        room += h * abs(value)
    if abs(value - mpf(loss)) > ULPS * mpf(rounding) * room:
        raise WrongError(f"loss {loss!r}, exactly {mp.nstr(value, 17)} (eps {rounding:.1e})")
    if rounding > 1e-12 or _at_a_kink(name, pair, beta, knobs):
        return
    for mine, wanted in zip(slopes, exact, strict=True):
        if abs(mpf(mine) - wanted) > mpf("1e-7") * (1 + abs(wanted)):
            raise WrongError(f"gradient {mine!r}, exactly {mp.nstr(wanted, 17)}")


def _at_a_kink(name: str, pair: Pair, beta: float, knobs: dict[str, Any]) -> bool:
    """Where a loss has no derivative, any value between its one-sided ones is right."""
    near = mpf("1e-9")
    if name == "dpop":
        return bool(abs(pair.r_w) < near)
    if name == "hinge":
        return bool(abs(1 - formulas.difference(pair, beta, knobs)) < near)
    if name == "cpo_hinge":
        return bool(abs(1 - formulas._cpo_delta(pair, beta, knobs)) < near)
    return name == "orpo" and max(pair.w / pair.n_w, pair.l / pair.n_l) > -1e-9


def _compare_joint(
    name: str, pairs: Sequence[Pair], beta: float, knobs: dict[str, Any], loss: Tensor, rounding: float
) -> None:
    exact = formulas.JOINT[name](pairs, beta, knobs)
    size = max(abs(p.w) + abs(p.l) + abs(p.ref_w) + abs(p.ref_l) for p in pairs)
    for mine, wanted in zip(loss.tolist(), exact, strict=True):
        if abs(mpf(mine) - wanted) > ULPS * mpf(rounding) * (1 + abs(wanted) + beta * size):
            raise WrongError(f"loss {mine!r}, exactly {mp.nstr(wanted, 17)} (eps {rounding:.1e})")


def _check_single(name: str, beta: float, knobs: dict[str, Any], columns: dict[str, list[float]], seed: float) -> None:
    objective = _objective(name, beta, knobs)
    kl = math.floor(seed * 3) * 5e3 if objective.uses_kl else None
    labels = torch.arange(len(columns["w"])) % 2 == 0
    for dtype in (torch.float64, torch.float32):
        logps = torch.tensor(columns["w"], dtype=dtype, requires_grad=True)
        batch = UnpairedLogps(logps=logps, ref_logps=torch.tensor(columns["ref_w"], dtype=dtype), labels=labels)
        loss = objective(batch, kl=kl).loss
        (slope,) = torch.autograd.grad(loss.sum(), [logps])
        _finite(loss, slope)
        told, rounding = {**knobs, "kl": kl or 0.0}, torch.finfo(dtype).eps
        for number, (w, ref) in enumerate(zip(columns["w"], columns["ref_w"], strict=True)):
            r, good = mpf(w) - ref, bool(labels[number])
            exact = formulas.single(name, r, good, beta, told)
            room = 1 + abs(exact) + beta * abs(r - told["kl"]) * abs(exact)
            if abs(mpf(float(loss[number])) - exact) > ULPS * mpf(rounding) * room:
                raise WrongError(f"loss {float(loss[number])!r}, exactly {mp.nstr(exact, 17)} (eps {rounding:.1e})")
            above, below = (formulas.single(name, r + s, good, beta, told) for s in (_STEP, -_STEP))
            wanted = (above - below) / (2 * _STEP)
            if dtype == torch.float64 and abs(mpf(float(slope[number])) - wanted) > mpf("1e-7") * (1 + abs(wanted)):
                raise WrongError(f"gradient {float(slope[number])!r}, exactly {mp.nstr(wanted, 17)}")
