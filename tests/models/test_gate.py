"""Which models may run on packed rows: read off, then tried."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from preftune.kernels.head import HeadTransform
from preftune.models.forward import RowForward
from preftune.models.gate import check_declared
from preftune.models.head import probe_head
from preftune.models.packing_probe import probe
from preftune.packing import build_row, pair_trees
from preftune.training.setup import disable_dropout
from tests.models.tiny import tiny_model

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

PACKABLE: list[tuple[str, dict[str, Any]]] = [
    ("LlamaConfig", {}),
    ("Qwen2Config", {}),
    ("Qwen3Config", {"head_dim": 8}),
    ("MistralConfig", {"sliding_window": 4}),
    ("Gemma2Config", {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 4}),
    ("PhiConfig", {}),
    ("GraniteConfig", {"logits_scaling": 6.0}),
    ("CohereConfig", {}),
    ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0}),
    ("GPTNeoXConfig", {}),
    ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    ("MixtralConfig", {"num_local_experts": 4}),
    ("GptOssConfig", {"head_dim": 8, "num_local_experts": 4, "sliding_window": 4}),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "FalconH1Config",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
        "does not accept other attention functions",
    ),
    (
        "Llama4TextConfig",
        {"head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 4, "intermediate_size_mlp": 64},
        "chunked_attention",
    ),
    ("BloomConfig", {"n_layer": 2, "n_head": 4}, "does not accept other attention functions"),
]


@pytest.mark.thin(9)
@pytest.mark.parametrize(("name", "sizes"), PACKABLE, ids=[name for name, _ in PACKABLE])
def test_packable_models_pass_gate_and_probe(name: str, sizes: dict[str, Any]) -> None:
    model = tiny_model(name, **sizes)
    assert check_declared(model).ok
    verdict = probe(model)
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize(("name", "sizes", "reason"), REFUSED, ids=[name for name, _, _ in REFUSED])
def test_others_are_refused_by_the_gate_with_the_reason(name: str, sizes: dict[str, Any], reason: str) -> None:
    verdict = check_declared(tiny_model(name, **sizes))
    assert not verdict.ok
    assert reason in verdict.reason


@pytest.mark.parametrize(("name", "sizes", "reason"), REFUSED, ids=[name for name, _, _ in REFUSED])
def test_the_probe_alone_would_have_noticed(name: str, sizes: dict[str, Any], reason: str) -> None:
    assert not probe(tiny_model(name, **sizes)).ok


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = tiny_model("LlamaConfig")
    model.train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.lm_head.weight.requires_grad_(False)
    attention = model.config._attn_implementation
    probe(model)
    assert model.training
    assert model.config._attn_implementation == attention
    assert not model.lm_head.weight.requires_grad
    assert "forward" not in vars(model.lm_head)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


@pytest.mark.parametrize(
    ("name", "sizes", "transform"),
    [
        ("LlamaConfig", {}, HeadTransform()),
        ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 12.5}, HeadTransform(1.0, 12.5)),
        ("CohereConfig", {"logit_scale": 0.125}, HeadTransform(0.125)),
        ("GraniteConfig", {"logits_scaling": 8.0}, HeadTransform(0.125)),
    ],
)
def test_what_follows_the_head_is_found_without_knowing_the_model(
    name: str, sizes: dict[str, Any], transform: HeadTransform
) -> None:
    found = probe_head(tiny_model(name, **sizes))
    assert found.called
    assert found.transform == transform


class _OddHead(torch.nn.Module):
    """Wraps a model so that its logits follow no known form."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model
        self.config = model.config

    def get_output_embeddings(self) -> Any:
        return self.inner.get_output_embeddings()

    def forward(self, **inputs: Any) -> Any:
        output = self.inner(**inputs)
        output.logits = output.logits + 0.1 * torch.sin(output.logits)
        return output


@pytest.mark.parametrize("packed", [True, False])
def test_an_unknown_head_uses_the_models_own_logits(packed: bool) -> None:
    model = _OddHead(tiny_model("LlamaConfig"))
    assert probe_head(model).transform is None
    prompt, chosen, rejected = (torch.randint(0, 97, (n,)).numpy() for n in (5, 4, 7))
    row = build_row(pair_trees(prompt, chosen, rejected, None, (0, 1)))
    forward = RowForward.of(model, packed=packed)
    with torch.no_grad(), forward.active():
        got = forward(row)[0].logps
    expected = []
    for completion in (chosen, rejected):
        ids = torch.tensor([*prompt, *completion])[None]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.detach()
        logp = torch.log_softmax(logits[0, len(prompt) - 1 : -1].double(), -1)
        expected.append(logp.gather(1, torch.tensor(completion)[:, None])[:, 0])
    torch.testing.assert_close(got.double(), torch.cat(expected), atol=1e-5, rtol=1e-5)


WINDOWED: list[tuple[str, dict[str, Any]]] = [
    ("Qwen2MoeConfig", {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
                        "use_sliding_window": True, "max_window_layers": 1}),
    ("PhimoeConfig", {"num_local_experts": 4, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "sizes"), WINDOWED, ids=[name for name, _ in WINDOWED])
def test_a_window_that_attention_is_not_told_of_is_refused(name: str, sizes: dict[str, Any]) -> None:
    """The probe's sequences are shorter than the window, which only the mask of these models knows."""
    verdict = probe(tiny_model(name, sliding_window=40, **sizes))
    assert not verdict.ok
    assert "sliding window" in verdict.reason
    plain = {key: value for key, value in sizes.items() if key not in ("use_sliding_window", "max_window_layers")}
    assert probe(tiny_model(name, sliding_window=None, **plain)).ok


def test_windows_longer_than_the_probe_are_no_reason_to_refuse() -> None:
    for name, sizes in PACKABLE:
        if "sliding_window" in sizes:
            verdict = probe(tiny_model(name, **{**sizes, "sliding_window": 400}))
            assert verdict.ok, verdict.reason


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_by_length_are_found_in_every_form(nested: bool, kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 64}
    sizes: dict[str, Any] = {"max_position_embeddings": 64 if kind == "dynamic" else 256, "rope_parameters": rope}
    if nested:
        plain = {"rope_type": "default", "rope_theta": 1e4}
        sizes |= {"head_dim": 8, "rope_parameters": {"sliding_attention": plain, "full_attention": rope}}
    model = tiny_model("Gemma3TextConfig" if nested else "LlamaConfig", **sizes)
    assert check_declared(model, max_length=64).ok
    verdict = check_declared(model, max_length=65)
    assert (verdict.ok, verdict.alone) == (False, True)
    assert f"({kind}) and the data exceed 64 tokens" in verdict.reason


def test_dropout_that_only_training_shows_is_found() -> None:
    model = tiny_model("GPTBigCodeConfig", n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.1)
    state = torch.get_rng_state()
    verdict = probe(model)
    assert not verdict.ok
    assert "dropout" in verdict.reason
    assert torch.equal(torch.get_rng_state(), state)
    disable_dropout(model)
    assert probe(model).ok


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Starcoder2Config", {"residual_dropout": 0.5, "embedding_dropout": 0.5}),
        ("SeedOssConfig", {"residual_dropout": 0.5, "head_dim": 8}),
        ("XGLMConfig", {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "dropout": 0.5,
                        "activation_dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}),
    ],
)  # fmt: skip
def test_no_dropout_is_left(name: str, sizes: dict[str, Any]) -> None:
    model = tiny_model(name, **sizes).train()
    ids = torch.arange(3, 23)[None]
    disable_dropout(model)
    with torch.no_grad():
        first, second = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second)


def test_models_may_take_views_of_what_attention_returns() -> None:
    """Long rows take another kernel than the probe's; AFMoE's attention calls ``view`` on its result."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    kinds = ["sliding_attention", "full_attention"]
    model = tiny_model("AfmoeConfig", sliding_window=8, num_dense_layers=1, layer_types=kinds, **sizes)
    rng = torch.Generator().manual_seed(0)

    def ids(length: int) -> Any:
        return torch.randint(3, 97, (length,), generator=rng).numpy()

    row = build_row([*pair_trees(ids(20), ids(15), ids(12), None, (0, 1))], [0])
    with torch.no_grad():
        packed, padded = (RowForward.of(model, packed=way) for way in (True, False))
        with packed.active():
            found = packed(row)[0].logps
        expected = padded(row)[0].logps
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
