"""What the probe looks with: a row of short pairs, gradients at the embeddings, distances, the model's own rounding."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from preftune.kernels.device import put
from preftune.models.attention import attention_configs
from preftune.packing import Branch, PackedRow, Tree, build_row

#: Length that sliding windows are cut to, so that sequences as short as the probe's fill them.
SHORT_WINDOW = 4


def has_dropout(base: nn.Module) -> bool:
    """Whether a layer has dropout that it declares, as a module or as a number of its own."""
    numbers = (v for m in base.modules() for k, v in vars(m).items() if "drop" in k and isinstance(v, float))
    return any(m.p > 0 for m in base.modules() if isinstance(m, nn.Dropout)) or any(v > 0 for v in numbers)


def gradient(logps: Tensor, leaf: Tensor, targets: Any) -> Tensor:
    """Gradient of the summed log-probs of some targets with respect to the embeddings, in their shape."""
    weight = torch.from_numpy(np.asarray(targets, dtype=np.float32)).to(logps)
    grad = torch.autograd.grad((logps * weight).sum(), leaf, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(leaf) if grad is None else grad


def by_branch(logps: Tensor, row: PackedRow) -> list[Tensor]:
    """The log-probs of every branch."""
    numbers = put(row.target_branch, logps.device)
    return [logps.detach()[numbers == n] for n in range(int(row.target_branch.max()) + 1)]


def summed(grads: list[Tensor], row: PackedRow) -> Tensor:
    """Gradients of separate sequences, added up where the row holds their tokens."""
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    total = torch.zeros(row.num_tokens, grads[0].shape[-1], dtype=wide, device=grads[0].device)
    for grad, own in zip(grads, sequence_positions(row, total.device), strict=True):
        total[own] += grad.to(wide)
    return total


def distance(got: Tensor, expected: Tensor) -> float:
    """Root mean square over the tokens of the relative differences of their vectors."""
    wide = torch.promote_types(got.dtype, torch.float32)
    got, expected = (each.detach().to(wide) for each in (got, expected))
    if got.dim() == 1:
        return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-30))
    scale = expected.norm(dim=1)
    scale = scale.clamp_min(1e-3 * float(scale.max()) + 1e-30)
    return float(((got - expected).norm(dim=1) / scale).square().mean().sqrt())


def sequence_positions(row: PackedRow, device: torch.device) -> list[Tensor]:
    """Row positions of every sequence ``prefix + branch``."""
    found = []
    for span in row.layout.spans:
        prefix = np.arange(span.start, span.start + span.prefix)
        for start, length in zip(span.branch_starts(), span.branches, strict=True):
            found.append(put(np.concatenate([prefix, np.arange(start, start + length)]), device))
    return found


def middle_targets(row: PackedRow, where: list[Tensor]) -> tuple[Any, Tensor]:
    """The middle one of every branch's targets, and the row positions from it on: it may depend on none of them."""
    middle, later = np.zeros(len(row.target_ids), dtype=bool), []
    for number, own in enumerate(where):
        targets = np.flatnonzero(row.target_branch == number)
        middle[targets[len(targets) // 2]] = True
        later.append(own[len(own) - len(targets) + len(targets) // 2 :])
    return middle, torch.cat(later)


def probe_row(base: Any, seed: int) -> tuple[PackedRow, list[Tree]]:
    """A row of two pairs and a single answer."""
    vocab = int(base.config.get_text_config().vocab_size)
    rng = np.random.default_rng(seed)

    def ids(length: int) -> Any:
        return rng.integers(0, vocab, length)

    # Lengths chosen so that branches differ, one prompt is a single token, and something comes before and after.
    trees, slot = [], 0
    for prefix, lengths in ((7, (6, 10)), (1, (3, 4)), (6, (9,))):
        branches = tuple(Branch(ids(length), slot + n) for n, length in enumerate(lengths))
        slot += len(branches)
        trees.append(Tree(ids(prefix), branches))
    return build_row(trees, range(len(trees))), trees


def num_windowed(base: nn.Module, config: Any) -> int:
    """Layers that the model masks by a sliding window: sequences as short as the probe's never fill one."""
    makes_masks = hasattr(sys.modules.get(type(base).__module__), "create_sliding_window_causal_mask")
    if not makes_masks or getattr(config, "sliding_window", None) is None:
        return 0
    kinds = getattr(config, "layer_types", None)
    return 1 if kinds is None else list(kinds).count("sliding_attention")


@contextmanager
def short_windows(base: nn.Module) -> Iterator[None]:
    """Cut every sliding window to :data:`SHORT_WINDOW`, in the configuration and where layers keep it."""
    holders = [*attention_configs(base), *base.modules()]
    before = [(each, each.sliding_window) for each in holders if _has_window(each)]
    try:
        for holder, _ in before:
            holder.sliding_window = SHORT_WINDOW
        yield
    finally:
        for holder, window in before:
            holder.sliding_window = window


def _has_window(holder: Any) -> bool:
    window = getattr(holder, "sliding_window", None)
    return isinstance(window, int) and not isinstance(window, bool) and window > SHORT_WINDOW


@contextmanager
def embedded(base: Any, jitter: bool = False) -> Iterator[list[Tensor]]:
    """Make the output of the input embeddings a leaf of the graph; with ``jitter``, off by one unit of rounding."""
    leaves: list[Tensor] = []

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        value = output.detach()
        if jitter:
            generator = torch.Generator().manual_seed(0)
            # One value in eight, up or down: as large as rounding all of them to the nearest, in the mean square.
            signs = torch.randint(0, 16, value.shape, generator=generator).to(value.device)
            signs = ((signs == 0).float() - (signs == 1).float()).to(value)
            value = value * (1 + _unit_of_rounding(value.dtype, value.device) * signs)
        leaves.append(value.requires_grad_(True))
        return leaves[-1]

    handle = base.get_input_embeddings().register_forward_hook(hook)
    try:
        yield leaves
    finally:
        handle.remove()


def _unit_of_rounding(dtype: torch.dtype, device: torch.device) -> float:
    """The relative rounding of what a model computes: of its dtype, or of its products where they keep fewer digits."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 64, generator=generator).to(device, dtype) for _ in range(2))
    exact = left.cpu().double() @ right.cpu().double()
    # TF32 rounds what goes into a product, and says so nowhere. Three times the mean error is about one unit.
    of_products = 3 * float(((left @ right).cpu().double() - exact).norm() / exact.norm())
    # Norms and rotary embeddings compute in fp32 even where the weights are fp64.
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps, of_products)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient: those of the embeddings are all that is looked at."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
