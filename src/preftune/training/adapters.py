"""Adapters that transformers carries within a model, made PEFT's own."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

from preftune.errors import ModelError


def as_peft_model(model: Any, *, trained: bool = True) -> Any:
    """A model with adapters as a ``PeftModel``, however they were put on; any other model as it is.

    ``from_pretrained`` of an adapter's folder and ``model.add_adapter`` inject adapters into a transformers model.
    Which weights are then trained depends on how they came there: of a loaded adapter none, but the base model's.
    Here, as with ``get_peft_model``, the adapter is trained and the base model is not.

    Args:
        model: Any model.
        trained: Whether it is going to be trained, so that a change of what is trained is worth a warning.

    Raises:
        ModelError: The adapters are of a kind that cannot be moved.
    """
    configs = getattr(model, "peft_config", None)
    if not getattr(model, "_hf_peft_config_loaded", False) or not configs:
        return model
    from peft import get_peft_model

    configs, active = dict(configs), list(model.active_adapters())
    before = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    _take_off(model)
    moved: Any = None
    try:
        for name, config in configs.items():
            config = copy.copy(config)
            config.inference_mode = False
            config.base_model_name_or_path = model.__dict__.get("name_or_path")
            if moved is None:
                moved = get_peft_model(model, config, adapter_name=name)
            else:
                moved.add_adapter(name, config)
        moved.base_model.set_adapter(active)
        for name, tensor in itertools.chain(moved.named_parameters(), moved.named_buffers()):
            old = before[name.removeprefix("base_model.model.")]
            if old is not tensor:
                tensor.data.copy_(old.data)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"its adapters, as transformers carries them, cannot be trained ({error})",
            where="model",
            remedy="load the adapter with PeftModel.from_pretrained(base, folder, is_trainable=True)",
        ) from error
    now = {name.removeprefix("base_model.model."): p.requires_grad for name, p in moved.named_parameters()}
    if trained and now != flags:
        warnings.warn(
            f"the adapter {', '.join(active)} is trained and the base model is not, whatever transformers had frozen",
            UserWarning,
            stacklevel=5,
        )
    return moved


def _take_off(model: Any) -> None:
    """Put the base model's own layers back in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    done: list[str] = []
    for name, module in list(model.named_modules()):
        if any(name.startswith(f"{each}.") for each in done):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            model.set_submodule(name, module.original_module)
        elif isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
        else:
            continue
        done.append(name)
    del model.peft_config
    model._hf_peft_config_loaded = False


def idle_adapters(model: Any) -> set[str]:
    """Names of a model's adapters that are not active."""
    loaded = set(getattr(model, "peft_config", None) or ())
    return loaded - set(model.active_adapters) if loaded else set()
