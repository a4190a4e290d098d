"""What is optimised: pure losses on per-completion log-probs, one table of all methods, and their combination.

A loss is ``fn(batch, *, beta, **knobs) -> (pairs,)``: data positional, knobs keyword-only, nothing reduced, no state.
``METHODS`` holds one row per method; ``build_objective`` turns settings into something to call.
"""

from preftune.objectives.anchored import BCOState, apo_down, apo_zero, bco_pair
from preftune.objectives.batch import PairLogps, UnpairedLogps
from preftune.objectives.compose import MODIFIERS, NEUTRAL, Objective, ObjectiveResult, build_objective
from preftune.objectives.distributional import aot, aot_unpaired
from preftune.objectives.divergences import (
    DIVERGENCES,
    alpha_divergence,
    forward_kl,
    js_divergence,
    pair_scores,
    reverse_kl,
    score_difference,
)
from preftune.objectives.knobs import Knob
from preftune.objectives.logistic import (
    check_odpo_margins,
    discopop,
    dpop,
    exo_pair,
    nca_pair,
    odpo,
    robust,
    sigmoid,
    sigmoid_norm,
)
from preftune.objectives.lookup import bibtex, find_method
from preftune.objectives.margin import check_win_gaps, hinge, ipo, sppo_hard, sppo_soft
from preftune.objectives.modifiers import ld_token_weights, ld_weights, wpo_weight
from preftune.objectives.papers import PAPERS, Paper
from preftune.objectives.reference_free import alphapo, cpo, cpo_hinge, cpo_ipo, orpo, simpo
from preftune.objectives.spec import MethodSpec
from preftune.objectives.supervised import sft
from preftune.objectives.table import METHODS
from preftune.objectives.unpaired import (
    apo_zero_unpaired,
    check_kto_weights,
    kl_baseline,
    kl_baseline_from_sum,
    kto,
)

__all__ = [
    "DIVERGENCES",
    "METHODS",
    "MODIFIERS",
    "NEUTRAL",
    "PAPERS",
    "BCOState",
    "Knob",
    "MethodSpec",
    "Objective",
    "ObjectiveResult",
    "PairLogps",
    "Paper",
    "UnpairedLogps",
    "alpha_divergence",
    "alphapo",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "apo_zero_unpaired",
    "bco_pair",
    "bibtex",
    "build_objective",
    "check_kto_weights",
    "check_odpo_margins",
    "check_win_gaps",
    "cpo",
    "cpo_hinge",
    "cpo_ipo",
    "discopop",
    "dpop",
    "exo_pair",
    "find_method",
    "forward_kl",
    "hinge",
    "ipo",
    "js_divergence",
    "kl_baseline",
    "kl_baseline_from_sum",
    "kto",
    "ld_token_weights",
    "ld_weights",
    "nca_pair",
    "odpo",
    "orpo",
    "pair_scores",
    "reverse_kl",
    "robust",
    "score_difference",
    "sft",
    "sigmoid",
    "sigmoid_norm",
    "simpo",
    "sppo_hard",
    "sppo_soft",
    "wpo_weight",
]
