"""Examples of supervised fine-tuning that are tokenised already, and truncation of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preftune.data import batches
from preftune.data.batches import Outcome
from preftune.data.options import DataOptions
from preftune.data.truncation import EMPTY, NOT_SCORED, Ids
from preftune.data.worker import place_of
from preftune.errors import DataError

SFT_COLUMNS = ("input_ids", "loss_mask")


class TokenisedSftWorker:
    """Examples that are tokenised already: the mask is taken over, and only truncation is left to do.

    Args:
        options: Data options.
        name: Name of the data set, for messages.
        mask_columns: Columns of zeros and ones that all have to be 1 where a token is trained on.
    """

    columns = SFT_COLUMNS
    floats: tuple[str, ...] = ()

    def __init__(self, options: DataOptions, name: str, mask_columns: Sequence[str]) -> None:
        self.options = options
        self.name = name
        self.mask_columns = tuple(mask_columns)

    def outcomes(self, rows: list[dict[str, Any]], indices: Sequence[int]) -> list[Outcome]:
        """One outcome per row."""
        out = []
        for row, index in zip(rows, indices, strict=True):
            outcome = Outcome()
            enter(
                outcome, row["input_ids"], given_mask(row, place_of(self.name, index), self.mask_columns), self.options
            )
            out.append(outcome)
        return out


def given_mask(row: Mapping[str, Any], place: str, mask_columns: Sequence[str] = ()) -> list[int]:
    """The loss mask of a row of token ids.

    Args:
        row: ``input_ids``, and ``loss_mask``, ``labels`` or other columns of zeros and ones.
        place: How messages call the row.
        mask_columns: Such other columns, which all have to be 1 where a token is trained on.

    Raises:
        DataError: A column holds no list of the right length, or a label is another token than the one that is there.
    """
    lists: dict[str, list[int]] = {}
    for column in ("input_ids", "loss_mask", "labels", *mask_columns):
        value = row.get(column)
        if value is None and column != "input_ids":
            continue
        if not isinstance(value, list):
            raise DataError("no list of numbers", where=f"{place}, field {column!r}", value=value)
        lists[column] = value
        if len(value) != len(lists["input_ids"]):
            what = f"{len(value)} entries for {len(lists['input_ids'])} tokens"
            raise DataError(what, where=f"{place}, field {column!r}", remedy="give one for every token")
    ids = lists.pop("input_ids")
    if "loss_mask" in lists:
        return list(lists["loss_mask"])
    if "labels" in lists:
        return _label_mask(ids, lists["labels"], place)
    return [int(all(bits)) for bits in zip(*lists.values(), strict=True)] if lists else [1] * len(ids)


def _label_mask(ids: Sequence[int], labels: Sequence[int], place: str) -> list[int]:
    for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (-100, token):
            raise DataError(
                f"the label at position {position} is neither -100 nor the token that stands there ({token})",
                where=f"{place}, field 'labels'",
                value=label,
                remedy="give unshifted labels: copies of input_ids with -100 for what is not trained on",
            )
    return [int(label != -100) for label in labels]


def enter(outcome: Outcome, ids: Ids, mask: list[int], options: DataOptions) -> None:
    """Truncate an example and enter it into an outcome, or the reason why nothing is left to learn from."""
    if options.max_length is not None and len(ids) > options.max_length:
        part = slice(-options.max_length, None) if options.truncation_mode == "keep_end" else slice(options.max_length)
        ids, mask = ids[part], mask[part]
        outcome.flags |= batches.TRUNCATED
    # Nothing stands before the first token, so nothing predicts it.
    if 1 not in mask[1:]:
        outcome.status = NOT_SCORED if 1 in mask else EMPTY
        return
    outcome.lists = (ids, mask)
