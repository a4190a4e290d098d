"""From a packed row to per-token log-probs, through the model's own forward.

Two paths compute the same numbers. The *packed* path runs the row as it is, with shared prompts computed once. The
*padded* path unfolds the row into separate right-padded sequences; it serves models whose attention cannot be packed
and is the oracle of the packed path's tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from preftune.errors import ModelError
from preftune.kernels.attention import RowContext
from preftune.kernels.device import put_together
from preftune.kernels.head import HeadTransform, TokenScores, scores_from_logits, token_scores
from preftune.models.attention import KEYWORD, attention_configs, packed_attention
from preftune.models.compiled import CompiledLayers
from preftune.models.head import HeadProbe, base_model, find_head, head_parameters, probe_head, replaced_head
from preftune.packing import PackedRow, plan_rows

#: Packed rows, and the tokens that the head scores, are filled up to a multiple of this, in half precision on the CPU
#: and always on an accelerator. For every shape of a matmul oneDNN compiles and keeps a kernel, a megabyte and a few
#: milliseconds each; an accelerator's allocator keeps blocks of the sizes it has seen. Rows of any length and any
#: number of targets would need new ones always, and memory would grow with the data.
ROW_MULTIPLE = 64
#: On an accelerator long rows are filled up further, by less than this share of their length: few shapes serve all.
_FILLED_SHARE = 32


@dataclass
class RowForward:
    """A model prepared to score packed rows.

    Attributes:
        model: The policy or reference, without distributed wrappers.
        packed: Packed or padded path.
        backend: Attention backend of the packed path.
        head: What was found out about the head.
        pad_token_id: Fills padded batches; masked out everywhere.
        row_multiple: What rows and their targets are filled up to a multiple of; 1 leaves them as they are.
        compiled: Compiled parts of the model's layers, to be used in their place.
        alone: Whether every example needs a row of its own, since others beside it would change its numbers.
        backends_used: Attention backends that have served so far.
    """

    model: nn.Module
    packed: bool
    backend: str
    head: HeadProbe
    pad_token_id: int = 0
    row_multiple: int = ROW_MULTIPLE
    compiled: CompiledLayers | None = None
    alone: bool = False

    def __post_init__(self) -> None:
        self.backends_used: set[str] = set()
        self._configs = attention_configs(base_model(self.model))

    @classmethod
    def of(cls, model: nn.Module, *, packed: bool, backend: str = "auto", pad_token_id: int = 0) -> RowForward:
        """Probe the model's head and build the forward."""
        return cls(model, packed, backend, probe_head(model), pad_token_id)

    def rows_of(self, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
        """Examples of so many tokens by row, as :func:`preftune.packing.plan_rows`, or each by itself."""
        return [[n] for n in range(len(lengths))] if self.alone else plan_rows(lengths, max_tokens)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Must surround the forward *and* the backward of every row."""
        with (
            packed_attention(self._configs) if self.packed else nullcontext(),
            self.compiled.active() if self.compiled else nullcontext(),
        ):
            yield

    def __call__(
        self,
        row: PackedRow,
        *,
        wrapped: nn.Module | None = None,
        with_stats: bool = False,
        with_log_sum_sq: bool = False,
        with_tail: bool = False,
        extra: dict[str, Any] | None = None,
    ) -> tuple[TokenScores, Any]:
        """Score the row's ``N`` target tokens.

        Args:
            row: The packed row.
            wrapped: Distributed wrapper of the model to call instead of it.
            with_stats: Also compute entropy, mean logit and top-1.
            with_log_sum_sq: Also compute ``log sum p^2``.
            with_tail: Also compute how far out each token is in its distribution.
            extra: Further keywords for the model's forward.

        Returns:
            Scores in the order of the row's targets, and the model's output object (whose logits are placeholders).
        """
        device = next(self.model.parameters()).device
        arrays, source = self._packed_arrays(row, device) if self.packed else self._padded_arrays(row)
        num_targets = len(row.target_ids)
        filler = self._filler(num_targets, device)
        placed = put_together(
            [np.pad(source, (0, filler)), np.pad(row.target_ids, (0, filler)), *(a.ravel() for a in arrays.values())],
            device,
        )
        source_index, targets = placed[:2]
        inputs = {name: t.view(arrays[name].shape) for name, t in zip(arrays, placed[2:], strict=True)}
        options_of_row = {KEYWORD: self.last_context} if self.packed else {}
        options = {"with_stats": with_stats, "with_log_sum_sq": with_log_sum_sq, "with_tail": with_tail}
        found: list[TokenScores] = []
        head = find_head(self.model)
        transform = self.head.transform
        original = head.forward

        def score(hidden: Tensor) -> Tensor:
            picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, source_index)
            # Read here and not before: a sharded head is a plain, whole tensor only within the wrapped forward.
            parameters = head_parameters(head)
            if transform is None or parameters is None:
                logits: Tensor = original(picked.unsqueeze(0))
                return logits
            found.append(_fused_scores(picked, parameters, targets, transform, options))
            # Distributed wrappers follow the graph from the model's outputs, so the result has to pass through them.
            return found[0].logps.view(1, -1, 1)

        def passed_on(*given: Any) -> None:
            # What wrappers have hung on the head's output, such as gathering its weight for the backward, is used.
            if found:
                found[0] = replace(found[0], logps=given[-1].view(-1))

        with replaced_head(head, score, passed_on) if self.head.called else nullcontext():
            output = (wrapped or self.model)(**inputs, **options_of_row, use_cache=False, **(extra or {}))
        if found:
            return found[0].first(num_targets), output
        logits = output.logits.reshape(-1, output.logits.shape[-1])
        if not self.head.called:
            logits = logits.index_select(0, source_index)
        return scores_from_logits(logits, targets, **options).first(num_targets), output

    def _packed_arrays(self, row: PackedRow, device: torch.device) -> tuple[dict[str, Any], Any]:
        filler = self._filler(row.num_tokens, device)
        self.last_context = RowContext(row.layout.extended(filler), self.backend, used=self.backends_used)
        ids = np.pad(row.input_ids, (0, filler), constant_values=self.pad_token_id)
        # A model may have learned few positions.
        positions = np.concatenate([row.position_ids, np.arange(filler) % ROW_MULTIPLE])
        return {"input_ids": ids[None], "position_ids": positions[None]}, row.source

    def _filler(self, length: int, device: torch.device) -> int:
        if device.type != "cpu":
            share = 1 << max(length.bit_length() - _FILLED_SHARE.bit_length(), 0)
            return -length % (max(self.row_multiple, share) if self.row_multiple > 1 else 1)
        half = torch.is_autocast_enabled("cpu") or next(self.model.parameters()).dtype.itemsize == 2
        return -length % self.row_multiple if half else 0

    def _padded_arrays(self, row: PackedRow) -> tuple[dict[str, Any], Any]:
        sequences, sources = unfold(row)
        longest = max(map(len, sequences))
        ids = np.full((len(sequences), longest), self.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for number, sequence in enumerate(sequences):
            ids[number, : len(sequence)] = sequence
            mask[number, : len(sequence)] = 1
        return {"input_ids": ids, "attention_mask": mask}, sources[:, 0] * longest + sources[:, 1]


def unfold(row: PackedRow) -> tuple[list[Any], Any]:
    """The separate sequences of a row, and where its targets are predicted in them.

    Returns:
        Token ids of every ``prefix + branch``, and an array ``(N, 2)`` of sequence number and position, in the order of
        the row's targets.
    """
    sequences, prefix_lengths = [], []
    for span in row.layout.spans:
        prefix = row.input_ids[span.start : span.start + span.prefix]
        for start, length in zip(span.branch_starts(), span.branches, strict=True):
            sequences.append(np.concatenate([prefix, row.input_ids[start : start + length]]))
            prefix_lengths.append(span.prefix)
    before = np.array(prefix_lengths, dtype=np.int64)[row.target_branch] + row.target_rank - 1
    return sequences, np.stack([row.target_branch, before], axis=1)


def _fused_scores(
    hidden: Tensor,
    parameters: tuple[Tensor, Tensor | None],
    targets: Tensor,
    transform: HeadTransform,
    options: dict[str, bool],
) -> TokenScores:
    weight, bias = parameters
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if weight.device != hidden.device:
        raise ModelError("the language-model head lies on another device than the hidden states it receives")
    return token_scores(hidden, weight, bias, targets, transform, compute_dtype=dtype, **options)
