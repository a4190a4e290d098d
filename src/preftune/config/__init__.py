"""YAML and flags to typed settings; old and foreign names translated; typing errors get a 'did you mean'."""

from __future__ import annotations

from preftune.config.model import ModelConfig
from preftune.config.resolution import Origin, Resolved, resolve
from preftune.config.script import ScriptConfig
from preftune.config.secrets import is_secret, redact, redact_argv
from preftune.config.sources import CommandLine, split_command_line

__all__ = [
    "CommandLine",
    "ModelConfig",
    "Origin",
    "Resolved",
    "ScriptConfig",
    "is_secret",
    "redact",
    "redact_argv",
    "resolve",
    "split_command_line",
]
