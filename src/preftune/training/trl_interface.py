"""What scripts written for TRL or transformers read of a trainer, and call on it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn
from torch.distributed.tensor import DTensor

from preftune.errors import ConfigError
from preftune.references.parts import Part
from preftune.training.extra_state import RunningDelta
from preftune.training.preflight import method_settings
from preftune.training.reference import Reference
from preftune.training.task import Task

#: Attributes of TRL's trainers that have another name in the settings.
_RENAMED = {"loss_types": "loss_type", "precompute_ref_logps": "precompute_ref_log_probs"}


def _router_coef(trainer: Any) -> float:
    return trainer.step.router.coef if trainer.step.router is not None else 0.0


#: Attributes that follow from settings and model, rather than being a setting.
_DERIVED: dict[str, Callable[[Any], Any]] = {
    "aux_loss_enabled": lambda trainer: trainer.step.router is not None,
    "router_aux_loss_coef": _router_coef,
    "aux_loss_coef": _router_coef,
    "loss_weights": lambda trainer: list(trainer.args.loss_weights or [1.0] * len(trainer.task.methods)),
    "max_length": lambda trainer: trainer.args.max_length,
    "padding_free": lambda trainer: bool(trainer.step.verdict.ok),
    "tokenizer": lambda trainer: trainer.processing_class,
    "is_encoder_decoder": lambda trainer: False,
    "calculate_KL": lambda trainer: bool(trainer.task.objective.uses_kl),
    # The step offloads by itself, and no template is exchanged for training.
    "maybe_activation_offload_context": lambda trainer: contextlib.nullcontext(),
    "chat_template": lambda trainer: None,
}


@dataclass(frozen=True)
class MadeWith:
    """What a trainer was made with.

    Attributes:
        model: The policy.
        settings: What makes its loss, data and reference.
    """

    model: Any
    settings: dict[str, Any]


class Habits:
    """The part of a trainer that is there for scripts.

    The settings of a method can be read of the trainer, as of TRL's: ``trainer.beta``. They cannot be set: the loss is
    built from them when the trainer is made.
    """

    args: Any
    task: Task
    step: Any
    model: Any
    made_with: MadeWith
    _given_reference: Any = None
    _followed: nn.Module | None = None

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # A subclass may have an attribute of that name, which is then found first.
            if "step" in self.__dict__ and not name.startswith("_"):
                if name in _DERIVED:
                    return _DERIVED[name](self)
                field = _RENAMED.get(name, name)
                if field in method_settings(self.args):
                    return getattr(self.args, field)
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        made = self.__dict__.get("made_with")
        if made is not None and _RENAMED.get(name, name) in made.settings:
            raise ConfigError(
                "is read when the trainer is made, and has no effect afterwards",
                where=f"trainer.{name}",
                value=value,
                remedy="make another trainer with it in the settings",
            )
        super().__setattr__(name, value)

    # ---- the reference ----------------------------------------------------------------------------------------------

    @property
    def reference(self) -> Reference | None:
        """What the policy is compared with."""
        reference: Reference | None = self.task.reference
        return reference

    @property
    def ref_model(self) -> Any:
        """The reference as a model: the one that was given, or the one that follows the policy; else ``None``.

        The usual reference is the policy as it was, kept as log-probs. A model that follows the policy shares its
        memory with what training compares with, so that it may be looked at and run, and is not to be changed.
        """
        reference = self.reference
        if self._given_reference is not None or reference is None or not reference.follows:
            return self._given_reference
        reference.keep_shadow()
        values = reference.following()
        whole = [value for value in values if not isinstance(value, (Part, DTensor))]
        # Asked each time: a model that was made of whole weights would stay behind once these are sharded.
        if len(whole) < len(values):
            what = "a reference that follows the policy in shards cannot be had as a model"
            raise ConfigError(what, where="trainer.ref_model", remedy="load it from a checkpoint")
        if self._followed is None:
            model = reference.policy.model
            trained = [p for p in model.parameters() if p.requires_grad]
            memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
            for parameter, value in zip(trained, whole, strict=True):
                memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
            followed = copy.deepcopy(model, memo)
            self.__dict__["_followed"] = followed.eval()
        return self._followed

    @ref_model.setter
    def ref_model(self, value: Any) -> None:
        if "made_with" in self.__dict__:
            raise ConfigError(
                "the reference is chosen when the trainer is made", where="trainer.ref_model", remedy="pass ref_model"
            )
        self._given_reference = value

    # ---- what checkpoints look at -----------------------------------------------------------------------------------

    @property
    def running_delta(self) -> RunningDelta | None:
        """BCO's reward shift."""
        delta: RunningDelta | None = self.task.running_delta
        return delta

    @property
    def max_tokens_per_row(self) -> int:
        """Token budget of a row."""
        budget: int = self.step.max_tokens_per_row
        return budget

    @max_tokens_per_row.setter
    def max_tokens_per_row(self, value: int) -> None:
        self.step.max_tokens_per_row = value

    @property
    def checkpoint_above(self) -> int:
        """Longest row that is run without recomputing activations."""
        longest: int = self.step.checkpoint_above
        return longest

    @checkpoint_above.setter
    def checkpoint_above(self, value: int) -> None:
        self.step.checkpoint_above = value

    # ---- what is called ---------------------------------------------------------------------------------------------

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available: a trainer is made for one model and one set of settings.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "not available: a trainer is made for one model and one set of settings",
            where="hyperparameter_search",
            remedy="search with preftune sweep, or make a trainer for each trial, as in an objective of optuna",
        )
