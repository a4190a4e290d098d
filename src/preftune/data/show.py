"""Prints rows the way the model will see them: prompt, completions, what truncation drops, what is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from preftune.data import batches
from preftune.data.formats.base import BadRow
from preftune.data.options import DataOptions
from preftune.data.prepare import PairWorker, pair_format, pair_rows
from preftune.data.rows import BadRowHandler, to_error
from preftune.data.sft import SftWorker, sft_format
from preftune.data.tokenise import TokenisedPair, tokenise_pairs
from preftune.data.truncate import truncate
from preftune.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

PROMPT, CHOSEN, REJECTED, DROPPED, TRAINED = "prompt", "chosen", "rejected", "dropped", "trained on"

_STYLES = {PROMPT: "cyan", CHOSEN: "green", REJECTED: "red", DROPPED: "strike dim yellow", TRAINED: "green"}
# Without colours the same facts are said with brackets.
_BRACKETS = {
    PROMPT: ("", ""),
    CHOSEN: ("[+", "+]"),
    REJECTED: ("[-", "-]"),
    DROPPED: ("[~", "~]"),
    TRAINED: ("[+", "+]"),
}

Labelled = tuple[int, str]


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
        labels = _window(len(result.ids.prompt), len(prompt), PROMPT, options.truncation_mode)
        answer_labels = _window(len(answer), len(completion), name, options.truncation_mode)
        if not prompt:
            answer_labels[answer_labels.index(name)] = PROMPT
        out[name] = list(zip((*result.ids.prompt, *answer), labels + answer_labels, strict=True))
    return out, reason


def _window(length: int, num_kept: int, label: str, mode: str) -> list[str]:
    kept, dropped = [label] * num_kept, [DROPPED] * (length - num_kept)
    return dropped + kept if mode == "keep_end" else kept + dropped


def to_text(tokens: Sequence[Labelled], tokenizer: PreTrainedTokenizerBase, colour: bool) -> Text:
    """Labelled tokens as a Rich text; without colour the labels become brackets."""
    from rich.text import Text

    text = Text()
    for label, run in groupby(tokens, key=lambda item: item[1]):
        decoded = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        before, after = ("", "") if colour else _BRACKETS[label]
        text.append(before + _printable(str(decoded)) + after, style=_STYLES[label])
    return text


def _printable(text: str) -> str:
    """Text without control characters: data must not be able to steer the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def show(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    *,
    num_rows: int = 5,
    start: int = 0,
    sft: bool = False,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    name: str = "train",
    console: Console | None = None,
) -> None:
    """Print rows with prompt, chosen, rejected and dropped tokens in colours; the colours are the real loss mask.

    Args:
        dataset: Rows of any format.
        tokenizer: Tokenizer of the model.
        options: Data options.
        num_rows: Number of rows to print.
        start: First row.
        sft: Show examples for supervised fine-tuning.
        completion_only_loss: As in ``prepare_sft``.
        assistant_only_loss: As in ``prepare_sft``.
        name: Name of the data set.
        console: Where to print; standard output by default.

    Raises:
        DataError: No such rows, or a format that cannot be shown.
    """
    from rich.console import Console

    console = console or Console()
    dataset, _ = batches.materialise(dataset, name)
    if not 0 <= start < len(dataset):
        raise DataError("no such row", where=f"{name} data set", value=start, allowed=f"0 to {len(dataset) - 1}")
    if sft:
        format_name = sft_format(dataset, options, name, "text").name
        worker: Any = SftWorker(
            tokenizer,
            options,
            format_name,
            name,
            completion_only_loss=completion_only_loss,
            assistant_only_loss=assistant_only_loss,
        )
    else:
        dataset, spec, _, _ = pair_rows(dataset, pair_format(dataset, options, name), options, name)
        worker = PairWorker(tokenizer, options, spec, name)
    labels = (PROMPT, TRAINED, DROPPED) if sft else (PROMPT, CHOSEN, REJECTED, DROPPED)
    _print_legend(console, labels)
    # Bad rows are what somebody looks for here: they are shown with their reason, whatever the policy.
    handler = BadRowHandler("skip")
    for index in range(start, min(start + num_rows, len(dataset))):
        console.rule(f"{name} row {index}", align="left")
        _print_row(dataset[index], index, worker, handler, console)


def _print_legend(console: Console, labels: Sequence[str]) -> None:
    from rich.text import Text

    legend = Text()
    for label in labels:
        before, after = ("", "") if console.color_system else _BRACKETS[label]
        legend.append(before + label + after, style=_STYLES[label]).append("  ")
    console.print(legend)


def _print_row(raw: dict[str, Any], index: int, worker: Any, handler: BadRowHandler, console: Console) -> None:
    from rich.text import Text

    colour = console.color_system is not None
    outcomes, _, rows = worker.canonical([raw], [index], handler)
    if not rows:
        console.print(Text(f"bad row: {outcomes[0].bad}", style="bold red"))
        return
    if isinstance(worker, SftWorker):
        result: Any = worker.examples(rows)[0]
        results = {TRAINED: worker.labels(result)} if not isinstance(result, BadRow) else {}
        reason = None
    else:
        result = tokenise_pairs(worker.encoder, rows, worker.options.append_eos)[0]
        results, reason = ({}, None) if isinstance(result, BadRow) else label_pair(result, worker.options)
    if isinstance(result, BadRow):
        console.print(Text(str(to_error(result, "row")), style="bold red"))
        return
    if reason:
        console.print(Text(f"the whole row is dropped: {reason}", style="bold yellow"))
    for title, tokens in results.items():
        counts = {label: sum(one == label for _, one in tokens) for label in dict.fromkeys(one for _, one in tokens)}
        summary = ", ".join(f"{count} {label}" for label, count in counts.items())
        console.print(Text(f"{title}: {len(tokens)} tokens ({summary})", style="bold"))
        console.print(to_text(tokens, worker.encoder.tokenizer, colour))
    if result.merged:
        end = _printable(str(worker.encoder.tokenizer.decode(result.merged)))
        console.print(Text(f"left out, tokens merge here: the prompt alone ends with {end!r}", style="yellow"))
