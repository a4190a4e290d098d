"""``make differential``: runs drawn at random, by TRL and by preftune, until the time is over.

Writes ``benchmarks/results/differential.json``. A run that differs is printed with its seed, and is seen again with
``python -m benchmarks.differential --first SEED --number 1``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cell import machine
from benchmarks.fuzz import quiet_libraries

RESULTS = Path(__file__).parent / "results" / "differential.json"
#: A difference of docs/migration.md that drawn rows can meet.
DOCUMENTED = "differs where one answer merges with its prompt"


def compare(seed: int, folder: Path) -> dict[str, Any]:
    """Both runs of a seed: ``equal``, ``differs`` (with how), or who ended with what error."""
    from tests.parity import drawn

    run = drawn.draw(seed)
    with contextlib.redirect_stderr(io.StringIO()):
        drawn.save_model(run, folder / "model", drawn.tokenizer_of(run))
    logs: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for library in ("trl", "preftune"):
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                logs[library] = drawn.train(library, run, folder)
        except Exception as error:  # whatever a library ends with is a result
            errors[library] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    found = {"run": asdict(run), **({"errors": errors} if errors else {})}
    if errors:
        return {"outcome": " and ".join(errors) + " failed", **found}
    how = list(drawn.differences(run, logs["preftune"], logs["trl"]))
    if not how:
        return {"outcome": "equal", **found}
    return {"outcome": DOCUMENTED if merges_unevenly(run) else "differs", **found, "how": how[:8]}


def merges_unevenly(run: Any) -> bool:
    """Whether one answer of a row merges with the end of its prompt and the other does not.

    There TRL's ORPO and CPO let each answer start at a boundary of its own; docs/migration.md has it.
    """
    from tests.parity import drawn

    from preftune.data.formats.base import common_prefix

    if run.verb not in ("ORPO", "CPO") or run.form not in ("explicit", "implicit"):
        return False
    tokenizer = drawn.tokenizer_of(run)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    for row in drawn.rows_of(run, drawn.NUM_ROWS, run.seed):
        answers = [row.get("prompt", "") + row[name] for name in ("chosen", "rejected")]
        prompt = row.get("prompt") or answers[0][: common_prefix(*answers)]
        if prompt in answers:
            # Nothing is trained on where an answer is empty.
            continue
        kept = [common_prefix(ids(prompt), ids(answer)) for answer in answers]
        if kept[0] != kept[1]:
            return True
    return False


def main() -> int:
    """Run from the command line; 1 where anything differs or preftune alone fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--number", type=int, default=300, help="runs")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    counts, shown, began = Counter[str](), [], time.time()
    with tempfile.TemporaryDirectory() as home:
        quiet_libraries(Path(home))
        for seed in range(options.first, options.first + options.number):
            result = compare(seed, Path(home) / str(seed))
            counts[result["outcome"]] += 1
            if result["outcome"] != "equal":
                shown.append(result)
                print(json.dumps(result), flush=True)
            if not seed % 20:
                print(f"{sum(counts.values())} of {options.number}: {dict(counts)}", file=sys.stderr, flush=True)
    if options.number > 1:
        record = {"machine": machine({"threads": 1}), "first": options.first, "seconds": round(time.time() - began)}
        RESULTS.write_text(json.dumps({**record, "outcomes": dict(counts), "not_equal": shown}, indent=1) + "\n")
    print(dict(counts))
    # A documented difference might hide another one in the same run: somebody has to look.
    return int(bool(counts["differs"] or counts[DOCUMENTED] or counts["preftune failed"]))


if __name__ == "__main__":
    sys.exit(main())
