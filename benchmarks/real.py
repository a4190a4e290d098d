"""A pretrained model tuned on real pairs with the commands that a user types; writes docs/real.md: ``make real-page``.

SmolLM2-135M-Instruct (``make real``) is tuned on HH (harmless) and dpo_en_demo over seeds and evaluated on pairs whose
prompts were held out, by ``preftune dpo`` and ``preftune eval`` as separate processes. Results are written after
every run, and runs that the same code has made before are not repeated, so that the hours can be spent in parts. Time
and memory beside TRL are those of ``benchmarks/run.py --preset pretrained``.

    python -m benchmarks.real                         # everything: hours on two cores
    python -m benchmarks.real --data hh --seeds 0     # a part of it
    python -m benchmarks.real --render                # the page alone

Which samples the page shows is chosen by reading, in the result's ``shown``; ``--render`` drops the others, since they
quote the data.
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

from benchmarks import pretrained, probing, stale, summary, workloads
from preftune.terminal.units import plural

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "real.json"
#: Made by ``benchmarks/run.py --preset pretrained``.
SPEED = HERE / "results" / "cpu-pretrained.json"
PAGE = HERE.parent / "docs" / "real.md"
SOURCES = (*stale.ENGINE, "src/preftune/evaluation/*.py")
#: Pairs to train on and held out; the rest of a file is left alone.
SIZES = {"hh": (1_000, 300), "dpo_en": (240, 60)}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"use_peft": True, "lora_r": 16, "lora_alpha": 32, "lora_target_modules": "all-linear",
             "learning_rate": 2e-4},
    "full": {"learning_rate": 5e-6},
}  # fmt: skip
SHARED: dict[str, Any] = {
    "beta": 0.1, "per_device_train_batch_size": 8, "num_train_epochs": 1, "warmup_ratio": 0.1, "bf16": True,
    "lr_scheduler_type": "cosine", "use_cpu": True, "save_strategy": "no", "report_to": "none",
}  # fmt: skip
#: An eighth of dpo_en's prompts is longer than 1,024 tokens.
OF_DATA: dict[str, dict[str, Any]] = {"hh": {"max_length": 1024}, "dpo_en": {"max_length": 2048}}
EVAL = {"num_prompts": 48, "max_new_tokens": 96, "bf16": True}


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
    settings = SHARED | SETTINGS[peft] | OF_DATA[data] | {"seed": seed}
    training = _train(train, run, settings, work)
    shutil.rmtree(evaluated, ignore_errors=True)
    reference = [] if peft == "lora" else ["--ref_model", str(pretrained.folder_of())]
    where = ["--dataset_name", str(held_out), "--out", str(evaluated)]
    evaluation = preftune("eval", "--model", str(run), *reference, *where, *flags(EVAL | {"seed": seed}), work=work)
    found = json.loads((evaluated / "eval.json").read_text())
    results = json.loads((run / "all_results.json").read_text())
    return {
        "data": data, "peft": peft, "seed": seed, "settings": settings, "source": workloads.source_of(data),
        "digest": stale.stamp(*SOURCES)["digest"],
        "training": training, "train_loss": results.get("train_loss"), "evaluation": evaluation,
        **{key: found[key] for key in ("num_pairs", "metrics", "calibration", "kl", "lengths", "seconds")},
        "samples": {str(n): _without_system(each) for n, each in enumerate(found["samples"])} if seed == 0 else {},
    }  # fmt: skip


def _train(data: Path, run: Path, settings: dict[str, Any], work: Path) -> dict[str, float]:
    """Tune, unless the same code has: an evaluation that fails should not cost an hour of training."""
    record = run.with_name(f"{run.name}-training.json")
    if record.is_file() and run.is_dir():
        earlier = json.loads(record.read_text())
        if earlier["settings"] == settings and stale.why_stale(earlier) is None:
            found: dict[str, float] = earlier["training"]
            return found
    shutil.rmtree(run, ignore_errors=True)
    model = ["--model_name_or_path", str(pretrained.folder_of())]
    where = ["--dataset_name", str(data), "--output_dir", str(run)]
    training = preftune("dpo", *model, *where, *flags(settings), work=work)
    record.write_text(json.dumps({"settings": settings, "training": training, stale.KEY: stale.stamp(*SOURCES)}))
    return training


def _without_system(sample: dict[str, Any]) -> dict[str, str]:
    prompt = sample["prompt"].rsplit("user\n", 1)[-1].removesuffix("assistant\n").strip()
    return {"prompt": prompt, "before": sample["reference_completion"], "after": sample["completion"]}


def interval(metric: dict[str, float], digits: int = 3) -> str:
    """A mean and its interval."""
    return f"{metric['mean']:.{digits}f} [{metric['low']:.{digits}f}, {metric['high']:.{digits}f}]"


def render(report: dict[str, Any]) -> str:
    """The page."""
    runs = report["runs"]
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
        f"TRL {machine['versions'].get('trl', '-')}, {_commits(runs)}. {report.get('note', '')}".strip(),
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
        kept = {k: v for k, v in shown.items() if k not in ("seed", *OF_DATA["hh"])}
        lines.append(f"- {peft}: " + ", ".join(f"`{k}: {v}`" for k, v in kept.items()))
    for data in dict.fromkeys(run["data"] for run in runs):
        lines.append(f"- {data}: " + ", ".join(f"`{k}: {v}`" for k, v in OF_DATA[data].items()))
    lines += [*_beside(), *_probed()]
    lines += ["", "## Samples", "", "Drawn at temperature 1 with equal random numbers for both, chosen by reading.", ""]
    for run in runs:
        for number in report["shown"].get(f"{run['data']}-{run['peft']}", []) if run["seed"] == 0 else []:
            sample = run["samples"][str(number)]
            lines += [f"**{run['data']}, {run['peft']}:** {_quoted(sample['prompt'])}", ""]
            lines += [f"> *before:* {_quoted(sample['before'])}", ">", f"> *after:* {_quoted(sample['after'])}", ""]
    return "\n".join(lines).rstrip() + "\n"


def _quoted(text: str) -> str:
    text = " ".join(text.split())
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, f"\\{mark}")
    return text if len(text) <= 400 else text[:400] + " ..."


def _commits(runs: list[dict[str, Any]]) -> str:
    """The commits that made the runs."""
    of: dict[str, set[str]] = {}
    for run in runs:
        of.setdefault(run["commit"][:7], set()).add(f"{run['data']} {run['peft']}")
    if len(of) == 1:
        return f"commit {next(iter(of))}"
    return "commits " + ", ".join(f"{name} ({', '.join(sorted(which))})" for name, which in of.items())


def _over_seeds(runs: list[dict[str, Any]]) -> list[str]:
    lines = []
    for data, peft in dict.fromkeys((run["data"], run["peft"]) for run in runs):
        own = [run for run in runs if (run["data"], run["peft"]) == (data, peft)]
        shares = [run["metrics"]["rewards/accuracies"]["mean"] for run in own]
        clear = sum(run["metrics"]["rewards/margins"]["low"] > 0 for run in own)
        lines.append(
            f"- {data}, {peft}: accuracy {statistics.mean(shares):.3f} over {plural(len(own), 'seed')} "
            f"({min(shares):.3f} to {max(shares):.3f}); the margin's interval lies above 0 in {clear} of {len(own)}."
        )
    return lines


def _beside() -> list[str]:
    """Time and memory of both libraries on the same data, of the speed benchmark's file."""
    if not SPEED.is_file():
        return []
    report = json.loads(SPEED.read_text(encoding="utf-8"))
    names = ("contender", "pairs/s", "x TRL", "memory growth", "memory / TRL")
    wanted = [summary.HEADERS.index(name) for name in names]
    lines = [
        "",
        "## Time and memory beside TRL",
        "",
        f"From `benchmarks/results/{SPEED.name}`; how it is measured, and more columns, are in "
        "[benchmarks.md](benchmarks.md). *x TRL*: times the speed of TRL as shipped.",
        "",
        "| data, precision, weights, batch | " + " | ".join(names) + " |",
        "|---|---|" + "---:|" * (len(names) - 1),
    ]
    for setting, rows in summary.rows_of(report).items():
        _, data, dtype, peft, _, batch, *_ = setting
        for row in rows:
            lines.append(f"| {data}, {dtype}, {peft}, {batch} | " + " | ".join(row[each] for each in wanted) + " |")
    return lines


def _probed() -> list[str]:
    """How often the start-up probe refused these weights."""
    if not probing.OUT.is_file():
        return []
    report = json.loads(probing.OUT.read_text(encoding="utf-8"))
    head = (
        "Before training a packed row is tried against separate sequences ([how](design.md#which-models-are-packed)). "
        f"The same weights in six architectures, with {report['num_seeds']} draws of tokens each "
        f"(`benchmarks/results/{probing.OUT.name}`, by `python -m benchmarks.probing`):"
    )
    return ["", "## Packed, whatever the rounding", "", head, "", *probing.table(report)]


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing, write the results and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--peft", nargs="+", choices=SETTINGS, default=["lora", "full"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--pairs", nargs=2, type=int, metavar=("TRAIN", "HELDOUT"), help="other sizes, to try it out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file; the page is of the default one")
    parser.add_argument("--work", type=Path, required=False, help="folder for runs (default: benchmarks/real-work)")
    parser.add_argument("--go_on", action="store_true", help="keep the runs of earlier code; the result is theirs then")
    parser.add_argument("--render", action="store_true", help="write the page from the results and stop")
    args = parser.parse_args(argv)
    work = (args.work or HERE / "real-work").resolve()
    report: dict[str, Any] = {"runs": [], "shown": {}}
    if args.pairs:
        SIZES.update(dict.fromkeys(SIZES, tuple(args.pairs)))
    if args.out.is_file():
        earlier = json.loads(args.out.read_text())
        if args.render or args.go_on or stale.why_stale(earlier) is None:
            report = earlier
    if args.render:
        for run in report["runs"]:
            shown = report["shown"].get(f"{run['data']}-{run['peft']}", [])
            run["samples"] = {number: each for number, each in run["samples"].items() if int(number) in shown}
        _save(report, args.out)
    else:
        work.mkdir(parents=True, exist_ok=True)
        report["machine"] = run_cell({"task": "machine", "threads": None}, 600)
        report["date"] = time.strftime("%Y-%m-%d")
        for seed in args.seeds:  # outermost, so that hours that are cut short leave a whole table of fewer seeds
            for data in args.data:
                for peft in args.peft:
                    wanted = {"data": data, "peft": peft, "seed": seed}
                    if any(wanted.items() <= run.items() for run in report["runs"]):
                        continue
                    run = learn(data, peft, seed, work)
                    report["runs"].append(run | {"commit": report["machine"]["commit"]})
                    _save(report, args.out)
                    print(data, peft, seed, interval(run["metrics"]["rewards/accuracies"]), flush=True)
    page = PAGE if args.out == RESULTS else args.out.with_suffix(".md")
    page.write_text(render(report), encoding="utf-8")
    return 0


def _save(report: dict[str, Any], path: Path) -> None:
    # What was kept of earlier code makes the whole result that code's.
    report[stale.KEY] = made = stale.stamp(*SOURCES)
    made["digest"] = next((run["digest"] for run in report["runs"] if run["digest"] != made["digest"]), made["digest"])
    report["runs"].sort(key=lambda run: (run["data"], run["peft"], run["seed"]))
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
