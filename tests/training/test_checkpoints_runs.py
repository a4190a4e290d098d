"""Runs that stop and go on: what is written, what is refused, and that nothing changes."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from preftune.errors import ConfigError
from preftune.runs.stopping import StopOnSignal
from preftune.training.checkpoints import list_checkpoints, verify
from tests.faults.worlds import build, digest, make_trainer, outcome

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:policy and reference differ:UserWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    build(folder)
    return folder


class At(TrainerCallback):
    """Do something at the end of a step."""

    def __init__(self, step: int, action: Callable[[Any], None]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action(control)


def stop_and_save(control: Any) -> None:
    control.should_save = control.should_training_stop = True


def trained(world: Path, out: Path, scenario: str = "dpo", *callbacks: Any, resume: Any = None, **changes: Any) -> Any:
    trainer = make_trainer(world, out, scenario, **changes)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def names(out: Path) -> list[str]:
    return [path.name for _, path in list_checkpoints(out)]


@pytest.mark.thin(1)
@pytest.mark.parametrize(("scenario", "step"), [("dpo", 7), ("lora", 5), ("tr-dpo", 4)])
def test_going_on_gives_the_same_bits(world: Path, tmp_path: Path, scenario: str, step: int) -> None:
    """Saved at a step that is neither logged nor a reference synchronisation, in the middle of an epoch."""
    whole = trained(world, tmp_path / "a", scenario)
    trained(world, tmp_path / "b", scenario, At(step, stop_and_save))
    rest = trained(world, tmp_path / "b", scenario, resume=True)
    expected = outcome(tmp_path / "a", whole.state.log_history)
    assert outcome(tmp_path / "b", rest.state.log_history) == expected
    for (name, mine), (_, other) in zip(whole.model.named_parameters(), rest.model.named_parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_a_checkpoint_holds_no_pickle_and_no_token(world: Path, tmp_path: Path) -> None:
    token = "hf_" + "a1" * 17
    trainer = trained(world, tmp_path / "out", save_total_limit=1, hub_token=token)
    trainer.save_model(str(tmp_path / "out"))
    trainer.save_state()
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}
    assert not [path for path in files if token.encode() in path.read_bytes()]
    manifest = verify(tmp_path / "out" / names(tmp_path / "out")[-1])
    assert manifest.identity["config_sha256"]
    assert manifest.identity["data_sha256"]
    assert names(tmp_path / "out") == ["checkpoint-12"]


def test_a_finished_run_trains_no_further_step(world: Path, tmp_path: Path) -> None:
    """With max_steps in the middle of an epoch, transformers' loop would add one."""
    first = trained(world, tmp_path / "out", max_steps=7)
    again = trained(world, tmp_path / "out", max_steps=7, resume=True)
    assert again.state.global_step == 7
    assert math.isclose(again.state.log_history[-1]["train_loss"], first.state.log_history[-1]["train_loss"])


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"beta": 0.3}, "beta 0.1 -> 0.3"),
        ({"loss_type": ["ipo"]}, "loss_type"),
        ({"learning_rate": 1e-3}, "learning_rate 0.01 -> 0.001"),
        ({"max_length": 12}, "training data"),
        ({"per_device_train_batch_size": 4}, "pairs_per_step 4 -> 8"),
    ],
)
def test_another_run_is_refused(world: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    trained(world, tmp_path / "out", max_steps=2)
    trainer = make_trainer(world, tmp_path / "out", "dpo", max_steps=2, **changes)
    with pytest.raises(ConfigError, match=says):
        trainer.train(resume_from_checkpoint=True)


def test_another_reference_is_refused(world: Path, tmp_path: Path) -> None:
    trained(world, tmp_path / "out", max_steps=2)
    trainer = make_trainer(world, tmp_path / "out", "dpo", max_steps=2)
    with torch.no_grad():
        next(trainer.model.parameters()).add_(0.01)
    with pytest.raises(ConfigError, match="reference"):
        trainer.train(resume_from_checkpoint=True)


def test_a_longer_run_goes_on_and_says_so(world: Path, tmp_path: Path) -> None:
    trained(world, tmp_path / "out", max_steps=2)
    with pytest.warns(UserWarning, match="max_steps 2 -> 4"):
        trainer = trained(world, tmp_path / "out", max_steps=4, resume=True)
    assert trainer.state.global_step == 4


def test_folders_that_are_no_checkpoint_are_refused(world: Path, tmp_path: Path) -> None:
    trainer = make_trainer(world, tmp_path / "out", "dpo", save_only_model=True, max_steps=2)
    with pytest.raises(ConfigError, match="no checkpoint to go on from"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="not written by preftune"):
        trainer.train(resume_from_checkpoint=str(world / "model"))
    trainer.train()
    assert not (tmp_path / "out" / "checkpoint-2" / "optimizer.json").exists()
    with pytest.raises(ConfigError, match="save_only_model"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    with pytest.raises(ConfigError, match="no checkpoint"), pytest.warns(UserWarning, match="weights alone"):
        trainer.train(resume_from_checkpoint=True)


def test_a_damaged_newest_checkpoint_is_passed_over(world: Path, tmp_path: Path) -> None:
    trained(world, tmp_path / "out", max_steps=4)
    (tmp_path / "out" / "checkpoint-4" / "optimizer.safetensors").write_bytes(b"")
    trainer = make_trainer(world, tmp_path / "out", "dpo", max_steps=4)
    with pytest.warns(UserWarning, match=r"checkpoint-4 is not used: optimizer\.safetensors has 0 bytes"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    verify(tmp_path / "out" / "checkpoint-4")


def test_a_trigger_file_saves_once(world: Path, tmp_path: Path) -> None:
    trigger = tmp_path / "out" / "SAVE"
    trained(world, tmp_path / "out", "dpo", At(3, lambda _: trigger.touch()), max_steps=5, save_strategy="no")
    # The watch looks before the callback that makes the file.
    assert names(tmp_path / "out") == ["checkpoint-4"]
    assert not trigger.exists()


def test_what_callbacks_remember_comes_back(world: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.0, "max_steps": 8}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}

    def patience() -> EarlyStoppingCallback:
        return EarlyStoppingCallback(early_stopping_patience=3)

    whole = trained(world, tmp_path / "a", "dpo", patience(), **options)
    trained(world, tmp_path / "b", "dpo", patience(), At(5, stop_and_save), **options)
    rest = trained(world, tmp_path / "b", "dpo", patience(), resume=True, **options)
    assert whole.state.global_step == rest.state.global_step


def test_the_best_checkpoint_survives_rotation_and_is_loaded(world: Path, tmp_path: Path) -> None:
    trainer = trained(world, tmp_path / "out", "best", learning_rate=0.3)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == f"checkpoint-{trainer.state.best_global_step}"
    assert names(tmp_path / "out") == [best.name]
    trainer.save_model(str(tmp_path / "out"))
    assert digest(tmp_path / "out" / "model.safetensors") == digest(best / "model.safetensors")


def test_a_damaged_best_checkpoint_does_not_lose_the_last_weights(world: Path, tmp_path: Path) -> None:
    def damage(control: Any) -> None:
        newest = list_checkpoints(tmp_path / "out")[0][1]
        (newest / "model.safetensors").write_bytes(b"x")

    options = {"save_total_limit": None, "learning_rate": 0.0, "max_steps": 4}
    with pytest.warns(UserWarning, match="the last weights are kept"):
        trained(world, tmp_path / "out", "best", At(3, damage), **options)
    assert "checkpoint-4" in names(tmp_path / "out")


def test_pushing_sends_the_finished_checkpoint(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []

    class Done:
        def done(self) -> bool:
            return True

    class Api:
        def upload_folder(self, **keywords: Any) -> Done:
            files = [
                p.relative_to(keywords["folder_path"]).as_posix() for p in Path(keywords["folder_path"]).rglob("*")
            ]
            sent.append({**keywords, "files": files})
            return Done()

    monkeypatch.setattr("transformers.utils.hub.hf_api", Api)
    trainer = make_trainer(world, tmp_path / "out", "dpo", max_steps=2, hub_strategy="checkpoint", hub_token="secret")
    trainer.hub_model_id, trainer.push_in_progress = "me/model", None
    trainer._finish_current_push = lambda: None
    trainer.args.push_to_hub = True
    trainer.train()
    assert [each.get("path_in_repo") for each in sent] == [None, "last-checkpoint"]
    assert "manifest.json" in sent[1]["files"]
    assert "model.safetensors" in sent[0]["files"]
    assert not {"training_args.bin", "optimizer.safetensors", "rank_state_0.json"} & set(sent[0]["files"])
    assert all(each["token"] == "secret" for each in sent)
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


def test_torn_metrics_of_a_killed_run_are_replaced(world: Path, tmp_path: Path) -> None:
    trainer = make_trainer(world, tmp_path / "out", "dpo", max_steps=1)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "all_results.json").write_text('{"train_loss": 0.')
    trainer.save_metrics("train", {"train_loss": 0.5})
    trainer.save_metrics("eval", {"eval_loss": 0.25})
    assert json.loads((tmp_path / "out" / "all_results.json").read_text()) == {"train_loss": 0.5, "eval_loss": 0.25}
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text()) == {"eval_loss": 0.25}


def test_ctrl_c_in_the_middle_of_an_epoch_saves_and_does_nothing_else(world: Path, tmp_path: Path) -> None:
    """Neither the epoch's log line nor its evaluation is due, and the epoch goes on afterwards."""
    options = {"logging_strategy": "epoch", "save_strategy": "epoch"}
    whole = trained(world, tmp_path / "a", "lora", **options)
    stop = StopOnSignal(lambda text: None)
    interrupt = At(4, lambda control: os.kill(os.getpid(), signal.SIGINT))
    half = trained(world, tmp_path / "b", "lora", interrupt, stop, **options)
    assert stop.stopped_at == 4
    assert names(tmp_path / "b") == ["checkpoint-4"]
    assert [line for line in half.state.log_history if "loss" in line or "eval_loss" in line] == []
    rest = trained(world, tmp_path / "b", "lora", resume=True, **options)
    expected = outcome(tmp_path / "a", whole.state.log_history)
    assert outcome(tmp_path / "b", rest.state.log_history) == expected
