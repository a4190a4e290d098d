"""Rows as the trainer sees them: every token with what becomes of it. The terminal and the live page show these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from preftune.data import batches
from preftune.data.arrow import rows_of
from preftune.data.formats.base import BadRow
from preftune.data.options import DataOptions
from preftune.data.preference import PairWorker, enclosed, pair_format, pair_rows
from preftune.data.rows import BadRowHandler, to_error
from preftune.data.sft import SftWorker, sft_format
from preftune.data.sft_tokens import enter
from preftune.data.stages import Stages
from preftune.data.tokenise import TokenisedPair, sequences, tokenise_pairs
from preftune.data.truncation import TokenPair, truncate
from preftune.data.unpaired import UnpairedWorker, labelled_rows
from preftune.errors import DataError
from preftune.verbs import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT, CHOSEN, REJECTED, DROPPED, TRAINED = "prompt", "chosen", "rejected", "dropped", "trained on"
DESIRABLE, UNDESIRABLE = "desirable", "undesirable"

#: Labels that tokens of each kind of row may have.
LABELS: Mapping[Kind, tuple[str, ...]] = {
    "pairs": (PROMPT, CHOSEN, REJECTED, DROPPED),
    "labelled": (PROMPT, DESIRABLE, UNDESIRABLE, DROPPED),
    "sft": (PROMPT, TRAINED, DROPPED),
}
#: Verbs whose sequences stand between beginning- and end-of-sequence tokens, whatever the template writes.
ENCLOSING = ("orpo", "cpo")
#: What a mask of tokens alone does not tell about a verb.
REMARKS: Mapping[str, str] = {"orpo": "the supervised term of orpo covers the prompt of the chosen sequence too"}

Labelled = tuple[int, str]


@dataclass(frozen=True)
class Shown:
    """One row.

    Attributes:
        sequences: By name, its sequences as token ids with one of :data:`LABELS` each.
        problem: What is wrong with a row that cannot be used; it then has no sequences.
        dropped: Why truncation drops the whole row.
        merged: End of the prompt alone that no sequence contains, because its tokens merge with the answer's.
        plain: Whether it is plain text that is trained on without the tokenizer's chat template.
    """

    sequences: Mapping[str, list[Labelled]] = field(default_factory=dict)
    problem: str | None = None
    dropped: str | None = None
    merged: tuple[int, ...] = ()
    plain: bool = False


class Viewer:
    """Rows of a data set with the mask that the loss sees.

    Args:
        dataset: Rows of any format.
        tokenizer: Tokenizer of the model.
        options: Data options.
        kind: What the rows are for.
        completion_only_loss: As in ``prepare_sft``.
        assistant_only_loss: As in ``prepare_sft``.
        text_field: Column of plain text, for ``sft``.
        name: Name of the data set, for messages.

    Raises:
        DataError: A format that does not fit the kind.
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: PreTrainedTokenizerBase,
        options: DataOptions,
        kind: Kind = "pairs",
        *,
        completion_only_loss: bool | None = None,
        assistant_only_loss: bool = False,
        text_field: str = "text",
        name: str = "train",
    ) -> None:
        dataset, _ = batches.materialise(dataset, name)
        self.kind, self.options, self.name, self.tokenizer = kind, options, name, tokenizer
        self._worker: PairWorker | SftWorker | UnpairedWorker
        if kind == "sft":
            spec = sft_format(dataset, options, name, text_field)
            self._worker = SftWorker(
                tokenizer,
                options,
                spec.name,
                name,
                text_field=text_field,
                completion_only_loss=completion_only_loss,
                assistant_only_loss=assistant_only_loss,
            )
        elif kind == "labelled":
            stages = Stages.begin(dataset, options, name)
            self._worker = UnpairedWorker(tokenizer, options, name, format_name=labelled_rows(stages))
            dataset = stages.dataset
        else:
            stages = Stages.begin(dataset, options, name)
            spec = pair_rows(stages, pair_format(dataset, options, name))
            self._worker, dataset = PairWorker(tokenizer, options, spec, name), stages.dataset
        self._dataset = dataset

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._dataset)

    def row(self, index: int) -> Shown:
        """One row.

        Args:
            index: Its number.

        Returns:
            The row; bad rows come with their reason, whatever the policy about them.

        Raises:
            DataError: No such row.
        """
        if not 0 <= index < len(self):
            where = f"{self.name} data set"
            raise DataError("no such row", where=where, value=index, allowed=f"0 to {len(self) - 1}")
        outcomes, _, rows = self._worker.canonical(rows_of(self._dataset, [index]), [index], BadRowHandler("skip"))
        if not rows:
            return Shown(problem=f"bad row: {outcomes[0].bad}")
        found = self._shown(rows[0])
        if isinstance(found, BadRow):
            return Shown(problem=str(to_error(found, "row")))
        return replace(found, plain=bool(outcomes[0].flags & batches.PLAIN) and self.options.plain_text == "text")

    def _shown(self, row: dict[str, Any]) -> Shown | BadRow:
        worker = self._worker
        if isinstance(worker, SftWorker):
            example = worker.examples([row])[0]
            if isinstance(example, BadRow):
                return example
            worker.append_eos(row, example)
            outcome = batches.Outcome()
            enter(outcome, example.ids, example.mask, self.options)
            dropped = outcome.status or None
            return Shown({TRAINED: worker.labels(example)}, dropped=dropped, merged=tuple(example.merged))
        if isinstance(worker, UnpairedWorker):
            (parts,) = sequences(worker.encoder, [row], ("completion",))
            if isinstance(parts, BadRow):
                return parts
            answer = worker.answer(row, parts)
            if isinstance(answer, BadRow):
                return answer
            label = DESIRABLE if row["label"] else UNDESIRABLE
            tokens, reason = label_answer(answer.prompt, answer.completion, label, self.options)
            tokens = _masked(tokens, label, len(answer.prompt), answer.mask)
            return Shown({label: tokens}, dropped=reason, merged=tuple(answer.merged))
        (pair,) = tokenise_pairs(worker.encoder, [row], self.options.append_eos, enclosed=self.options.enclose)
        if isinstance(pair, BadRow):
            return pair
        before = pair
        if self.options.enclose:
            pair = replace(pair, ids=enclosed(pair.ids, self.tokenizer))
        masks = worker.masks(row, before)
        if isinstance(masks, BadRow):
            return masks
        labelled, reason = label_pair(pair, self.options)
        for name, mask in zip((CHOSEN, REJECTED), masks, strict=True):
            labelled[name] = _masked(labelled[name], name, len(pair.ids.prompt), mask)
        return Shown(labelled, dropped=reason, merged=tuple(pair.merged))


def label_pair(result: TokenisedPair, options: DataOptions) -> tuple[dict[str, list[Labelled]], str | None]:
    """Every token of the two sequences with what becomes of it.

    Args:
        result: The pair before truncation.
        options: Data options.

    Returns:
        ``chosen`` and ``rejected`` -> tokens with ``prompt``, ``chosen``, ``rejected`` or ``dropped``; and the reason
        why the whole row is dropped, or ``None``. A completion token that nothing precedes counts as prompt: it is in
        the sequence, and no loss falls on it.
    """
    kept, reason = truncate(result.ids, options.max_length, options.max_prompt_length, options.truncation_mode)
    out = {}
    for name, answer in ((CHOSEN, result.ids.chosen), (REJECTED, result.ids.rejected)):
        if kept is None:
            out[name] = [(token, DROPPED) for token in (*result.ids.prompt, *answer)]
            continue
        prompt = kept.prompt if name == CHOSEN or kept.rejected_prompt is None else kept.rejected_prompt
        completion = kept.chosen if name == CHOSEN else kept.rejected
        lengths = (len(prompt), len(completion))
        out[name] = _labelled(result.ids.prompt, answer, lengths, name, options.truncation_mode)
    return out, reason


def label_answer(
    prompt: Sequence[int], completion: Sequence[int], label: str, options: DataOptions
) -> tuple[list[Labelled], str | None]:
    """Every token of one answer with what becomes of it; as :func:`label_pair`.

    Args:
        prompt: Prompt tokens before truncation.
        completion: Completion tokens before truncation.
        label: Label of the completion's tokens.
        options: Data options.

    Returns:
        The tokens, and the reason why the whole row is dropped, or ``None``.
    """
    whole = TokenPair(list(prompt), list(completion), list(completion))
    kept, reason = truncate(whole, options.max_length, options.max_prompt_length, options.truncation_mode)
    if kept is None:
        return [(token, DROPPED) for token in (*prompt, *completion)], reason
    lengths = (len(kept.prompt), len(kept.chosen))
    return _labelled(prompt, completion, lengths, label, options.truncation_mode), None


def _labelled(
    prompt: Sequence[int], answer: Sequence[int], num_kept: tuple[int, int], label: str, mode: str
) -> list[Labelled]:
    labels = _window(len(prompt), num_kept[0], PROMPT, mode)
    answer_labels = _window(len(answer), num_kept[1], label, mode)
    if not num_kept[0]:
        answer_labels[answer_labels.index(label)] = PROMPT
    return list(zip((*prompt, *answer), labels + answer_labels, strict=True))


def _masked(tokens: list[Labelled], label: str, start: int, mask: list[int] | None) -> list[Labelled]:
    """Tokens of turns that the model does not write count as prompt: they are there, and no loss falls on them."""
    for position, bit in enumerate(mask or (), start=start):
        if not bit and tokens[position][1] == label:
            tokens[position] = (tokens[position][0], PROMPT)
    return tokens


def _window(length: int, num_kept: int, label: str, mode: str) -> list[str]:
    kept, dropped = [label] * num_kept, [DROPPED] * (length - num_kept)
    return dropped + kept if mode == "keep_end" else kept + dropped
