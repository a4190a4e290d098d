"""Integers only: how examples are laid out as packed rows under a token budget."""

from preftune.packing.layout import Branch, RowLayout, Tree, TreeSpan
from preftune.packing.plan import plan_rows, share_out
from preftune.packing.rows import PackedRow, build_row, pair_trees

__all__ = ["Branch", "PackedRow", "RowLayout", "Tree", "TreeSpan", "build_row", "pair_trees", "plan_rows", "share_out"]
