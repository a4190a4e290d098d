"""Generated rows, and tiny models for them, for comparisons with TRL that need no files beside the checkout."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from datasets import Dataset

from tests.models.tiny import save_tiny_model, train_tokenizer

_TEXT = "the a film plot was very nice dull good bad I think it or but great actor scene long short end music"
WORDS = _TEXT.split()


def sentence(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))


def pair_rows(number: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts and answers of unequal length; prompts end on a token boundary."""
    draw = random.Random(seed)
    return [
        {
            "prompt": sentence(draw, 2, 12) + " :",
            "chosen": " " + sentence(draw, 2, 14),
            "rejected": " " + sentence(draw, 1, 9),
        }
        for _ in range(number)
    ]


def unpaired_rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Labelled answers, five desirable ones for four others."""
    rows = pair_rows(number, seed)
    return [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": n % 9 not in (1, 4, 5, 8)}
        for n, row in enumerate(rows)
    ]


class World:
    """Model folder and tokenizer for generated rows."""

    def __init__(self, folder: Path) -> None:
        rows = pair_rows(60)
        self.tokenizer = train_tokenizer([text for row in rows for text in row.values()], 400)
        self.path = save_tiny_model(folder, self.tokenizer, initializer_range=0.2)


DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 5,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "max_length": 128,
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 7,
}


def train(
    trainer_class: Any, config_class: Any, out: Path, path: str, tokenizer: Any, dataset: Dataset, **options: Any
) -> Any:
    """Train with any trainer; whatever the library, the call is the same."""
    args = config_class(output_dir=str(out / trainer_class.__module__), **{**DEFAULTS, **options})
    trainer = trainer_class(model=path, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    return trainer


def log_lines(trainer: Any) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def assert_same_logs(ours: Any, theirs: Any, names: tuple[str, ...], tolerance: float) -> None:
    """The named figures of every step; those near zero are differences of numbers of the size of ``logps/*``."""
    mine, others = log_lines(ours), log_lines(theirs)
    assert len(mine) == len(others) > 0
    for a, b in zip(mine, others, strict=True):
        floor = 1e-6 * max(abs(b.get("logps/chosen", 1.0)), abs(b.get("logps/rejected", 1.0)))
        for name in names:
            # TRL leaves a figure out where no example of a kind is in the batch.
            assert (name in a) == (name in b), (b["step"], name)
            if name in a:
                close = math.isclose(a[name], b[name], rel_tol=tolerance, abs_tol=floor)
                assert close, (b["step"], name, a[name], b[name])


def assert_same_weights(ours: Any, theirs: Any, tolerance: float) -> None:
    """Trained weights, each measured against its own size."""
    mine, others = dict(ours.model.named_parameters()), dict(theirs.model.named_parameters())
    assert set(mine) == set(others)
    for name, parameter in mine.items():
        mine_now, other = parameter.detach(), others[name].detach()
        difference = float((mine_now - other).norm())
        assert difference <= tolerance * float(other.norm()), (name, difference)
