"""Random output folders: foreign files and what other runs have left, and whether a byte of them is lost."""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

#: What somebody may have at the top of a folder.
NAMES = (
    *("README.md", "config.json", "generation_config.json", "model.safetensors", "model-00001-of-00002.safetensors"),
    *("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
    *("merges.txt", "chat_template.jinja", "special_tokens_map.json", "training_args.bin", "training_args.json"),
    *("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json", "provenance.json"),
    *("alarms.jsonl", "samples.jsonl", "log.jsonl", "quarantine.jsonl", "advice.json", "audit.json", "eval.json"),
    *("generations.jsonl", "judge.jsonl", "report.html", "sweep.json", "plan.json", "base.yaml", "best.yaml"),
    *("pytorch_model.bin", "SAVE", "notes.txt", "train.log", "data.jsonl", "held_out.npz", "study.journal"),
)
#: Folders that runs, of preftune or others, may have left.
FOLDERS = (
    *(
        "checkpoint-{}",
        ".saving-checkpoint-{}",
        ".deleting-checkpoint-{}",
        ".replaced-checkpoint-{}",
        "checkpoint-{}-b",
    ),
    *(".saving-model", "data", "data.0123456789abcdef0123456789abcdef.tmp", "runs", "trials", "best", "earlier-1"),
    *("checkpoint_{}", "checkpoints", "saved-1", "checkpoint-{}.aside-1", "given-up", ".git", "references", "tokens"),
    *("pytorch_model_fsdp_0", "global_step{}", "sft", "model", "additional_chat_templates", "wandb"),
)
_INNER = (
    *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"),
    *("config.json", "README.md", "notes.txt", "random_states_0.pkl", "custom_checkpoint_0.pkl", "manifest.json"),
    *("optimizer.safetensors", "rank_state_0.json", "HEAD", "state.json", "dataset_info.json", "sub/deep.bin"),
)

#: The lock file while nobody holds it: it is what a run leaves, and what the next one writes into.
FREE_LOCK = (".preftune/holder.json", hashlib.sha256().hexdigest())


def plant(folder: Path, draw: random.Random, steps: int = 9) -> None:
    """Put random foreign files, folders and links into a folder; nothing that is there is touched."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in draw.sample(NAMES, draw.choice((0, 0, 1, 1, 2, 5))):
        _write(folder / name, draw)
    for pattern in draw.sample(FOLDERS, draw.choice((0, 1, 1, 2, 4))):
        place = folder / pattern.format(draw.randint(1, steps))
        if os.path.lexists(place):
            continue
        kind = draw.random()
        if kind < 0.1:
            _write(place, draw)
        elif kind < 0.2:
            os.symlink(draw.choice((str(folder), "nowhere", "notes.txt")), place)
        else:
            place.mkdir()
            for name in draw.sample(_INNER, draw.randint(0, 5)):
                _write(place / name, draw)
    if draw.random() < 0.15:
        other_run(folder, draw, steps)
    if draw.random() < 0.1 and not os.path.lexists(folder / ".preftune"):
        if draw.random() < 0.3:
            _write(folder / ".preftune", draw)
        else:
            for name in ("holder.json", "notes.txt", f"{'f' * 32}/record.json", f"{'f' * 32}/saving/model.safetensors"):
                _write(folder / ".preftune" / name, draw)


def other_run(folder: Path, draw: random.Random, steps: int) -> None:
    """What another run of preftune has left, whole or damaged, with its record or without."""
    from preftune.ownership import Record
    from preftune.ownership.record import entry_of
    from preftune.training.checkpoints.manifest import seal

    run = "".join(draw.choices("0123456789abcdef", k=32))
    record = Record(run, turn=draw.randint(1, 3))
    for step in draw.sample(range(1, steps + 1), draw.randint(1, 3)):
        place = folder / f"checkpoint-{step}"
        if os.path.lexists(place):
            continue
        place.mkdir()
        for name in ("model.safetensors", "optimizer.safetensors", "trainer_state.json"):
            _write(place / name, draw)
        # Otherwise a session might go on with it, and what it has written would be that session's.
        seal(place, {"step": step, "resumable": False, "identity": {}, "run": run})
        record.folders[place.name] = {path.name: entry_of(path) for path in place.iterdir()}
        if draw.random() < 0.3:
            _write(place / "notes.txt", draw)
        if draw.random() < 0.3:
            (place / draw.choice(("model.safetensors", "manifest.json"))).write_bytes(draw.randbytes(9))
    for name in draw.sample(("README.md", "model.safetensors", "config.json"), 2):
        if not os.path.lexists(folder / name):
            _write(folder / name, draw)
            record.files[name] = [entry_of(folder / name)]
    if draw.random() < 0.7 and not os.path.lexists(folder / ".preftune"):
        record.write(folder)
        if draw.random() < 0.5:
            _write(folder / ".preftune" / run / "saving" / "checkpoint-3" / "model.safetensors", draw)
            _write(folder / ".preftune" / run / "going" / "checkpoint-2" / "model.safetensors", draw)


def edit(folder: Path, draw: random.Random, kept: list[bytes]) -> None:
    """Change, as its user may, what a run has written; ``kept`` are the contents that must not be lost."""
    mine = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    mine = [path for path in mine if ".preftune" not in path.parts]
    for path in draw.sample(sorted(mine), min(len(mine), draw.choice((0, 0, 1, 2)))):
        old = path.read_bytes()
        if not old or path.name == "quarantine.jsonl":
            continue
        # As long as it was, or longer.
        # What follows in a log is followed by the next line.
        same = draw.random() < 0.5 or path.name == "log.jsonl"
        new = draw.randbytes(len(old)) if same else old + draw.randbytes(7)
        path.write_bytes(new)
        if old in kept:
            kept.remove(old)
        kept.append(new)
    for place in sorted(folder.glob("checkpoint-*")):
        if place.is_dir() and not place.is_symlink() and draw.random() < 0.2:
            added = draw.randbytes(24)
            _write_new(place / f"mine-{added.hex()}.txt", added)
            kept.append(added)


def _write_new(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)


def _write(path: Path, draw: random.Random) -> None:
    if os.path.lexists(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text: Any = json.dumps({"step": draw.randint(0, 9), "mark": draw.random()}).encode()
    path.write_bytes(text if draw.random() < 0.4 else draw.randbytes(draw.randint(0, 60)))


def snapshot(folder: Path) -> dict[str, str]:
    """Every entry below a folder: the digest of a file, the target of a link, or that it is a folder."""
    found = {}
    for root, inside, names in os.walk(folder):
        for name in (*inside, *names):
            path = Path(root, name)
            key = path.relative_to(folder).as_posix()
            if path.is_symlink():
                found[key] = f"link {os.readlink(path)}"
            elif path.is_dir():
                found[key] = "folder"
            else:
                found[key] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def lost(before: dict[str, str], folder: Path, *, moved: bool = False) -> list[str]:
    """Entries that are not what or where they were.

    Args:
        before: An earlier :func:`snapshot`.
        folder: The folder.
        moved: Whether they may have been set aside, into a folder ``earlier-N``, as they were.
    """
    now = snapshot(folder)
    gone = [name for name, what in before.items() if now.get(name) != what and (name, what) != FREE_LOCK]
    if moved:
        asides = {name for name in now if "/" not in name and name.startswith("earlier-") and name not in before}
        gone = [name for name in gone if not any(now.get(f"{aside}/{name}") == before[name] for aside in asides)]
    return sorted(gone)


def followed(before: dict[str, str], folder: Path) -> dict[str, str]:
    """The entries of an earlier :func:`snapshot` that are as they were, under the names that they have now.

    A run may have set some aside, and made folders of the same names, which are its own.
    """
    now = snapshot(folder)
    asides = {name: what for name, what in now.items() if name.startswith("earlier-")}
    moved = {name.partition("/")[2] for name in asides if name not in before}
    return {name: what for name, what in before.items() if now.get(name) == what and name not in moved} | asides


def contents_lost(contents: list[bytes], folder: Path) -> int:
    """How many contents are in no file below a folder any more."""
    here = set(snapshot(folder).values())
    return sum(hashlib.sha256(content).hexdigest() not in here for content in contents)
