"""Prints rows the way the model will see them: prompt, completions, what truncation drops, what is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from preftune.data.options import DataOptions
from preftune.data.token_view import (
    CHOSEN,
    DESIRABLE,
    DROPPED,
    LABELS,
    PROMPT,
    REJECTED,
    TRAINED,
    UNDESIRABLE,
    Labelled,
    Shown,
    Viewer,
)
from preftune.errors import DataError
from preftune.verbs import Kind

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

_GOOD, _BAD = "green", "red"
_STYLES = {
    PROMPT: "cyan",
    DROPPED: "strike dim yellow",
    **dict.fromkeys((CHOSEN, DESIRABLE, TRAINED), _GOOD),
    **dict.fromkeys((REJECTED, UNDESIRABLE), _BAD),
}
# Without colours the same facts are said with brackets.
_BRACKETS = {
    PROMPT: ("", ""),
    DROPPED: ("[~", "~]"),
    **dict.fromkeys((CHOSEN, DESIRABLE, TRAINED), ("[+", "+]")),
    **dict.fromkeys((REJECTED, UNDESIRABLE), ("[-", "-]")),
}


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
    kind: Kind = "pairs",
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    text_field: str = "text",
    name: str = "train",
    console: Console | None = None,
) -> None:
    """Print rows with prompt, answers and dropped tokens in colours; the colours are the real loss mask.

    Args:
        dataset: Rows of any format.
        tokenizer: Tokenizer of the model.
        options: Data options.
        num_rows: Number of rows to print.
        start: First row.
        kind: ``pairs`` for preferences, ``labelled`` for answers that are desirable or not (pairs are taken apart),
            ``sft`` for examples of supervised fine-tuning.
        completion_only_loss: As in ``prepare_sft``.
        assistant_only_loss: As in ``prepare_sft``.
        text_field: Column of plain text, for ``sft``.
        name: Name of the data set.
        console: Where to print; standard output by default.

    Raises:
        DataError: No such rows, or a format that cannot be shown.
    """
    from rich.console import Console

    console = console or Console()
    viewer = Viewer(
        dataset,
        tokenizer,
        options,
        kind,
        completion_only_loss=completion_only_loss,
        assistant_only_loss=assistant_only_loss,
        text_field=text_field,
        name=name,
    )
    if not 0 <= start < len(viewer):
        raise DataError("no such row", where=f"{name} data set", value=start, allowed=f"0 to {len(viewer) - 1}")
    _print_legend(console, LABELS[kind])
    for index in range(start, min(start + num_rows, len(viewer))):
        console.rule(f"{name} row {index}", align="left")
        _print_row(viewer.row(index), tokenizer, console)


def _print_legend(console: Console, labels: Sequence[str]) -> None:
    from rich.text import Text

    legend = Text()
    for label in labels:
        before, after = ("", "") if console.color_system else _BRACKETS[label]
        legend.append(before + label + after, style=_STYLES[label]).append("  ")
    console.print(legend)


def _print_row(row: Shown, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    from rich.text import Text

    if row.problem:
        console.print(Text(_printable(row.problem), style="bold red"))
        return
    if row.dropped:
        console.print(Text(f"the whole row is dropped: {row.dropped.replace('_', ' ')}", style="bold yellow"))
    for title, tokens in row.sequences.items():
        counts = {label: sum(one == label for _, one in tokens) for label in dict.fromkeys(one for _, one in tokens)}
        summary = ", ".join(f"{count} {label}" for label, count in counts.items())
        console.print(Text(f"{title}: {len(tokens)} tokens ({summary})", style="bold"))
        console.print(to_text(tokens, tokenizer, console.color_system is not None))
    if row.plain:
        console.print(Text("plain text, without the chat template (plain_text: messages renders it)", style="yellow"))
    if row.merged:
        end = _printable(str(tokenizer.decode(list(row.merged))))
        console.print(Text(f"left out, tokens merge here: the prompt alone ends with {end!r}", style="yellow"))
