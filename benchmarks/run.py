"""Measure TRL, the padded baseline and preftune side by side: ``make bench``.

Every cell runs in a fresh process with empty caches, the contenders of one setting directly after one another and in
rotating order, repetition after repetition, so that a slow minute of the machine hits all of them. The table shows the
median and the range; the JSON holds every single measurement and the environment. ``render.py`` turns it into
``docs/benchmarks.md``.

Results are written after every cell; with ``--go_on`` a run that was cut short keeps what the same code has measured.

A quick look:    python benchmarks/run.py --models llama-19m --reps 1
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.workloads import MODELS

from benchmarks import stale, summary

HERE = Path(__file__).resolve().parent
WORKLOADS = ("hh", "dpo_en", "capybara", "hh_rlhf", "metamath", "tldr", "helpsteer", "ultrafeedback")
VARIANTS = ("trl", "trl-precompute", "padded", "packed", "packed-known")
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "models": ["llama-19m", "smollm2-135m"],
        "only": ["hh"],
        "dtype": ["bf16"],
        "peft": ["full"],
        "checkpointing": ["default"],
        "variants": ["trl", "trl-precompute", "padded", "packed"],
        "reps": 3,
    },
    "pretrained": {
        "models": ["smollm2-135m"],
        "only": ["hh", "dpo_en"],
        "dtype": ["bf16", "fp32"],
        "peft": ["full", "lora"],
        "checkpointing": ["default"],
        "variants": list(VARIANTS),
        "reps": 3,
    },
    "full": {
        "models": ["llama-19m"],
        "only": list(WORKLOADS),
        "dtype": ["bf16", "fp32"],
        "peft": ["full", "lora"],
        "checkpointing": ["default", "off"],
        "variants": list(VARIANTS),
        "reps": 3,
    },
    "growth": {
        "models": ["llama-19m"],
        "only": ["hh_rlhf"],
        "dtype": ["bf16"],
        "peft": ["full"],
        "checkpointing": ["default"],
        "variants": ["packed"],
        "steps": 8,
        "reps": 1,
        "data_scale": [1, 4, 16],
        "length_scale": [1.0, 4.0],
    },
}
#: Optimizer steps of every contender; fewer would let a single slow row decide.
STEPS = 5
PREPARATION_SECONDS = 1800


@dataclass(frozen=True)
class Setting:
    """What all contenders have in common in one comparison."""

    model: str
    workload: str
    dtype: str
    peft: str
    checkpointing: str
    data_scale: int
    length_scale: float

    @property
    def name(self) -> str:
        """Short text for progress lines and tables."""
        scales = [f"{self.data_scale}x data"] * (self.data_scale != 1)
        scales += [f"{self.length_scale:g}x length"] * (self.length_scale != 1)
        return " ".join(
            [self.model, self.workload, self.dtype, self.peft, f"checkpointing {self.checkpointing}", *scales]
        )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; a preset fills what is not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", choices=PRESETS, default="quick", help="quick (default) | pretrained | full (hours) | growth"
    )

    def several(flag: str, choices: tuple[str, ...]) -> None:
        parser.add_argument(flag, type=lambda text: text.split(","), help=f"comma-separated: {', '.join(choices)}")

    several("--models", tuple(MODELS))
    several("--only", WORKLOADS)
    several("--dtype", ("bf16", "fp32"))
    several("--peft", ("full", "lora"))
    several("--checkpointing", ("default", "off"))
    several("--variants", VARIANTS)
    parser.add_argument("--steps", type=int, help="optimizer steps of every contender (default: 5)")
    parser.add_argument("--reps", type=int, help="repetitions")
    parser.add_argument("--batch", type=int, help="pairs per step (default: 8 for short rows, 4 for long ones)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's choice)")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds after which a cell is given up")
    parser.add_argument(
        "--work", type=Path, help="folder for tokenizer and model (default: under the temporary folder)"
    )
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/<device>-<preset>.json)")
    parser.add_argument("--note", default="", help="what a reader has to know about the circumstances")
    parser.add_argument(
        "--go_on", action="store_true", help="keep the cells of the result file that the same code measured before"
    )
    parser.add_argument("--dry_run", action="store_true", help="list the cells and stop")
    args = parser.parse_args(argv)
    preset = PRESETS[args.preset]
    given = {key: value for key, value in vars(args).items() if value is not None}
    merged: dict[str, Any] = {"data_scale": [1], "length_scale": [1.0], "steps": STEPS} | preset | given
    known: dict[str, tuple[str, ...]] = {
        "models": tuple(MODELS),
        "only": WORKLOADS,
        "dtype": ("bf16", "fp32"),
        "peft": ("full", "lora"),
        "variants": VARIANTS,
    }
    for key, allowed in {**known, "checkpointing": ("default", "off")}.items():
        for value in merged[key]:
            if value not in allowed:
                parser.error(f"--{key}: got {value!r}; allowed: {', '.join(allowed)}")
    return argparse.Namespace(**{"batch": None, "threads": None, "work": None, "out": None} | merged)


def make_spec(args: argparse.Namespace, setting: Setting, variant: str) -> dict[str, Any]:
    """Return the task of one cell."""
    steps = args.steps * setting.data_scale
    batch_size = args.batch or (8 if setting.workload in ("hh", "hh_rlhf") else 4)
    return {
        "task": "measure",
        "variant": variant,
        "workload": setting.workload,
        "model": setting.model,
        "dtype": setting.dtype,
        "peft": setting.peft,
        "checkpointing": setting.checkpointing,
        "num_rows": steps * batch_size,
        "batch_size": batch_size,
        "scale": setting.length_scale,
        "data_scale": setting.data_scale,
        "threads": args.threads,
        "work": str(args.work),
    }


def run_cell(spec: dict[str, Any], timeout: float, cache: Path | None = None) -> dict[str, Any]:
    """Run one task in a fresh process.

    Args:
        spec: Task, see ``cell.py``.
        timeout: Seconds.
        cache: Reference store to use; by default an empty one.

    Returns:
        The result, or ``{"error": ...}`` with the last words of the process.
    """
    scratch = Path(tempfile.mkdtemp(prefix="preftune-cell-"))
    try:
        task, result, log = scratch / "task.json", scratch / "result.json", scratch / "log.txt"
        task.write_text(json.dumps(spec | {"scratch": str(scratch)}))
        paths = [str(HERE.parent), str(HERE.parent / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PREFTUNE_CACHE": str(cache or scratch / "cache"),
            "HF_DATASETS_CACHE": str(scratch / "datasets"),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "TQDM_DISABLE": "1",
            "TMPDIR": str(scratch),
            "PYTHONPATH": os.pathsep.join(paths),
        }
        command = [sys.executable, "-m", "benchmarks.cell", str(task), str(result)]
        with log.open("w") as output:
            try:
                subprocess.run(
                    command, stdout=output, stderr=subprocess.STDOUT, env=environment, timeout=timeout, check=True
                )
            except subprocess.TimeoutExpired:
                return {"error": f"given up after {timeout:.0f} s"}
            except subprocess.CalledProcessError as error:
                words = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
                return {"error": f"exit {error.returncode}: {words[0][:300]}"}
        content: dict[str, Any] = json.loads(result.read_text())
        return content
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def run_all(
    args: argparse.Namespace, settings: list[Setting], results: list[dict[str, Any]], save: Callable[[], None]
) -> None:
    """Run every cell that is not done yet, interleaved, and print a line for each.

    Args:
        args: Command line.
        settings: What is compared in.
        results: Cells of an earlier call with the same code, to which this one adds.
        save: Called after every cell.
    """
    total, before = args.reps * len(settings) * len(args.variants), len(results)
    start = time.monotonic()
    done = {_place(cell) for cell in results}
    for rep, setting in itertools.product(range(args.reps), settings):
        places = {_place(make_spec(args, setting, variant) | {"rep": rep}) for variant in args.variants}
        if places <= done:
            continue
        # Contenders are compared within a repetition, so that one that was cut short is done again.
        results[:] = [cell for cell in results if _place(cell) not in places]
        variants = [variant for variant in args.variants if variant != "packed-known"]
        variants = variants[rep % len(variants) :] + variants[: rep % len(variants)] if variants else []
        with tempfile.TemporaryDirectory(prefix="preftune-cache-") as known:
            for variant in variants + ["packed-known"] * ("packed-known" in args.variants):
                spec = make_spec(args, setting, variant)
                cache = Path(known) if variant.startswith("packed") else None
                if variant == "packed-known" and "packed" not in variants:
                    run_cell(spec | {"variant": "packed"}, args.timeout, cache)  # fills the store, is not counted
                result = run_cell(spec, args.timeout, cache)
                record = {key: spec[key] for key in _PLACE[:-1]} | {"rep": rep} | result
                results.append(record)
                save()
                run_here = max(1, len(results) - before)
                left = (time.monotonic() - start) / run_here * (total - len(results))
                print(
                    f"[{len(results)}/{total}] {setting.name}: {summary.cell_line(record)}; {left / 60:.0f} min left",
                    flush=True,
                )


_PLACE = ("variant", "workload", "model", "dtype", "peft", "checkpointing", "batch_size", "scale", "data_scale", "rep")


def _place(cell: dict[str, Any]) -> tuple[Any, ...]:
    """Which cell of the table it is."""
    return tuple(cell[key] for key in _PLACE)


def _earlier(out: Path, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """Cells that an earlier call measured with the same code on the same kind of machine."""
    try:
        report = json.loads(out.read_text())
    except (OSError, ValueError):
        return []
    same = (stale.KEY, "processor", "num_cores", "num_threads", "versions", "accelerator")
    if any(_comparable(report["machine"].get(key)) != _comparable(machine.get(key)) for key in same):
        return []
    return [cell for cell in report["cells"] if "error" not in cell]


def _comparable(value: Any) -> Any:
    """A stamp without its day, which is not part of what it says."""
    return {key: each for key, each in value.items() if key != "date"} if isinstance(value, dict) else value


def _without_places(argv: list[str]) -> list[str]:
    """Arguments without those that say where files lie, which mean nothing elsewhere."""
    places = ("--work", "--out")
    pairs = zip(["", *argv], argv, strict=False)
    return [arg for before, arg in pairs if before not in places and arg not in places]


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the JSON.

    Returns:
        1 if a cell failed, else 0.
    """
    args = parse_arguments(argv)
    args.work = args.work or Path(tempfile.gettempdir()) / f"preftune-bench-{os.getuid()}"
    args.work.mkdir(parents=True, exist_ok=True)
    grid = itertools.product(
        args.models, args.only, args.dtype, args.peft, args.checkpointing, args.data_scale, args.length_scale
    )
    settings = [Setting(*cell) for cell in grid if 1 in cell[5:] or args.preset != "growth"]
    if args.dry_run:
        for setting, variant in itertools.product(settings, args.variants):
            print(f"{args.reps} x {setting.name}: {variant}, {args.steps * setting.data_scale} steps")
        return 0
    prepared = run_cell({"task": "prepare", "work": str(args.work), "models": args.models}, PREPARATION_SECONDS)
    machine = run_cell({"task": "machine", "threads": args.threads}, PREPARATION_SECONDS)
    for failed in (prepared, machine):
        if "error" in failed:
            print(f"benchmark cannot start: {failed['error']}", file=sys.stderr)
            return 1
    if busy := summary.busy(machine):
        print(busy, file=sys.stderr)
    device = "cuda" if machine["accelerator"] else "cpu"
    out = args.out or HERE / "results" / f"{device}-{args.preset}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    results = _earlier(out, machine) if args.go_on else []
    report = {
        "preset": args.preset,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["benchmarks/run.py", *_without_places(sys.argv[1:] if argv is None else argv)]),
        "machine": machine,
        "note": args.note,
        "cells": results,
    }

    def save() -> None:
        out.write_text(json.dumps(report, indent=1) + "\n")

    run_all(args, settings, results, save)
    save()
    print(f"\n{summary.table(report)}\n\nWritten to {out}; render with benchmarks/render.py")
    return 1 if any("error" in cell for cell in results) else 0


if __name__ == "__main__":
    sys.exit(main())
