"""One measured cell in a process of its own, so that its peak memory is its own too.

Called by ``run.py`` as ``python -m benchmarks.cell SPEC.json RESULT.json``. The clock covers what a user waits for:
building the trainer (tokenisation, reference pass, start-up probe) and ``train()``, on empty caches. Imports, loading
the model and reading the rows come before it, and the memory baseline is taken after them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from benchmarks import stale, workloads

TRL_VARIANTS = ("trl", "trl-precompute")
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "numpy", "preftune")


class PeakMemory:
    """Highest resident memory between entry and exit, in bytes, over the level at entry.

    The kernel's own high-water mark is exact where it can be reset; sampling covers systems where it cannot.
    """

    def __enter__(self) -> PeakMemory:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # free memory held by the allocator would hide growth
        self._process = psutil.Process()
        self.baseline = self._process.memory_info().rss
        self._peak = self.baseline
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._has_mark = True
        except OSError:
            self._has_mark = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.02):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        if self._has_mark:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    self._peak = max(self._peak, 1024 * int(line.split()[1]))
        self.growth = self._peak - self.baseline


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Run one cell.

    Args:
        spec: ``variant``, ``workload``, ``model``, ``dtype``, ``peft``, ``checkpointing``, ``num_rows``,
            ``batch_size``, ``scale``, ``work`` and optionally ``threads``.

    Returns:
        Seconds, pairs, tokens, floating-point operations of the work that had to be done, and peak memory growth.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    if spec["variant"] in TRL_VARIANTS:
        library: Any = importlib.import_module("trl")
    else:
        library = importlib.import_module("preftune")
    config_class, trainer_class = library.DPOConfig, library.DPOTrainer

    if spec.get("threads"):
        torch.set_num_threads(spec["threads"])
    work = Path(spec["work"])
    tokenizer = workloads.load_tokenizer(work, spec["model"])
    rows = workloads.make_rows(spec["workload"], spec["num_rows"], tokenizer, spec["scale"])
    counts = count_tokens(rows, tokenizer, _max_length(spec))
    folder = workloads.model_folder(work, spec["model"], tokenizer)
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if spec["model"] == "llama-3.1-8b" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    dataset = Dataset.from_list(rows)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if spec["peft"] == "lora" else None
    if cuda:
        model.to("cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        cuda_baseline = torch.cuda.memory_allocated()
    with PeakMemory() as memory:
        start, cpu_start = time.perf_counter(), time.process_time()
        trainer = trainer_class(
            model=model,
            args=config_class(**_settings(spec, cuda)),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=lora,
        )
        built = time.perf_counter()
        output = trainer.train()
        if cuda:
            torch.cuda.synchronize()
        end, cpu_end = time.perf_counter(), time.process_time()
    growth = torch.cuda.max_memory_allocated() - cuda_baseline if cuda else memory.growth
    expected_steps = -(-spec["num_rows"] // spec["batch_size"])
    if trainer.state.global_step != expected_steps:
        raise RuntimeError(f"{trainer.state.global_step} optimizer steps instead of {expected_steps}")
    return {
        "seconds": end - start,
        "construction_seconds": built - start,
        "training_seconds": end - built,
        "cpu_seconds": cpu_end - cpu_start,
        "num_pairs": spec["num_rows"],
        "num_steps": expected_steps,
        "num_useful_tokens": sum(map(sum, counts)),
        "useful_flops": useful_flops(counts, workloads.MODELS[spec["model"]], spec["peft"], len(tokenizer)),
        "data": workloads.source_of(spec["workload"]),
        "memory_growth": growth,
        "memory_baseline": cuda_baseline if cuda else memory.baseline,
        "train_loss": output.training_loss,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_threads": torch.get_num_threads(),
    }


def _max_length(spec: dict[str, Any]) -> int:
    scale: float = max(1.0, spec["scale"])
    return round(workloads.WORKLOADS[spec["workload"]].max_length * scale)


def _settings(spec: dict[str, Any], cuda: bool) -> dict[str, Any]:
    """Return the arguments, the same for both libraries but for the switch that a variant is about."""
    settings: dict[str, Any] = {
        "output_dir": str(Path(spec["scratch"]) / "out"),
        "per_device_train_batch_size": spec["batch_size"],
        "num_train_epochs": 1,
        "max_length": _max_length(spec),
        "bf16": spec["dtype"] == "bf16",
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if spec["checkpointing"] == "off":
        settings["gradient_checkpointing"] = False
    if spec["variant"] == "trl-precompute":
        settings["precompute_ref_log_probs"] = True
    if spec["variant"] == "padded":
        settings["packing_mode"] = "padded"
    if spec["variant"].startswith("packed"):
        settings["packing_mode"] = "packed"
    return settings


def count_tokens(rows: list[dict[str, Any]], tokenizer: Any, max_length: int) -> list[tuple[int, int, int]]:
    """Return tokens of prompt, chosen and rejected per row after truncation, by the benchmark's own count."""

    def length(prompt: Any, completion: Any = None) -> int:
        if isinstance(prompt, str):
            # A completion gets an end-of-sequence token; conversations bring theirs in the template.
            text, extra = prompt + (completion or ""), int(completion is not None)
        else:
            turns, alone = prompt + (completion or []), completion is None
            text, extra = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=alone), 0
        ids: list[int] = tokenizer(text)["input_ids"]
        return len(ids) + extra

    counts = []
    for row in rows:
        prompt = min(length(row["prompt"]), max_length)
        sides = [min(length(row["prompt"], row[side]), max_length) - prompt for side in ("chosen", "rejected")]
        counts.append((prompt, max(0, sides[0]), max(0, sides[1])))
    return counts


def useful_flops(
    counts: list[tuple[int, int, int]], shape: dict[str, Any], peft: str, vocab_size: int = workloads.VOCAB_SIZE
) -> float:
    """Return the operations that DPO cannot do without: prompts once, head at completion tokens only.

    One reference forward, one policy forward and its backward: twice the forward, or once where the weights are frozen
    and only gradients with respect to activations are needed. Recomputation under checkpointing does not count.
    """
    hidden, layers = shape["hidden"], shape["layers"]
    kv_size = hidden // shape["heads"] * shape["kv_heads"]
    body = 2 * layers * (2 * hidden * hidden + 2 * hidden * kv_size + 3 * hidden * shape["intermediate"])
    head = 2 * hidden * vocab_size
    matmul = attention = 0.0
    for prompt, chosen, rejected in counts:
        matmul += body * (prompt + chosen + rejected) + head * (chosen + rejected)
        contexts = prompt * (prompt + 1) / 2
        contexts += sum(n * prompt + n * (n + 1) / 2 for n in (chosen, rejected))
        attention += 4 * hidden * layers * contexts
    return (4 if peft == "full" else 3) * matmul + 4 * attention


def machine(spec: dict[str, Any]) -> dict[str, Any]:
    """Describe the machine, measure what its matrix products reach, in FLOP/s per dtype, and stamp the code."""
    import torch

    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    rates = {}
    size = 8192 if cuda else 2048
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        best = float("inf")
        for _ in range(8):
            start = time.perf_counter()
            torch.mm(a, b)
            if cuda:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        rates[name] = 2 * size**3 / best
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "processor": _processor(),
        "accelerator": torch.cuda.get_device_name() if cuda else None,
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        stale.KEY: stale.stamp(*stale.ENGINE, "benchmarks/cell.py"),
        "matmul_flops_per_second": rates,
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def prepare(spec: dict[str, Any]) -> dict[str, Any]:
    """Make tokenizers and models once, outside all measurements."""
    work = Path(spec["work"])
    for model in spec["models"]:
        workloads.model_folder(work, model, workloads.load_tokenizer(work, model))
    return {}


def main() -> None:
    """Read the task, do it, write the result."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    tasks = {"measure": measure, "prepare": prepare, "machine": machine}
    Path(sys.argv[2]).write_text(json.dumps(tasks[spec["task"]](spec)))


if __name__ == "__main__":
    main()
