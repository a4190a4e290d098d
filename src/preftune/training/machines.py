"""Machines to plan for: a small table from vendors' data sheets, and this machine as it is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Any

from preftune.config.paths import cache_home, make_home
from preftune.errors import ConfigError
from preftune.files import json_text, parse_json, replace_text

GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """One device.

    Attributes:
        name: As after ``--machine``.
        memory: Bytes of the device, or free ones of this machine.
        bf16: Peak floating-point operations per second in bf16 with fp32 accumulation, dense.
        fp32: The same in fp32, outside of tensor cores.
        source: Where the numbers come from.
        is_measured: Whether the rates are what matrix products reached here, rather than a data sheet's peak.
        kind: ``cpu`` or ``cuda``.
        thin_bf16: Rate of products with an adapter's small matrices, in bf16; measured alone.
        thin_fp32: The same in fp32.
        bandwidth: Bytes per second that an element-wise operation reads and writes; measured alone.
    """

    name: str
    memory: int
    bf16: float
    fp32: float
    source: str
    is_measured: bool = False
    kind: str = "cuda"
    thin_bf16: float = 0.0
    thin_fp32: float = 0.0
    bandwidth: float = 0.0


def _sheet(name: str, gigabytes: float, bf16: float, fp32: float, source: str) -> Machine:
    # Data sheets count in powers of ten for the rate and, but for H200, in powers of two for memory.
    memory = round(gigabytes * 1e9) if name == "h200" else round(gigabytes * GIB)
    return Machine(name, memory, bf16 * 1e12, fp32 * 1e12, f"NVIDIA, {source}")


MACHINES = MappingProxyType(
    {
        machine.name: machine
        for machine in (
            _sheet("h200", 141, 989, 67, "H200 SXM data sheet; half of the rate with sparsity"),
            _sheet("h100-80g", 80, 989, 67, "H100 SXM data sheet; half of the rate with sparsity"),
            _sheet("a100-80g", 80, 312, 19.5, "A100 data sheet"),
            _sheet("a100-40g", 40, 312, 19.5, "A100 data sheet"),
            _sheet("l40s", 48, 362, 91.6, "L40S data sheet; half of the rate with sparsity"),
            _sheet("a10", 24, 125, 31.2, "A10 data sheet"),
            _sheet("rtx-4090", 24, 165, 82.6, "Ada architecture white paper; fp32 accumulation"),
            _sheet("rtx-3090", 24, 71, 35.6, "GA102 white paper; fp32 accumulation"),
        )
    }
)


def find_machine(name: str | None) -> Machine:
    """A machine by name; ``None`` or ``this`` measures this one, ``cpu`` its processor.

    Raises:
        ConfigError: There is no such name.
    """
    if name in (None, "this", "cpu"):
        return this_machine(processor=name == "cpu")
    if name in MACHINES:
        return MACHINES[name]
    raise ConfigError("unknown machine", where="--machine", value=name, allowed=", ".join(("this", "cpu", *MACHINES)))


#: Days after which a measurement is made again.
_KEPT_DAYS = 30
_RATES = ("bf16", "fp32", "thin_bf16", "thin_fp32", "bandwidth")
#: A product as a step has it: tokens, width, and the small side of an adapter.
_TOKENS, _WIDTH, _THIN = 1024, 1024, 16


def this_machine(*, processor: bool = False) -> Machine:
    """This machine: free memory, and the rates that it reaches.

    Rates are measured once in well under a second and kept in the cache's folder, so that two commands that are asked
    the same answer the same.

    Args:
        processor: Leave an accelerator aside.
    """
    import psutil
    import torch

    cuda = torch.cuda.is_available() and not processor
    memory = int(torch.cuda.mem_get_info()[0]) if cuda else int(psutil.virtual_memory().available)
    name = torch.cuda.get_device_name() if cuda else f"this processor, {torch.get_num_threads()} threads"
    rates = kept_rates("cuda" if cuda else "cpu", name)
    return Machine(name, memory, source="measured here", is_measured=True, kind="cuda" if cuda else "cpu", **rates)


@cache
def kept_rates(kind: str, name: str) -> dict[str, float]:
    """The rates of this machine as they were measured last, or measured now."""
    import platform

    import torch

    key = f"{name}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    path = cache_home() / "machine.json"
    known: dict[str, Any] = {}
    # The cache is a convenience: one that cannot be read or written is done without.
    with suppress(OSError, ValueError, TypeError, KeyError):
        known = parse_json(path.read_text(encoding="utf-8"))
        found = known[key]
        if 0 <= time.time() - float(found["at"]) < _KEPT_DAYS * 86400 and all(float(found[r]) > 0 for r in _RATES):
            return {rate: float(found[rate]) for rate in _RATES}
    rates = measured_rates(kind)
    with suppress(OSError):
        make_home(path.parent)
        replace_text(path, json_text({**known, key: {**rates, "at": int(time.time())}}))
    return rates


def measured_rates(kind: str) -> dict[str, float]:
    """Rates of matrix products of 1,024 (on a GPU 8,192), of an adapter's, and of memory."""
    import torch

    cuda = kind == "cuda"
    size = 8192 if cuda else _WIDTH
    rates = {}
    for short, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for prefix, width in (("", size), ("thin_", _THIN)):
            # Not random: a run's random numbers must not depend on whether the rates are known already.
            a = torch.full((size if cuda else _TOKENS, size), 0.5, device=kind, dtype=dtype)
            b = torch.full((width, size), 0.5, device=kind, dtype=dtype)
            best = _best(partial(torch.nn.functional.linear, a, b), cuda)
            rates[prefix + short] = 2 * a.numel() * width / best
    a = torch.full((1 << 22,), 0.5, device=kind)
    rates["bandwidth"] = 3 * a.numel() * a.element_size() / _best(partial(torch.mul, a, a.clone()), cuda)
    return rates


def _best(call: Callable[[], object], cuda: bool) -> float:
    return min(_seconds(call, cuda) for _ in range(6))


def _seconds(call: Callable[[], object], cuda: bool) -> float:
    """Time of a call; on the processor its threads' own, so that other programs do not count."""
    import torch

    if cuda:
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    wall, own = time.perf_counter(), time.process_time()
    call()
    return min(time.perf_counter() - wall, max((time.process_time() - own) / torch.get_num_threads(), 1e-9))
