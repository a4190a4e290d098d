"""Progress bars of the libraries, hidden where something else tells how far the work is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any


@contextmanager
def hidden_bars(*, of_transformers: bool = True) -> Iterator[None]:
    """Hide the bars of ``datasets``, and of ``transformers`` too, as long as the block runs."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with _hidden_of_transformers() if of_transformers else nullcontext():
            yield
    finally:
        if shown:
            enable_progress_bars()


@contextmanager
def _hidden_of_transformers() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def take_bars(trainer: Any) -> None:
    """Take the library's own bar and printed log lines away from a ``transformers.Trainer``."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for kind in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(kind)
