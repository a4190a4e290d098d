"""References that the user names: another model, or another adapter of the policy's model."""

from __future__ import annotations

import warnings
from typing import Any

from preftune.errors import ConfigError, ModelError
from preftune.models.head import base_model
from preftune.training import setup
from preftune.training.adapters import as_peft_model
from preftune.training.preference_config import ReferenceConfig


def choose_adapters(model: Any, trained: str | None = None, compared: str | None = None) -> None:
    """Make the adapter to be trained the active one, and check the one to compare with.

    Args:
        model: The policy.
        trained: Adapter that is trained; by default the active one.
        compared: Adapter that is the reference, or ``None``.

    Raises:
        ConfigError: The model has no such adapter, or they are the same.
        ModelError: Several adapters are active at once.
    """
    loaded = list(getattr(model, "peft_config", None) or {})
    for adapter in loaded:
        # PEFT saves an adapter into a subfolder of its name.
        if adapter in ("", ".", "..") or any(mark in adapter for mark in "/\\\0"):
            raise ConfigError(
                "the name of an adapter becomes that of a folder",
                where="model",
                value=adapter,
                allowed="a name without / and \\, and neither . nor ..",
                remedy="load the adapter under another name",
            )
    for name, value in (("model_adapter_name", trained), ("ref_adapter_name", compared)):
        if value is not None and value not in loaded:
            raise ConfigError(
                "the model has no such adapter",
                where=name,
                value=value,
                allowed=", ".join(loaded) or "none: the model has no adapters",
                remedy="load it with model.load_adapter, or give its folder as ref_model",
            )
    if not loaded:
        return
    if trained is not None:
        model.set_adapter(trained)
    active = model.active_adapters
    if len(active) != 1:
        raise ModelError(
            "several adapters are active at once", value=list(active), remedy="merge them into one, or activate one"
        )
    if compared == active[0]:
        raise ConfigError(
            "the adapter that is trained cannot be the reference as well",
            where="ref_adapter_name",
            value=active[0],
            remedy="leave ref_adapter_name out to compare with it as it is before training",
        )
    idle = [name for name in loaded if name not in (active[0], compared)]
    if idle:
        warnings.warn(
            f"{active[0]} is trained, and of the model's other adapters {', '.join(idle)} plays no part; "
            "ref_adapter_name would make one the reference",
            UserWarning,
            stacklevel=4,
        )


def explicit_reference(ref_model: Any, policy: Any, tokenizer: Any, args: ReferenceConfig) -> Any:
    """The reference model that was given, loaded where it is given by name, or ``None``.

    Raises:
        ConfigError: It contradicts another setting, or nothing would look at it.
        ModelError: It cannot be loaded, or does not know the policy's tokens.
    """
    if ref_model is None:
        return None
    objective = args.build_objective()
    if not objective.takes_reference:
        raise ConfigError(
            f"{', '.join(objective.names)} has no reference", where="ref_model", remedy="leave ref_model out"
        )
    if args.ref_adapter_name is not None:
        raise ConfigError(
            "two references are given", where="ref_adapter_name", value=args.ref_adapter_name, remedy="keep one of them"
        )
    if isinstance(ref_model, str):
        ref_model = _loaded(ref_model, policy, args)
    ref_model = as_peft_model(ref_model, trained=False)
    rows = base_model(ref_model).get_input_embeddings().weight.shape[0]
    # A token that the policy has no embedding of either is one that no text has.
    if rows < min(len(tokenizer), base_model(policy).get_input_embeddings().weight.shape[0]):
        raise ModelError(
            "the reference does not know all of the tokenizer's tokens",
            where="ref_model",
            value=f"{rows} embeddings for {len(tokenizer)} tokens",
            remedy="take a reference with the policy's tokenizer",
        )
    if args.sync_ref_model:
        _check_mixable(ref_model, policy)
    return ref_model


def reloaded(policy: Any, args: ReferenceConfig) -> Any:
    """The model that training started from, loaded again, or ``None`` where it cannot be."""
    name = getattr(policy.config, "_name_or_path", "")
    if not name:
        return None
    kwargs = {**setup.init_kwargs(args), "dtype": next(policy.parameters()).dtype}
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    # Exactly what the policy was loaded from, also where its branch has moved meanwhile.
    commit = getattr(policy.config, "_commit_hash", None)
    if commit:
        kwargs["revision"] = commit
    try:
        model = setup.from_name(name, args, kwargs)
    except ModelError:
        return None
    if args.disable_dropout:
        setup.disable_dropout(model)
    return model


def _loaded(name: str, policy: Any, args: ReferenceConfig) -> Any:
    # Everything but the revision, which names one of the policy's.
    kwargs = {key: value for key, value in setup.init_kwargs(args).items() if key != "revision"}
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    kwargs.setdefault("dtype", base_model(policy).dtype)
    return setup.from_name(name, args, kwargs)


def _check_mixable(ref_model: Any, policy: Any) -> None:
    """Following means mixing parameter by parameter."""
    mine, others = dict(policy.named_parameters()), dict(ref_model.named_parameters())
    same = {name: p.shape for name, p in mine.items()} == {name: p.shape for name, p in others.items()}
    if not same or not all(p.requires_grad for p in mine.values()):
        raise ConfigError(
            "the given reference cannot follow the policy: their trained parameters do not correspond",
            where="sync_ref_model",
            value=True,
            remedy="leave ref_model out, so that the reference begins as the policy, or sync_ref_model",
        )
