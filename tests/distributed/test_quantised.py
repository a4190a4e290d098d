"""Adapters of 4-bit weights under FSDP2; needs the quantization extra."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed import cases as given
from tests.distributed.test_equality import launched
from tests.parity import worlds

pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("ignore")]


def test_adapters_are_those_of_one_process(tmp_path: Path) -> None:
    """To the rounding of bf16, which adapters of 4-bit weights have."""
    world = worlds.World(tmp_path / "world")
    done = launched(given.QUANTISED, world, tmp_path, fsdp=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, case in given.QUANTISED.items():
        given.run(case, world.path, tmp_path / "one" / name)
        mine, theirs = given.saved(tmp_path / "one" / name), given.saved(tmp_path / name)
        assert set(mine) == set(theirs)
        for key, value in mine.items():
            assert float((theirs[key] - value).float().norm()) <= 2e-2 * float(value.float().norm()), (name, key)
        alone, found = (
            json.loads((each / "found-0.json").read_text()) for each in (tmp_path / "one" / name, tmp_path / name)
        )
        assert found["losses"] == pytest.approx(alone["losses"], abs=0.02)
        # It learns.
        assert found["eval"]["eval_loss"] < 0.6


def test_packed_weights_are_not_rounded(tmp_path: Path) -> None:
    world = worlds.World(tmp_path / "world")
    rounded: given.Case = ("DPO", 24, {"lora": True, "quantised": "float32", "bf16": True})
    done = launched({"rounded": rounded}, world, tmp_path, fsdp=True)
    assert done.returncode != 0
    assert "bnb_4bit_quant_storage" in done.stderr
    assert "would be rounded" in done.stderr
