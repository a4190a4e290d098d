"""Several adapters in one forward against one after another: ``python -m benchmarks.fused``.

The same 3x3 LoRA sweep of beta and learning rate twice, without and with ``--fuse 9``, for rows and models from small
to ordinary, each sweep a process of its own with empty caches. *Trials* is the sum of the trials' own seconds;
*command* is what a user waits for, start-up and the reference pass included. The figures that both find are compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.sweep import RESULTS, TRL_GRID, environment_of, machine_of, our_sweep, write

from benchmarks import workloads


@dataclass(frozen=True)
class Case:
    """One comparison: synthetic rows with HH-RLHF's lengths times ``scale``."""

    model: str
    scale: float
    batch_size: int
    num_rows: int
    bf16: bool = False


CASES = (
    Case("llama-1m", 0.15, 4, 96),
    Case("llama-1m", 1.0, 4, 96),
    Case("llama-19m", 0.15, 1, 24),
    Case("llama-19m", 0.15, 4, 48),
    Case("llama-19m", 1.0, 8, 32),
    Case("llama-19m", 1.0, 8, 32, bf16=True),
)


def measure(case: Case, work: Path, threads: int) -> dict[str, Any]:
    """Both sweeps of one case."""
    tokenizer = workloads.load_tokenizer(work)
    model = workloads.model_folder(work, case.model, tokenizer)
    tokenizer.save_pretrained(model)
    held_out = max(2, case.num_rows // 12)
    rows = workloads.make_rows("hh_rlhf", case.num_rows + held_out, tokenizer, case.scale)
    base = {
        "per_device_train_batch_size": case.batch_size,
        "max_length": 1024,
        "num_train_epochs": 1,
        "bf16": case.bf16,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 42,
    }
    found: dict[str, Any] = {"case": asdict(case)}
    for name, extra in (("sequential", ()), ("fused", ("--fuse", "9"))):
        with tempfile.TemporaryDirectory(prefix="preftune-fused-") as folder:
            scratch = Path(folder)
            data = scratch / "data"
            data.mkdir()
            for split, part in (("train", rows[held_out:]), ("test", rows[:held_out])):
                (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
            environment = environment_of(scratch, threads)
            found[name] = our_sweep(base, model, data, scratch, environment, True, TRL_GRID, extra)
        found[name]["trial_seconds"] = sum(trial["seconds"] for trial in found[name]["trials"])
    one, other = found["sequential"], found["fused"]
    found["times_faster_trials"] = one["trial_seconds"] / other["trial_seconds"]
    found["times_faster_command"] = one["seconds"] / other["seconds"]
    found["memory_ratio"] = other["peak_bytes"] / one["peak_bytes"]
    found["largest_difference"] = _largest_difference(one["trials"], other["trials"])
    return found


def _largest_difference(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> float:
    """Of any held-out figure of any trial, between the two sweeps."""
    by_params = {json.dumps(trial["params"], sort_keys=True): trial["metrics"] for trial in other}
    differences: list[float] = [
        abs(figure["mean"] - by_params[json.dumps(trial["params"], sort_keys=True)][name]["mean"])
        for trial in one
        for name, figure in trial["metrics"].items()
    ]
    return max(differences)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the cases and write them as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases, from 0")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "preftune-bench")
    parser.add_argument("--out", type=Path, default=RESULTS / "fused.json")
    given = parser.parse_args(argv)
    given.work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine_of(given.threads), "cases": []}
    for case in [CASES[number] for number in given.only] if given.only else CASES:
        found = measure(case, given.work, given.threads)
        report["cases"].append(found)
        write(report, given.out)
        print(
            f"{case}: trials {found['sequential']['trial_seconds']:.1f} s -> {found['fused']['trial_seconds']:.1f} s, "
            f"{found['times_faster_trials']:.2f}x; command {found['times_faster_command']:.2f}x; memory "
            f"{found['memory_ratio']:.2f}x; largest difference of a figure {found['largest_difference']:.1e}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
