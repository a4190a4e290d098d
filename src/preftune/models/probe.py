"""Whether a model computes on packed rows what it computes on separate sequences, found out by running it.

The questions are exact wherever they can be, because rounding decides nothing about them:

* *Does anything leak?* The gradient of a branch's log-probs with respect to the row's input embeddings is zero, to the
  bit, outside the branch and its prefix; that of a log-prob is zero after its token.
* *Is anything missing?* It is not zero where that of the separate sequence is not.
* *Does the attention kernel compute what it is asked for?* The kernels that served are compared with the plain
  reference, on inputs where every part of the request (window, soft cap, sinks, grouped heads) changes the result by
  far more than half precision rounds.

What is left (positions, scaling, a window that the model means differently) shows in the values, layer by layer. There
the yardstick is the model's own rounding: how far two ways of batching separate sequences differ in the same layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from preftune.kernels.attention import check_kernel
from preftune.kernels.device import put
from preftune.models.attention import attention_configs
from preftune.models.forward import RowForward
from preftune.models.gate import Verdict
from preftune.models.head import base_model
from preftune.packing import Branch, PackedRow, Tree, build_row

#: How often the model's own rounding the packed row may differ from separate sequences. The largest ratio that rounding
#: alone showed is 3 (docs/design.md); what is computed wrongly showed 20 and more.
ROUNDING_FACTOR = 5.0
#: The same for values that must not change at all, where experts see the row as a whole.
LEAK_FACTOR = 2.0
#: Length that sliding windows are cut to, so that sequences as short as the probe's fill them.
SHORT_WINDOW = 4
#: Rows of other tokens to look at before a difference counts: a router that is undecided between two experts may take
#: the other one for a single token.
ATTEMPTS = 3

Context = Callable[[], AbstractContextManager[Any]]


class _Fault(Exception):
    """What is wrong, in words that follow the model's name."""


class _Unclear(_Fault):
    """A difference in values, which is only believed when other tokens show it too."""


def probe(
    model: nn.Module,
    *,
    backend: str = "auto",
    pad_token_id: int = 0,
    autocast: Context = nullcontext,
    seed: int = 0,
) -> Verdict:
    """Run a row of short pairs packed and as separate sequences, forward and backward, and compare.

    Args:
        model: Policy, possibly wrapped by PEFT; left as it was.
        backend: Attention backend to try.
        pad_token_id: Fills the padded batch.
        autocast: The region that training is going to run in.
        seed: Draws the tokens.
    """
    base = base_model(model)
    name = type(base).__name__
    training = model.training
    model.eval()
    try:
        with _frozen(model):
            packed = RowForward.of(model, packed=True, backend=backend, pad_token_id=pad_token_id)
            probing = _Probe(model, packed, autocast)
            found = probing.run(seed)
            if probing.windows:
                with _short_windows(base):
                    found = max(found, probing.run(seed))
            probing.try_training(seed)
    except _Fault as fault:
        return Verdict(False, f"{name} {fault}")
    except Exception as error:  # any failure of a foreign model means: not packable
        return Verdict(False, f"{name} fails on packed rows ({_one_line(error)})")
    finally:
        model.train(training)
    return Verdict(
        True, f"{name} passes the probe (nothing leaks; values differ by {found:.1f} times its own rounding)"
    )


@dataclass
class _Seen:
    """What one way of computing gave, in the order of the row's sequences.

    Attributes:
        states: For every layer, the hidden states of each sequence, ``(tokens, H)``; last the log-probs, ``(tokens,)``.
        grads: For every sequence, the gradient of its summed log-probs with respect to its input embeddings,
            ``(tokens, H)``; of packed rows, of all log-probs together.
    """

    states: list[list[Tensor]]
    grads: list[Tensor]


class _Probe:
    def __init__(self, model: nn.Module, packed: RowForward, autocast: Context) -> None:
        self.model = model
        self.base = base_model(model)
        self.packed = packed
        self.padded = replace(packed, packed=False)
        self.autocast = autocast
        self.device = next(model.parameters()).device
        self.windows: set[int] = set()

    def run(self, seed: int) -> float:
        """All questions once. Returns how often the model's own rounding the values differ."""
        row, trees = _probe_row(self.base, seed)
        expected = self._separate(row)
        with self.autocast():
            self._check_graph(row, expected.grads)
        self._check_kernels()
        for attempt in range(ATTEMPTS):
            try:
                return self._compare(row, trees, expected)
            except _Unclear as fault:
                if attempt == ATTEMPTS - 1:
                    raise _Fault(str(fault)) from None
            row, trees = _probe_row(self.base, seed + 1000 * (attempt + 1))
            expected = self._separate(row)
        raise AssertionError

    # ---- exact questions ------------------------------------------------------------------------------------------

    def _check_graph(self, row: PackedRow, expected: list[Tensor]) -> None:
        """What reaches a branch's log-probs: nothing foreign, nothing later, and all that reaches them otherwise."""
        where = _where(row, self.device)
        if any((row.position_ids[own.cpu().numpy()] != np.arange(len(own))).any() for own in where):
            raise _Fault("is given wrong positions on packed rows (a token's differs from its place in its sequence)")
        middle, later = _middles(row, where)
        with torch.enable_grad(), self.packed.active(), _embedded(self.base) as leaves:
            logps = self.packed(row)[0].logps
            grads = [_grad(logps, leaves[0], row.target_branch == n)[0] for n in range(len(where))]
            of_middle = _grad(logps, leaves[0], middle)[0]
        self._check_calls()
        for grad, own, alone in zip(grads, where, expected, strict=True):
            if not bool(torch.isfinite(grad).all()):
                raise _Fault("has gradients on packed rows that are not finite, so that nothing can be told")
            reached = grad[: row.num_tokens].abs().amax(-1)
            foreign = reached.clone()
            foreign[own] = 0
            if bool(foreign.any()):
                raise _Fault(f"mixes sequences in packed rows ({_whose(row, own, int(foreign.argmax()))})")
            needed = alone.float().norm(dim=-1)
            if bool(((reached[own] == 0) & (needed > 1e-3 * needed.max())).any()):
                raise _Fault("loses gradient in packed rows (a token that a log-prob depends on gets none)")
        if bool(of_middle[later].any()):
            raise _Fault("mixes tokens in packed rows (a log-prob depends on its own token or later ones)")

    def _check_calls(self) -> None:
        config = self.base.config.get_text_config()
        context, layers = self.packed.last_context, int(config.num_hidden_layers)
        if context.calls != layers:
            raise _Fault(f"attends {context.calls} times in {layers} layers on packed rows")
        if context.windowed < _num_windowed(self.base, config):
            raise _Fault("has a sliding window that it does not tell its attention of")
        self.windows |= {each.window for each in context.requests if each.window is not None}

    def _check_kernels(self) -> None:
        for request in sorted(self.packed.last_context.requests, key=str):
            wrong = check_kernel(request)
            if wrong is not None:
                raise _Fault(f"has attention that packed rows cannot use: {wrong}")

    # ---- values ---------------------------------------------------------------------------------------------------

    def _compare(self, row: PackedRow, trees: list[Tree], expected: _Seen) -> float:
        """Hidden states, log-probs and gradients, packed and separate. Returns the largest ratio to the rounding."""
        got = self._in_row(row)
        others = [self._in_groups(row, trees), self._separate(row, jitter=True)]
        roundings = [
            max(_distance(a, b) for each in others for a, b in zip(each.states[layer], values, strict=True))
            for layer, values in enumerate(expected.states)
        ]
        self._check_values_of_others(row, roundings)
        worst, last = 0.0, len(expected.states) - 1
        for layer, (mine, values, own) in enumerate(zip(got.states, expected.states, roundings, strict=True)):
            step = "log-probs" if layer == last else f"hidden states after layer {layer}" if layer else "embeddings"
            worst = max(worst, _ratio(mine, values, own, step))
        # A prefix's gradient in the row is the sum of those of its branches' sequences.
        sums = [_summed(each.grads, row) for each in (expected, *others)]
        own = max(_distance(each, sums[0]) for each in sums[1:])
        return max(worst, _ratio(got.grads, sums[:1], own, "gradients"))

    def _check_values_of_others(self, row: PackedRow, roundings: list[float]) -> None:
        """Change every other branch's tokens: what stays must keep its values, whatever gradients say.

        They are the same to the bit, except where experts take their tokens from all of the row at once.
        """
        spans = row.layout.spans
        branches = [(n, k) for span in spans for n, k in zip(span.branch_starts(), span.branches, strict=True)]
        before = self._in_row(row, with_grad=False)
        for kept in (None, 0, 1):
            ids = row.input_ids.copy()
            for number, (start, length) in enumerate(branches):
                if kept is not None and number % 2 != kept:
                    ids[start : start + length] = np.roll(ids[start : start + length], 1)
            after = self._in_row(replace(row, input_ids=ids), with_grad=False)
            for old, new, own in zip(before.states[:-1], after.states[:-1], roundings, strict=False):
                if max(_distance(new[n], old[n]) for n in range(kept or 0, len(branches), 2)) > LEAK_FACTOR * own:
                    if kept is None:
                        raise _Fault("computes other values each time, so that nothing can be told")
                    raise _Unclear("mixes sequences in packed rows (values of an answer follow the tokens of another)")

    def _in_row(self, row: PackedRow, *, with_grad: bool = True) -> _Seen:
        # Without autocast, attention is asked for in fp32, which on an accelerator is another kernel, compiled for a
        # minute: there the plain one shows what the model does around it.
        plain = self.device.type != "cpu" and next(self.model.parameters()).dtype == torch.float32
        forward = replace(self.packed, backend="reference") if plain else self.packed
        with torch.set_grad_enabled(with_grad), forward.active(), _embedded(self.base) as leaves:
            logps, states = _forward(forward, row)
            grads = [_grad(logps, leaves[0], np.ones(len(row.target_ids)))[0, : row.num_tokens]] if with_grad else []
        where = _where(row, logps.device)
        return _Seen([*([state[0][own] for own in where] for state in states), _by_branch(logps, row)], grads)

    def _separate(self, row: PackedRow, *, jitter: bool = False) -> _Seen:
        lengths = [span.prefix + length for span in row.layout.spans for length in span.branches]
        with torch.enable_grad(), _embedded(self.base, jitter) as leaves:
            logps, states = _forward(self.padded, row)
            grad = _grad(logps, leaves[0], np.ones(len(row.target_ids)))
        values = [[state[n, :length] for n, length in enumerate(lengths)] for state in states]
        grads = [grad[n, :length] for n, length in enumerate(lengths)]
        if not all(bool(torch.isfinite(each).all()) for each in (logps, *grads)):
            raise _Fault("computes values that are not finite, so that nothing can be told")
        return _Seen([*values, _by_branch(logps, row)], grads)

    def _in_groups(self, row: PackedRow, trees: list[Tree]) -> _Seen:
        """The same sequences in two batches, so that other sequences are beside them."""
        alone = [Tree(tree.prefix, (branch,)) for tree in trees for branch in tree.branches]
        first, second = (self._separate(build_row(alone[start::2])) for start in (0, 1))

        def woven(one: list[Tensor], two: list[Tensor]) -> list[Tensor]:
            return [(one, two)[n % 2][n // 2] for n in range(len(alone))]

        states = [woven(*each) for each in zip(first.states, second.states, strict=True)]
        return _Seen(states, woven(first.grads, second.grads))

    def try_training(self, seed: int) -> None:
        """Run a row as in training, where an attention may turn out to have dropout; no random number is used up."""
        devices = [self.device] if self.device.type == "cuda" else []
        row, _ = _probe_row(self.base, seed)
        with torch.random.fork_rng(devices), torch.no_grad(), self.autocast(), self.packed.active():
            self.model.train()
            first, second = (self.packed(row)[0].logps for _ in range(2))
        if _distance(second, first) > 1e-3 and not _has_dropout(self.base):
            raise _Fault("is random in training though it declares no dropout, so that nothing can be told")


def _has_dropout(base: nn.Module) -> bool:
    """Whether a layer has dropout that it declares, as a module or as a number of its own."""
    numbers = (v for m in base.modules() for k, v in vars(m).items() if "drop" in k and isinstance(v, float))
    return any(m.p > 0 for m in base.modules() if isinstance(m, nn.Dropout)) or any(v > 0 for v in numbers)


def _forward(forward: RowForward, row: PackedRow) -> tuple[Tensor, list[Tensor]]:
    """Log-probs, and the hidden states before and after every layer as far as the model gives them."""
    scores, output = forward(row, extra={"output_hidden_states": True})
    states = getattr(output, "hidden_states", None) or ()
    return scores.logps, [each.detach() for each in states if isinstance(each, Tensor) and each.dim() == 3]


def _grad(logps: Tensor, leaf: Tensor, targets: Any) -> Tensor:
    """Gradient of the summed log-probs of some targets with respect to the embeddings, in their shape."""
    weight = torch.from_numpy(np.asarray(targets, dtype=np.float32)).to(logps)
    grad = torch.autograd.grad((logps * weight).sum(), leaf, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(leaf) if grad is None else grad


def _by_branch(logps: Tensor, row: PackedRow) -> list[Tensor]:
    numbers = put(row.target_branch, logps.device)
    return [logps.detach()[numbers == n] for n in range(int(row.target_branch.max()) + 1)]


def _summed(grads: list[Tensor], row: PackedRow) -> Tensor:
    """Gradients of separate sequences, added up where the row holds their tokens."""
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    total = torch.zeros(row.num_tokens, grads[0].shape[-1], dtype=wide, device=grads[0].device)
    for grad, own in zip(grads, _where(row, total.device), strict=True):
        total[own] += grad.to(wide)
    return total


def _ratio(got: list[Tensor], expected: list[Tensor], own: float, what: str) -> float:
    """How often the model's own rounding the packed values differ, over the sequence where they do most."""
    found = max(_distance(a, b) for a, b in zip(got, expected, strict=True))
    ratio = found / max(own, 1e-30)
    if not ratio <= ROUNDING_FACTOR:
        raise _Unclear(
            f"computes other {what} on packed rows (they differ by {found:.0e}, its own rounding is {own:.0e})"
        )
    return ratio


def _distance(got: Tensor, expected: Tensor) -> float:
    """Root mean square over the tokens of the relative differences of their vectors."""
    wide = torch.promote_types(got.dtype, torch.float32)
    got, expected = (each.detach().to(wide) for each in (got, expected))
    if got.dim() == 1:
        return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-30))
    scale = expected.norm(dim=1)
    scale = scale.clamp_min(1e-3 * float(scale.max()) + 1e-30)
    return float(((got - expected).norm(dim=1) / scale).square().mean().sqrt())


def _where(row: PackedRow, device: torch.device) -> list[Tensor]:
    """Row positions of every sequence ``prefix + branch``."""
    found = []
    for span in row.layout.spans:
        prefix = np.arange(span.start, span.start + span.prefix)
        for start, length in zip(span.branch_starts(), span.branches, strict=True):
            found.append(put(np.concatenate([prefix, np.arange(start, start + length)]), device))
    return found


def _middles(row: PackedRow, where: list[Tensor]) -> tuple[Any, Tensor]:
    """The middle one of every branch's targets, and the row positions from it on: it may depend on none of them."""
    middle, later = np.zeros(len(row.target_ids), dtype=bool), []
    for number, own in enumerate(where):
        targets = np.flatnonzero(row.target_branch == number)
        middle[targets[len(targets) // 2]] = True
        later.append(own[len(own) - len(targets) + len(targets) // 2 :])
    return middle, torch.cat(later)


def _whose(row: PackedRow, own: Tensor, position: int) -> str:
    trees, _ = row.layout.tree_and_branch()
    if trees[position] == trees[int(own[-1])]:
        return "a log-prob depends on tokens of the other answer"
    return f"a log-prob depends on tokens of {'a later' if position > int(own[-1]) else 'an earlier'} pair"


def _probe_row(base: Any, seed: int) -> tuple[PackedRow, list[Tree]]:
    """A row of two pairs and a single answer."""
    vocab = int(base.config.get_text_config().vocab_size)
    rng = np.random.default_rng(seed)

    def ids(length: int) -> Any:
        return rng.integers(0, vocab, length)

    # Lengths chosen so that branches differ, one prompt is a single token, and something stands before and behind.
    trees, slot = [], 0
    for prefix, lengths in ((7, (6, 10)), (1, (3, 4)), (6, (9,))):
        branches = tuple(Branch(ids(length), slot + n) for n, length in enumerate(lengths))
        slot += len(branches)
        trees.append(Tree(ids(prefix), branches))
    return build_row(trees, range(len(trees))), trees


def _num_windowed(base: nn.Module, config: Any) -> int:
    """Layers that the model masks by a sliding window: sequences as short as the probe's never fill one."""
    makes_masks = hasattr(sys.modules.get(type(base).__module__), "create_sliding_window_causal_mask")
    if not makes_masks or getattr(config, "sliding_window", None) is None:
        return 0
    kinds = getattr(config, "layer_types", None)
    return 1 if kinds is None else list(kinds).count("sliding_attention")


@contextmanager
def _short_windows(base: nn.Module) -> Iterator[None]:
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
def _embedded(base: Any, jitter: bool = False) -> Iterator[list[Tensor]]:
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
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient: those of the embeddings are all that is looked at."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"
