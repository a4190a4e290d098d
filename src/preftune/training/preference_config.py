"""Settings of DPO and KTO, and what all preference methods share: TRL's fields with TRL's defaults."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from preftune.config.legacy import takes_old_names
from preftune.errors import ConfigError
from preftune.objectives import METHODS, NEUTRAL, MethodSpec, Objective, build_objective
from preftune.training.config import PackedConfig, check_at_least, check_choice

_Config = TypeVar("_Config", bound=type)
_TYPES = {"number": "float", "flag": "bool", "choice": "str"}
_PAIRS = [spec for spec in METHODS.values() if spec.paired and spec.family != "reference_free"]
_ANSWERS = [spec for spec in METHODS.values() if not spec.paired]


def with_knobs(specs: Iterable[MethodSpec]) -> Callable[[_Config], _Config]:
    """Give a settings class a field for every knob of its methods that it does not declare itself.

    Args:
        specs: Rows of the table of methods.

    Returns:
        The decorator, for use below ``@dataclass``.
    """
    knobs = {knob.name: knob for spec in specs for knob in spec.knobs.values()}

    def add(config: _Config) -> _Config:
        for name, knob in knobs.items():
            if not hasattr(config, name):
                config.__annotations__[name] = _TYPES[knob.kind]
                setattr(config, name, knob.neutral)
                config.__doc__ = f"{(config.__doc__ or '').rstrip()}\n        {name}: {knob.description}\n    "
        return config

    return add


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

    def knobs(self) -> dict[str, Any]:
        """The settings that a loss may take, in the order of the fields."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name in NEUTRAL}

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


@takes_old_names
@dataclass
@with_knobs(_PAIRS)
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
            use_weighting=self.use_weighting,
            ld_alpha=self.ld_alpha,
            **self.knobs(),
        )


@takes_old_names
@dataclass
@with_knobs(_ANSWERS)
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
        check_choice("loss_type", self.loss_type, tuple(spec.name for spec in _ANSWERS))
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
        return build_objective(self.loss_type, beta=self.beta, **self.knobs())
