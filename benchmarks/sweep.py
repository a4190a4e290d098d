"""What a sweep costs beside as many runs of TRL: ``python -m benchmarks.sweep``.

A 3x3 sweep on HH pairs and nine runs of TRL with the same model, rows, settings and held-out pairs, each run a process
of its own, as somebody would start it; all of it several times over. Wall time and peak memory of both, side by side.

A quick look:    python -m benchmarks.sweep --quick --repetitions 1 --rows 24 --model llama-1m --out /tmp/sweep.json
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
from statistics import median
from typing import Any

from benchmarks import stale
from preftune.errors import SetupError

RESULTS = Path(__file__).resolve().parent / "results" / "sweep"
PATTERNS = (*stale.ENGINE, "src/preftune/sweep/*.py", "benchmarks/sweep.py")
#: How the command line reads rows as TRL does; by default it makes conversations of transcripts.
AS_TRL = {"transcripts": "text", "implicit_prompt": "common_prefix", "environment_turns": "scored"}
TRL_GRID: dict[str, tuple[float, ...]] = {"beta": (0.05, 0.1, 0.2), "learning_rate": (1e-6, 1e-5, 1e-4)}
_HELD_OUT = 0.1


def params_of(grid: dict[str, tuple[float, ...]]) -> list[str]:
    """``--param`` arguments of a grid."""
    return [
        text for name, values in grid.items() for text in ("--param", f"{name}={','.join(f'{v:g}' for v in values)}")
    ]


def run(
    out: Path, num_rows: int, model: str, work: Path, threads: int, repetitions: int, go_on: bool, quick: bool = False
) -> dict[str, Any]:
    """Ours once and TRL nine times, each in processes of its own with empty caches; as often as is said.

    Args:
        out: The result file.
        num_rows: HH pairs, a tenth of them held out.
        model: Name of a model of `benchmarks.workloads`.
        work: Folder for model and data.
        threads: Of every process.
        repetitions: Of all of it.
        go_on: Keep what a run that was cut short has measured.
        quick: A grid of two cells.

    Returns:
        The report.
    """
    from benchmarks import seeded, workloads

    tokenizer = workloads.load_tokenizer(work)
    folder = workloads.model_folder(work, model, tokenizer)
    tokenizer.save_pretrained(folder)
    rows = workloads.make_rows("hh", num_rows, tokenizer)
    number = max(2, round(_HELD_OUT * num_rows))
    data = work / "sweep-data"
    data.mkdir(exist_ok=True)
    for name, part in (("train", rows[number:]), ("test", rows[:number])):
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    workload = workloads.WORKLOADS["hh"]
    grid = {name: values[::2] if name == "learning_rate" else values[:1] for name, values in TRL_GRID.items()}
    grid = grid if quick else TRL_GRID
    base = {
        "per_device_train_batch_size": workload.batch_size,
        "max_length": workload.max_length,
        "num_train_epochs": 1,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 42,
    }
    head: dict[str, Any] = {
        "workload": "hh",
        "model": model,
        "num_train_pairs": num_rows - number,
        "num_held_out_pairs": number,
        "grid": {name: list(values) for name, values in grid.items()},
        "settings": base,
        "machine": machine_of(threads),
    }
    cells = seeded.Cells(out, head, PATTERNS, ("repetition",), go_on)
    for repetition in range(repetitions):
        if cells.has(repetition=repetition):
            continue
        with tempfile.TemporaryDirectory(prefix="preftune-sweep-") as scratch:
            environment = environment_of(Path(scratch), threads)
            ours = our_sweep(base | AS_TRL, folder, data, Path(scratch), environment, False, grid)
            theirs = _trl(base, folder, data, Path(scratch), environment, grid)
        cell = {"repetition": repetition, "preftune": ours, "trl": theirs}
        if (apart := _largest_difference([cell])) > 1e-3:
            raise SetupError("the two did not train the same", where="held-out loss", value=f"{apart:.1e} apart")
        cells.enter(cell)
        print(
            f"preftune: {ours['seconds']:.0f} s, {ours['peak_bytes'] / 2**20:.0f} MiB; "
            f"{len(theirs['runs'])} TRL runs: {theirs['seconds']:.0f} s, {theirs['peak_bytes'] / 2**20:.0f} MiB",
            flush=True,
        )
    return cells.finish()


def render(report: dict[str, Any]) -> str:
    """The table of ``docs/sweep.md``."""
    from benchmarks import toy

    cells = report["cells"]

    def row(name: str, figure: str) -> list[str]:
        unit = 2**20 if figure == "peak_bytes" else 1
        ours, theirs = ([cell[who][figure] / unit for cell in cells] for who in ("preftune", "trl"))
        ratios = [t / o for o, t in zip(ours, theirs, strict=True)]
        return [name, _spread(theirs, ",.0f"), _spread(ours, ",.0f"), _spread(ratios, ".1f")]

    steps = -(-report["num_train_pairs"] // report["settings"]["per_device_train_batch_size"])
    table = toy.markdown_table(
        [f"median of {len(cells)} (lowest to highest)", "nine TRL runs", "one sweep", "ratio"],
        [row("seconds", "seconds"), row("peak of a process, MiB", "peak_bytes")],
        right=(1, 2, 3),
    )
    return (
        f"{table}\n\n`{report['model']}`, {report['num_train_pairs']} pairs to train on ({steps} steps of "
        f"{report['settings']['per_device_train_batch_size']}) and {report['num_held_out_pairs']} held out. No "
        f"held-out loss of a cell differs from TRL's by more than {_largest_difference(cells):.0e}. Measured "
        f"{report[stale.KEY]['date']}."
    )


def _spread(values: Sequence[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _largest_difference(cells: Sequence[dict[str, Any]]) -> float:
    """Of held-out losses, ours to TRL's."""
    differences: list[float] = [
        abs(trial["metrics"]["eval_loss"]["mean"] - run["metrics"]["eval_loss"])
        for cell in cells
        for trial in cell["preftune"]["trials"]
        for run in cell["trl"]["runs"]
        if trial["params"] == run["params"]
    ]
    return max(differences)


def machine_of(threads: int) -> dict[str, Any]:
    """What the benchmark's cells record about the machine."""
    from benchmarks.cell import machine

    return machine({"threads": threads})


def environment_of(scratch: Path, threads: int) -> dict[str, str]:
    """Variables of a process with caches of its own."""
    found = {
        **os.environ,
        "PREFTUNE_CACHE": str(scratch / "references"),
        "HF_DATASETS_CACHE": str(scratch / "datasets"),
    }
    return {**found, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _measured(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Wall time and peak memory of a command: a helper process has this command as its only child."""
    code = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode;"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(done)"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *command], env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SetupError("a run failed", where=" ".join(command), value=done.returncode)
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": time.perf_counter() - started, "peak_bytes": unit * int(done.stdout.split()[-1])}


def our_sweep(
    base: dict[str, Any],
    model: Path,
    data: Path,
    scratch: Path,
    environment: dict[str, str],
    peft: bool,
    grid: dict[str, tuple[float, ...]],
    extra: Sequence[str] = (),
) -> dict[str, Any]:
    """One sweep from the command line, with further arguments ``extra``: wall time, peak memory and its trials."""
    settings = {**base, "model_name_or_path": str(model), "dataset_name": str(data)}
    if peft:
        settings |= {"use_peft": True, "lora_target_modules": "all-linear", "lora_dropout": 0.0}
    config = scratch / "base.yaml"
    config.write_text(json.dumps(settings), encoding="utf-8")
    out = scratch / "sweep"
    command = [sys.executable, "-m", "preftune", "sweep", "--config", str(config), *params_of(grid)]
    # TRL draws no samples either.
    found = _measured([*command, "--out", str(out), "--keep", "none", "--num_samples", "0", *extra], environment)
    result = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    return {
        **found,
        "reference_passes": result["reference_passes"],
        "trials": [
            {key: trial[key] for key in ("params", "state", "metrics", "seconds")} for trial in result["trials"]
        ],
    }


def _trl(
    base: dict[str, Any],
    model: Path,
    data: Path,
    scratch: Path,
    environment: dict[str, str],
    grid: dict[str, tuple[float, ...]],
) -> dict[str, Any]:
    runs = []
    for beta in grid["beta"]:
        for rate in grid["learning_rate"]:
            spec = {
                "settings": {**base, "beta": beta, "learning_rate": rate, "output_dir": str(scratch / "trl")},
                "model": str(model),
                "data": str(data),
                "result": str(scratch / "trl.json"),
            }
            (scratch / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
            command = [sys.executable, "-m", "benchmarks.sweep", "--trl-run", str(scratch / "spec.json")]
            found = _measured(command, environment)
            metrics = json.loads((scratch / "trl.json").read_text(encoding="utf-8"))
            runs.append({"params": {"beta": beta, "learning_rate": rate}, **found, "metrics": metrics})
            print(f"TRL, beta {beta:g}, learning_rate {rate:g}: {found['seconds']:.0f} s", flush=True)
    return {
        "seconds": sum(run["seconds"] for run in runs),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "runs": runs,
    }


def trl_run(spec_file: Path) -> None:
    """One run of TRL, from loading to held-out figures."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    spec = json.loads(spec_file.read_text(encoding="utf-8"))
    splits = {
        name: load_dataset("json", data_files=str(Path(spec["data"]) / f"{name}.jsonl"), split="train")
        for name in ("train", "test")
    }
    trainer: Any = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(spec["model"]),
        args=DPOConfig(**spec["settings"], dataloader_pin_memory=False, disable_tqdm=True),
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
    )
    found = dict(trainer.train().metrics) | trainer.evaluate()
    Path(spec["result"]).write_text(json.dumps(found), encoding="utf-8")


# ---- command line --------------------------------------------------------------------------------------------------


def write(report: dict[str, Any], path: Path) -> None:
    """Write a report; called after every stage, so that a run that is stopped leaves what it has measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes the result file and the table."""
    from benchmarks import seeded, toy

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32, help="HH pairs, a tenth of them held out")
    parser.add_argument("--model", default="llama-19m")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "preftune-bench")
    seeded.arguments(parser, RESULTS / "against-trl.json", toy.DOCS / "sweep.md")
    given = parser.parse_args(argv)
    if given.trl_run is not None:
        trl_run(given.trl_run)
        return 0
    given.work.mkdir(parents=True, exist_ok=True)
    if given.render:
        report = toy.read_report(given.out)
    else:
        report = run(
            given.out, given.rows, given.model, given.work, given.threads, given.repetitions, given.go_on, given.quick
        )
    seeded.place(given.document, "against-trl", render(report))
    print(f"wrote {given.document}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
