"""The tiled head against whole logits in fp64, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from preftune.kernels import head
from preftune.kernels.head import HeadTransform, scores_from_logits, token_scores

TRANSFORMS = [HeadTransform(), HeadTransform(0.25), HeadTransform(1.0, 3.0), HeadTransform(0.5, 2.0)]


def oracle(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, t: HeadTransform
) -> tuple[Tensor, Tensor]:
    logits = (hidden.double() @ weight.double().T + (0 if bias is None else bias.double())) * t.scale
    if t.softcap is not None:
        logits = t.softcap * torch.tanh(logits / t.softcap)
    return logits - torch.logsumexp(logits, -1, keepdim=True), logits


def case(num: int, dtype: torch.dtype, with_bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(num, 12, dtype=dtype, requires_grad=True)
    weight = torch.randn(37, 12, dtype=dtype, requires_grad=True)
    bias = torch.randn(37, dtype=dtype, requires_grad=True) if with_bias else None
    return hidden, weight, bias, torch.randint(0, 37, (num,))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("num", [0, 1, 5, 23])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("keep", [0, 1 << 20])
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, transform: HeadTransform, num: int, with_bias: bool, trainable: bool, keep: int
) -> None:
    monkeypatch.setattr(head, "TILE_ELEMENTS", 37 * 4)  # four tokens a tile: tiles and an odd rest
    hidden, weight, bias, targets = case(num, torch.float64, with_bias)
    if not trainable:
        weight.requires_grad_(False)
        if bias is not None:
            bias.requires_grad_(False)
    wanted: dict[str, Any] = {"with_stats": True, "with_log_sum_sq": True, "with_tail": True}
    got = token_scores(hidden, weight, bias, targets, transform, **wanted, keep_bytes=keep)
    logp, logits = oracle(hidden, weight, bias, targets, transform)
    expected = logp.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(got.logps, expected, atol=1e-10, rtol=1e-10)
    if num:
        torch.testing.assert_close(got.entropy, -(logp.exp() * logp).sum(-1).detach(), atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(got.mean_logit, logits.mean(-1).detach(), atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(got.log_sum_sq, torch.log((2 * logp).exp().sum(-1)).detach(), atol=1e-10, rtol=1e-10)
        p = logp.exp().detach()
        tails = [sum(x for x in row.tolist() if x <= row[t]) for row, t in zip(p, targets.tolist(), strict=True)]
        torch.testing.assert_close(got.tail, torch.tensor(tails, dtype=torch.float64), atol=1e-10, rtol=1e-10)
        assert got.top1 is not None
        assert torch.equal(got.top1, logits.argmax(-1) == targets)
    scale = torch.randn(num, dtype=torch.float64)
    wanted_inputs = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    for g, w in zip(
        torch.autograd.grad((got.logps * scale).sum(), wanted_inputs),
        torch.autograd.grad((expected * scale).sum(), wanted_inputs),
        strict=True,
    ):
        torch.testing.assert_close(g, w, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("keep", [0, 1 << 20])
def test_bf16_gradient_of_a_confident_token_keeps_its_digits(keep: int) -> None:
    """Where p is near one, 1 - p has to come from the exact log-prob: rounding p to bf16 first loses all of it."""
    hidden = torch.zeros(1, 2, requires_grad=True)
    with torch.no_grad():
        hidden[0, 0] = 8.0
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    out = token_scores(hidden, weight, None, torch.tensor([0]), compute_dtype=torch.bfloat16, keep_bytes=keep)
    out.logps.sum().backward()
    exact = 1 / (1 + torch.exp(torch.tensor(8.0)))
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad[0, 0], exact, rtol=1e-2, atol=0)


@pytest.mark.parametrize(("trainable", "keep"), [(False, 0), (True, 0), (True, 1 << 30)])
def test_fp32_keeps_its_digits_in_a_large_vocabulary(trainable: bool, keep: int) -> None:
    """A few likely tokens and thousands of unlikely ones: added up one after another, the unlikely ones get lost."""
    torch.manual_seed(0)
    hidden = torch.randn(48, 64, requires_grad=True)
    # Embeddings of trained models have a part in common, which is what an error of the sum moves along.
    weight = (0.4 * torch.randn(50_000, 64) + 0.1 * torch.randn(64)).requires_grad_(trainable)
    bias = torch.zeros(50_000)
    bias[:10] = 8.0
    targets = torch.randint(0, 50_000, (48,))
    inputs = (hidden, weight) if trainable else (hidden,)
    expected = oracle(hidden, weight, bias, targets, HeadTransform())[0].gather(1, targets[:, None])[:, 0]
    wanted = torch.autograd.grad(expected.sum(), inputs)
    for got in (
        token_scores(hidden, weight, bias, targets, keep_bytes=keep).logps,
        scores_from_logits(hidden @ weight.T + bias, targets).logps,
    ):
        # What logits are rounded by has either sign; the mean shows what all tokens have in common.
        assert abs(float((got.double() - expected).mean().detach())) < 4e-7
        for mine, its in zip(torch.autograd.grad(got.sum(), inputs), wanted, strict=True):
            assert float((mine - its).norm() / its.norm()) < 1e-6
    with torch.no_grad():
        again = token_scores(hidden, weight, bias, targets).logps
    assert torch.equal(again, token_scores(hidden, weight, bias, targets, keep_bytes=keep).logps)


def test_fp32_keeps_the_digits_of_a_nearly_certain_token() -> None:
    """Its log-prob is far smaller than the logits it comes from."""
    hidden = torch.tensor([[1.0, 0.0]])
    weight = torch.tensor([[30.0, 0.0], [18.0, 0.0], [17.0, 0.0]])
    exact = -torch.log1p(torch.exp(torch.tensor([-12.0, -13.0], dtype=torch.float64)).sum())
    for trainable in (False, True):
        got = token_scores(hidden, weight.clone().requires_grad_(trainable), None, torch.tensor([0])).logps
        torch.testing.assert_close(got[0].double(), exact, rtol=1e-2, atol=0)
    torch.testing.assert_close(
        scores_from_logits(hidden @ weight.T, torch.tensor([0])).logps[0].double(), exact, rtol=1e-2, atol=0
    )


def test_log_softmax_is_fp32_for_half_hidden_states() -> None:
    hidden, weight, _, targets = case(9, torch.float32, False)
    half = token_scores(hidden.to(torch.bfloat16), weight.to(torch.bfloat16), None, targets)
    assert half.logps.dtype == torch.float32


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.full((3, 1), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    out = token_scores(hidden, weight, None, torch.tensor([0, 1, 2]))
    out.logps.sum().backward()
    assert torch.isfinite(out.logps).all()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()
