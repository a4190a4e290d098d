"""Faults injected into training by the hundred, and what became of the runs: ``make reliability``.

Runs the whole fault suite of ``tests/faults`` against a tiny model, every trial in a freshly forked process, and the
same kills against TRL's trainer. Results go into a JSON file trial by trial, so that an interrupted run goes on where
it was, and from there into ``docs/reliability.md``. ``--only`` runs some kinds again and leaves the others as they are.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.cell import machine  # noqa: E402 - settings of threads come first
from benchmarks.reliability_document import render  # noqa: E402
from tests.faults.campaign import DAMAGES, Campaign, Trial, may_mount  # noqa: E402
from tests.faults.launched import SIGNALS  # noqa: E402
from tests.faults.server import ForkServer  # noqa: E402
from tests.faults.steps import LACKS  # noqa: E402
from tests.faults.workers import ENDS  # noqa: E402
from tests.faults.worlds import COMMON, NUM_PAIRS, SCENARIOS, build  # noqa: E402

Job = Callable[[Campaign], "list[Trial]"]
#: Single kills of one run, for the comparison with TRL.
_COMPARED_KILLS, _COMPARED_TEARS = 12, 6


def plan(scale: float) -> Iterator[tuple[str, Job]]:
    """Names and functions of all trials, in a fixed order.

    Args:
        scale: 1 for all of it; less for a try.
    """

    def times(number: int) -> range:
        return range(max(1, round(number * scale)))

    for n in times(3):
        for scenario in SCENARIOS:
            yield f"instants {scenario} {n}", lambda c, s=scenario: [c.kill_at_random_instants(s, 3)]  # type: ignore[misc]
            yield f"operations {scenario} {n}", lambda c, s=scenario: [c.kill_at_operations(s, 3)]  # type: ignore[misc]
    for n in times(2):
        for scenario in SCENARIOS:
            yield f"write {scenario} {n}", lambda c, s=scenario: [c.kill_inside_a_write(s)]  # type: ignore[misc]
    for n in times(4):
        yield f"interrupt {n}", lambda c: [c.interrupt("dpo")]
    for n in times(6):
        yield f"full once {n}", lambda c: [c.full_disk("dpo", lasting=False)]
        yield f"full for good {n}", lambda c: [c.full_disk("lora", lasting=True)]
    for n in times(4):
        yield f"limit {n}", lambda c: [c.full_inside_a_write("lora")]
    if may_mount():
        for kilobytes in (100, 200, 300, 400, 600, 800):
            yield f"disk {kilobytes}", lambda c, k=kilobytes: [c.small_disk("dpo", k)]  # type: ignore[misc]
        yield "read-only", lambda c: [c.read_only("dpo")]
    yield "clock", lambda c: [c.jumping_clock("dpo")]
    yield from _plan_of_steps(times)
    yield from _plan_of_processes(times)
    for scenario in ("lora", "tr-dpo"):
        most = None if scale >= 1 else 3
        yield f"damaged {scenario}", lambda c, s=scenario, m=most: list(c.damaged(s, m))  # type: ignore[misc]


def _plan_of_steps(times: Callable[[int], range]) -> Iterator[tuple[str, Job]]:
    for scenario in ("dpo", "aot", "kto"):
        for lack in LACKS:
            name = f"memory {scenario} {lack}"
            yield name, lambda c, s=scenario, k=lack: [c.memory_runs_out(s, k)]  # type: ignore[misc]
    for where in ("loss", "gradient"):
        for n in times(3):
            yield f"{where} not finite {n}", lambda c, w=where: [c.values_not_finite("dpo", w)]  # type: ignore[misc]
    for writers in (1, 2):
        for n in times(6):
            yield f"store {writers} {n}", lambda c, w=writers: [c.store_killed(w)]  # type: ignore[misc]
    for how in DAMAGES:
        yield f"store {how}", lambda c, h=how: [c.store_damaged("dpo", h)]  # type: ignore[misc]


def _plan_of_processes(times: Callable[[int], range]) -> Iterator[tuple[str, Job]]:
    for how in ENDS:
        for scenario in ("dpo", "lora", "kto"):
            yield f"workers {how} {scenario}", lambda c, s=scenario, h=how: [c.worker_fails(s, h)]  # type: ignore[misc]
        for n in times(2):
            yield f"preparation {how} {n}", lambda c, h=how: [c.preparation_fails("dpo", h)]  # type: ignore[misc]
    for how in SIGNALS:
        yield f"processes {how}", lambda c, h=how: [c.process_fails(h)]  # type: ignore[misc]
        yield f"sweep {how}", lambda c, h=how: [c.sweep_worker_fails(h)]  # type: ignore[misc]


def group_of(name: str) -> str:
    """Kind of a trial, as ``--only`` takes it: the first word of its name."""
    return name.split()[0]


def compare(server: ForkServer, folder: Path, job: str, scale: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Kill one run at places spread over all of its saves, each time from the start, and resume once.

    Args:
        server: Forks the children; knows ``job``.
        folder: Scratch folder.
        job: ``train`` for ours, ``trl`` for TRL's.
        scale: Share of the kills.
        say: Told what is being done.
    """
    options = {"scenario": "dpo"} if job == "train" else {}
    whole = server.run(job, folder / f"{job}-whole", **options)
    again = server.run(job, folder / f"{job}-again", **options)
    if whole["ended"] != "ok":
        return {"failed": whole.get("error", whole["ended"])}
    operations, kills, tears = whole["operations"], round(_COMPARED_KILLS * scale), round(_COMPARED_TEARS * scale)
    written = [path for path in (folder / f"{job}-whole").rglob("*") if path.suffix in (".safetensors", ".pt")]
    largest = max(path.stat().st_size for path in written)
    faults: list[tuple[str, dict[str, Any]]] = [
        (f"before operation {at} of {operations}", {"at": at})
        for at in (1 + int(operations * (n + 0.5) / kills) for n in range(kills))
    ]
    faults += [
        (f"at byte {size} of a file", {"file_size": size})
        for size in (round(largest * (n + 0.5) / tears) for n in range(tears))
    ]
    results = []
    for number, (where, fault) in enumerate(faults):
        say(f"{job}: killed {where}")
        out = folder / f"{job}-{number}"
        struck = server.run(job, out, **options, **fault)
        folders = sorted(path.name for path in out.glob("checkpoint-*"))
        rest = server.run(job, out, **options)
        differs = [key for key, value in whole["outcome"].items() if rest.get("outcome", {}).get(key) != value]
        end = rest["ended"] if rest["ended"] != "ok" else "same" if not differs else "different"
        if differs == ["log"]:
            end = "log"
        note = {"error": rest.get("error", "")[:200], "resumed": rest.get("resumed"), "folders": folders}
        results.append({"where": where, "killed": struck["ended"] == "killed", "end": end, **note})
    return {"repeatable": again.get("outcome") == whole["outcome"], "trials": results}


def begin(out: Path, scale: float, only: Collection[str]) -> dict[str, Any]:
    """What the result file holds and is not to be run again.

    Args:
        out: The result file.
        scale: Share of the trials.
        only: Kinds that are run again while all others stay; empty goes on with an unfinished file, or begins anew.
    """
    here = {"machine": machine({"threads": 1}), "date": datetime.datetime.now(datetime.timezone.utc).isoformat()[:19]}
    report: dict[str, Any] = {"scale": scale, "trials": {}, "compared": {}, **here}
    before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    if only and before:
        report = before
        report["trials"] = {name: found for name, found in before["trials"].items() if group_of(name) not in only}
        report["compared"] = {} if "compared" in only else before["compared"]
        # These were measured elsewhere or later than the rest.
        report.setdefault("groups", {}).update(dict.fromkeys(only, here))
    elif before.get("scale") == scale and not before.get("finished"):
        report = {**before, **here}
    report["world"] = {"pairs": NUM_PAIRS, "settings": COMMON, "scenarios": {k: v[1] for k, v in SCENARIOS.items()}}
    return report


def run(out: Path, scale: float, only: Collection[str] = ()) -> dict[str, Any]:
    """Run what the result file does not hold yet, and write it after each trial."""
    from tqdm import tqdm

    report = begin(out, scale, only)
    jobs = [(name, job) for name, job in plan(scale) if not only or group_of(name) in only]
    with tempfile.TemporaryDirectory(prefix="reliability-") as scratch, tqdm(total=len(jobs) + 2) as bar:
        folder = Path(scratch)
        build(folder)
        server = ForkServer(folder, ("tests.faults.steps", "tests.faults.workers", "tests.faults.other", "trl"))
        for which in ("train", "trl"):
            if which not in report["compared"] and (not only or "compared" in only):
                report["compared"][which] = compare(server, folder, which, scale, bar.set_description)
                _write(out, report)
            bar.update()
        for number, (name, job) in enumerate(jobs):
            bar.set_description(name)
            if name not in report["trials"]:
                report["trials"][name] = [trial.as_dict() for trial in job(_campaign(server, folder, number))]
                _write(out, report)
            bar.update()
        server.close()
    report["finished"] = True
    _write(out, report)
    return report


_SHARED: dict[str, Any] = {}


def _campaign(server: ForkServer, folder: Path, seed: int) -> Campaign:
    """A campaign with random choices of its own, so that a trial does not depend on those before it."""
    campaign = Campaign(server, folder / f"trial-{seed}", seed)
    campaign.folder.mkdir()
    campaign._undisturbed = _SHARED
    return campaign


def _write(out: Path, report: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_suffix(".tmp")
    # Names of scratch folders say nothing.
    text = re.sub(r"/[^\s\"']*/reliability-\w+/", "SCRATCH/", json.dumps(report, indent=1))
    beside.write_text(text + "\n", encoding="utf-8")
    os.replace(beside, out)


def main(argv: list[str] | None = None) -> int:
    """Run, render, and tell whether everything survived.

    Returns:
        1 if a fault cost anything, else 0.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "reliability.json", help="result file")
    parser.add_argument("--fuzz", type=Path, default=HERE / "results" / "fuzz.json", help="results of the fuzzing")
    parser.add_argument("--document", type=Path, default=HERE.parent / "docs" / "reliability.md")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the trials (default: 1)")
    parser.add_argument("--render-only", action="store_true", help="write the document from the result file")
    groups = sorted({group_of(name) for name, _ in plan(1.0)} | {"compared"})
    parser.add_argument("--only", nargs="+", choices=groups, default=(), help="run these kinds again, keep the others")
    args = parser.parse_args(argv)
    stored = json.loads(args.out.read_text(encoding="utf-8")) if args.render_only else None
    report = stored or run(args.out, args.scale, args.only)
    fuzz = json.loads(args.fuzz.read_text(encoding="utf-8")) if args.fuzz.exists() else None
    args.document.write_text(render(report, fuzz), encoding="utf-8")
    failed = [name for name, trials in report["trials"].items() for trial in trials if not trial["survived"]]
    print(f"wrote {args.document}" + (f"; not survived: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
