"""How far off are memory and time as ``advise`` and ``--dry_run`` state them? ``python -m benchmarks.memory``.

Every cell trains for a few steps in a process of its own. The growth of its resident memory from before the model is
loaded, and the time of its steps, are compared with what :mod:`preftune.training.estimate` said from the configuration
and the lengths alone. Results go into ``benchmarks/results/memory.json`` cell by cell, and from there into
``docs/advice.md``, beside published footprints (:mod:`benchmarks.footprints`).
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

from benchmarks import stale

HERE = Path(__file__).resolve().parent
OUT = HERE / "results" / "memory.json"
DOCS = HERE.parent / "docs" / "advice.md"
SOURCES = (*stale.ENGINE, "benchmarks/memory.py")
#: Llama shapes: hidden, layers, intermediate, heads, key-value heads, vocabulary; and a pretrained model.
SHAPES: dict[str, tuple[int, ...]] = {
    "6m": (256, 4, 688, 4, 2, 8000),
    "19m": (384, 8, 1024, 6, 2, 16000),
}
PRETRAINED = "smollm2"
#: Pairs a step, prompt, completion: the lengths that constants were fitted on, and others.
ROWS: dict[str, tuple[int, int, int]] = {"short": (4, 80, 60), "long": (2, 160, 120), "many": (16, 60, 60)}
STEPS = 5
#: Predicted and measured are within this factor of one another.
STATED_FACTOR = 1.25
#: Not timed: caches fill, the optimizer makes its state.
FIRST_STEPS = 2


def specs() -> list[dict[str, Any]]:
    """All cells: two models in every way, and others that no constant was fitted on."""
    found = []
    for model in ("19m", PRETRAINED):
        for peft in ("full", "lora"):
            for dtype in ("fp32", "bf16"):
                for checkpointing in (False, True):
                    found.append((model, "short", peft, dtype, checkpointing))
    for peft in ("full", "lora"):
        for dtype in ("fp32", "bf16"):
            found.append(("6m", "many", peft, dtype, False))
        found.append((PRETRAINED, "long", peft, "bf16", False))
    return [dict(zip(KEYS, each, strict=True)) for each in found]


KEYS = ("shape", "rows", "peft", "dtype", "checkpointing")


def make_data(rows: Sequence[int], vocab: int, num_pairs: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Tokenised pairs with lengths that vary by half around the typical ones."""
    import numpy as np

    rng = np.random.default_rng(seed)
    _, prompt, completion = rows

    def ids(typical: int) -> list[int]:
        count = int(rng.integers(typical // 2, typical * 3 // 2 + 1))
        found: list[int] = rng.integers(3, vocab, count).tolist()
        return found

    return [
        {"prompt_ids": ids(prompt), "chosen_ids": ids(completion), "rejected_ids": ids(completion)}
        for _ in range(num_pairs)
    ]


def config_of(name: str) -> Any:
    """The configuration of a model."""
    from transformers import LlamaConfig

    if name == PRETRAINED:
        from benchmarks import pretrained
        from preftune.models.shapes import load_config

        return load_config(str(pretrained.folder_of(PRETRAINED)))
    hidden, layers, intermediate, heads, kv_heads, vocab = SHAPES[name]
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def predict(spec: dict[str, Any], rows: list[dict[str, list[int]]], machine: Any) -> dict[str, Any]:
    """What is said from configuration and lengths alone."""
    from dataclasses import asdict

    import numpy as np
    from peft import LoraConfig

    from preftune.models.shapes import shape_of
    from preftune.training.estimate import Workload, estimate_memory, estimate_time, lengths_of_rows

    half = spec["dtype"] == "bf16"
    lora = LoraConfig(**LORA) if spec["peft"] == "lora" else None
    shape = shape_of(config_of(spec["shape"]), lora=lora, half=half)
    prompt, chosen, rejected = (
        np.array([len(row[name]) for row in rows]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    work = Workload(
        pairs_per_step=ROWS[spec["rows"]][0],
        num_pairs=len(rows),
        num_steps=STEPS,
        **lengths_of_rows(prompt, chosen + rejected),
        half=half,
        checkpointing="always" if spec["checkpointing"] else "off",
    )
    memory, seconds = estimate_memory(shape, work, machine), estimate_time(shape, work, machine)
    return {"memory": {**asdict(memory), "total": memory.total}, "time": asdict(seconds)}


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Train for a few steps; growth of memory over the level before, and mean processor seconds of a step.

    Processor time of one thread is what the wall clock shows on an idle machine, and is hardly disturbed on a busy one.
    """
    import torch
    from benchmarks.cell import PeakMemory
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

    from preftune import DPOConfig, DPOTrainer
    from preftune.training.machines import this_machine

    torch.set_num_threads(spec["threads"])
    config = config_of(spec["shape"])
    batch = ROWS[spec["rows"]][0]
    rows = make_data(ROWS[spec["rows"]], config.vocab_size, batch * STEPS)
    machine = this_machine(processor=True)
    predicted = predict(spec, rows, machine)
    vocabulary = {f"<{n}>": n for n in range(config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<3>")),
        pad_token="<0>",
        bos_token="<1>",
        eos_token="<2>",
    )
    starts: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            starts.append(time.process_time())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            starts[-1] = time.process_time() - starts[-1]

    settings: dict[str, Any] = {
        "per_device_train_batch_size": batch,
        "num_train_epochs": 1,
        "max_length": 1024,
        "bf16": spec["dtype"] == "bf16",
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1000,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": spec["checkpointing"],
        "checkpoint_policy": "always" if spec["checkpointing"] else "needed",
    }
    dataset = Dataset.from_list(rows)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PREFTUNE_CACHE"] = str(Path(folder) / "references")
        with PeakMemory() as memory:
            torch.manual_seed(0)
            model: Any
            if spec["shape"] == PRETRAINED:
                model = AutoModelForCausalLM.from_pretrained(config._name_or_path, dtype=torch.float32)
            else:
                model = LlamaForCausalLM(config)
            trainer = DPOTrainer(
                model=model,
                args=DPOConfig(output_dir=folder, **settings),
                train_dataset=dataset,
                processing_class=tokenizer,
                peft_config=LoraConfig(**LORA) if spec["peft"] == "lora" else None,
                callbacks=[Clock()],
            )
            trainer.train()
        plan = trainer.plan()
    timed = starts[FIRST_STEPS:]
    return {
        **spec,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "growth": memory.growth,
        "step_seconds": sum(timed) / len(timed),
        "trainer_bytes_per_token": trainer.step.bytes_per_token,
        "predicted": predicted,
        "dry_run": plan.memory.total,
        "rates": {name: getattr(machine, name) for name in ("fp32", "bf16", "thin_fp32", "thin_bf16", "bandwidth")},
    }


# ---- run and render --------------------------------------------------------------------------------------------------


def run(threads: int, out: Path) -> dict[str, Any]:
    """Measures all cells that are missing, each in a process of its own."""
    from benchmarks.cell import machine

    report: dict[str, Any] = {
        "machine": machine({"threads": threads}),
        stale.KEY: stale.stamp(*SOURCES),
        "cells": [],
    }
    if out.is_file():
        old = json.loads(out.read_text(encoding="utf-8"))
        if stale.why_stale(old) is None:
            report = old
    done = {tuple(cell[key] for key in KEYS) for cell in report["cells"]}
    for spec in specs():
        if tuple(spec.values()) in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            command = [sys.executable, "-m", "benchmarks.memory", "--cell", json.dumps({**spec, "threads": threads})]
            subprocess.run([*command, str(result)], check=True, cwd=HERE.parent, stdout=subprocess.DEVNULL)
            report["cells"].append(json.loads(result.read_text(encoding="utf-8")))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(line(report["cells"][-1]), flush=True)
    return report


def ratios(cell: dict[str, Any]) -> tuple[float, float]:
    """Predicted over measured: memory growth, step time."""
    return (
        cell["predicted"]["memory"]["total"] / cell["growth"],
        cell["predicted"]["time"]["step_seconds"] / cell["step_seconds"],
    )


def line(cell: dict[str, Any]) -> str:
    """A cell in one line."""
    memory, seconds = ratios(cell)
    return (
        f"{' '.join(str(cell[key]) for key in KEYS)}: memory {cell['growth'] / 2**20:.0f} MiB, predicted / measured "
        f"{memory:.2f}; step {cell['step_seconds']:.3f} s, {seconds:.2f}"
    )


def summary(report: dict[str, Any]) -> str:
    """Table and sentences for the document."""
    import statistics

    from benchmarks.render import machine_text
    from benchmarks.toy import markdown_table

    rows, memories, times = [], [], []
    for cell in report["cells"]:
        memory, seconds = ratios(cell)
        memories.append(memory)
        times.append(seconds)
        predicted = cell["predicted"]
        rows.append(
            [
                f"{cell['num_parameters'] / 1e6:.0f} M",
                cell["rows"] + ("" if cell["rows"] == "short" else " *"),
                "all weights" if cell["peft"] == "full" else "LoRA r 16",
                cell["dtype"],
                "yes" if cell["checkpointing"] else "no",
                f"{cell['growth'] / 2**20:.0f}",
                f"{predicted['memory']['total'] / 2**20:.0f}",
                f"{memory:.2f}",
                f"{cell['step_seconds']:.2f}",
                f"{predicted['time']['step_seconds']:.2f}",
                f"{seconds:.2f}",
            ]
        )
    heads = [
        "parameters",
        "rows",
        "trained",
        "dtype",
        "recomputed",
        "MiB",
        "predicted",
        "ratio",
        "s/step",
        "predicted",
        "ratio",
    ]
    within = sum(1 / STATED_FACTOR <= each <= STATED_FACTOR for each in memories)
    in_time = sum(1 / STATED_FACTOR <= each <= STATED_FACTOR for each in times)
    told = (
        f"Predicted over measured, memory: median {statistics.median(memories):.2f}, {min(memories):.2f} to "
        f"{max(memories):.2f}, {within} of {len(memories)} cells within 25 %. Time of a step (processor time, one "
        f"thread): median {statistics.median(times):.2f}, {min(times):.2f} to {max(times):.2f}, {in_time} of "
        f"{len(times)} within 25 %. Rows with a star had no part in fitting the constants. Measured "
        f"{report[stale.KEY]['date']}."
    )
    return "\n\n".join(
        [markdown_table(heads, rows, right=range(5, 11)), told, f"**Environment.** {machine_text(report['machine'])}"]
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
