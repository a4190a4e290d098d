"""The trainers by their names in TRL, with its constructors: only the import changes in a script."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar, TypeVar

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_utils import number_of_arguments

from preftune.config.legacy import TABLE
from preftune.errors import ConfigError
from preftune.training.preference_config import DPOConfig, KTOConfig, ReferenceConfig
from preftune.training.reference_free_config import CPOConfig, ORPOConfig, ReferenceFreeConfig
from preftune.training.setup import default_output_dir
from preftune.training.sft_config import SFTConfig
from preftune.training.task import Task
from preftune.training.tasks import AnswerTask, ContrastTask, OddsRatioTask, PairTask, TextTask
from preftune.training.trainer import TaskTrainer

_Callbacks = list[TrainerCallback] | None
_Begin = TypeVar("_Begin", bound=Callable[..., None])
_Metrics = Callable[[Any], dict[str, float]] | None


def _told(begin: _Begin) -> _Begin:
    """Tell of an argument that a constructor does not have by the trainer's name, and what it is called instead."""
    known = inspect.signature(begin).parameters

    @functools.wraps(begin)
    def __init__(self: _NamedTrainer, *args: Any, **given: Any) -> None:
        for name in given:
            if name not in known:
                raise TypeError(_unknown(type(self), name))
        begin(self, *args, **given)

    return __init__  # type: ignore[return-value]


def _unknown(trainer: type[_NamedTrainer], name: str) -> str:
    what = f"{trainer.__name__}.__init__() got an unexpected keyword argument {name!r}"
    kind = trainer.task_class.config_class
    if name == "tokenizer":
        return f"{what}; it is called processing_class"
    if name in TABLE or name in {field.name for field in fields(kind)}:
        return f"{what}; it is a setting: args={kind.__name__}({name}=...)"
    return what


class _NamedTrainer(TaskTrainer):
    task_class: ClassVar[type[Task]]

    def make_task(self, args: Any) -> Task:
        """The task with its settings."""
        return self.task_class(args)

    def _begin(self, given: dict[str, Any]) -> None:
        """Go on with the arguments of a constructor, settings completed."""
        own = {name: value for name, value in given.items() if name not in ("self", "__class__", "args")}
        name = self.task_class.name.upper()
        kind = self.task_class.config_class
        args = kind(default_output_dir(given["model"], name)) if given["args"] is None else given["args"]
        if not isinstance(args, kind):
            raise _wrong_settings(args, kind)
        super().__init__(self.make_task(args), args=args, **own)


class _WithReference(_NamedTrainer):
    @_told
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
        self._begin(locals())


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
    task_class = PairTask


class KTOTrainer(_WithReference):
    """Kahneman-Tversky optimisation (2402.01306) and unpaired APO-zero (2408.06266).

    Takes the arguments of TRL's trainer of the same name, with the same meaning; see :class:`DPOTrainer`. Training data
    are prompts, completions and labels, or preference data in any known format, taken apart. ``compute_metrics``
    receives an ``EvalPrediction`` whose predictions are ``(examples,)`` rewards, and whose labels are the examples'
    labels.
    """

    args: KTOConfig
    task_class = AnswerTask


class _WithoutReference(_NamedTrainer):
    @_told
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
        del model_init, preprocess_logits_for_metrics
        self._begin(locals())


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
    task_class = ContrastTask


class ORPOTrainer(_WithoutReference):
    """Odds-ratio preference optimisation (2403.07691): supervised fine-tuning with a preference term.

    Takes the arguments of TRL's trainer of the same name, with the same meaning; see :class:`CPOTrainer`.
    """

    args: ORPOConfig
    task_class = OddsRatioTask


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
    task_class = TextTask

    @_told
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
            args = _completed(args)
        _refuse_logits(
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self._formatting_func = formatting_func
        del compute_loss_func, compute_metrics, preprocess_logits_for_metrics, formatting_func
        self._begin(locals())

    def make_task(self, args: SFTConfig) -> TextTask:
        """Texts, made of rows by the user's function where there is one."""
        if args.packing:
            warnings.warn(
                "packing never mixes examples here, so that a batch still counts examples: with"
                " per_device_train_batch_size as it was, there are more and smaller steps than where examples are"
                " joined",
                UserWarning,
                stacklevel=4,
            )
        return TextTask(args, self._formatting_func)

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


def _wrong_settings(args: Any, kind: type[Any]) -> ConfigError:
    given = f"{type(args).__module__.partition('.')[0]}.{type(args).__name__}"
    remedy = f"from preftune import {kind.__name__}, and make the settings with it"
    return ConfigError("settings of another kind", where="args", value=given, allowed=kind.__name__, remedy=remedy)


def _completed(args: Any) -> SFTConfig:
    """Settings of transformers with the defaults of ``SFTConfig``; settings of another trainer are refused."""
    known = {each.name for each in fields(SFTConfig)}
    if not isinstance(args, TrainingArguments) or not known.issuperset(each.name for each in fields(args)):
        raise _wrong_settings(args, SFTConfig)
    # What ``to_dict`` gives is for showing: a token in it is masked.
    return SFTConfig(**{**args.to_dict(), "hub_token": args.hub_token})


def _one_model(model: Any, model_init: Callable[[], Any] | None) -> Any:
    if (model is None) == (model_init is None):
        raise ConfigError(
            "no model is given" if model is None else "a model is given, and a function that makes one",
            where="model" if model is None else "model_init",
            remedy="pass either model or model_init",
        )
    if model_init is None:
        return model
    # transformers hands such a function the trial of a search; there is none.
    made: Any = model_init(*[None] * number_of_arguments(model_init))
    if made is None:
        raise ConfigError("returned no model", where="model_init", remedy="return the model that is to be trained")
    return made


__all__ = ["CPOTrainer", "DPOTrainer", "KTOTrainer", "ORPOTrainer", "SFTTrainer"]
