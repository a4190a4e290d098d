"""transformers' trainer with checkpoints that are whole or absent, and with exact resuming.

transformers decides when to save; what is written, how it gets its name and what is read back is decided here. Under
FSDP2 a checkpoint is that of one process; under DeepSpeed the parts that are sharded stay in its own format, and the
manifest covers them as well.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from preftune.errors import ConfigError
from preftune.files import write_text
from preftune.ownership import HOME, holding
from preftune.training.checkpoints import folders, rng, shards, state
from preftune.training.checkpoints.files import is_write_failure, plain_failures, reason_of
from preftune.training.checkpoints.hub import push_checkpoint, push_result
from preftune.training.checkpoints.identity import compare, describe_run
from preftune.training.checkpoints.manifest import InvalidCheckpoint, Manifest, seal, verify
from preftune.training.checkpoints.output import Output
from preftune.training.checkpoints.results import write_metrics, write_model
from preftune.training.checkpoints.resume import check_same_shards, resolve
from preftune.training.checkpoints.saved import SavedTrainer
from preftune.training.checkpoints.trees import has_tree, load_tree, save_tree
from preftune.training.checkpoints.watch import LoopWatch
from preftune.training.zero_config import zero_stage
from preftune.version import __version__

_STATE = "trainer_state.json"
_SETTINGS = "training_args.json"


class CheckpointedTrainer(SavedTrainer):
    """Saves and resumes; the trainers above it know nothing of files."""

    def __init__(self, **kwargs: Any) -> None:
        self._manifest: Manifest | None = None
        self._checked: tuple[Any, Manifest | None] | None = None
        self._identity: dict[str, Any] | None = None
        self._progress: dict[str, Any] | None = None
        super().__init__(**kwargs)
        #: The output folder, and what of this run is in it.
        self.output = Output(self.args)
        self._watch = LoopWatch(self)
        self.add_callback(self._watch)

    # ---- going on ---------------------------------------------------------------------------------------------------

    def check_resume(self, resume_from_checkpoint: Any = None, **_: Any) -> Manifest | None:
        """Find the checkpoint that is asked for and refuse one of another run.

        Args:
            resume_from_checkpoint: ``True`` for the newest that is whole, or a folder.

        Returns:
            The checkpoint, or ``None`` where training begins anew.

        Raises:
            ConfigError: If there is none, it is damaged, or its run was another one; or if the output folder holds
                results of another run.
        """
        asked = resume_from_checkpoint
        manifest = None if asked in (None, False) else resolve(asked, Path(str(self.args.output_dir)))
        self._identity = describe_run(self)
        if manifest is not None:
            if bool(manifest.body.get("sharded")) != self._is_sharded:
                raise ConfigError(
                    "the checkpoint was written by another kind of distributed training",
                    where="resume_from_checkpoint",
                    value=str(manifest.folder),
                )
            if self._is_sharded:
                check_same_shards(manifest, self.args)
            loose = compare(manifest.identity, self._identity)
            if loose:
                said = f"resuming with changes, so that results are not the same to the bit: {'; '.join(loose)}"
                warnings.warn(said, UserWarning, stacklevel=3)
        if manifest is None:
            self._check_models()
        self.output.begin(manifest)
        self._checked = (asked, manifest)
        return manifest

    def _check_models(self) -> None:
        """Refuse to train into the folder that a model has come from: its weights would be lost or moved away."""
        # Not `ref_model`, which makes a model of a reference that follows the policy.
        for name, model in (("model", self.model), ("ref_model", getattr(self, "_given_reference", None))):
            source = getattr(getattr(model, "config", None), "_name_or_path", None)
            if source and Path(source).exists() and self.output.would_touch(Path(source)):
                raise ConfigError(
                    f"the {name} was loaded from {source}, and what is there would make room for this run's results",
                    where="output_dir",
                    value=str(self.args.output_dir),
                    remedy="set another output_dir",
                )

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; see transformers' ``Trainer.train``."""
        if self._checked is None or self._checked[0] != resume_from_checkpoint:
            self.check_resume(resume_from_checkpoint)
        assert self._checked is not None
        self._manifest, self._checked = self._checked[1], None
        self._progress, self.seconds_before, self.num_skipped_in_a_row = None, 0.0, 0
        path = None if self._manifest is None else str(self._manifest.folder)
        with self.output.held():
            return super().train(path, *args, **kwargs)

    def begin(self) -> None:
        """Put the running sums and the subclass's state back; called when the loop has reset its own."""
        super().begin()
        if self._manifest is None:
            return
        folder = self._manifest.folder
        if has_tree(folder, "extra_state"):
            self.load_extra_state(load_tree(folder, "extra_state"))
        progress = self._own_progress(folder)
        if progress is not None:
            state.restore_progress(self, progress)

    def _own_progress(self, folder: Path) -> dict[str, Any] | None:
        name = f"rank_state_{self.args.process_index}"
        same_number = self._manifest is not None and self._manifest.body["num_processes"] == self.args.world_size
        if self._progress is None and same_number and has_tree(folder, name):
            self._progress = load_tree(folder, name)
        return self._progress

    def _load_rng_state(self, checkpoint: str | None) -> None:
        progress = None if checkpoint is None else self._own_progress(Path(checkpoint))
        if progress is not None:
            rng.restore(progress["random"], self.args.device)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._is_sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if self.is_fsdp_enabled:
            shards.load_optimizer(self.model, self.optimizer, Path(checkpoint))
        else:
            state.load_optimizer(self.optimizer, Path(checkpoint))
        state.load_scheduler(self.lr_scheduler, Path(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            shards.load_model(self.model, Path(resume_from_checkpoint))
        elif self.is_deepspeed_enabled:
            # An adapter's checkpoint leaves out what is frozen.
            whole = not hasattr(self.model, "peft_config")
            deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint, load_module_strict=whole)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            shards.load_model(self.model, Path(str(self.state.best_model_checkpoint)))
        else:
            super()._load_best_model()

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.load_scaler(getattr(self.accelerator, "scaler", None), Path(checkpoint))

    def _load_callback_state(self) -> None:
        state.restore_callbacks(self)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if 0 < self.state.max_steps <= self.state.global_step:
            # The checkpoint is the run's last; the loop would add a step to an epoch that max_steps cut short.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    # ---- saving -----------------------------------------------------------------------------------------------------

    @property
    def _is_sharded(self) -> bool:
        loaded_in_parts = getattr(self, "is_distributed_loading_by_transformers", False)
        return bool(self.is_deepspeed_enabled or loaded_in_parts)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        epoch = kwargs["epoch"] if "epoch" in kwargs else args[4]
        self._watch.arrange_save(self.control, self.state, epoch)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside, then let it take its name; a failed write is said and costs nothing else."""
        run = self.output.run(Path(self._get_output_dir(trial=trial)))
        step = self.state.global_step
        final = run.folder / f"checkpoint-{step}"
        staging = folders.staging_folder(run, step)
        best = self.state.best_model_checkpoint
        failure: str | None = None
        for stage in (self._prepare_staging, self._write_parts, self._publish):
            if failure is None:
                try:
                    stage(staging, final)
                except Exception as error:
                    if not is_write_failure(error):
                        raise
                    failure = reason_of(error)
            if not self._everywhere(failure is None):
                failure = failure or "another process could not write its part"
        if not self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        if failure is not None:
            self.state.best_model_checkpoint = best
            self.output.not_saved(step, failure)
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
                folders.warn_not_saved(final, failure)
            return
        self.output.saved(step)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            kept = self.state.best_model_checkpoint
            folders.rotate(run, self.args.save_total_limit, [Path(p) for p in (kept, final) if p])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        sharded = self.is_fsdp_enabled
        optimizer: Any = self.optimizer
        whole = shards.whole_optimizer(self.model, optimizer) if sharded else None
        if self.args.should_save:
            save_tree(Path(output_dir), "optimizer", optimizer.state_dict() if whole is None else whole)
            state.save_scheduler(self.lr_scheduler, Path(output_dir))

    def _prepare_staging(self, staging: Path, final: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)

    def _write_parts(self, staging: Path, final: Path) -> None:
        self.save_model(str(staging), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(staging))
            scaler = getattr(self.accelerator, "scaler", None)
            if scaler is not None and self.args.should_save:
                save_tree(staging, "scaler", scaler.state_dict())
            # Machines without a common disk each keep their own part, for as long as the save takes.
            staging.mkdir(parents=True, exist_ok=True)
            save_tree(staging, f"rank_state_{self.args.process_index}", state.progress(self))
        if not self.args.should_save:
            return
        extra = self.extra_state()
        if extra and not self.args.save_only_model:
            save_tree(staging, "extra_state", extra)
        if self.state.best_global_step:
            best = final.with_name(f"checkpoint-{self.state.best_global_step}")
            # A folder of that name may be somebody else's.
            if best == final or best.name in self.output.run(final.parent).record.folders:
                self.state.best_model_checkpoint = str(best)
        self.state.stateful_callbacks = state.callback_states(self)  # type: ignore[assignment]
        document = json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True)
        write_text(staging / _STATE, document + "\n")

    def _publish(self, staging: Path, final: Path) -> None:
        if not self.args.should_save:
            return
        if self._identity is None:
            self._identity = describe_run(self)
        body = {
            "preftune": __version__,
            "step": self.state.global_step,
            "epoch": self.state.epoch,
            "resumable": not self.args.save_only_model,
            "sharded": self._is_sharded,
            "zero_stage": zero_stage(self.args),
            "num_processes": self.args.world_size,
            "identity": self._identity,
            "run": self.output.run_id,
        }
        seal(staging, body)
        folders.publish(self.output.run(final.parent), staging, self.state.global_step)

    def _everywhere(self, well: bool) -> bool:
        """Whether every process is well; also the point where they wait for each other."""
        if self.args.world_size == 1:
            return well
        flag = torch.tensor([int(not well)], device=self.args.device)
        reduced = self.accelerator.reduce(flag, reduction="sum")
        assert isinstance(reduced, Tensor)
        return not bool(reduced.item())

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the model, file by file in one step each, with the settings as JSON and without secrets."""
        target = Path(str(output_dir if output_dir is not None else self.args.output_dir))
        if not self.args.should_save:
            super()._save(str(target), state_dict)
            return
        # A checkpoint takes its name as a whole; the end result replaces files that others may be reading.
        if HOME in target.parts:
            self._write_result(target, state_dict)
            return
        with plain_failures(str(target)), holding(target):
            own = target.resolve() == self.output.folder.resolve()
            run = self.output.run(target) if own else self.output.other_folder(target)
            staging = run.staging / "model"
            shutil.rmtree(staging, ignore_errors=True)
            try:
                self._write_result(staging, state_dict)
                if not own:
                    self.output.make_room(run, staging)
                self.output.put_files(run, staging)
            finally:
                shutil.rmtree(staging, ignore_errors=True)

    def _write_result(self, folder: Path, state_dict: Any) -> None:
        from peft import PeftModel

        model: Any = self.model
        if not isinstance(model, (PreTrainedModel, PeftModel)):
            state_dict = model.state_dict() if state_dict is None else state_dict
            model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        write_model(folder, model, self.processing_class, state_dict, self.args)

    def save_state(self) -> None:
        """Write ``trainer_state.json`` into the output folder, in one step."""
        if self.is_world_process_zero():
            with plain_failures(str(self.args.output_dir)):
                text = json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True)
                self.output.run().put_text(_STATE, text + "\n")

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Write ``{split}_results.json`` and add to ``all_results.json``, each in one step.

        A torn file of an earlier, killed run makes room, where transformers would fail to read it.
        """
        if not self.is_world_process_zero():
            return
        with plain_failures(str(self.args.output_dir)):
            write_metrics(self.output.run(), split, metrics, combined=combined)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        push_checkpoint(self, Path(checkpoint_folder))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save and push the result, without files that hold rows of the data; see transformers' ``push_to_hub``."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        kwargs.setdefault("model_name", str(self.hub_model_id).split("/")[-1])
        self.create_model_card(**kwargs)
        return push_result(self, commit_message, blocking, token, revision)

    # ---- the end ----------------------------------------------------------------------------------------------------

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        """As transformers', with the time of all sessions, whatever the wall clock did meanwhile."""
        best = self.state.best_model_checkpoint
        if best is not None and self.args.load_best_model_at_end:
            try:
                verify(Path(best))
            except InvalidCheckpoint as error:
                self.state.best_model_checkpoint = None
                said = f"the best checkpoint {best} is not loaded: {error}; the last weights are kept"
                warnings.warn(said, UserWarning, stacklevel=2)
        started = time.time() - self.seconds_trained()
        # transformers would then remove every other folder that is named like a checkpoint.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            outcome = super()._finalize_training(trial, num_train_samples, started)  # type: ignore[no-untyped-call]
        finally:
            self.args.save_total_limit = limit
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and limit == 1:
            folders.keep_only(self.output.run(Path(best).parent), Path(best).name)
        return outcome
