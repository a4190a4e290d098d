"""Settings in, objective out; and every combination that makes no sense is refused with its reason."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.objectives.cases import COMPANIONS, VARIANTS, call, labelled, pairs

from preftune.errors import ConfigError, DataError
from preftune.objectives import METHODS, MODIFIERS, NEUTRAL, PairLogps, build_objective

PAIRED = [name for name, spec in METHODS.items() if spec.paired]


def refused(match: str, *args: Any, **kwargs: Any) -> ConfigError:
    with pytest.raises(ConfigError, match=match) as caught:
        build_objective(*args, **{"beta": 0.1, **kwargs})
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_mixture_is_the_weighted_sum_of_its_parts() -> None:
    batch, weights = pairs(5), [0.8, 0.2, 1.0]
    mixture = build_objective(["sigmoid", "bco_pair", "sft"], loss_weights=weights, beta=0.1)
    result = mixture(batch)
    expected = torch.zeros(5, dtype=torch.float64)
    for name, weight in zip(mixture.names, weights, strict=True):
        alone = build_objective(name, beta=0.1)(batch).loss
        assert torch.equal(result.parts[name], alone)
        expected = expected + weight * alone
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)


def test_parts_carry_no_gradient_and_the_loss_does() -> None:
    batch = pairs(3)
    batch = replace(batch, chosen_logps=batch.chosen_logps.requires_grad_())
    result = build_objective(["sigmoid", "sft"], beta=0.1)(batch)
    assert result.loss.requires_grad
    assert not any(part.requires_grad for part in result.parts.values())


@pytest.mark.parametrize("name", [name for name in PAIRED if METHODS[name].family != "distributional"])
def test_pair_weights_multiply(name: str) -> None:
    batch, weights = pairs(4), torch.tensor([0.0, 0.5, 1.0, 3.0])
    plain = build_objective(name, beta=0.1)
    assert "weights" in plain.uses
    assert "weights" not in plain.requires
    result = plain(replace(batch, weights=weights))
    torch.testing.assert_close(result.loss, plain(batch).loss * weights, rtol=1e-12, atol=0)
    assert torch.equal(result.parts[name], result.loss)
    wpo = build_objective(name, beta=0.1, use_weighting=True)
    assert "wpo_weights" in wpo.requires & wpo.uses
    both = wpo(replace(batch, weights=weights, wpo_weights=weights + 1.0)).loss
    torch.testing.assert_close(both, plain(batch).loss * weights * (weights + 1.0), rtol=1e-12, atol=0)


def test_weights_of_unpaired_examples_multiply() -> None:
    batch, weights = labelled(3), torch.tensor([0.0, 0.5, 2.0])
    objective = build_objective("kto", beta=0.1)
    weighted = objective(replace(batch, weights=weights), kl=0.1).loss
    torch.testing.assert_close(weighted, objective(batch, kl=0.1).loss * weights, rtol=1e-12, atol=0)


def test_columns_that_would_have_no_effect_are_refused() -> None:
    weights = torch.ones(4)
    with pytest.raises(ConfigError, match="sorts across pairs"):
        build_objective("aot", beta=0.1)(pairs(4, weights=weights))
    with pytest.raises(ConfigError, match="use_weighting"):
        build_objective("sigmoid", beta=0.1)(pairs(4, wpo_weights=weights))
    with pytest.raises(DataError, match="wpo_weights"):
        build_objective("sigmoid", beta=0.1, use_weighting=True)(pairs(4))


def test_wpo_weights_never_carry_a_gradient() -> None:
    weights = torch.ones(4, requires_grad=True)
    batch = pairs(4, wpo_weights=weights)
    assert not build_objective("sigmoid", beta=0.1, use_weighting=True)(batch).loss.requires_grad


def test_step_wide_numbers_must_be_given_exactly_when_used() -> None:
    for name, batch in (("sigmoid", pairs(2)), ("bco_pair", pairs(2)), ("apo_zero_unpaired", labelled(2))):
        objective = build_objective(name, beta=0.1)
        for unused in ({"kl": 0.1}, {"bco_delta": 0.1}):
            with pytest.raises(ConfigError, match="no method takes it"):
                objective(batch, **unused)
    with pytest.raises(ConfigError, match="kl must be given"):
        build_objective("kto", beta=0.1)(labelled(2))
    running = build_objective("bco_pair", beta=0.1, bco_running_delta=True)
    assert running.uses_running_delta
    with pytest.raises(ConfigError, match="bco_delta must be given"):
        running(pairs(2))
    with pytest.raises(ConfigError, match="one number"):
        running(pairs(2), bco_delta=torch.zeros(2))


def test_batch_kind_is_checked() -> None:
    with pytest.raises(DataError, match="PairLogps"):
        build_objective("sigmoid", beta=0.1)(labelled(2))
    with pytest.raises(DataError, match="UnpairedLogps"):
        build_objective("kto", beta=0.1)(pairs(2), kl=0.0)


def test_unknown_names_get_a_hint() -> None:
    assert "did you mean sigmoid_norm?" in str(refused("unknown loss", "sigmoid_nrm"))
    assert "did you mean apo_zero?" in str(refused("unknown loss", "apo-zero"))
    assert "did you mean sigmoid with label_smoothing?" in str(refused("unknown loss", "cDPO"))
    assert "did you mean" not in str(refused("unknown loss", "zzzzzz"))
    assert "did you mean label_smoothing?" in str(refused("unknown loss setting", "sigmoid", label_smothing=0.1))
    refused("no loss is named", [])
    refused("unknown loss", [None])


def test_loss_weights_are_checked() -> None:
    refused("1 weights for 2 losses", ["sigmoid", "sft"], loss_weights=[1.0])
    refused("loss_weights", ["sigmoid", "sft"], loss_weights=[1.0, -0.1])
    refused("loss_weights", ["sigmoid", "sft"], loss_weights=[1.0, float("nan")])
    refused("all weights are 0", ["sigmoid", "sft"], loss_weights=[0.0, 0.0])
    assert build_objective(["sigmoid", "sft"], loss_weights=[1.0, 0], beta=0.1).weights == (1.0, 0.0)


@pytest.mark.parametrize("name", list(METHODS))
def test_every_knob_works_or_is_refused(name: str) -> None:
    """The whole grid: no method accepts a setting and does nothing with it."""
    batch = pairs(6) if METHODS[name].paired else labelled(6)
    for knob in (knob for knob, variants in VARIANTS.items() if variants):
        value = next(value for value in VARIANTS[knob] if value != NEUTRAL[knob])
        base: dict[str, Any] = {"label_smoothing": 1e-3} if name == "exo_pair" else {}
        if knob in METHODS[name].knobs:
            if METHODS[name].knobs[knob].default == value:
                value = VARIANTS[knob][-1]
            base |= COMPANIONS.get((name, knob), {})
            changed = call(build_objective(name, beta=0.1, **{**base, knob: value}), batch)
            assert not torch.equal(changed, call(build_objective(name, beta=0.1, **base), batch)), knob
        else:
            refused("does not take this setting", name, **{knob: value})
            # ... while its neutral value, which a configuration always carries, passes.
            neutral = build_objective(name, beta=0.1, **{knob: NEUTRAL[knob]})
            assert torch.equal(call(neutral, batch), call(build_objective(name, beta=0.1), batch)), knob


@pytest.mark.parametrize(
    ("name", "knob", "value"),
    [
        ("sigmoid", "label_smoothing", 0.5),
        ("sigmoid", "label_smoothing", -0.1),
        ("sigmoid", "label_smoothing", "0.1"),
        ("sigmoid", "label_smoothing", float("nan")),
        ("sigmoid", "label_smoothing", True),
        ("robust", "label_smoothing", 0.5),
        ("robust", "label_smoothing", 0.7),
        ("exo_pair", "label_smoothing", 0.0),
        ("exo_pair", "label_smoothing", 0.5),
        ("sigmoid", "f_divergence_type", "kl"),
        ("sigmoid", "f_alpha_divergence_coef", float("inf")),
        ("discopop", "discopop_tau", 0.0),
        ("dpop", "dpop_lambda", -1.0),
        ("odpo", "odpo_alpha", -1.0),
        ("odpo", "odpo_transform", "sqrt"),
        ("ipo", "ipo_normalize", 1),
        ("bco_pair", "bco_running_delta", "yes"),
        ("sft", "sft_average", "tokens"),
        ("simpo", "simpo_gamma", -0.1),
        ("cpo", "cpo_alpha", -1.0),
        ("kto", "desirable_weight", -1.0),
        ("sigmoid", "ld_alpha", 1.1),
        ("sigmoid", "ld_alpha", -0.1),
        ("sigmoid", "use_weighting", 1),
    ],
)
def test_values_out_of_range_are_refused(name: str, knob: str, value: Any) -> None:
    error = refused(knob, name, **{knob: value})
    assert error.where == knob
    assert error.allowed


def test_pure_functions_check_their_knobs_too() -> None:
    batch = pairs(2)
    for name, knob, value in (
        ("robust", "label_smoothing", 0.5),
        ("exo_pair", "label_smoothing", 0.0),
        ("sigmoid", "f_divergence_type", "kl"),
        ("discopop", "discopop_tau", -1.0),
        ("sigmoid", "beta", 0.0),
    ):
        with pytest.raises(ConfigError, match=knob):
            METHODS[name].function(batch, **{"beta": 0.1, knob: value})


def test_exo_without_smoothing_names_the_remedy() -> None:
    assert "0.001" in str(refused("label_smoothing", "exo_pair", label_smoothing=0.0))


def test_mixtures_that_make_no_sense() -> None:
    refused("named more than once", ["sigmoid", "sft", "sigmoid"])
    refused("single labelled completions", ["sigmoid", "kto"])
    refused("single labelled completions", ["kto", "apo_zero_unpaired"])
    assert "cpo_alpha" in str(refused("log-prob itself", ["simpo", "sft"]))
    assert "already in it" in str(refused("log-prob itself", ["orpo", "sft"]))
    refused("log-prob itself", ["sigmoid", "cpo"])
    refused("win probabilities", ["odpo", "sppo_soft"])


@pytest.mark.parametrize("name", [name for name in PAIRED if not METHODS[name].supports_f_divergence])
def test_divergences_only_for_score_differences(name: str) -> None:
    refused("does not take this setting", name, f_divergence_type="forward_kl")
    if METHODS[name].family != "reference_free":
        refused("score difference", ["sigmoid", name], f_divergence_type="forward_kl")


def test_divergence_with_the_sft_term() -> None:
    assert build_objective(["sft", "sigmoid"], beta=0.1, f_divergence_type="forward_kl").knobs["sigmoid"]
    refused("does not take this setting", "sft", f_divergence_type="forward_kl")


def test_the_order_of_another_divergence_is_refused() -> None:
    refused("no effect with reverse_kl", "sigmoid", f_alpha_divergence_coef=0.3)
    refused("no effect with forward_kl", "sigmoid", f_divergence_type="forward_kl", f_alpha_divergence_coef=0.3)
    build_objective("sigmoid", beta=0.1, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3)


def test_settings_of_a_term_that_is_off_are_refused() -> None:
    refused("no effect on simpo while cpo_alpha is 0", "simpo", sft_average="pair_tokens")
    refused("no effect on cpo while cpo_alpha is 0", "cpo", cpo_alpha=0.0, sft_average="pair_tokens")
    refused("no effect on odpo while odpo_alpha is 0", "odpo", odpo_alpha=0.0, odpo_transform="identity")
    build_objective(["odpo", "sft"], beta=0.1, odpo_alpha=0.0, sft_average="pair_tokens")


def test_ld_combinations() -> None:
    assert build_objective("sigmoid", beta=0.1, ld_alpha=0.5).ld_alpha == 0.5
    assert build_objective(["sigmoid", "sft"], beta=0.1, ld_alpha=0).ld_alpha == 0.0
    # 1 is no down-weighting, for any method, and None is TRL's default.
    assert build_objective("kto", beta=0.1, ld_alpha=1.0).ld_alpha is None
    assert build_objective("kto", beta=0.1, ld_alpha=None).ld_alpha is None
    refused("length of the other completion", "kto", ld_alpha=0.5)
    refused("against a reference", "simpo", ld_alpha=0.5)
    refused("no effect", "sft", ld_alpha=0.5)


def test_wpo_combinations() -> None:
    for name in ("aot", "aot_unpaired"):
        refused("sorts across pairs", name, use_weighting=True)
    refused("sorts across pairs", ["sigmoid", "aot"], use_weighting=True)
    refused("has none", "kto", use_weighting=True)
    assert build_objective("kto", beta=0.1, use_weighting=False).uses_kl


def test_what_the_engine_asks_for() -> None:
    mixture = build_objective(["sigmoid", "aot", "sft"], beta=0.1)
    assert mixture.needs_reference
    assert not mixture.separable
    assert mixture.uses == frozenset()
    odpo = build_objective("odpo", beta=0.1, use_weighting=True)
    assert odpo.requires == {"margins", "wpo_weights"}
    assert odpo.uses == {"margins", "wpo_weights", "weights"}
    assert not build_objective(["sft"], beta=0.1).needs_reference
    assert not build_objective("orpo", beta=0.1).needs_reference
    assert not build_objective("kto", beta=0.1).separable
    assert not build_objective("kto", beta=0.1).paired
    # Within a step the running delta is a constant, so the loss stays a sum over pairs.
    assert build_objective("bco_pair", beta=0.1, bco_running_delta=True).separable


def test_rewards() -> None:
    batch = pairs(3)
    ratio = build_objective(["sigmoid_norm", "sft"], beta=0.2).rewards(batch)
    torch.testing.assert_close(ratio[0], 0.2 * batch.chosen_logratios)
    torch.testing.assert_close(ratio[1], 0.2 * batch.rejected_logratios)
    average = build_objective("simpo", beta=2.0).rewards(batch)
    torch.testing.assert_close(average[0], 2.0 * batch.chosen_logps / batch.chosen_lengths)
    free = replace(batch, ref_chosen_logps=None, ref_rejected_logps=None)
    alone = build_objective("sft", beta=0.2)
    torch.testing.assert_close(alone.rewards(free)[1], 0.2 * batch.rejected_logps)
    torch.testing.assert_close(alone.rewards(batch)[1], 0.2 * batch.rejected_logratios)
    grown = replace(batch, chosen_logps=batch.chosen_logps.requires_grad_())
    assert not any(side.requires_grad for side in ratio + build_objective("cpo", beta=0.2).rewards(grown))


def test_an_objective_survives_pickle_and_deepcopy() -> None:
    """Sweep workers and trainers copy their configuration."""
    objective = build_objective(["sigmoid", "sft"], beta=0.1, ld_alpha=0.5)
    batch = pairs(3)
    for twin in (pickle.loads(pickle.dumps(objective)), copy.deepcopy(objective)):
        assert twin == objective
        assert torch.equal(twin(batch).loss, objective(batch).loss)


def test_modifiers_and_knobs_do_not_overlap() -> None:
    assert not set(MODIFIERS) & set(NEUTRAL)


def test_zero_weight_pairs_leave_no_gradient() -> None:
    """Rows that only fill up a rank carry weight 0; even extreme ones must not spread NaN."""
    logps = torch.tensor([-5.0, -2e4]).requires_grad_()
    batch = PairLogps(
        chosen_logps=logps,
        rejected_logps=torch.tensor([-6.0, 0.0]),
        ref_chosen_logps=torch.tensor([-5.0, 0.0]),
        ref_rejected_logps=torch.tensor([-6.0, -2e4]),
        chosen_lengths=torch.ones(2),
        rejected_lengths=torch.ones(2),
        weights=torch.tensor([1.0, 0.0]),
    )
    for name in ("sigmoid", "ipo", "discopop", "simpo"):
        (gradient,) = torch.autograd.grad(build_objective(name, beta=0.1)(batch).loss.sum(), [logps])
        assert gradient[0] != 0
        assert gradient[1] == 0
