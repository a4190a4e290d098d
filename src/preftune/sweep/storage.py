"""Where a study is kept: a journal in the sweep's folder, or a database."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.config import redact
from preftune.errors import SetupError
from preftune.sweep.locks import journal_lock

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

JOURNAL_NAME = "study.journal"


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """Open the study's storage.

    Args:
        url: Database URL as SQLAlchemy takes it; ``None`` for a journal file in ``folder``.
        folder: The sweep's folder.

    Raises:
        SetupError: The database cannot be opened.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if url is None:
            from optuna.storages.journal import JournalFileBackend

            journal = folder / JOURNAL_NAME
            backend = JournalFileBackend(str(journal), lock_obj=journal_lock(journal))
            return optuna.storages.JournalStorage(backend)
        return optuna.storages.RDBStorage(url)
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        raise _storage_error(url, error) from error
    except Exception as error:
        # SQLAlchemy and the drivers have errors of their own.
        if type(error).__module__.partition(".")[0] not in ("sqlalchemy", "optuna", "alembic"):
            raise
        raise _storage_error(url, error) from error


def _storage_error(url: str | None, error: Exception) -> SetupError:
    said = " ".join(str(redact(str(error))).split())[:200]
    remedy = "check the URL, for example sqlite:///study.db, and that its driver is installed"
    return SetupError(f"the study cannot be opened ({said})", where="--storage", value=redact(url), remedy=remedy)


def pruner_of(name: str) -> Any:
    """Optuna's pruner of this name."""
    import optuna

    # Half of the trials that got as far were better; the first four trials are never cut short.
    kinds = {"none": optuna.pruners.NopPruner, "median": optuna.pruners.MedianPruner}
    kinds["halving"] = optuna.pruners.SuccessiveHalvingPruner
    return kinds[name]()
