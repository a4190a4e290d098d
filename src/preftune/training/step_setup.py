"""How the rows of a run are computed, and how long they may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import nn

from preftune.errors import ConfigError
from preftune.models.forward import RowForward
from preftune.models.gate import Verdict
from preftune.models.packing_probe import Context
from preftune.models.path import PathChoice
from preftune.training import memory
from preftune.training.checks import check_positions
from preftune.training.config import PackedConfig
from preftune.training.processes import Processes
from preftune.training.router import REASON as ROUTER_REASON
from preftune.training.router import RouterLoss
from preftune.training.setup import compiled_layers
from preftune.training.step import Step
from preftune.training.task import Task


@dataclass(frozen=True)
class Paths:
    """How the models of a run are computed: packed or padded.

    Attributes:
        args: What the user asked for.
        tokenizer: The tokenizer.
        longest: Tokens of the longest sequence, where they are known.
        router: The load-balancing loss, or ``None``.
    """

    args: PackedConfig
    tokenizer: Any
    longest: int | None
    router: RouterLoss | None

    @classmethod
    def of(cls, task: Task, model: nn.Module, tokenizer: Any, args: PackedConfig, longest: int | None) -> Paths:
        """The paths of a run, after a look at its longest sequence and at the experts of its policy."""
        check_positions(model, longest)
        return cls(args, tokenizer, longest, RouterLoss.of(model, args.router_aux_loss_coef, task.balances_experts))

    def choose(self, model: nn.Module, autocast: Context) -> tuple[RowForward, Verdict]:
        """What the user asked for, what the gate allows, what the probe shows within ``autocast()``."""
        mode, backend, pad = self.args.packing_mode, self.args.attention_backend, self.tokenizer.pad_token_id or 0
        reason = None if self.router is None else ROUTER_REASON
        return PathChoice(mode, backend, pad, self.longest, reason).of(model, autocast)


def make_step(
    kind: type[Step],
    task: Task,
    model: nn.Module,
    paths: Paths,
    accelerator: Accelerator,
    processes: Processes,
) -> Step:
    """What runs the rows of a task on a model, within the memory that is free.

    Args:
        kind: Class of the result.
        task: What is trained.
        model: The policy.
        paths: Chooses how it is computed.
        accelerator: Accelerate's.
        processes: All that train together.

    Raises:
        ConfigError: The loss joins examples that the load-balancing loss divides.
    """
    args, router = paths.args, paths.router
    if router is not None and task.joint:
        raise ConfigError(
            f"{', '.join(task.methods)} joins the pairs of a step, the load-balancing loss divides them",
            where="router_aux_loss_coef",
            value=router.coef,
            remedy="set router_aux_loss_coef: 0",
        )
    forward, verdict = paths.choose(model, accelerator.autocast)
    step = kind(task, forward, accelerator, args, processes)
    step.verdict, step.router = verdict, router
    reserved = 3 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    step.bytes_per_token = memory.activation_bytes_per_token(forward, accelerator.autocast)
    budget = memory.row_budget(step.bytes_per_token, args.device, reserved)
    step.max_tokens_per_row = args.max_tokens_per_row or budget
    fit = memory.tokens_that_fit(step.bytes_per_token, args.device, reserved)
    step.checkpoint_above = 0 if args.checkpoint_policy == "always" else fit
    forward.compiled = compiled_layers(model, args, accelerator)
    return step
