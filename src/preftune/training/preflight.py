"""What is found out as a training begins, rather than after hours of it."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

import datasets
import torch

from preftune.errors import ConfigError
from preftune.training.checks import check_trainable, refuse_overrides
from preftune.training.config import PackedConfig
from preftune.training.run_figures import evaluate

#: Settings that are read at every step, rather than when the trainer is made.
_READ_LATE = ("ref_model_mixup_alpha", "ref_model_sync_steps")
#: What transformers adds to the figures of an evaluation.
_SPEED = ("runtime", "samples_per_second", "steps_per_second")


def method_settings(args: PackedConfig) -> dict[str, Any]:
    """The settings that make a trainer's loss, data and reference: those that not every trainer has."""
    shared = {each.name for each in fields(PackedConfig)}
    names = [each.name for each in fields(args) if each.name not in shared and each.name not in _READ_LATE]
    return {name: _kept(getattr(args, name)) for name in names}


def _kept(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def check_start(trainer: Any, trial: Any = None) -> None:
    """Refuse a training that would change nothing, that is not the one that was set up, or that ends in an error.

    Args:
        trainer: The trainer, as :meth:`train` finds it.
        trial: What a search of transformers would try.

    Raises:
        ModelError: No parameter is trained.
        ConfigError: Model or settings were changed after they were read, or the best model's metric does not exist.
    """
    if trial is not None or trainer.model_init is not None:
        raise ConfigError(
            "another model cannot be put in the place of the one that the trainer was made with",
            where="model_init" if trial is None else "trial",
            remedy="make a trainer for each model, or search with preftune sweep",
        )
    unwrap = trainer.accelerator.unwrap_model
    if unwrap(trainer.model) is not unwrap(trainer.made_with.model):
        raise ConfigError(
            "it was replaced after the trainer was made, and would not be the model that is trained",
            where="trainer.model",
            remedy="make another trainer with it",
        )
    for name, before in trainer.made_with.settings.items():
        if (now := getattr(trainer.args, name)) != before:
            raise ConfigError(
                f"was {before!r} when the trainer was made, and is not read again",
                where=f"args.{name}",
                value=now,
                remedy="make another trainer with it, or compare values with preftune sweep",
            )
    refuse_overrides(trainer)
    check_trainable(trainer.model)
    _check_best_metric(trainer)


def _check_best_metric(trainer: Any) -> None:
    """Refuse a ``metric_for_best_model`` that no evaluation has, by its name and by trying."""
    args, wanted = trainer.args, trainer.args.metric_for_best_model
    evaluated = trainer._evaluated()
    if wanted is None or str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no" or not evaluated:
        return
    if _adds_figures(trainer):
        return
    wanted = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
    several = isinstance(trainer.eval_dataset, dict)
    known: list[str] = []
    for name in evaluated:
        prefix = f"eval_{name}" if several else "eval"
        known += [f"{prefix}_{figure}" for figure in ("loss", *_SPEED)]
        if wanted in known:
            return
    for name, dataset in evaluated.items():
        if (found := _figures(trainer, dataset)) is None:
            # A stream, or figures of the user's own that some rows do not show.
            return
        known += [f"eval_{name}_{figure}" if several else f"eval_{figure}" for figure in found]
        # What compute_metrics returns may bear the prefix already.
        known += [] if several else [figure for figure in found if figure.startswith("eval_")]
    if wanted in known:
        return
    near = difflib.get_close_matches(wanted, known, 1, 0.5)
    raise ConfigError(
        "no evaluation has this figure" + (", but each of several a set's own" if several else ""),
        where="metric_for_best_model",
        value=args.metric_for_best_model,
        allowed=", ".join(sorted(set(known) - {name for name in known if name.endswith(_SPEED)})),
        remedy=f"did you mean {near[0]}?" if near else None,
    )


def _adds_figures(trainer: Any) -> bool:
    """Whether a script's own code may add to the figures of an evaluation."""
    kind, libraries = type(trainer), ("preftune", "transformers", "trl")
    methods = [getattr(kind, name) for name in ("evaluate", "evaluation_loop", "log")]
    methods += [type(each).on_evaluate for each in trainer.callback_handler.callbacks]
    return any(method.__module__.partition(".")[0] not in libraries for method in methods)


def _figures(trainer: Any, dataset: Any) -> set[str] | None:
    """Names of what an evaluation finds, from its first batch; ``None`` where that does not tell."""
    if not isinstance(dataset, datasets.Dataset):
        return None
    step, state = trainer.step, torch.get_rng_state()
    few = dataset.select(range(min(len(dataset), trainer.args.eval_batch_size * trainer.args.world_size)))
    judge, training = trainer.compute_metrics, trainer.model.training
    trainer.model.eval()
    try:
        batches = trainer.get_eval_dataloader(few)
        found, predictions = evaluate(step, trainer.model, batches, lambda: None, predict=judge is not None)
        names = set(found)
        if judge is not None:
            from transformers import EvalPrediction

            try:
                names |= set(judge(EvalPrediction(*trainer.task.judged(predictions))))
            except Exception:
                # The user's function need not take a few rows.
                return None
    finally:
        trainer.model.train(training)
        step.watch.begin_heldout("")
        torch.set_rng_state(state)
    # A first batch of unpaired answers may be of one kind alone.
    for one, other in (("chosen", "rejected"), ("rejected", "chosen")):
        names |= {name.replace(one, other) for name in names}
    return names | ({"rewards/margins"} if any(name.startswith("rewards/") for name in names) else set())
