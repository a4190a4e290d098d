"""Per-token log-probs from hidden states without ever holding the logits of a batch.

The head's matmul, the soft cap and the log-softmax run over tiles of tokens. What is kept for the backward depends on
the head:

* frozen (LoRA): the gradient of a token's log-prob with respect to its hidden state, ``(onehot - p) @ W``, is computed
  in the forward, where the tile's probabilities are at hand, and only scaled in the backward: no recomputation;
* trainable: the probabilities in the compute dtype, while they fit a memory budget; else the tile is recomputed.

Every tile reads the whole head, and a trained head's gradient is as large as the head: on an accelerator tiles are as
large as its memory allows, on a CPU as its caches do.

Legend: N scored tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from preftune.kernels.device import free_bytes

#: Elements of one tile of logits on a CPU. About 16 MiB in fp32: large enough for the matmul, small enough for the
#: caches.
TILE_ELEMENTS = 1 << 22
#: The same on an accelerator with enough free memory: beyond it reading the head costs less than the products.
MOST_TILE_ELEMENTS = 1 << 28
#: The same on an accelerator that does not say how much memory is free, and where runs are to be repeated bit by bit.
PLAIN_TILE_ELEMENTS = 1 << 26
#: Memory of one tile at its peak on an accelerator, per element: logits and probabilities, in half precision and fp32.
_BYTES_PER_ELEMENT = 12
#: Probabilities of a trainable head are kept for the backward up to this many bytes per row, else recomputed. On an
#: accelerator up to a quarter of the free memory.
KEEP_BYTES = 1 << 28
_CPU = torch.device("cpu")
#: Share of the free memory that a tile may take, and kept probabilities may.
_SHARE = 0.25


def tile_elements(device: torch.device, free: int | None) -> int:
    """Elements of one tile of logits.

    Args:
        device: Where the head lies.
        free: Free memory of the device in bytes, or ``None`` where it is unknown.
    """
    if device.type == "cpu":
        return TILE_ELEMENTS
    if free is None:
        return PLAIN_TILE_ELEMENTS
    return max(TILE_ELEMENTS, min(MOST_TILE_ELEMENTS, int(free * _SHARE) // _BYTES_PER_ELEMENT))


def keep_bytes_on(device: torch.device, free: int | None) -> int:
    """Bytes of probabilities that a trained head may keep for its backward; arguments as :func:`tile_elements`."""
    return KEEP_BYTES if device.type == "cpu" or free is None else int(free * _SHARE)


def _free(device: torch.device) -> int | None:
    # Another size of the tiles rounds otherwise: runs that are to be equal must not depend on what memory is free.
    if device.type == "cpu" or torch.are_deterministic_algorithms_enabled():
        return None
    return free_bytes(device)


@dataclass(frozen=True)
class HeadTransform:
    """What a model does to the output ``z`` of its head: ``scale * z``, then ``softcap * tanh(. / softcap)``.

    Attributes:
        scale: Factor on the head's output.
        softcap: Bound of the logits; ``None`` for none.
    """

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, z: Tensor) -> Tensor:
        """Logits from the head's output, in place where possible; ``z`` must not be needed afterwards."""
        if self.scale != 1.0:
            z = z.mul_(self.scale)
        if self.softcap is not None:
            z = z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def backward_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Turn a gradient with respect to ``logits`` into one with respect to the head's output, in place."""
        if self.softcap is not None:
            grad.mul_(1 - (logits / self.softcap).square_())
        return grad.mul_(self.scale) if self.scale != 1.0 else grad


@dataclass(frozen=True)
class TokenScores:
    """Scores of ``N`` tokens, each ``(N,)``; the optional ones carry no gradient.

    Attributes:
        logps: Log-prob of each token, at least fp32.
        entropy: Entropy of the predicted distribution, in nats.
        mean_logit: Mean of the logits over the vocabulary.
        top1: Whether the token is the most probable one.
        log_sum_sq: ``log sum_v p_v^2``, the log of the probability that two draws agree (used by WPO).
        tail: Total probability of all tokens that are no more likely than this one, ``sum of p_v over p_v <= p``. Of
            tokens drawn from the model itself at most a share ``a`` has a tail of ``a`` or less: it is a p-value.
    """

    logps: Tensor
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    top1: Tensor | None = None
    log_sum_sq: Tensor | None = None
    tail: Tensor | None = None

    def first(self, num_tokens: int) -> TokenScores:
        """The scores of the first tokens alone."""
        if num_tokens == len(self.logps):
            return self
        cut: dict[str, Any] = {
            name: None if column is None else column[:num_tokens] for name, column in vars(self).items()
        }
        return TokenScores(**cut)


def token_scores(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: HeadTransform = HeadTransform(),
    *,
    compute_dtype: torch.dtype | None = None,
    with_stats: bool = False,
    with_log_sum_sq: bool = False,
    with_tail: bool = False,
    keep_bytes: int | None = None,
) -> TokenScores:
    """Log-probs of ``targets`` under the head, and their gradients, tile by tile.

    Args:
        hidden: Hidden states that predict the targets, ``(N, H)``.
        weight: Head weight, ``(V, H)``.
        bias: Head bias, ``(V,)``, or ``None``.
        targets: Token ids, ``(N,)``.
        transform: What the model does after the head.
        compute_dtype: Dtype of the matmul; by default that of ``hidden``. Log-softmax is fp32 at least.
        with_stats: Also return entropy, mean logit and top-1.
        with_log_sum_sq: Also return ``log_sum_sq``.
        with_tail: Also return ``tail``.
        keep_bytes: Memory budget for kept probabilities; by default :func:`keep_bytes_on` the device.

    Returns:
        The scores; differentiable in ``logps`` with respect to ``hidden``, ``weight`` and ``bias``.
    """
    dtype = compute_dtype or hidden.dtype
    device = hidden.device
    free = _free(device)
    keep = keep_bytes_on(device, free) if keep_bytes is None else keep_bytes
    budget = _Budget(keep, tile_elements(device, free))
    wanted = _Wanted(with_stats, with_log_sum_sq, with_tail)
    out: tuple[Any, ...] = _TokenScores.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, transform, dtype, wanted, budget, torch.is_grad_enabled()
    )
    return TokenScores(*out)


def scores_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    with_stats: bool = False,
    with_log_sum_sq: bool = False,
    with_tail: bool = False,
) -> TokenScores:
    """Scores from logits that a model insists on computing itself, ``(N, V)``; differentiable in ``logps``."""
    # Not log_softmax, which is less exact on a CPU (see _normalised).
    values = logits.to(torch.promote_types(logits.dtype, torch.float32))
    values = values - values.detach().amax(-1, keepdim=True)
    lse = values.logsumexp(-1, keepdim=True)
    logps = (values.gather(1, targets.unsqueeze(1)) - lse).squeeze(1)
    wanted = _Wanted(with_stats, with_log_sum_sq, with_tail)
    if not wanted:
        return TokenScores(logps)
    with torch.no_grad():
        return TokenScores(logps, *_tile_stats(logits, values - lse, targets, wanted))


@dataclass(frozen=True)
class _Wanted:
    """Which columns of :class:`TokenScores` are asked for, beside the log-probs."""

    stats: bool
    log_sum_sq: bool
    tail: bool

    def __bool__(self) -> bool:
        return self.stats or self.log_sum_sq or self.tail


@dataclass(frozen=True)
class _Budget:
    """Memory for a call: bytes of kept probabilities, elements of one tile of logits."""

    keep_bytes: int
    tile_elements: int

    def tiles(self, num_tokens: int, vocab: int, whole: bool = False) -> list[slice]:
        # A power of two: filled-up numbers of targets then give tiles of few shapes.
        size = num_tokens if whole else 1 << (max(1, self.tile_elements // vocab).bit_length() - 1)
        return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, max(size, 1))]


def _tile_stats(logits: Tensor, logp: Tensor, targets: Tensor, wanted: _Wanted) -> tuple[Tensor | None, ...]:
    entropy = mean_logit = top1 = log_sum_sq = tail = None
    if wanted.stats:
        entropy = -(logp.exp() * logp).nan_to_num_(0.0).sum(-1)
        mean_logit = logits.mean(-1, dtype=logp.dtype)
        top1 = logits.argmax(-1) == targets
    if wanted.log_sum_sq:
        log_sum_sq = torch.logsumexp(2 * logp, -1)
    if wanted.tail:
        # Compared as logits: the same token's probability may differ from itself in the last bit.
        far = logits <= logits.gather(1, targets.unsqueeze(1))
        tail = (logp.exp() * far).sum(-1)
    return entropy, mean_logit, top1, log_sum_sq, tail


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: HeadTransform,
        dtype: torch.dtype,
        wanted: _Wanted,
        budget: _Budget,
        with_grad: bool,
    ) -> tuple[Tensor | None, ...]:
        # Inputs count as needing gradients under no_grad too, where nothing is to be kept for a backward.
        train_head = with_grad and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        frozen_grad = with_grad and ctx.needs_input_grad[0] and not train_head
        h, w = hidden.to(dtype), weight.to(dtype)
        num_tokens, vocab = h.shape[0], w.shape[0]
        keep = train_head and num_tokens * vocab * dtype.itemsize <= budget.keep_bytes and transform.softcap is None
        wide = torch.promote_types(dtype, torch.float32)
        logps = torch.empty(num_tokens, dtype=wide, device=h.device)
        lse = torch.empty_like(logps)
        direction = torch.empty_like(h) if frozen_grad else None
        probs = torch.empty(num_tokens, vocab, dtype=dtype, device=h.device) if keep else None
        stats: list[tuple[Tensor | None, ...]] = []
        for part in budget.tiles(num_tokens, vocab):
            logits = transform.apply(_linear(h[part], w, bias))
            own = probs[part] if probs is not None and dtype == wide else None
            logps[part], lse[part], found = _normalised(logits, targets[part], own, probs is not None or frozen_grad)
            if wanted:
                stats.append(_tile_stats(logits, logits - lse[part].unsqueeze(1), targets[part], wanted))
            if probs is not None and own is None:
                probs[part] = found
            if direction is not None:
                grad = found.neg_()
                grad.scatter_(1, targets[part].unsqueeze(1), -torch.expm1(logps[part]).unsqueeze(1))
                direction[part] = transform.backward_(grad, logits).to(dtype) @ w
        ctx.save_for_backward(h, w, bias, targets, logps, lse, direction)
        # Not among the saved tensors: the backward writes over them, and what moves those to the host would move these.
        ctx.probs = probs
        ctx.transform, ctx.dtypes, ctx.budget = transform, (hidden.dtype, weight.dtype), budget
        columns = [None if column[0] is None else torch.cat(column) for column in zip(*stats, strict=True)]
        extras = columns or [None] * 5
        ctx.mark_non_differentiable(*(extra for extra in extras if extra is not None))
        return (logps, *extras)

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        h, w, bias, targets, logps, lse, direction = ctx.saved_tensors
        # A second backward through the same graph computes them again.
        probs, ctx.probs = ctx.probs, None
        hidden_dtype, weight_dtype = ctx.dtypes
        if direction is not None:
            return ((direction * grad_logps.unsqueeze(1)).to(hidden_dtype), *[None] * 8)
        grad_hidden = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        # Accumulated over tiles in at least fp32: a half-precision sum over many tiles would lose its small terms.
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias, dtype=logps.dtype) if ctx.needs_input_grad[2] else None
        for part in ctx.budget.tiles(h.shape[0], w.shape[0], whole=probs is not None):
            # d logp / d logits = onehot - p; the target's own entry comes from its exact log-prob, since 1 - p loses
            # all digits in half precision where p is near one.
            scale = grad_logps[part].unsqueeze(1)
            own = -torch.expm1(logps[part]).unsqueeze(1) * scale
            if probs is not None:
                grad = probs.mul_(-scale.to(probs.dtype))
                grad.scatter_(1, targets[part].unsqueeze(1), own.to(grad.dtype))
                grad = ctx.transform.backward_(grad, grad)
            else:
                logits = ctx.transform.apply(_linear(h[part], w, bias)).to(lse.dtype)
                grad = torch.exp(logits - lse[part].unsqueeze(1)).mul_(-scale)
                grad.scatter_(1, targets[part].unsqueeze(1), own)
                grad = ctx.transform.backward_(grad, logits)
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=grad_bias.dtype)
            grad = grad.to(h.dtype)
            if grad_hidden is not None:
                torch.mm(grad, w, out=grad_hidden[part])
            if ctx.needs_input_grad[1]:
                grad_weight = _add_outer(grad_weight, grad, h[part], logps.dtype)
        if ctx.needs_input_grad[1] and grad_weight is None:  # no token was scored
            grad_weight = torch.zeros_like(w)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden_dtype),
            None if grad_weight is None else grad_weight.to(weight_dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *[None] * 6,
        )


def _add_outer(total: Tensor | None, grad: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
    if total is None:
        if grad.device.type == "cuda" and grad.dtype != dtype and dtype == torch.float32:
            return torch.mm(grad.t(), h, out_dtype=dtype)
        return (grad.t() @ h).to(dtype)
    if grad.dtype == total.dtype:
        return total.addmm_(grad.t(), h)
    return total.add_(grad.t() @ h)


def working_bytes(
    num_tokens: int,
    vocab: int,
    itemsize: int,
    trained_elements: int = 0,
    device: torch.device = _CPU,
    free: int | None = None,
) -> int:
    """Memory that scoring a row takes at its peak: tiles of fp32 logits and what a trained head keeps.

    Args:
        num_tokens: Scored tokens of the row.
        vocab: V.
        itemsize: Bytes of an element of the compute dtype.
        trained_elements: Elements of the head's matrix where it is trained; its own gradient is formed in fp32 before
            it is added.
        device: Where the head lies.
        free: Free memory of the device, which tiles adapt to.

    Returns:
        Bytes.
    """
    kept = itemsize * num_tokens * vocab if trained_elements else 0
    kept = kept if kept <= keep_bytes_on(device, free) else 0
    per_element = _BYTES_PER_ELEMENT
    if device.type == "cpu":
        # Logits and probabilities in fp32, written where they are kept; of half precision a rounded copy too.
        per_element = itemsize if kept and itemsize >= 4 else 8
    tiles = per_element * min(tile_elements(device, free), max(num_tokens, 1) * vocab)
    return tiles + kept + 4 * trained_elements


def _linear(h: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(h, w, None if bias is None else bias.to(h.dtype))


def _normalised(logits: Tensor, targets: Tensor, out: Tensor | None, with_probs: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the targets and logs of the sums of exponentials, ``(n,)``, and probabilities, ``(n, V)``.

    Args:
        logits: One tile, ``(n, V)``; left as it is.
        targets: Token ids, ``(n,)``.
        out: Where to put the probabilities, in the dtype of the results.
        with_probs: Whether they are needed; else what stands for them is anything.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    chosen = targets.unsqueeze(1)
    if logits.device.type != "cpu":
        logp = torch.log_softmax(logits, -1, dtype=wide)
        logps = logp.gather(1, chosen)
        lse = logits.gather(1, chosen).to(wide) - logps
        probs = torch.exp(logp, out=logp if out is None else out) if with_probs else logp
    else:
        # On a CPU log_softmax adds the exponentials of a row up one after another, which loses digits of fp32 in a
        # vocabulary of 49,152, the same way for every token, and gradients follow. `sum` adds them in pairs.
        peak = logits.amax(-1, keepdim=True).to(wide)
        values = logits.to(wide)
        probs = torch.sub(values, peak, out=out if values is logits else values).exp_()
        total = probs.sum(-1, keepdim=True)
        # Not chosen - lse: where a token is nearly certain, what is left of its log-prob would be rounding.
        logps = logits.gather(1, chosen).to(wide) - peak - total.log()
        lse = peak + total.log()
        if with_probs:
            probs.div_(total)
    return logps.squeeze(1), lse.squeeze(1), probs
