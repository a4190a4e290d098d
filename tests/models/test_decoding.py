"""Prompts of many lengths in one batch, with and without an adapter: the same tokens as each by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from preftune.models.decoding import BASE, _groups, _without_holes, decode, rows_at_once, switchable
from tests.models.tiny import tiny_model

PROMPTS = [[5, 6, 7], list(range(3, 60)), [9], list(range(10, 31)), [4, 4, 8, 1], list(range(40, 97)), [5, 6, 7]]
ENDS = frozenset({2, 3, 11, 17, 23, 31, 47})


def continued(model: Any, prompts: list[list[int]], seed: int = 0, **options: Any) -> list[list[tuple[int, float]]]:
    uniforms = np.random.default_rng(seed).random((len(PROMPTS), 24))
    rows = options.pop("rows", range(len(prompts)))
    found: list[list[tuple[int, float]]] = [[] for _ in prompts]
    for step in decode(model, prompts, uniforms[list(rows)], options.pop("temperature", 1.0), ENDS, **options):
        for row, token, logp in step:
            found[row].append((token, logp))
    return found


@pytest.mark.parametrize(
    ("config_name", "sizes"),
    [
        ("LlamaConfig", {}),
        ("LlamaConfig", {"num_key_value_heads": 4}),
        ("Qwen2Config", {}),
        ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
        ("MistralConfig", {"sliding_window": 6}),
        ("Gemma2Config", {"sliding_window": 8, "head_dim": 8}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_row_of_a_batch_is_the_row_by_itself(config_name: str, sizes: dict[str, Any]) -> None:
    model = tiny_model(config_name, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # far from uniform, so that a wrong mask shows
    together = continued(model, PROMPTS)
    assert {len(row) for row in together} != {24}, "no row ended early"
    for number, prompt in enumerate(PROMPTS):
        (alone,) = continued(model, [prompt], rows=[number])
        assert [token for token, _ in together[number]] == [token for token, _ in alone]
        assert [logp for _, logp in together[number]] == pytest.approx([logp for _, logp in alone], abs=2e-5)


def test_log_probs_are_those_of_one_forward_over_all_tokens() -> None:
    model = tiny_model("LlamaConfig")
    for prompt, row in zip(PROMPTS, continued(model, PROMPTS), strict=True):
        tokens = [token for token, _ in row]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0].double().log_softmax(-1)
        expected = [float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(tokens)]
        assert [logp for _, logp in row] == pytest.approx(expected, abs=1e-5)


def adapted(**settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model: Any = get_peft_model(
        tiny_model("LlamaConfig"), LoraConfig(r=4, task_type="CAUSAL_LM", **{"target_modules": "all-linear"} | settings)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}])
def test_with_and_without_the_adapter_in_one_batch(settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    name = switchable(model)
    assert name == "default"
    count = len(PROMPTS)
    both = continued(
        model, PROMPTS + PROMPTS, rows=[*range(count), *range(count)], adapters=[name] * count + [BASE] * count
    )
    on = continued(model, PROMPTS)
    with model.disable_adapter():
        off = continued(model, PROMPTS)
    tokens = [[token for token, _ in row] for row in both]
    assert tokens == [[token for token, _ in row] for row in on + off]
    assert tokens[:count] != tokens[count:]


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["DoRA", "modules to save"],
)
def test_what_cannot_be_switched_row_by_row_is_found_or_right(settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "modules_to_save" in parameter_name:
                parameter.add_(0.5 * torch.randn_like(parameter))
    name = switchable(model)
    assert not model.training
    if settings.get("use_dora"):
        assert name is None
        continued(model, [PROMPTS[0]])  # nothing of the attempt is left
    if name is not None:
        both = continued(model, [PROMPTS[0]] * 2, rows=[0, 0], adapters=[name, BASE])
        with model.disable_adapter():
            assert [t for t, _ in both[1]] == [t for t, _ in continued(model, [PROMPTS[0]])[0]]


def test_only_one_adapter_of_a_peft_model_can_be_switched() -> None:
    assert switchable(tiny_model("LlamaConfig")) is None
    model = adapted()
    model.add_adapter("other", model.peft_config["default"])
    assert switchable(model) is None


def test_groups_hold_little_padding_and_every_row_once() -> None:
    lengths = [3, 60, 1, 21, 4, 58, 3, 20, 19, 300]
    groups = _groups(lengths)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        widest = max(lengths[row] for row in group)
        assert sum(widest - lengths[row] for row in group) <= 0.1 * widest * len(group)
    assert len(groups) < len(lengths)


def test_places_are_filled_from_the_end() -> None:
    assert _without_holes([True, False, True, True, False, True]) == [0, 5, 2, 3]
    assert _without_holes([False, True]) == [1]
    assert _without_holes([True, True]) == [0, 1]


def test_rows_at_once_follow_the_room() -> None:
    model = tiny_model("LlamaConfig")
    assert rows_at_once(model, 100) == 64
    # 2 layers x 2 heads x 8 x 4 bytes x 2 = 256 bytes a token; 2 GiB hold 8 Mi tokens.
    assert rows_at_once(model, 1 << 22) == 2
    assert rows_at_once(model, 1 << 30) == 1
