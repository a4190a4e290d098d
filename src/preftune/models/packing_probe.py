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

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from preftune.kernels.attention import check_kernel
from preftune.models.forward import RowForward
from preftune.models.gate import Verdict
from preftune.models.head import base_model
from preftune.models.probe_parts import (
    by_branch,
    distance,
    embedded,
    frozen,
    gradient,
    has_dropout,
    middle_targets,
    num_windowed,
    probe_row,
    sequence_positions,
    short_windows,
    summed,
)
from preftune.packing import PackedRow, Tree, build_row

#: How often the model's own rounding the packed row may differ from separate sequences. The largest ratio that rounding
#: alone showed is 3 (docs/design.md); what is computed wrongly showed 20 and more.
ROUNDING_FACTOR = 5.0
#: The same for values that must not change at all, where experts see the row as a whole.
LEAK_FACTOR = 2.0
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
        with frozen(model):
            packed = RowForward.of(model, packed=True, backend=backend, pad_token_id=pad_token_id)
            probing = _Probe(model, packed, autocast)
            found = probing.run(seed)
            if probing.windows:
                with short_windows(base):
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
        row, trees = probe_row(self.base, seed)
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
            row, trees = probe_row(self.base, seed + 1000 * (attempt + 1))
            expected = self._separate(row)
        raise AssertionError

    # ---- exact questions ------------------------------------------------------------------------------------------

    def _check_graph(self, row: PackedRow, expected: list[Tensor]) -> None:
        """What reaches a branch's log-probs: nothing foreign, nothing later, and all that reaches them otherwise."""
        where = sequence_positions(row, self.device)
        if any((row.position_ids[own.cpu().numpy()] != np.arange(len(own))).any() for own in where):
            raise _Fault("is given wrong positions on packed rows (a token's differs from its place in its sequence)")
        middle, later = middle_targets(row, where)
        with torch.enable_grad(), self.packed.active(), embedded(self.base) as leaves:
            logps = self.packed(row)[0].logps
            grads = [gradient(logps, leaves[0], row.target_branch == n)[0] for n in range(len(where))]
            of_middle = gradient(logps, leaves[0], middle)[0]
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
        if context.windowed < num_windowed(self.base, config):
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
            max(distance(a, b) for each in others for a, b in zip(each.states[layer], values, strict=True))
            for layer, values in enumerate(expected.states)
        ]
        self._check_values_of_others(row, roundings)
        worst, last = 0.0, len(expected.states) - 1
        for layer, (mine, values, own) in enumerate(zip(got.states, expected.states, roundings, strict=True)):
            step = "log-probs" if layer == last else f"hidden states after layer {layer}" if layer else "embeddings"
            worst = max(worst, _ratio(mine, values, own, step))
        # A prefix's gradient in the row is the sum of those of its branches' sequences.
        sums = [summed(each.grads, row) for each in (expected, *others)]
        own = max(distance(each, sums[0]) for each in sums[1:])
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
                if max(distance(new[n], old[n]) for n in range(kept or 0, len(branches), 2)) > LEAK_FACTOR * own:
                    if kept is None:
                        raise _Fault("computes other values each time, so that nothing can be told")
                    raise _Unclear("mixes sequences in packed rows (values of an answer follow the tokens of another)")

    def _in_row(self, row: PackedRow, *, with_grad: bool = True) -> _Seen:
        # Without autocast, attention is asked for in fp32, which on an accelerator is another kernel, compiled for a
        # minute: there the plain one shows what the model does around it.
        plain = self.device.type != "cpu" and next(self.model.parameters()).dtype == torch.float32
        forward = replace(self.packed, backend="reference") if plain else self.packed
        with torch.set_grad_enabled(with_grad), forward.active(), embedded(self.base) as leaves:
            logps, states = _forward(forward, row)
            grads = [gradient(logps, leaves[0], np.ones(len(row.target_ids)))[0, : row.num_tokens]] if with_grad else []
        where = sequence_positions(row, logps.device)
        return _Seen([*([state[0][own] for own in where] for state in states), by_branch(logps, row)], grads)

    def _separate(self, row: PackedRow, *, jitter: bool = False) -> _Seen:
        lengths = [span.prefix + length for span in row.layout.spans for length in span.branches]
        with torch.enable_grad(), embedded(self.base, jitter) as leaves:
            logps, states = _forward(self.padded, row)
            grad = gradient(logps, leaves[0], np.ones(len(row.target_ids)))
        values = [[state[n, :length] for n, length in enumerate(lengths)] for state in states]
        grads = [grad[n, :length] for n, length in enumerate(lengths)]
        if not all(bool(torch.isfinite(each).all()) for each in (logps, *grads)):
            raise _Fault("computes values that are not finite, so that nothing can be told")
        return _Seen([*values, by_branch(logps, row)], grads)

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
        row, _ = probe_row(self.base, seed)
        with torch.random.fork_rng(devices), torch.no_grad(), self.autocast(), self.packed.active():
            self.model.train()
            first, second = (self.packed(row)[0].logps for _ in range(2))
        if distance(second, first) > 1e-3 and not has_dropout(self.base):
            raise _Fault("is random in training though it declares no dropout, so that nothing can be told")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def _forward(forward: RowForward, row: PackedRow) -> tuple[Tensor, list[Tensor]]:
    """Log-probs, and the hidden states before and after every layer as far as the model gives them."""
    scores, output = forward(row, extra={"output_hidden_states": True})
    states = getattr(output, "hidden_states", None) or ()
    return scores.logps, [each.detach() for each in states if isinstance(each, Tensor) and each.dim() == 3]


def _ratio(got: list[Tensor], expected: list[Tensor], own: float, what: str) -> float:
    """How often the model's own rounding the packed values differ, over the sequence where they do most."""
    found = max(distance(a, b) for a, b in zip(got, expected, strict=True))
    ratio = found / max(own, 1e-30)
    if not ratio <= ROUNDING_FACTOR:
        raise _Unclear(
            f"computes other {what} on packed rows (they differ by {found:.0e}, its own rounding is {own:.0e})"
        )
    return ratio


def _whose(row: PackedRow, own: Tensor, position: int) -> str:
    trees, _ = row.layout.tree_and_branch()
    if trees[position] == trees[int(own[-1])]:
        return "a log-prob depends on tokens of the other answer"
    return f"a log-prob depends on tokens of {'a later' if position > int(own[-1]) else 'an earlier'} pair"
