"""An accelerator that is none: tensors that claim to lie on one, compute on the CPU, and refuse to mix with the host's.

What a CUDA device would do without a word is counted with the place in this project that asked for it: copies from
ordinary memory and reads of values, both of which wait for the device. Numbers are real, so that a step here can be
compared with one on the CPU.
"""

from __future__ import annotations

import collections
import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

from preftune.kernels.attention import check, varlen

SOURCE = Path(__file__).resolve().parents[1] / "src"
#: Copies between devices are these operations' business.
_COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
_SCALARS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default}
#: Their results' sizes depend on values, which the host has to wait for.
_SIZED = {
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.bincount.default,
    torch.ops.aten.repeat_interleave.Tensor,
    torch.ops.aten._unique2.default,
}


class FarTensor(Tensor):
    """A tensor on the emulated device; shares the memory of an ordinary one."""

    near: Tensor
    place: torch.device
    record: Log

    @staticmethod
    def of(near: Tensor, place: torch.device, log: Log) -> FarTensor:
        made: FarTensor = Tensor._make_subclass(FarTensor, near.detach())
        made.near, made.place, made.record = near.detach(), place, log
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self.place.type == "cuda"

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"FarTensor({self.near!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return FarTensor.of(args[0].near, args[0].place, args[0].record)
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            args[0].near = args[1].near
        special = _SPECIAL.get(getattr(func, "__name__", ""))
        if special is not None and args and isinstance(args[0], FarTensor):
            return special(*args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        flat = tree_flatten((args, kwargs))[0]
        far = next(each for each in flat if isinstance(each, FarTensor))
        log = far.record
        mixed = [each for each in flat if isinstance(each, Tensor) and not isinstance(each, FarTensor)]
        if func in _COPIES:
            return _copied(func, args, kwargs, far)
        if any(each.dim() or func is torch.ops.aten.index.Tensor for each in mixed):
            raise RuntimeError(f"Expected all tensors to be on the same device ({func})")
        if func in _SCALARS or func in _SIZED:
            log.wait(str(func))
        if far.place.type == "mps" and torch.float64 in [getattr(each, "dtype", each) for each in flat]:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        log.launches[str(func)] += 1
        near_args, near_kwargs = tree_map_only(FarTensor, lambda each: each.near, (args, kwargs))
        if func is torch.ops.aten.mm.dtype:  # has no form for the CPU
            out = near_args[0].to(near_args[2]) @ near_args[1].to(near_args[2])
        else:
            out = func(*near_args, **near_kwargs)
        wrapped = tree_map_only(Tensor, lambda each: FarTensor.of(each, far.place, log), out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _copied(func: Any, args: Any, kwargs: Any, far: FarTensor) -> Any:
    log = far.record
    if func is torch.ops.aten.copy_.default:
        target, source = args[:2]
        if not isinstance(source, FarTensor) and source.dim():
            log.copy_in(source, kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        elif not isinstance(target, FarTensor):
            log.offloaded += source.near.nbytes
            if not getattr(target, "pinned", False):
                log.wait("copy to the host")
        log.launches[str(func)] += 1
        near = [each.near if isinstance(each, FarTensor) else each for each in (target, source)]
        near[0].copy_(near[1])
        return target
    kwargs = {**kwargs, "device": None}
    return FarTensor.of(func(args[0].near, *args[1:], **kwargs), far.place, log)


_TO = Tensor.to


def _near(tensor: FarTensor, what: str) -> Tensor:
    tensor.record.wait(what)
    return tensor.near


def _moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``Tensor.to`` of a far tensor, whose device the C++ side takes for the CPU."""
    places = [each for each in (*args, kwargs.get("device")) if isinstance(each, (torch.device, str))]
    place = torch.device(places[0]) if places else None
    kwargs.pop("device", None)
    rest = [each for each in args if not isinstance(each, (torch.device, str)) and each is not None]
    kwargs.pop("non_blocking", None)
    if rest and isinstance(rest[0], FarTensor):
        rest[0] = rest[0].dtype
    dtypes = [each for each in (*rest, kwargs.get("dtype")) if isinstance(each, torch.dtype)]
    with torch._C.DisableTorchFunctionSubclass():
        changed = _TO(tensor, dtypes[0]) if dtypes else tensor
        if place is not None and place.type == "cpu":
            return _near(changed, "copy to the host")  # type: ignore[arg-type]
    return changed


_SPECIAL: dict[str, Callable[..., Any]] = {
    "to": _moved,
    "cpu": lambda tensor, *_, **__: _near(tensor, "copy to the host"),
    "tolist": lambda tensor: _near(tensor, "tolist").tolist(),
    "numpy": lambda tensor, **_: _near(tensor, "numpy").numpy(),
    "cuda": lambda tensor, *_, **__: tensor,
    "new_tensor": lambda far, data, **_: far.record.placed(torch.tensor(data, dtype=far.dtype), far.place),
}


class Log:
    """What happened on the device: operations, waits by place in this project, bytes moved to the host."""

    def __init__(self) -> None:
        self.launches: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()
        self.copies = 0
        self.offloaded = 0

    def wait(self, what: str) -> None:
        self.waits[f"{what} at {_asked_by()}"] += 1

    def copy_in(self, source: Tensor, non_blocking: bool) -> None:
        self.copies += 1
        if not (non_blocking and getattr(source, "pinned", False)):
            self.wait("copy from ordinary memory")

    def placed(self, tensor: Tensor, place: torch.device) -> FarTensor:
        self.copy_in(tensor, False)
        return FarTensor.of(tensor, place, self)

    def waits_of(self, *parts: str) -> dict[str, int]:
        """The waits whose place contains one of the parts."""
        return {where: number for where, number in self.waits.items() if any(part in where for part in parts)}


def _asked_by() -> str:
    """The innermost line of this project on the stack, else the innermost outside of torch."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    own = [frame for frame in frames if frame.filename.startswith(str(SOURCE))]
    other = [frame for frame in frames if "/torch/" not in frame.filename]
    # What a library does with a call of its own is the library's.
    frame = (own or other)[-1]
    beyond = [f for f in frames[frames.index(frame) + 1 :] if "/torch/" not in f.filename]
    if beyond and not own:
        frame = beyond[-1]
    last = next((f for f in reversed(frames) if "/torch/" not in f.filename), frame)
    return f"{Path(frame.filename).name}:{frame.lineno} ({Path(last.filename).name}:{last.lineno})"


class Device(TorchFunctionMode):
    """While active, whatever is made there or moved there lies on the emulated device.

    Args:
        kind: Type of the device.
        memory: Where its numbers really are; on ``meta`` there are none, and no memory is needed.
    """

    def __init__(self, kind: str = "cuda", memory: str = "cpu") -> None:
        super().__init__()
        self.memory = memory
        self.place = torch.device(kind, 0)
        self.log = Log()

    def _is_far(self, value: Any) -> bool:
        if isinstance(value, str):
            return value.split(":")[0] == self.place.type
        return isinstance(value, torch.device) and value.type == self.place.type

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        if name == "pin_memory" and tensor is not None:
            pinned = tensor.clone()
            pinned.pinned = True  # type: ignore[attr-defined]
            return pinned
        pin = kwargs.pop("pin_memory", False)
        if name in ("to", "cuda") and tensor is not None and not isinstance(tensor, FarTensor):
            places = [each for each in (*args[1:], kwargs.get("device")) if self._is_far(each)]
            if places or name == "cuda":
                return self._arrived(tensor, args[1:], kwargs)
            if len(args) > 1 and isinstance(args[1], FarTensor):
                return self._arrived(tensor.to(args[1].dtype), (), kwargs)
        if self._is_far(kwargs.get("device")) and not isinstance(tensor, FarTensor):
            kwargs["device"] = self.memory
            made = func(*args, **kwargs)
            if self.place.type == "mps" and made.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
            if name in ("tensor", "as_tensor", "from_numpy", "asarray"):
                return self.log.placed(made, self.place)
            return FarTensor.of(made, self.place, self.log)
        if self._is_far(kwargs.get("device")):
            kwargs.pop("device")
        out = func(*args, **kwargs)
        if pin:
            out.pinned = True
        return out

    def _arrived(self, tensor: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
        dtypes = [each for each in (*args, kwargs.get("dtype")) if isinstance(each, torch.dtype)]
        non_blocking = bool(kwargs.get("non_blocking", False))
        if self.place.type == "mps" and (dtypes or [tensor.dtype])[0] == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        self.log.copy_in(tensor, non_blocking)
        changed = tensor.to(dtypes[0]) if dtypes else tensor
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(FarTensor.of(changed.clone(), self.place, self.log), tensor.requires_grad)
        return FarTensor.of(changed.clone(), self.place, self.log)

    def move(self, model: nn.Module) -> Any:
        """Put a model's parameters and buffers on the device, tied ones together."""
        seen: dict[int, Any] = {}
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and not isinstance(parameter.data, FarTensor):
                    if id(parameter) not in seen:
                        far = FarTensor.of(parameter.detach().clone(), self.place, self.log)
                        seen[id(parameter)] = nn.Parameter(far, parameter.requires_grad)
                    module._parameters[name] = seen[id(parameter)]
            for name, buffer in list(module._buffers.items()):
                if buffer is not None and not isinstance(buffer, FarTensor):
                    module._buffers[name] = FarTensor.of(buffer.detach().clone(), self.place, self.log)
        return model


@contextmanager
def accelerator(monkeypatch: Any, kind: str = "cuda") -> Iterator[Device]:
    """An emulated accelerator that trainers take for the one of this machine."""
    import accelerate
    from transformers import TrainingArguments

    device = Device(kind)
    monkeypatch.setattr(TrainingArguments, "device", property(lambda self: self._setup_devices and device.place))
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 1))
    monkeypatch.setattr(accelerate.Accelerator, "device", property(lambda self: device.place))
    autocast, enabled, dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype

    def near(name: str) -> str:
        return "cpu" if name == kind else name

    def near_autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return autocast(near(device_type), *args, **kwargs)

    monkeypatch.setattr(torch, "autocast", near_autocast)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda name="cuda": enabled(near(name)))
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda name: dtype(near(name)))
    for name, value in {"mem_get_info": (60 << 30, 80 << 30), "memory_reserved": 0, "memory_allocated": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    empty = torch.empty

    def pinnable_empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        made.pinned = pin_memory  # type: ignore[attr-defined]
        return made

    def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(tensor, FarTensor):
            return _moved(tensor, *args, **kwargs)
        if any(map(device._is_far, (*args, kwargs.get("device")))):
            return device._arrived(tensor, args, kwargs)
        return _TO(tensor, *args, **kwargs)

    # Modes and subclasses look operations up by name.
    moved.__name__ = "to"
    # Hooks on saved tensors run below the mode.
    monkeypatch.setattr(torch, "empty", pinnable_empty)
    monkeypatch.setattr(Tensor, "to", moved)
    for module in (torch.cuda, torch.mps):
        monkeypatch.setattr(module, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8))
        monkeypatch.setattr(module, "set_rng_state", lambda *_: None)
    monkeypatch.setattr(check, "_apart_from_caller", lambda work: work())
    monkeypatch.setattr(check, "_on", lambda place: nullcontext())
    check.forget()
    module_to = nn.Module.to

    def moved_module(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        rest = [each for each in args if not device._is_far(each)]
        if len(rest) == len(args) and not device._is_far(kwargs.get("device")):
            return module_to(module, *args, **kwargs)
        kwargs.pop("device", None)
        device.move(module)
        return module_to(module, *rest, **kwargs) if rest or kwargs.get("dtype") else module

    # Which cannot point a parameter at a tensor of another class.
    monkeypatch.setattr(nn.Module, "to", moved_module)
    try:
        with device:
            yield device
    finally:
        check.forget()


def varlen_kernel(
    query: Tensor, key: Tensor, value: Tensor, plan: varlen.VarlenPlan, scale: float, window: int | None
) -> Tensor:
    """Variable-length attention as documented: per sequence, causal, the last query aligned with the last key."""
    pieces = []
    groups = query.shape[1] // key.shape[1]
    q_bounds, k_bounds = (getattr(each, "near", each).tolist() for each in (plan.cu_query, plan.cu_key))
    for q0, q1, k0, k1 in zip(q_bounds, q_bounds[1:], k_bounds, k_bounds[1:], strict=False):
        q, k, v = query[q0:q1], key[k0:k1].repeat_interleave(groups, 1), value[k0:k1].repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        k_pos = torch.arange(k1 - k0, device=query.device)
        q_pos = k_pos[k1 - k0 - (q1 - q0) :, None]
        visible = (k_pos <= q_pos) & (True if window is None else k_pos > q_pos - window)
        pieces.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -math.inf).softmax(-1), v))
    return torch.cat(pieces)


class TF32(TorchDispatchMode):
    """Rounds the inputs of fp32 products to ten bits, as a CUDA device does that is told to be fast."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    _products = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in self._products:
            last = len([each for each in args if isinstance(each, Tensor)])
            args = [tf32(a) if isinstance(a, Tensor) and last - n <= 2 else a for n, a in enumerate(args)]
        return func(*args, **(kwargs or {}))


def tf32(tensor: Tensor) -> Tensor:
    """Round fp32 numbers to a mantissa of ten bits, ties to even."""
    if tensor.dtype != torch.float32:
        return tensor
    bits = tensor.contiguous().view(torch.int32)
    rounded = bits + 0xFFF + ((bits >> 13) & 1)
    return (rounded & ~0x1FFF).view(torch.float32)
