"""The commands that come next: complete, so that they can be copied."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

from preftune.verbs import PAIR_VERBS


def command(*words: object) -> str:
    """A command line of preftune, quoted for a shell."""
    return shlex.join(["preftune", *map(str, words)])


def evaluation(run: str | os.PathLike[str]) -> str:
    """Evaluate a run on the rows that it held out."""
    return command("eval", "--model", os.fspath(run))


def report(*runs: str | os.PathLike[str]) -> str:
    """Report on runs."""
    return command("report", *(os.fspath(run) for run in runs))


def chat(run: str | os.PathLike[str]) -> str:
    """Talk with a run."""
    return command("chat", os.fspath(run))


def export(run: str | os.PathLike[str]) -> str:
    """Make a run a model that others load."""
    return command("export", os.fspath(run))


def after_training(verb: str, folder: str | os.PathLike[str], *, held_out: bool, streamed: bool = False) -> list[str]:
    """Lines to end a training with.

    Args:
        verb: Its verb.
        folder: Its output folder.
        held_out: Whether it held rows out.
        streamed: Whether its rows were a stream, of which none can be held out.

    Returns:
        A line per command, the first one being the next step.
    """
    if verb in PAIR_VERBS and held_out:
        return [f"next: {evaluation(folder)}"]
    lines = [f"next: {report(folder)}", f"      {chat(folder)}"]
    if not held_out:
        how = "--test_split_size 0.1 holds a tenth out"
        if streamed:
            how = f"preftune eval --model {os.fspath(folder)} --dataset_name with other pairs can"
        lines.insert(0, f"nothing was held out, so that no figure can judge it; {how}")
    return lines


def without_flag(argv: Sequence[str], name: str) -> list[str]:
    """The words of a command line without a flag that is true or false, and without its value.

    >>> without_flag(["--dry_run", "true", "--beta", "0.1"], "dry_run"), without_flag(["--dry-run", "--x"], "dry_run")
    (['--beta', '0.1'], ['--x'])
    """
    out: list[str] = []
    follows = False
    for word in argv:
        flag, equals, _ = word.partition("=")
        own = flag.replace("-", "_") == f"__{name}"
        if not own and not (follows and word.lower() in ("true", "false", "1", "0", "yes", "no")):
            out.append(word)
        follows = own and not equals
    return out
