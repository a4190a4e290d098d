"""What takes a command line or two processes: an SFT adapter that goes on with DPO, BCO's shift, evaluations."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from preftune.cli.main import main
from preftune.packing import build_row, pair_trees
from preftune.training.extra_state import RunningDelta
from tests.parity import worlds
from tests.training import uneven

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


def flags(**settings: Any) -> list[str]:
    common = {
        "bf16": "false", "report_to": "none", "save_strategy": "no", "logging_steps": "1", "use_cpu": "true",
        "per_device_train_batch_size": "4", "max_steps": "2",
    }  # fmt: skip
    return [part for name, value in {**common, **settings}.items() for part in (f"--{name}", str(value))]


def history(folder: Path) -> list[dict[str, float]]:
    lines = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [line for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def sft(world: worlds.World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and in ``sft`` the adapter that ``preftune sft`` left."""
    folder = tmp_path_factory.mktemp("sft")
    rows = worlds.pair_rows(16)
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    answers = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    (folder / "sft.jsonl").write_text("\n".join(map(json.dumps, answers)), encoding="utf-8")
    given = flags(
        model_name_or_path=world.path, dataset_name=folder / "sft.jsonl", output_dir=folder / "sft",
        learning_rate=0.1, lora_r=4, lora_target_modules="all-linear", max_steps=4,
    )  # fmt: skip
    assert main(["sft", "--use_peft", *given]) == 0
    return folder


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "live"])
def test_sft_then_dpo_on_the_same_adapter_starts_at_ln_2(sft: Path, tmp_path: Path, stored: bool) -> None:
    given = flags(
        model_name_or_path=sft / "sft", dataset_name=sft / "pairs.jsonl", output_dir=tmp_path,
        learning_rate=0.01, reference_store=str(stored).lower(),
    )  # fmt: skip
    assert main(["dpo", *given]) == 0
    lines = history(tmp_path)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(lines[0]["rewards/margins"]) < 1e-4
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (sft / "sft", tmp_path))
    assert set(before) == set(after)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "model.safetensors").exists()


def test_another_reference_is_named_on_the_command_line(
    sft: Path, world: worlds.World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the base model, which switching the adapter off would give, the same run starts elsewhere."""
    common = {"model_name_or_path": sft / "sft", "dataset_name": sft / "pairs.jsonl"}
    base = flags(**common, output_dir=tmp_path / "base", ref_model_name_or_path=world.path)
    assert main(["dpo", *base]) == 0
    assert abs(history(tmp_path / "base")[0]["loss"] - math.log(2)) > 1e-3
    # The adapter's folder as the reference of a run on that adapter is the initial policy again.
    same = {"ref_model_name_or_path": sft / "sft", "precompute_ref_log_probs": "true"}
    assert main(["dpo", *flags(**common, **same, output_dir=tmp_path / "same")]) == 0
    assert history(tmp_path / "same")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    capsys.readouterr()
    sync = {"ref_model_name_or_path": world.path, "sync_ref_model": "true"}
    assert main(["dpo", *flags(**common, **sync, output_dir=tmp_path / "sync")]) == 2
    assert "sync_ref_model: the given reference cannot follow the policy" in capsys.readouterr().err


def test_a_bare_module_name_means_every_module_of_that_name(sft: Path, world: worlds.World, tmp_path: Path) -> None:
    given = flags(
        model_name_or_path=world.path, dataset_name=sft / "pairs.jsonl", output_dir=tmp_path,
        lora_target_modules="q_proj", max_steps=1,
    )  # fmt: skip
    assert main(["dpo", "--use_peft", *given]) == 0
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert len(names) == 2 * 2
    assert all(".q_proj.lora_" in name for name in names)


# ---- BCO's shift over processes --------------------------------------------------------------------------------------


def test_the_shift_sums_over_processes_and_counts_repeated_rows_once() -> None:
    ids = torch.arange(12).numpy()
    rows = [build_row(pair_trees(ids[:3], ids[3:7], ids[7:], None, (0, 1))) for _ in range(2)]
    delta = RunningDelta()
    delta.begin()
    for row, rewards in ((rows[0], [1.0, -2.0]), (rows[1], [0.5, 4.5]), (rows[1], [0.5, 4.5])):
        delta.note(row, torch.tensor([rewards]))
    # The other process had rewards of 10 in total on two completions.
    delta.finish(lambda mine: mine + torch.tensor([10.0, 2.0], dtype=torch.float64))
    assert delta.state.count == 6
    assert delta.state.delta == pytest.approx(14.0 / 6)
    delta.begin()
    delta.note(rows[0], torch.tensor([[4.0, 0.0]]))
    delta.finish(lambda mine: mine)
    assert delta.state.delta == pytest.approx(18.0 / 8)


@pytest.mark.slow
def test_the_shift_does_not_depend_on_the_number_of_processes(sft: Path, world: worlds.World, tmp_path: Path) -> None:
    common = {
        "model_name_or_path": world.path, "dataset_name": sft / "pairs.jsonl", "loss_type": "bco_pair",
        "bco_running_delta": "true", "beta": 0.3, "learning_rate": 1e-3, "max_steps": 3, "max_tokens_per_row": 30,
    }  # fmt: skip
    launcher = [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "preftune", "dpo",
    ]  # fmt: skip
    deltas, weights = [], []
    for command, size in ((["preftune", "dpo"], 4), (launcher, 2)):
        out = tmp_path / str(size)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PREFTUNE_CACHE": str(tmp_path / f"cache-{size}")}
        done = subprocess.run(
            [sys.executable, "-m", *command, *flags(**common, output_dir=out, per_device_train_batch_size=size)],
            env=environment, capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        deltas.append([line["bco_delta"] for line in history(out)])
        weights.append(load_file(out / "model.safetensors"))
    assert abs(deltas[0][2]) > 1e-4
    assert deltas[0] == pytest.approx(deltas[1], rel=1e-4, abs=1e-6)
    for name, one in weights[0].items():
        assert float((weights[1][name] - one).norm()) <= 1e-5 * float(one.norm()), name


# ---- evaluation data that do not divide by the processes -------------------------------------------------------------


@pytest.mark.slow
def test_an_evaluation_measures_the_same_where_shares_are_uneven_or_empty(world: worlds.World, tmp_path: Path) -> None:
    world.tokenizer.save_pretrained(world.path)
    launcher = [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "tests.training.uneven",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", *launcher, world.path, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PREFTUNE_CACHE": str(tmp_path / "cache")},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for kind in ("SFT", "DPO", "KTO", "ORPO"):
        alone = uneven.measured(kind, world.path, tmp_path)
        for rank in (0, 1):
            together = json.loads((tmp_path / f"{kind}-{rank}.json").read_text(encoding="utf-8"))
            for mine, other in zip(together, alone, strict=True):
                assert mine == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in other.items()}, kind
