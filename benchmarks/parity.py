"""How closely training agrees with TRL's, method by method: measures the matrix of the tests and renders it.

Both libraries train a tiny model for three steps on rows of preference data, with the same settings in fp32; the
largest relative differences of every figure go to ``docs/parity.md`` with the environment. The data lie beside the
checkout in ``../shared/data``; without them the rows are those that the tests make.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "parity.json"
DRAWN = RESULTS.with_name("differential.json")
INTRODUCTION = """\
# Parity with TRL

Rendered by `benchmarks/parity.py` from `benchmarks/results/parity.json`; the tests hold every row to the same bound
(`tests/parity/test_matrix.py`).

**What is compared.** TRL {trl} and preftune train the same tiny Llama for three steps of four rows of {data}, with the
same settings, seed and fp32 arithmetic. TRL runs its reference along and pads; preftune takes the reference from its
store and packs, but for the rows that say otherwise. Every number is the largest relative difference over the steps:
of the loss, of rewards and their margin, of the log-probs and the gradient's norm, of the whole gradient as a vector,
and of the trained weights tensor by tensor after the last step. Rewards are beta times small differences of large sums;
those smaller than {floor:g} of beta times the sums are measured against that size, since TRL's fp32 sums are no finer.

**Where the two differ on purpose** is listed in [migration](migration.md#differences); those rows have tests of their
own that say why.
"""


def measure_all(names: list[str]) -> dict[str, Any]:
    """Measure the named cases, or all of them."""
    import torch
    from benchmarks.cell import machine
    from tests.own_rows import write_files
    from tests.parity.conftest import hh_rows
    from tests.parity.matrix import CASES, Ground, measure
    from tqdm import tqdm

    published = ROOT.parent / "shared" / "data"
    torch.set_num_threads(1)
    cases = [case for case in CASES if not names or case.name in names]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        # The reference store of the measurement is its own.
        os.environ["PREFTUNE_CACHE"] = str(Path(folder, "cache"))
        data = published if published.is_dir() else write_files(Path(folder))
        source = "HH-RLHF" if data is published else "transcripts in the shape of HH-RLHF, made by the tests"
        ground = Ground(Path(folder), hh_rows(data))
        start = time.perf_counter()
        for number, case in enumerate(tqdm(cases, desc="Parity", unit="case")):
            found = measure(case, ground, Path(folder, str(number)))
            rows.append({"name": case.name, "verb": case.verb, **asdict(found)})
        seconds = time.perf_counter() - start
    return {"machine": machine({"threads": 1}), "seconds": seconds, "data": source, "rows": rows}


def drawn_text(report: dict[str, Any]) -> str:
    """What became of the runs of :mod:`benchmarks.differential`."""
    from benchmarks.differential import DOCUMENTED

    outcomes = report["outcomes"]
    told = {
        "equal": "equal within the same bound",
        "trl and preftune failed": "refused by both",
        "trl failed": "end with an error in TRL alone",
        "preftune failed": "end with an error in preftune alone",
        DOCUMENTED: "differ where one answer merges with its prompt ([migration](migration.md))",
        "differs": "differ",
    }
    said = ", ".join(f"{outcomes[name]} {text}" for name, text in told.items() if outcomes.get(name))
    return (
        "**Runs drawn at random** (`benchmarks/results/differential.json`, `make differential`): architecture, trainer,"
        f" form of the data and settings in any combination, {sum(outcomes.values())} runs by both: {said}."
    )


def render(report: dict[str, Any]) -> str:
    """``docs/parity.md`` as text."""
    from benchmarks.render import machine_text
    from benchmarks.toy import markdown_table
    from tests.parity.matrix import REWARD_FLOOR, TOLERANCE

    figures = ("loss", "rewards", "logps", "gradient", "weights")
    table = [[row["name"], row["verb"].upper(), *(f"{row[name]:.1e}" for name in figures)] for row in report["rows"]]
    worst = max(row[name] for row in report["rows"] for name in figures)
    result = f"{len(table)} rows; the largest difference of all is {worst:.1e}, the bound {TOLERANCE:g}."
    return (
        "\n\n".join(
            [
                INTRODUCTION.format(
                    data=report.get("data", "HH-RLHF"), trl=report["machine"]["versions"]["trl"], floor=REWARD_FLOOR
                ).strip(),
                f"**Result.** {result}",
                drawn_text(json.loads(DRAWN.read_text(encoding="utf-8"))),
                f"**Environment.** {machine_text(report['machine'])}",
                markdown_table(
                    ("method and options", "trainer", "loss", "rewards", "log-probs", "gradient", "weights"),
                    table,
                    right=range(2, 7),
                ),
            ]
        )
        + "\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Measures, writes the JSON file and the document.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[], metavar="NAME", help="rows to measure (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "parity.md", help="document to write")
    parser.add_argument("--render", action="store_true", help="measure nothing; write the document from the file")
    options = parser.parse_args(argv)
    if not options.render:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        options.out.write_text(json.dumps(measure_all(options.cases), indent=1) + "\n", encoding="utf-8")
    options.docs.write_text(render(json.loads(options.out.read_text(encoding="utf-8"))), encoding="utf-8")
    print(f"wrote {options.docs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
