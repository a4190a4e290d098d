"""What a run trains on, and how the command line behaves: TRL's ``ScriptArguments`` and what data need beyond it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from preftune.errors import ConfigError


@dataclass
class ScriptConfig:
    """Settings of a command-line run that belong neither to the model nor to the trainer.

    Attributes:
        dataset_name: Hub id, data file, or folder that ``save_to_disk`` wrote.
        dataset_config: Configuration of a Hub dataset.
        dataset_train_split: Split to train on.
        dataset_test_split: Split to evaluate on, when evaluation is switched on.
        test_split_size: Rows of the training data to hold out: a share of the prompts, or about how many
            rows. Whole prompts are held out, so that none is on both sides.
        dataset_mixture: Several datasets, in the form ``{datasets: [{id, config, split, columns, weight}], seed,
            test_split_size, shuffle}``.
        dataset_mixer: Several datasets, in the older form ``{id: share}``.
        dataset_splits: Splits for ``dataset_mixer``; names that contain ``test`` are evaluated on.
        dataset_streaming: Read the training rows as they are needed, in memory that does not grow. Where max_steps
            visit more than 100,000 rows, they are also prepared, and scored by the reference, as they come.
        dataset_format: Name of the row format, when the columns alone mislead; ``auto`` recognises it.
        dataset_columns: Columns to keep, or to rename, as ``{their_name: chosen}``.
        pairing: How pairs are made from ranked responses: ``best_worst``, ``all`` or ``none``.
        on_bad_rows: ``error`` stops at the first row that cannot be used, ``skip`` quarantines and counts, ``warn``
            goes on where TRL does.
        quarantine_path: JSON-lines file for skipped rows.
        allow_drops: Start even if more than a tenth of the rows is lost.
        dry_run: Prepare everything, print the summary, and stop.
        advice: Look the settings over before training and say what is risky, in at most five lines.
        ignore_bias_buffers: Keep boolean buffers out of the synchronisation between processes.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, .json/.jsonl(.gz)/.parquet/.csv file, or save_to_disk folder."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    test_split_size: float | None = field(
        default=None,
        metadata={"help": "Hold out this share of the prompts, or about so many rows, to evaluate on."},
    )
    dataset_mixture: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Several datasets: {datasets: [{id, config, split, columns, weight}], seed, test_split_size,"
            " shuffle}."
        },
    )
    dataset_mixer: dict[str, float] | None = field(
        default=None, metadata={"help": "Several datasets in the older form {id: share}."}
    )
    dataset_splits: list[str] | None = field(default=None, metadata={"help": "Splits for dataset_mixer."})
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read the training rows as they are needed, in memory that does not grow."}
    )
    dataset_format: str = field(default="auto", metadata={"help": "Row format, when the columns alone mislead."})
    dataset_columns: dict[str, str] | list[str] | None = field(
        default=None, metadata={"help": "Columns to keep, or to rename: {their_name: chosen}."}
    )
    pairing: str = field(default="best_worst", metadata={"help": "How pairs are made from ranked responses."})
    on_bad_rows: str = field(
        default="error",
        metadata={"help": "What to do with a row that cannot be used.", "choices": ("error", "skip", "warn")},
    )
    quarantine_path: str | None = field(default=None, metadata={"help": "JSON-lines file for skipped rows."})
    allow_drops: bool = field(default=False, metadata={"help": "Start even if more than a tenth of the rows is lost."})
    dry_run: bool = field(default=False, metadata={"help": "Prepare everything, print the summary, and stop."})
    advice: bool = field(default=True, metadata={"help": "Say what looks risky in the settings before training."})
    ignore_bias_buffers: bool = field(
        default=False, metadata={"help": "Keep boolean buffers out of the synchronisation between processes."}
    )

    def __post_init__(self) -> None:
        """Refuse two sources of data at once."""
        sources = [
            name for name in ("dataset_name", "dataset_mixture", "dataset_mixer") if getattr(self, name) is not None
        ]
        if len(sources) > 1:
            raise ConfigError(f"both {' and '.join(sources)} are set", where="data", remedy="keep one of them")
        size = self.test_split_size
        if size is not None and not (0 < size < 1 or (size >= 1 and float(size).is_integer())):
            allowed = "a share between 0 and 1, or a whole number of rows"
            raise ConfigError("not a share or a number of rows", where="test_split_size", value=size, allowed=allowed)
        if size is not None and (self.dataset_mixture or {}).get("test_split_size") is not None:
            raise ConfigError(
                "set twice, beside dataset_mixture and in it", where="test_split_size", value=size, remedy="keep one"
            )
        if size is not None and self.dataset_streaming:
            raise ConfigError(
                "a stream cannot be divided",
                where="test_split_size",
                value=size,
                remedy="leave one of test_split_size and dataset_streaming out",
            )
        if self.dataset_splits is not None and self.dataset_mixer is None:
            raise ConfigError(
                "belongs to dataset_mixer, which is not set",
                where="dataset_splits",
                value=self.dataset_splits,
                remedy="set dataset_train_split and dataset_test_split instead",
            )

    def require_dataset(self) -> None:
        """Refuse a run without data.

        Raises:
            ConfigError: If no source of data is set.
        """
        if self.dataset_name is None and self.dataset_mixture is None and self.dataset_mixer is None:
            raise ConfigError("no data to train on", remedy="set --dataset_name, or dataset_mixture in a YAML file")
