"""The end result: model, settings and figures beside the checkpoints, each file in one step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preftune.config import redact
from preftune.files import write_text
from preftune.ownership import RunFolder
from preftune.ownership.paths import move_aside
from preftune.training.provenance import plain

_SETTINGS = "training_args.json"


def write_model(folder: Path, model: Any, processing: Any, state_dict: Any, args: Any) -> None:
    """Write model, tokenizer and settings; those as JSON and without secrets, not pickled as transformers would.

    Args:
        folder: Where to.
        model: The model, not wrapped.
        processing: Tokenizer or processor; ``None`` for none.
        state_dict: Its weights where they have been gathered already.
        args: The settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if state_dict is not None:
        _tie(model, state_dict)
    model.save_pretrained(str(folder), state_dict=state_dict, is_main_process=True)
    if processing is not None:
        processing.save_pretrained(str(folder))
    settings = redact(plain(args.to_dict()))
    write_text(folder / _SETTINGS, json.dumps(settings, indent=1, sort_keys=True) + "\n")


def _tie(model: Any, state_dict: Any) -> None:
    """Let tied parameters be one tensor in gathered weights too, so that they are written once."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in state_dict:
            state_dict[name] = state_dict[first.setdefault(id(parameter), name)]


def write_metrics(run: RunFolder, split: str, metrics: Mapping[str, float], *, combined: bool) -> None:
    """Write ``{split}_results.json`` and add to ``all_results.json``.

    A torn file of an earlier, killed run makes room, where transformers would fail to read it.

    Args:
        run: The output folder.
        split: What the figures are of.
        metrics: The figures.
        combined: Whether ``all_results.json`` is written.
    """
    folder = run.folder
    results = {f"{split}_results.json": dict(metrics)}
    if combined:
        try:
            before = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
        except ValueError:
            before = {}
            if not run.may_put("all_results.json"):
                move_aside(folder / "all_results.json", folder)
        except OSError:
            before = {}
        results["all_results.json"] = {**(before if isinstance(before, dict) else {}), **metrics}
    for name, figures in results.items():
        run.put_text(name, json.dumps(figures, indent=4, sort_keys=True) + "\n")
