"""What a run says when the machine gives out."""

from __future__ import annotations

import errno
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from preftune.cli.main import main
from preftune.errors import SetupError
from preftune.runs.failures import foreseen
from preftune.training.checkpoints.files import plain_failures


def full_disk(path: Path) -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", str(path))


@pytest.mark.parametrize("told_below", [False, True], ids=["error", "told"])
def test_a_full_disk_names_the_checkpoint_to_go_on_from(tmp_path: Path, told_below: bool) -> None:
    from tests.faults.worlds import build, make_pairs

    build(tmp_path)
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in make_pairs(16)), encoding="utf-8")

    def write() -> None:
        with plain_failures(str(out)) if told_below else nullcontext():
            raise full_disk(out / "model.safetensors")

    def fail() -> str:
        with pytest.raises(SetupError) as caught, foreseen(SimpleNamespace(output_dir=str(out))):
            write()
        return str(caught.value)

    assert fail().endswith("free some space, or set another output_dir")
    line = ["dpo", "--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(pairs), "--output_dir"]
    line += [str(out), "--max_steps", "2", "--save_steps", "2", "--report_to", "none", "--advice", "false"]
    assert main([*line, "--use_cpu", "true", "--disable_tqdm", "true"]) == 0
    assert fail().endswith(f"with --resume_from_checkpoint true goes on from {out / 'checkpoint-2'}")
    # One that is damaged is no way on.
    (out / "checkpoint-2" / "model.safetensors").write_bytes(b"")
    assert fail().endswith("or set another output_dir")
