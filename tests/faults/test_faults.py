"""Runs that are killed, starved and damaged end as if nothing had happened, to the bit, or with one clear error."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.campaign import Campaign, Trial, may_mount
from tests.faults.conftest import FULL, scaled
from tests.faults.workers import ENDS
from tests.faults.worlds import SCENARIOS

#: The quick part takes one run of each kind of state; all scenarios belong to the full suite.
NAMES = list(SCENARIOS) if FULL else ["dpo", "lora"]
needs_mount = pytest.mark.skipif(not may_mount(), reason="mounting a small file system takes root")


def assert_survived(trial: Trial) -> None:
    assert trial.survived, f"{trial.kind} ({trial.scenario}, {trial.where}): {trial.note}"
    assert trial.bytes_lost == 0


@pytest.mark.parametrize("scenario", NAMES)
def test_killed_at_random_instants(campaign: Campaign, scenario: str) -> None:
    for _ in range(scaled(1, 3)):
        assert_survived(campaign.kill_at_random_instants(scenario, kills=scaled(2, 3)))


@pytest.mark.parametrize("scenario", NAMES)
def test_killed_between_two_file_operations(campaign: Campaign, scenario: str) -> None:
    struck = 0
    for _ in range(scaled(1, 3)):
        trial = campaign.kill_at_operations(scenario, kills=scaled(2, 3))
        assert_survived(trial)
        struck += trial.faults
    assert struck >= 1


@pytest.mark.parametrize("scenario", NAMES if FULL else ["lora"])
def test_killed_inside_a_write(campaign: Campaign, scenario: str) -> None:
    for _ in range(scaled(1, 2)):
        trial = campaign.kill_inside_a_write(scenario)
        assert_survived(trial)
        assert trial.faults


def test_interrupted_inside_a_save(campaign: Campaign) -> None:
    for _ in range(scaled(1, 5)):
        assert_survived(campaign.interrupt("dpo"))


@pytest.mark.parametrize("scenario", ["lora", "tr-dpo"] if FULL else ["lora"])
def test_damaged_checkpoints_are_passed_over(campaign: Campaign, scenario: str) -> None:
    for trial in campaign.damaged(scenario, None if FULL else 3):
        assert_survived(trial)


@pytest.mark.parametrize("lasting", [False, True])
def test_a_full_disk_costs_nothing_that_was_saved(campaign: Campaign, lasting: bool) -> None:
    for _ in range(scaled(1, 12)):
        assert_survived(campaign.full_disk("dpo", lasting=lasting))


def test_a_write_that_fails_half_way(campaign: Campaign) -> None:
    for _ in range(scaled(1, 6)):
        assert_survived(campaign.full_inside_a_write("lora"))


@needs_mount
def test_a_real_disk_that_fills_up(campaign: Campaign) -> None:
    for kilobytes in (100, 200, 300, 400, 600, 800) if FULL else (300,):
        assert_survived(campaign.small_disk("dpo", kilobytes))


@needs_mount
def test_a_folder_that_turns_read_only(campaign: Campaign) -> None:
    trial = campaign.read_only("dpo")
    assert_survived(trial)
    assert "cannot write" in trial.note


def test_a_clock_that_jumps(campaign: Campaign) -> None:
    assert_survived(campaign.jumping_clock("dpo"))


@pytest.mark.parametrize("scenario", ["dpo", "aot", "kto"] if FULL else ["aot"])
def test_memory_that_runs_out_in_a_row(campaign: Campaign, scenario: str) -> None:
    for lack in ("accelerator", "processor", "python") if FULL else ("processor",):
        trial = campaign.memory_runs_out(scenario, lack)
        assert_survived(trial)
        assert trial.faults


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_values_that_are_not_finite(campaign: Campaign, where: str) -> None:
    for _ in range(scaled(1, 4)):
        assert_survived(campaign.values_not_finite("dpo", where))


@pytest.mark.parametrize("writers", [1, 2])
def test_a_store_killed_while_it_is_written(campaign: Campaign, writers: int) -> None:
    for _ in range(scaled(1, 8)):
        assert_survived(campaign.store_killed(writers))


@pytest.mark.parametrize("how", ["truncated", "zeroed", "deleted"] if FULL else ["zeroed"])
def test_a_damaged_store_is_computed_anew(campaign: Campaign, how: str) -> None:
    assert_survived(campaign.store_damaged("dpo", how))


@pytest.mark.parametrize("how", ENDS)
def test_a_data_loader_worker_that_hangs_or_dies(campaign: Campaign, how: str) -> None:
    for scenario in ("dpo", "lora", "kto") if FULL else ("dpo",):
        assert_survived(campaign.worker_fails(scenario, how))


@pytest.mark.parametrize("how", ENDS)
def test_a_process_that_prepares_rows_and_hangs_or_dies(campaign: Campaign, how: str) -> None:
    assert_survived(campaign.preparation_fails("dpo", how))


def test_data_loader_workers_change_nothing(campaign: Campaign) -> None:
    for scenario in NAMES:
        out = campaign.place("workers")
        answer = campaign.server.run("train", out, scenario=scenario, changes={"dataloader_num_workers": 2})
        assert answer["ended"] == "ok", answer
        assert campaign.bytes_lost(scenario, out, answer) == 0


def test_workers_that_outlive_an_epoch_resume_to_the_bit(campaign: Campaign) -> None:
    changes = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    whole = campaign.server.run("train", campaign.place("stay"), scenario="dpo", changes=changes)
    for share in (0.35, 0.8):
        out = campaign.place("stay")
        struck = campaign.server.run(
            "train", out, scenario="dpo", changes=changes, at=round(whole["operations"] * share)
        )
        assert struck["ended"] == "killed"
        answer = campaign.server.run("train", out, scenario="dpo", changes=changes)
        assert answer["resumed"]
        assert answer["outcome"] == whole["outcome"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_one_of_two_training_processes_hangs_or_dies(campaign: Campaign, how: str) -> None:
    assert_survived(campaign.process_fails(how))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "killed"] if FULL else ["stopped"])
def test_a_sweep_worker_that_hangs_or_dies(campaign: Campaign, how: str) -> None:
    assert_survived(campaign.sweep_worker_fails(how))


def test_the_comparison_notices_a_difference(campaign: Campaign) -> None:
    """The suite is worth something only if another learning rate does not pass."""
    out = campaign.place("other")
    answer: dict[str, Any] = campaign.server.run("train", out, scenario="dpo", changes={"learning_rate": 0.011})
    assert answer["ended"] == "ok"
    assert campaign.bytes_lost("dpo", out, answer) > 0
