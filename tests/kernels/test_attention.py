"""Every attention backend against plain attention over the separate sequences."""

from __future__ import annotations

import math
import random
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from preftune.errors import ConfigError
from preftune.kernels.attention import AttentionSpec, RowContext, attend, cpu, flex, reference, sdpa, varlen
from preftune.packing import RowLayout, TreeSpan
from tests.emulation import varlen_kernel

LAYOUTS: dict[str, list[tuple[int, tuple[int, ...]]]] = {
    "pair": [(5, (4, 7))],
    "pairs": [(5, (4, 7)), (1, (1, 1)), (9, (2, 33))],
    "single branches": [(3, (4,)), (0, (6,))],
    "no prefix": [(0, (6,)), (0, (1,))],
    "four branches": [(6, (2, 5, 1, 3))],
    "long": [(130, (70, 65))],
}


def layout_of(name: str) -> RowLayout:
    spans, start = [], 0
    for prefix, branches in LAYOUTS[name]:
        spans.append(TreeSpan(start, prefix, branches))
        start += spans[-1].num_tokens
    return RowLayout(tuple(spans))


def tensors(layout: RowLayout, heads: int, groups: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    count = layout.num_tokens
    shapes = [(1, heads, count, dim), (1, heads // groups, count, dim), (1, heads // groups, count, dim)]
    # Strided as a model's projections leave them: tokens before heads in memory.
    made = [torch.randn(s[0], s[2], s[1], s[3], dtype=dtype).transpose(1, 2) for s in shapes]
    query, key, value = (t.detach().requires_grad_(True) for t in made)
    return query, key, value


def separate(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, spec: AttentionSpec) -> Tensor:
    """An oracle of its own: token by token, softmax over an explicit list of visible keys, in fp64."""
    query, key, value = (t.double() for t in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    rows = []
    for span in layout.spans:
        prefix = list(range(span.start, span.start + span.prefix))
        sequences = [prefix + list(range(s, s + n)) for s, n in zip(span.branch_starts(), span.branches, strict=True)]
        for number, sequence in enumerate(sequences):
            begin = 0 if number == 0 else span.prefix
            for place in range(begin, len(sequence)):
                least = 0 if spec.window is None else max(0, place - spec.window + 1)
                seen = sequence[least : place + 1]
                heads = []
                for head in range(query.shape[1]):
                    q, k, v = (
                        query[0, head, sequence[place]],
                        key[0, head // groups, seen],
                        value[0, head // groups, seen],
                    )
                    score = (k @ q) * spec.scale
                    if spec.softcap is not None:
                        score = spec.softcap * torch.tanh(score / spec.softcap)
                    top = torch.cat([score, spec.sinks[head : head + 1].double()]) if spec.sinks is not None else score
                    weight = torch.exp(score - torch.logsumexp(top, 0))
                    heads.append(weight @ v)
                rows.append(torch.stack(heads))
    return torch.stack(rows).unsqueeze(0)


SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 4},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 3, "softcap": 1.5, "sinks": True},
}


def spec_of(name: str, heads: int, dim: int) -> AttentionSpec:
    options: dict[str, Any] = dict(SPECS[name])
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-1, 1, heads)
    return AttentionSpec(scale=1 / math.sqrt(dim), **options)


def check(function: Any, layout: RowLayout, spec: AttentionSpec, groups: int, dtype: torch.dtype, tol: float) -> None:
    inputs = tensors(layout, 4, groups, 16, dtype)
    out = function(*inputs, layout, spec)
    expected = separate(*inputs, layout, spec)
    assert out.shape == expected.shape == (1, layout.num_tokens, 4, 16)
    torch.testing.assert_close(out.double(), expected, atol=tol, rtol=tol)
    grad = torch.randn_like(expected)
    got = torch.autograd.grad(out, inputs, grad.to(out.dtype))
    wanted = torch.autograd.grad(expected, inputs, grad)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g.double(), w.double(), atol=10 * tol, rtol=10 * tol)


@pytest.mark.thin(3)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cpu_backend(layout: str, groups: int, dtype: torch.dtype) -> None:
    check(cpu.attend, layout_of(layout), spec_of("plain", 4, 16), groups, dtype, 1e-10 if dtype.itemsize == 8 else 2e-6)


@pytest.mark.parametrize("layout", ["pairs", "long"])
def test_cpu_backend_in_bf16(layout: str) -> None:
    """Half precision: within a few units in the last place (2^-8) of the fp64 oracle."""
    check(cpu.attend, layout_of(layout), spec_of("plain", 4, 16), 2, torch.bfloat16, 1.6e-2)


@pytest.mark.thin(3)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_backend(layout: str, spec: str) -> None:
    check(reference.attend, layout_of(layout), spec_of(spec, 4, 16), 2, torch.float64, 1e-10)


@pytest.mark.parametrize("spec", ["plain", "window"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sdpa_backend(layout: str, spec: str) -> None:
    check(sdpa.attend, layout_of(layout), spec_of(spec, 4, 16), 2, torch.float64, 1e-10)


@pytest.mark.parametrize("spec", ["plain", "window"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_varlen_gathers_and_offsets(layout: str, spec: str) -> None:
    """Everything of the CUDA backend but the kernel, which stands in here by its documented semantics."""

    def function(q: Tensor, k: Tensor, v: Tensor, rows: RowLayout, asked: AttentionSpec) -> Tensor:
        return varlen.attend(q, k, v, rows, asked, kernel=varlen_kernel)

    check(function, layout_of(layout), spec_of(spec, 4, 16), 2, torch.float64, 1e-10)


@pytest.mark.thin(1)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("layout", ["pairs", "four branches"])
def test_flex_forward(layout: str, spec: str) -> None:
    """FlexAttention's mask, cap and sinks; its CPU version has no backward."""
    rows, asked = layout_of(layout), spec_of(spec, 4, 16)
    query, key, value = (t.detach() for t in tensors(rows, 4, 2, 16, torch.float32))
    out = flex.attend(query, key, value, rows, asked)
    torch.testing.assert_close(out.double(), separate(query, key, value, rows, asked), atol=3e-6, rtol=3e-6)


def test_selection_prefers_the_fast_kernel_and_falls_back() -> None:
    layout = layout_of("pairs")
    inputs = tensors(layout, 4, 2, 16, torch.float32)
    context = RowContext(layout)
    attend(*inputs, context, spec_of("plain", 4, 16))
    attend(*inputs, context, spec_of("window", 4, 16))
    attend(*inputs, context, spec_of("softcap", 4, 16))
    assert context.calls == 3
    assert context.used == {"cpu", "sdpa", "reference"}


def test_a_backend_asked_for_by_name_must_fit() -> None:
    layout = layout_of("pairs")
    inputs = tensors(layout, 4, 2, 16, torch.float32)
    with pytest.raises(ConfigError, match="attention_backend"):
        attend(*inputs, RowContext(layout, "cpu"), spec_of("softcap", 4, 16))
    with pytest.raises(ConfigError, match="varlen"):
        attend(*inputs, RowContext(layout, "nonsense"), spec_of("plain", 4, 16))


def test_mask_of_the_row_is_that_of_the_separate_sequences() -> None:
    layout = layout_of("pairs")
    count = layout.num_tokens
    visible = flex.mask_function(layout, None, torch.device("cpu"))
    index = torch.arange(count)
    mask = visible(index, index, index[:, None], index[None, :]).numpy()
    expected = np.zeros((count, count), dtype=bool)
    for span in layout.spans:
        prefix = list(range(span.start, span.start + span.prefix))
        for start, length in zip(span.branch_starts(), span.branches, strict=True):
            sequence = prefix + list(range(start, start + length))
            for place, q in enumerate(sequence):
                expected[q, sequence[: place + 1]] = True
    assert (mask == expected).all()


@pytest.mark.parametrize("window", [None, 1, 5, 100, 400])
@pytest.mark.parametrize("seed", range(12))
def test_block_mask_from_the_layout_is_that_of_all_pairs_of_tokens(seed: int, window: int | None) -> None:
    """Against FlexAttention's own builder, full blocks and the lists for the backward included."""
    from torch.nn.attention.flex_attention import create_block_mask

    draw = random.Random(seed)
    spans: list[TreeSpan] = []
    for _ in range(draw.randint(1, 8)):
        longest = draw.choice([3, 40, 200, 500])
        start = sum(span.num_tokens for span in spans)
        branches = tuple(draw.randint(1, longest) for _ in range(draw.randint(1, 3)))
        spans.append(TreeSpan(start, draw.choice([0, 1, draw.randint(0, longest)]), branches))
    layout, cpu = RowLayout(tuple(spans)), torch.device("cpu")
    size = layout.num_tokens
    made = flex.make_mask(layout, window, cpu)
    expected = create_block_mask(flex.mask_function(layout, window, cpu), None, None, size, size, device="cpu")
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks"):
        assert torch.equal(getattr(made, name), getattr(expected, name)), name
    assert torch.equal(made.to_dense(), expected.to_dense())


def test_block_mask_of_a_long_row_takes_little_memory() -> None:
    """A row of 131,072 tokens: 17 GB as a mask of tokens."""
    layout = RowLayout(tuple(TreeSpan(256 * n, 128, (64, 64)) for n in range(512)))
    tracemalloc.start()
    flex.make_mask(layout, None, torch.device("cpu"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6
