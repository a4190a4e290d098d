"""Pushing to the Hub: the result, and while training what a checkpoint holds. Rows of the data stay at home."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import HubStrategy

from preftune.training.checkpoints.files import files_below
from preftune.training.checkpoints.manifest import FILE_NAME

if TYPE_CHECKING:
    from preftune.training.checkpoints.saved import SavedTrainer

#: What training needs to go on, and users of the model do not.
_STATE_PREFIXES = ("optimizer", "scheduler", "scaler", "rank_state_", "extra_state", "trainer_state", FILE_NAME)


def not_pushed(args: Any) -> list[str]:
    """Patterns of what stays in the output folder: hidden files, checkpoints, and files with rows of the data."""
    own = [] if args.quarantine_path is None else [Path(args.quarantine_path).name]
    others = ["_*", ".*", "checkpoint-*", "earlier-*", "saved-*"]
    return [*others, "quarantine.jsonl", "samples.jsonl", "held_out.npz", *own]


def push_result(
    trainer: SavedTrainer, commit_message: str | None, blocking: bool, token: str | None, revision: str | None
) -> Any:
    """Upload the output folder; see :meth:`CheckpointedTrainer.push_to_hub`."""
    from transformers.utils.hub import hf_api

    args = trainer.args
    trainer._finish_current_push()
    upload: Any = hf_api().upload_folder
    return upload(
        repo_id=trainer.hub_model_id,
        folder_path=str(args.output_dir),
        commit_message=commit_message,
        token=args.hub_token if token is None else token,
        run_as_future=not blocking,
        ignore_patterns=not_pushed(args),
        revision=args.hub_revision if revision is None else revision,
    )


def push_checkpoint(trainer: SavedTrainer, folder: Path) -> None:
    """Start the uploads that ``hub_strategy`` asks for after a save; they run beside the training.

    The model goes to the top of the repository; the checkpoint, with all it takes to go on, to ``last-checkpoint`` or
    under its own name.

    Args:
        trainer: The trainer that has saved.
        folder: The finished checkpoint.
    """
    from transformers.utils.hub import PushInProgress, hf_api

    args = trainer.args
    running: Any = trainer.push_in_progress
    if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
        return
    if not args.hub_always_push and running is not None and not running.is_done():
        return
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    target = Path(args.output_dir or ".")
    run = trainer.output.run()
    staging = run.staging / "push"
    for path in files_below(folder):
        name = path.relative_to(folder)
        if not name.parts[0].startswith(_STATE_PREFIXES):
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, staging / name)
    trainer.output.put_files(run, staging)
    message = f"Training in progress, step {trainer.state.global_step}"
    common: dict[str, Any] = {
        "repo_id": trainer.hub_model_id,
        "token": args.hub_token,
        "run_as_future": True,
        "revision": args.hub_revision,
    }
    jobs = [
        hf_api().upload_folder(
            folder_path=str(target),
            commit_message=message,
            ignore_patterns=not_pushed(args),
            **common,
        )
    ]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else folder.name
        jobs.append(
            hf_api().upload_folder(
                folder_path=str(folder), path_in_repo=place, commit_message=f"{message}, checkpoint", **common
            )
        )
    if running is None or running.is_done():
        trainer.push_in_progress = PushInProgress(jobs)  # type: ignore[arg-type, assignment]
    else:
        running.jobs.extend(jobs)
