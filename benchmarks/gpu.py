"""One command for a machine with a GPU: are the kernels right, how fast is training beside TRL: ``make gpu``.

Needs this checkout and what preftune itself needs, no network and no data files; TRL, where it is installed, is trained
beside. Results are written after every section and every training cell, so that a run that is cut short loses the last
one alone. ``render.py`` puts them into docs/benchmarks.md. Sections: env, varlen, flex, head, start, train-1b,
train-8b, train-qwen, waits.

The whole:       python -m benchmarks.gpu
First figures:   python -m benchmarks.gpu --only env,varlen,head,train-1b --seconds 240
On a CPU:        python -m benchmarks.gpu --dry        (tiny shapes, to try the command itself)
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "src")]

#: Section, seconds that must be left for it to begin, and where it is. The long ones with the first figures come first.
SECTIONS: dict[str, float] = {
    "env": 0,
    "varlen": 20,
    "head": 30,
    "train-1b": 120,
    "train-8b": 100,
    "flex": 60,
    "start": 45,
    "waits": 25,
    "train-qwen": 90,
}


class Report:
    """The results so far, on disk after every change.

    Args:
        path: JSON file.
        seconds: Time budget of the whole run.
        dry: Whether tiny shapes run on the CPU.
    """

    def __init__(self, path: Path, seconds: float, dry: bool) -> None:
        self.path, self.seconds, self.dry = path, seconds, dry
        self.start = time.monotonic()
        self.sections: dict[str, Any] = {}
        self.content: dict[str, Any] = {
            "kind": "gpu",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "dry": dry,
            "budget_s": seconds,
            "sections": self.sections,
        }

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.seconds - (time.monotonic() - self.start)

    def flush(self) -> None:
        """Write everything."""
        self.content["seconds"] = round(time.monotonic() - self.start, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.content, indent=1, default=str) + "\n")
        beside.replace(self.path)

    def run(self, name: str, need: float, check: Callable[[dict[str, Any]], None]) -> None:
        """Run a section, unless too little time is left; what it raises is a result too."""
        result: dict[str, Any] = {}
        self.sections[name] = result
        if self.left() < need:
            result["skipped"] = f"{max(self.left(), 0):.0f} s were left, {need:.0f} are needed"
        else:
            start = time.monotonic()
            try:
                check(result)
            except Exception as failure:
                result["error"] = f"{type(failure).__name__}: {' '.join(str(failure).split())[:600]}"
                result["where"] = traceback.format_exc()[-1500:]
            result["section_s"] = round(time.monotonic() - start, 1)
        self.flush()
        print(f"{name}: {json.dumps(result, default=str)[:1200]}", flush=True)
        gc.collect()


def environment(report: Report, result: dict[str, Any]) -> None:
    """What is installed, what the device reaches."""
    import torch

    from benchmarks import cell

    report.content["machine"] = cell.machine({"threads": None})
    result["c_compiler"] = shutil.which(os.environ.get("CC", "")) or shutil.which("gcc") or shutil.which("clang")
    try:
        import triton  # type: ignore[import-not-found,unused-ignore]

        result["triton"] = triton.__version__
    except ImportError:
        result["triton"] = None
    if not report.dry:
        properties = torch.cuda.get_device_properties(0)
        result["capability"] = f"{properties.major}.{properties.minor}"
        result["memory_gb"] = round(properties.total_memory / 1e9, 1)
        result["cuda"], result["rocm"] = torch.version.cuda, torch.version.hip
        block = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        other = torch.empty_like(block)
        other.copy_(block)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            other.copy_(block)
        torch.cuda.synchronize()
        result["copy_tb_per_second"] = round(20 * block.numel() / (time.perf_counter() - start) / 1e12, 2)


def checks(report: Report) -> dict[str, Callable[[dict[str, Any]], None]]:
    """Every section by name."""
    from benchmarks import gpu_checks, gpu_training

    plain = {
        "varlen": gpu_checks.check_varlen,
        "flex": gpu_checks.check_flex,
        "head": gpu_checks.check_head,
        "start": gpu_training.check_start,
        "waits": gpu_training.check_waits,
    }
    trained = {
        "train-1b": ("llama-3.2-1b", False),
        "train-8b": ("llama-3.1-8b", True),
        "train-qwen": ("qwen2.5-1.5b", False),
    }
    found: dict[str, Callable[[dict[str, Any]], None]] = {"env": partial(environment, report)}
    for name, check in plain.items():
        found[name] = partial(check, dry=report.dry, left=report.left)
    for name, (shape, lora) in trained.items():
        found[name] = partial(
            gpu_training.check_training,
            shape_name=shape,
            lora=lora,
            dry=report.dry,
            left=report.left,
            flush=report.flush,
        )
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the sections.

    Returns:
        2 without an accelerator, else 0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="time budget (default: 480)")
    parser.add_argument("--only", default="", help="comma-separated sections")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/gpu.json)")
    args = parser.parse_args(argv)
    wanted = args.only.split(",") if args.only else list(SECTIONS)
    if unknown := sorted(set(wanted) - set(SECTIONS)):
        parser.error(f"--only {','.join(unknown)}: allowed are {', '.join(SECTIONS)}")
    import torch

    if not args.dry and not torch.cuda.is_available():
        print("no CUDA or ROCm device is visible; --dry runs tiny shapes on the CPU", file=sys.stderr)
        return 2
    work = tempfile.TemporaryDirectory(prefix="preftune-gpu-")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    os.environ |= {"PREFTUNE_CACHE": work.name, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    # A dry run is no measurement and must not lie among them.
    default = Path(tempfile.gettempdir()) / "preftune-gpu-dry.json" if args.dry else HERE / "results" / "gpu.json"
    report = Report(args.out or default, args.seconds, args.dry)
    found = checks(report)
    with work:
        for name, need in SECTIONS.items():
            if name in wanted and not (args.dry and name == "train-qwen"):
                report.run(name, 0 if args.dry else need, found[name])
                if not args.dry:
                    torch.cuda.empty_cache()
    print(f"wrote {report.path} after {report.content['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
