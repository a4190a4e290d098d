"""The start-up probe on trained weights: architectures, dtypes, adapters, roundings; and what it must catch there."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import pretrained
from preftune.models.packing_probe import probe
from tests.models import broken

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


def load(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(pretrained.folder_of(name), dtype=dtype, **more)


def half_autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("name", pretrained.NAMES)
def test_every_architecture_passes_in_fp32_and_under_autocast(name: str) -> None:
    verdict = probe(load(name), autocast=half_autocast)
    assert verdict.ok, verdict.reason


# A CPU takes ten times as long for products of fp16: a third of the layers.
@pytest.mark.parametrize(("dtype", "more"), [(torch.bfloat16, {}), (torch.float16, {"num_hidden_layers": 10})])
def test_half_precision_weights_pass(dtype: torch.dtype, more: dict[str, Any]) -> None:
    verdict = probe(load("smollm2", dtype, **more), seed=1)
    assert verdict.ok, verdict.reason


def test_an_adapter_passes() -> None:
    config = peft.LoraConfig(r=8, task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    verdict = probe(peft.get_peft_model(load("smollm2"), config), autocast=half_autocast, seed=2)
    assert verdict.ok, verdict.reason


def test_rounded_products_pass() -> None:
    with broken.RoundedInputs():  # type: ignore[no-untyped-call]
        verdict = probe(load("mistral-window"), seed=3)
    assert verdict.ok, verdict.reason


@pytest.fixture(scope="module")
def model() -> Any:
    return load("smollm2")


@pytest.mark.parametrize("name", broken.OF_ATTENTION)
def test_faults_of_the_attention_are_named(model: Any, name: str) -> None:
    function, words = broken.OF_ATTENTION[name]
    with broken.attending(function):
        verdict = probe(model)
    assert not verdict.ok
    assert words in verdict.reason


@pytest.mark.parametrize("name", broken.OF_LAYERS)
def test_faults_of_the_layers_are_named(model: Any, name: str) -> None:
    function, words = broken.OF_LAYERS[name]
    with broken.hooked(model, function):
        verdict = probe(model)
    assert not verdict.ok
    assert words in verdict.reason


@pytest.mark.parametrize("name", broken.OF_POSITIONS)
def test_wrong_positions_are_found(model: Any, name: str) -> None:
    with broken.OF_POSITIONS[name]():
        assert "wrong positions" in probe(model).reason


def test_positions_that_the_model_ignores_are_found(model: Any) -> None:
    with broken.ignoring_positions():
        assert "they differ by" in probe(model).reason


def test_wrong_groups_of_heads_are_found(model: Any) -> None:
    with broken.attending(broken.wrong_groups):
        assert not probe(model).ok


@pytest.mark.parametrize("fault", [broken.window_off_by_one, broken.window_ignored])
@pytest.mark.parametrize("name", ["mistral", "mistral-window"])
def test_wrong_windows_are_found(name: str, fault: Any) -> None:
    with broken.attending(fault):
        assert not probe(load(name)).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("name", ["off by one", "of the row"])
def test_wrong_positions_are_found_in_half_precision(name: str, dtype: torch.dtype) -> None:
    with broken.OF_POSITIONS[name]():
        assert not probe(load("smollm2", dtype)).ok


def test_one_kernel_that_is_wrong_in_training_alone_is_found(model: Any) -> None:
    from preftune.kernels.attention import cpu

    true = cpu.attend

    def wrong(query: Any, key: Any, value: Any, layout: Any, spec: Any) -> Any:
        return true(query, key, value, layout, spec) * (1.0 if query.dtype == torch.float32 else 1.3)

    with mock.patch.object(cpu, "attend", wrong):
        assert probe(model, autocast=nullcontext).ok
        assert "the cpu kernel" in probe(model, autocast=half_autocast).reason
