"""The audit against the truth: estimated and real label noise on the demo's world, and two real files.

Pairs are made from the world's own reviews, two bodies for one opening, and labelled by its known reward; a share of
the labels is then turned round. Nothing is trained. Results go into a JSON file cell by cell, and from there into
``docs/audit.md``. A later run goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import stale

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "audit" / "noise.json"
DOCS = HERE.parent / "docs"
PATTERNS = (
    "src/preftune/data/audit/**/*.py",
    "src/preftune/stats/*.py",
    "src/preftune/demo/lexicon.py",
    "src/preftune/demo/world.py",
    "benchmarks/audit.py",
)
SHARED = HERE.parents[1] / "shared" / "data"
FILES = ("hh_harmless_1700.jsonl.gz", "dpo_en_demo.json")

LEVELS = (0.0, 0.1, 0.2, 0.3)
SEEDS = (0, 1, 2, 3, 4)
NUM_PAIRS = 8000
#: Also tried: fewer pairs, annotators that are unsure where the rewards are close, and a judge that sees nothing.
CASES: dict[str, dict[str, Any]] = {
    "main": {"num_pairs": NUM_PAIRS},
    "fewer": {"num_pairs": 4000},
    "unsure": {"num_pairs": 4000, "rule": "bradley_terry"},
    "blind": {"num_pairs": 1000, "rule": "coin"},
}
_SHARPNESS = 10.0


def world_pairs(
    seed: int, num_pairs: int, noise: float, rule: str = "hard", sharpness: float = _SHARPNESS
) -> tuple[list[dict[str, str]], list[bool]]:
    """Pairs of the review world with a known share of turned labels.

    Args:
        seed: Of reviews, labels and turns.
        num_pairs: How many.
        noise: Share of pairs whose label is turned round, rounded to whole pairs.
        rule: ``hard`` prefers the higher reward, ``bradley_terry`` with probability ``sigma(sharpness * difference)``,
            ``coin`` either at random: a preference that no feature explains.
        sharpness: Of the Bradley-Terry labels.

    Returns:
        Rows of prompt, chosen and rejected; and whether each label was turned round.
    """
    from scipy.special import expit

    from preftune.demo import lexicon
    from preftune.demo.world import World

    world, rng = World(seed), np.random.default_rng([seed, 7])
    waiting: dict[str, tuple[str, str]] = {}
    rows: list[dict[str, str]] = []
    for review in world.corpus(2 * num_pairs + num_pairs // 4 + 200):
        opening, body = review.split(".", 1)
        product = next(name for name in lexicon.PRODUCTS if f" {name} " in f"{opening} ")
        if product not in waiting:
            waiting[product] = (f"{opening}.", body)
            continue
        prompt, other = waiting.pop(product)
        gap = world.reward(prompt + body) - world.reward(prompt + other)
        if gap == 0:
            continue
        chance = {"hard": float(gap > 0), "bradley_terry": float(expit(sharpness * gap)), "coin": 0.5}[rule]
        better, worse = (body, other) if rng.random() < chance else (other, body)
        rows.append({"prompt": prompt, "chosen": better, "rejected": worse})
        if len(rows) == num_pairs:
            break
    turned = set(rng.permutation(len(rows))[: round(noise * len(rows))].tolist())
    for i in turned:
        rows[i]["chosen"], rows[i]["rejected"] = rows[i]["rejected"], rows[i]["chosen"]
    return rows, [i in turned for i in range(len(rows))]


def measure(case: str, noise: float, seed: int) -> dict[str, Any]:
    """One cell: the audit's estimate beside the truth."""
    from preftune.data.audit.noise import estimate_noise
    from preftune.data.audit.rows import read_rows
    from preftune.data.options import DataOptions

    rows, turned = world_pairs(seed, noise=noise, **CASES[case])
    start = time.perf_counter()
    _, found = estimate_noise(read_rows(rows, DataOptions()), seed=seed)
    judge = found["judges"][found["judge"]]
    real = sum(turned) / len(turned)
    return {
        "case": case,
        "noise": noise,
        "seed": seed,
        "num_pairs": found["num_pairs"],
        "turned": real,
        **judge,
        "told": found["told"],
        "off": judge["estimate"] - real,
        "covers": judge["low"] - 0.005 <= real <= judge["high"] + 0.005,
        "seconds": time.perf_counter() - start,
    }


def measure_file(name: str) -> dict[str, Any]:
    """The command line on one real file, in a process of its own, imports included."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "preftune", "data", "audit", "--dataset_name", str(SHARED / name), "--json"]
    start, before = time.perf_counter(), os.times()
    load = os.getloadavg()[0]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    seconds, after = time.perf_counter() - start, os.times()
    report = json.loads(done.stdout)
    kept = ("check", "severity", "title", "share", "low", "high", "threshold_kind")
    return {
        "file": name,
        "wall_seconds": seconds,
        "cpu_seconds": after.children_user + after.children_system - before.children_user - before.children_system,
        "load": load,
        "audit_seconds": report["seconds"],
        "num_rows": report["num_rows"],
        "num_read": report["num_read"],
        # Without examples: the files hold text that does not belong into a document.
        "findings": [{key: finding[key] for key in kept} for finding in report["findings"]],
        "noise": {key: value for key, value in report["noise"].items() if key != "suspects"},
    }


def run(
    cases: Sequence[str], levels: Sequence[float], seeds: Sequence[int], out: Path, *, with_files: bool = True
) -> dict[str, Any]:
    """Measure what is missing, and write the file after every cell."""
    from benchmarks.cell import machine

    fresh: dict[str, Any] = {"machine": machine({"threads": 1}), "cases": CASES, "cells": [], "files": []}
    fresh[stale.KEY] = stale.stamp(*PATTERNS)
    report = fresh
    if out.is_file():
        old = json.loads(out.read_text(encoding="utf-8"))
        if old["cases"] == CASES and old.get(stale.KEY, {}).get("digest") == fresh[stale.KEY]["digest"]:
            report = old
    done = {(cell["case"], cell["noise"], cell["seed"]) for cell in report["cells"]}
    for case in cases:
        for noise in levels:
            for seed in seeds:
                if (case, noise, seed) in done:
                    continue
                cell = measure(case, noise, seed)
                report["cells"].append(cell)
                write(report, out)
                interval = f"{cell['estimate']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"
                print(f"{case} {noise:.0%} seed {seed}: {interval} in {cell['seconds']:.1f} s", flush=True)
    known = {entry["file"] for entry in report["files"]}
    for name in FILES if with_files else ():
        if (SHARED / name).is_file() and name not in known:
            report["files"].append(measure_file(name))
            write(report, out)
    return report


def write(report: dict[str, Any], out: Path) -> None:
    """Write the result file; a reader never sees half of it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, out)


# ---- the document ---------------------------------------------------------------------------------------------------

_TITLES = {
    "main": "{n:,} pairs, labels by the higher reward",
    "fewer": "{n:,} pairs, labels by the higher reward",
    "unsure": "{n:,} pairs, Bradley-Terry annotators (unsure where rewards are close), then turned",
    "blind": "{n:,} pairs, labels by coin: no feature explains them",
}


def render(report: dict[str, Any]) -> str:
    """``docs/audit.md``: the written part, then the measured one."""
    text = (HERE / "audit.md.in").read_text(encoding="utf-8")
    parts = [cases_section(report), files_section(report), environment(report)]
    return text.rstrip() + "\n\n" + "\n\n".join(parts) + "\n"


def cases_section(report: dict[str, Any]) -> str:
    """Tables of estimates, one per case."""
    out = ["## Estimated against real noise", _summary(report)]
    for case, settings in report["cases"].items():
        cells = [cell for cell in report["cells"] if cell["case"] == case]
        if not cells:
            continue
        lines = [
            "| turned | estimates, one per seed [95 % interval] | furthest off | covers | judge agrees | judge right |",
            "|---:|---|---:|---:|---:|---:|",
        ]
        for noise in sorted({cell["noise"] for cell in cells}):
            some = sorted((cell for cell in cells if cell["noise"] == noise), key=lambda cell: int(cell["seed"]))
            shown = ", ".join(
                ("" if cell["told"] else "not told: ")
                + (f"{cell['estimate']:.1%} " if cell["told"] else "")
                + f"[{cell['low']:.1%}, {cell['high']:.1%}]"
                for cell in some
            )
            lines.append(
                f"| {noise:.0%} | {shown} | {max(abs(cell['off']) for cell in some):.1%} "
                f"| {sum(cell['covers'] for cell in some)} of {len(some)} "
                f"| {np.mean([cell['agreement'] for cell in some]):.1%} "
                f"| {np.mean([cell['accuracy'] for cell in some]):.1%} |"
            )
        out += [f"### {_TITLES[case].format(n=settings['num_pairs'])}", "\n".join(lines)]
    return "\n\n".join(out)


def _summary(report: dict[str, Any]) -> str:
    told = [cell for cell in report["cells"] if cell["case"] != "blind"]
    main = [cell for cell in told if cell["case"] == "main"]
    close = sum(abs(cell["off"]) <= 0.1 for cell in main)
    inside = sum(cell["low"] >= cell["turned"] - 0.1 and cell["high"] <= cell["turned"] + 0.1 for cell in main)
    covered = sum(cell["covers"] for cell in told)
    return (
        f"With {NUM_PAIRS:,} pairs, {close} of {len(main)} estimates lie within 10 points of the truth, and {inside}"
        f" have their whole interval within 10 points. Over all cases but the coin, {covered} of {len(told)} of"
        " the 95 % intervals cover the truth (with half a point of tolerance: the grid goes in steps of one)."
    )


def files_section(report: dict[str, Any]) -> str:
    """What the command line says about the real files."""
    out = ["## Two real files"]
    if not report["files"]:
        return "\n\n".join([*out, "Not measured: the files were not at hand."])
    for entry in report["files"]:
        command = f"preftune data audit --dataset_name {entry['file']} --out runs/audit"
        lines = ["| | check | finding | threshold |", "|---|---|---|---|"]
        lines += [
            f"| {one['severity']} | `{one['check']}` | {one['title'].replace('|', '/')} | {one['threshold_kind']} |"
            for one in entry["findings"]
        ]
        out += [
            f"### `{entry['file']}`",
            f"```\n{command}\n```",
            f"{entry['num_rows']:,} of {entry['num_read']:,} rows; {entry['wall_seconds']:.1f} s with all imports on"
            f" {report['machine']['num_cores']} cores, {entry['cpu_seconds']:.1f} s of processor time"
            + (f"; other programs were running (load average {entry['load']:.0f})." if entry["load"] > 1 else "."),
            "\n".join(lines),
        ]
    return "\n\n".join(out)


def environment(report: dict[str, Any]) -> str:
    """The machine and the versions."""
    from benchmarks.render import machine_text

    return f"## Environment\n\n{machine_text(report['machine'])}"


def main(argv: list[str] | None = None) -> int:
    """Measure, write the JSON file and the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="what to measure")
    parser.add_argument("--levels", type=float, nargs="+", default=list(LEVELS), help="shares of turned labels")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="a world each")
    parser.add_argument("--out", type=Path, default=RESULT, help="result file")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder for audit.md (default: docs)")
    parser.add_argument("--skip_files", action="store_true", help="leave the real files out")
    parser.add_argument("--render", action="store_true", help="measure nothing; write the document from the file")
    options = parser.parse_args(argv)
    if options.render:
        report = json.loads(options.out.read_text(encoding="utf-8"))
    else:
        report = run(options.cases, options.levels, options.seeds, options.out, with_files=not options.skip_files)
    (options.docs / "audit.md").write_text(render(report), encoding="utf-8")
    print(f"wrote {options.docs / 'audit.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
