"""SFT and preference training of the demo, through the public trainers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from preftune.bars import hidden_bars
from preftune.demo.pairs import Pair
from preftune.training import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

# (steps done, steps in all)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class DemoSettings:
    """Sizes and rates of the demo, chosen so that it ends in a few minutes on two processor cores.

    Attributes:
        betas: Trained one after the other from the same SFT model.
        num_reviews: Size of the SFT corpus.
        hidden_size: Width of the model.
        num_layers: Its depth.
        sft_epochs: Passes over the corpus.
        sft_learning_rate: Peak rate.
        sft_batch_size: Reviews per step.
        num_prompts: Training prompts, of one pair each.
        dpo_epochs: Passes over the pairs.
        dpo_learning_rate: Peak rate; far above that of a large model, as is usual for small ones.
        dpo_batch_size: Pairs per step.
        num_eval_prompts: Fresh prompts for samples and held-out pairs.
        samples_per_prompt: Completions per fresh prompt.
    """

    betas: tuple[float, ...] = (0.05, 0.1, 0.3, 1.0)
    num_reviews: int = 8000
    hidden_size: int = 128
    num_layers: int = 2
    sft_epochs: float = 3
    sft_learning_rate: float = 3e-3
    sft_batch_size: int = 16
    num_prompts: int = 4000
    dpo_epochs: float = 2
    dpo_learning_rate: float = 1e-4
    dpo_batch_size: int = 16
    num_eval_prompts: int = 800
    samples_per_prompt: int = 2

    def quick(self) -> DemoSettings:
        """A smaller run, to see that everything works; its reward still rises."""
        return replace(
            self,
            num_reviews=4000,
            sft_epochs=2,
            num_prompts=1000,
            dpo_learning_rate=2.5e-4,
            num_eval_prompts=200,
        )


def clone(model: Any) -> Any:
    """A copy of a model's weights in a fresh module, free of what trainers attach to one."""
    twin = type(model)(copy.deepcopy(model.config))
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def train_sft(
    model: Any,
    tokenizer: Any,
    corpus: Sequence[str],
    settings: DemoSettings,
    seed: int,
    output_dir: Path,
    progress: Progress | None = None,
) -> Any:
    """Fine-tunes `model` on whole reviews.

    Args:
        model: Start; left as it is.
        tokenizer: Its tokenizer.
        corpus: Reviews.
        settings: Rates and sizes.
        seed: Of the order of the data.
        output_dir: The trainer's folder.
        progress: Told after each step.

    Returns:
        The trained model.
    """
    with quiet():
        trainer = SFTTrainer(
            model=clone(model),
            args=SFTConfig(
                num_train_epochs=settings.sft_epochs,
                per_device_train_batch_size=settings.sft_batch_size,
                learning_rate=settings.sft_learning_rate,
                **_common(seed, output_dir),
            ),
            train_dataset=Dataset.from_dict({"text": list(corpus)}),
            processing_class=tokenizer,
        )
        return _run(trainer, progress)


def train_dpo(
    reference: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    beta: float,
    settings: DemoSettings,
    seed: int,
    output_dir: Path,
    progress: Progress | None = None,
    **overrides: Any,
) -> Any:
    """Trains a copy of `reference` on preference pairs.

    Args:
        reference: Start and reference; left as it is.
        tokenizer: Its tokenizer.
        pairs: Of which the trainer sees prompt, chosen and rejected.
        beta: Strength of the pull towards the reference.
        settings: Rates and sizes.
        seed: Of the order of the data.
        output_dir: The trainer's folder.
        progress: Told after each step.
        **overrides: Further fields of `preftune.DPOConfig`, such as ``loss_type="ipo"``.

    Returns:
        The trained policy.
    """
    fields: dict[str, Any] = {
        "beta": beta,
        "num_train_epochs": settings.dpo_epochs,
        "per_device_train_batch_size": settings.dpo_batch_size,
        "learning_rate": settings.dpo_learning_rate,
        **_common(seed, output_dir),
        **overrides,
    }
    with quiet():
        trainer = DPOTrainer(
            model=clone(reference),
            ref_model=clone(reference),
            args=DPOConfig(**fields),
            train_dataset=Dataset.from_list([pair.row() for pair in pairs]),
            processing_class=tokenizer,
        )
        return _run(trainer, progress)


def _common(seed: int, output_dir: Path) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir),
        "seed": seed,
        "bf16": False,
        "use_cpu": True,
        "max_length": 256,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "logging_steps": 20,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def _run(trainer: Any, progress: Progress | None) -> Any:
    trainer.remove_callback(PrinterCallback)
    if progress is not None:
        trainer.add_callback(_Report(progress))
    trainer.train()
    return clone(trainer.model)


class _Report(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress(state.global_step, state.max_steps)


@contextmanager
def quiet() -> Iterator[None]:
    """Within it the libraries' own bars and notes are off: the demo gives its own account."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with hidden_bars():
            yield
    finally:
        transformers_logging.set_verbosity(level)
