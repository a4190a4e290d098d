"""Offline preference optimisation of language models: SFT and the DPO family, packed and prefix-shared.

``from preftune import DPOTrainer, DPOConfig`` is the only line that a TRL script has to change. Everything here is
imported on first use, so ``import preftune`` costs milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from preftune.threads import wait_passively
from preftune.version import __version__

wait_passively()

if TYPE_CHECKING:
    from preftune.errors import (
        ConfigError,
        DataError,
        ModelError,
        PreftuneError,
        SetupError,
        StoreError,
        TrainingError,
    )
    from preftune.training import (
        CPOConfig,
        CPOTrainer,
        DPOConfig,
        DPOTrainer,
        KTOConfig,
        KTOTrainer,
        ORPOConfig,
        ORPOTrainer,
        SFTConfig,
        SFTTrainer,
    )

_HOME_OF = {
    "CPOConfig": "preftune.training",
    "CPOTrainer": "preftune.training",
    "DPOConfig": "preftune.training",
    "DPOTrainer": "preftune.training",
    "KTOConfig": "preftune.training",
    "KTOTrainer": "preftune.training",
    "ORPOConfig": "preftune.training",
    "ORPOTrainer": "preftune.training",
    "SFTConfig": "preftune.training",
    "SFTTrainer": "preftune.training",
    "ConfigError": "preftune.errors",
    "DataError": "preftune.errors",
    "ModelError": "preftune.errors",
    "PreftuneError": "preftune.errors",
    "SetupError": "preftune.errors",
    "StoreError": "preftune.errors",
    "TrainingError": "preftune.errors",
}

__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "ConfigError",
    "DPOConfig",
    "DPOTrainer",
    "DataError",
    "KTOConfig",
    "KTOTrainer",
    "ModelError",
    "ORPOConfig",
    "ORPOTrainer",
    "PreftuneError",
    "SFTConfig",
    "SFTTrainer",
    "SetupError",
    "StoreError",
    "TrainingError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import an exported name when it is first asked for (PEP 562)."""
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the exported names as well, so that completion in a shell finds them."""
    return sorted({*globals(), *__all__})
