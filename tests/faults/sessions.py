"""Runs without a model against the layer that owns an output folder: begun, killed, gone on with, edited in between."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.faults import trees

POLICIES = ("refuse", "set_aside_own", "set_aside")
STEPS = 8


@dataclass
class Tally:
    """What became of many trees.

    Attributes:
        trees: Random trees.
        ended: Sessions by how they ended: done, refused, killed.
        broken: What must not have happened, in words.
    """

    trees: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)


def session(out: Path, policy: str, resume: bool, seed: int) -> None:
    """What a training run does with files, by the functions that the trainer calls.

    Raises:
        PreftuneError: The run is refused.
    """
    from preftune.ownership import put_text
    from preftune.training.checkpoints import find_checkpoint, folders
    from preftune.training.checkpoints.files import is_write_failure
    from preftune.training.checkpoints.manifest import seal
    from preftune.training.checkpoints.output import Output

    draw = random.Random(seed)
    limit = draw.choice((None, 1, 2))
    args: Any = SimpleNamespace(
        output_dir=str(out), existing_output=policy, save_total_limit=limit, should_save=True, world_size=1
    )
    output = Output(args)
    manifest = find_checkpoint(out).manifest if resume else None
    output.begin(manifest)
    with output.held():
        run = output.run()
        for step in range((manifest.step if manifest else 0) + 1, STEPS + 1):
            with open(out / "log.jsonl", "ab") if _may_grow(run, step) else open(os.devnull, "ab") as log:
                log.write(b'{"step": %d}\n' % step)
            if draw.random() < 0.4:
                continue
            staging = folders.staging_folder(run, step)
            shutil.rmtree(staging, ignore_errors=True)
            (staging / "sub").mkdir(parents=True)
            for name in ("model.safetensors", "optimizer.safetensors", "trainer_state.json", "sub/more.json"):
                (staging / name).write_bytes(draw.randbytes(40))
            seal(staging, {"step": step, "resumable": True, "identity": {}, "run": output.run_id})
            try:
                folders.publish(run, staging, step)
                folders.rotate(run, limit, [])
            except OSError as error:
                if not is_write_failure(error):
                    raise
        for name in ("model.safetensors", "config.json", "tokenizer.json", "sub/more.json"):
            (run.staging / "model" / name).parent.mkdir(parents=True, exist_ok=True)
            (run.staging / "model" / name).write_bytes(draw.randbytes(30))
        output.put_files(run, run.staging / "model")
        for name in ("README.md", "trainer_state.json", "all_results.json", "provenance.json", "alarms.jsonl"):
            put_text(out / name, json.dumps({"run": output.run_id, "draw": draw.random()}))


def _may_grow(run: Any, step: int) -> bool:
    try:
        run.grow("log.jsonl", b'{"step": %d}\n' % step)
    except OSError:
        return False
    return True


def forked(out: Path, policy: str, resume: bool, seed: int, kill_at: int | None) -> str:
    """Run a session in a child. Returns ``done``, ``refused``, ``killed``, or a traceback."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        said = "done"
        try:
            import warnings

            from preftune.errors import PreftuneError
            from tests.faults.server import Faults, die

            warnings.simplefilter("ignore")
            # A killed process loses nothing that the system was given: waiting for the disk would only take time.
            os.fsync = lambda handle: None  # type: ignore[assignment]
            Faults(str(out), kill_at, die)
            try:
                session(out, policy, resume, seed)
            except PreftuneError as error:
                said = "refused" if "\n" not in str(error) else f"more than one line: {error}"
        except BaseException:
            said = traceback.format_exc()
        os.write(write, said[-3000:].encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return "killed" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else said


def one_tree(folder: Path, seed: int, tally: Tally) -> None:
    """Plant a tree, let three sessions loose on it, plant and edit more in between, and look what is lost."""
    draw = random.Random(seed)
    out = folder / "out"
    trees.plant(out, draw, STEPS)
    foreign = trees.snapshot(out)
    edited: list[bytes] = []
    tally.trees += 1
    for number in range(3):
        policy, resume = draw.choice(POLICIES), number > 0 and draw.random() < 0.7
        kill_at = draw.randint(1, 90) if draw.random() < 0.5 else None
        ended = forked(out, policy, resume, draw.randrange(1 << 30), kill_at)
        tally.ended[ended if len(ended) < 20 else "traceback"] += 1
        where = f"seed {seed}, session {number} ({policy}, resume {resume}, killed before {kill_at})"
        if ended not in ("done", "refused", "killed"):
            tally.broken.append(f"{where}: {ended}")
        moved = policy != "refuse"
        gone = trees.lost(foreign, out, moved=moved)
        if gone:
            tally.broken.append(f"{where}: {ended}; not as they were: {', '.join(gone)}")
        if trees.contents_lost(edited, out):
            tally.broken.append(f"{where}: {ended}; an edited file is lost")
        if moved or gone:
            # What was set aside is foreign where it is now.
            foreign = trees.followed(foreign, out)
        known = trees.snapshot(out)
        trees.plant(out, draw, STEPS) if draw.random() < 0.4 else None
        added = {name: what for name, what in trees.snapshot(out).items() if name not in known}
        foreign |= added
        if draw.random() < 0.4:
            before = trees.snapshot(out)
            trees.edit(out, draw, edited)
            after = trees.snapshot(out)
            # An edited file may be moved together with its folder; its content is looked for everywhere.
            foreign = {name: what for name, what in foreign.items() if after.get(name) == what == before.get(name)}
