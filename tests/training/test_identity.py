"""What a checkpoint remembers of the code that wrote it."""

from __future__ import annotations

from typing import Any

import pytest

from preftune.training.checkpoints.identity import code_versions, compare


def identity(**facts: Any) -> dict[str, Any]:
    data = {"num_rows": 4, "sha256": "a"}
    return {"settings": {"beta": 0.1}, "facts": {**code_versions(), "method": "DPOTrainer", **facts}, "data": data}


@pytest.mark.parametrize("name", ["torch", "transformers", "accelerate", "peft", "preftune"])
def test_another_version_is_said(name: str) -> None:
    assert code_versions()[name]
    assert compare(identity(), identity()) == []
    assert compare(identity(**{name: "0.0.1"}), identity()) == [f"{name} 0.0.1 -> {code_versions()[name]}"]


def test_a_library_that_is_gone_or_new_is_said() -> None:
    assert compare(identity(peft=None), identity()) == [f"peft None -> {code_versions()['peft']}"]


def test_versions_that_were_not_recorded_are_said() -> None:
    before = identity()
    for name in ("transformers", "peft"):
        del before["facts"][name]
    (said,) = compare(before, identity())
    assert said == "versions of transformers, peft, which the checkpoint does not tell"
