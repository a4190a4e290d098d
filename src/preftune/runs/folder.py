"""The output folder of a run: what it must not be, and who writes into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from preftune.config import Resolved
from preftune.config.paths import cache_home
from preftune.errors import ConfigError, SetupError
from preftune.ownership import check_places, holding
from preftune.runs.data import dataset_names
from preftune.training.checkpoints.output import begin_early, is_result
from preftune.training.checkpoints.resume import resume_point

#: Settings that name a model or tokenizer.
_MODELS = ("model_name_or_path", "ref_model_name_or_path", "tokenizer_name_or_path")


def check_paths(settings: Resolved[Any]) -> None:
    """Refuse places to write into that are, hold or lie in models, data or the cache.

    Raises:
        ConfigError: Naming both settings.
    """
    args, read = settings.trainer, places_read(settings)
    # A folder of the name of a file cannot be made, which is said later.
    written = {"output_dir": None if os.path.isfile(args.output_dir) else args.output_dir}
    check_places(written, read)
    check_places(written, {"PREFTUNE_CACHE": str(cache_home())}, may_hold=True)
    quarantine = args.quarantine_path
    check_places({"quarantine_path": quarantine}, read)
    if quarantine is None:
        return
    if os.path.isdir(quarantine):
        raise ConfigError("not a file", where="quarantine_path", value=quarantine, remedy="name a file")
    beside = os.path.realpath(os.path.dirname(quarantine)) == os.path.realpath(args.output_dir)
    if beside and is_result(os.path.basename(quarantine)):
        why = "a result of the run has this name"
        raise ConfigError(why, where="quarantine_path", value=quarantine, remedy="name another file")


def places_read(settings: Resolved[Any]) -> dict[str, str | None]:
    """Models and data by the setting that names them, wherever they are."""
    script, model, args = settings.script, settings.model, settings.trainer
    read: dict[str, str | None] = {name: getattr(model, name) for name in _MODELS if getattr(model, name, None)}
    read |= {
        f"dataset_name {name}" if script.dataset_name is None else "dataset_name": name
        for name in dataset_names(script)
    }
    read |= {name: str(getattr(args, name)) for name in ("chat_template_path",) if getattr(args, name, None)}
    return read


@contextmanager
def held_folder(args: Any, *, dry_run: bool) -> Iterator[None]:
    """Hold the output folder, and find the checkpoint to go on from, before anything is loaded.

    Args:
        args: The trainer's settings; ``resume_from_checkpoint`` becomes the checkpoint's folder.
        dry_run: Leave nothing behind.

    Raises:
        ConfigError: There is no such checkpoint, or another run's results are in the folder.
        SetupError: The folder cannot be made, or another process is writing into it.
    """
    first = os.environ.get("RANK", "0") == "0"
    with _made(args.output_dir, kept=not dry_run):
        if first and not args.resume_from_checkpoint:
            # Nothing is left in a folder that is refused.
            begin_early(args, None, dry=True)
        with holding(args.output_dir) if first and not dry_run else nullcontext():
            manifest = resume_point(args.resume_from_checkpoint, args.output_dir)
            args.resume_from_checkpoint = None if manifest is None else str(manifest.folder)
            if first:
                begin_early(args, manifest, dry=dry_run)
            yield


@contextmanager
def _made(path: str, *, kept: bool) -> Iterator[None]:
    """Find out now, not after training, that results cannot be written; a dry run leaves no folder behind."""
    missing, place = [], os.path.abspath(path)
    while not os.path.lexists(place):
        missing.append(place)
        place = os.path.dirname(place)
    try:
        try:
            os.makedirs(path, exist_ok=True)
        except OSError as error:
            dangles = os.path.islink(path) and not os.path.exists(path)
            why = f"it is a link to {os.readlink(path)}, which is not there" if dangles else error.strerror
            raise SetupError(f"cannot make the folder ({why})", where="output_dir", value=path) from error
        yield
    finally:
        for folder in [] if kept else missing:
            # What is not empty belongs to somebody.
            with suppress(OSError):
                os.rmdir(folder)
