"""The command for GPUs: what it writes when things go wrong, and what the document makes of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from benchmarks import gpu, gpu_document, gpu_training, render


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """The command sets variables for its process."""
    with mock.patch.dict(os.environ):
        yield


def test_results_are_on_disk_after_every_section_and_a_failure_is_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "gpu.json"
    report = gpu.Report(path, seconds=100, dry=True)

    def good(result: dict[str, Any]) -> None:
        result["error of a kernel"] = 1e-3

    def bad(result: dict[str, Any]) -> None:
        result["first"] = 1
        raise RuntimeError("no kernel image")

    report.run("good", 0, good)
    assert json.loads(path.read_text())["sections"]["good"]["error of a kernel"] == 1e-3
    report.run("bad", 0, bad)
    report.run("late", 1000, good)
    sections = json.loads(path.read_text())["sections"]
    assert sections["bad"]["first"] == 1
    assert sections["bad"]["error"] == "RuntimeError: no kernel image"
    assert "are needed" in sections["late"]["skipped"]
    assert "section_s" not in sections["late"]


def test_unknown_sections_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--dry", "--only", "varlen,nonsense"])
    assert "nonsense: allowed are env, varlen" in capsys.readouterr().err


def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--only", "env"]) == 2
    assert "--dry" in capsys.readouterr().err


def test_a_dry_run_of_the_kernels(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main(["--dry", "--only", "varlen,head", "--out", str(out)]) == 0
    sections = json.loads(out.read_text())["sections"]
    assert sections["varlen"].pop("section_s") >= 0
    errors = [value for value in sections["varlen"].values() if isinstance(value, float)]
    assert len(errors) >= 6
    assert max(errors) < 1e-5
    assert sections["head"]["error, trained"]["weight"] < 1e-5
    assert "error" not in sections["head"]


def test_rows_have_the_published_lengths() -> None:
    rows = gpu_training.make_rows(400, 1000, gpu_training.LENGTHS["hh"])
    lengths = {name: sorted(len(row[name].split()) for row in rows) for name in ("prompt", "chosen")}
    assert lengths["prompt"][200] == pytest.approx(127, rel=0.15)
    assert lengths["chosen"][200] == pytest.approx(59, rel=0.15)


def test_operations_of_a_step_count_prompts_once_and_the_head_on_completions() -> None:
    shape = {"vocab": 100, "hidden": 8, "intermediate": 16, "layers": 2, "heads": 2, "kv_heads": 1, "tied": True}
    row = {"prompt": "a b c", "chosen": "d e", "rejected": "f"}
    body = 2 * 2 * (2 * 64 + 2 * 8 * 4 + 3 * 8 * 16)
    products = body * 6 + 2 * 8 * 100 * 3
    attention = 4 * 8 * 2 * (6 + (2 * 3 + 3) + (3 + 1))
    assert gpu_training.step_operations([row], shape, lora=False) == 3 * products + 3 * attention
    assert gpu_training.step_operations([row], shape, lora=True) == 2 * products + 3 * attention


def report_of(**sections: Any) -> dict[str, Any]:
    machine = {
        "processor": "a processor",
        "accelerator": "a GPU",
        "num_cores": 2,
        "num_threads": 2,
        "memory_bytes": 8e9,
        "cpu_capability": "AVX512",
        "system": "a system",
        "python": "3.11",
        "versions": {"torch": "2"},
        "commit": None,
        "matmul_flops_per_second": {"fp32": 1e13, "bf16": 8e14},
        "load_average": None,
    }
    return {"kind": "gpu", "date": "2030-01-02", "dry": False, "machine": machine, "sections": sections}


def test_the_document_shows_ratios_goals_and_wrong_kernels(tmp_path: Path) -> None:
    cell = {"peak_gb": 20.0, "until_first_step_s": 3.0, "operations_per_second": 2e14}
    report = report_of(
        **{
            "varlen": {"bf16": 4e-3, "broken": 0.5, "section_s": 3},
            "train-1b": {
                "hh: preftune": {**cell, "pairs_per_second": 250.0, "backends": ["varlen"]},
                "hh: preftune, prompts not shared": {**cell, "pairs_per_second": 125.0, "backends": ["varlen"]},
                "hh: TRL at its best": {**cell, "pairs_per_second": 100.0},
                "hh: TRL as shipped": {"error": "OutOfMemoryError: no"},
            },
        }
    )
    (tmp_path / "gpu.json").write_text(json.dumps(report))
    out = tmp_path / "benchmarks.md"
    assert render.main([str(tmp_path / "gpu.json"), "--out", str(out)]) == 0
    text = out.read_text()
    assert "| hh | preftune | 250 | 2.50 | 2.3 | 20.0 GB | 25.0 % | 3.0 s | varlen |" in text
    assert "TRL as shipped: OutOfMemoryError: no" in text
    assert "hh 2.00 (goal 1.4)" in text
    assert "| broken | 0.5 **wrong** |" in text
    assert "Unmeasured" not in text


def test_a_dry_run_is_no_measurement(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps({**report_of(), "dry": True}))
    out = tmp_path / "benchmarks.md"
    render.main([str(tmp_path / "gpu.json"), "--out", str(out)])
    assert gpu_document.UNMEASURED in out.read_text()
