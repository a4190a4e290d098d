"""References that are computed while training: a shadow of the trainable parameters, or another adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from preftune.references.parts import Part, is_divided, release_whole

#: A tensor, or this process's part of one.
Value = Tensor | Part


@contextmanager
def using_adapter(model: Any, name: str) -> Iterator[None]:
    """Let another adapter of a PEFT model be the active one; which parameters are trained stays as it is."""
    before = model.active_adapter
    trained = [(p, p.requires_grad) for p in model.parameters()]
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(before)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)


class Shadow:
    """An earlier state of a model's trainable parameters, swapped in for the reference's forward.

    One mechanism serves every reference that shares the policy's architecture: the frozen initial policy of full
    fine-tuning, the adapter as it was before training (a fresh one computes nothing, a trained one is the SFT model),
    and a reference that follows the policy. Frozen parameters are shared, and swapping exchanges pointers, not data.

    Where FSDP2 or ZeRO-3 replaces the parameters by shards, the shadow is sharded the same way, and data are exchanged,
    since they keep pointers of their own.

    Args:
        model: The policy, in the state that the reference is to have.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = trained_parameters(model)
        self._values = [_copied(state_of(p)) for p in self._parameters]

    @property
    def num_bytes(self) -> int:
        """Memory that the shadow takes in this process."""
        return sum(value.numel() * value.element_size() for value in map(shard_of, self._values))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the model compute the reference. No gradient may be taken, and no autocast cache may outlive this."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        self._settle()
        for index, parameter in enumerate(self._parameters):
            value = self._values[index]
            if isinstance(parameter, DTensor) or isinstance(value, Part):
                mine, policys = shard_of(value), shard_of(state_of(parameter))
                kept = policys.clone()
                policys.copy_(mine)
                mine.copy_(kept)
            else:
                parameter.data, self._values[index] = value, parameter.data

    def _settle(self) -> None:
        """Be laid out as the parameters are, which have perhaps been sharded since."""
        if not isinstance(self._model, FSDPModule) and not any(map(is_divided, self._parameters)):
            return
        self._parameters = trained_parameters(self._model)
        self._values = [like(value, p) for value, p in zip(self._values, self._parameters, strict=True)]

    def state(self) -> list[Value]:
        """The shadow's own tensors, in the order of the trainable parameters; changing them changes the shadow."""
        self._settle()
        return self._values


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A model's trainable parameters, sharded ones as shards."""
    return [p for p in parameters_of(model) if p.requires_grad]


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """A model's parameters, sharded ones as shards."""
    # Those that are whole would be shown whole, and used again although their shards changed.
    reshard(model)
    parameters = list(model.parameters())
    release_whole(model, parameters)
    return parameters


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 has kept whole after a forward, such as a head, until a backward that a reference never has."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def state_of(parameter: nn.Parameter) -> Value:
    """A parameter's value without graph, in the same memory; this process's part where it is divided."""
    return Part.of(parameter) if is_divided(parameter) else parameter.detach()


def like(value: Value, parameter: Value) -> Value:
    """A tensor sharded and placed as a parameter is; itself where it already is."""
    if isinstance(parameter, Part) or is_divided(parameter):
        divided = parameter if isinstance(parameter, Part) else Part.of(parameter)
        return value if isinstance(value, Part) else Part.cut(value, divided.parameter)
    if isinstance(parameter, DTensor) == isinstance(value, DTensor) and not isinstance(value, Part):
        return value
    whole = whole_of(value)
    if isinstance(parameter, DTensor):
        whole = whole.to(parameter.device, parameter.dtype)
        # Every process has the whole value and keeps its part; nothing is sent.
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return whole


def whole_of(value: Value) -> Tensor:
    """All of a tensor; of a sharded one gathered from all processes, which all have to ask."""
    if isinstance(value, Part):
        return value.whole()
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_of(value: Value) -> Tensor:
    """This process's part of a tensor, in the same memory."""
    if isinstance(value, Part):
        return value.local
    return value.to_local() if isinstance(value, DTensor) else value


def _copied(value: Value) -> Value:
    return Part(value.local.clone(), value.parameter) if isinstance(value, Part) else value.clone()
