"""Memory footprints that others have published, beside what the estimate says of the same run.

Numbers and conditions are those of the source and nothing else; what a source leaves open is in
:attr:`Footprint.assumed`. All of them are supervised runs by other tools. Two things differ from a run of preftune, and
are put in their place: most tools build the logits of all tokens (:data:`LOGITS_BYTES`), and a peak that PyTorch
reports leaves out context and libraries. ``python -m benchmarks.footprints`` writes the table into ``docs/advice.md``;
nothing is measured.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from preftune.models.shapes import Shape, shape_of
from preftune.training.estimate import Workload, estimate_memory
from preftune.training.machines import Machine

GB, GIB = 10**9, 2**30
#: Bytes per token and vocabulary entry where logits are built: in bf16, in fp32 for the loss, and its gradient in fp32.
LOGITS_BYTES = 10
#: By how much predicted and published may be apart, as a share of the published.
STATED_SHARE = 0.25
DOCS = Path(__file__).resolve().parents[1] / "docs" / "advice.md"

#: Llama shapes: hidden, layers, intermediate, heads, key-value heads, vocabulary. Qwen-7B and -72B have one more bias.
MODELS: dict[str, tuple[int, ...]] = {
    "Llama-2-7B": (4096, 32, 11008, 32, 32, 32000),
    "Llama-2-13B": (5120, 40, 13824, 40, 40, 32000),
    "Llama-3.1-8B": (4096, 32, 14336, 32, 8, 128256),
    "Llama-3-70B": (8192, 80, 28672, 64, 8, 128256),
    "Qwen-7B": (4096, 32, 11008, 32, 32, 151936),
    "Qwen-72B": (8192, 80, 24576, 64, 64, 152064),
}
TORCHTUNE = ("torchtune README", "https://github.com/pytorch/torchtune/blob/v0.4.0/README.md")
FACTORY = (
    "LLaMA-Factory wiki",
    "https://github.com/hiyouga/LLaMA-Factory/wiki/Performance-comparison",
)
FACTORY_README = ("LLaMA-Factory README", "https://github.com/hiyouga/LLaMA-Factory#hardware-requirement")
LITGPT = ("LitGPT", "https://github.com/Lightning-AI/litgpt/blob/main/tutorials/resource-tables.md")
QWEN = ("Qwen README", "https://github.com/QwenLM/Qwen#profiling-of-memory-and-speed")
UNSLOTH = ("Unsloth README, HF + FA2", "https://github.com/unslothai/unsloth#context-length-benchmarks")
UNSLOTH_DOCS = (
    "Unsloth requirements",
    "https://unsloth.ai/docs/get-started/fine-tuning-for-beginners/unsloth-requirements",
)
AXOLOTL = ("axolotl, examples/llama-3", "https://github.com/axolotl-ai-cloud/axolotl/tree/main/examples/llama-3")
ALL = "all-linear"


@dataclass(frozen=True)
class Footprint:
    """One published number.

    Attributes:
        source: Who, and where.
        model: A name of :data:`MODELS`.
        trained: ``full``, ``lora`` or ``qlora`` (4 bits).
        tokens: Tokens of a micro-batch.
        published: Bytes of the peak on one device.
        rank: Of the adapter.
        targets: Modules with one.
        recompute: Whether activations are recomputed.
        dtype: Of the weights.
        half: Whether bf16 autocast is on.
        optim: The optimizer.
        nested: Whether quantisation constants are quantised.
        bits: 4 or 8 bits for ``qlora``.
        devices: That share weights, gradients and states.
        logits: Share of the tokens whose logits are built at a time.
        is_allocated: Whether the peak is PyTorch's own count, without context and libraries.
        fused_update: Whether the update is part of the backward, so that gradients are never all there.
        assumed: What the source leaves open, and was assumed.
    """

    source: tuple[str, str]
    model: str
    trained: str
    tokens: int
    published: float
    rank: int = 8
    targets: str = ALL
    recompute: bool = True
    dtype: str = "bfloat16"
    half: bool = False
    optim: str = "adamw_torch"
    nested: bool = False
    bits: int = 4
    devices: int = 1
    logits: float = 1.0
    is_allocated: bool = False
    fused_update: bool = False
    assumed: str = ""


_ESTIMATE = "a table of estimates; 1,024 tokens"
_GPTQ = "GPTQ, taken for 4 bits"


def _rows() -> list[Footprint]:
    rows = [
        Footprint(
            TORCHTUNE,
            "Llama-3.1-8B",
            "full",
            4096,
            18.9 * GIB,
            optim="paged_adamw_8bit",
            logits=1 / 8,
            is_allocated=True,
            fused_update=True,
            assumed="as in 8B_full_single_device.yaml: paged 8-bit Adam, fused",
        ),
        Footprint(
            TORCHTUNE,
            "Llama-3.1-8B",
            "lora",
            4096,
            16.2 * GIB,
            targets="q_proj v_proj",
            logits=1 / 8,
            is_allocated=True,
            assumed="activations recomputed, rank 8 on q and v, logits in 8 pieces",
        ),
        Footprint(
            TORCHTUNE,
            "Llama-3.1-8B",
            "qlora",
            4096,
            7.4 * GIB,
            targets="q_proj v_proj",
            logits=1 / 8,
            nested=True,
            is_allocated=True,
            assumed="as above, on NF4 with quantised constants",
        ),
        Footprint(
            TORCHTUNE,
            "Llama-3-70B",
            "lora",
            4096,
            27.6 * GIB,
            targets="q_proj v_proj",
            rank=16,
            devices=8,
            logits=1 / 8,
            is_allocated=True,
            assumed="activations recomputed; 8 devices, FSDP",
        ),
    ]
    for tokens, published in ((1024, 6.0), (2048, 7), (4096, 9), (8192, 12), (16384, 19), (32768, 32)):
        rows.append(Footprint(FACTORY, "Llama-2-7B", "qlora", tokens, published * GB, assumed="activations recomputed"))
    litgpt: dict[str, Any] = {"targets": "q_proj v_proj", "recompute": False, "is_allocated": True, "logits": 0.1}
    litgpt["assumed"] = "logits in pieces of 128 tokens"
    for model, trained, batch, nested, published in (
        ("Llama-2-7B", "lora", 1, False, 21.30),
        ("Llama-2-7B", "lora", 2, False, 29.07),
        ("Llama-2-7B", "qlora", 1, False, 14.14),
        ("Llama-2-7B", "qlora", 1, True, 13.84),
        ("Llama-2-13B", "lora", 1, False, 38.12),
        ("Llama-2-13B", "qlora", 1, False, 23.14),
    ):
        rows.append(Footprint(LITGPT, model, trained, 1304 * batch, published * GB, nested=nested, **litgpt))
    for tokens, published in ((256, 20.1), (1024, 21.5), (2048, 23.8), (4096, 29.7), (8192, 36.6)):
        rows.append(Footprint(QWEN, "Qwen-7B", "lora", tokens, published * GB, rank=64))
    for tokens, published in ((256, 11.5), (1024, 12.3), (2048, 13.9), (4096, 16.9), (8192, 23.5)):
        rows.append(Footprint(QWEN, "Qwen-7B", "qlora", tokens, published * GB, rank=64, assumed=_GPTQ))
    rows.append(Footprint(QWEN, "Qwen-72B", "qlora", 256, 61.4 * GB, rank=64, assumed=_GPTQ))
    for card, tokens in ((24, 5789), (40, 12264), (48, 15502), (80, 28454)):
        rows.append(
            Footprint(
                UNSLOTH,
                "Llama-3.1-8B",
                "qlora",
                tokens,
                card * GIB,
                rank=32,
                assumed="the longest sequence that fits, so that the card is full",
            )
        )
    rows.append(
        Footprint(
            UNSLOTH,
            "Llama-3-70B",
            "qlora",
            6916,
            80 * GIB,
            rank=32,
            assumed="the longest sequence that fits, so that the card is full",
        )
    )
    for model, trained, published, extra in (
        ("Llama-2-7B", "full", 120, {"dtype": "float32", "half": True}),
        ("Llama-2-7B", "full", 60, {}),
        ("Llama-2-7B", "lora", 16, {}),
        ("Llama-2-7B", "qlora", 10, {"bits": 8}),
        ("Llama-2-7B", "qlora", 6, {}),
        ("Llama-3-70B", "lora", 160, {}),
        ("Llama-3-70B", "qlora", 48, {}),
    ):
        kept: dict[str, Any] = extra
        rows.append(
            Footprint(
                FACTORY_README,
                model,
                trained,
                1024,
                published * GB,
                assumed=_ESTIMATE,
                **kept,
            )
        )
    for model, trained, published in (
        ("Llama-2-7B", "lora", 19),
        ("Llama-2-7B", "qlora", 5),
        ("Llama-3.1-8B", "lora", 22),
        ("Llama-3.1-8B", "qlora", 6),
        ("Llama-3-70B", "lora", 164),
        ("Llama-3-70B", "qlora", 41),
    ):
        rows.append(
            Footprint(
                UNSLOTH_DOCS,
                model,
                trained,
                512,
                published * GB,
                rank=16,
                logits=0.0,
                nested=True,
                assumed="a minimum without conditions; 512 tokens",
            )
        )
    rows.append(
        Footprint(
            AXOLOTL,
            "Llama-3.1-8B",
            "full",
            8192,
            48 * GB,
            optim="paged_adamw_8bit",
            assumed="fft-8b.yaml: paged 8-bit Adam",
        )
    )
    return rows


ROWS = _rows()


def config_of(name: str) -> Any:
    """The configuration of a model."""
    from transformers import LlamaConfig

    hidden, layers, intermediate, heads, kv_heads, vocab = MODELS[name]
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=False,
    )


@cache
def shape_for(
    model: str, trained: str, rank: int, targets: str, dtype: str, half: bool, bits: int, nested: bool
) -> Shape:
    """The shape of a model as a row trains it."""
    from peft import LoraConfig

    lora = None
    if trained != "full":
        modules = targets if targets == ALL else targets.split()
        lora = LoraConfig(r=rank, lora_alpha=16, target_modules=modules, task_type="CAUSAL_LM")
    kept = bits if trained == "qlora" else None
    return shape_of(config_of(model), dtype=dtype, lora=lora, half=half, bits=kept, nested=nested)


def predict(row: Footprint) -> dict[str, float]:
    """Bytes by cause, as the estimate has them, the head in the way of the tool."""
    shape = shape_for(row.model, row.trained, row.rank, row.targets, row.dtype, row.half, row.bits, row.nested)
    work = Workload(
        pairs_per_step=1,
        num_pairs=1,
        num_steps=1,
        completion=float(row.tokens),
        longest_row=row.tokens,
        half=row.half,
        optim=row.optim,
        needs_reference=False,
        checkpointing="always" if row.recompute else "off",
        sharded=row.devices,
    )
    found: dict[str, float] = dict(estimate_memory(shape, work, Machine("card", 10**15, 1e15, 1e14, "")).causes)
    found["head"] = LOGITS_BYTES * row.logits * row.tokens * shape.vocab
    if row.is_allocated:
        found.pop("runtime")
    if row.fused_update:
        found["gradients"] = 2.0 * shape.head_elements
    return found


def ratio(row: Footprint) -> float:
    """Predicted over published."""
    return sum(predict(row).values()) / row.published


def summary() -> str:
    """The table for the document."""
    from benchmarks.toy import markdown_table

    lines = []
    for row in ROWS:
        total = sum(predict(row).values())
        name, link = row.source
        lines.append(
            [
                f"[{name}]({link})",
                row.model,
                {"full": "all weights", "lora": "LoRA", "qlora": f"QLoRA, {row.bits} bit"}[row.trained],
                f"{row.tokens:,}",
                f"{row.published / GB:.1f}",
                f"{total / GB:.1f}",
                f"{total / row.published:.2f}",
                row.assumed,
            ]
        )
    heads = [
        "source",
        "model",
        "trained",
        "tokens",
        "GB",
        "predicted",
        "ratio",
        "not said by the source, or why not comparable",
    ]
    ratios = [ratio(row) for row in ROWS]
    within = sum(abs(each - 1) <= STATED_SHARE for each in ratios)
    return "\n\n".join(
        [
            markdown_table(heads, lines, right=range(3, 7)),
            f"{within} of {len(ROWS)} rows are within 25 %, from {min(ratios):.2f} to {max(ratios):.2f}.",
        ]
    )


def main() -> int:
    """Writes the table.

    Returns:
        0.
    """
    from benchmarks.memory import place

    place(DOCS, "footprints", summary())
    print(f"wrote {DOCS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
