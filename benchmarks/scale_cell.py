"""One process of a measured run of several: ``python -m benchmarks.scale_cell SPEC``, started by ``scale.py``.

It trains on token ids drawn at random, so that no time goes into preparing them. What it measures is its own processor
time, which others on the same cores do not change, its memory, and the bytes that all processes exchanged.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.cell import PeakMemory
from datasets import Dataset
from tests.distributed.cases import let_fsdp_in
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

import preftune

VOCAB = 4096


def exchanged() -> int:
    """Bytes that went over the loopback device so far, which a run has for itself in a network name space."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    return 0


def model_of(spec: dict[str, Any]) -> Any:
    """A Llama of some shape, the same in all processes, or the pretrained model in a folder."""
    if "folder" in spec:
        return AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=torch.float32)
    hidden, layers = spec["hidden"], spec["layers"]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32, vocab_size=VOCAB, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rows_of(pairs: int, tokens: int) -> Dataset:
    """Pairs of so many tokens together: half of them prompts, and lengths that differ by up to a half."""
    draw = np.random.default_rng(0)
    rows = []
    for n in range(pairs):
        each = int(tokens / pairs * (0.75 + 0.5 * (n % 8) / 7))
        prompt, chosen, rejected = (
            draw.integers(5, VOCAB, size).tolist() for size in (each // 2, each // 4, each // 4)
        )
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return Dataset.from_list(rows)


class Steps(TrainerCallback):
    """Processor time and exchanged bytes at the end of every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note them, when all processes are there."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        self.seen.append((time.process_time(), exchanged()))


def measured(spec: dict[str, Any]) -> dict[str, Any]:
    """Train, or only score the reference."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    if spec["engine"] == "fsdp2":
        let_fsdp_in()
    model = model_of(spec)
    parameters = sum(p.numel() for p in model.parameters())
    repeats = 1 if spec["what"] == "pass" else spec["steps"]
    rows = Dataset.from_list(list(rows_of(spec["pairs"], spec["tokens"])) * repeats)
    args = preftune.DPOConfig(
        output_dir=spec["out"], per_device_train_batch_size=spec["pairs"] // processes, max_steps=spec["steps"],
        learning_rate=1e-6, use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
        max_length=None, reference_store=spec["what"] == "pass", gradient_checkpointing=False, generation_steps=0,
        fsdp=spec["engine"] == "fsdp2", train_sampling_strategy="sequential",
    )  # fmt: skip
    steps = Steps()
    with PeakMemory() as memory:
        trainer = preftune.DPOTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(spec["tokenizer"]),
        )
        trainer.add_callback(steps)
        begin = time.process_time(), exchanged()
        if spec["what"] == "pass":
            trainer.prepare_reference()
            steps.seen = [begin, (time.process_time(), exchanged())]
        else:
            trainer.train()
    seconds, sent = zip(*steps.seen, strict=True)
    config = model.config
    return {
        "parameters": parameters,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "vocab": config.vocab_size,
        "matrices": parameters - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size),
        "seconds": float(np.median(np.diff(seconds))),
        "sent": float(np.median(np.diff(sent))) / processes,
        "memory": memory.growth,
        "baseline": memory.baseline,
        "row_tokens": trainer.step.max_tokens_per_row,
    }


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    found = json.dumps(measured(given))
    Path(given["out"], f"found-{os.environ.get('RANK', '0')}.json").write_text(found, encoding="utf-8")
