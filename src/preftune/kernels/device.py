"""What differs from device to device: the widest dtype, how data get there, how much memory is free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def wide_dtype(device: torch.device) -> torch.dtype:
    """Dtype of sums over many numbers: float64, or float32 on Apple's mps, which knows no wider one."""
    return torch.float32 if device.type == "mps" else torch.float64


def widened(tensor: Tensor) -> Tensor:
    """The tensor in its device's :func:`wide_dtype`."""
    return tensor.to(wide_dtype(tensor.device))


def put(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy numbers from the host without waiting for the device.

    A copy from ordinary memory waits until the device has finished all earlier work; one from pinned memory is queued
    behind it.

    Args:
        values: Array, or (nested) sequence of numbers.
        device: Where to.
        dtype: Dtype of the result; by default that of the array.
    """
    tensor = torch.as_tensor(np.asarray(values, order="C"), dtype=_allowed(dtype, device))
    if device.type == "cpu":
        return tensor
    if tensor.dtype == torch.float64:
        tensor = tensor.to(wide_dtype(device))
    if device.type == "cuda" and tensor.numel():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def put_together(arrays: Sequence[Any], device: torch.device) -> list[Tensor]:
    """Copy one-dimensional integer arrays in a single :func:`put`; the results are views of one int64 tensor."""
    if device.type == "cpu":
        return [put(array, device, torch.int64) for array in arrays]
    joined = put(np.concatenate([np.asarray(array, dtype=np.int64) for array in arrays]), device)
    return list(joined.split([len(array) for array in arrays]))


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated, what the allocator holds unused included; ``None`` where unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if device.type == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    return None


def _allowed(dtype: torch.dtype | None, device: torch.device) -> torch.dtype | None:
    return wide_dtype(device) if dtype == torch.float64 else dtype
