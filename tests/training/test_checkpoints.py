"""Checkpoint folders: written beside, sealed, verified, found again, rotated; and their parts read back to the bit."""

from __future__ import annotations

import json
import os
import random
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from preftune.errors import ConfigError, SetupError, TrainingError
from preftune.files import replace_text
from preftune.ownership import HOME, RunFolder
from preftune.training.checkpoints import (
    InvalidCheckpoint,
    find_checkpoint,
    list_checkpoints,
    recover,
    rng,
    rotate,
    verify,
)
from preftune.training.checkpoints.files import is_write_failure, plain_failures
from preftune.training.checkpoints.folders import publish, staging_folder
from preftune.training.checkpoints.identity import compare, data_digest
from preftune.training.checkpoints.manifest import FILE_NAME, seal
from preftune.training.checkpoints.state import load_optimizer
from preftune.training.checkpoints.trees import load_tree, save_tree

RUN = "a" * 32


def make(output_dir: Path, step: int, *, resumable: bool = True, content: str = "weights", run: str = RUN) -> Path:
    owner = RunFolder.open(output_dir, run)
    staging = staging_folder(owner, step)
    (staging / "part").mkdir(parents=True)
    (staging / "model.safetensors").write_text(f"{content} {step}")
    (staging / "part" / "more.json").write_text("{}")
    seal(staging, {"step": step, "resumable": resumable, "identity": {"settings": {}}, "run": run})
    return publish(owner, staging, step)


# ---- state ---------------------------------------------------------------------------------------------------------


def test_trees_come_back_to_the_bit(tmp_path: Path) -> None:
    big = torch.arange(12.0).reshape(3, 4)
    tree: dict[str, Any] = {
        "state": {0: {"step": torch.tensor(3.0), "avg": big[:, 1]}, 7: {"quant": torch.arange(5, dtype=torch.uint8)}},
        "groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "foreach": None, "params": [0, 1]}],
        "inf": float("inf"),
        "nan": float("nan"),
        "empty": torch.zeros(0, 3),
        "half": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
        "array": np.arange(4, dtype=np.uint32),
        "number": np.float64(0.1),
        "queue": deque([1, 2], maxlen=4),
        "text": "naïve \U0001f600 \ud800",
        "flag": True,
        "dtype": torch.float16,
        "twice": [big, big],
    }
    save_tree(tmp_path, "x", tree)
    found = load_tree(tmp_path, "x")
    assert list(found["state"]) == [0, 7]
    assert found["groups"] == tree["groups"]
    assert (found["inf"], found["text"], found["flag"], found["number"]) == (tree["inf"], tree["text"], True, 0.1)
    assert found["nan"] != found["nan"]
    assert (found["queue"], found["queue"].maxlen, found["dtype"]) == (tree["queue"], 4, torch.float16)
    assert found["array"].dtype == np.uint32
    np.testing.assert_array_equal(found["array"], tree["array"])
    pairs = [
        (found["state"][0]["avg"], big[:, 1]),
        (found["state"][7]["quant"], tree["state"][7]["quant"]),
        (found["half"], tree["half"]),
        (found["empty"], tree["empty"]),
        (found["twice"][1], big),
    ]
    for mine, theirs in pairs:
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    # Written once, but two tensors again: changing one must not change the other.
    found["twice"][0].zero_()
    assert torch.equal(found["twice"][1], big)


def test_what_only_pickle_could_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"optimizer\.hook.*function"):
        save_tree(tmp_path, "optimizer", {"hook": lambda: None})


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"\0" * 50), Path.unlink])
def test_a_damaged_tree_is_one_clear_error(tmp_path: Path, damage: Any) -> None:
    save_tree(tmp_path, "x", {"a": torch.ones(3)})
    damage(tmp_path / "x.safetensors")
    with pytest.raises(SetupError, match="use another checkpoint"):
        load_tree(tmp_path, "x")


def test_random_states_go_on_where_they_were(tmp_path: Path) -> None:
    random.gauss(0, 1)
    np.random.standard_normal()
    save_tree(tmp_path, "x", rng.capture(torch.device("cpu")))
    drawn = [random.gauss(0, 1), random.random(), np.random.standard_normal(), float(torch.rand(()))]
    rng.restore(load_tree(tmp_path, "x"), torch.device("cpu"))
    assert drawn == [random.gauss(0, 1), random.random(), np.random.standard_normal(), float(torch.rand(()))]


def test_optimizer_state_keeps_its_precision(tmp_path: Path) -> None:
    """Adafactor keeps fp32 averages of bf16 weights; torch would round them to bf16 while loading."""
    from transformers.optimization import Adafactor

    def optimizer() -> tuple[Any, Any]:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(8, 8, dtype=torch.bfloat16))
        return weight, Adafactor([weight], lr=1e-2, relative_step=False, scale_parameter=False)

    weight, mine = optimizer()
    weight.grad = torch.randn(8, 8, dtype=torch.bfloat16)
    mine.step()
    save_tree(tmp_path, "optimizer", mine.state_dict())
    before = mine.state[weight]["exp_avg_sq_row"]
    assert before.dtype == torch.float32
    other, theirs = optimizer()
    load_optimizer(theirs, tmp_path)
    assert torch.equal(theirs.state[other]["exp_avg_sq_row"], before)
    assert theirs.state[other]["exp_avg_sq_row"].dtype == torch.float32


# ---- folders -------------------------------------------------------------------------------------------------------


def test_a_sealed_checkpoint_is_valid_and_every_change_is_noticed(tmp_path: Path) -> None:
    folder = make(tmp_path, 3)
    manifest = verify(folder)
    assert (manifest.step, manifest.resumable) == (3, True)
    assert manifest.num_bytes == len("weights 3") + 2
    for name in ("model.safetensors", "part/more.json", FILE_NAME):
        path = folder / name
        content = path.read_bytes()
        for damaged in (b"", content[:-3], content[:-2] + b"??", bytes(len(content)), content + b" x"):
            path.write_bytes(damaged)
            with pytest.raises(InvalidCheckpoint):
                verify(folder)
        path.unlink()
        with pytest.raises(InvalidCheckpoint, match=Path(name).name):
            verify(folder)
        path.write_bytes(content)
        verify(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"step": 4},
        {"resumable": False},
        {"identity": {"settings": {"beta": 0.5}}},
        {"run": "b" * 32},
        {"more": 1},
        {"sha256": "0" * 64},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_manifest_that_is_not_the_one_written_is_noticed(tmp_path: Path, change: dict[str, Any]) -> None:
    """Every part has its type and every file fits: only the manifest's digest of itself tells."""
    folder = make(tmp_path, 3)
    document = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    # Written in another way it is still the same document.
    (folder / FILE_NAME).write_text(json.dumps(document, indent=7, sort_keys=True), encoding="utf-8")
    assert verify(folder).step == 3
    (folder / FILE_NAME).write_text(json.dumps({**document, **change}), encoding="utf-8")
    with pytest.raises(InvalidCheckpoint, match=f"{FILE_NAME} is damaged"):
        verify(folder)
    assert find_checkpoint(tmp_path).manifest is None


def test_pickles_and_names_outside_are_not_accepted(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InvalidCheckpoint, match="pickled"):
        verify(folder)
    (folder / "pytorch_model.bin").unlink()
    document = json.loads((folder / FILE_NAME).read_text())
    document["files"]["../../outside"] = {"bytes": 1, "sha256": "0"}
    (folder / FILE_NAME).write_text(json.dumps(document))
    with pytest.raises(InvalidCheckpoint, match="damaged"):
        verify(folder)


def test_the_newest_whole_one_is_found_and_the_others_named(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        make(tmp_path, step)
    make(tmp_path, 11, resumable=False)
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-10" / "model.safetensors").write_text("other  10")
    found = find_checkpoint(tmp_path)
    assert found.manifest is not None
    assert found.manifest.step == 9
    assert [name for name, _ in found.skipped] == ["checkpoint-12", "checkpoint-11", "checkpoint-10"]
    assert "not finished" in found.describe_skipped()
    assert find_checkpoint(tmp_path / "none").manifest is None
    assert len(list_checkpoints(tmp_path)) == 5


def test_rotation_counts_whole_ones_and_keeps_what_is_needed(tmp_path: Path) -> None:
    paths = [make(tmp_path, step) for step in (1, 2, 3)]
    torn = tmp_path / "checkpoint-4"
    torn.mkdir()
    run = RunFolder.open(tmp_path, RUN)
    assert rotate(run, 1, [paths[0]]) == [paths[1]]
    assert rotate(run, None, []) == []
    # The torn one is newer, and neither counts nor goes: the only good one stays.
    assert rotate(run, 1, []) == [paths[0]]
    assert rotate(run, 1, []) == []
    assert [path.name for _, path in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize("ranks", ["0", "10", "110"])
def test_a_crash_while_replacing_leaves_one_of_the_two(
    ranks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = make(tmp_path, 5, content="old")
    run = RunFolder.open(tmp_path, RUN)
    staging = staging_folder(run, 5)
    staging.mkdir(parents=True)
    (staging / "model.safetensors").write_text("new")
    seal(staging, {"step": 5, "resumable": True, "identity": {}, "run": RUN})
    true, calls = os.rename, iter(range(9))

    def rename(a: Any, b: Any) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        true(a, b)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        publish(run, staging, 5)
    monkeypatch.undo()
    assert not final.exists()
    for rank in ranks:
        # Whichever process of a run comes first, all find it.
        monkeypatch.setenv("RANK", rank)
        found = find_checkpoint(tmp_path).manifest
        assert found is not None
        assert found.folder == final
    recover(tmp_path)
    verify(final)
    assert (final / "model.safetensors").read_text() == "old 5"
    assert sorted(path.name for path in tmp_path.iterdir()) == [HOME, "checkpoint-5"]
    assert not [path for path in (tmp_path / HOME).rglob("*") if path.suffix == ".safetensors"]


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    replace_text(target / "a.json", "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SetupError, match=r"No space left.*\.a\.json\.\w+\.tmp"), plain_failures("out"):
        replace_text(target / "a.json", "new")
    monkeypatch.undo()
    assert (target / "a.json").read_text() == "old"
    assert len(list(target.iterdir())) == 1
    run = RunFolder.open(target, RUN)
    for text in ("older", "new"):
        (run.staging / "sub").mkdir(parents=True)
        (run.staging / "a.json").write_text(text)
        (run.staging / "sub" / "b").write_text("b")
        if text == "older":
            (target / "a.json").unlink()
        run.put_files(run.staging)
    assert ((target / "a.json").read_text(), (target / "sub" / "b").read_text()) == ("new", "b")
    assert not run.staging.exists()


def test_only_failures_to_write_are_taken_for_such() -> None:
    from safetensors import SafetensorError

    assert is_write_failure(OSError(28, "full"))
    assert is_write_failure(SafetensorError("Error while serializing: I/O error: No space left (os error 28)"))
    assert is_write_failure(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"))
    # As tokenizers do.
    assert is_write_failure(Exception("No space left on device (os error 28)"))
    assert not is_write_failure(Exception("error 28"))
    assert not is_write_failure(SafetensorError("HeaderTooLarge"))
    assert not is_write_failure(ValueError("x"))


# ---- identity ------------------------------------------------------------------------------------------------------


def run(**settings: Any) -> dict[str, Any]:
    return {
        "settings": {"beta": 0.1, "loss_type": ["sigmoid"], "max_steps": 10, **settings},
        "facts": {"pairs_per_step": 4, "reference": "aa"},
        "data": {"num_rows": 3, "sha256": "x"},
    }


def test_another_run_is_refused_with_every_difference() -> None:
    now = run(beta=0.2, loss_type=["ipo"])
    now["facts"]["reference"] = "bb"
    now["data"] = {"num_rows": 4, "sha256": "y"}
    with pytest.raises(ConfigError) as caught:
        compare(run(), now)
    said = str(caught.value)
    for part in ("beta 0.1 -> 0.2", "['sigmoid'] -> ['ipo']", "reference aa -> bb", "3 -> 4 rows"):
        assert part in said
    now = run()
    now["data"] = {"num_rows": 3, "sha256": "y"}
    with pytest.raises(ConfigError, match="other content in the 3 rows"):
        compare(run(), now)


def test_a_longer_run_is_the_same_run_and_said_to_be_longer() -> None:
    assert compare(run(), run(max_steps=20)) == ["max_steps 10 -> 20"]
    assert compare(run(save_steps=1, logging_dir="a"), run(save_steps=2, logging_dir="b")) == []
    # A setting that the older version did not have.
    assert compare(run(), run(invented=1)) == []


def test_the_data_digest_is_of_content_and_order() -> None:
    import datasets

    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [n], "ref_chosen_logps": 0.5} for n in range(5)]
    columns = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "weight")
    one = datasets.Dataset.from_list(rows)
    same = datasets.concatenate_datasets([one.select(range(2)), one.select(range(2, 5))])
    assert data_digest(one, columns) == data_digest(same, columns)
    assert data_digest(one.remove_columns("ref_chosen_logps"), columns) == data_digest(one, columns)
    assert data_digest(one.select([1, 0, 2, 3, 4]), columns)["sha256"] != data_digest(one, columns)["sha256"]
    # The same numbers, cut in another place.
    other = one.to_list()
    other[0] |= {"prompt_ids": [1], "chosen_ids": [2, 3]}
    assert data_digest(datasets.Dataset.from_list(other), columns)["sha256"] != data_digest(one, columns)["sha256"]
    assert data_digest(iter(rows), columns)["sha256"] is None
