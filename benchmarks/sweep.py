"""What a sweep finds and what it costs: ``python -m benchmarks.sweep --demo`` and ``--against-trl``.

``--demo``: in the demo's world, where the reward of a text is known exactly, a 3x3 sweep of beta and learning rate
picks its sweet spot from held-out pairs alone. Afterwards every cell's policy is scored by the truth. Per seed the
sweet spot passes if its true reward lies within the interval of the truly best cell's.

``--against-trl``: one 3x3 sweep on HH pairs against nine runs of TRL with the same model, rows, settings and held-out
pairs, each run a process of its own, as somebody would start it. Wall time and peak memory of both, side by side.

A quick look:    python -m benchmarks.sweep --demo --seeds 0 --quick --out /tmp/sweep.json
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
from dataclasses import replace
from pathlib import Path
from typing import Any

from preftune.errors import SetupError

RESULTS = Path(__file__).resolve().parent / "results" / "sweep"
#: Around the toy's own rate; the ends are meant to be too timid and too bold.
DEMO_GRID: dict[str, tuple[float, ...]] = {"beta": (0.05, 0.2, 0.8), "learning_rate": (5e-5, 2.5e-4, 1.25e-3)}
TRL_GRID: dict[str, tuple[float, ...]] = {"beta": (0.05, 0.1, 0.2), "learning_rate": (1e-6, 1e-5, 1e-4)}
_HELD_OUT = 0.1


def params_of(grid: dict[str, tuple[float, ...]]) -> list[str]:
    """``--param`` arguments of a grid."""
    return [
        text for name, values in grid.items() for text in ("--param", f"{name}={','.join(f'{v:g}' for v in values)}")
    ]


# ---- the truth in the demo's world ---------------------------------------------------------------------------------


def demo_seed(
    seed: int,
    settings: Any,
    folder: Path,
    grid: dict[str, tuple[float, ...]] = DEMO_GRID,
    num_samples: int | None = None,
    num_held_out: int | None = None,
) -> dict[str, Any]:
    """One sweep in the demo's world, and the true reward of every cell.

    Args:
        seed: Of world, data, weights and samples.
        settings: Sizes and rates.
        folder: For everything.
        grid: What is searched.
        num_samples: Held-out prompts on which each trial is sampled; by default the sweep's own number.
        num_held_out: Held-out prompts; by default as many as the truth is measured on.
    """
    from benchmarks import toy
    from preftune.cli.main import main as preftune
    from preftune.demo.pairs import make_pairs
    from preftune.demo.training import quiet

    bench = toy.make_bench(seed, settings, folder)
    for part in (bench.reference, bench.tokenizer):
        part.save_pretrained(folder / "model")
    # Pairs to choose by, apart from those that the truth is measured beside.
    choosing = make_pairs(
        bench.reference,
        bench.tokenizer,
        bench.world,
        num_held_out or settings.num_eval_prompts,
        seed + 1,
        split="heldout",
    )
    for name, pairs in (("train", bench.pairs), ("test", choosing)):
        lines = [json.dumps(pair.row()) for pair in pairs]
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    base = {
        **toy.COMMON,
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data"),
        "num_train_epochs": settings.dpo_epochs,
        "per_device_train_batch_size": settings.dpo_batch_size,
        "seed": seed,
    }
    del base["disable_tqdm"]
    (folder / "base.yaml").write_text(json.dumps(base), encoding="utf-8")
    out = folder / "sweep"
    command = ["sweep", "--config", str(folder / "base.yaml"), *params_of(grid), "--out", str(out)]
    command += [] if num_samples is None else ["--num_samples", str(num_samples)]
    started = time.perf_counter()
    code = preftune([*command, "--keep", "all"])
    if code:
        raise SetupError("the sweep failed", where=" ".join(command), value=code)
    seconds = time.perf_counter() - started
    result = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    with quiet():
        cells = [_true_cell(bench, trial, out, toy) for trial in result["trials"]]
    return _verdict(seed, cells, result, seconds, toy.scores_record(bench.before, bench.before, seed))


def _true_cell(bench: Any, trial: dict[str, Any], out: Path, toy: Any) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    shown = ("number", "params", "state", "metrics", "left_reference", "tied_with_best", "seconds")
    found = {key: trial[key] for key in shown}
    if trial["state"] != "complete":
        return {**found, "true": None}
    policy = AutoModelForCausalLM.from_pretrained(out / trial["run"])
    return {**found, "true": toy.scores_record(bench.score(policy), bench.before, bench.seed)}


def _verdict(
    seed: int, cells: list[dict[str, Any]], result: dict[str, Any], seconds: float, before: dict[str, Any]
) -> dict[str, Any]:
    scored = [cell for cell in cells if cell["true"] is not None]
    best = max(scored, key=lambda cell: cell["true"]["reward"]["mean"])
    sweet = next(cell for cell in scored if cell["number"] == result["best"]["number"])
    reward, interval = sweet["true"]["reward"]["mean"], best["true"]["reward"]
    return {
        "seed": seed,
        "before": before,
        "cells": cells,
        "sweet_spot": sweet["number"],
        "highest_mean": result["best"]["highest_mean"],
        "truly_best": best["number"],
        "true_reward": reward,
        "true_reward_of_best": interval,
        "within": bool(interval["low"] <= reward),
        "reference_passes": result["reference_passes"],
        "seconds": round(seconds, 1),
    }


def run_demo(seeds: Sequence[int], out: Path, quick: bool) -> dict[str, Any]:
    """The experiment over seeds, written after each."""
    import torch

    from benchmarks import toy

    torch.set_num_threads(1)
    settings = toy.default_settings()
    if quick:
        settings = replace(settings, num_reviews=2000, sft_epochs=1, num_prompts=300, dpo_epochs=1, num_eval_prompts=80)
    report: dict[str, Any] = {
        "grid": {name: list(values) for name, values in DEMO_GRID.items()},
        "num_prompts": settings.num_prompts,
        "num_held_out_prompts": settings.num_eval_prompts,
        "machine": machine_of(1),
        "seeds": [],
    }
    for seed in seeds:
        with toy.workplace() as folder:
            found = demo_seed(seed, settings, folder)
        report["seeds"].append(found)
        report["num_within"] = sum(each["within"] for each in report["seeds"])
        write(report, out)
        low, high = found["true_reward_of_best"]["low"], found["true_reward_of_best"]["high"]
        print(
            f"seed {seed}: sweet spot is trial {found['sweet_spot']} with true reward {found['true_reward']:.3f}; "
            f"truly best is trial {found['truly_best']} with [{low:.3f}, {high:.3f}]: "
            f"{'within' if found['within'] else 'BELOW'}",
            flush=True,
        )
    return report


# ---- against nine runs of TRL --------------------------------------------------------------------------------------


def run_against_trl(
    out: Path, num_rows: int, model: str, work: Path, peft: bool, threads: int, quick: bool = False
) -> dict[str, Any]:
    """Ours once, TRL nine times, each in processes of its own with empty caches."""
    from benchmarks import workloads

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
    report: dict[str, Any] = {
        "workload": "hh",
        "model": model,
        "peft": peft,
        "num_train_pairs": num_rows - number,
        "num_held_out_pairs": number,
        "grid": {name: list(values) for name, values in grid.items()},
        "settings": base,
        "machine": machine_of(threads),
    }
    with tempfile.TemporaryDirectory(prefix="preftune-sweep-") as scratch:
        environment = environment_of(Path(scratch), threads)
        report["preftune"] = our_sweep(base, folder, data, Path(scratch), environment, peft, grid)
        write(report, out)
        report["trl"] = _trl(base, folder, data, Path(scratch), environment, peft, grid)
    ours, theirs = report["preftune"], report["trl"]
    report["times_faster"] = theirs["seconds"] / ours["seconds"]
    report["memory_ratio"] = theirs["peak_bytes"] / ours["peak_bytes"]
    write(report, out)
    print(
        f"preftune: {ours['seconds']:.0f} s, {ours['peak_bytes'] / 2**20:.0f} MiB; "
        f"{len(theirs['runs'])} TRL runs: {theirs['seconds']:.0f} s, {theirs['peak_bytes'] / 2**20:.0f} MiB"
    )
    return report


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
    peft: bool,
    grid: dict[str, tuple[float, ...]],
) -> dict[str, Any]:
    runs = []
    for beta in grid["beta"]:
        for rate in grid["learning_rate"]:
            spec = {
                "settings": {**base, "beta": beta, "learning_rate": rate, "output_dir": str(scratch / "trl")},
                "model": str(model),
                "data": str(data),
                "peft": peft,
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
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    spec = json.loads(spec_file.read_text(encoding="utf-8"))
    splits = {
        name: load_dataset("json", data_files=str(Path(spec["data"]) / f"{name}.jsonl"), split="train")
        for name in ("train", "test")
    }
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if spec["peft"] else None
    trainer: Any = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(spec["model"]),
        args=DPOConfig(**spec["settings"], dataloader_pin_memory=False, disable_tqdm=True),
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        peft_config=lora,
    )
    found = dict(trainer.train().metrics) | trainer.evaluate()
    Path(spec["result"]).write_text(json.dumps(found), encoding="utf-8")


# ---- command line --------------------------------------------------------------------------------------------------


def write(report: dict[str, Any], path: Path) -> None:
    """Write a report; called after every stage, so that a run that is stopped leaves what it has measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the two experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--demo", action="store_true", help="true reward of the sweet spot")
    kind.add_argument("--against-trl", action="store_true", help="wall time and peak memory against nine TRL runs")
    kind.add_argument("--trl-run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--quick", action="store_true", help="smaller sizes, to see that everything works")
    parser.add_argument("--rows", type=int, default=200, help="HH pairs, a tenth of them held out")
    parser.add_argument("--model", default="llama-19m")
    parser.add_argument("--lora", action="store_true", help="adapters instead of all weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "preftune-bench")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    given = parser.parse_args(argv)
    if given.trl_run is not None:
        trl_run(given.trl_run)
        return 0
    if given.demo:
        report = run_demo(given.seeds, given.out or RESULTS / "demo.json", given.quick)
        return 0 if report["num_within"] == len(report["seeds"]) else 1
    size = "" if given.model == "llama-19m" else given.model.replace("llama", "")
    name = f"against-trl{size}{'-lora' if given.lora else ''}.json"
    given.work.mkdir(parents=True, exist_ok=True)
    out = given.out or RESULTS / name
    run_against_trl(out, given.rows, given.model, given.work, given.lora, given.threads, given.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
