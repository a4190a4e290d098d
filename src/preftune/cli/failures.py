"""Failures that belong to the settings or to the machine, and warnings, each as one line."""

from __future__ import annotations

import errno
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console

from preftune.config.secrets import redact
from preftune.errors import ConfigError, PreftuneError, SetupError, printable


def flat(error: BaseException) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


@contextmanager
def trainer_errors() -> Iterator[None]:
    """What the library's trainer says about settings while it is built, as one line."""
    try:
        yield
    except PreftuneError:
        raise
    except ImportError as error:
        raise SetupError(flat(error), where="settings") from error
    except (ValueError, RuntimeError) as error:
        said = flat(error)
        if "requires" in said and "install" in said:
            raise SetupError(said, where="report_to", remedy="install it, or set report_to: none") from error
        if isinstance(error, ValueError):
            raise ConfigError(said, where="settings") from error
        raise
    except Exception as error:
        # A run that is to be pushed makes its repository first.
        if type(error).__module__.partition(".")[0] not in ("huggingface_hub", "httpx", "httpx2", "requests"):
            raise
        remedy = "run `hf auth login`, or leave push_to_hub out and run hf upload afterwards"
        raise SetupError(f"the Hub refuses ({flat(error)[:200]})", where="push_to_hub", remedy=remedy) from error


@contextmanager
def foreseen(args: Any) -> Iterator[None]:
    """Memory and disk that run out, and processes that die, are facts about the machine, said in one line."""
    import torch

    from preftune.training.workers import worker_errors

    try:
        with worker_errors(args):
            yield
    except torch.OutOfMemoryError as error:
        raise SetupError(
            f"the device ran out of memory ({flat(error)[:160]})",
            remedy="lower max_tokens_per_row or max_length, or use_peft",
        ) from error
    except OSError as error:
        if isinstance(error, PreftuneError) or error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EROFS,
            errno.EACCES,
        ):
            raise
        where = str(error.filename or args.output_dir)
        raise SetupError(
            f"cannot write ({error.strerror})", where=where, remedy="free some space, or set another output_dir"
        ) from error


@contextmanager
def plain_warnings(console: Console) -> Iterator[None]:
    """Show warnings as one line each, none of the libraries' notes to developers, and bars in a terminal alone."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, (DeprecationWarning, FutureWarning)) and not console.quiet:
            # Warnings quote files, addresses and answers of others.
            said = printable(str(redact(str(message))))
            Console(stderr=True).print(f"preftune: warning: {said}", markup=False, highlight=False, soft_wrap=True)

    with warnings.catch_warnings(), _no_bars_in_files():
        warnings.showwarning = show
        yield


@contextmanager
def _no_bars_in_files() -> Iterator[None]:
    """Where nobody watches, hide the bars that datasets draws while it copies rows."""
    if sys.stderr.isatty():
        yield
        return
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if were:
            enable_progress_bars()
