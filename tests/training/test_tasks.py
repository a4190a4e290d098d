"""Tasks and steps by themselves: a step runs without a trainer, and a trainer runs a task that it has never seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoModelForCausalLM

from preftune import CPOConfig, SFTConfig
from preftune.kernels.head import TokenScores
from preftune.models.forward import RowForward
from preftune.packing import PackedRow
from preftune.training.batch import Examples, Totals, collate
from preftune.training.processes import Processes
from preftune.training.step import Step
from preftune.training.task import RowTerms
from preftune.training.tasks import TASKS, ContrastTask, TextTask
from preftune.training.trainer import TaskTrainer
from tests.parity import worlds
from tests.training.oracle import logps_of


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("budget", [1 << 20, 40, 1], ids=["one row", "several", "one pair each"])
def test_a_step_needs_no_trainer(world: worlds.World, tmp_path: Path, budget: int) -> None:
    args = CPOConfig(str(tmp_path), **{**worlds.DEFAULTS, "loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0})
    model = AutoModelForCausalLM.from_pretrained(world.path, dtype=torch.float64)
    task = ContrastTask(args)
    prepared, report = task.prepare(Dataset.from_list(worlds.pair_rows(4)), world.tokenizer, "train")
    assert report.rows_read == len(prepared) == 4
    accelerator = Accelerator(cpu=True)
    step = Step(task, RowForward.of(model, packed=True), accelerator, args, Processes(accelerator, args, sharded=False))
    step.max_tokens_per_row = budget
    batch = collate(list(prepared))
    loss = step.take(model, batch, 1)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    # SimPO by hand (2405.14734, eq. 6), every sequence by itself.
    rewards = [
        [2.0 * logps_of(model, list(e["prompt_ids"]), list(e[f"{side}_ids"])).mean() for e in batch.examples]
        for side in ("chosen", "rejected")
    ]
    margins = torch.stack([a - b for a, b in zip(*rewards, strict=True)])
    expected = -torch.nn.functional.logsigmoid(margins - args.simpo_gamma).mean()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
    grads = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for (name, mine), theirs in zip(found.items(), grads, strict=True):
        assert mine is not None
        assert theirs is not None
        # Norms within the model are taken in fp32.
        assert float((mine - theirs).norm()) <= 1e-5 * float(theirs.norm()), name
    assert float(step.num_tokens) == task.num_tokens(batch.examples)


class SquaredTask(TextTask):
    """A loss that nobody would train on: the mean square of all log-probs."""

    name = "squared"

    def row_terms(self, row: PackedRow, scores: TokenScores, examples: Examples, totals: Totals) -> RowTerms:
        number = float(len(row.target_ids))
        largest = scores.logps.detach().abs().max()
        return RowTerms(scores.logps.square().sum(), number, {"largest": (largest * number, number)})


def test_a_trainer_runs_any_task(world: worlds.World, tmp_path: Path) -> None:
    rows = [{"text": row["prompt"] + row["chosen"]} for row in worlds.pair_rows(4)]
    args = SFTConfig(str(tmp_path), **{**worlds.DEFAULTS, "max_steps": 2})
    trainer = TaskTrainer(
        SquaredTask(args), world.path, args, train_dataset=Dataset.from_list(rows), processing_class=world.tokenizer
    )
    model = AutoModelForCausalLM.from_pretrained(world.path, dtype=torch.float64)
    examples: list[Any] = list(trainer.train_dataset)  # type: ignore[arg-type]
    with torch.no_grad():
        logps = torch.cat([logps_of(model, e["input_ids"][:1], e["input_ids"][1:]) for e in examples])
    trainer.train()
    first = worlds.log_lines(trainer)[0]
    assert first["loss"] == pytest.approx(float(logps.square().mean()), rel=1e-4)
    assert first["largest"] > 0
    assert trainer.plan().num_pairs == 4


def test_the_table_has_a_task_for_every_trainer() -> None:
    import preftune

    for name, task in TASKS.items():
        assert task.name == name
        assert task.config_class is getattr(preftune, f"{name.upper()}Config")
        assert getattr(preftune, f"{name.upper()}Trainer").task_class is task
