"""Whether the kernels are right on this accelerator, and how fast they are alone.

Errors are relative, against plain computation in fp64: output and gradients. In bf16 a right kernel of attention is off
by up to 4e-2 in its worst token. Without an accelerator (``--dry``) other functions stand in for the kernels, so that
the checks themselves run.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Result = dict[str, Any]

#: Query heads, key heads and head size: groups of 1 to 8, sizes that models have.
HEADS = ((4, 4, 64), (8, 2, 64), (14, 2, 64), (4, 4, 80), (8, 1, 128), (32, 8, 128), (4, 2, 256))
FLEX = {
    "softcap and window, bf16, head size 256": ("bfloat16", 8, 4, 256, 50.0, True, False),
    "sinks, bf16, eight groups": ("bfloat16", 8, 1, 64, None, False, True),
    "plain, fp32, seven groups": ("float32", 14, 2, 64, None, False, False),
    "softcap, fp16, head size 80": ("float16", 4, 4, 80, 30.0, False, False),
}
#: Vocabulary, hidden size, scored tokens.
HEAD_SHAPES = ((128_256, 2048, 8192), (128_256, 4096, 8192), (151_936, 4096, 8192))


def device_of(dry: bool) -> torch.device:
    """The accelerator, or the CPU."""
    return torch.device("cpu") if dry else torch.device("cuda", 0)


def wait(device: torch.device) -> None:
    """Until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(device: torch.device, work: Callable[[], Any], times: int, warm: int) -> float:
    """Median time of a call, with the device finished before and after."""
    found = []
    for _ in range(warm):
        work()
    for _ in range(times):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        found.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(found), 3)


@contextmanager
def peak_memory(device: torch.device, into: Result) -> Iterator[None]:
    """Allocated memory at its highest, over what there was before, in GB."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    into["peak_gb"] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)


def layout_of(pairs: int, prompt: int, completion: int, seed: int = 0) -> Any:
    """A row of pairs of about these lengths."""
    from preftune.packing import RowLayout, TreeSpan

    draw, spans, start = random.Random(seed), [], 0
    for _ in range(pairs):
        sizes = [max(1, round(size * draw.uniform(0.5, 1.5))) for size in (prompt, completion, completion)]
        spans.append(TreeSpan(start, sizes[0], (sizes[1], sizes[2])))
        start += spans[-1].num_tokens
    return RowLayout(tuple(spans))


def drawn(device: torch.device, layout: Any, heads: int, groups: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values as projections leave them."""
    shapes = [(1, layout.num_tokens, number, size) for number in (heads, groups, groups)]
    made = [torch.randn(shape, device=device).to(dtype).transpose(1, 2) for shape in shapes]
    return [tensor.detach().requires_grad_() for tensor in made]


def error_of(attend: Any, request: Any) -> float | str:
    """What :mod:`preftune.kernels.attention.check` measures, or what was raised."""
    from preftune.kernels.attention import check

    try:
        return float(f"{max(check.kernel_errors(request, attend)):.2e}")
    except Exception as failure:
        return f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"


def check_varlen(result: Result, dry: bool, left: Callable[[], float]) -> None:
    """The variable-length kernel, forward and backward."""
    from preftune.kernels.attention import AttentionSpec, sdpa, varlen
    from preftune.kernels.attention.check import Request

    device = device_of(dry)
    attend: Any = sdpa.attend if dry else varlen.attend
    for dtype in (torch.float32,) if dry else (torch.bfloat16, torch.float16):
        for heads, groups, size in HEADS[:3] if dry else HEADS:
            for windowed in (False, True):
                window = 4096 if windowed else None
                request = Request(
                    "varlen", device, dtype, heads, groups, size, size, size**-0.5, window, None, sinks=False
                )
                name = f"{str(dtype)[6:]} heads {heads}/{groups} size {size}{' window' if windowed else ''}"
                result[name] = error_of(attend, request)
    layout = layout_of(2, 20, 10) if dry else layout_of(64, 128, 64)
    spec = AttentionSpec(128**-0.5)
    inputs = drawn(device, layout, 32, 8, 128, torch.float32 if dry else torch.bfloat16)
    plan = varlen.make_plan(layout, device)
    options = () if dry else (plan,)
    out = attend(*inputs, layout, spec, *options)
    grad = torch.randn_like(out)
    result["layer of 8B"] = {
        "row_tokens": layout.num_tokens,
        "plan_ms": milliseconds(device, lambda: varlen.make_plan(layout, device), 5, 1),
        "forward_ms": milliseconds(device, lambda: attend(*inputs, layout, spec, *options), 5, 2),
        "backward_ms": milliseconds(
            device, lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True), 2 if dry else 5, 1
        ),
    }


def check_flex(result: Result, dry: bool, left: Callable[[], float]) -> None:
    """FlexAttention: numbers, seconds of compilation, compilations for further rows, the mask of a long row."""
    from preftune.kernels.attention import AttentionSpec, flex, reference
    from preftune.kernels.attention.check import Request

    device = device_of(dry)
    attend = reference.attend if dry else flex.attend
    for name, (dtype, heads, groups, size, softcap, windowed, sinks) in FLEX.items():
        if left() < 240 and not dry:
            result[name] = "left out for want of time"
            continue
        used, window = torch.float32 if dry else getattr(torch, dtype), 4096 if windowed else None
        request = Request("flex", device, used, heads, groups, size, size, size**-0.5, window, softcap, sinks)
        start = time.perf_counter()
        result[name] = {"error": error_of(attend, request), "first_s": round(time.perf_counter() - start, 1)}
    layout = layout_of(8, 100, 50) if dry else layout_of(512, 128, 64)
    long: Result = {"tokens": layout.num_tokens}
    with peak_memory(device, long):
        long["ms"] = milliseconds(device, lambda: flex.make_mask(layout, None, device), 3, 1)
    result["block mask"] = long
    if not dry:
        from torch._dynamo.utils import counters

        # As a run goes on, rows differ in length and number of pairs alone.
        before = counters["stats"]["unique_graphs"]
        for seed in (1, 2, 3):
            row = layout_of(5 + seed, 50, 35, seed)
            flex.attend(*drawn(device, row, 14, 2, 64, torch.float32), row, AttentionSpec(0.125))  # type: ignore[call-arg, arg-type]
        result["compilations for three further rows"] = counters["stats"]["unique_graphs"] - before


def check_head(result: Result, dry: bool, left: Callable[[], float]) -> None:
    """The head: numbers against fp64, then time and memory with this device's tiles, a CPU's, and TRL's kernel."""
    from preftune.kernels import head

    device = device_of(dry)
    dtype = torch.float32 if dry else torch.bfloat16
    for trained in (False, True):
        result[f"error, {'trained' if trained else 'frozen'}"] = _head_error(device, dtype, trained)
    for vocab, hidden, tokens in ((3000, 64, 128),) if dry else HEAD_SHAPES:
        for trained in (False, True):
            name = f"V {vocab:,} H {hidden:,} {tokens:,} tokens {'trained' if trained else 'frozen'}"
            if left() < 200 and not dry:
                result[name] = "left out for want of time"
                continue
            for tiles, most in (("", head.MOST_TILE_ELEMENTS), (", a CPU's tiles", head.TILE_ELEMENTS)):
                kept, head.MOST_TILE_ELEMENTS = head.MOST_TILE_ELEMENTS, most
                try:
                    result[name + tiles] = _head_time(device, dtype, vocab, hidden, tokens, trained, "preftune")
                finally:
                    head.MOST_TILE_ELEMENTS = kept
            result[f"{name}, TRL"] = _head_time(device, dtype, vocab, hidden, tokens, trained, "trl")


def _head_error(device: torch.device, dtype: torch.dtype, trained: bool) -> Result:
    from preftune.kernels.head import token_scores

    torch.manual_seed(0)
    vocab, size, tokens = 8192, 256, 300
    hidden = torch.randn(tokens, size).to(dtype)
    weight = (torch.randn(vocab, size) * size**-0.5).to(dtype)
    targets = torch.randint(0, vocab, (tokens,))
    scale = torch.randn(tokens)
    found: list[list[Tensor]] = []
    for place, kind in ((device, dtype), (torch.device("cpu"), torch.float64)):
        h = hidden.detach().to(place, kind).requires_grad_()
        w = weight.detach().to(place, kind).requires_grad_(trained)
        if kind == torch.float64:
            logps = torch.log_softmax(h @ w.T, -1).gather(1, targets[:, None])[:, 0]
        else:
            logps = token_scores(h, w, None, targets.to(place)).logps
        (logps * scale.to(place, logps.dtype)).sum().backward()
        found.append([each.detach().cpu().double() for each in (logps, h.grad, w.grad) if each is not None])
    names = ("values", "hidden", "weight")
    pairs = zip(names, *found, strict=False)
    return {name: float(f"{float((a - b).norm() / b.norm()):.2e}") for name, a, b in pairs}


def _head_time(
    device: torch.device, dtype: torch.dtype, vocab: int, size: int, tokens: int, trained: bool, whose: str
) -> Result | str:
    from preftune.kernels.head import token_scores

    torch.manual_seed(0)
    hidden = (torch.randn(tokens, size, device=device) / 8).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, size, device=device) * size**-0.5).requires_grad_(trained)
    targets = torch.randint(0, vocab, (tokens,), device=device)
    if whose == "trl":
        try:
            from trl.kernels import ChunkedLogProbFunction
        except ImportError as missing:
            return f"not installed ({missing})"

        outputs = ("log_probs", "entropy", "mean_logits", "is_top1")

        def scored() -> Tensor:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32):
                out = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, outputs)
            logps: Tensor = out[0]
            return logps
    else:

        def scored() -> Tensor:
            return token_scores(hidden, weight, None, targets, compute_dtype=dtype).logps

    def run() -> None:
        hidden.grad = weight.grad = None
        (scored().sum() / tokens).backward()

    result: Result = {}
    try:
        with peak_memory(device, result):
            result["ms"] = milliseconds(device, run, 3, 1)
    except Exception as failure:
        return f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
    return result
