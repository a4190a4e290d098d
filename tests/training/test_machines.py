"""The rates of this machine are facts about it, and leave no trace in a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from preftune.training import machines


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that nobody has measured."""
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(machines, "kept_rates", machines.kept_rates.__wrapped__)


def test_measuring_leaves_random_numbers_alone(unknown: None, tmp_path: Path) -> None:
    """A first run, which measures, and a second one, which reads, draw the same dropout."""
    before = torch.get_rng_state()
    first = machines.this_machine(processor=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert (tmp_path / "machine.json").is_file()
    second = machines.this_machine(processor=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert (first.bf16, first.fp32, first.bandwidth) == (second.bf16, second.fp32, second.bandwidth)
    assert min(first.bf16, first.fp32, first.thin_bf16, first.thin_fp32, first.bandwidth) > 0
