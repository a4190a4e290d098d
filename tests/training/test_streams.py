"""Long streams are trained on while they are read: flat memory, the same numbers, exact resuming."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer

import preftune
from preftune.errors import DataError
from preftune.training import streams
from preftune.training.streams import Stream
from tests.parity import worlds


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


class Counted:
    """Rows without end, which counts those that were asked for."""

    def __init__(self, kind: str = "DPO") -> None:
        self.read = 0
        pairs = worlds.pair_rows(50)
        self.rows = [{"text": row["prompt"]} for row in pairs] if kind == "SFT" else pairs

    def __call__(self) -> Iterator[dict[str, Any]]:
        for row in itertools.cycle(self.rows):
            self.read += 1
            yield row


def trained(
    world: worlds.World,
    out: Path,
    data: Any,
    kind: str = "DPO",
    resume: Any = None,
    late: bool = False,
    **settings: Any,
) -> Any:
    settings = {**worlds.DEFAULTS, "max_steps": 6, "reference_store": False, **settings}
    if kind not in ("DPO", "KTO"):
        settings.pop("reference_store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "MOST_ROWS_AHEAD", 0 if late else 1 << 30)
        trainer = getattr(preftune, f"{kind}Trainer")(
            model=world.path,
            args=getattr(preftune, f"{kind}Config")(output_dir=str(out), **settings),
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(world.path),
        )
    trainer.train(resume)
    return trainer


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def assert_same(one: Any, other: Any) -> None:
    mine, others = weights(one), weights(other)
    assert all(torch.equal(mine[name], others[name]) for name in mine)


@pytest.mark.parametrize("kind", ["DPO", "ORPO", "SFT"])
def test_it_is_read_as_it_is_needed_with_the_same_result(
    kind: str, world: worlds.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "BLOCK", 8)
    rows = Counted(kind)
    ahead = trained(world, tmp_path / "ahead", IterableDataset.from_generator(Counted(kind)), kind)
    late = trained(world, tmp_path / "late", IterableDataset.from_generator(rows), kind, late=True)
    assert isinstance(late.train_dataset, Stream)
    assert not isinstance(ahead.train_dataset, Stream)
    assert_same(ahead, late)
    # Accelerate reads one batch ahead.
    assert 24 <= rows.read <= 24 + 4 + 8


def test_a_run_goes_on_in_the_middle_of_a_stream(
    world: worlds.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "BLOCK", 5)
    # It ends and begins again on the way.
    data = Dataset.from_list(worlds.pair_rows(17)).to_iterable_dataset()
    settings: dict[str, Any] = {"late": True, "gradient_accumulation_steps": 2}
    whole = trained(world, tmp_path, data, save_strategy="steps", save_steps=4, **settings)
    again = trained(world, tmp_path, data, resume=str(tmp_path / "checkpoint-4"), **settings)
    assert again.state.global_step == 6
    assert_same(whole, again)


def test_rows_that_cannot_be_used_are_left_out_of_every_block(
    world: worlds.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "BLOCK", 4)
    rows = worlds.pair_rows(24)
    bad = [{**row, "chosen": None} if number % 6 == 5 else row for number, row in enumerate(rows)]
    good = [row for row in bad if row["chosen"] is not None]
    settings: dict[str, Any] = {"late": True, "on_bad_rows": "skip", "max_steps": 5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = trained(world, tmp_path / "a", Dataset.from_list(bad).to_iterable_dataset(), **settings)
    other = trained(world, tmp_path / "b", Dataset.from_list(good).to_iterable_dataset(), **settings)
    assert_same(one, other)


def test_an_empty_stream_is_refused(world: worlds.World, tmp_path: Path) -> None:
    empty = IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(DataError, match="the stream holds no rows"):
        trained(world, tmp_path, empty, late=True)


def test_kto_reads_what_it_visits(world: worlds.World, tmp_path: Path) -> None:
    data = Dataset.from_list(worlds.unpaired_rows(40)).to_iterable_dataset()
    trainer = trained(world, tmp_path, data, "KTO", late=True, max_steps=2)
    assert not isinstance(trainer.train_dataset, Stream)


def test_a_run_goes_on_with_the_files_that_are_left(
    world: worlds.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without reading what was trained on: ``ignore_data_skip``."""
    monkeypatch.setattr(streams, "BLOCK", 5)
    rows = worlds.pair_rows(24)
    saving: dict[str, Any] = {"late": True, "save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-2}
    whole = trained(world, tmp_path / "whole", Dataset.from_list(rows).to_iterable_dataset(), **saving)
    left, checkpoint = Dataset.from_list(rows[16:]).to_iterable_dataset(), str(tmp_path / "whole" / "checkpoint-4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = trained(world, tmp_path / "again", left, resume=checkpoint, ignore_data_skip=True, **saving)
    assert again.state.global_step == 6
    assert_same(whole, again)
