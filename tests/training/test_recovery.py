"""Steps that run out of memory are run again in shorter rows; steps that are not finite are skipped."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune.errors import SetupError, TrainingError
from preftune.references.memory import ran_out_of_memory
from tests.faults.steps import LACKS, LARGE_STEPS, fail_in_backward, poison, weights
from tests.faults.worlds import build, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:policy and reference differ:UserWarning")
FAILURES = list(LACKS.values())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    build(folder)
    return folder


def lines(trainer: Any) -> list[dict[str, float]]:
    return [
        {k: v for k, v in line.items() if "runtime" not in k} for line in trainer.state.log_history if "loss" in line
    ]


@pytest.mark.thin(1)
@pytest.mark.parametrize("error", FAILURES, ids=["accelerator", "processor", "python"])
@pytest.mark.parametrize("scenario", ["dpo", "aot", "kto"])
def test_a_step_out_of_memory_ends_with_the_same_gradient(
    world: Path, tmp_path: Path, scenario: str, error: BaseException
) -> None:
    changes = LARGE_STEPS | ({"eval_strategy": "no"} if scenario == "aot" else {})
    undisturbed = make_trainer(world, tmp_path / "a", scenario, **changes)
    undisturbed.train()
    trainer = make_trainer(world, tmp_path / "b", scenario, **changes)
    met = fail_in_backward(trainer, error, longer_than=100)
    with pytest.warns(UserWarning, match="rows from now on hold up to"):
        trainer.train()
    assert met
    assert trainer.max_tokens_per_row <= 100
    for mine, theirs in zip(weights(trainer), weights(undisturbed), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    for line, other in zip(lines(trainer), lines(undisturbed), strict=True):
        assert line["num_tokens"] == other["num_tokens"]
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["rewards/margins" if scenario != "kto" else "loss"] == pytest.approx(
            other["rewards/margins" if scenario != "kto" else "loss"], rel=1e-3, abs=1e-6
        )


def test_a_row_of_one_pair_cannot_be_made_shorter(world: Path, tmp_path: Path) -> None:
    trainer = make_trainer(world, tmp_path, "dpo", **LARGE_STEPS)
    fail_in_backward(trainer, FAILURES[0], longer_than=0)
    with pytest.raises(SetupError, match="every row holds one example; lower max_length") as caught, pytest.warns():
        trainer.train()
    assert "out of memory" in str(caught.value)


def test_rows_that_a_balancing_loss_depends_on_are_not_split(world: Path, tmp_path: Path) -> None:
    trainer = make_trainer(world, tmp_path, "dpo", **LARGE_STEPS)
    trainer.prepare_reference()
    fail_in_backward(trainer, FAILURES[0], longer_than=0)

    class Balanced:
        coef, keywords = 0.0, None

        def term(self, output: Any) -> torch.Tensor:
            return torch.zeros(())

    trainer.step.router = Balanced()
    with pytest.raises(SetupError, match="load-balancing"):
        trainer.train()


def test_other_errors_are_no_lack_of_memory() -> None:
    assert all(ran_out_of_memory(error) for error in FAILURES)
    assert not ran_out_of_memory(RuntimeError("shape mismatch"))
    assert not ran_out_of_memory(ValueError("x"))


# ---- values that are not finite ------------------------------------------------------------------------------------


@pytest.mark.thin(3)
@pytest.mark.filterwarnings("ignore:.*step is skipped:UserWarning")
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(
    world: Path, tmp_path: Path, where: str, optim: str
) -> None:
    changes = LARGE_STEPS | {"optim": optim, "weight_decay": 0.1, "max_grad_norm": 1.0 if where == "loss" else 0.0}
    trainer = make_trainer(world, tmp_path, "dpo", **changes | {"max_steps": 3, "max_skipped_steps": 9})
    poison(trainer, set(range(21)), where)
    before = weights(trainer)
    with pytest.warns(UserWarning, match=f"step 1: the {where} is not finite; the step is skipped"):
        trainer.train()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(weights(trainer), before, strict=True))
    assert trainer.state.global_step == 3
    assert not trainer.optimizer.state_dict()["state"]
    assert trainer.lr_scheduler.last_epoch == 0
    assert trainer.num_skipped_in_a_row == 3
    # Metrics of skipped steps do not enter the log.
    assert all("rewards/margins" not in line for line in lines(trainer))


def test_the_rows_are_named_and_the_others_go_on(world: Path, tmp_path: Path) -> None:
    trainer = make_trainer(world, tmp_path, "dpo", **LARGE_STEPS | {"max_steps": 3, "optim": "adamw_torch"})
    bad = random.Random(3).sample(range(21), 2)
    poison(trainer, set(bad), "gradient")
    before = weights(trainer)
    with pytest.warns(UserWarning, match="is not finite") as caught:
        trainer.train()
    said = " ".join(str(w.message) for w in caught if "not finite" in str(w.message))
    for number in bad:
        example = trainer.train_dataset[number]
        start = (example["prompt_ids"] + example["chosen_ids"])[:8]
        assert f"{number} ({trainer.processing_class.decode(start)!r})" in said
    assert said.count("('") == 2
    assert any(not torch.equal(mine, theirs) for mine, theirs in zip(weights(trainer), before, strict=True))
    assert all(bool(torch.isfinite(weight).all()) for weight in weights(trainer))


@pytest.mark.filterwarnings("ignore:.*step is skipped:UserWarning")
@pytest.mark.parametrize("most", [0, 2])
def test_too_many_in_a_row_stop_the_run(world: Path, tmp_path: Path, most: int) -> None:
    trainer = make_trainer(world, tmp_path, "dpo", **LARGE_STEPS | {"max_steps": 5, "max_skipped_steps": most})
    poison(trainer, set(range(21)), "loss")
    with pytest.raises(TrainingError, match=f"in {most + 1} steps in a row; rows of the prepared training data"):
        trainer.train()
    assert trainer.state.global_step == most


@pytest.mark.filterwarnings("ignore:.*step is skipped:UserWarning")
def test_broken_weights_are_said_to_be_broken(world: Path, tmp_path: Path) -> None:
    trainer = make_trainer(world, tmp_path, "dpo", **LARGE_STEPS | {"max_skipped_steps": 0})
    trainer.prepare_reference()
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="the weights themselves are not finite"):
        trainer.train()


@pytest.mark.filterwarnings("ignore:.*step is skipped:UserWarning")
def test_bco_forgets_the_rewards_of_a_skipped_step(world: Path, tmp_path: Path) -> None:
    trainer = make_trainer(world, tmp_path, "bco", **LARGE_STEPS | {"max_skipped_steps": 5})
    poison(trainer, set(range(21)), "gradient")
    trainer.train()
    assert trainer.running_delta.state.count == 0
