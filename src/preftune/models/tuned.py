"""What a run left behind: where the tuned weights are, what they were tuned from, and how to load them again."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from preftune.config import ModelConfig
from preftune.errors import ModelError
from preftune.models.loading import Loaded, load_model_and_tokenizer
from preftune.models.locating import ADAPTER_FILE, holds_adapter, located

#: Where a run, or a sweep, keeps its best weights.
_INSIDE = ("best",)
_PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class Tuned:
    """A tuned model on disk.

    Attributes:
        folder: Folder with the weights or the adapter.
        base: Model that it was tuned from, ``None`` where the folder does not say.
        base_revision: Branch, tag or commit of the base.
        adapter: Content of ``adapter_config.json``; empty for full weights.
        settings: The run's settings by role and name; empty without a record.
        data: What the record says about the data, by split.
        verb: The training verb, where the record says so.
        reference: Model that training compared with, where that is not the adapter's base: the base of full weights,
            the adapter that training went on from, or what the settings name.
        notes: What a user of the reference should know.
    """

    folder: Path
    base: str | None
    base_revision: str = "main"
    adapter: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    verb: str | None = None
    reference: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter instead of full weights."""
        return bool(self.adapter)

    @property
    def quantised(self) -> str | None:
        """``load_in_4bit`` or ``load_in_8bit`` where the base was quantised during training."""
        model = self.settings.get("model", {})
        return next((name for name in ("load_in_4bit", "load_in_8bit") if model.get(name)), None)

    def setting(self, role: str, name: str, default: Any = None) -> Any:
        """A setting of the run, or ``default`` where there is no record of it."""
        value = self.settings.get(role, {}).get(name)
        return default if value is None else value


def find_tuned(path: str | Path, *, base: str | None = None) -> Tuned:
    """Read what a run left.

    Args:
        path: Output folder of a run, one of its checkpoints, a sweep's folder, or a folder that ``save_pretrained``
            wrote.
        base: Base model, in place of the one that the folder names.

    Returns:
        What was found.

    Raises:
        ModelError: There are no weights, or a file of the run cannot be read.
    """
    folder = _with_weights(Path(path).expanduser())
    adapter = _read(folder / ADAPTER_FILE)
    record = _read(folder / _PROVENANCE) or _read(folder.parent / _PROVENANCE)
    if (folder / ADAPTER_FILE).is_file() and not adapter:
        raise ModelError("not an adapter's settings", where=str(folder / ADAPTER_FILE), remedy="save the adapter again")
    settings = _values(record.get("settings"))
    model = settings.get("model", {})
    named = base or adapter.get("base_model_name_or_path") or model.get("model_name_or_path")
    command = record.get("command")
    located_base = located(str(named), folder) if named else None
    reference, notes = _reference(model, adapter, located_base, folder)
    return Tuned(
        folder=folder,
        base=located_base,
        reference=reference,
        notes=notes,
        base_revision="main" if base else str(adapter.get("revision") or model.get("model_revision") or "main"),
        adapter=adapter,
        settings=settings,
        data=record["data"] if isinstance(record.get("data"), dict) else {},
        verb=str(command[1]) if isinstance(command, list) and len(command) > 1 else None,
    )


def _reference(
    model: dict[str, Any], adapter: dict[str, Any], base: str | None, folder: Path
) -> tuple[str | None, tuple[str, ...]]:
    """What training compared with, where it is not the base with the adapter off, and what to say about that."""
    given, began = model.get("ref_model_name_or_path"), model.get("model_name_or_path")
    if given:
        return located(str(given), folder), ()
    if not adapter:
        return base, ()
    start = located(str(began), folder) if began else None
    if start is not None and holds_adapter(start):
        return start, ()
    if start is None or Path(start).is_dir() or str(began) == str(adapter.get("base_model_name_or_path")):
        return None, ()
    what = f"training began from {began}, which is not here; if it is an adapter, it was the reference: name it"
    return None, (f"{what} with --ref_model",)


def load_tuned(tuned: Tuned, how: ModelConfig | None = None, *, quantised: bool = True) -> Loaded:
    """Load the tuned model, its adapter not merged, and its tokenizer.

    Args:
        tuned: What :func:`find_tuned` returned.
        how: Type of the weights, attention and the like.
        quantised: Quantise the base as in training, where it was; the product of adapter and base is then the trained
            one.

    Returns:
        Model and tokenizer; the model is a ``PeftModel`` for an adapter.

    Raises:
        ModelError: Weights, base or tokenizer cannot be loaded.
        SetupError: A library is missing.
    """
    how = replace(how or ModelConfig(), use_peft=False, ref_model_name_or_path=None)
    if not tuned.is_adapter:
        with_own = replace(how, model_name_or_path=str(tuned.folder), tokenizer_name_or_path=_tokenizer(tuned))
        return load_model_and_tokenizer(with_own)
    loaded = load_base(tuned, how, quantised=quantised)
    return replace(loaded, model=attach(tuned, loaded.model, loaded.tokenizer))


def load_base(tuned: Tuned, how: ModelConfig | None = None, *, quantised: bool = True) -> Loaded:
    """Load the model that the run started from.

    Args:
        tuned: What :func:`find_tuned` returned.
        how: Type of the weights, attention and the like.
        quantised: Quantise it as in training.

    Returns:
        The model, and the tuned model's tokenizer.

    Raises:
        ModelError: It is not known, is an adapter itself, or cannot be loaded.
        SetupError: A library is missing.
    """
    if tuned.base is None:
        raise ModelError(
            "the folder does not say which model it was tuned from",
            where=str(tuned.folder),
            remedy="name it with --base_model",
        )
    if tuned.is_adapter and holds_adapter(tuned.base):
        raise ModelError(
            "the base model is an adapter itself",
            where=str(tuned.folder / ADAPTER_FILE),
            value=tuned.base,
            remedy=f"run preftune export {tuned.base} first, then give the result as --base_model",
        )
    how = replace(
        how or ModelConfig(),
        model_name_or_path=tuned.base,
        model_revision=tuned.base_revision,
        tokenizer_name_or_path=_tokenizer(tuned),
        use_peft=False,
    )
    if not (quantised and tuned.quantised):
        return load_model_and_tokenizer(how)
    from preftune.models.loading import quantization_config_from

    names = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
    trained: dict[str, Any] = {name: tuned.settings["model"].get(name, getattr(how, name)) for name in names}
    config = quantization_config_from(replace(how, **{**trained, tuned.quantised: True}))
    return load_model_and_tokenizer(
        how, model_init_kwargs={"quantization_config": config, "device_map": {"": _device()}}
    )


def load_reference(tuned: Tuned, how: ModelConfig | None = None) -> Loaded:
    """Load the model that training compared with.

    Args:
        tuned: What :func:`find_tuned` returned.
        how: Type of the weights, attention and the like.

    Returns:
        The model, and the tuned model's tokenizer.

    Raises:
        ModelError: It is not known, or cannot be loaded.
        SetupError: A library is missing.
    """
    if tuned.reference in (None, tuned.base):
        return load_base(tuned, how)
    return load_model_and_tokenizer(
        replace(
            how or ModelConfig(),
            model_name_or_path=tuned.reference,
            tokenizer_name_or_path=_tokenizer(tuned),
            use_peft=False,
        )
    )


def attach(tuned: Tuned, base: Any, tokenizer: Any) -> Any:
    """Put the adapter onto its base.

    Args:
        tuned: What :func:`find_tuned` returned.
        base: The base model.
        tokenizer: The tuned model's tokenizer; a base with fewer embeddings gets as many as it has tokens.

    Returns:
        The ``PeftModel``, in evaluation mode.

    Raises:
        ModelError: The adapter does not fit, or its weights are missing.
    """
    from peft import PeftModel

    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    try:
        return PeftModel.from_pretrained(base, str(tuned.folder)).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        said = " ".join(str(error).split())[:200]
        raise ModelError(
            f"the adapter does not fit its base model ({said})", where=str(tuned.folder), value=tuned.base
        ) from error


def _device() -> str:
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def _tokenizer(tuned: Tuned) -> str | None:
    """Folder or name of the tokenizer: the run's own, or else the one it was trained with."""
    if any(tuned.folder.glob("tokenizer*")):
        return str(tuned.folder)
    trained_with = tuned.settings.get("model", {}).get("tokenizer_name_or_path")
    return str(trained_with) if trained_with else tuned.base


def _with_weights(folder: Path) -> Path:
    if folder.is_file():
        raise ModelError("a file, not a run's folder", where=str(folder), remedy=f"did you mean {folder.parent}?")
    if not folder.is_dir():
        raise ModelError("no such run", where=str(folder), remedy="give the output_dir of a training run")
    for place in (folder, *(folder / name for name in _INSIDE)):
        if (place / ADAPTER_FILE).is_file() or (place / "config.json").is_file():
            return place
    checkpoints = [(int(m[1]), p) for p in folder.iterdir() if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    remedy = f"did you mean {max(checkpoints)[1]}?" if checkpoints else "train first, or give another folder"
    raise ModelError(
        "no weights here", where=str(folder), allowed=f"a folder with {ADAPTER_FILE} or config.json", remedy=remedy
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot be read ({' '.join(str(error).split())[:120]})", where=str(path)) from error
    return content if isinstance(content, dict) else {}


def _values(settings: Any) -> dict[str, dict[str, Any]]:
    """``{role: {name: {"value": v, ...}}}`` of a record as ``{role: {name: v}}``."""
    roles = settings if isinstance(settings, dict) else {}
    return {
        str(role): {str(k): v.get("value") for k, v in names.items() if isinstance(v, dict)}
        for role, names in roles.items()
        if isinstance(names, dict)
    }
