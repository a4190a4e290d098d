"""A backend is used only where it works: failures of any kind, wrong masks, head sizes that a kernel lacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from preftune.kernels.attention import AttentionSpec, RowContext, attend, check, flex, reference, sdpa, varlen
from preftune.kernels.attention.check import Request
from preftune.packing import RowLayout, TreeSpan
from tests.emulation import accelerator, varlen_kernel

LAYOUT = RowLayout((TreeSpan(0, 5, (4, 7)), TreeSpan(16, 3, (2, 6))))


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    check.forget()
    yield
    check.forget()


def tensors(size: int = 16, heads: int = 4, groups: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, n, LAYOUT.num_tokens, size, dtype=dtype) for n in (heads, groups, groups)]


def judged(attend: Any, **spec: Any) -> bool:
    query, _, value = tensors()
    return check.works(Request.of("tried", query, value, AttentionSpec(0.25, **spec)), attend)


def emulated(q: Tensor, k: Tensor, v: Tensor, layout: RowLayout, spec: AttentionSpec) -> Tensor:
    return varlen.attend(q, k, v, layout, spec, kernel=varlen_kernel)


@pytest.mark.parametrize("spec", [{}, {"window": 4}])
def test_a_right_backend_works(spec: dict[str, Any]) -> None:
    assert judged(emulated, **spec)


@pytest.mark.parametrize("spec", [{"softcap": 2.0}, {"sinks": torch.zeros(4)}, {"softcap": 1.0, "window": 9}])
def test_caps_and_sinks_are_tried_too(spec: dict[str, Any]) -> None:
    assert judged(reference.attend, **spec)
    check.forget()
    with pytest.warns(UserWarning, match="computes other"):
        assert not judged(sdpa.attend, **spec)  # leaves them out


def aligned_at_the_start(q: Tensor, k: Tensor, v: Tensor, plan: Any, scale: float, window: int | None) -> Tensor:
    """The other reading of a causal mask where there are fewer queries than keys."""
    swapped = varlen.VarlenPlan(
        plan.gather, plan.first, plan.second, plan.cu_query, plan.cu_key, plan.max_query, plan.max_key
    )
    lengths = plan.cu_query.diff()
    begin = plan.cu_key[:-1]
    index = torch.cat([torch.arange(int(b), int(b + n)) for b, n in zip(begin, lengths, strict=True)])
    object.__setattr__(swapped, "cu_key", plan.cu_query)
    return varlen_kernel(q, k[index], v[index], swapped, scale, window)


def in_half_the_window(q: Tensor, k: Tensor, v: Tensor, plan: Any, scale: float, window: int | None) -> Tensor:
    return varlen_kernel(q, k, v, plan, scale, None if window is None else window - 1)


def with_wrong_gradients(q: Tensor, k: Tensor, v: Tensor, plan: Any, scale: float, window: int | None) -> Tensor:
    return varlen_kernel(q, k.detach() + (k - k.detach()) * 0.9, v, plan, scale, window)


@pytest.mark.parametrize("kernel", [aligned_at_the_start, with_wrong_gradients])
def test_wrong_numbers_are_seen(kernel: Any) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, layout: RowLayout, spec: AttentionSpec) -> Tensor:
        return varlen.attend(q, k, v, layout, spec, kernel=kernel)

    with pytest.warns(UserWarning, match="'tried' does not work on cpu and is not used: it computes other"):
        assert not judged(attend)


def test_windows_that_fail_cost_windowed_layers_alone() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, layout: RowLayout, spec: AttentionSpec) -> Tensor:
        return varlen.attend(q, k, v, layout, spec, kernel=in_half_the_window)

    assert judged(attend)
    with pytest.warns(UserWarning, match="computes other"):
        assert not judged(attend, window=4)
    assert judged(attend)


FAILURES = [
    ValueError("head_dim"),
    AssertionError("alignment"),
    AttributeError("no such kernel"),
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    NotImplementedError("window"),
    ImportError("no varlen"),
    TypeError("signature"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda each: type(each).__name__)
def test_whatever_a_kernel_raises_is_said_once_and_no_crash(failure: Exception) -> None:
    calls: list[int] = []

    def attend(*_: Any) -> Tensor:
        calls.append(1)
        raise failure

    with pytest.warns(UserWarning, match=type(failure).__name__):
        assert not judged(attend)
    # Any further warning would be an error.
    assert not judged(attend)
    assert not judged(attend, window=3)
    assert len(calls) == 2


def test_lack_of_memory_is_no_verdict() -> None:
    def attend(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        judged(attend)
    assert judged(emulated)


def test_the_trial_leaves_no_trace_in_what_the_caller_does() -> None:
    """Inside autocast, inference and recomputation, whose counts of saved tensors must agree."""
    x = torch.randn(3, 4, requires_grad=True)
    seen: list[bool] = []

    def attend(*arguments: Any) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled())
        return emulated(*arguments)

    def layer(x: Tensor) -> Tensor:
        assert judged(attend)
        return (x * x).sin()

    tensors()  # which every trial here draws from the same seed
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    check.forget()
    with torch.no_grad():
        assert judged(attend)
    assert seen
    assert not any(seen)
    assert torch.equal(torch.get_rng_state(), state)


# ---- selection on an accelerator ------------------------------------------------------------------------------------


def plain_attention(inputs: list[Tensor]) -> Tensor:
    query, key, value = inputs
    return reference.attend(query, key, value, LAYOUT, AttentionSpec(0.25))


def on_device(device: Any, size: int, dtype: torch.dtype, context: RowContext, spec: AttentionSpec) -> Tensor:
    far = [each.to(device.place) for each in tensors(size, dtype=dtype)]
    return attend(far[0], far[1], far[2], context, spec)


def broken_flex(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def kernel(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError(message)

    monkeypatch.setattr(flex, "_kernel", lambda device_type: kernel)
    # Made by torch.vmap, which looks under the emulation.
    monkeypatch.setattr(flex, "make_mask", lambda *_: object())


@pytest.mark.parametrize(
    ("size", "expected"), [(64, "varlen"), (80, "varlen"), (256, "varlen"), (100, "sdpa"), (264, "sdpa")]
)
def test_head_sizes(monkeypatch: pytest.MonkeyPatch, size: int, expected: str) -> None:
    monkeypatch.setattr(varlen, "call_kernel", varlen_kernel)
    broken_flex(monkeypatch, "Failed to find C compiler")
    with accelerator(monkeypatch) as device:
        context = RowContext(LAYOUT)
        if expected == "sdpa":
            with pytest.warns(UserWarning, match="'flex' does not work on cuda:0 and is not used: .*C compiler"):
                on_device(device, size, torch.bfloat16, context, AttentionSpec(0.1))
        else:
            on_device(device, size, torch.bfloat16, context, AttentionSpec(0.1))
    assert context.used == {expected}


@pytest.mark.parametrize("message", ["Failed to find C compiler", "GPUTooOldForTriton", "InductorError: ptxas fatal"])
def test_without_a_compiler_fp32_takes_sdpa_and_unusual_layers_the_plain_path(
    monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    broken_flex(monkeypatch, message)
    with accelerator(monkeypatch) as device:
        context = RowContext(LAYOUT)
        with pytest.warns(UserWarning, match=message):
            out = on_device(device, 16, torch.float32, context, AttentionSpec(0.25))
        # Any further warning would be an error.
        on_device(device, 16, torch.float32, context, AttentionSpec(0.25, window=3))
        assert context.used == {"sdpa"}
        on_device(device, 16, torch.float32, context, AttentionSpec(0.25, softcap=2.0))
        assert context.used == {"sdpa", "reference"}
        expected = plain_attention(tensors())
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_varlen_that_fails_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*_: Any) -> Tensor:
        raise ValueError("no kernel image is available for execution on the device")

    monkeypatch.setattr(varlen, "call_kernel", kernel)
    broken_flex(monkeypatch, "Failed to find C compiler")
    with accelerator(monkeypatch) as device:
        context = RowContext(LAYOUT)
        with pytest.warns(UserWarning, match="does not work"):
            on_device(device, 64, torch.float16, context, AttentionSpec(0.125))
    assert context.used == {"sdpa"}
