"""The trainers by their names in TRL, with its constructors: only the import changes in a script."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from preftune.errors import ConfigError
from preftune.training.config import PackedConfig
from preftune.training.dpo_config import DPOConfig
from preftune.training.kto_config import KTOConfig
from preftune.training.preference_config import ReferenceConfig
from preftune.training.reference_free_config import CPOConfig, ORPOConfig, ReferenceFreeConfig
from preftune.training.setup import default_output_dir
from preftune.training.sft_config import SFTConfig
from preftune.training.task import Task
from preftune.training.tasks import TASKS, TextTask
from preftune.training.trainer import TaskTrainer

_Callbacks = list[TrainerCallback] | None
_Metrics = Callable[[Any], dict[str, float]] | None


class _NamedTrainer(TaskTrainer):
    """A trainer of a task of the table, found by its name."""

    config_class: ClassVar[type[PackedConfig]]

    @classmethod
    def _suffix(cls) -> str:
        """``DPO`` of ``DPOConfig``."""
        return cls.config_class.__name__.removesuffix("Config")

    @classmethod
    def _settings(cls, model: Any, args: Any) -> Any:
        return args or cls.config_class(default_output_dir(model, cls._suffix()))

    def make_task(self, args: Any) -> Task:
        """The task with its settings."""
        return TASKS[self._suffix().lower()](args)


class _WithReference(_NamedTrainer):
    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        ref_model: str | PreTrainedModel | Any = None,
        args: ReferenceConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: _Metrics = None,
        callbacks: _Callbacks = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        args = self._settings(model, args)
        super().__init__(
            self.make_task(args),
            model,
            args,
            ref_model=ref_model,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )


class DPOTrainer(_WithReference):
    """Direct preference optimisation (2305.18290) and the methods of its family.

    Takes the arguments of TRL's trainer of the same name, with the same meaning.

    Args:
        model: Name or path, or a model, PEFT-wrapped or not.
        ref_model: Reference model, or its name or path; by default the policy as it is before training.
        args: Settings.
        data_collator: Not used: rows are packed, not collated. Passing one is refused.
        train_dataset: Preference data in any known format.
        eval_dataset: Held-out preference data, or a mapping of names to such.
        processing_class: Tokenizer; by default the model's own.
        compute_metrics: Receives an ``EvalPrediction`` whose predictions are ``(pairs, 2)`` rewards of the chosen and
            the rejected completion, and whose labels are zeros, the index of the chosen one.
        callbacks: Trainer callbacks.
        optimizers: Optimizer and scheduler to use instead of the configured ones.
        quantization_config: Quantisation for a model given by name.
        peft_config: Adapter to train instead of the whole model.
    """

    args: DPOConfig
    config_class = DPOConfig


class KTOTrainer(_WithReference):
    """Kahneman-Tversky optimisation (2402.01306) and unpaired APO-zero (2408.06266).

    Takes the arguments of TRL's trainer of the same name, with the same meaning; see :class:`DPOTrainer`. Training data
    are prompts, completions and labels, or preference data in any known format, taken apart. ``compute_metrics``
    receives an ``EvalPrediction`` whose predictions are ``(examples,)`` rewards, and whose labels are the examples'
    labels.
    """

    args: KTOConfig
    config_class = KTOConfig


class _WithoutReference(_NamedTrainer):
    def __init__(
        self,
        model: str | PreTrainedModel | Any = None,
        args: ReferenceFreeConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model_init: Callable[[], Any] | None = None,
        callbacks: _Callbacks = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Any = None,
        peft_config: Any = None,
        compute_metrics: _Metrics = None,
    ) -> None:
        _refuse_logits(preprocess_logits_for_metrics=preprocess_logits_for_metrics)
        model = _one_model(model, model_init)
        args = self._settings(model, args)
        super().__init__(
            self.make_task(args),
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )


class CPOTrainer(_WithoutReference):
    """Contrastive preference optimisation (2401.08417), SimPO (2405.14734) and AlphaPO (2501.03884).

    Takes the arguments of TRL's trainer of the same name, with the same meaning.

    Args:
        model: Name or path, or a model, PEFT-wrapped or not.
        args: Settings.
        data_collator: Not used: rows are packed, not collated. Passing one is refused.
        train_dataset: Preference data in any known format.
        eval_dataset: Held-out preference data, or a mapping of names to such.
        processing_class: Tokenizer; by default the model's own.
        model_init: Makes the model, where ``model`` is left out; called once.
        callbacks: Trainer callbacks.
        optimizers: Optimizer and scheduler to use instead of the configured ones.
        preprocess_logits_for_metrics: Not available, since no logits exist. Passing one is refused.
        peft_config: Adapter to train instead of the whole model.
        compute_metrics: Receives an ``EvalPrediction`` whose predictions are ``(pairs, 2)`` rewards of the chosen and
            the rejected completion, and whose labels are zeros, the index of the chosen one.
    """

    args: CPOConfig
    config_class = CPOConfig


class ORPOTrainer(_WithoutReference):
    """Odds-ratio preference optimisation (2403.07691): supervised fine-tuning with a preference term.

    Takes the arguments of TRL's trainer of the same name, with the same meaning; see :class:`CPOTrainer`.
    """

    args: ORPOConfig
    config_class = ORPOConfig


class SFTTrainer(_NamedTrainer):
    """Supervised fine-tuning, the stage before preference tuning.

    Takes the arguments of TRL's trainer of the same name, with the same meaning. The loss is the mean over all trained
    tokens of an optimizer step.

    Args:
        model: Name or path, or a model, PEFT-wrapped or not.
        args: Settings; plain ``TrainingArguments`` are completed with the defaults of ``SFTConfig``.
        data_collator: Not used: rows are packed, not collated. Passing one is refused.
        train_dataset: Plain text, prompt and completion, or messages.
        eval_dataset: Held-out data, or a mapping of names to such.
        processing_class: Tokenizer; by default the model's own.
        compute_loss_func: Not available, since no logits exist. Passing one is refused.
        compute_metrics: Not available, since no logits exist. Passing one is refused.
        callbacks: Trainer callbacks.
        optimizers: Optimizer and scheduler to use instead of the configured ones.
        optimizer_cls_and_kwargs: Optimizer class and its arguments.
        preprocess_logits_for_metrics: Not available, since no logits exist. Passing one is refused.
        quantization_config: Quantisation for a model given by name.
        peft_config: Adapter to train instead of the whole model.
        formatting_func: Turns a row into the text to train on.
    """

    args: SFTConfig
    config_class = SFTConfig

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        callbacks: _Callbacks = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[Any], str] | None = None,
    ) -> None:
        if args is not None and not isinstance(args, SFTConfig):
            # What ``to_dict`` gives is for showing: a token in it is masked.
            args = SFTConfig(**{**args.to_dict(), "hub_token": args.hub_token})
        settings: SFTConfig = self._settings(model, args)
        _refuse_logits(
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if settings.packing:
            warnings.warn(
                "packing never mixes examples here, so that a batch still counts examples: with"
                " per_device_train_batch_size as it was, there are more and smaller steps than where examples are"
                " joined",
                UserWarning,
                stacklevel=2,
            )
        super().__init__(
            TextTask(settings, formatting_func),
            model,
            settings,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )

    def _prepared_train(self, dataset: Any, tokenizer: Any, args: Any) -> Any:
        streamed = isinstance(dataset, datasets.IterableDataset)
        if args.shuffle_dataset and streamed:
            dataset = dataset.shuffle(seed=args.seed)
        prepared = super()._prepared_train(dataset, tokenizer, args)
        if args.shuffle_dataset and not streamed:
            # As in TRL, once rows without anything to learn from are gone.
            prepared = prepared.shuffle(seed=args.seed).flatten_indices()
        return prepared


def _refuse_logits(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ConfigError("not available: logits are never built", where=name, remedy=f"leave {name} out")


def _one_model(model: Any, model_init: Callable[[], Any] | None) -> Any:
    if (model is None) == (model_init is None):
        raise ConfigError(
            "no model is given" if model is None else "a model is given, and a function that makes one",
            where="model" if model is None else "model_init",
            remedy="pass either model or model_init",
        )
    return model if model_init is None else model_init()


__all__ = ["CPOTrainer", "DPOTrainer", "KTOTrainer", "ORPOTrainer", "SFTTrainer"]
