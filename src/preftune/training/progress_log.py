"""What a run says while it goes on: one line for every log line, with the time, in a file that others may follow."""

from __future__ import annotations

import json
import os
import secrets
import signal
import time
import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from preftune.config.machine import machine_id
from preftune.files import stop_file
from preftune.ownership import active
from preftune.training.provenance import plain

FILE_NAME = "log.jsonl"


class LiveLog(TrainerCallback):
    """Appends to ``log.jsonl`` in the output folder: the beginning, every log line, the end.

    ``trainer_state.json`` tells the same at the end, without times. The beginning carries the process, so that a page
    can see whether the run is alive, and stop it. A file that cannot be written is no reason to end a run.
    """

    def __init__(self) -> None:
        self._failed = False
        self._token = secrets.token_hex(16)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the process and the planned steps."""
        import psutil

        started = psutil.Process().create_time()
        facts = {"event": "begin", "max_steps": state.max_steps, "pid": os.getpid(), "started": started}
        self._write(args, state, {**facts, "machine": machine_id(), "token": self._token})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop where the live page asks for it: as SIGTERM does, by the hand of the process itself."""
        if not state.is_world_process_zero or args.output_dir is None:
            return
        try:
            (Path(args.output_dir) / stop_file(self._token)).unlink()
        except OSError:
            return
        if args.world_size == 1 and signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, signal.SIG_IGN):
            # A Python script that handles no signals: the signal would end it without a checkpoint.
            control.should_save = control.should_training_stop = True
        else:
            signal.raise_signal(signal.SIGTERM)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note a log line."""
        if logs:
            self._write(args, state, {"epoch": state.epoch, "logs": logs})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note that nothing follows."""
        self._write(args, state, {"event": "end"})

    def _write(self, args: TrainingArguments, state: TrainerState, facts: dict[str, Any]) -> None:
        if self._failed or not state.is_world_process_zero or args.output_dir is None:
            return
        line = json.dumps(plain({"time": time.time(), "step": state.global_step, **facts}), ensure_ascii=False)
        path = Path(args.output_dir) / FILE_NAME
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            run = active(path.parent)
            if run is not None:
                run.grow(FILE_NAME, f"{line}\n".encode())
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            self._failed = True
            warnings.warn(f"{path} cannot be written ({error.strerror}); the run goes on", UserWarning, stacklevel=2)
