"""Render ``docs/benchmarks.md`` from the JSON files in ``benchmarks/results``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu_document, summary

HERE = Path(__file__).resolve().parent
INTRODUCTION = """\
# Benchmarks

Rendered by `benchmarks/render.py` from the measurements in `benchmarks/results`; repeat them with `make bench`, or
`python benchmarks/run.py --preset full`.

**How it is measured.** Every contender trains the same rows for the same number of optimizer steps with the same
settings, from the same weights (`llama-...` random, `smollm2-135m` pretrained), in a fresh process with empty caches.
Time is building the trainer plus `train()`: tokenisation, the reference pass and every start-up check are counted;
importing libraries and loading the model are not. Memory is the highest resident memory (on an accelerator: allocated
memory) over the level just before. Contenders of one setting run directly after one another, in an order that rotates
from repetition to repetition; ratios are formed within a repetition. Cells show the median, and the range in brackets.

**Contenders.** *TRL as shipped*: `trl.DPOTrainer` with defaults. *TRL, precomputed reference*: with
`precompute_ref_log_probs`. *Padded baseline*: this project's padded path, with logits at completion positions only and
the reference store: what a careful implementation without packing reaches. *preftune*: packed and prefix-shared.
*preftune, second run*: the same again with the reference log-probs in the store.

**Columns.** *Pairs/s* counts building the trainer (tokens, start-up checks, and this project's reference pass, which
belongs to its training time) and training; *steps alone* leaves start-up out. *Of matmul rate*: the floating-point
operations that the work cannot do without, over time, as a share of what large matrix products in that dtype reached
on the same machine; the reference's forward is counted for the second run too, which does not need it. *s/pair CPU*:
processor time per pair, which other programs disturb less than wall time.

**A caveat for CPU numbers.** Without Triton, TRL scores every position of a sequence, with entropy and further
statistics, not the completion alone. That flatters everyone else here; on a GPU its fused head narrows the gap. Read
the ratio to the padded baseline as the gain from packing itself.
"""


def machine_text(machine: dict[str, Any]) -> str:
    """Describe the environment of one result file."""
    rates = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in machine["matmul_flops_per_second"].items())
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = machine["accelerator"] or f"{machine['processor']}, {machine['num_cores']} cores"
    return (
        f"{where}; {machine['memory_bytes'] / 1e9:.0f} GB memory; {machine['num_threads']} threads; "
        f"{machine['cpu_capability']}; matrix products reach {rates} TFLOP/s. {machine['system']}, "
        f"Python {machine['python']}, {versions}. Commit {machine['commit'] or 'unknown'}."
    )


def section(report: dict[str, Any]) -> str:
    """Render one result file."""
    device = "GPU" if report["machine"]["accelerator"] else "CPU"
    what = ", ".join(dict.fromkeys(f"{cell['workload']} {cell['dtype']}" for cell in report["cells"]))
    parts = [f"## {device}, `{report['preset']}`, {what}, {report['date'][:10]}", machine_text(report["machine"])]
    if note := report.get("note"):
        parts.append(note)
    if caution := summary.busy(report["machine"]):
        parts.append(f"**{caution}**")
    for setting, rows in summary.rows_of(report).items():
        lines = ["| " + " | ".join(summary.HEADERS) + " |", "|---" + "|---:" * (len(summary.HEADERS) - 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        parts += [f"### {summary.setting_text(setting)}", "\n".join(lines)]
    if sources := sorted({cell["data"] for cell in report["cells"] if "data" in cell}):
        parts.append(f"Rows: {'; '.join(sources)}.")
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Write the document.

    Returns:
        1 if there is nothing to render, else 0.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="result files (default: all in benchmarks/results)")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "benchmarks.md")
    args = parser.parse_args(argv)
    files = args.files or sorted((HERE / "results").glob("*.json"))
    if not files:
        print("nothing to render: run benchmarks/run.py first", file=sys.stderr)
        return 1
    # Results of other kinds lie beside those of the speed benchmark.
    found = [json.loads(file.read_text()) for file in files]
    reports = [report for report in found if "preset" in report]
    on_gpu = [report for report in found if report.get("kind") == "gpu" and not report["dry"]]
    parts = [INTRODUCTION.strip(), *map(section, reports)]
    parts += [gpu_document.section(each, machine_text(each["machine"]) if "machine" in each else "") for each in on_gpu]
    if not on_gpu and not any(report["machine"]["accelerator"] for report in reports):
        parts.append(gpu_document.UNMEASURED)
    args.out.write_text("\n\n".join(parts) + "\n")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
