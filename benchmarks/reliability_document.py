"""``docs/reliability.md`` out of the results of ``reliability.py``."""

from __future__ import annotations

from collections import Counter
from typing import Any

from benchmarks.render import machine_text

_INTRODUCTION = """# Reliability

Rendered by `benchmarks/reliability.py` from `benchmarks/results/reliability.json`; repeat it with `make reliability`.

**What a checkpoint is.** A folder that is written beside its final place under another name: weights, optimizer,
schedule, random state, the sums since the last log line, what callbacks remember and, for TR-DPO and BCO, the moving
reference and the running mean. All of it is safetensors and JSON; nothing is pickled. Every file is waited for until it
is on the disk, then a manifest with the size and SHA-256 of each is written, and one rename gives the folder its name.
Only a folder whose every file agrees with its manifest is resumed from; another one is passed over with a word, never
deleted, and never counted when old checkpoints make room. Under FSDP2 a checkpoint is that
of one process. Under DeepSpeed the sharded parts stay in its own format, some of it pickled; the manifest covers them.

**What a run is.** The manifest holds the settings, the digest of the prepared data and the content key of the
reference. A resumed run that differs in anything that changes what is learned is refused, with the old and the new
value; more steps, another row length, or another version of torch, transformers, accelerate, peft or preftune go on
with a warning (`tests/training/test_identity.py`).

**Whose files these are.** A run has a random id. In `.preftune` in its output folder it records every file and
checkpoint with size and SHA-256 before that takes its name, and it replaces or removes only what its own record names
and what is unchanged since; unfinished files are in `.preftune` too, and nothing is removed because of its name. What
others have put into a checkpoint stays when the checkpoint goes. A folder that holds results of another run, of
preftune, TRL or transformers, is refused before data and model are loaded, or they are moved into `earlier-N`, where
that run can still be resumed (`existing_output`: `refuse`, the default of the command line; `set_aside_own`, the
default of the Python classes, moves what preftune has written and nobody has changed since, and refuses otherwise;
`set_aside`). Should a foreign file take a needed name while a run goes on, the results go beside it, under another
name, with a warning. A folder is written into by one process at a time; a second one is refused with the first one's
process number and start. An output folder is refused if it is a model, a data folder or the cache, if it is inside
one, or if it contains a model or a data folder; links are followed. So is a quarantine file that is not made of
quarantined rows alone. The other verbs (`eval`, `data audit`, `advise`, `report`, `demo`, `sweep`) replace only files
of their own that are unchanged; `data convert` and `advise --write` leave every file that exists as it is; a sweep
reads only pairs and settings that it has written. (`tests/faults/test_ownership.py`)

**Which checkpoint is resumed from.** With `resume_from_checkpoint: true`, the newest whole one of the run that wrote
into the folder last; its step is what its manifest says.
(`test_a_second_run_is_refused_or_makes_room_and_can_be_resumed`, `test_the_step_is_what_the_manifest_says`)

**What happens when a save fails.** The failed folder is removed, a warning names the file and the last good checkpoint,
and training goes on: the next save tries again. The final save ends with an error instead. A run of the command line
that lacks a checkpoint in the end says so in its last line, with exit code 6
(`test_a_full_disk_is_said_by_code_and_last_line`). Saves can be asked for by SIGTERM, Ctrl-C or an empty file named
`SAVE` in the output folder.

**What happens inside a step.** Where a row runs out of memory, the step is run again from an empty gradient in rows of
half the length, and rows stay that short; a single process does so for every loss. It is refused with one clear error
where a row holds one example already, where several processes train together, and where a load-balancing loss belongs
to the micro-batches. A step whose loss or gradient is not finite is skipped: weights, optimizer and schedule stay as
they were, its metrics are not logged, the rows that cause it are named by number and first words, and more than
`max_skipped_steps` (3) in a row end the run. Under fp16 the loss scaler does the skipping, under DeepSpeed its engine.

**What happens when another process hangs or dies.** Nothing is waited for without end, but for what the last two
sentences say. A data-loader worker (`dataloader_num_workers`) or a process that prepares rows (`dataset_num_proc`) that
makes no progress for `worker_timeout` seconds (600), or dies, ends the run with one error, and so does a training
process that takes no part in an exchange for `ddp_timeout` seconds (1800); `resume_from_checkpoint: true` goes on from
the last checkpoint, to the bit. Without an accelerator too: transformers hands `ddp_timeout` on only where there is
one. Processes that are left name the one
that has gone, where it ran on their machine. `--num_processes` names it with its signal at once, and ends the others
after at most ten seconds; torchrun does after 30. A sweep runs the trial of a
worker that has died at once, and of one that has shown no sign of life for 300 seconds, again, and ends its own worker;
a trial that waits for ever inside a healthy process is not noticed. A file system that never answers cannot be
interrupted by any program.

**What is untested.** Two processes were killed and gone on with by themselves (`tests/distributed`), not by this suite.
Checkpoints under DeepSpeed: manifest, rename and refusal are the same code, but nobody has compared a resumed run with
an undisturbed one, and the limits above do not hold where DeepSpeed or FSDP2 wait on their own. Processes on
several machines, and NCCL, whose watchdog ends a process that waits too long with a message of its own, have not been
tried either. Two processes here are two on one machine's processor, by gloo.
"""

_EQUALITIES = """## What is equal, and how closely

| compared | tolerance | where |
|---|---|---|
| a killed and resumed run against an undisturbed one: weights, optimizer, log and all else | 0 bits | `tests/faults` |
| state written to a checkpoint and read again | 0 bits | `tests/training/test_checkpoints.py` |
| weights and optimizer across a step that was skipped | 0 bits | `tests/training/test_recovery.py` |
| entries of the reference store after a crash | 0 bits | `tests/faults` |
| update of a step that was run again in shorter rows, fp32 | 1e-5 of the largest; here {memory} | `tests/faults` |

The last one is not zero because shorter rows add up the same terms in another order.
"""

_SAID = {
    "same": "ended like the undisturbed run, to the bit",
    "log": "went on to the same weights, with other log lines",
    "different": "went on to other weights",
    "error": "did not go on",
    "hung": "hung",
    "killed": "ended by a signal",
}


_FUZZED = """A traceback is any exception but one clear error of one line. *Losses*: every method with drawn settings,
log-ratios up to +-1e4, lengths from 1 to 100,000, equal completions; value and gradient in fp64 and value in fp32
against the papers' formulas with a hundred digits. *Packing*: pairs of one to 100,000 tokens, without prompt, with two,
with equal answers, every integer compared; texts of every plane read back out of a packed row; attention, log-probs and
gradients against plain ones. *Wrong*: contradicted by that independent computation. *Guided*: parsers of settings,
rows, files, recipes, manifests, run folders and sweeps, fed by atheris with what reaches new code."""
#: Kinds whose results are compared with an independent computation.
_COMPARED = ("losses", "packing", "rows of 100,000 tokens")


def render(report: dict[str, Any], fuzz: dict[str, Any] | None) -> str:
    """The document.

    Args:
        report: What ``reliability.py`` wrote.
        fuzz: Results of the fuzzing, if there are any.
    """
    parts = [_INTRODUCTION.strip(), _summary(report), _environment(report), _faults(report)]
    parts += [_EQUALITIES.strip().format(memory=_memory(report)), _comparison(report), _fuzzed(fuzz)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _trials(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [trial for trials in report["trials"].values() for trial in trials]


def _is_kill(trial: dict[str, Any]) -> bool:
    return bool(trial["kind"].startswith(("SIGKILL", "killed")))


def _summary(report: dict[str, Any]) -> str:
    trials = _trials(report)
    kills = sum(trial["faults"] for trial in trials if _is_kill(trial))
    faults = sum(trial["faults"] for trial in trials)
    failed = [trial for trial in trials if not trial["survived"]]
    lost = sum(trial["bytes_lost"] for trial in trials)
    said = "every run survived" if not failed else f"**{len(failed)} of {len(trials)} runs did not survive**"
    return (
        f"**Outcome.** {faults} faults struck {len(trials)} runs, {kills} of them kills of the training process; "
        f"{said}; {lost} bytes of results lost."
    )


def _environment(report: dict[str, Any]) -> str:
    text = f"**Environment.** {machine_text(report['machine'])} {report['date'][:10]}."
    together: dict[str, list[str]] = {}
    for group, own in report.get("groups", {}).items():
        together.setdefault(f"{own['date'][:10]}: {machine_text(own['machine'])}", []).append(f"`{group}`")
    for when, groups in together.items():
        text += f" Trials of the kinds {', '.join(groups)} were run by themselves, {when}"
    return text


def _faults(report: dict[str, Any]) -> str:
    rows: dict[str, list[dict[str, Any]]] = {}
    for trial in _trials(report):
        rows.setdefault(trial["kind"], []).append(trial)
    lines = ["| fault | runs | faults that struck | runs survived | bytes lost |", "|---|---:|---:|---:|---:|"]
    for kind, trials in rows.items():
        well = sum(trial["survived"] for trial in trials)
        struck, lost = sum(t["faults"] for t in trials), sum(t["bytes_lost"] for t in trials)
        lines.append(f"| {kind} | {len(trials)} | {struck} | {well} | {lost} |")
    names = ", ".join(f"`{name}`" for name in report["world"]["scenarios"])
    text = (
        f"A run is {report['world']['pairs']} pairs in steps of 4 on a Llama of two layers, with shuffling, dropout, "
        "two epochs, and log lines, evaluations and saves at different steps. Kinds of run: "
        f"{names}. *Survived* means that after going on, weights, optimizer, schedule, random state and every logged "
        "figure but the times equal the undisturbed run's to the bit; where a disk was full, that the failing run also "
        "either finished or ended with one clear error. Kills come three to a run, each resumed run being killed "
        "again. Where a worker or a process hangs or dies, the run also ended with one clear error in time, or, in a "
        "sweep, gave the undisturbed sweep's figures. A fault drawn for an instant after the end of a run strikes "
        "nobody and is not counted."
    )
    failed = [trial for trial in _trials(report) if not trial["survived"]]
    broken = [f"- {t['kind']}, {t['scenario']}, {t['where']}: {t['note']}" for t in failed]
    return "\n\n".join(["## Faults injected", text, "\n".join(lines), *(["\n".join(broken)] if broken else [])])


def _memory(report: dict[str, Any]) -> str:
    notes = [trial["note"] for trial in _trials(report) if trial["kind"].startswith("memory")]
    found = [note.split()[3] for note in notes if "differ by" in note]
    return max(found, key=float) if found else "not run"


def _comparison(report: dict[str, Any]) -> str:
    compared = report["compared"]
    if not compared:
        return ""
    version = report["machine"]["versions"].get("trl", "")
    names = {"train": "preftune", "trl": f"TRL {version}"}
    lines = ["| after one kill and one resume | " + " | ".join(names[which] for which in compared) + " |"]
    lines.append("|---|" + "---:|" * len(compared))
    killed = {which: [t for t in result.get("trials", []) if t["killed"]] for which, result in compared.items()}
    ends = {which: Counter(trial["end"] for trial in trials) for which, trials in killed.items()}
    lines.append("| killed runs | " + " | ".join(str(ends[which].total()) for which in compared) + " |")
    for end, said in _SAID.items():
        if any(ends[which][end] for which in compared):
            lines.append(f"| {said} | " + " | ".join(str(ends[which][end]) for which in compared) + " |")
    errors = Counter(_error(trial) for trial in killed.get("trl", []) if trial["end"] == "error")
    text = (
        "The same model, data and settings; each run killed once, at places spread evenly over all file operations of "
        "its saves, and inside files that were left torn; then started again with `resume_from_checkpoint=True` if a "
        "checkpoint folder is there, and from the beginning if none is. Final weights and log lines are compared, "
        "and for preftune all other state too. Repeats itself to the bit when undisturbed: "
        f"{', '.join(f'{names[w]}: {_yes(r)}' for w, r in compared.items())}."
    )
    parts = ["## The same kills with TRL", text, "\n".join(lines)]
    if errors:
        quotes = [f"- {number} times: `{quote}`" for quote, number in errors.most_common()]
        parts.append("What TRL said:\n\n" + "\n".join(quotes))
    return "\n\n".join(parts)


def _error(trial: dict[str, Any]) -> str:
    import re

    return re.sub(r"(?:SCRATCH)?(?:/[\w.-]+)+/(checkpoint-)\d+", r"OUTPUT/\1N", trial["error"])[:160]


def _yes(result: dict[str, Any]) -> str:
    return "yes" if result.get("repeatable") else "no"


def _fuzzed(fuzz: dict[str, Any] | None) -> str:
    head = "## Inputs fuzzed"
    if fuzz is None:
        return f"{head}\n\nNo results of the fuzzing were at hand when this page was made."
    lines = ["| kind | inputs | tracebacks | silent drops | wrong | date |", "|---|---:|---:|---:|---:|---|"]
    notes, kinds = [], fuzz.get("kinds", [])
    for row in kinds:
        wrong = row.get("wrong", 0) if row["kind"] in _COMPARED else ""
        figures = f"{row['inputs']:,} | {row['tracebacks']} | {row['silent_drops']} | {wrong} | {row.get('date', '')}"
        lines.append(f"| {row['kind']} | {figures} |")
        if row.get("note"):
            notes.append(f"{row['kind'].capitalize()}, {row['note']}.")
    total = sum(row["inputs"] for row in kinds)
    lines.append(f"| all | {total:,} | | | | |")
    return "\n\n".join([head, _FUZZED, "\n".join(lines), *notes])
