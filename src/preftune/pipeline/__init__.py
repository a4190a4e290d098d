"""The whole path from a file of rows to a judged model: audit, settings, training, evaluation, report."""

from preftune.pipeline.choices import Asked, Choice
from preftune.pipeline.stages import Pipeline

__all__ = ["Asked", "Choice", "Pipeline"]
