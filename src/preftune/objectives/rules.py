"""Which methods and modifiers go together, and why others do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftune.errors import ConfigError
from preftune.objectives.knobs import F_ALPHA_DIVERGENCE_COEF
from preftune.objectives.spec import MethodSpec
from preftune.objectives.table import METHODS


def check_combination(
    specs: tuple[MethodSpec, ...],
    settings: Mapping[str, Mapping[str, Any]],
    *,
    ld_alpha: float | None,
    use_weighting: bool,
) -> None:
    """Refuse combinations that make no sense.

    Args:
        specs: The methods that are to be added up.
        settings: Their knobs, already resolved.
        ld_alpha: LD-DPO's weight, ``None`` where it is off.
        use_weighting: Whether WPO is on.

    Raises:
        ConfigError: The combination is refused; the message says why.
    """
    _check_mixture(specs)
    _check_divergence(specs, settings)
    _check_inert(specs, settings)
    if ld_alpha is not None:
        _check_ld(specs, ld_alpha)
    if use_weighting:
        _check_wpo(specs)


def _check_mixture(specs: tuple[MethodSpec, ...]) -> None:
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(
            f"{twice} is named more than once", where="loss_type", value=names, remedy="add its weights instead"
        )
    if len(specs) == 1:
        return
    unpaired = [spec.name for spec in specs if not spec.paired]
    if unpaired:
        raise ConfigError(
            f"{unpaired[0]} learns from single labelled completions and cannot be added to another loss",
            where="loss_type",
            value=names,
            remedy=f"use {unpaired[0]} alone",
        )
    free = [spec.name for spec in specs if spec.family == "reference_free"]
    if free:
        remedy = "the SFT term is already in it" if free[0] == "orpo" else "its SFT term is set with cpo_alpha"
        raise ConfigError(
            f"{free[0]} takes the log-prob itself as its reward and cannot be added to another loss",
            where="loss_type",
            value=names,
            remedy=f"use {free[0]} alone" + (f"; {remedy}" if "sft" in names else ""),
        )
    if {"odpo", "sppo_soft"} <= set(names):
        raise ConfigError(
            "odpo reads the margin as a score gap and sppo_soft as a gap of win probabilities",
            where="loss_type",
            value=names,
            remedy="use one of them",
        )


def _check_divergence(specs: tuple[MethodSpec, ...], settings: Mapping[str, Mapping[str, Any]]) -> None:
    # Every method that takes the divergence gets the same one, so the first tells.
    taken = next((knobs for knobs in settings.values() if "f_divergence_type" in knobs), None)
    if taken is None:
        return
    divergence, coef = taken["f_divergence_type"], taken["f_alpha_divergence_coef"]
    if divergence != "reverse_kl":
        bad = [spec.name for spec in specs if not spec.supports_f_divergence]
        if bad:
            good = ", ".join(spec.name for spec in METHODS.values() if spec.supports_f_divergence)
            raise ConfigError(
                f"{bad[0]} is not a function of the chosen-rejected score difference, the only place where the "
                "unknown prompt term of an f-divergence cancels",
                where="f_divergence_type",
                value=divergence,
                allowed=f"reverse_kl, or any divergence with {good}",
            )
    if divergence != "alpha_divergence" and coef != F_ALPHA_DIVERGENCE_COEF.default:
        raise ConfigError(
            f"the order of the alpha-divergence has no effect with {divergence}",
            where="f_alpha_divergence_coef",
            value=coef,
            allowed=repr(F_ALPHA_DIVERGENCE_COEF.default),
            remedy="set f_divergence_type: alpha_divergence",
        )


# A setting that shapes a term, and the setting that switches the term off at 0.
_SHAPES = {"sft_average": "cpo_alpha", "odpo_transform": "odpo_alpha"}


def _check_inert(specs: tuple[MethodSpec, ...], settings: Mapping[str, Mapping[str, Any]]) -> None:
    for spec in specs:
        taken = settings[spec.name]
        for name, switch in _SHAPES.items():
            if name in taken and taken.get(switch) == 0.0 and taken[name] != spec.knobs[name].default:
                raise ConfigError(
                    f"the setting has no effect on {spec.name} while {switch} is 0",
                    where=name,
                    value=taken[name],
                    allowed=repr(spec.knobs[name].default),
                    remedy=f"set {switch} above 0",
                )


def _check_ld(specs: tuple[MethodSpec, ...], ld_alpha: float) -> None:
    reason = None
    if any(not spec.paired for spec in specs):
        reason = "LD-DPO needs the length of the other completion, which an unpaired example does not have"
    elif any(spec.family == "reference_free" for spec in specs):
        reason = "LD-DPO is defined for log-ratios against a reference, on both sides"
    elif all(spec.family == "sft" for spec in specs):
        reason = "the SFT term always counts every token in full, so the weight would have no effect"
    if reason:
        raise ConfigError(reason, where="ld_alpha", value=ld_alpha, allowed=f"unset, with {specs[0].name}")


def _check_wpo(specs: tuple[MethodSpec, ...]) -> None:
    for spec in specs:
        reason = None
        if spec.family == "distributional":
            reason = f"{spec.name} sorts across pairs, so a pair weight would meet the wrong pair"
        elif not spec.paired:
            reason = f"WPO weighs pairs, and {spec.name} has none"
        if reason:
            raise ConfigError(reason, where="use_weighting", value=True, allowed=f"false, with {spec.name}")
