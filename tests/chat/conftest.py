"""Runs to talk with: those that exports are made of."""

from tests.export.conftest import base, make_run

__all__ = ["base", "make_run"]
