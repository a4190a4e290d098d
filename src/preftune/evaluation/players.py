"""The models of an evaluation: loaded where they are given by name, and ready to score."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from preftune.config import ModelConfig
from preftune.errors import ConfigError, ModelError
from preftune.evaluation.config import DEFAULT_BETA, EvalConfig
from preftune.evaluation.scoring import Scorer
from preftune.files import parse_json
from preftune.models.loading import load_model_and_tokenizer
from preftune.references.store import ReferenceStore


@dataclass
class Players:
    """The models of an evaluation."""

    policy: Scorer
    reference: Scorer | None
    other: Scorer | None
    names: dict[str, str | None]


def name_of(model: Any) -> str:
    """A model's name, or that of its class."""
    if isinstance(model, str):
        return model
    config = getattr(model, "config", None)
    return str(getattr(config, "_name_or_path", "") or type(model).__name__)


def _load(
    name: str, tokenizer_name: str | None, model_config: ModelConfig, revision: str, where: str
) -> tuple[Any, Any]:
    changed = replace(
        model_config,
        model_name_or_path=name,
        model_revision=revision,
        ref_model_name_or_path=None,
        tokenizer_name_or_path=tokenizer_name or model_config.tokenizer_name_or_path,
        use_peft=False,
    )
    try:
        loaded = load_model_and_tokenizer(changed)
    except ModelError as error:
        # By the name that the caller knows it by.
        raise error.with_parts(where=where) if error.where == "model_name_or_path" else error from error
    model: Any = loaded.model
    if torch.accelerator.is_available() and not getattr(model, "hf_device_map", None):
        model.to(torch.accelerator.current_accelerator())
    return model, loaded.tokenizer


def load_players(
    model: Any,
    ref_model: Any,
    compare: Any,
    tokenizer: Any,
    config: EvalConfig,
    model_config: ModelConfig | None,
    show_progress: bool,
) -> tuple[Players, Any]:
    """Load what is given by name.

    Args:
        model: The model.
        ref_model: Its reference, or ``None``.
        compare: Another checkpoint, or ``None``.
        tokenizer: Tokenizer, where it is given.
        config: Settings of the evaluation.
        model_config: How models are loaded.
        show_progress: Draw progress bars while scoring.

    Returns:
        The models, ready to score, and the tokenizer.
    """
    how = model_config or ModelConfig()
    names = {"model": name_of(model), "reference": None if ref_model is None else name_of(ref_model), "other": None}
    if isinstance(model, str):
        model, own = _load(model, None, how, how.model_revision, "model")
        tokenizer = tokenizer or own
    if tokenizer is None:
        raise ConfigError("a model that is loaded already needs its tokenizer", where="tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    beside = how.tokenizer_name_or_path or (names["model"] if isinstance(names["model"], str) else None)
    if isinstance(ref_model, str):
        ref_model, _ = _load(ref_model, beside, how, how.ref_model_revision, "ref_model")
    if isinstance(compare, str):
        names["other"] = compare
        compare, _ = _load(compare, beside, how, "main", "compare")
    elif compare is not None:
        names["other"] = name_of(compare)
    store = ReferenceStore() if config.reference_store else None

    def scorer(each: Any, like: Scorer | None = None, *, adapter_off: bool = False) -> Scorer:
        return Scorer(
            each,
            store=store,
            adapter_off=adapter_off,
            bf16=config.bf16,
            packing_mode=config.packing_mode,
            backend=config.attention_backend,
            pad_token_id=tokenizer.pad_token_id or 0,
            max_tokens=config.max_tokens_per_row,
            max_length=config.max_length,
            like=like,
            show_progress=show_progress,
        )

    policy = scorer(model)
    reference = None
    if ref_model is not None:
        reference = scorer(ref_model, policy)
    elif getattr(model, "peft_config", None):
        # One that has learned nothing yet, too: it is its reference.
        names["reference"] = f"{names['model']} without its adapter"
        reference = scorer(model, policy, adapter_off=True)
    other = None if compare is None else scorer(compare, policy)
    return Players(policy, reference, other, names), tokenizer


def beta_of(given: float | None, model: str | None) -> tuple[float, list[str]]:
    """The factor of the reward, and a note where it was found rather than given.

    Args:
        given: As it was set.
        model: The model's folder, whose record tells what it was trained with.
    """
    if given is not None:
        return given, []
    path = Path(model or "") / "provenance.json"
    for candidate in (path, path.parent.parent / path.name):
        try:
            settings = parse_json(candidate.read_text(encoding="utf-8"))["settings"]
            value = float(settings["trainer"]["beta"]["value"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if value > 0:
            return value, [f"beta {value:g} as in training ({candidate})"]
    return DEFAULT_BETA, [f"beta {DEFAULT_BETA:g} by default; margins and calibration scale with it, accuracy does not"]
