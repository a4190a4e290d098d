"""Settings that the preference methods share: TRL's fields with TRL's defaults."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from preftune.errors import ConfigError
from preftune.objectives import Objective
from preftune.training.config import PackedConfig, check_at_least, check_choice


@dataclass
class PreferenceConfig(PackedConfig):
    """What all preference methods have.

    Attributes:
        disable_dropout: Switch dropout off in policy and reference.
        max_prompt_length: Longest prompt in tokens; ``None`` for no limit of its own.
        implicit_prompt: How the prompt is found where the data have none: ``common_prefix`` as TRL does, or
            ``transcript`` at the last assistant turn.
    """

    learning_rate: float = 1e-6
    disable_dropout: bool = True
    max_prompt_length: int | None = None
    implicit_prompt: str = "common_prefix"

    def __post_init__(self) -> None:
        check_choice("implicit_prompt", self.implicit_prompt, ("common_prefix", "transcript"))
        check_at_least("max_prompt_length", self.max_prompt_length, 1)
        self._check_reference(self.build_objective())
        super().__post_init__()

    def _check_reference(self, objective: Objective) -> None:
        """Refuse settings of a reference that contradict each other, or that no loss looks at."""

    def build_objective(self) -> Objective:
        """The objective that these settings describe; refuses contradictory ones."""
        raise NotImplementedError


@dataclass
class ReferenceConfig(PreferenceConfig):
    """What the methods with a reference have.

    Attributes:
        precompute_ref_log_probs: Compute reference log-probs before training, as is done anyway whenever the reference
            is fixed and ``reference_store`` is on; without the store it is refused.
        precompute_ref_batch_size: Accepted from TRL; the reference pass packs rows under ``max_tokens_per_row``.
        reference_store: Keep reference log-probs on disk and never compute one twice.
        model_adapter_name: Adapter that is trained, where the model carries several; by default the active one.
        ref_adapter_name: Adapter of the same model that is the reference; by default the policy as it is before
            training.
        sync_ref_model: Let the reference follow the policy (TR-DPO).
        ref_model_mixup_alpha: Share of the policy in each synchronisation.
        ref_model_sync_steps: Optimizer steps between synchronisations.
        first_step_check: Verify that policy and reference agree before the first update, and say what is wrong if not.
    """

    precompute_ref_log_probs: bool = False
    precompute_ref_batch_size: int | None = None
    reference_store: bool = True
    model_adapter_name: str | None = None
    ref_adapter_name: str | None = None
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512
    first_step_check: bool = True

    def _check_reference(self, objective: Objective) -> None:
        if self.sync_ref_model:
            self._check_sync()
        else:
            for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
                if getattr(self, name) != getattr(ReferenceConfig, name):
                    warnings.warn(f"{name} has no effect without sync_ref_model", UserWarning, stacklevel=4)
        if self.precompute_ref_log_probs and not self.reference_store:
            raise ConfigError(
                "precomputed values are kept in the reference store, which is switched off",
                where="precompute_ref_log_probs",
                value=True,
                remedy="drop reference_store: false, or precompute_ref_log_probs",
            )
        if self.precompute_ref_batch_size is not None:
            warnings.warn(
                "precompute_ref_batch_size has no effect: the reference pass packs rows under max_tokens_per_row",
                UserWarning,
                stacklevel=4,
            )
        if objective.takes_reference:
            return
        for name in ("precompute_ref_log_probs", "sync_ref_model", "ref_adapter_name"):
            if getattr(self, name):
                raise ConfigError(
                    f"{', '.join(objective.names)} has no reference",
                    where=name,
                    value=getattr(self, name),
                    remedy=f"leave {name} out",
                )

    def _check_sync(self) -> None:
        if self.precompute_ref_log_probs:
            raise ConfigError(
                "a reference that follows the policy cannot be precomputed",
                where="precompute_ref_log_probs",
                value=True,
                remedy="turn off precompute_ref_log_probs or sync_ref_model",
            )
        if self.ref_adapter_name is not None:
            raise ConfigError(
                "a reference that follows the policy begins as the policy itself",
                where="ref_adapter_name",
                value=self.ref_adapter_name,
                remedy="leave out ref_adapter_name or sync_ref_model",
            )
        if not 0.0 < self.ref_model_mixup_alpha <= 1.0:
            raise ConfigError(
                "value out of range",
                where="ref_model_mixup_alpha",
                value=self.ref_model_mixup_alpha,
                allowed="more than 0, up to 1",
            )
        check_at_least("ref_model_sync_steps", self.ref_model_sync_steps, 1)
