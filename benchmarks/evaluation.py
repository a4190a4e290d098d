"""How fast held-out pairs are evaluated, against TRL's ``DPOTrainer.evaluate``: ``python -m benchmarks.evaluation``.

Both score the same HH pairs under the same model and the same reference, which differs from it by a little noise, and
have to agree on accuracy and margin. Every cell runs in a process of its own on empty caches; the contenders of one
repetition run directly after one another, in changing order, and the ratio is formed within a repetition.

For TRL the clock covers ``evaluate()`` alone: building the trainer, tokenisation included, is measured apart. For
preftune it covers everything that ``preftune.evaluation.evaluate`` does on a loaded model: tokenisation, start-up
probe, hashing the weights, both models' scores, writing them to the store, and all intervals.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import seeded, stale

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "evaluation" / "speed.json"
DOCUMENT = HERE.parent / "docs" / "evaluation.md"
VARIANTS = ("trl", "preftune")
WORKLOAD, MODEL, BETA = "hh", "llama-19m", 0.1


def folders(work: Path) -> tuple[Any, Path, Path]:
    """Tokenizer, model and reference, made on first use."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks import workloads

    tokenizer = workloads.load_tokenizer(work)
    reference = workloads.model_folder(work, MODEL, tokenizer)
    policy = work / f"policy-{MODEL}"
    if not (policy / "model.safetensors").exists():
        model: Any = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.002 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(policy)
    return tokenizer, policy, reference


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Run one cell: seconds and what was found."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from benchmarks import workloads

    if spec.get("threads"):
        torch.set_num_threads(spec["threads"])
    tokenizer, policy, reference = folders(Path(spec["work"]))
    rows = workloads.make_rows(WORKLOAD, spec["num_rows"], tokenizer)
    dataset = Dataset.from_list(rows)
    model: Any = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    ref_model: Any = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    run = _trl if spec["variant"] == "trl" else _preftune
    return run(spec, model, ref_model, tokenizer, dataset) | {
        "num_pairs": spec["num_rows"],
        "num_threads": torch.get_num_threads(),
    }


def _trl(spec: dict[str, Any], model: Any, ref_model: Any, tokenizer: Any, dataset: Any) -> dict[str, Any]:
    from trl import DPOConfig, DPOTrainer

    from benchmarks import workloads

    started = time.perf_counter()
    trainer = DPOTrainer(
        model=model,
        ref_model=ref_model,
        args=DPOConfig(
            output_dir=str(Path(spec["scratch"]) / "out"),
            per_device_eval_batch_size=workloads.WORKLOADS[WORKLOAD].batch_size,
            max_length=workloads.WORKLOADS[WORKLOAD].max_length,
            bf16=spec["dtype"] == "bf16",
            use_cpu=True,
            beta=BETA,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=dataset.select(range(1)),
        eval_dataset=dataset,
        processing_class=tokenizer,
    )
    built, cpu = time.perf_counter(), time.process_time()
    found = trainer.evaluate()
    return {
        "seconds": time.perf_counter() - built,
        "cpu_seconds": time.process_time() - cpu,
        "construction_seconds": built - started,
        "accuracy": found["eval_rewards/accuracies"],
        "margin": found["eval_rewards/margins"],
    }


def _preftune(spec: dict[str, Any], model: Any, ref_model: Any, tokenizer: Any, dataset: Any) -> dict[str, Any]:
    from benchmarks import workloads
    from preftune.evaluation import evaluate

    started, cpu = time.perf_counter(), time.process_time()
    found = evaluate(
        model,
        dataset,
        tokenizer=tokenizer,
        ref_model=ref_model,
        out=str(Path(spec["scratch"]) / "out"),
        beta=BETA,
        bf16=spec["dtype"] == "bf16",
        max_length=workloads.WORKLOADS[WORKLOAD].max_length,
        num_prompts=0,
    )
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "parts": found.seconds,
        "accuracy": found.metrics["rewards/accuracies"]["mean"],
        "margin": found.metrics["rewards/margins"]["mean"],
    }


def machine(spec: dict[str, Any]) -> dict[str, Any]:
    """The environment, with the model and the rows made outside all measurements."""
    from benchmarks import cell

    folders(Path(spec["work"]))
    return cell.machine(spec)


def isolated(task: str, spec: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Run a task in a fresh process on empty caches.

    Raises:
        SystemExit: It failed; its last words are shown.
    """
    scratch = Path(tempfile.mkdtemp(prefix="preftune-eval-"))
    try:
        file, result = scratch / "task.json", scratch / "result.json"
        file.write_text(json.dumps(spec | {"task": task, "scratch": str(scratch)}), encoding="utf-8")
        environment = os.environ | {
            "PREFTUNE_CACHE": str(scratch / "cache"),
            "HF_DATASETS_CACHE": str(scratch / "datasets"),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "TQDM_DISABLE": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent / "src")]),
        }
        command = [sys.executable, "-m", "benchmarks.evaluation", "--cell", str(file), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)
        if done.returncode:
            raise SystemExit(f"{spec.get('variant', task)} failed: {done.stderr.strip().splitlines()[-1:]}")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def ratios(cells: list[dict[str, Any]], dtype: str) -> list[float]:
    """Seconds per pair of TRL over those of preftune, one ratio per repetition."""
    rate = {(c["rep"], c["variant"]): c["seconds"] / c["num_pairs"] for c in cells if c["dtype"] == dtype}
    reps = sorted({rep for rep, variant in rate if {(rep, other) for other in VARIANTS} <= set(rate)})
    return [rate[rep, "trl"] / rate[rep, "preftune"] for rep in reps]


def table(report: dict[str, Any]) -> str:
    """The result as a Markdown table: medians, and the range of the ratio."""
    lines = [
        "| | TRL `evaluate()`, pairs/s | preftune, everything, pairs/s | ratio (range) | margins differ by |",
        "|---|---:|---:|---:|---:|",
    ]
    for dtype in dict.fromkeys(cell["dtype"] for cell in report["cells"]):
        mine = [cell for cell in report["cells"] if cell["dtype"] == dtype]
        speed = {
            variant: statistics.median(c["num_pairs"] / c["seconds"] for c in mine if c["variant"] == variant)
            for variant in VARIANTS
        }
        found = ratios(report["cells"], dtype)
        margin = {c["variant"]: c["margin"] for c in mine}
        lines.append(
            f"| {dtype} | {speed['trl']:.2f} | {speed['preftune']:.2f} | {statistics.median(found):.1f} "
            f"({min(found):.1f}-{max(found):.1f}) | {abs(margin['trl'] - margin['preftune']):.1e} |"
        )
    return "\n".join(lines)


def render(report: dict[str, Any], document: Path) -> None:
    """Put the table between its marks in the document."""
    about = report["machine"]
    pairs = report["cells"][0]["num_pairs"]
    note = (
        f"{pairs} HH pairs, {MODEL} and a reference of the same shape, {report['reps']} repetitions; "
        f"{about['processor']}, {about['num_cores']} cores, {report['cells'][0]['num_threads']} threads, "
        f"torch {about['versions'].get('torch')}, trl {about['versions'].get('trl')}; {report['date'][:10]}."
    )
    load = (about.get("load_average") or [0.0])[0]
    if load > 0.5 * about["num_cores"]:
        note += f" The machine was busy (load {load:.1f}): take the figures as provisional."
    seeded.place(document, "speed", f"{note}\n\n{table(report)}")


def main(argv: list[str] | None = None) -> int:
    """Measure, write the JSON and the document.

    Returns:
        0.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--cell"]:
        spec = json.loads(Path(arguments[1]).read_text(encoding="utf-8"))
        found = {"measure": measure, "machine": machine}[spec["task"]](spec)
        Path(arguments[2]).write_text(json.dumps(found), encoding="utf-8")
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--dtype", type=lambda text: text.split(","), default=["bf16", "fp32"])
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's choice)")
    parser.add_argument("--timeout", type=float, default=3600)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / f"preftune-bench-{os.getuid()}")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--render", action="store_true", help="only put the stored table into the document")
    args = parser.parse_args(arguments)
    if args.render:
        render(json.loads(args.out.read_text(encoding="utf-8")), args.document)
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    common = {"work": str(args.work), "threads": args.threads, "num_rows": args.pairs}
    about = isolated("machine", common, args.timeout)
    cells = []
    for rep in range(args.reps):
        for dtype in args.dtype:
            for variant in VARIANTS if rep % 2 == 0 else VARIANTS[::-1]:
                spec = common | {"variant": variant, "dtype": dtype, "rep": rep}
                found = isolated("measure", spec, args.timeout)
                cells.append({key: spec[key] for key in ("variant", "dtype", "rep")} | found)
                print(
                    f"{dtype} {variant}: {args.pairs / found['seconds']:.2f} pairs/s, {found['margin']:.6f}", flush=True
                )
    report = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["benchmarks/evaluation.py", *arguments]),
        "workload": WORKLOAD,
        "model": MODEL,
        "reps": args.reps,
        "machine": about,
        stale.KEY: stale.stamp(*stale.ENGINE, "src/preftune/evaluation/*.py", "benchmarks/evaluation.py"),
        "cells": cells,
        "ratio": {dtype: ratios(cells, dtype) for dtype in args.dtype},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = args.out.with_suffix(".tmp")
    unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, args.out)
    print(table(report))
    if args.document.exists():
        render(report, args.document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
