"""Libraries that only the audit needs: imported when a check runs, with a remedy where they are missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from preftune.errors import SetupError


def optional(module: str, package: str) -> Any:
    """An optional module.

    Args:
        module: Its name, for example ``sklearn.linear_model``.
        package: The distribution that holds it, for the remedy.

    Returns:
        The module.

    Raises:
        SetupError: It is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if not module.startswith(error.name or "?"):
            raise
        raise SetupError(
            "the audit needs a library that is not installed",
            where="preftune data audit",
            value=package,
            remedy=f"pip install {package}",
        ) from error
