"""Settings of the trainers without a reference: TRL's fields with TRL's defaults."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

from preftune.config.legacy import takes_old_names
from preftune.errors import ConfigError
from preftune.objectives import METHODS, Objective, build_objective
from preftune.training.preference_config import PreferenceConfig

#: TRL's ``loss_type`` of its CPO trainer, by the method's name in the table.
CPO_METHODS = {"sigmoid": "cpo", "hinge": "cpo_hinge", "ipo": "cpo_ipo", "simpo": "simpo", "alphapo": "alphapo"}


def _is_unpaired(name: str) -> bool:
    return any(name in (spec.name, f"{spec.name}_pair") for spec in METHODS.values() if not spec.paired)


@dataclass
class ReferenceFreeConfig(PreferenceConfig):
    """What ORPO and CPO share.

    Attributes:
        max_completion_length: Accepted from TRL, where it only concerns encoder-decoder models; without
            effect here as there.
        beta: Weight of ORPO's odds-ratio term, or CPO's scale of the rewards.
        padding_value: Accepted from TRL; packed rows carry no padding.
        generate_during_eval: Accepted from TRL; refused where true: generate with the saved model.
        is_encoder_decoder: Accepted from TRL; refused where true: only decoder models are trained.
    """

    max_completion_length: int | None = None
    beta: float = 0.1
    padding_value: int | None = None
    generate_during_eval: bool = False
    is_encoder_decoder: bool | None = None

    def __post_init__(self) -> None:
        refused = {
            "generate_during_eval": (self.generate_during_eval, "generate with the saved model afterwards"),
            "is_encoder_decoder": (bool(self.is_encoder_decoder), "only decoder models are trained"),
        }
        for name, (asked, remedy) in refused.items():
            if asked:
                raise ConfigError("not supported", where=name, value=getattr(self, name), remedy=remedy)
        if self.max_completion_length is not None:
            said = "max_completion_length has no effect, as in TRL: it is about models with an encoder; see max_length"
            warnings.warn(said, UserWarning, stacklevel=3)
        if self.padding_value is not None:
            warnings.warn("padding_value has no effect: packed rows are not padded", UserWarning, stacklevel=3)
        super().__post_init__()


@takes_old_names
@dataclass
class ORPOConfig(ReferenceFreeConfig):
    """Settings of :class:`~preftune.ORPOTrainer`."""

    loss_type: ClassVar[str] = "orpo"

    def build_objective(self) -> Objective:
        """ORPO with these settings."""
        return build_objective("orpo", beta=self.beta)


@takes_old_names
@dataclass
class CPOConfig(ReferenceFreeConfig):
    """Settings of :class:`~preftune.CPOTrainer`.

    Attributes:
        label_smoothing: Assumed share of flipped labels; for ``sigmoid`` and ``simpo``.
        loss_type: ``sigmoid`` is CPO; ``hinge``, ``ipo``, ``simpo``; ``alphapo`` is ``simpo`` without a supervised
            term.
        cpo_alpha: Weight of the supervised term; 0 with ``simpo`` is SimPO as published.
        simpo_gamma: Target margin of the rewards; for ``simpo`` and ``alphapo``.
        alpha: Shape of the AlphaPO reward, with every loss; 0 is the log-prob.
    """

    label_smoothing: float = 0.0
    loss_type: str = "sigmoid"
    cpo_alpha: float = 1.0
    simpo_gamma: float = 0.5
    alpha: float = 0.0

    def __post_init__(self) -> None:
        if self.loss_type not in CPO_METHODS:
            raise ConfigError(
                "unknown loss",
                where="loss_type",
                value=self.loss_type,
                allowed=", ".join(CPO_METHODS),
                remedy="unpaired data are for KTOTrainer" if _is_unpaired(self.loss_type) else None,
            )
        if self.loss_type == "alphapo":
            self._set_alphapo()
        super().__post_init__()

    def _set_alphapo(self) -> None:
        if self.cpo_alpha not in (0.0, 1.0):
            raise ConfigError(
                "alphapo has no supervised term",
                where="cpo_alpha",
                value=self.cpo_alpha,
                allowed="0",
                remedy="use loss_type: simpo with alpha and cpo_alpha",
            )
        self.cpo_alpha = 0.0
        if self.alpha == 0.0:
            warnings.warn(
                "alpha is 0, so that alphapo is SimPO; the AlphaPO paper uses 0.25", UserWarning, stacklevel=4
            )

    def build_objective(self) -> Objective:
        """The objective that these settings describe; refuses contradictory ones."""
        return build_objective(
            CPO_METHODS[self.loss_type],
            beta=self.beta,
            **{**self.knobs(), **({"cpo_alpha": None} if self.loss_type == "alphapo" else {})},
        )


__all__ = ["CPOConfig", "ORPOConfig", "ReferenceFreeConfig"]
