"""What several processes cost, measured, modelled and carried on to more: ``python -m benchmarks.scale``.

Processes share the cores of one machine here, so that a step's wall time says nothing. Measured are the processor time
of each process, its memory, and the bytes that they exchange, in a network name space of their own (needs root). A
model with a few coefficients is fitted to some cells, and its error is taken on others: more processes, larger models.
Writes ``benchmarks/results/scale.json`` and the tables in docs/scale.md; ``--render`` writes the tables alone.
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

import numpy as np
from benchmarks.balance import into_docs
from benchmarks.scale_plan import bytes_sent, failures, plan, rows_a_process

from benchmarks import cell, pretrained, stale, workloads

HERE = Path(__file__).resolve().parent
OUT = HERE / "results" / "scale.json"
SOURCES = (
    "benchmarks/scale_cell.py",
    "src/preftune/packing/*.py",
    "src/preftune/references/scoring.py",
    *(f"src/preftune/training/{name}.py" for name in ("reference", "reference_pass", "shares", "step", "streams")),
)
#: Hidden size and layers of the models that the coefficients are fitted to, and tokens of a step.
SHAPES, TOKENS = [(64, 2), (128, 4), (256, 4), (256, 8)], (1024, 4096)
#: Starts the loopback device of a network name space.
_LOOPBACK = """
import fcntl, socket, struct
s = socket.socket()
name, flags = struct.unpack("16sh", fcntl.ioctl(s, 0x8913, struct.pack("16sh", b"lo", 0)))
fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", flags | 1))
"""
_LAUNCH = """
import sys
from preftune.runs.launcher import launch
sys.exit(launch(int(sys.argv[1]), [sys.executable, "-m", "benchmarks.scale_cell", sys.argv[2]], print))
"""

Cell = dict[str, Any]


def shape(hidden: int, layers: int) -> Cell:
    """A model of random weights."""
    return {"hidden": hidden, "layers": layers}


def cells(real: str) -> list[Cell]:
    """All cells; ``held`` are those that the coefficients do not know."""
    found = [
        *({**shape(*s), "tokens": t, "processes": r, "engine": "ddp"} for s in SHAPES for t in TOKENS for r in (1, 2)),
        *({**shape(*s), "tokens": t, "processes": 2, "engine": "fsdp2"} for s in SHAPES[1::2] for t in TOKENS),
    ]
    held: list[Cell] = [
        *({**shape(*s), "tokens": t, "processes": 4, "engine": "ddp"} for s in SHAPES[1::2] for t in TOKENS),
        *({**shape(*s), "tokens": 4096, "processes": 4, "engine": "fsdp2"} for s in SHAPES[1::2]),
        *({**shape(384, 12), "tokens": 2048, "processes": r, "engine": "ddp"} for r in (1, 2)),
        *({"folder": real, "tokens": 1024, "processes": r, "engine": "ddp"} for r in (1, 2)),
        {"folder": real, "tokens": 1024, "processes": 2, "engine": "fsdp2"},
    ]
    return [{**each, "held": each in held, "what": "step", "steps": 4} for each in [*found, *held]]


def run(spec: Cell, real: str, **more: str) -> list[Cell]:
    """What every process of a cell has found."""
    with tempfile.TemporaryDirectory() as folder:
        given = {**spec, "pairs": spec["tokens"] // 64, "out": folder, "tokenizer": real}
        script = 'python=$1; shift; "$python" -c "$1"; shift; exec "$python" -c "$@"'
        command = ["unshare", "-n", "bash", "-c", script, "bash", sys.executable, _LOOPBACK, _LAUNCH]
        done = subprocess.run(
            [*command, str(spec["processes"]), json.dumps(given)],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                 "PREFTUNE_CACHE": f"{folder}/cache", **more},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{spec}: {done.stderr[-2000:]}")
        ranks = range(spec["processes"])
        return [json.loads(Path(folder, f"found-{rank}.json").read_text(encoding="utf-8")) for rank in ranks]


def measured(spec: Cell, real: str) -> Cell:
    """A cell with what was found: the mean of its processes."""
    ranks = run(spec, real)
    found = {name: float(np.mean([rank[name] for rank in ranks])) for name in ("seconds", "sent", "memory")}
    kept = {name: ranks[0][name] for name in ("parameters", "layers", "hidden", "vocab", "row_tokens")}
    name = "smollm2-135m" if "folder" in spec else f"{spec['hidden']}x{spec['layers']}"
    print(name, spec["engine"], spec["processes"], spec["tokens"], found, flush=True)
    return {"model": name, **{k: v for k, v in spec.items() if k != "folder"}, **kept, **found}


# ---- the model -------------------------------------------------------------------------------------------------------


def operations(each: Cell) -> float:
    """Floating-point operations of a process and step: forward, backward and a reference that is run along."""
    head = each["vocab"] * each["hidden"]
    tokens = each["tokens"] / each["processes"]
    # Every second token is one of an answer, which is scored.
    products = 8 * tokens * (each["parameters"] - head + head / 2)
    length = each["tokens"] / (each["tokens"] // 64)
    return float(products + 16 * each["layers"] * tokens * each["hidden"] * length / 2)


def times(each: Cell) -> list[float]:
    """What a step's processor time is made of."""
    return [operations(each), bytes_sent(each), each["layers"] * rows_a_process(each)]


def states(each: Cell) -> float:
    """Bytes of gradient, Adam's state and the reference's copy in fp32, which need no coefficient."""
    return float(16 * each["parameters"] / (each["processes"] if each["engine"] == "fsdp2" else 1))


def sizes(each: Cell) -> list[float]:
    """What the rest of a process's memory is made of: activations of a row, and a constant."""
    row = min(each["row_tokens"], each["tokens"] / each["processes"])
    return [4 * row * each["layers"] * each["hidden"], 1e6]


def fitted(found: Sequence[Cell], parts: Any, what: str, given: Any = lambda each: 0.0) -> list[float]:
    """Coefficients that are not negative, by least squares of relative errors over the cells that are not held out."""
    from scipy.optimize import nnls

    known = [each for each in found if not each["held"]]
    rows = np.array([parts(each) for each in known]) / np.array([each[what] for each in known])[:, None]
    left = np.array([1 - given(each) / each[what] for each in known])
    scale = rows.max(0)
    return [float(value) for value in nnls(rows / scale, left)[0] / scale]


def errors(found: Sequence[Cell], predict: Any, what: str) -> Cell:
    """Relative errors: the median and the largest, of the cells that were fitted and of those that were held out."""
    result: Cell = {}
    for held in (False, True):
        off = [abs(predict(e) / e[what] - 1) for e in found if e["held"] == held and e[what] > 0]
        result["held" if held else "fitted"] = {"cells": len(off), "median": median(off), "largest": max(off)}
    return result


def model(found: Sequence[Cell]) -> Cell:
    """Coefficients and errors."""
    time_of, size_of = fitted(found, times, "seconds"), fitted(found, sizes, "memory", states)
    return {
        "seconds": {
            "operations_per_second": 1 / time_of[0],
            "seconds_per_byte": time_of[1],
            "seconds_per_layer_and_row": time_of[2],
            "errors": errors(found, lambda e: float(np.dot(time_of, times(e))), "seconds"),
        },
        "memory": {
            "activations": size_of[0],
            "constant": 1e6 * size_of[1],
            "errors": errors(found, lambda e: states(e) + float(np.dot(size_of, sizes(e))), "memory"),
        },
        "sent": {"errors": errors(found, bytes_sent, "sent")},
    }


# ---- further measurements --------------------------------------------------------------------------------------------


def reference_pass(real: str) -> list[Cell]:
    """Processor time of the pass over 64 pairs of 64 tokens with the 135M model, by one and by two processes."""
    found = []
    for processes in (1, 2):
        spec = {"folder": real, "tokens": 4096, "processes": processes, "engine": "ddp", "what": "pass", "steps": 1}
        ranks = run({**spec, "held": False}, real)
        seconds, sent = [rank["seconds"] for rank in ranks], [rank["sent"] for rank in ranks]
        found.append({"processes": processes, "pairs": 64, "seconds": seconds, "sent": sent})
        print(found[-1], flush=True)
    return found


def streaming(real: str) -> Cell:
    """Rows a second that one process reads, of text and of token ids, and examples that it plans."""
    import datasets
    from transformers import AutoTokenizer

    from preftune.data import DataOptions, prepare
    from preftune.packing import plan_rows
    from preftune.training.balancing import share_of
    from preftune.training.streams import Stream

    tokenizer = AutoTokenizer.from_pretrained(real)
    with tempfile.TemporaryDirectory() as work:
        rows = workloads.make_rows("hh", 4000, workloads.load_tokenizer(Path(work), "smollm2-135m"))
    options = DataOptions(max_length=1024, data_cache=False)
    tokenised = prepare(datasets.Dataset.from_list(rows), tokenizer, options)[0]
    found: Cell = {
        "tokens_a_pair": sum(map(len, (i for n in ("prompt", "chosen", "rejected") for i in tokenised[f"{n}_ids"])))
        / len(tokenised)
    }
    for name, data in (("text", rows), ("tokens", list(tokenised))):
        stream = Stream(data, lambda block, first: prepare(block, tokenizer, options)[0])
        begin = time.process_time()
        for _, _ in zip(range(4000), stream, strict=False):
            pass
        found[f"{name}_a_second"] = 4000 / (time.process_time() - begin)
    lengths = np.random.default_rng(0).lognormal(5, 0.9, 1_000_000).astype(int) + 1
    begin = time.process_time()
    plan_rows(lengths.tolist(), 4096)
    found["seconds_to_plan_a_million"] = time.process_time() - begin
    costs = lengths[:512].tolist()
    begin = time.process_time()
    for _ in range(100):
        share_of([list(range(512))], costs, (0, 64))
    found["seconds_to_share_a_step"] = (time.process_time() - begin) / 100
    return found


# ---- the document ----------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.0f} %"


def tables(report: Cell) -> dict[str, str]:
    """The tables of docs/scale.md, by their marks."""
    m = report["model"]
    lines = [
        "| of a process and step | fitted: cells, median error, largest | held out: cells, median, largest |",
        "|---|---:|---:|",
    ]
    for name, what in (("processor time", "seconds"), ("memory beside the weights", "memory"), ("bytes sent", "sent")):
        each = m[what]["errors"]
        shown = (
            f"{e['cells']}, {percent(e['median'])}, {percent(e['largest'])}" for e in (each["fitted"], each["held"])
        )
        lines.append(f"| {name} | {' | '.join(shown)} |")
    t, s = m["seconds"], m["memory"]
    lines += [
        "",
        f"Time: {t['operations_per_second'] / 1e9:.0f} GFLOP/s, {1e9 * t['seconds_per_byte']:.2f} ns a byte sent, "
        f"{1e3 * t['seconds_per_layer_and_row']:.0f} ms a layer and row. Memory: gradient, Adam's state and the "
        f"reference's copy in fp32, divided by the processes under FSDP2; {s['activations']:.0f} activations of 4 "
        f"bytes a token, layer and hidden unit of a row; {s['constant'] / 1e6:.0f} MB.",
    ]
    one, two = report["pass"]
    share = max(two["seconds"]) / one["seconds"][0]
    passed = (
        f"For the reference of {one['pairs']} pairs of 64 tokens with SmolLM2-135M one process took "
        f"{one['seconds'][0]:.2f} s of processor time, and two {two['seconds'][0]:.2f} and {two['seconds'][1]:.2f} s: "
        f"at most {share:.2f} of it each."
    )
    return {
        "model": "\n".join(lines),
        "pass": passed,
        "plan": plan_table(report["plan"]),
        "failures": failure_table(report["failures"]),
    }


def plan_table(figures: Cell) -> str:
    """The plan, line by line."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in figures.items())])


def failure_table(found: Sequence[Cell]) -> str:
    """Simulated loss by failures."""
    lines = [
        "| a machine fails every | checkpoint | restart | best interval | Young's | time lost at it | by Daly |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for e in found:
        lines.append(
            f"| {e['hours']:,.0f} h | {e['write']:.0f} s | {e['restart'] / 60:.0f} min | {e['best'] / 60:.0f} min "
            f"| {e['young'] / 60:.0f} min | {100 * e['lost']:.1f} % | {100 * e['daly']:.1f} % |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure, and write results and tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", default=str(pretrained.root() / "smollm2"), help="folder of SmolLM2-135M")
    parser.add_argument("--render", action="store_true", help="only write the tables again")
    args = parser.parse_args()
    report: Cell = json.loads(OUT.read_text(encoding="utf-8")) if args.render else {}
    if not args.render:
        report = {"machine": cell.machine({"threads": 1}), stale.KEY: stale.stamp(*SOURCES)}
        report["machine"].pop(stale.KEY)
        report["pass"] = reference_pass(args.real)
        report["streaming"] = streaming(args.real)
        report["cells"] = [measured(each, args.real) for each in cells(args.real)]
    report["model"] = model(report["cells"])
    report["plan"], report["failures"] = plan(report["streaming"]), failures()
    OUT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for mark, text in tables(report).items():
        into_docs(mark, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
