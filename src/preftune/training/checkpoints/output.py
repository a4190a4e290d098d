"""The output folder of a training run: whose results are in it, and what becomes of another run's."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preftune.errors import ConfigError, SetupError
from preftune.ownership import Record, RunFolder, active, current, holding, new_id, read_records
from preftune.ownership.record import read_record
from preftune.training.checkpoints import folders
from preftune.training.checkpoints.manifest import Manifest

#: What may happen to another run's results.
EXISTING = ("refuse", "set_aside_own", "set_aside")
#: Names of a training run's results, of preftune, TRL or transformers, at the top of an output folder.
_RESULTS = re.compile(
    r"checkpoint-\d+|(model|adapter_model|pytorch_model|tf_model)([-.].*)?\.(safetensors|bin|h5)(\.index\.json)?"
    r"|(config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|processor_config|preprocessor_config|video_preprocessor_config|chat_template)\.json"
    r"|(vocab|merges)\.txt|chat_template\.jinja|additional_chat_templates|.*\.(model|tiktoken)"
    r"|training_args\.(bin|json)|trainer_state\.json|(all|train|eval)_results\.json|provenance\.json|README\.md"
    r"|(alarms|samples|log)\.jsonl|held_out\.npz"
)


_WEIGHTS = re.compile(r"(model|adapter_model|pytorch_model)([-.].*)?\.(safetensors|bin)(\.index\.json)?")


def is_result(name: str) -> bool:
    """Whether a training run, whichever, leaves a file or folder of this name in its output folder."""
    return _RESULTS.fullmatch(name) is not None


def results_in(folder: Path) -> list[str]:
    """Names of what a training run, whichever, has left in a folder."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [name for name in names if is_result(name)]


def others_in(folder: Path, run: RunFolder, first_step: int = 0) -> list[str]:
    """Results in a folder that are not this run's.

    Args:
        folder: The output folder.
        run: The run.
        first_step: Step that the run goes on from: checkpoints up to it are in nobody's way.
    """
    found = []
    for name in results_in(folder):
        mine = run.owns(name) or run.has_part_of(name)
        passed = name.startswith("checkpoint-") and int(name.removeprefix("checkpoint-")) <= first_step
        if not mine and not passed:
            found.append(name)
    return found


def claim(
    folder: Path, run_id: str, existing: str, *, manifest: Manifest | None = None, dry: bool = False
) -> RunFolder:
    """Find out that a run can write its results into a folder, and deal with those of other runs.

    Args:
        folder: The output folder.
        run_id: Id of the run.
        existing: One of :data:`EXISTING`.
        manifest: The checkpoint that the run goes on from.
        dry: Change nothing.

    Raises:
        ConfigError: Another run's results are there.
        SetupError: They cannot be moved.
    """
    step = 0 if manifest is None else manifest.step
    if dry:
        run = RunFolder(folder, read_record(folder, run_id) or Record(run_id))
    else:
        run = RunFolder.open(folder, run_id)
        if read_record(folder, run_id) is not None:
            run.recover()
        for _, path in folders.list_checkpoints(folder):
            folders.adopt(run, path)
    names = others_in(folder, run, step)
    if manifest is not None and manifest.folder.parent.resolve() == folder.resolve():
        names = [name for name in names if name != manifest.folder.name]
    empty = _empty(folder, run, names)
    names = [name for name in names if name not in empty]
    strange = names if existing == "refuse" else [] if existing == "set_aside" else _changed(folder, run, names)
    if strange:
        raise ConfigError(
            f"the folder holds results that this run has not written ({_several(strange)})",
            where="output_dir",
            value=str(folder),
            remedy=_remedy(folder, manifest),
        )
    if not dry:
        for name, owner in empty.items():
            owner.remove_file(name)
        if names:
            _move(folder, run, names)
    return run


def _move(folder: Path, run: RunFolder, names: list[str]) -> None:
    try:
        target = run.set_aside(names)
    except OSError as error:
        raise SetupError(
            f"the results of an earlier run cannot be moved ({error.strerror})",
            where=str(error.filename or folder),
            remedy="set another output_dir",
        ) from error
    said = f"{folder} held the results of an earlier run ({_several(names)}); they are now in {target}"
    warnings.warn(said, UserWarning, stacklevel=5)


def _earlier(folder: Path, run: RunFolder) -> list[RunFolder]:
    return [RunFolder(folder, record) for record in read_records(folder) if record.run != run.record.run]


def _empty(folder: Path, run: RunFolder, names: Sequence[str]) -> dict[str, RunFolder]:
    """Empty logs that an earlier run left, and that run: they hold no result, and make room."""
    found = {}
    for name in names:
        if not name.endswith(".jsonl"):
            continue
        owner = next((other for other in _earlier(folder, run) if other.owns(name)), None)
        if owner is not None and (folder / name).is_file() and not (folder / name).stat().st_size:
            found[name] = owner
    return found


def _changed(folder: Path, run: RunFolder, names: Sequence[str]) -> list[str]:
    """Results that no earlier run of preftune has written, or that have been changed since."""
    earlier = _earlier(folder, run)
    return [name for name in names if not any(other.owns(name) for other in earlier)]


def _remedy(folder: Path, manifest: Manifest | None) -> str:
    go_on = "" if manifest is not None or current(folder) is None else "resume_from_checkpoint: true to go on, "
    return f"set another output_dir, {go_on}or existing_output: set_aside to move them into a folder of their own"


def _several(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


#: Ids of runs that the command line has begun before there was a trainer, by output folder.
_begun: dict[str, str] = {}


def begin_early(args: Any, manifest: Manifest | None, *, dry: bool) -> None:
    """Begin a run before data and model are loaded: :meth:`Output.begin` goes on with it.

    Args:
        args: The trainer's settings.
        manifest: The checkpoint that the run goes on from.
        dry: Only find out whether it could begin.

    Raises:
        ConfigError: Another run's results are in the output folder.
    """
    run_id = new_id() if manifest is None else str(manifest.body.get("run") or new_id())
    claim(Path(args.output_dir), run_id, args.existing_output, manifest=manifest, dry=dry)
    if not dry:
        _begun[os.path.realpath(args.output_dir)] = run_id


class Output:
    """The output folder as a trainer sees it, from its first result on.

    Args:
        args: The trainer's settings.
    """

    def __init__(self, args: Any) -> None:
        self._args = args
        #: The run's id; a run that is gone on with keeps its own.
        self.run_id: str | None = None
        #: Checkpoints that are due and not there, by step, and why.
        self.missing: dict[int, str] = {}
        #: Places that results have gone to because somebody else's files are in their place.
        self.elsewhere: list[str] = []
        self._saved: set[int] = set()
        self._trains = False

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(str(self._args.output_dir))

    def begin(self, manifest: Manifest | None) -> None:
        """A training begins, anew or at a checkpoint; to be called by every process.

        Raises:
            ConfigError: Another run's results are in the folder.
            SetupError: Another process is writing into it.
        """
        early = _begun.pop(os.path.realpath(self.folder), None)
        mine = manifest.body.get("run") if manifest is not None else self.run_id if self._trains else early
        self.run_id = self._agreed(str(mine or early or new_id()))
        self._trains = True
        self.missing, self.elsewhere, self._saved = {}, [], set()
        if self._args.should_save:
            if manifest is None:
                # Nothing is left in a folder that is refused.
                claim(self.folder, self.run_id, self._args.existing_output, dry=True)
            with holding(self.folder):
                claim(self.folder, self.run_id, self._args.existing_output, manifest=manifest)

    def would_touch(self, source: Path) -> bool:
        """Whether a folder is the output folder, or within a result in it that a new run would move."""
        folder, source = self.folder.resolve(), source.resolve()
        if source == folder:
            return True
        return source.is_relative_to(folder) and is_result(source.relative_to(folder).parts[0])

    def _agreed(self, run_id: str) -> str:
        if self._args.world_size == 1:
            return run_id
        from accelerate.utils import broadcast_object_list

        several = [run_id]
        broadcast_object_list(several)
        return several[0]

    @contextmanager
    def held(self) -> Iterator[None]:
        """The folder is this process's alone; processes that write nothing need not hold it."""
        if not self._args.should_save:
            yield
            return
        with holding(self.folder):
            yield

    def run(self, target: Path | None = None) -> RunFolder:
        """This run and a folder that it writes into, by default the output folder.

        A trainer that has not trained goes on with the run that wrote there last.
        """
        folder = self.folder if target is None else target
        if self.run_id is None:
            record = current(self.folder)
            self.run_id = new_id() if record is None else record.run
        found = active(folder)
        return found if found is not None and found.record.run == self.run_id else RunFolder.open(folder, self.run_id)

    def other_folder(self, target: Path) -> RunFolder:
        """This run and another folder than its own, in which an earlier run's results make room."""
        run = self.run(target)
        names = others_in(target, run)
        if names and not _changed(target, run, names):
            _move(target, run, names)
        return run

    def make_room(self, run: RunFolder, staging: Path) -> None:
        """Move a model that somebody else has left in a folder that a script names for its own, if it is in the way.

        Left in its place, it would be what the next one to load that folder gets.
        """
        new = [each.name for each in staging.iterdir()]
        strange = {name for name in new if not run.may_put(name)}
        if strange and self._args.existing_output != "refuse":
            weights = {name for name in others_in(run.folder, run) if _WEIGHTS.fullmatch(name)}
            _move(run.folder, run, sorted(strange | weights))

    def put_files(self, run: RunFolder, staging: Path) -> None:
        """Let finished files take their names; see :meth:`preftune.ownership.RunFolder.put_files`."""
        place = run.put_files(staging)
        if place != run.folder:
            self.elsewhere.append(str(place))

    # ---- what is missing --------------------------------------------------------------------------------------------

    def saved(self, step: int) -> None:
        """A checkpoint is there."""
        self._saved.add(step)
        self.missing.pop(step, None)

    def not_saved(self, step: int, why: str) -> None:
        """A checkpoint could not be written."""
        self.missing[step] = why

    def complaint(self) -> SetupError | None:
        """What is not where it belongs at the end of a run, as an error; ``None`` where all is well."""
        limit = self._args.save_total_limit
        steps = sorted({*self._saved, *self.missing})
        due = steps if limit is None or limit < 1 else steps[-limit:]
        lost = [step for step in due if step in self.missing]
        if lost:
            names = ", ".join(f"checkpoint-{step}" for step in lost)
            said = f"{names} could not be written ({self.missing[lost[-1]]}); all else is saved"
            return SetupError(said, where=str(self.folder), remedy="free some space, or set another output_dir")
        if self.elsewhere:
            said = f"the model is in {self.elsewhere[-1]}: files that this run did not write have its names"
            return SetupError(said, where=str(self.folder), remedy="move one or the other")
        return None


__all__ = ["EXISTING", "Output", "begin_early", "claim", "is_result", "others_in", "results_in"]
