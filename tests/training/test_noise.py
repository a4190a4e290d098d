"""NEFTune on packed rows: each token's noise has the size that its own sequence asks for."""

from __future__ import annotations

import importlib
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

import preftune
from preftune.models.forward import RowForward
from preftune.packing import build_row, pair_trees
from preftune.training.noise import EmbeddingNoise
from tests.models.tiny import tiny_model
from tests.parity import worlds

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


def ids(length: int) -> Any:
    return np.full(length, 5, dtype=np.int64)


@pytest.mark.thin(1)
@pytest.mark.parametrize("packed", [True, False])
def test_noise_is_uniform_within_the_papers_bound(packed: bool) -> None:
    alpha, size, times = 7.0, 32, 400
    model = tiny_model("LlamaConfig").train()
    forward = RowForward.of(model, packed=packed)
    # Two pairs: sequences of 3 + 4 and 3 + 9 tokens, and of 10 + 1 and 10 + 2.
    trees = [*pair_trees(ids(3), ids(4), ids(9), None, (0, 1)), *pair_trees(ids(10), ids(1), ids(2), None, (2, 3))]
    row = build_row(trees)
    if packed:  # A shared prompt has the noise of its longest sequence.
        expected = [12] * 3 + [7] * 4 + [12] * 9 + [12] * 10 + [11] * 1 + [12] * 2
    else:
        expected = [7] * 7 + [12] * 12 + [11] * 11 + [12] * 12
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: torch.Tensor) -> None:
        clean = torch.nn.functional.embedding(args[0], module.weight)
        noise = (output - clean).detach()
        seen.append(noise[0] if packed else torch.cat([noise[k, :length] for k, length in enumerate((7, 12, 11, 12))]))

    noise = EmbeddingNoise(model, alpha)
    with torch.no_grad():
        for _ in range(times):
            with noise.on(row, packed=packed), forward.active():
                handle = model.get_input_embeddings().register_forward_hook(keep)
                forward(row)
                handle.remove()
    draws = torch.stack(seen)  # (times, tokens, size)
    bound = alpha / torch.sqrt(torch.tensor(expected, dtype=torch.float32) * size)
    largest = draws.abs().amax((0, 2)) / bound
    assert (largest <= 1 + 1e-4).all()
    assert (largest > 0.999).all()
    variance = draws.pow(2).mean((0, 2)) / bound.pow(2)
    # A uniform variable on [-1, 1] has variance 1/3; its estimate from n draws a standard deviation of .298 / sqrt(n).
    assert ((variance - 1 / 3).abs() < 5 * 0.298 / math.sqrt(times * size)).all()
    assert (draws.mean((0, 2)).abs() < 5 * bound / math.sqrt(3 * times * size)).all()


@pytest.mark.slow
def test_one_sequence_a_step_is_trls_run(world: Any, tmp_path: Path) -> None:
    trl = importlib.import_module("trl")
    rows = Dataset.from_list([{"text": row["prompt"] + row["chosen"]} for row in worlds.pair_rows(6)])
    logs = []
    for library in (trl, preftune):
        options = {**worlds.DEFAULTS, "per_device_train_batch_size": 1, "neftune_noise_alpha": 8.0, "max_steps": 5}
        args = library.SFTConfig(output_dir=str(tmp_path / library.__name__), **options)
        trainer = library.SFTTrainer(model=world.path, args=args, train_dataset=rows, processing_class=world.tokenizer)
        trainer.train()
        logs.append([(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line])
    assert np.array(logs[1]) == pytest.approx(np.array(logs[0]), rel=1e-4)
    # The embeddings are of the size of the noise: a run without it is another one.
    args = preftune.SFTConfig(
        output_dir=str(tmp_path / "plain"), **{**worlds.DEFAULTS, "per_device_train_batch_size": 1, "max_steps": 5}
    )
    plain = preftune.SFTTrainer(model=world.path, args=args, train_dataset=rows, processing_class=world.tokenizer)
    plain.train()
    assert abs(plain.state.log_history[0]["loss"] / logs[0][0][0] - 1) > 1e-3


@pytest.mark.parametrize("store", [True, False])
def test_reference_and_evaluation_are_without_noise(world: Any, tmp_path: Path, store: bool) -> None:
    def run(name: str, **options: Any) -> Any:
        rows = Dataset.from_list(worlds.pair_rows(8))
        settings = {**worlds.DEFAULTS, "learning_rate": 0.0, "max_steps": 2, "reference_store": store, **options}
        return preftune.DPOTrainer(
            model=world.path,
            args=preftune.DPOConfig(output_dir=str(tmp_path / name), **settings),
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=world.tokenizer,
        )

    noisy = run("noisy", neftune_noise_alpha=8.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        noisy.train()
    assert not [w for w in caught if "disable_dropout" in str(w.message)]
    first = noisy.state.log_history[0]
    assert abs(first["rewards/chosen"]) > 1e-4  # the policy is noisy, the reference is not
    held_out = noisy.evaluate()
    assert held_out["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
