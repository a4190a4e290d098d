"""A pretrained model tuned on real pairs with the commands that a user types; writes docs/real.md: ``make learn-real``.

SmolLM2-135M-Instruct (``make real``) is tuned on HH (harmless) and dpo_en_demo with several seeds, evaluated on pairs
that were held out, and its time and memory are compared with TRL's on the same rows. Everything goes through
``preftune data convert``, ``dpo`` and ``eval`` as separate processes. Results are written after every run, and runs
that are already in the file are not repeated, so that the hours can be spent in parts.

    python -m benchmarks.real                         # everything: hours on two cores
    python -m benchmarks.real --data hh --seeds 0     # a part of it
    python -m benchmarks.real --render                # the page alone
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.run import run_cell

from benchmarks import pretrained, workloads

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "real.json"
PAGE = HERE.parent / "docs" / "real.md"
#: Pairs to train on and held out; the rest of a file is left alone.
SIZES = {"hh": (1_200, 300), "dpo_en": (240, 60)}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"use_peft": True, "lora_r": 16, "lora_alpha": 32, "lora_target_modules": "all-linear",
             "learning_rate": 2e-4},
    "full": {"learning_rate": 5e-6},
}  # fmt: skip
SHARED: dict[str, Any] = {
    "beta": 0.1, "per_device_train_batch_size": 8, "num_train_epochs": 1, "warmup_ratio": 0.1, "bf16": True,
    "lr_scheduler_type": "cosine", "max_length": 1024, "use_cpu": True, "save_strategy": "no", "report_to": "none",
}  # fmt: skip
EVAL = {"num_prompts": 48, "max_new_tokens": 96, "bf16": True}
#: Steps of each library in the comparison of time and memory, and its repetitions.
STEPS, REPETITIONS = 5, 3


def preftune(*words: str, work: Path) -> dict[str, float]:
    """Run a command line as a user would. Returns its seconds and peak memory in bytes."""
    paths = [str(HERE.parent / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PREFTUNE_CACHE": str(work / "cache"),
        "PYTHONPATH": os.pathsep.join(paths),
        "NO_COLOR": "1",
    }
    log = work / "log.txt"
    start = time.monotonic()
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "preftune", *words], stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise SystemExit(f"preftune {' '.join(words[:2])}: exit {process.returncode}: {' '.join(last)}")
    return {"seconds": round(time.monotonic() - start, 1), "peak_bytes": 1024 * usage.ru_maxrss}


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as flags."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value).lower())]


def split(data: str, work: Path) -> tuple[Path, Path]:
    """Write the file as its publisher has it in two parts, without a prompt in both. Returns their paths."""
    rows = workloads.published_rows(data)
    if not rows:
        raise SystemExit(f"{data}: neither {workloads.DATA / workloads.FILES[data]} nor the Hub has it")
    order: dict[str, list[Any]] = {}
    for row in rows:
        order.setdefault(_prompt_of(row), []).append(row)
    groups = list(order.values())
    random.Random(0).shuffle(groups)
    train, held_out = SIZES[data]
    parts: tuple[list[Any], list[Any]] = ([], [])
    for group in groups:
        if len(parts[1]) < held_out:
            parts[1].extend(group)
        elif len(parts[0]) < train:
            parts[0].extend(group)
    paths = (work / f"{data}-train.jsonl", work / f"{data}-heldout.jsonl")
    for path, part in zip(paths, parts, strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return paths


def _prompt_of(row: dict[str, Any]) -> str:
    if "conversations" in row:
        return json.dumps(row["conversations"])
    text: str = row["chosen"]
    return text[: text.rfind(workloads.TURN)]


def learn(data: str, peft: str, seed: int, work: Path) -> dict[str, Any]:
    """Tune and evaluate once."""
    train, held_out = split(data, work)
    run, evaluated = work / f"{data}-{peft}-{seed}", work / f"{data}-{peft}-{seed}-eval"
    for folder in (run, evaluated):
        shutil.rmtree(folder, ignore_errors=True)
    model = ["--model_name_or_path", str(pretrained.folder_of())]
    settings = SHARED | SETTINGS[peft] | {"seed": seed}
    where = ["--dataset_name", str(train), "--output_dir", str(run)]
    training = preftune("dpo", *model, *where, *flags(settings), work=work)
    reference = [] if peft == "lora" else ["--ref_model", str(pretrained.folder_of())]
    where = ["--dataset_name", str(held_out), "--out", str(evaluated)]
    evaluation = preftune("eval", "--model", str(run), *reference, *where, *flags(EVAL | {"seed": seed}), work=work)
    found = json.loads((evaluated / "eval.json").read_text())
    results = json.loads((run / "all_results.json").read_text())
    return {
        "data": data, "peft": peft, "seed": seed, "settings": settings, "source": workloads.source_of(data),
        "training": training, "train_loss": results.get("train_loss"), "evaluation": evaluation,
        **{key: found[key] for key in ("num_pairs", "metrics", "calibration", "kl", "lengths", "notes", "seconds")},
        "samples": [_without_system(sample) for sample in found["samples"]] if seed == 0 else [],
    }  # fmt: skip


def _without_system(sample: dict[str, Any]) -> dict[str, str]:
    prompt = sample["prompt"].rsplit("user\n", 1)[-1].removesuffix("assistant\n").strip()
    return {"prompt": prompt, "before": sample["reference_completion"], "after": sample["completion"]}


def compare(data: str, peft: str, work: Path) -> list[dict[str, Any]]:
    """Time and memory of both libraries, a few steps on rows of the training file as TRL's columns."""
    train, _ = split(data, work)
    converted = work / f"{data}-columns.jsonl"
    converted.unlink(missing_ok=True)
    preftune("data", "convert", "--dataset_name", str(train), "--out", str(converted), work=work)
    batch = SHARED["per_device_train_batch_size"]
    found = []
    for repetition in range(REPETITIONS):
        contenders = ["trl", "trl-precompute", "packed"]
        for variant in contenders[repetition:] + contenders[:repetition]:
            spec = {
                "task": "measure", "variant": variant, "workload": data, "model": "smollm2-135m", "dtype": "bf16",
                "peft": peft, "checkpointing": "default", "num_rows": STEPS * batch, "batch_size": batch,
                "scale": 1.0, "threads": None, "work": str(work), "rows": str(converted),
            }  # fmt: skip
            result = run_cell(spec, timeout=3600)
            print(data, peft, variant, repetition, result.get("error") or f"{result['seconds']:.0f} s", flush=True)
            found.append({"data": data, "peft": peft, "variant": variant, "repetition": repetition, **result})
    return found


def interval(metric: dict[str, float], digits: int = 3) -> str:
    """A mean and its interval."""
    return f"{metric['mean']:.{digits}f} [{metric['low']:.{digits}f}, {metric['high']:.{digits}f}]"


def render(report: dict[str, Any]) -> str:
    """The page."""
    runs, beside = report["runs"], report["beside"]
    machine = report["machine"]
    lines = [
        "# A pretrained model on real pairs",
        "",
        "Written by `python -m benchmarks.real` from `benchmarks/results/real.json`. SmolLM2-135M-Instruct "
        "(`make real`) is tuned by `preftune dpo` and judged by `preftune eval` on pairs whose prompts were held out; "
        "transcripts are rendered with the model's own chat template. One row is one seed, which changes the order of "
        "the data, the adapter's start and the samples. Intervals are 95 % over prompts.",
        "",
        f"Measured on {report['date']}: {machine['processor']}, {machine['num_cores']} cores, "
        f"torch {machine['versions']['torch']}, transformers {machine['versions']['transformers']}, "
        f"TRL {machine['versions'].get('trl', '-')}, commit {machine['commit']}.",
        "",
        "## What was learned",
        "",
        "Before tuning the accuracy of the implicit reward is undefined (policy and reference are one model), its "
        "margin 0 and KL 0.",
        "",
        "| data | weights | seed | pairs | accuracy | margin | KL, nats per answer | answer tokens, before | after "
        "| training |",
        "|---|---|---:|---:|---|---|---|---|---|---:|",
    ]
    for run in runs:
        lengths = run["lengths"]
        lines.append(
            f"| {run['data']} | {run['peft']} | {run['seed']} | {run['num_pairs']} "
            f"| {interval(run['metrics']['rewards/accuracies'])} | {interval(run['metrics']['rewards/margins'])} "
            f"| {interval(run['kl'], 2)} | {interval(lengths['reference']['tokens'], 0)} "
            f"| {interval(lengths['model']['tokens'], 0)} | {run['training']['seconds'] / 60:.1f} min |"
        )
    lines += ["", *_over_seeds(runs), "", "Settings, the same for all seeds:", ""]
    for peft in dict.fromkeys(run["peft"] for run in runs):
        shown = next(run["settings"] for run in runs if run["peft"] == peft)
        lines.append(f"- {peft}: " + ", ".join(f"`{k}: {v}`" for k, v in shown.items() if k != "seed"))
    if beside:
        lines += ["", "## Time and memory beside TRL", "", *_beside(beside)]
    lines += ["", "## Samples", "", "Drawn at temperature 1 with equal random numbers for both, chosen by reading.", ""]
    for run in runs:
        for number in report["shown"].get(f"{run['data']}-{run['peft']}", []) if run["seed"] == 0 else []:
            sample = run["samples"][number]
            lines += [f"**{run['data']}, {run['peft']}:** {_quoted(sample['prompt'])}", ""]
            lines += [f"> *before:* {_quoted(sample['before'])}", ">", f"> *after:* {_quoted(sample['after'])}", ""]
    return "\n".join(lines).rstrip() + "\n"


def _quoted(text: str) -> str:
    text = " ".join(text.split())
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, f"\\{mark}")
    return text if len(text) <= 400 else text[:400] + " ..."


def _over_seeds(runs: list[dict[str, Any]]) -> list[str]:
    lines = []
    for data, peft in dict.fromkeys((run["data"], run["peft"]) for run in runs):
        own = [run for run in runs if (run["data"], run["peft"]) == (data, peft)]
        shares = [run["metrics"]["rewards/accuracies"]["mean"] for run in own]
        clear = sum(run["metrics"]["rewards/margins"]["low"] > 0 for run in own)
        lines.append(
            f"- {data}, {peft}: accuracy {statistics.mean(shares):.3f} over {len(own)} seeds "
            f"({min(shares):.3f} to {max(shares):.3f}); the margin's interval lies above 0 in {clear} of {len(own)}."
        )
    return lines


def _beside(cells: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"{STEPS} optimizer steps of {SHARED['per_device_train_batch_size']} pairs each, bf16, {REPETITIONS} "
        "repetitions in fresh processes; building the trainer included, loading the model not. Median, range in "
        "brackets. Memory is growth over the loaded model.",
        "",
        "| data | weights | | pairs/s | memory, GB | pairs/s over TRL as shipped |",
        "|---|---|---|---|---|---|",
    ]
    names = {"trl": "TRL as shipped", "trl-precompute": "TRL, precomputed reference", "packed": "preftune"}
    for data, peft in dict.fromkeys((cell["data"], cell["peft"]) for cell in cells):
        own = [cell for cell in cells if (cell["data"], cell["peft"]) == (data, peft) and "error" not in cell]
        rates: dict[str, dict[int, float]] = {}
        for cell in own:
            rates.setdefault(cell["variant"], {})[cell["repetition"]] = cell["num_pairs"] / cell["seconds"]
        for variant, name in names.items():
            if variant not in rates:
                lines.append(f"| {data} | {peft} | {name} | failed | | |")
                continue
            memory = [cell["memory_growth"] / 1e9 for cell in own if cell["variant"] == variant]
            ratios = [
                rate / rates["trl"][number] for number, rate in rates[variant].items() if number in rates.get("trl", {})
            ]
            lines.append(
                f"| {data} | {peft} | {name} | {_spread([*rates[variant].values()])} | {_spread(memory)} "
                f"| {_spread(ratios) if ratios else '-'} |"
            )
    return lines


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing, write the results and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--peft", nargs="+", choices=SETTINGS, default=["lora", "full"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--pairs", nargs=2, type=int, metavar=("TRAIN", "HELDOUT"), help="other sizes, to try it out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file; the page is of the default one")
    parser.add_argument("--work", type=Path, required=False, help="folder for runs (default: benchmarks/real-work)")
    parser.add_argument("--no-trl", action="store_true", help="leave the comparison of time and memory out")
    parser.add_argument("--render", action="store_true", help="write the page from the results and stop")
    args = parser.parse_args(argv)
    work = (args.work or HERE / "real-work").resolve()
    report: dict[str, Any] = {"runs": [], "beside": [], "shown": {}}
    if args.pairs:
        SIZES.update(dict.fromkeys(SIZES, tuple(args.pairs)))
    if args.out.is_file():
        report = json.loads(args.out.read_text())
    if not args.render:
        work.mkdir(parents=True, exist_ok=True)
        report["machine"] = run_cell({"task": "machine", "threads": None}, 600)
        report["date"] = time.strftime("%Y-%m-%d")
        for data in args.data:
            for peft in args.peft:
                for seed in args.seeds:
                    wanted = {"data": data, "peft": peft, "seed": seed}
                    if any(wanted.items() <= run.items() for run in report["runs"]):
                        continue
                    report["runs"].append(learn(data, peft, seed, work))
                    _save(report, args.out)
                    print(data, peft, seed, interval(report["runs"][-1]["metrics"]["rewards/accuracies"]), flush=True)
                done = any((cell["data"], cell["peft"]) == (data, peft) for cell in report["beside"])
                if not args.no_trl and not done:
                    report["beside"] += compare(data, peft, work)
                    _save(report, args.out)
    page = PAGE if args.out == RESULTS else args.out.with_suffix(".md")
    page.write_text(render(report), encoding="utf-8")
    return 0


def _save(report: dict[str, Any], path: Path) -> None:
    report["runs"].sort(key=lambda run: (run["data"], run["peft"], run["seed"]))
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
