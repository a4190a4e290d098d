"""Settings of DPO and its family: TRL's fields with TRL's defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from preftune.errors import ConfigError
from preftune.objectives import Objective, build_objective
from preftune.training.preference_config import ReferenceConfig


@dataclass
class DPOConfig(ReferenceConfig):
    """Settings of :class:`~preftune.DPOTrainer`.

    Attributes:
        loss_type: One method or several, see ``preftune methods``.
        loss_weights: Weight of each method; all one by default.
        beta: Strength of the pull towards the reference.
        label_smoothing: Assumed share of flipped labels, for the methods that have it.
        f_divergence_type: Divergence between policy and reference.
        f_alpha_divergence_coef: Alpha of ``alpha_divergence``.
        ld_alpha: Weight of completion tokens beyond the shorter answer (LD-DPO); ``None`` for one.
        use_weighting: Weight pairs by the policy's own probability of them (WPO).
        discopop_tau: Temperature of ``discopop``.
        ipo_normalize: Use per-token averages in ``ipo``, as TRL does, rather than sums.
        dpop_lambda: Penalty of ``dpop`` on chosen completions that fall below the reference.
        odpo_alpha: Scale of the offset that ``odpo`` makes of the score gap.
        odpo_transform: Offset of ``odpo`` as ``log`` of the score gap, or the gap itself (``identity``).
        bco_running_delta: Shift the rewards of ``bco_pair`` by their mean over the steps so far, as its paper does.
        sft_average: The SFT term as a mean over all chosen tokens of the step (``batch_tokens``, as TRL) or per pair
            over its own (``pair_tokens``).
    """

    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])
    loss_weights: list[float] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None
    use_weighting: bool = False
    discopop_tau: float = 0.05
    ipo_normalize: bool = True
    dpop_lambda: float = 50.0
    odpo_alpha: float = 1.0
    odpo_transform: str = "log"
    bco_running_delta: bool = False
    sft_average: str = "batch_tokens"

    def __post_init__(self) -> None:
        given: Any = self.loss_type
        if isinstance(given, str):
            self.loss_type = [given]
        if self.ld_alpha is not None and not 0.0 <= self.ld_alpha <= 1.0:
            raise ConfigError("value out of range", where="ld_alpha", value=self.ld_alpha, allowed="0 to 1, or null")
        super().__post_init__()

    def build_objective(self) -> Objective:
        """The objective that these settings describe; refuses contradictory ones."""
        return build_objective(
            self.loss_type,
            loss_weights=self.loss_weights,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            f_divergence_type=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
            discopop_tau=self.discopop_tau,
            ipo_normalize=self.ipo_normalize,
            dpop_lambda=self.dpop_lambda,
            odpo_alpha=self.odpo_alpha,
            odpo_transform=self.odpo_transform,
            bco_running_delta=self.bco_running_delta,
            sft_average=self.sft_average,
            use_weighting=self.use_weighting,
            ld_alpha=self.ld_alpha,
        )
