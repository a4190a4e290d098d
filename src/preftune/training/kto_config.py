"""Settings of KTO: TRL's fields with TRL's defaults."""

from __future__ import annotations

from dataclasses import dataclass

from preftune.errors import ConfigError
from preftune.objectives import Objective, build_objective
from preftune.training.config import check_choice
from preftune.training.preference_config import ReferenceConfig


@dataclass
class KTOConfig(ReferenceConfig):
    """Settings of :class:`~preftune.KTOTrainer`.

    Attributes:
        train_sampling_strategy: ``kto`` needs ``sequential``: completions are exchanged among the examples of a step,
            which have to be known beforehand.
        loss_type: ``kto``, or ``apo_zero_unpaired``, which has no KL term.
        beta: Strength of the pull towards the reference.
        desirable_weight: Weight of desirable examples.
        undesirable_weight: Weight of undesirable examples.
    """

    train_sampling_strategy: str = "sequential"
    loss_type: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        check_choice("loss_type", self.loss_type, ("kto", "apo_zero_unpaired"))
        super().__post_init__()
        if self.build_objective().uses_kl:
            self._check_kl()

    def _check_kl(self) -> None:
        if self.train_sampling_strategy != "sequential":
            raise ConfigError(
                "kto exchanges completions among the examples of a step, and so has to know the order beforehand",
                where="train_sampling_strategy",
                value=str(self.train_sampling_strategy),
                allowed="sequential",
                remedy="shuffle the data before training, or use loss_type: apo_zero_unpaired",
            )
        if self.examples_per_step < 2:
            raise ConfigError(
                "kto estimates its KL term from other completions of the same step, and there are none",
                where="per_device_train_batch_size",
                value=self.per_device_train_batch_size,
                allowed="2 or more examples in a step",
                remedy="raise per_device_train_batch_size or gradient_accumulation_steps",
            )

    @property
    def examples_per_step(self) -> int:
        """Examples in one optimizer step over all processes."""
        return int(self.train_batch_size * self.gradient_accumulation_steps * self.world_size)

    def build_objective(self) -> Objective:
        """The objective that these settings describe; refuses contradictory ones."""
        return build_objective(
            self.loss_type,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )


__all__ = ["KTOConfig"]
