"""The start-up probe: what it must catch, on small random models, and what it must not mind."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from preftune.kernels.attention import check, check_kernel, cpu, reference, sdpa
from preftune.kernels.attention.check import Request
from preftune.kernels.attention.select import function_of
from preftune.models.packing_probe import probe
from tests.models import broken
from tests.models.tiny import tiny_model

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

DTYPES = [torch.float32, torch.bfloat16]
WINDOWED = {"head_dim": 8, "sliding_window": 40}


def half_autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.thin(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", broken.OF_ATTENTION)
def test_faults_of_the_attention_are_named(name: str, dtype: torch.dtype) -> None:
    model = broken.sharpened(tiny_model("LlamaConfig"), 8.0).to(dtype)
    function, words = broken.OF_ATTENTION[name]
    with broken.attending(function):
        verdict = probe(model)
    assert not verdict.ok
    if dtype == torch.float32:
        assert words in verdict.reason
    assert ("mixes" in verdict.reason) is (name in ("foreign key", "other answer", "future token"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", broken.OF_LAYERS)
def test_faults_of_the_layers_are_named(name: str, dtype: torch.dtype) -> None:
    model = broken.sharpened(tiny_model("LlamaConfig"), 8.0).to(dtype)
    function, words = broken.OF_LAYERS[name]
    with broken.hooked(model, function):
        verdict = probe(model)
    assert not verdict.ok
    if dtype == torch.float32:
        assert words in verdict.reason


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", ["LlamaConfig", "GPT2Config"])
@pytest.mark.parametrize("name", broken.OF_POSITIONS)
def test_wrong_positions_are_found(name: str, config: str, dtype: torch.dtype) -> None:
    sizes = {"n_layer": 2, "n_head": 4} if config == "GPT2Config" else {}
    model = broken.sharpened(tiny_model(config, **sizes), 8.0).to(dtype)
    with broken.OF_POSITIONS[name]():
        verdict = probe(model)
    assert not verdict.ok
    assert "wrong positions" in verdict.reason


@pytest.mark.parametrize("config", ["LlamaConfig", "GPT2Config"])
def test_positions_that_the_model_ignores_are_found(config: str) -> None:
    sizes = {"n_layer": 2, "n_head": 4} if config == "GPT2Config" else {}
    model = broken.sharpened(tiny_model(config, **sizes), 8.0)
    with broken.ignoring_positions():
        verdict = probe(model)
    assert not verdict.ok
    assert "on packed rows (they differ by" in verdict.reason


@pytest.mark.thin(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", [broken.window_off_by_one, broken.window_ignored])
@pytest.mark.parametrize("config", ["MistralConfig", "Gemma3TextConfig", "Qwen3Config"])
def test_windows_longer_than_the_probe_are_tried(config: str, fault: Any, dtype: torch.dtype) -> None:
    more: dict[str, Any] = {"use_sliding_window": True, "max_window_layers": 1} if config == "Qwen3Config" else {}
    model = broken.sharpened(tiny_model(config, **WINDOWED, **more), 8.0).to(dtype)
    verdict = probe(model)
    assert verdict.ok, verdict.reason
    with broken.attending(fault):
        verdict = probe(model)
    assert not verdict.ok
    windows = {m.sliding_window for m in model.modules() if getattr(m, "sliding_window", None) is not None}
    assert windows <= {40}
    assert model.config.sliding_window == 40


@pytest.mark.parametrize(
    ("config", "fault", "sizes"),
    [
        (
            "Gemma2Config",
            broken.cap_dropped,
            {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5},
        ),
        ("GptOssConfig", broken.sinks_dropped, {"head_dim": 8, "num_local_experts": 4}),
        ("Qwen2Config", broken.wrong_groups, {}),
        ("GraniteConfig", broken.wrong_scale, {"attention_multiplier": 0.7}),
    ],
)
def test_parts_of_a_request_that_are_dropped_are_found(config: str, fault: Any, sizes: dict[str, Any]) -> None:
    model = broken.sharpened(tiny_model(config, **sizes), 8.0)
    verdict = probe(model)
    assert verdict.ok, verdict.reason
    with broken.attending(fault):
        assert not probe(model).ok


# ---- kernels by themselves ------------------------------------------------------------------------------------------

PLAIN = Request("sdpa", torch.device("cpu"), torch.float32, 4, 2, 16, 16, 0.25, None, None, False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cpu", "sdpa", "reference"])
def test_kernels_pass(backend: str, dtype: torch.dtype) -> None:
    for heads in ((4, 4), (4, 2), (6, 1)):
        for size in (8, 100, 256):
            request = replace(PLAIN, backend=backend, dtype=dtype, num_heads=heads[0], num_key_heads=heads[1],
                              head_dim=size, value_dim=size, scale=size**-0.5)  # fmt: skip
            assert check_kernel(request) is None
            if backend != "cpu":
                assert check_kernel(replace(request, window=4)) is None
    if backend == "reference":
        for more in ({"softcap": 30.0}, {"sinks": True}, {"softcap": 50.0, "window": 3, "sinks": True}):
            assert check_kernel(replace(PLAIN, backend=backend, dtype=dtype, **more)) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["window", "softcap", "sinks", "groups", "key", "gradient"])
def test_a_wrong_kernel_is_named(part: str, dtype: torch.dtype) -> None:
    request = replace(PLAIN, dtype=dtype, window=4 if part == "window" else None)
    request = replace(request, softcap=50.0 if part == "softcap" else None, sinks=part == "sinks")
    request = request if part != "gradient" else replace(request, backend="cpu")

    def wrong(query: Any, key: Any, value: Any, layout: Any, spec: Any) -> Any:
        if part == "key":
            return broken.dense(query, key, value, layout, spec, extra=((20, 0),))
        if part == "groups":
            return broken.dense(query, key, value, layout, spec, tiled=True)
        if part == "gradient":
            return broken.dense(query, key.detach() / 2 + key / 2, value, layout, spec)
        return reference.attend(query, key, value, layout, replace(spec, **{part: None}))

    target = cpu if part == "gradient" else sdpa
    with mock.patch.object(target, "attend", wrong), mock.patch.object(target, "supports", return_value=True):
        found = check_kernel(request)
    assert found is not None
    if part != "softcap":
        assert ("gradients" if part == "gradient" else "other values") in found
    assert found.startswith(f"the {request.backend} kernel")


def test_a_kernel_that_fails_is_no_traceback() -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no compiler\nfound")

    with mock.patch.object(sdpa, "attend", fails):
        found = check_kernel(PLAIN)
    assert found is not None
    assert "fails with RuntimeError: no compiler found" in found


def test_the_probe_checks_the_kernels_that_served() -> None:
    true = cpu.attend

    def wrong(query: Any, key: Any, value: Any, layout: Any, spec: Any) -> Any:
        return true(query, key, value, layout, spec) * (1 if query.dtype == torch.float32 else 1.5)

    with mock.patch.object(cpu, "attend", wrong):
        assert probe(tiny_model("LlamaConfig")).ok
        verdict = probe(tiny_model("LlamaConfig"), autocast=half_autocast)
    assert not verdict.ok
    assert "the cpu kernel computes other values than asked for (bfloat16, 4:2 heads of 8)" in verdict.reason


def test_the_tolerance_of_kernels_lies_between_rounding_and_faults() -> None:
    errors = [
        max(check.kernel_errors(replace(PLAIN, dtype=torch.bfloat16, num_heads=heads), function_of(backend)))
        for heads in (2, 4, 8)
        for backend in ("cpu", "sdpa", "reference")
    ]
    assert 0 < max(errors) < check.TOLERANCE / 3


# ---- what must not be refused ---------------------------------------------------------------------------------------


@pytest.mark.thin(5)
@pytest.mark.parametrize("seed", range(20))
def test_rounding_is_no_reason(seed: int) -> None:
    torch.manual_seed(seed)
    model = tiny_model("Qwen3Config", head_dim=8)
    for way, autocast in ((torch.float32, nullcontext), (torch.float32, half_autocast), (torch.bfloat16, nullcontext)):
        verdict = probe(model.to(way), autocast=autocast, seed=seed)
        assert verdict.ok, verdict.reason


@pytest.mark.thin(1)
@pytest.mark.parametrize("config", ["LlamaConfig", "Qwen2Config", "Gemma2Config", "GPT2Config", "MixtralConfig"])
def test_products_that_round_their_inputs_are_no_reason(config: str) -> None:
    sizes: dict[str, dict[str, Any]] = {
        "Gemma2Config": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 40},
        "GPT2Config": {"n_layer": 2, "n_head": 4},
        "MixtralConfig": {"num_local_experts": 4},
    }
    model = tiny_model(config, **sizes.get(config, {}))
    with broken.RoundedInputs():  # type: ignore[no-untyped-call]
        for seed in range(5):
            verdict = probe(model, seed=seed)
            assert verdict.ok, verdict.reason
        with broken.attending(broken.other_answer):
            assert "other answer" in probe(model).reason
    model = broken.sharpened(model, 8.0)
    with broken.RoundedInputs(), broken.positions_off_by_one():  # type: ignore[no-untyped-call]
        assert not probe(model).ok


def test_weights_without_gradient_stay_so_and_hooks_are_gone() -> None:
    model = tiny_model("LlamaConfig").train()
    model.model.norm.weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    probe(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert not model.get_input_embeddings()._forward_hooks
    assert model.training


def test_a_model_whose_values_are_not_finite_is_not_said_to_mix() -> None:
    model = tiny_model("LlamaConfig")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    verdict = probe(model)
    assert not verdict.ok
    assert "not finite" in verdict.reason
    assert "mixes" not in verdict.reason


def test_randomness_that_no_dropout_declares_is_found() -> None:
    model = tiny_model("LlamaConfig")

    def forgotten(hidden: Any) -> Any:
        return torch.dropout(hidden, 0.1, model.training)

    with broken.hooked(model, forgotten):
        verdict = probe(model)
    assert not verdict.ok
    assert "is random in training" in verdict.reason
    model.model.layers[0].dropout = torch.nn.Dropout(0.1)
    with broken.hooked(model, forgotten):
        assert probe(model).ok  # declared, outside the attention: the user's choice
