"""The version, for modules that would import the whole package to know it."""

__version__ = "0.1.0"
