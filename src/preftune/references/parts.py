"""Parameters of which every process keeps a part, as under DeepSpeed's ZeRO-3: whole ones exist for moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed
from torch import Tensor, nn

#: What lets go of all whole parameters of a model.
_RELEASES: WeakKeyDictionary[nn.Module, Callable[[], None]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Part:
    """This process's part of a tensor, divided as a parameter is: flat, and filled up to the size of all parts.

    Attributes:
        local: The part.
        parameter: The parameter, which knows its whole shape and the processes.
    """

    local: Tensor
    parameter: Any

    @classmethod
    def of(cls, parameter: Tensor) -> Part:
        """The part of a parameter itself, in the same memory."""
        divided: Any = parameter
        return cls(divided.ds_tensor, parameter)

    @classmethod
    def cut(cls, value: Tensor, parameter: Tensor) -> Part:
        """The part of a whole tensor; nothing is sent."""
        divided: Any = parameter
        local = torch.zeros_like(divided.ds_tensor)
        start = local.numel() * torch.distributed.get_rank(divided.ds_process_group)
        mine = value.reshape(-1)[start : start + local.numel()]
        local[: mine.numel()].copy_(mine)
        return cls(local, parameter)

    def whole(self) -> Tensor:
        """The whole tensor, gathered from all processes, which all have to ask."""
        group, device = self.parameter.ds_process_group, self.parameter.device
        number = torch.distributed.get_world_size(group)
        gathered = torch.empty(number * self.local.numel(), dtype=self.local.dtype, device=device)
        torch.distributed.all_gather_into_tensor(gathered, self.local.to(device).contiguous(), group=group)
        return gathered[: self.parameter.ds_numel].view(self.parameter.ds_shape)


def is_divided(parameter: Tensor) -> bool:
    """Whether every process keeps a part of a parameter."""
    return getattr(parameter, "ds_tensor", None) is not None


def num_elements(parameter: Tensor) -> int:
    """Elements of a whole parameter, divided or not."""
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())


def remember_release(model: nn.Module, release: Callable[[], None]) -> None:
    """Let :func:`release_whole` use what lets go of all whole parameters of a model."""
    _RELEASES[model] = release


def release_whole(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Let no divided parameter be whole: some stay so after a forward, and would be used again as they were."""
    if any(is_divided(p) for p in parameters):
        _RELEASES[model]()
