"""How long it takes until a trainer stands, against TRL: ``python -m benchmarks.preparing``.

Both build a ``DPOTrainer`` with a model of 1 M parameters on the same JSON-lines file, untruncated, which is almost all
tokenisation; then a second process does it again with the caches that the first left behind. Building covers everything
between the loaded data set and the trainer. Every run is a process of its own; the ratio is formed within a repetition.
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

from benchmarks.render import machine_text

from benchmarks import cell, seeded, stale, workloads

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "preparing.json"
DOCUMENT = HERE.parent / "docs" / "performance.md"
LIBRARIES, WORKLOADS, MODEL = ("trl", "preftune"), ("hh", "dpo_en"), "llama-1m"


def measure(library: str, work: Path, data: Path, scratch: Path) -> dict[str, Any]:
    """Build one trainer: seconds and tokens."""
    import importlib

    from datasets import load_dataset
    from transformers import AutoModelForCausalLM

    module = importlib.import_module(library)
    tokenizer = workloads.load_tokenizer(work)
    model = AutoModelForCausalLM.from_pretrained(workloads.model_folder(work, MODEL, tokenizer))
    dataset = load_dataset("json", data_files=str(data), split="train")
    args = module.DPOConfig(
        output_dir=str(scratch / "out"),
        max_length=None,  # the two differ in what they do with pairs of which nothing is left
        max_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    started = time.perf_counter()
    trainer = module.DPOTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
    seconds = time.perf_counter() - started
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    tokens = sum(len(ids) for name in names for ids in trainer.train_dataset[name])
    return {"seconds": seconds, "num_tokens": tokens, "num_pairs": len(trainer.train_dataset)}


def isolated(spec: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Run :func:`measure` in a process of its own, whose caches lie in ``scratch``.

    Raises:
        SystemExit: It failed; its last words are shown.
    """
    environment = os.environ | {
        "PREFTUNE_CACHE": str(scratch / "cache"),
        "HF_DATASETS_CACHE": str(scratch / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent / "src")]),
    }
    command = [sys.executable, "-m", "benchmarks.preparing", "--cell", json.dumps(spec | {"scratch": str(scratch)})]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{spec['library']} failed: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def ratios(cells: list[dict[str, Any]], workload: str, first: bool) -> list[float]:
    """Seconds of TRL over those of preftune, one ratio per repetition."""
    seconds = {
        (c["rep"], c["library"]): c["seconds"] for c in cells if (c["workload"], c["first"]) == (workload, first)
    }
    return [seconds[rep, "trl"] / seconds[rep, "preftune"] for rep in sorted({rep for rep, _ in seconds})]


def table(report: dict[str, Any]) -> str:
    """The result as a Markdown table: medians, and the range of the ratio."""
    lines = ["| data | pairs | run | TRL, s | preftune, s | ratio (range) |", "|---|---:|---|---:|---:|---:|"]
    cells = report["cells"]
    for workload in dict.fromkeys(c["workload"] for c in cells):
        for first in (True, False):
            mine = [c for c in cells if (c["workload"], c["first"]) == (workload, first)]
            median = {name: statistics.median(c["seconds"] for c in mine if c["library"] == name) for name in LIBRARIES}
            found = ratios(cells, workload, first)
            lines.append(
                f"| {workload} | {mine[0]['num_pairs']:,} | {'first' if first else 'again'} | {median['trl']:.1f} "
                f"| {median['preftune']:.1f} | {statistics.median(found):.1f} ({min(found):.1f}-{max(found):.1f}) |"
            )
    return "\n".join(lines)


def render(report: dict[str, Any], document: Path) -> None:
    """Put the table between its marks in the document."""
    note = f"{machine_text(report['machine'])} {report['date'][:10]}."
    seeded.place(document, "preparing", f"{table(report)}\n\n{note}")


def main() -> int:
    """Measure, or only write the table."""
    if sys.argv[1:2] == ["--cell"]:
        spec = json.loads(sys.argv[2])
        paths = {name: Path(spec[name]) for name in ("work", "data", "scratch")}
        print(json.dumps(measure(spec["library"], **paths)))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--reps", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / f"preftune-bench-{os.getuid()}")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--render", action="store_true", help="only put the stored table into the document")
    args = parser.parse_args()
    if args.render:
        render(json.loads(args.out.read_text(encoding="utf-8")), args.document)
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = workloads.load_tokenizer(args.work)
    workloads.model_folder(args.work, MODEL, tokenizer)
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["benchmarks/preparing.py", *sys.argv[1:]]),
        "machine": cell.machine({"threads": None}),
        stale.KEY: stale.stamp("src/preftune/data/**/*.py", "benchmarks/preparing.py"),
        "cells": [],
    }
    for workload in WORKLOADS:
        data = args.work / f"preparing-{workload}-{args.pairs}.jsonl"
        rows = workloads.make_rows(workload, args.pairs, tokenizer)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for rep in range(args.reps):
            for library in LIBRARIES if rep % 2 == 0 else LIBRARIES[::-1]:
                scratch = Path(tempfile.mkdtemp(prefix="preftune-preparing-"))
                try:
                    for first in (True, False):
                        what = {"library": library, "workload": workload}
                        found = isolated(what | {"work": str(args.work), "data": str(data)}, scratch)
                        report["cells"].append(what | {"rep": rep, "first": first} | found)
                        print(what, "first" if first else "again", f"{found['seconds']:.1f} s", flush=True)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
    tokens = {(c["workload"], c["num_tokens"]) for c in report["cells"]}
    if len(tokens) != len(WORKLOADS):
        raise SystemExit(f"the two do not prepare the same tokens: {sorted(tokens)}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))
    if args.document.exists():
        render(report, args.document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
