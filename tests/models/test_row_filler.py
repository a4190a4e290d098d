"""Rows of half precision are filled up on the CPU; what fills them must not be felt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from preftune.kernels.head import TokenScores, token_scores
from preftune.models import forward as forward_module
from preftune.models.forward import ROW_MULTIPLE, RowForward
from preftune.packing import PackedRow, build_row, pair_trees
from preftune.training.memory import activation_bytes_per_token


def _model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def _row() -> PackedRow:
    ids = np.random.default_rng(0).integers(0, 61, 60)
    pairs = [(ids[:9], ids[9:20], ids[20:26]), (ids[26:40], ids[40:43], ids[43:60])]
    return build_row([tree for n, pair in enumerate(pairs) for tree in pair_trees(*pair, None, (2 * n, 2 * n + 1))])


def _run(model: Any, half: bool, row_multiple: int = ROW_MULTIPLE) -> tuple[int, torch.Tensor, dict[str, torch.Tensor]]:
    """Tokens that the model computed, the log-probs, and the gradients of their weighted sum."""
    widths: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda *call: widths.append(call[-1].shape[1]))
    forward = replace(RowForward.of(model, packed=True), row_multiple=row_multiple)
    widths.clear()
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=half), forward.active():
        logps = forward(_row())[0].logps
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    hook.remove()
    return widths[0], logps.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_row_of_half_precision_is_filled_and_the_numbers_stay() -> None:
    model = _model()
    width, logps, grads = _run(model, half=True)
    assert width == ROW_MULTIPLE
    width, expected, expected_grads = _run(model, half=True, row_multiple=1)
    assert width == 60
    torch.testing.assert_close(logps, expected, rtol=1e-3, atol=1e-3)
    for name, grad in grads.items():
        scale = float(expected_grads[name].abs().max())
        # Two bf16 roundings of the largest entry.
        assert float((grad - expected_grads[name]).abs().max()) <= 2**-7 * scale, name


@pytest.mark.parametrize("half", [True, False])
def test_the_head_scores_filled_up_targets_and_returns_the_true_ones(
    half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []

    def recording(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> TokenScores:
        scored.append(len(hidden))
        return token_scores(hidden, *args, **kwargs)

    monkeypatch.setattr(forward_module, "token_scores", recording)
    model = _model()
    forward = RowForward.of(model, packed=True)
    scored.clear()
    row = _row()
    with torch.autocast("cpu", torch.bfloat16, enabled=half), forward.active():
        scores = forward(row, with_stats=True, with_log_sum_sq=True, with_tail=True)[0]
    number = 11 + 6 + 3 + 17
    assert scored == [ROW_MULTIPLE if half else number]
    assert {len(column) for column in vars(scores).values()} == {number}


def test_a_row_of_full_precision_stays_as_it_is() -> None:
    assert _run(_model(), half=False)[0] == 60


def test_activations_are_counted_in_half_precision_too() -> None:
    forward = RowForward.of(_model(), packed=True)

    def per_token(half: bool) -> float:
        return activation_bytes_per_token(forward, lambda: torch.autocast("cpu", torch.bfloat16, enabled=half))

    # Two layers keep at least their inputs and the MLP's three products, and half precision no more than full.
    assert per_token(False) > 2 * 4 * (32 + 3 * 48)
    assert per_token(False) >= per_token(True) > 0.4 * per_token(False)
