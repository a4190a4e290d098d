"""The load-balancing loss of mixture-of-experts models, as a term beside the trainer's own loss.

It is a product of means over the tokens of a batch, so that it depends on which tokens are together and how often.
With it, rows are therefore the data loader's own micro-batches on the padded path, prompts counted once per answer, and
the term is the mean over micro-batches: TRL's numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from preftune.errors import ConfigError
from preftune.models.head import base_model

#: Why such a model is not packed.
REASON = "the load-balancing loss counts padded micro-batches (router_aux_loss_coef: 0 leaves it out and packs)"


@dataclass(frozen=True)
class RouterLoss:
    """Load-balancing loss.

    Attributes:
        coef: Its weight in the loss.
    """

    coef: float

    #: Keywords that make the model return the loss.
    keywords = {"output_router_logits": True}  # noqa: RUF012 - never changed

    @classmethod
    def of(cls, model: Any, coef: float | None, always: bool) -> RouterLoss | None:
        """The term that a model's training needs, or ``None``.

        Args:
            model: The policy.
            coef: ``router_aux_loss_coef`` of the settings; ``None`` takes the model's own.
            always: Add the term wherever the model has one, rather than only where its configuration asks for it.

        Raises:
            ConfigError: A weight is set for a model that has no such loss.
        """
        config = base_model(model).config.get_text_config()
        if not hasattr(config, "output_router_logits"):
            if coef:
                raise ConfigError(
                    f"{type(base_model(model)).__name__} has no experts whose load could be balanced",
                    where="router_aux_loss_coef",
                    value=coef,
                    remedy="leave router_aux_loss_coef out",
                )
            return None
        if coef is None and not always and not config.output_router_logits:
            return None
        weight = float(getattr(config, "router_aux_loss_coef", 0.0) if coef is None else coef)
        if weight and not _returns_loss(base_model(model)):
            if coef:
                raise ConfigError(
                    f"{type(base_model(model)).__name__} has experts and returns no load-balancing loss",
                    where="router_aux_loss_coef",
                    value=coef,
                    remedy="leave router_aux_loss_coef out",
                )
            return None
        return cls(weight) if weight else None

    def term(self, output: Any) -> Tensor:
        """The unweighted loss of one micro-batch, a scalar with graph."""
        loss: Tensor = output.aux_loss
        return loss


def _returns_loss(base: Any) -> bool:
    """Whether the model computes the loss that its configuration names: Llama 4 does not."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(base.parameters()).device)
    with torch.no_grad():
        output = base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **RouterLoss.keywords)
    return getattr(output, "aux_loss", None) is not None
