"""What a training from Python prints: a line at its beginning, the guards at its end, or nothing where asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset

from preftune import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from tests.pipeline.conftest import made  # noqa: F401


def settings(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        **more,
    }


@pytest.mark.parametrize("silent", [False, True])
def test_a_run_is_told_in_a_line(
    made: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    silent: bool,
) -> None:
    rows = load_dataset("json", data_files=str(made / "pairs.jsonl"), split="train")
    args = DPOConfig(**settings(tmp_path, disable_tqdm=silent))
    DPOTrainer(model=str(made / "base"), args=args, train_dataset=rows).train()
    out = capsys.readouterr().out
    first = next((line for line in out.split("\n") if line.startswith("preftune dpo")), None)
    if silent:
        assert first is None
        assert "guards" not in out
    else:
        assert first is not None
        assert "60 examples, 1 steps of 4, packed; reference: the policy before training" in first
        assert "100.0 % of them trained" in first
        assert "\nguards\n  silent: " in out


def test_without_a_reference_none_is_named(
    made: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = load_dataset("json", data_files=str(made / "chats.jsonl"), split="train")
    SFTTrainer(model=str(made / "base"), args=SFTConfig(**settings(tmp_path)), train_dataset=rows).train()
    first = next(line for line in capsys.readouterr().out.split("\n") if line.startswith("preftune sft"))
    assert "reference" not in first
