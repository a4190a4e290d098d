"""How far off are the advice's memory and time? Measured against short runs: ``python -m benchmarks.memory``.

Every cell trains a random Llama for a few steps in a process of its own and compares the growth of its resident
memory, and the time of its steps, with what :mod:`preftune.advice` said from the configuration and the lengths alone.
Results go into ``benchmarks/results/memory.json`` cell by cell, and from there into ``docs/advice.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OUT = HERE / "results" / "memory.json"
DOCS = HERE.parent / "docs" / "advice.md"
#: Llama shapes: hidden, layers, intermediate, heads, key-value heads, vocabulary, pairs a step, prompt, completion.
SHAPES: dict[str, tuple[int, ...]] = {
    "toy": (128, 2, 336, 4, 4, 800, 16, 20, 40),
    "25m": (384, 8, 1024, 6, 2, 16000, 16, 80, 60),
    "6m": (256, 4, 688, 4, 2, 8000, 16, 60, 60),
}
STEPS = 6
#: Where a run grows by more than this, libraries are no longer what counts.
LARGE_GROWTH = 200 * 2**20
#: Predicted and measured are within this factor of one another there.
STATED_FACTOR = 3.0
#: Not timed: caches fill, the optimizer makes its state.
FIRST_STEPS = 2


def make_data(shape: Sequence[int], num_pairs: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Tokenised pairs with lengths that vary by half around those of the shape."""
    import numpy as np

    rng = np.random.default_rng(seed)
    vocab, prompt, completion = shape[5], shape[7], shape[8]

    def ids(typical: int) -> list[int]:
        count = int(rng.integers(typical // 2, typical * 3 // 2 + 1))
        found: list[int] = rng.integers(3, vocab, count).tolist()
        return found

    return [
        {"prompt_ids": ids(prompt), "chosen_ids": ids(completion), "rejected_ids": ids(completion)}
        for _ in range(num_pairs)
    ]


def config_of(shape: Sequence[int]) -> Any:
    """The configuration of a shape."""
    from transformers import LlamaConfig

    hidden, layers, intermediate, heads, kv_heads, vocab = shape[:6]
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def predict(spec: dict[str, Any], rows: list[dict[str, list[int]]], machine: Any) -> dict[str, Any]:
    """What the advice says, from configuration and lengths alone."""
    import numpy as np
    from peft import LoraConfig

    from preftune.advice import Case, Lengths, advise
    from preftune.advice.shapes import shape_of

    shape = SHAPES[spec["shape"]]
    half = spec["dtype"] == "bf16"
    model = shape_of(config_of(shape), lora=LoraConfig(**LORA) if spec["peft"] == "lora" else None, half=half)
    prompt, chosen, rejected = (
        np.array([len(row[name]) for row in rows]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    given = {
        "per_device_train_batch_size": shape[6],
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "max_length": 1024,
        "bf16": half,
    }
    case = Case(
        "dpo",
        ("sigmoid",),
        model.num_parameters,
        spec["peft"] == "lora",
        num_pairs=len(rows),
        lengths=Lengths(prompt, chosen, rejected),
        given=given,
    )
    advice = advise(case, model, machine)
    return {"memory": dict(advice.memory), "time": {k: v for k, v in advice.time.items() if k != "plan"}}


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Train for a few steps; growth of memory over the level before, and median processor seconds of a step.

    Processor time of one thread is what the wall clock shows on an idle machine, and is hardly disturbed on a busy one.
    """
    import statistics

    import torch
    from benchmarks.cell import PeakMemory
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

    from preftune import DPOConfig, DPOTrainer
    from preftune.advice.machines import this_machine

    torch.set_num_threads(spec["threads"])
    shape = SHAPES[spec["shape"]]
    rows = make_data(shape, shape[6] * STEPS)
    machine = this_machine(processor=True)
    predicted = predict(spec, rows, machine)
    vocabulary = {f"<{n}>": n for n in range(shape[5])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<3>")),
        pad_token="<0>",
        bos_token="<1>",
        eos_token="<2>",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config_of(shape))
    starts: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            starts.append(time.process_time())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            starts[-1] = time.process_time() - starts[-1]

    settings: dict[str, Any] = {
        "per_device_train_batch_size": shape[6],
        "num_train_epochs": 1,
        "max_length": 1024,
        "bf16": spec["dtype"] == "bf16",
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1000,
        "dataloader_pin_memory": False,
    }
    dataset = Dataset.from_list(rows)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PREFTUNE_CACHE"] = str(Path(folder) / "references")
        with PeakMemory() as memory:
            trainer = DPOTrainer(
                model=model,
                args=DPOConfig(output_dir=folder, **settings),
                train_dataset=dataset,
                processing_class=tokenizer,
                peft_config=LoraConfig(**LORA) if spec["peft"] == "lora" else None,
                callbacks=[Clock()],
            )
            trainer.train()
    return {
        **spec,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "growth": memory.growth,
        "step_seconds": statistics.median(starts[FIRST_STEPS:]),
        "traced_bytes_per_token": predicted["memory"]["activations"] / predicted["memory"]["row_tokens"],
        "trainer_bytes_per_token": trainer.step.bytes_per_token,
        "predicted": predicted,
        "matmul_flops_per_second": {"fp32": machine.fp32, "bf16": machine.bf16},
    }


# ---- run and render --------------------------------------------------------------------------------------------------


def run(threads: int, out: Path) -> dict[str, Any]:
    """Measures all cells that are missing, each in a process of its own."""
    from benchmarks.cell import machine

    report: dict[str, Any] = {"machine": machine({"threads": threads}), "cells": []}
    if out.is_file():
        old = json.loads(out.read_text(encoding="utf-8"))
        if all(old["machine"][key] == report["machine"][key] for key in ("processor", "num_threads", "versions")):
            report = old
    done = {(cell["shape"], cell["peft"], cell["dtype"]) for cell in report["cells"]}
    for shape in SHAPES:
        for peft in ("full", "lora"):
            for dtype in ("fp32", "bf16"):
                if (shape, peft, dtype) in done:
                    continue
                spec = {"shape": shape, "peft": peft, "dtype": dtype, "threads": threads}
                with tempfile.TemporaryDirectory() as folder:
                    result = Path(folder) / "result.json"
                    subprocess.run(
                        [sys.executable, "-m", "benchmarks.memory", "--cell", json.dumps(spec), str(result)],
                        check=True,
                        cwd=HERE.parent,
                    )
                    report["cells"].append(json.loads(result.read_text(encoding="utf-8")))
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
                print(line(report["cells"][-1]), flush=True)
    return report


def ratios(cell: dict[str, Any]) -> tuple[float, float]:
    """Predicted over measured: memory growth, step time."""
    return (
        cell["predicted"]["memory"]["growth"] / cell["growth"],
        cell["predicted"]["time"]["step_seconds"] / cell["step_seconds"],
    )


def line(cell: dict[str, Any]) -> str:
    """A cell in one line."""
    memory, seconds = ratios(cell)
    return (
        f"{cell['shape']} {cell['peft']} {cell['dtype']}: memory {cell['growth'] / 2**20:.0f} MiB, predicted / "
        f"measured {memory:.2f}; step {cell['step_seconds']:.3f} s, {seconds:.2f}"
    )


def summary(report: dict[str, Any]) -> str:
    """Table and sentences for the document."""
    import statistics

    from benchmarks.render import machine_text
    from benchmarks.toy import markdown_table

    rows, memories, times = [], [], []
    cells = sorted(report["cells"], key=lambda cell: cell["num_parameters"])
    for cell in cells:
        memory, seconds = ratios(cell)
        memories.append(memory)
        times.append(seconds)
        predicted = cell["predicted"]
        rows.append(
            [
                f"{cell['num_parameters'] / 1e6:.1f} M",
                "all weights" if cell["peft"] == "full" else "LoRA r 16",
                cell["dtype"],
                f"{cell['growth'] / 2**20:.0f}",
                f"{predicted['memory']['growth'] / 2**20:.0f}",
                f"{memory:.2f}",
                f"{cell['step_seconds']:.3f}",
                f"{predicted['time']['step_seconds']:.3f}",
                f"{seconds:.2f}",
            ]
        )
    heads = ["parameters", "trained", "dtype", "MiB", "predicted", "ratio", "s/step", "predicted", "ratio"]
    large = [memory for memory, cell in zip(memories, cells, strict=True) if cell["growth"] > LARGE_GROWTH]
    told = (
        f"Predicted over measured, memory growth: median {statistics.median(memories):.2f}, "
        f"{min(memories):.2f} to {max(memories):.2f}"
    )
    if large:
        told += f"; where growth is above {LARGE_GROWTH / 2**20:.0f} MiB: {min(large):.2f} to {max(large):.2f}"
    told += (
        f". Time of a step (processor time, one thread): median {statistics.median(times):.2f}, {min(times):.2f} to "
        f"{max(times):.2f}. Growth is underestimated throughout, most for adapters and in bf16: what libraries "
        "load, the start-up probe, the work space of kernels and freed memory that the allocator keeps are not in the "
        "estimate. Take it as a lower end, and leave as much again, for adapters twice as much, for what grows."
    )
    return "\n\n".join(
        [markdown_table(heads, rows, right=range(3, 9)), told, f"**Environment.** {machine_text(report['machine'])}"]
    )


def place(path: Path, name: str, text: str) -> None:
    """Put text between the document's marks ``<!-- name -->`` and ``<!-- /name -->``."""
    content = path.read_text(encoding="utf-8") if path.is_file() else f"<!-- {name} -->\n<!-- /{name} -->\n"
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = content.partition(start)
    _, mark, after = rest.partition(end)
    if not mark:
        raise ValueError(f"{path} has no place for {name}")
    path.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Measures, writes the result file and renders the document.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--out", type=Path, default=OUT, help="result file")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the document")
    parser.add_argument("--render", action="store_true", help="measure nothing; write the tables from the file")
    parser.add_argument("--cell", nargs=2, metavar=("SPEC", "RESULT"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.cell:
        spec, result = options.cell
        Path(result).write_text(json.dumps(measure(json.loads(spec)), allow_nan=False), encoding="utf-8")
        return 0
    if options.render:
        report = json.loads(options.out.read_text(encoding="utf-8"))
    else:
        report = run(options.threads, options.out)
    place(options.docs, "memory", summary(report))
    print(f"wrote {options.docs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
