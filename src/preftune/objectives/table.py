"""The table of methods: one row per loss, and everything else is generated from it."""

# Formulas are written as a reader would write them, and Greek letters look like Latin ones to the linter.
# ruff: noqa: RUF001

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from preftune.objectives import anchored, distributional, knobs, logistic, margin, reference_free, supervised, unpaired
from preftune.objectives.spec import MethodSpec, method_row

_SFT_TERM = (knobs.CPO_ALPHA, knobs.SFT_AVERAGE)

_LOGISTIC = (
    method_row(
        "sigmoid",
        "logistic",
        logistic.sigmoid,
        "−(1−ε) log σ(h) − ε log σ(−h)",
        "rafailov2023direct",
        "eq. 7",
        takes=(knobs.LABEL_SMOOTHING,),
        published={"beta": 0.1, "learning_rate": 1e-6, "batch_size": 64, "warmup_steps": 150},
        source="arXiv:2305.18290, appendix B (TL;DR: beta 0.5)",
        difference=True,
    ),
    method_row(
        "sigmoid_norm",
        "logistic",
        logistic.sigmoid_norm,
        "−log σ(β (r_w/|y_w| − r_l/|y_l|))",
        "lambert2024tulu",
        takes=(knobs.LABEL_SMOOTHING,),
        published={"beta": 5.0, "learning_rate": 5e-7, "batch_size": 128, "epochs": 1},
        source="arXiv:2411.15124, 8B (70B: learning_rate 2e-7)",
        needs_lengths=True,
        difference=True,
    ),
    method_row(
        "robust",
        "logistic",
        logistic.robust,
        "(−(1−ε) log σ(h) + ε log σ(−h)) / (1 − 2ε)",
        "chowdhury2024provably",
        takes=(knobs.LABEL_SMOOTHING,),
        published={"beta": 0.1, "label_smoothing": 0.1},
        source="arXiv:2403.00409",
        difference=True,
    ),
    method_row(
        "exo_pair",
        "logistic",
        logistic.exo_pair,
        "σ(h) log(σ(h)/(1−ε)) + σ(−h) log(σ(−h)/ε)",
        "ji2024towards",
        "eq. 16",
        takes=(knobs.EXO_LABEL_SMOOTHING,),
        published={"beta": 0.1, "learning_rate": 1e-6, "batch_size": 64, "label_smoothing": 1e-3},
        source="arXiv:2402.00856",
        difference=True,
    ),
    method_row(
        "nca_pair",
        "logistic",
        logistic.nca_pair,
        "−log σ(β r_w) − ½ log σ(−β r_w) − ½ log σ(−β r_l)",
        "chen2024noise",
        published={"beta": 0.01, "learning_rate": 5e-6, "batch_size": 32},
        source="arXiv:2402.05369",
    ),
    method_row(
        "discopop",
        "logistic",
        logistic.discopop,
        "−σ(−h/τ) log σ(h) + σ(h/τ) exp(−h)",
        "lu2024discovering",
        "eq. 5",
        takes=(knobs.DISCOPOP_TAU,),
        published={"beta": 0.05, "learning_rate": 5e-7, "batch_size": 64, "discopop_tau": 0.05},
        source="arXiv:2406.08414",
        difference=True,
    ),
    method_row(
        "dpop",
        "logistic",
        logistic.dpop,
        "−log σ(β (r_w − r_l − λ max(0, −r_w)))",
        "pal2024smaug",
        takes=(knobs.DPOP_LAMBDA,),
        published={"beta": 0.3, "dpop_lambda": 50.0},
        source="arXiv:2402.13228",
    ),
    method_row(
        "odpo",
        "logistic",
        logistic.odpo,
        "−log σ(h − α f(s_w − s_l)), f = log or identity, s the data's scores",
        "amini2024direct",
        takes=(knobs.ODPO_ALPHA, knobs.ODPO_TRANSFORM),
        published={"odpo_alpha": 1.0},
        source="arXiv:2402.10571",
        difference=True,
        check_margins=lambda margins, knobs: logistic.check_odpo_margins(margins, knobs["odpo_transform"]),
    ),
)

_MARGIN = (
    method_row(
        "hinge",
        "margin",
        margin.hinge,
        "max(0, 1 − h)",
        "liu2023statistical",
        published={"beta": 0.05},
        source="arXiv:2309.06657 (gamma)",
        difference=True,
    ),
    method_row(
        "ipo",
        "margin",
        margin.ipo,
        "(r_w/|y_w| − r_l/|y_l| − 1/(2β))²",
        "azar2023general",
        "eq. 17",
        takes=(knobs.IPO_NORMALIZE,),
        published={"beta": 0.01},
        source="arXiv:2310.12036 (tau)",
        needs_lengths=True,
        difference=True,
    ),
    method_row(
        "sppo_hard",
        "margin",
        margin.sppo_hard,
        "(r_w − 1/(2β))² + (r_l + 1/(2β))²",
        "wu2024selfplay",
        "eq. 4.7",
        published={"beta": 0.001, "learning_rate": 5e-7, "batch_size": 64},
        source="arXiv:2405.00675",
    ),
    method_row(
        "sppo_soft",
        "margin",
        margin.sppo_soft,
        "(r_w − (p−½)/β)² + (r_l + (p−½)/β)², p the probability that w wins",
        "wu2024selfplay",
        "eq. 4.7",
        published={"beta": 0.001, "learning_rate": 5e-7, "batch_size": 64},
        source="arXiv:2405.00675",
        check_margins=lambda margins, knobs: margin.check_win_gaps(margins),
    ),
)

_DISTRIBUTIONAL = (
    method_row(
        "aot",
        "distributional",
        distributional.aot,
        "logistic loss of β (u_(i) − v_(i)); u, v: margins log π(w)/π(l) of policy and reference, sorted",
        "melnyk2024distributional",
        takes=(knobs.LABEL_SMOOTHING,),
        published={"beta": 0.01},
        source="arXiv:2406.05882",
        separable=False,
    ),
    method_row(
        "aot_unpaired",
        "distributional",
        distributional.aot_unpaired,
        "logistic loss of β (r_w(i) − r_l(i)); both sorted",
        "melnyk2024distributional",
        takes=(knobs.LABEL_SMOOTHING,),
        published={"beta": 0.01},
        source="arXiv:2406.05882",
        separable=False,
    ),
)

_ANCHORED = (
    method_row(
        "apo_zero",
        "anchored",
        anchored.apo_zero,
        "(1 − σ(β r_w)) + σ(β r_l)",
        "doosterlinck2024anchored",
        "eq. 7",
        published={"beta": 0.1, "learning_rate": 2e-7, "batch_size": 64},
        source="arXiv:2408.06266 (SmolLM3: beta 0.05, learning_rate 1e-6, batch 32)",
    ),
    method_row(
        "apo_down",
        "anchored",
        anchored.apo_down,
        "σ(β r_w) + (1 − σ(h))",
        "doosterlinck2024anchored",
        "eq. 8",
        published={"beta": 0.1, "learning_rate": 2e-7, "batch_size": 64},
        source="arXiv:2408.06266",
    ),
    method_row(
        "bco_pair",
        "anchored",
        anchored.bco_pair,
        "−log σ(β r_w − δ) − log σ(−(β r_l − δ)), δ = 0 or the running mean of the rewards",
        "jung2024binary",
        takes=(knobs.BCO_RUNNING_DELTA,),
        published={"beta": 0.01, "learning_rate": 5e-7, "batch_size": 128},
        source="arXiv:2404.04656",
    ),
)

_REFERENCE_FREE = (
    method_row(
        "orpo",
        "reference_free",
        reference_free.orpo,
        "NLL(y_w) − β log σ(log odds(y_w) − log odds(y_l)), odds of p = exp(log π/|y|)",
        "hong2024orpo",
        "eqs. 4, 6 and 7",
        takes=(knobs.SFT_AVERAGE,),
        published={"beta": 0.1},
        source="arXiv:2403.07691, Mistral (Llama-2: 0.2, Phi-2: 0.25); Zephyr-141B: 0.05, learning_rate 5e-6",
        needs_reference=False,
        needs_lengths=True,
        scores=reference_free.average_scores,
    ),
    method_row(
        "simpo",
        "reference_free",
        reference_free.simpo,
        "−log σ(β (log π(y_w)/|y_w| − log π(y_l)/|y_l|) − γ)",
        "meng2024simpo",
        "eq. 6",
        takes=(
            knobs.SIMPO_GAMMA,
            knobs.CPO_ALPHA.with_default(0.0),
            knobs.ALPHA,
            knobs.LABEL_SMOOTHING,
            knobs.SFT_AVERAGE,
        ),
        published={"beta": 2.0, "simpo_gamma": 1.0, "learning_rate": 5e-7, "batch_size": 128},
        source="arXiv:2405.14734: beta 2 to 2.5 (or 10), gamma/beta 0.5, learning_rate 3e-7 to 1e-6",
        needs_reference=False,
        needs_lengths=True,
        scores=reference_free.average_scores,
    ),
    method_row(
        "alphapo",
        "reference_free",
        reference_free.alphapo,
        "−log σ(β (g(y_w) − g(y_l)) − γ), g = (1 − p^−α)/α, p = exp(log π/|y|)",
        "gupta2025alphapo",
        takes=(knobs.SIMPO_GAMMA, knobs.ALPHA.with_default(0.25), knobs.LABEL_SMOOTHING),
        needs_reference=False,
        needs_lengths=True,
        scores=reference_free.average_scores,
    ),
    method_row(
        "cpo",
        "reference_free",
        reference_free.cpo,
        "−log σ(β (log π(y_w) − log π(y_l))) + α NLL(y_w)",
        "xu2024contrastive",
        "eq. 3",
        takes=(*_SFT_TERM, knobs.ALPHA, knobs.LABEL_SMOOTHING),
        published={"beta": 0.1, "learning_rate": 1e-4, "cpo_alpha": 1.0},
        source="arXiv:2401.08417",
        needs_reference=False,
        needs_lengths=True,
        scores=reference_free.sum_scores,
    ),
    method_row(
        "cpo_hinge",
        "reference_free",
        reference_free.cpo_hinge,
        "max(0, 1 − β (log π(y_w) − log π(y_l))) + α NLL(y_w)",
        "zhao2023slic",
        takes=(*_SFT_TERM, knobs.ALPHA),
        needs_reference=False,
        needs_lengths=True,
        scores=reference_free.sum_scores,
    ),
    method_row(
        "cpo_ipo",
        "reference_free",
        reference_free.cpo_ipo,
        "(log π(y_w)/|y_w| − log π(y_l)/|y_l| − 1/(2β))² + α NLL(y_w)",
        "azar2023general",
        "eq. 17, without a reference",
        takes=(*_SFT_TERM, knobs.ALPHA),
        needs_reference=False,
        needs_lengths=True,
        scores=reference_free.average_scores,
    ),
)

_SFT = (
    method_row(
        "sft",
        "sft",
        supervised.sft,
        "NLL(y_w) = −log π(y_w) per token",
        "pang2024iterative",
        takes=(knobs.SFT_AVERAGE,),
        published={"loss_weight": 1.0},
        source="arXiv:2411.10442 (MPO: 0.8 sigmoid + 0.2 bco_pair + 1.0 sft); arXiv:2407.21783 (Llama 3: + 0.2)",
        needs_reference=False,
        needs_lengths=True,
    ),
)

_UNPAIRED = (
    method_row(
        "kto",
        "unpaired",
        unpaired.kto,
        "λ_D (1 − σ(β (r − z))) if desirable, else λ_U (1 − σ(β (z − r))); z = max(0, KL estimate)",
        "ethayarajh2024kto",
        "eq. 7",
        takes=(knobs.DESIRABLE_WEIGHT, knobs.UNDESIRABLE_WEIGHT),
        published={"beta": 0.1, "learning_rate": 5e-7},
        source="arXiv:2402.01306: learning_rate 5e-7 to 5e-6",
        separable=False,
        paired=False,
    ),
    method_row(
        "apo_zero_unpaired",
        "unpaired",
        unpaired.apo_zero_unpaired,
        "λ_D (1 − σ(β r)) if desirable, else λ_U σ(β r)",
        "doosterlinck2024anchored",
        "eq. 7",
        takes=(knobs.DESIRABLE_WEIGHT, knobs.UNDESIRABLE_WEIGHT),
        published={"beta": 0.1, "learning_rate": 2e-7, "batch_size": 64},
        source="arXiv:2408.06266",
        paired=False,
    ),
)

METHODS: Mapping[str, MethodSpec] = MappingProxyType(
    {
        spec.name: spec
        for family in (_LOGISTIC, _MARGIN, _DISTRIBUTIONAL, _ANCHORED, _REFERENCE_FREE, _SFT, _UNPAIRED)
        for spec in family
    }
)
