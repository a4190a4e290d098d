"""Memory that runs out: how it is noticed."""

from __future__ import annotations

import torch
from accelerate.utils.memory import should_reduce_batch_size


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whatever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, Exception) and bool(should_reduce_batch_size(error))
