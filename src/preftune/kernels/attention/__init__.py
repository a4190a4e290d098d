"""Attention over packed rows: a plain reference, fast backends, and the selection between them."""

from preftune.kernels.attention.reference import AttentionSpec
from preftune.kernels.attention.select import BACKEND_NAMES, RowContext, attend, check_kernel

__all__ = ["BACKEND_NAMES", "AttentionSpec", "RowContext", "attend", "check_kernel"]
