"""Names out of files stay below the folder they belong to, links included."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from preftune.config.paths import inside
from preftune.errors import ConfigError, SetupError
from preftune.ownership import RunFolder
from preftune.report import build
from preftune.report.read import read_all, read_run
from preftune.sweep import runner
from preftune.sweep.board import SlotState
from preftune.sweep.locks import has_locks, one_at_a_time
from preftune.sweep.result import candidates_of, drop_weights
from preftune.sweep.runner import Outcome
from preftune.training.checkpoints import manifest
from preftune.training.checkpoints.folders import find_checkpoint
from preftune.training.given_references import choose_adapters

OUTSIDE = ("../outside", "../../etc", "run/../../outside", "way_out", "way_out/deeper", ".", "", "run/..", "a\0b")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a run in it, beside another one that is nobody's business, and a link between them."""
    for name in ("outside/deeper", "root/run"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "outside" / "model.safetensors").write_bytes(b"precious")
    (tmp_path / "outside" / "checkpoint-1").mkdir()
    (tmp_path / "root" / "way_out").symlink_to(tmp_path / "outside")
    return tmp_path / "root"


@pytest.mark.parametrize("name", [*OUTSIDE, "/etc"])
def test_names_that_lead_out(name: str, root: Path) -> None:
    assert inside(root, name) is None


def test_names_that_stay(root: Path) -> None:
    assert inside(root, "run") == root / "run"
    assert inside(root, "run/../run/new") == root / "run/../run/new"
    (root / "alias").symlink_to(root / "run")
    assert inside(root, "alias") == root / "alias"
    (root / "one").symlink_to(root / "two")
    (root / "two").symlink_to(root / "one")
    assert inside(root, "one/file") is None


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def sealed(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    manifest.seal(folder, {"step": 1, "resumable": True, "identity": {}})
    return folder


def forged(folder: Path, name: str, content: bytes) -> None:
    """A manifest whose own digest is right, with one more file in it."""
    path = folder / manifest.FILE_NAME
    document = json.loads(path.read_text())
    del document["sha256"]
    document["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps({**document, "sha256": manifest.digest(document)}))


@pytest.mark.parametrize("name", ["../secret", "{absolute}", "sub/../../secret"])
def test_a_checkpoint_s_manifest_cannot_name_other_files(name: str, tmp_path: Path) -> None:
    (tmp_path / "out" / "secret").parent.mkdir()
    (tmp_path / "out" / "secret").write_bytes(b"key")
    checkpoint = sealed(tmp_path / "out" / "checkpoint-1")
    manifest.verify(checkpoint)
    forged(checkpoint, name.format(absolute=tmp_path / "out" / "secret"), b"key")
    with pytest.raises(manifest.InvalidCheckpoint, match="damaged"):
        manifest.verify(checkpoint)
    found = find_checkpoint(tmp_path / "out")
    assert found.manifest is None
    assert [skipped for skipped, _ in found.skipped] == ["checkpoint-1"]


@pytest.mark.parametrize(
    "part",
    [
        {"files": {"a\0b": {"bytes": 1, "sha256": ""}}},
        {"files": {"": {"bytes": 1, "sha256": ""}}},
        {"files": {"model.safetensors": 3}},
        {"files": {"model.safetensors": {"bytes": "7", "sha256": 3}}},
        {"files": ["model.safetensors"]},
        {"files": None},
        {"step": "1"},
        {"step": True},
        {"step": 1e300},
        {"step": None},
        {"resumable": "yes"},
        {"identity": [1]},
        {"identity": "x" * 100_000},
    ],
)
def test_a_manifest_of_wrong_types_is_damaged(part: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = sealed(tmp_path / "out" / "checkpoint-1")
    path = checkpoint / manifest.FILE_NAME
    document = {**json.loads(path.read_text()), **part}
    del document["sha256"]
    path.write_text(json.dumps({**document, "sha256": manifest.digest(document)}))
    with pytest.raises(manifest.InvalidCheckpoint, match="damaged"):
        manifest.verify(checkpoint)
    assert find_checkpoint(tmp_path / "out").manifest is None


@pytest.mark.parametrize(
    "text", ["[" * 600 + "]" * 600, '{"a": ' * 5000, "[" * 200_000, "null", "[]", "3", "{}", "\xff", ""]
)
def test_a_manifest_that_is_none_is_damaged(text: str, tmp_path: Path) -> None:
    checkpoint = sealed(tmp_path / "out" / "checkpoint-1")
    (checkpoint / manifest.FILE_NAME).write_text(text, encoding="latin-1")
    with pytest.raises(manifest.InvalidCheckpoint, match="damaged"):
        manifest.verify(checkpoint)
    document = f'{{"format": 1, "sha256": "", "files": {{}}, "identity": {"[" * 600 + "]" * 600}}}'
    (checkpoint / manifest.FILE_NAME).write_text(document)
    with pytest.raises(manifest.InvalidCheckpoint, match="damaged"):
        manifest.verify(checkpoint)
    assert find_checkpoint(tmp_path / "out").manifest is None


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_checkpoint_holds_no_links(kind: str, listed: bool, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "extra.safetensors").write_bytes(b"key")
    checkpoint = sealed(tmp_path / "out" / "checkpoint-1")
    target = tmp_path / "elsewhere" / ("extra.safetensors" if kind == "file" else "")
    (checkpoint / "link").symlink_to(target)
    if listed:
        forged(checkpoint, "link" if kind == "file" else "link/extra.safetensors", b"key")
    with pytest.raises(manifest.InvalidCheckpoint, match="is a link"):
        manifest.verify(checkpoint)
    assert find_checkpoint(tmp_path / "out").manifest is None


@pytest.mark.parametrize("name", ["..", ".", "../other", "/tmp/other", "a/b", "a\\b", ""])
def test_adapters_are_saved_below_the_run(name: str) -> None:
    model: Any = SimpleNamespace(peft_config={"default": None, name: None}, active_adapters=["default"])
    with pytest.raises(ConfigError, match="the name of an adapter becomes that of a folder"):
        choose_adapters(model)


# ---- sweeps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in OUTSIDE if name])
def test_a_sweep_deletes_and_reads_only_its_own_trials(name: str, root: Path) -> None:
    for folder in (root / "run", root.parent / "outside"):
        # Whatever lies there may have a record, too.
        (folder / "model.safetensors").write_bytes(b"precious" if folder.name == "outside" else b"a trial's")
        RunFolder.open(folder, "a" * 32).note(["model.safetensors"])
    plan: Any = SimpleNamespace(keep="best", metric="eval_rewards/accuracies", direction="maximize", seed=0)
    states = []
    for slot, run in enumerate((name, "run", str(root.parent / "outside"))):
        outcome = Outcome(runner.DIVERGED, "blown up", {})
        outcome.run = run
        states.append(SlotState(slot, runner.DIVERGED, {}, outcome))
    drop_weights(plan, states, root, final=True)
    assert (root.parent / "outside" / "model.safetensors").read_bytes() == b"precious"
    assert (root.parent / "outside" / "checkpoint-1").is_dir()
    assert not (root / "run" / "model.safetensors").exists()
    done = Outcome(runner.COMPLETE, "", {"eval_rewards/accuracies": {"mean": 0.5}})
    done.run = name
    (candidate,) = candidates_of([SlotState(0, runner.COMPLETE, {}, done)], root, "eval_rewards/accuracies")
    assert candidate.held is None


@pytest.mark.parametrize("name", ["../outside", "../../etc", "way_out", "{absolute}"])
def test_a_report_follows_a_sweep_s_runs_only_within_it(name: str, root: Path) -> None:
    outside = root.parent / "outside"
    (outside / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 123.25}]}))
    run = name.format(absolute=outside)
    sweep = {"method": "sigmoid", "params": {}, "trials": [{"number": 0, "state": "complete", "run": run}]}
    (root / "sweep.json").write_text(json.dumps(sweep))
    _, (read,) = read_all([root])
    assert read.runs == []
    page = build([root], root / "report.html").read_text(encoding="utf-8")
    assert "123.25" not in page


# ---- reports -------------------------------------------------------------------------------------------------------

PARTS = ("trainer_state.json", "provenance.json", "alarms.jsonl", "samples.jsonl", "eval.json", "audit.json")


@pytest.mark.parametrize("name", [*PARTS, "advice.json", "log.jsonl", "config.yaml", "adapter_config.json"])
def test_a_report_takes_no_file_from_elsewhere(name: str, root: Path) -> None:
    secret = root.parent / "outside" / "private"
    secret.write_text('{"api_base": "hidden-text", "base_model_name_or_path": "hidden-text", "log_history": []}\n')
    run = root / "run"
    (run / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 1.0}]}))
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(secret)
    if name == "trainer_state.json":
        (run / "provenance.json").write_text('{"command": []}')
    read = read_run(run)
    assert "hidden-text" not in repr({key: value for key, value in vars(read).items() if key != "path"})
    if name != "adapter_config.json":
        assert any(name in note and "leads out" in note for note in read.notes)
    assert "hidden-text" not in build([run], root / "r.html").read_text(encoding="utf-8")


def test_a_recipe_s_name_is_no_path(tmp_path: Path) -> None:
    from preftune.recipes.catalogue import find_recipe

    for name in ("../../etc/passwd", "/etc/passwd", "../kto", "kto/../kto"):
        with pytest.raises(ConfigError, match="no such recipe"):
            find_recipe(name)


def test_a_sweep_s_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    lock = tmp_path / "trackers.lock"
    lock.symlink_to(tmp_path / "created")
    with pytest.raises(SetupError, match="a link in place of a lock"), one_at_a_time(lock):
        pass
    with pytest.raises(SetupError, match="a link in place of a lock"):
        has_locks(lock)
    assert not (tmp_path / "created").exists()
