"""Failures that belong to the settings or to the machine, each as one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preftune.errors import ConfigError, PreftuneError, SetupError, flat
from preftune.files import system_error

_NO_WRITE = "cannot write"


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
    except SetupError as error:
        if not error.what.startswith(_NO_WRITE):
            raise
        raise _with_way_on(error, args.output_dir) from error
    except Exception as error:
        found = None if isinstance(error, PreftuneError) else system_error(error)
        if found is None or found.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        where = str(found.filename or args.output_dir)
        raise _with_way_on(
            SetupError(
                f"{_NO_WRITE} ({found.strerror})", where=where, remedy="free some space, or set another output_dir"
            ),
            args.output_dir,
        ) from error


def _with_way_on(error: SetupError, output_dir: Any) -> PreftuneError:
    """What could not be written, with the checkpoint from which the run goes on, where there is one."""
    from preftune.training.checkpoints.folders import find_checkpoint

    try:
        manifest = find_checkpoint(Path(str(output_dir))).manifest
    except (OSError, PreftuneError):
        return error
    if manifest is None:
        return error
    told = f"free some space, and the same command with --resume_from_checkpoint true goes on from {manifest.folder}"
    return error.with_parts(remedy=told)
