"""What is found out before any work: what would end a training late, or change it unseen."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from preftune.errors import ConfigError, DataError, ModelError, SetupError, TrainingError
from preftune.training.adapters import idle_adapters
from preftune.training.config import PackedConfig

#: Schedules that transformers builds without looking at ``lr_scheduler_kwargs``.
_SCHEDULES_WITHOUT_OPTIONS = ("constant", "constant_with_warmup")
_LOSS = "override row_terms, which gets the log-probs of one packed row"
_DATA = "prepare the data before they are passed, down to prompt_ids, chosen_ids and rejected_ids if need be"
#: Methods of padded trainers that nothing calls here, and what replaces them.
_NEVER_CALLED = {
    **dict.fromkeys(("compute_loss", "_compute_loss", "prediction_step", "get_batch_loss_metrics"), _LOSS),
    **dict.fromkeys(("dpo_loss", "kto_loss", "cpo_loss", "odds_ratio_loss", "store_metrics"), _LOSS),
    **dict.fromkeys(("concatenated_forward", "concatenated_inputs", "get_batch_logps"), _LOSS),
    **dict.fromkeys(("_prepare_dataset", "tokenize_row", "build_tokenized_answer"), _DATA),
    **dict.fromkeys(("compute_ref_log_probs", "_precompute_ref_logps", "_compute_kl_logps"), "pass ref_model"),
    **dict.fromkeys(("compute_loss_context_manager", "autocast_smart_context_manager"), "set bf16 or fp16"),
    **dict.fromkeys(("_prepare_inputs", "_get_num_items_in_batch"), _LOSS),
    "_get_eval_sampler": "order the evaluation data before they are passed",
}


def refuse_overrides(trainer: Any) -> None:
    """A subclass, an object or a patched class with a loss of its own would be trained on another one, in silence.

    Args:
        trainer: A trainer, or its class.
    """
    kind = trainer if isinstance(trainer, type) else type(trainer)
    own = {} if kind is trainer else vars(trainer)
    for where, found in ((kind.__name__, own), *((each.__name__, vars(each)) for each in kind.__mro__)):
        for name, remedy in _NEVER_CALLED.items():
            if name in found and not _is_known(found[name]):
                what = f"{name} is overridden, and never called: losses are computed row by row"
                raise ConfigError(what, where=where, remedy=remedy)


def overrides(trainer: Any, *names: str) -> bool:
    """Whether a script has given a trainer, its class or a subclass one of these methods."""
    return not all(_is_known(getattr(trainer, name)) for name in names)


def _is_known(method: Any) -> bool:
    """Whether a method is one of the libraries', rather than a script's."""
    layer = getattr(method, "__func__", method)
    while layer is not None:
        # Not `__module__`, which functools.wraps takes over from what is wrapped.
        module = str(getattr(layer, "__globals__", {}).get("__name__", ""))
        if module.partition(".")[0] not in ("preftune", "transformers", "torch"):
            return False
        layer = getattr(layer, "__wrapped__", None)
    return True


def check_arguments(model: Any, ref_model: Any, data_collator: Any, train_dataset: Any) -> None:
    """Refuse arguments of a trainer that cannot be used, or that contradict each other."""
    if data_collator is not None:
        raise ConfigError(
            "a data collator cannot be used: examples are packed into rows, not padded into batches",
            where="data_collator",
            value=type(data_collator).__name__,
            remedy="leave data_collator out",
        )
    if train_dataset is None:
        raise DataError("training data are missing", where="train_dataset", remedy="pass train_dataset")
    if ref_model is model and not isinstance(model, str | None):
        raise ModelError(
            "model and ref_model are the same object, so that they would always agree",
            where="ref_model",
            remedy="leave ref_model out: the initial policy is the reference",
        )


def check_trainable(model: nn.Module) -> None:
    """Refuse a training that would change nothing.

    Raises:
        ModelError: Every parameter that takes part is frozen.
    """
    idle = idle_adapters(model)
    if any(p.requires_grad and idle.isdisjoint(name.split(".")) for name, p in model.named_parameters()):
        return
    if getattr(model, "peft_config", None):
        what = "the adapter was loaded for inference: none of its parameters is trained"
        remedy = "load it with PeftModel.from_pretrained(base, folder, is_trainable=True)"
    else:
        what = "every parameter is frozen, so that nothing is trained"
        remedy = "call model.requires_grad_(True), or pass peft_config to train an adapter"
    raise ModelError(what, where="model", remedy=remedy)


def check_devices(args: PackedConfig) -> None:
    """One process drives one device."""
    if args.n_gpu > 1:
        raise TrainingError(
            "one process sees several GPUs",
            value=args.n_gpu,
            remedy="start with accelerate launch or torchrun, or set CUDA_VISIBLE_DEVICES to one GPU",
        )


def check_token_ids(model: nn.Module, dataset: Any, columns: Sequence[str], name: str) -> None:
    """Refuse tokens that the model has no embedding for, before one of them ends a long run with an index error.

    Raises:
        ModelError: Names the first such row.
    """
    import datasets
    import pyarrow.compute as pc

    get_embeddings: Any = getattr(model, "get_input_embeddings", None)
    embedding = None if get_embeddings is None else get_embeddings()
    num_embeddings = getattr(embedding, "num_embeddings", None)
    if not isinstance(dataset, datasets.Dataset) or num_embeddings is None:
        return
    for column in set(columns) & set(dataset.column_names):
        if not column.endswith("_ids"):
            continue
        values = dataset.with_format("arrow")[:][column]
        tokens = pc.list_flatten(values)
        if len(tokens) and not 0 <= (bounds := pc.min_max(tokens).as_py())["min"] <= bounds["max"] < num_embeddings:
            wrong = pc.index(pc.or_(pc.less(tokens, 0), pc.greater_equal(tokens, num_embeddings)), True).as_py()
            raise ModelError(
                "a token that the model has no embedding for",
                where=f"{name} data set, row {pc.list_parent_indices(values)[wrong]}, {column}",
                value=tokens[wrong].as_py(),
                allowed=f"0 to {num_embeddings - 1}",
                remedy="use the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer)) before",
            )


#: Tables of learned positions, by the names that models give them.
_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?|positions_embed)$")


def check_positions(model: nn.Module, longest: int | None) -> None:
    """Refuse sequences that are longer than a model's table of learned positions.

    Raises:
        ConfigError: Names the length that fits.
    """
    for name, module in model.named_modules():
        if longest is None or not isinstance(module, nn.Embedding) or not _POSITIONS.search(name):
            continue
        # OPT and others keep the first entries for padding.
        most = module.num_embeddings - int(getattr(module, "offset", 0))
        if longest > most:
            what = f"the longest sequence has {longest} tokens, and {type(model).__name__} learned {most} positions"
            raise ConfigError(what, where="max_length", allowed=f"up to {most}", remedy=f"set max_length: {most}")


def check_optimizer(trainer: Any) -> None:
    """Find out before any work is done whether optimizer, schedule and kernels can be had as they are asked for.

    transformers makes them when training begins, which may be after a long reference pass.

    Raises:
        SetupError: A package is missing.
        ConfigError: A setting of the optimizer or the schedule is missing or unknown.
    """
    from transformers.optimization import get_scheduler
    from transformers.utils.import_utils import is_liger_kernel_available

    args = trainer.args
    if args.use_liger_kernel and not is_liger_kernel_available():
        remedy = "pip install liger-kernel, or leave use_liger_kernel out"
        raise SetupError("liger-kernel is not installed", where="use_liger_kernel", value=True, remedy=remedy)
    if trainer.optimizer is None and trainer.optimizer_cls_and_kwargs is None:
        _check_optimizer_choice(trainer.get_optimizer_cls_and_kwargs, args, trainer.model)
    if trainer.lr_scheduler is None:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        options = args.lr_scheduler_kwargs
        try:
            get_scheduler(name, optimizer, args.get_warmup_steps(10), 10, scheduler_specific_kwargs=options)
        except (ValueError, TypeError) as error:
            # A missing argument is told in the words of the function that wants it.
            what = f"{name} does not take these lr_scheduler_kwargs: {error}"
            raise ConfigError(what, where="lr_scheduler_type", value=options) from error
        if options and name in _SCHEDULES_WITHOUT_OPTIONS:
            warnings.warn(f"lr_scheduler_kwargs has no effect with {name}", UserWarning, stacklevel=3)


def _check_optimizer_choice(choose: Callable[..., Any], args: PackedConfig, model: nn.Module) -> None:
    name = str(getattr(args.optim, "value", args.optim))
    given = [part.strip() for part in (args.optim_args or "").split(",") if part.strip()]
    if not all(re.fullmatch(r"[^=]+=[^=]+", part) for part in given):
        raise ConfigError("not a list of settings", where="optim_args", value=args.optim_args, allowed="key=value,...")
    # Optimizers that step inside the backward pass, and what can stand for them: a packed step has a backward per row.
    instead = "adafactor" if name in ("lomo", "adalomo") else name.removesuffix("_layerwise")
    if instead != name:
        what = "steps inside the backward pass, and a packed step has one for every row"
        raise ConfigError(what, where="optim", value=name, remedy=f"{instead}, or another")
    try:
        chosen = choose(args, model)
        make, options = chosen
        if isinstance(make, type) and issubclass(make, torch.optim.Optimizer) and "params" not in options:
            make([nn.Parameter(torch.zeros(1))], **options)
    except ImportError as error:
        raise SetupError(str(error), where="optim", value=name) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error), where="optim", value=name) from error
    for part in given:
        rest = copy.copy(args)
        rest.optim_args = ",".join(other for other in given if other is not part)
        if choose(rest, model) == chosen:
            warnings.warn(f"optim_args: {part} changes nothing in {name}", UserWarning, stacklevel=4)
