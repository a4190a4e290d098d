"""Rows of a run's training data, token by token, with the mask that the loss sees."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from preftune.data.options import DataOptions
from preftune.data.token_view import ENCLOSING, LABELS, REMARKS, Viewer
from preftune.errors import DataError
from preftune.report.files import mapping
from preftune.report.read import Run, read_run
from preftune.verbs import ROWS

MAX_ROWS = 20
_OPTIONS = (
    "max_length",
    "max_prompt_length",
    "truncation_mode",
    "implicit_prompt",
    "append_eos",
    "transcripts",
    "plain_text",
    "environment_turns",
)
_TOKENIZER = ("model_revision", "tokenizer_name_or_path", "chat_template")
_MASKS = ("completion_only_loss", "assistant_only_loss")
_SOURCES = ("dataset_mixture", "dataset_mixer")
_WORDS = {
    "prompt": "prompt",
    "chosen": "chosen, trained on",
    "rejected": "rejected, trained on",
    "desirable": "desirable, trained on",
    "undesirable": "undesirable, trained on",
    "trained on": "trained on",
    "dropped": "dropped by truncation",
}


class Rows:
    """Keeps the data of one run loaded, the last one asked for."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._loaded: tuple[str, Viewer] | None = None

    def page(self, folder: Path, start: int) -> dict[str, Any]:
        """A few rows as the trainer sees them.

        Args:
            folder: Output folder of the run; its provenance, or else its ``config.yaml``, names data, tokenizer and
                settings.
            start: First row.

        Returns:
            ``total``, ``start`` and ``rows``: for each the index, the sequences as runs of text with a label, or what
            is wrong with it; ``legend``, the labels and what they mean; and a ``remark`` where there is one.

        Raises:
            DataError: The folder does not tell which data, or there is no such row.
        """
        if folder != self._folder or self._loaded is None:
            self._loaded, self._folder = _load(folder), folder
        verb, viewer = self._loaded
        if not 0 <= start < len(viewer):
            raise DataError("no such row", where="start", value=start, allowed=f"0 to {len(viewer) - 1}")
        rows = [_row(viewer, index) for index in range(start, min(start + MAX_ROWS, len(viewer)))]
        legend = [{"label": label, "text": _WORDS[label]} for label in LABELS[viewer.kind]]
        remark = REMARKS.get(verb)
        return {"total": len(viewer), "start": start, "rows": rows, "legend": legend, "remark": remark}


def _load(folder: Path) -> tuple[str, Viewer]:
    from preftune.config import ModelConfig
    from preftune.models.loading import load_tokenizer
    from preftune.training.setup import use_template_and_eos

    run = read_run(folder)
    values, verb = _values(run), _verb(run)
    model = values.get("model_name_or_path")
    if not isinstance(model, str):
        raise DataError("the folder does not tell which data were used", where=folder.name, remedy="wait for the end")
    # Code of a model's repository is never run here, whatever the run allowed.
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=model, **_given(values, _TOKENIZER)))
    known = _given(values, _OPTIONS)
    masks: dict[str, Any] = {}
    if verb == "sft":
        masks = _given(values, _MASKS)
        use_template_and_eos(tokenizer, values.get("chat_template_path"), values.get("eos_token"))
        known.pop("max_prompt_length", None)
    known["max_length"] = values.get("max_length", DataOptions.max_length)
    options = DataOptions(on_bad_rows="skip", enclose=verb in ENCLOSING, **known)
    return verb, Viewer(_rows(values, verb, folder), tokenizer, options, ROWS[verb], **masks)


def _rows(values: dict[str, Any], verb: str, folder: Path) -> Any:
    """The training split, from the places that the settings name."""
    from preftune.runs.data import load_rows

    if not (isinstance(values.get("dataset_name"), str) or _given(values, _SOURCES)):
        raise DataError("the folder does not tell which data were used", where=folder.name, remedy="wait for the end")
    own = {name: value for name, value in values.items() if name != "implicit_prompt"}
    if verb != "sft":
        own["implicit_prompt"] = values.get("implicit_prompt")
    return load_rows(own | {"on_bad_rows": "warn", "quarantine_path": None}, with_test=False)["train"]


def _values(run: Run) -> dict[str, Any]:
    """Settings by name, from the provenance or, before that is written, from ``config.yaml``."""
    settings = mapping(run.provenance.get("settings"))
    found = {name: mapping(entry).get("value") for role in settings.values() for name, entry in mapping(role).items()}
    return found or run.config


def _verb(run: Run) -> str:
    command = run.provenance.get("command")
    named = command[1] if isinstance(command, list) and len(command) > 1 else None
    return str(named) if named in ROWS else "dpo"


def _given(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: values[name] for name in names if values.get(name) is not None}


def _row(viewer: Viewer, index: int) -> dict[str, Any]:
    shown = viewer.row(index)
    sides = []
    for name, tokens in shown.sequences.items():
        runs = []
        for label, run in groupby(tokens, key=lambda item: item[1]):
            ids = [token for token, _ in run]
            text = str(viewer.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            runs.append({"label": label, "num_tokens": len(ids), "text": text})
        sides.append({"name": name, "num_tokens": len(tokens), "runs": runs})
    problem = f"the whole row is dropped: {shown.dropped.replace('_', ' ')}" if shown.dropped else shown.problem
    return {"index": index, "problem": problem, "sides": sides}
