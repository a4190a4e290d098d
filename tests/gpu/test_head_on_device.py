"""The head on an accelerator: few operations, bounded memory, tiles that the free memory allows, TF32."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from preftune.kernels import device as device_module
from preftune.kernels import head
from preftune.kernels.attention import AttentionSpec, reference, sdpa
from preftune.kernels.device import put, put_together, wide_dtype, widened
from preftune.kernels.head import keep_bytes_on, tile_elements, token_scores, working_bytes
from preftune.packing import RowLayout, TreeSpan
from tests.emulation import TF32, Device, FarTensor, tf32

CUDA = torch.device("cuda", 0)
GIB = 1 << 30
#: Operations that start no kernel.
_FREE = (
    "view",
    "detach",
    "t",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "empty",
    "expand",
    "alias",
    "permute",
    "split",
)


class Watch(TorchDispatchMode):
    """Counts kernels, and the bytes that live tensors hold at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: Counter[str] = Counter()
        self.live = self.peak = 0
        self._holders: Counter[int] = Counter()
        self._bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name.rstrip("_") not in _FREE and not name.startswith(("empty", "new_empty")):
            self.kernels[name] += 1
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, FarTensor):
                self.hold(tensor)
        return out

    def hold(self, tensor: FarTensor) -> None:
        """Count the memory of a tensor for as long as the tensor lives, once for all views of it."""
        storage = tensor.near.untyped_storage()
        key = storage._cdata
        if not self._holders[key]:
            self._bytes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        self._holders[key] += 1
        weakref.finalize(tensor, self._release, key)

    def _release(self, key: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            self.live -= self._bytes.pop(key)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Free memory that the emulated device says it has."""
    told = {"bytes": 100 * GIB}
    monkeypatch.setattr(head, "free_bytes", lambda device: told["bytes"])
    return told


def scored(tokens: int, vocab: int, size: int, trained: bool) -> Watch:
    """Forward and backward of a head in bf16 with fp32 weights, without any memory."""
    with Device("cuda", "meta") as device:
        hidden = torch.empty(tokens, size, dtype=torch.bfloat16, device=device.place).requires_grad_()
        weight = torch.empty(vocab, size, device=device.place).requires_grad_(trained)
        targets = torch.zeros(tokens, dtype=torch.long, device=device.place)
        watch = Watch()
        with watch:
            logps = token_scores(hidden, weight, None, targets, compute_dtype=torch.bfloat16).logps
            logps.sum().backward()
    return watch


@pytest.mark.parametrize("trained", [False, True])
def test_2000_targets_of_a_vocabulary_of_128k_take_at_most_40_kernels(free: dict[str, int], trained: bool) -> None:
    watch = scored(2000, 128_256, 2048, trained)
    assert sum(watch.kernels.values()) <= 40, watch.kernels
    # Logits, and the gradients of what is trained: no product twice.
    assert watch.kernels["mm"] == (3 if trained else 2)


def test_a_cpu_sized_tile_would_take_thousands(free: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound above can fail."""
    monkeypatch.setattr(head, "tile_elements", lambda device, free: head.TILE_ELEMENTS)
    assert sum(scored(2000, 128_256, 2048, True).kernels.values()) > 600


@pytest.mark.parametrize(("vocab", "size"), [(151_936, 4096), (128_256, 4096), (128_256, 2048)])
def test_8192_tokens_take_at_most_6_gib(free: dict[str, int], vocab: int, size: int) -> None:
    watch = scored(8192, vocab, size, True)
    # At least what is kept and the gradient in fp32: the count is no constant.
    assert 2 * 8192 * vocab + 4 * vocab * size <= watch.peak <= 6 * GIB, watch.peak / GIB


@pytest.mark.parametrize("gib", [2, 8, 24, 80])
def test_tiles_follow_the_free_memory(gib: int) -> None:
    elements = tile_elements(CUDA, gib * GIB)
    assert head.TILE_ELEMENTS <= elements <= head.MOST_TILE_ELEMENTS
    assert working_bytes(10**6, 128_256, 2, 0, CUDA, gib * GIB) <= 0.26 * gib * GIB
    assert keep_bytes_on(CUDA, gib * GIB) <= 0.26 * gib * GIB


def test_a_cpu_keeps_its_tiles_whatever_is_free() -> None:
    cpu = torch.device("cpu")
    assert {tile_elements(cpu, free) for free in (None, 0, GIB, 100 * GIB)} == {1 << 22}
    assert {keep_bytes_on(cpu, free) for free in (None, 0, 100 * GIB)} == {1 << 28}


def test_runs_that_are_to_be_equal_do_not_look_at_the_free_memory(free: dict[str, int]) -> None:
    found = []
    for gib in (2, 100):
        free["bytes"] = gib * GIB
        torch.use_deterministic_algorithms(True)
        try:
            found.append(scored(1000, 128_256, 64, True).kernels)
        finally:
            torch.use_deterministic_algorithms(False)
    assert found[0] == found[1]
    free["bytes"] = 100 * GIB
    assert scored(1000, 128_256, 64, True).kernels != found[0]


def test_a_second_backward_through_the_head_is_right() -> None:
    """Kept probabilities are written over by the first."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    logps = token_scores(hidden, weight, None, torch.arange(5)).logps
    first = torch.autograd.grad(logps.sum(), [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(logps.sum(), [hidden, weight])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---- TF32 -----------------------------------------------------------------------------------------------------------


def test_tf32_rounds_to_ten_bits() -> None:
    values = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-12, -3.0 - 2**-9])
    expected = torch.tensor([1.0, 1 + 2**-10, 1.0, 1 + 2**-9, 1.0, -3.0 - 2**-9])
    assert torch.equal(tf32(values), expected)
    assert tf32(values.double()).dtype == torch.float64


def test_head_and_attention_under_tf32_are_as_exact_as_their_inputs() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 64, requires_grad=True), torch.randn(300, 64, requires_grad=True)
    targets = torch.randint(0, 300, (40,))
    expected = torch.log_softmax(hidden.double() @ weight.double().T, -1).gather(1, targets[:, None])[:, 0]
    with TF32():
        got = token_scores(hidden, weight, None, targets).logps
        grads = torch.autograd.grad(got.sum(), [hidden, weight])
    wanted = torch.autograd.grad(expected.sum(), [hidden, weight])
    for mine, theirs in zip([got, *grads], [expected, *wanted], strict=True):
        error = float((mine.detach().double() - theirs.detach()).norm() / theirs.detach().norm())
        assert 1e-6 < error < 2e-3  # seen, and no more than ten bits leave
    layout = RowLayout((TreeSpan(0, 5, (4, 7)),))
    query, key, value = (torch.randn(1, 2, 16, 8, dtype=torch.float64) for _ in range(3))
    spec = AttentionSpec(8**-0.5)
    with TF32():
        near = sdpa.attend(query.float(), key.float(), value.float(), layout, spec)
    exact = reference.attend(query, key, value, layout, spec)
    assert float((near.double() - exact).norm() / exact.norm()) < 2e-3


# ---- getting there --------------------------------------------------------------------------------------------------


def test_numbers_arrive_in_the_dtype_that_the_device_knows() -> None:
    cpu, mps = torch.device("cpu"), torch.device("mps")
    assert (wide_dtype(cpu), wide_dtype(mps), wide_dtype(CUDA)) == (torch.float64, torch.float32, torch.float64)
    assert widened(torch.zeros(2)).dtype == torch.float64
    assert put([1.5, 2.0], cpu).dtype == torch.float64
    assert put([1, 2], cpu, torch.float32).dtype == torch.float32
    assert put(3.0, cpu).shape == ()
    assert put([True, False], cpu).dtype == torch.bool
    first, second = put_together([[1, 2], [3]], cpu)
    assert (first.tolist(), second.tolist()) == ([1, 2], [3])
    assert device_module._allowed(torch.float64, mps) == torch.float32
