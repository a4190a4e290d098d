"""The losses once more, straight from their papers with a hundred digits: what the fuzzing compares with.

Nothing here is shared with the package: no function, no constant, no trick for overflow, since numbers of ``mpmath``
have no largest exponent. Two rules are not the papers' but this project's, and documented: the exponential goes on as
its tangent above an exponent of 32, and a probability of one is capped a rounding step below it where odds are taken.

r_w, r_l: log-ratios of the chosen and the rejected completion; a_w, a_l: averages of their log-probs over tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mpmath import mp, mpf

Number = Any  # mpmath has no types
Knobs = dict[str, Any]

mp.dps = 100
TANGENT_FROM = 32


@dataclass(frozen=True)
class Pair:
    """One pair as numbers: summed log-probs of policy and reference, token counts, score gap.

    Attributes:
        w: Policy's log-prob of the chosen completion.
        l: Policy's log-prob of the rejected completion.
        ref_w: Reference's log-prob of the chosen completion.
        ref_l: Reference's log-prob of the rejected completion.
        n_w: Tokens of the chosen completion.
        n_l: Tokens of the rejected completion.
        gap: Score gap of the data.
        mean_tokens: Mean of ``n_w`` over the step.
        rounding: Distance from 1 to the next number of the dtype under test.
    """

    w: Number
    l: Number  # noqa: E741 - the papers' name
    ref_w: Number
    ref_l: Number
    n_w: Number
    n_l: Number
    gap: Number
    mean_tokens: Number
    rounding: float

    def moved(self, w: Number, l: Number) -> Pair:  # noqa: E741
        """The same pair with other log-probs of the policy."""
        return Pair(w, l, self.ref_w, self.ref_l, self.n_w, self.n_l, self.gap, self.mean_tokens, self.rounding)

    @property
    def r_w(self) -> Number:
        """Log-ratio of the chosen completion."""
        return mpf(self.w) - self.ref_w

    @property
    def r_l(self) -> Number:
        """Log-ratio of the rejected completion."""
        return mpf(self.l) - self.ref_l


def log_sigmoid(x: Number) -> Number:
    return -mp.log1p(mp.exp(-x))


def sigmoid(x: Number) -> Number:
    return 1 / (1 + mp.exp(-x))


def exponential(x: Number) -> Number:
    return mp.exp(x) if x <= TANGENT_FROM else mp.exp(TANGENT_FROM) * (1 + x - TANGENT_FROM)


def power(x: Number, exponent: float) -> Number:
    return x if abs(exponent) < 1e-12 else (exponential(mpf(exponent) * x) - 1) / mpf(exponent)


def score(r: Number, knobs: Knobs) -> Number:
    """f'(t) of the divergence at t = exp(r)."""
    kind = knobs.get("f_divergence_type", "reverse_kl")
    if kind == "reverse_kl":
        return r
    if kind == "forward_kl":
        return power(r, -1.0)
    if kind == "js_divergence":
        return mp.log(2) + log_sigmoid(r)
    return power(r, knobs.get("f_alpha_divergence_coef", 0.5) - 1.0)


def difference(p: Pair, beta: float, knobs: Knobs) -> Number:
    return mpf(beta) * (score(p.r_w, knobs) - score(p.r_l, knobs))


def smoothed(z: Number, knobs: Knobs) -> Number:
    e = mpf(knobs.get("label_smoothing", 0.0))
    return -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)


def sft(p: Pair, beta: float, knobs: Knobs) -> Number:
    per_pair = knobs.get("sft_average", "batch_tokens") == "pair_tokens"
    return -mpf(p.w) / (p.n_w if per_pair else p.mean_tokens)


def _dpo(p: Pair, beta: float, knobs: Knobs) -> Number:
    return smoothed(difference(p, beta, knobs), knobs)


def _per_token(p: Pair, knobs: Knobs) -> Number:
    return score(p.r_w, knobs) / p.n_w - score(p.r_l, knobs) / p.n_l


def _robust(p: Pair, beta: float, knobs: Knobs) -> Number:
    h, e = difference(p, beta, knobs), mpf(knobs.get("label_smoothing", 0.0))
    return ((1 - e) * -log_sigmoid(h) - e * -log_sigmoid(-h)) / (1 - 2 * e)


def _exo(p: Pair, beta: float, knobs: Knobs) -> Number:
    h, e = difference(p, beta, knobs), mpf(knobs.get("label_smoothing", 1e-3))
    return sigmoid(h) * (log_sigmoid(h) - mp.log(1 - e)) + sigmoid(-h) * (log_sigmoid(-h) - mp.log(e))


def _nca(p: Pair, beta: float, knobs: Knobs) -> Number:
    w, l = mpf(beta) * p.r_w, mpf(beta) * p.r_l  # noqa: E741
    return -log_sigmoid(w) - log_sigmoid(-w) / 2 - log_sigmoid(-l) / 2


def _discopop(p: Pair, beta: float, knobs: Knobs) -> Number:
    h, tau = difference(p, beta, knobs), mpf(knobs.get("discopop_tau", 0.05))
    return -sigmoid(-h / tau) * log_sigmoid(h) + exponential(log_sigmoid(h / tau) - h)


def _dpop(p: Pair, beta: float, knobs: Knobs) -> Number:
    penalty = mpf(knobs.get("dpop_lambda", 50.0)) * max(mpf(0), -p.r_w)
    return -log_sigmoid(mpf(beta) * (p.r_w - p.r_l - penalty))


def _odpo(p: Pair, beta: float, knobs: Knobs) -> Number:
    gap = mp.log(p.gap) if knobs.get("odpo_transform", "log") == "log" else mpf(p.gap)
    return -log_sigmoid(difference(p, beta, knobs) - mpf(knobs.get("odpo_alpha", 1.0)) * gap)


def _ipo(p: Pair, beta: float, knobs: Knobs) -> Number:
    plain = score(p.r_w, knobs) - score(p.r_l, knobs)
    delta = _per_token(p, knobs) if knobs.get("ipo_normalize", True) else plain
    return (delta - 1 / (2 * mpf(beta))) ** 2


def _sppo(p: Pair, beta: float, gap: Number) -> Number:
    # The probability that the chosen one wins, less one half, is half the gap.
    target = mpf(gap) / 2 / mpf(beta)
    return (p.r_w - target) ** 2 + (p.r_l + target) ** 2


def _bco(p: Pair, beta: float, knobs: Knobs) -> Number:
    delta = mpf(knobs.get("delta", 0.0))
    return -log_sigmoid(mpf(beta) * p.r_w - delta) - log_sigmoid(-(mpf(beta) * p.r_l - delta))


def _averages(p: Pair, knobs: Knobs) -> tuple[Number, Number]:
    alpha = knobs.get("alpha", 0.0)
    return power(mpf(p.w) / p.n_w, -alpha), power(mpf(p.l) / p.n_l, -alpha)


def _log_odds(average: Number, p: Pair) -> Number:
    capped = min(average, -mpf(p.rounding))
    return capped - mp.log(-mp.expm1(capped))


def _orpo(p: Pair, beta: float, knobs: Knobs) -> Number:
    a_w, a_l = mpf(p.w) / p.n_w, mpf(p.l) / p.n_l
    return sft(p, beta, knobs) - mpf(beta) * log_sigmoid(_log_odds(a_w, p) - _log_odds(a_l, p))


def _simpo(p: Pair, beta: float, knobs: Knobs) -> Number:
    a_w, a_l = _averages(p, knobs)
    preference = smoothed(mpf(beta) * (a_w - a_l) - mpf(knobs.get("simpo_gamma", 0.5)), knobs)
    return preference + mpf(knobs.get("cpo_alpha", 0.0)) * sft(p, beta, knobs)


def _cpo_delta(p: Pair, beta: float, knobs: Knobs) -> Number:
    alpha = knobs.get("alpha", 0.0)
    return mpf(beta) * (power(mpf(p.w), -alpha) - power(mpf(p.l), -alpha))


def _cpo(p: Pair, beta: float, knobs: Knobs) -> Number:
    return smoothed(_cpo_delta(p, beta, knobs), knobs) + mpf(knobs.get("cpo_alpha", 1.0)) * sft(p, beta, knobs)


def _cpo_hinge(p: Pair, beta: float, knobs: Knobs) -> Number:
    hinge = max(mpf(0), 1 - _cpo_delta(p, beta, knobs))
    return hinge + mpf(knobs.get("cpo_alpha", 1.0)) * sft(p, beta, knobs)


def _cpo_ipo(p: Pair, beta: float, knobs: Knobs) -> Number:
    a_w, a_l = _averages(p, knobs)
    return (a_w - a_l - 1 / (2 * mpf(beta))) ** 2 + mpf(knobs.get("cpo_alpha", 1.0)) * sft(p, beta, knobs)


#: Loss of one pair.
PAIRWISE: dict[str, Callable[[Pair, float, Knobs], Number]] = {
    "sigmoid": _dpo,
    "sigmoid_norm": lambda p, beta, knobs: smoothed(mpf(beta) * _per_token(p, knobs), knobs),
    "robust": _robust,
    "exo_pair": _exo,
    "nca_pair": _nca,
    "discopop": _discopop,
    "dpop": _dpop,
    "odpo": _odpo,
    "hinge": lambda p, beta, knobs: max(mpf(0), 1 - difference(p, beta, knobs)),
    "ipo": _ipo,
    "sppo_hard": lambda p, beta, knobs: _sppo(p, beta, 1),
    "sppo_soft": lambda p, beta, knobs: _sppo(p, beta, p.gap),
    "apo_zero": lambda p, beta, knobs: 1 - sigmoid(mpf(beta) * p.r_w) + sigmoid(mpf(beta) * p.r_l),
    "apo_down": lambda p, beta, knobs: sigmoid(mpf(beta) * p.r_w) + 1 - sigmoid(mpf(beta) * (p.r_w - p.r_l)),
    "bco_pair": _bco,
    "orpo": _orpo,
    "simpo": _simpo,
    "alphapo": lambda p, beta, knobs: _simpo(p, beta, {"alpha": 0.25, **knobs}),
    "cpo": _cpo,
    "cpo_hinge": _cpo_hinge,
    "cpo_ipo": _cpo_ipo,
    "sft": sft,
}


def _aot(pairs: Sequence[Pair], beta: float, knobs: Knobs) -> list[Number]:
    policy = sorted(mpf(p.w) - p.l for p in pairs)
    reference = sorted(mpf(p.ref_w) - p.ref_l for p in pairs)
    return [smoothed(mpf(beta) * (u - v), knobs) for u, v in zip(policy, reference, strict=True)]


def _aot_unpaired(pairs: Sequence[Pair], beta: float, knobs: Knobs) -> list[Number]:
    chosen, rejected = sorted(p.r_w for p in pairs), sorted(p.r_l for p in pairs)
    return [smoothed(mpf(beta) * (u - v), knobs) for u, v in zip(chosen, rejected, strict=True)]


#: Losses of a whole step.
JOINT: dict[str, Callable[[Sequence[Pair], float, Knobs], list[Number]]] = {
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
}


def single(name: str, r: Number, desirable: bool, beta: float, knobs: Knobs) -> Number:
    """Loss of one labelled completion with log-ratio ``r``."""
    base = mpf(knobs["kl"]) if name == "kto" else mpf(0)
    weight = mpf(knobs.get("desirable_weight" if desirable else "undesirable_weight", 1.0))
    gain = mpf(beta) * (r - base)
    return weight * (1 - sigmoid(gain if desirable else -gain))


#: Losses of labelled completions.
SINGLE = ("kto", "apo_zero_unpaired")
