"""The benchmark's own arithmetic: what is counted, sampled, compared and printed."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity import drawn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import cell, differential, render, run, summary, workloads


def test_the_documented_difference_is_told_from_others() -> None:
    # In one row of this draw the prompt ends within a word of one answer alone; so does none of the other draws.
    assert differential.merges_unevenly(drawn.draw(179))
    others = [drawn.draw(seed) for seed in range(60)]
    chosen = [run for run in others if run.verb in ("ORPO", "CPO") and run.form in ("explicit", "implicit")]
    assert chosen
    assert not any(map(differential.merges_unevenly, chosen))


def measured(variant: str, rep: int, seconds: float, **changes: Any) -> dict[str, Any]:
    record = {
        "variant": variant,
        "workload": "hh",
        "model": "llama-19m",
        "dtype": "bf16",
        "peft": "full",
        "checkpointing": "default",
        "batch_size": 8,
        "scale": 1.0,
        "data_scale": 1,
        "rep": rep,
        "seconds": seconds,
        "construction_seconds": seconds / 5,
        "training_seconds": seconds * 4 / 5,
        "cpu_seconds": seconds,
        "num_pairs": 100,
        "num_useful_tokens": 20_000,
        "useful_flops": 1e12,
        "memory_growth": 1e9,
    }
    return record | changes


def report_of(*cells: dict[str, Any]) -> dict[str, Any]:
    machine = {
        "processor": "a processor",
        "accelerator": None,
        "num_cores": 2,
        "num_threads": 2,
        "memory_bytes": 8e9,
        "cpu_capability": "AVX512",
        "system": "a system",
        "python": "3.11",
        "versions": {"torch": "2"},
        "commit": None,
        "matmul_flops_per_second": {"fp32": 1e11, "bf16": 1e12},
        "load_average": [0.1, 0.1, 0.1],
    }
    return {"preset": "quick", "date": "2030-01-02T03:04:05+00:00", "machine": machine, "cells": list(cells)}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_useful_operations_agree_with_a_counted_forward(kv_heads: int) -> None:
    shape = {"hidden": 32, "heads": 4, "kv_heads": kv_heads, "layers": 3, "intermediate": 48}
    config = LlamaConfig(
        vocab_size=workloads.VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")
    prompt, chosen = 7, 5
    total = prompt + chosen
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, total, dtype=torch.long), logits_to_keep=chosen)
    # Eager attention multiplies the masked half too, which is not useful work.
    masked = 4 * 32 * 3 * (total**2 - total * (total + 1) / 2)
    forward = counter.get_total_flops() - masked
    assert cell.useful_flops([(prompt, chosen, 0)], shape, "full") == pytest.approx(4 * forward, rel=1e-12)
    assert cell.useful_flops([(prompt, 0, chosen)] * 3, shape, "full") == pytest.approx(12 * forward, rel=1e-12)
    assert 2 * forward < cell.useful_flops([(prompt, chosen, 0)], shape, "lora") < 4 * forward


def test_ratios_are_formed_within_a_repetition() -> None:
    # The machine was three times slower in the second repetition: the ratio does not care.
    report = report_of(
        measured("trl", 0, 100.0), measured("packed", 0, 10.0), measured("trl", 1, 300.0), measured("packed", 1, 30.0)
    )
    ((trl, packed),) = summary.rows_of(report).values()
    row = dict(zip(summary.HEADERS, packed, strict=True))
    assert trl[0] == "TRL as shipped"
    assert row["x TRL"] == "10.0 (10.0-10.0)"
    assert row["pairs/s"] == "6.67 (3.33-10.0)"
    assert row["x padded"] == "-"
    assert row["of matmul rate"] == "6.7 % (3.3 %-10.0 %)"


def test_a_failed_cell_is_shown_and_leaves_the_others(tmp_path: Path) -> None:
    failed = measured("trl", 0, 1.0) | {"error": "exit 1: no memory"}
    report = report_of(failed, measured("packed", 0, 10.0))
    assert "TRL as shipped: failed, exit 1: no memory" in summary.table(report)
    (tmp_path / "one.json").write_text(json.dumps(report))
    assert render.main([str(tmp_path / "one.json"), "--out", str(tmp_path / "b.md")]) == 0
    text = (tmp_path / "b.md").read_text()
    assert "| preftune | 10.0 | 12.5 | 2.00 | - |" in text
    assert "**Unmeasured**: no accelerator" in text


def test_a_busy_machine_is_mentioned() -> None:
    report = report_of(measured("packed", 0, 10.0))
    assert "busy" not in summary.table(report)
    report["machine"]["load_average"] = [3.0, 1.0, 1.0]
    assert "busy (load 3.0 on 2 cores)" in summary.table(report)


def test_every_contender_takes_the_same_steps() -> None:
    args = run.parse_arguments(["--only", "hh", "--steps", "12"])
    setting = run.Setting("llama-19m", "hh", "bf16", "full", "default", 1, 1.0)
    rows = {variant: run.make_spec(args, setting, variant)["num_rows"] for variant in run.VARIANTS}
    assert set(rows.values()) == {12 * 8}
    for preset in run.PRESETS:
        assert run.parse_arguments(["--preset", preset]).steps >= 5
    assert "smollm2-135m" in run.parse_arguments([]).models


@pytest.mark.parametrize("name", ["hh", "dpo_en"])
def test_rows_are_made_where_the_files_and_the_hub_are_absent(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(workloads, "DATA", tmp_path)
    monkeypatch.setattr(workloads, "_from_hub", lambda name: None)
    tokenizer = workloads.load_tokenizer(tmp_path)
    rows = workloads.make_rows(name, 400, tokenizer)
    assert "synthetic rows with the lengths of" in workloads.source_of(name)
    medians = {"hh": (81, 31), "dpo_en": (173, 217)}[name]
    lengths = [[len(tokenizer(row[side])["input_ids"]) for side in ("prompt", "chosen")] for row in rows]
    for column, median in zip(zip(*lengths, strict=True), medians, strict=True):
        assert statistics.median(column) == pytest.approx(median, rel=0.25)
    assert len({row["prompt"] for row in rows}) == len(rows)


def test_wrong_choices_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.parse_arguments(["--variants", "packed,pakced"])
    assert "--variants: got 'pakced'" in capsys.readouterr().err


def test_growth_changes_one_thing_at_a_time(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run.main(["--preset", "growth", "--dry_run", "--work", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert not any("data" in line and "length" in line for line in lines)


@pytest.mark.parametrize("name", ["hh", "dpo_en"])
def test_few_rows_have_the_lengths_of_all(name: str, preference_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "DATA", preference_files)

    def length(row: dict[str, Any]) -> int:
        return sum(len(str(row[side])) for side in ("prompt", "chosen", "rejected"))

    every = {"hh": workloads._hh_rows, "dpo_en": workloads._dpo_en_rows}[name]()
    rows = workloads.make_rows(name, 24, tokenizer=None)
    assert len(rows) == 24
    assert all(row in every for row in rows)
    assert statistics.mean(map(length, rows)) == pytest.approx(statistics.mean(map(length, every)), rel=0.1)
    assert workloads.make_rows(name, 24, tokenizer=None) == rows


def test_more_rows_than_the_file_has_are_all_different(preference_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "DATA", preference_files)
    rows = workloads.make_rows("dpo_en", 650, tokenizer=None)
    assert len(rows) == 650
    assert len({json.dumps(row) for row in rows}) == 650


def test_synthetic_rows_have_exact_lengths_around_the_published_medians() -> None:
    class Words:
        """A tokenizer of whole words."""

        def get_vocab(self) -> dict[str, int]:
            return {f"\u0120{letter}{letter}": i for i, letter in enumerate("abcdefgh")}

    def median(rows: list[dict[str, Any]], side: str) -> float:
        return statistics.median(len(row[side].split()) for row in rows)

    rows = workloads.make_rows("ultrafeedback", 2000, Words())
    assert median(rows, "prompt") + median(rows, "chosen") == pytest.approx(409, rel=0.1)
    assert median(rows, "prompt") / median(rows, "chosen") == pytest.approx(0.42, rel=0.1)
    longer = workloads.make_rows("ultrafeedback", 2000, Words(), scale=4.0)
    assert median(longer, "prompt") == pytest.approx(4 * median(rows, "prompt"), rel=0.05)


def test_a_run_that_was_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    machine: dict[str, Any] = report_of()["machine"]
    machine["sources"] = {"digest": "a", "patterns": ["x"], "date": "2030-01-02"}
    code = {"digest": "a"}

    def run_cell(spec: dict[str, Any], timeout: float, cache: Path | None = None) -> dict[str, Any]:
        if spec["task"] == "machine":
            return machine | {"sources": machine["sources"] | code}
        if spec["task"] == "measure":
            if len(asked) == 3:
                raise KeyboardInterrupt
            asked.append((spec["variant"], spec["batch_size"]))
            return {
                key: value for key, value in measured("", 0, 1.0).items() if key not in ("variant", "rep", "batch_size")
            }
        return {}

    monkeypatch.setattr(run, "run_cell", run_cell)
    out = tmp_path / "result.json"
    argv = "--models llama-19m --only hh --dtype bf16 --peft full --variants padded,packed --reps 2 --go_on"
    line = [*argv.split(), "--work", str(tmp_path), "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        run.main(line)
    assert [each["rep"] for each in json.loads(out.read_text())["cells"]] == [0, 0, 1]
    # The repetition that was cut short is done again, so that what is compared was run together.
    asked.clear()
    assert run.main(line) == 0
    assert [variant for variant, _ in asked] == ["packed", "padded"]
    cells = json.loads(out.read_text())["cells"]
    assert sorted((each["rep"], each["variant"]) for each in cells) == [
        (rep, variant) for rep in (0, 1) for variant in ("packed", "padded")
    ]
    asked.clear()
    assert run.main(line) == 0
    assert not asked
    code["digest"] = "b"
    with pytest.raises(KeyboardInterrupt):
        run.main(line)
    assert len(asked) == 3
