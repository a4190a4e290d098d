"""From settings to one objective: knobs resolved, combinations checked, losses weighted and added."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from preftune.errors import ConfigError, DataError
from preftune.objectives import knobs as known
from preftune.objectives.batch import PairLogps, UnpairedLogps
from preftune.objectives.knobs import Knob
from preftune.objectives.lookup import find_method
from preftune.objectives.rules import check_combination
from preftune.objectives.spec import MethodSpec
from preftune.objectives.table import METHODS

# The knobs that act on log-probs or pairs rather than inside a loss.
MODIFIERS: Mapping[str, Knob] = MappingProxyType({knob.name: knob for knob in (known.LD_ALPHA, known.USE_WEIGHTING)})

# Each loss knob of the table with the value that changes nothing where no method takes it.
NEUTRAL: Mapping[str, Any] = MappingProxyType(
    {knob.name: knob.neutral for spec in METHODS.values() for knob in spec.knobs.values()}
)


@dataclass(frozen=True)
class ObjectiveResult:
    """Losses of a batch.

    Attributes:
        loss: Weighted sum over the methods, ``(pairs,)``, with gradient, pair weights included. Nothing is reduced.
        parts: Each method's own loss by name, ``(pairs,)``, detached, before its ``loss_weights`` factor but with pair
            weights: ``loss`` = sum of weight times part.
    """

    loss: Tensor
    parts: Mapping[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """One or several methods with all their settings; call it with a batch.

    Build it with ``build_objective``. It holds no state.

    Attributes:
        names: ``loss_type`` names, in the user's order.
        weights: Factor of each.
        beta: Shared by all of them.
        knobs: Per method, the keyword arguments beside ``beta``.
        ld_alpha: LD-DPO's token weight, or ``None``; the log-probs of the batch must already contain it.
        use_weighting: Whether WPO's pair weights apply.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    beta: float
    knobs: Mapping[str, Mapping[str, Any]]
    ld_alpha: float | None = None
    use_weighting: bool = False

    @property
    def specs(self) -> tuple[MethodSpec, ...]:
        """Table rows of the methods."""
        return tuple(METHODS[name] for name in self.names)

    @property
    def needs_reference(self) -> bool:
        """Whether any method compares with a reference model."""
        return any(spec.needs_reference for spec in self.specs)

    @property
    def takes_reference(self) -> bool:
        """Whether a reference is looked at; as in TRL, the plain SFT term alone reports rewards against one."""
        return self.needs_reference or self.names == ("sft",)

    @property
    def separable(self) -> bool:
        """Whether the loss of an optimizer step is the sum over its pairs, however they are split into batches."""
        return all(spec.separable for spec in self.specs)

    @property
    def paired(self) -> bool:
        """Whether it takes ``PairLogps`` (else ``UnpairedLogps``)."""
        return all(spec.paired for spec in self.specs)

    @property
    def uses_running_delta(self) -> bool:
        """Whether ``bco_delta`` must be given at every call."""
        return any(settings.get("bco_running_delta", False) for settings in self.knobs.values())

    @property
    def uses_kl(self) -> bool:
        """Whether ``kl`` must be given at every call."""
        return any(spec.needs_kl for spec in self.specs)

    @property
    def averages_tokens(self) -> bool:
        """Whether ``mean_chosen_scored`` enters the loss."""
        return any(
            settings.get("sft_average") == "batch_tokens" and settings.get("cpo_alpha", 1.0) != 0.0
            for settings in self.knobs.values()
        )

    @property
    def requires(self) -> frozenset[str]:
        """Optional fields of the batch that must be present."""
        columns = frozenset[str]().union(*(spec.requires for spec in self.specs))
        return columns | {"wpo_weights"} if self.use_weighting else columns

    @property
    def uses(self) -> frozenset[str]:
        """Optional fields of the batch that enter the loss: the required ones, and ``weights`` unless it sorts."""
        sorts = any(spec.family == "distributional" for spec in self.specs)
        return self.requires if sorts else self.requires | {"weights"}

    def __call__(
        self,
        batch: PairLogps | UnpairedLogps,
        *,
        bco_delta: float | Tensor | None = None,
        kl: float | Tensor | None = None,
    ) -> ObjectiveResult:
        """Compute the losses of a batch.

        Args:
            batch: ``PairLogps``, or ``UnpairedLogps`` for an unpaired method.
            bco_delta: ``BCOState.delta``, exactly when ``uses_running_delta``.
            kl: KL baseline of the whole step, exactly when ``uses_kl``.

        Returns:
            Unreduced losses.

        Raises:
            ConfigError: A step-wide number is missing, or given and unused.
            DataError: The batch is of the wrong kind or lacks a column.
        """
        self._check_batch(batch)
        step_wide = {"bco_delta": (bco_delta, self.uses_running_delta), "kl": (kl, self.uses_kl)}
        for name, (value, wanted) in step_wide.items():
            if (value is not None) != wanted:
                problem = "must be given at every call" if wanted else "was given, but no method takes it"
                raise ConfigError(f"{name} {problem}", where="Objective", value=value)
        factor = self._pair_factor(batch)
        parts: dict[str, Tensor] = {}
        total: Tensor | None = None
        for name, weight, spec in zip(self.names, self.weights, self.specs, strict=True):
            settings = {key: value for key, value in self.knobs[name].items() if spec.knobs[key].in_function}
            if spec.needs_kl:
                settings["kl"] = kl
            if self.knobs[name].get("bco_running_delta"):
                settings["delta"] = bco_delta
            part = spec.function(batch, beta=self.beta, **settings)
            part = part if factor is None else part * factor
            parts[name] = part.detach()
            total = weight * part if total is None else total + weight * part
        assert total is not None  # at least one name is checked on construction
        return ObjectiveResult(loss=total, parts=parts)

    def check_margins(self, margins: Tensor) -> None:
        """Check the score gaps of a whole data set once, before training.

        Args:
            margins: Score gaps of all pairs, ``(rows,)``.

        Raises:
            DataError: A method cannot use one of them; the message names the row.
        """
        for spec in self.specs:
            if spec.check_margins is not None:
                spec.check_margins(margins, self.knobs[spec.name])

    def rewards(self, batch: PairLogps | UnpairedLogps) -> tuple[Tensor, Tensor]:
        """Implicit rewards as TRL logs them, without gradient.

        With a reference: beta times the log-ratio, whatever the loss and its divergence. Reference-free: beta times
        the log-prob that the method compares (averaged for orpo, simpo, alphapo and cpo_ipo, summed for cpo and
        cpo_hinge, reshaped where ``alpha`` is set). For ``sft`` alone without a reference: beta times the log-prob.

        Args:
            batch: What the objective is called with.

        Returns:
            Chosen and rejected rewards, ``(pairs,)`` each; for an unpaired batch those of the desirable and of the
            undesirable examples, which may differ in number.
        """
        with torch.no_grad():
            if isinstance(batch, UnpairedLogps):
                rewards = self.beta * batch.logratios
                return rewards[batch.labels], rewards[~batch.labels]
            scores = self.specs[0].scores
            if scores is not None:
                alpha = self.knobs[self.names[0]].get("alpha", 0.0)
                chosen, rejected = scores(batch, alpha)
            elif self.needs_reference or batch.has_reference:
                chosen, rejected = batch.chosen_logratios, batch.rejected_logratios
            else:
                chosen, rejected = batch.chosen_logps, batch.rejected_logps
            return (self.beta * chosen).detach(), (self.beta * rejected).detach()

    def _check_batch(self, batch: PairLogps | UnpairedLogps) -> None:
        wanted = PairLogps if self.paired else UnpairedLogps
        if not isinstance(batch, wanted):
            raise DataError(
                f"{'+'.join(self.names)} takes {wanted.__name__}", where="Objective", value=type(batch).__name__
            )
        missing = sorted(name for name in self.requires if getattr(batch, name, None) is None)
        if missing:
            raise DataError(
                f"{'+'.join(self.names)} needs this column",
                where=f"PairLogps.{missing[0]}",
                remedy="score gaps come from a `margin` column of the data" if missing[0] == "margins" else None,
            )
        # A weight that is there and would not be applied is a mistake of the caller or a setting that does nothing.
        unused = {"weights", "wpo_weights"} - self.uses
        for name in sorted(unused):
            if getattr(batch, name, None) is not None:
                reason = "sorts across pairs, so a pair weight has no pair" if name == "weights" else "has no weighting"
                raise ConfigError(
                    f"the batch has {name}, but {'+'.join(self.names)} {reason}",
                    where=f"{type(batch).__name__}.{name}",
                    remedy="drop the column or take another loss" if name == "weights" else "set use_weighting: true",
                )

    def _pair_factor(self, batch: PairLogps | UnpairedLogps) -> Tensor | None:
        wpo = batch.wpo_weights if isinstance(batch, PairLogps) else None
        if batch.weights is None or wpo is None:
            return batch.weights if wpo is None else wpo
        return batch.weights * wpo


def build_objective(
    loss_type: str | Sequence[str],
    *,
    loss_weights: Sequence[float] | None = None,
    beta: float,
    **knobs: Any,
) -> Objective:
    """Turn settings into an objective, or say what is wrong with them.

    Every knob is used by one of the methods, at its neutral default, or refused. ``None`` means not set.

    Args:
        loss_type: One name of ``METHODS`` or several.
        loss_weights: One factor >= 0 per name; 1 each by default.
        beta: Shared by all of them, > 0.
        **knobs: Loss settings by their TRL names (``label_smoothing``, ``f_divergence_type``,
            ``f_alpha_divergence_coef``, ``discopop_tau``, ``ld_alpha``, ``use_weighting``, ``cpo_alpha``,
            ``simpo_gamma``, ``alpha``, ``desirable_weight``, ``undesirable_weight``) and our own (``dpop_lambda``,
            ``odpo_alpha``, ``odpo_transform``, ``ipo_normalize``, ``bco_running_delta``, ``sft_average``).

    Returns:
        The objective.

    Raises:
        ConfigError: A name is unknown, a value is out of range, a knob has no effect, or a combination makes no sense.

    Example:
        >>> objective = build_objective(["sigmoid", "sft"], loss_weights=[1.0, 0.2], beta=0.1, label_smoothing=0.1)
        >>> objective.names, objective.needs_reference, dict(objective.knobs["sft"])
        (('sigmoid', 'sft'), True, {'sft_average': 'batch_tokens'})
        >>> build_objective("nca_pair", beta=0.1, discopop_tau=0.1)
        Traceback (most recent call last):
        ...
        preftune.errors.ConfigError: discopop_tau: nca_pair does not take this setting; got 0.1; allowed: 0.05; it \
works with discopop
    """
    names = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type or ())
    if not names:
        raise ConfigError("no loss is named", where="loss_type", value=loss_type, allowed=", ".join(METHODS))
    specs = tuple(find_method(name) for name in names)
    weights = _checked_weights(names, loss_weights)
    given = {name: value for name, value in knobs.items() if value is not None}
    modifiers = {name: MODIFIERS[name].check(given.pop(name)) for name in MODIFIERS if name in given}
    settings = _resolve(specs, given)
    # A weight of 1 for the tail leaves every token as it is.
    ld_alpha = None if modifiers.get("ld_alpha") == 1.0 else modifiers.get("ld_alpha")
    use_weighting = bool(modifiers.get("use_weighting", False))
    check_combination(specs, settings, ld_alpha=ld_alpha, use_weighting=use_weighting)
    return Objective(
        names=names,
        weights=weights,
        beta=known.BETA.number(beta),
        knobs=settings,
        ld_alpha=ld_alpha,
        use_weighting=use_weighting,
    )


def _checked_weights(names: tuple[str, ...], loss_weights: Sequence[float] | None) -> tuple[float, ...]:
    if loss_weights is None:
        return (1.0,) * len(names)
    if not isinstance(loss_weights, list | tuple):
        raise ConfigError(
            "not a list of numbers",
            where="loss_weights",
            value=loss_weights,
            allowed="one number per entry of loss_type",
        )
    weights = tuple(Knob("loss_weights", 1.0, "", low=0.0).check(weight) for weight in loss_weights)
    if len(weights) != len(names):
        raise ConfigError(
            f"{len(weights)} weights for {len(names)} losses ({', '.join(names)})",
            where="loss_weights",
            value=list(weights),
            allowed="one number per entry of loss_type",
        )
    if not any(weights):
        raise ConfigError("all weights are 0, nothing would be learnt", where="loss_weights", value=list(weights))
    return weights


def _resolve(specs: tuple[MethodSpec, ...], given: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Give every method its settings; refuse unknown names and settings that nobody takes."""
    for name, value in given.items():
        if name not in NEUTRAL:
            near = difflib.get_close_matches(name, (*NEUTRAL, *MODIFIERS), n=1)
            raise ConfigError(
                "unknown loss setting",
                where=name,
                value=value,
                allowed=", ".join((*NEUTRAL, *MODIFIERS)),
                remedy=f"did you mean {near[0]}?" if near else None,
            )
        if value != NEUTRAL[name] and not any(name in spec.knobs for spec in specs):
            takers = [spec.name for spec in METHODS.values() if name in spec.knobs]
            raise ConfigError(
                f"{'+'.join(spec.name for spec in specs)} does not take this setting",
                where=name,
                value=value,
                allowed=repr(NEUTRAL[name]),
                remedy=f"it works with {', '.join(takers)}",
            )
    return {
        spec.name: {name: knob.check(given.get(name, knob.default)) for name, knob in spec.knobs.items()}
        for spec in specs
    }
