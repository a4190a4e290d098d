"""Two processes that train together: every one keeps its own random state, one manifest covers all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from preftune.training.checkpoints import verify
from tests.faults import launched
from tests.faults.worlds import build, digest


@pytest.mark.slow
def test_two_processes_go_on_to_the_bit(tmp_path: Path) -> None:
    """As if killed after the save of step 4: the later checkpoints and the result are taken away."""
    build(tmp_path)
    code, said = launched.train(tmp_path, tmp_path / "a")
    assert code == 0, said[-2000:]
    manifest = verify(tmp_path / "a" / "checkpoint-4")
    assert {"rank_state_0.json", "rank_state_1.json"} <= set(manifest.body["files"])
    assert digest(manifest.folder / "rank_state_0.safetensors") != digest(manifest.folder / "rank_state_1.safetensors")
    (tmp_path / "b").mkdir()
    shutil.copytree(manifest.folder, tmp_path / "b" / "checkpoint-4")
    code, said = launched.train(tmp_path, tmp_path / "b", "--resume_from_checkpoint", "true")
    assert code == 0, said[-2000:]
    found = launched.outcome(tmp_path / "a")
    assert len(found) == 4
    assert found == launched.outcome(tmp_path / "b")
