"""From a run to a model that others can use: merged weights, GGUF, what serving needs, and what was lost on the way."""

from preftune.export.exporter import Export, ExportOptions, export

__all__ = ["Export", "ExportOptions", "export"]
