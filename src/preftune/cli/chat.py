"""``preftune chat``: talk with a tuned model and its reference side by side."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the verb's arguments.

    Args:
        subparsers: What ``ArgumentParser.add_subparsers`` returned.
    """
    parser = subparsers.add_parser(
        "chat",
        description="Ask a tuned model and the model it was tuned from the same questions and read their answers side "
        "by side, drawn with the same random numbers. Without a terminal every line of standard input is a question.",
        epilog="example: preftune chat out; or: echo 'Why is the sky blue?' | preftune chat out --temperature 0",
    )
    parser.add_argument("run", metavar="RUN", help="output folder of a run, a checkpoint, or a sweep's folder")
    parser.add_argument("--only", choices=("tuned", "reference"), help="ask one of the two")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--max_new_tokens", type=int, default=256, metavar="N", help="longest answer in tokens (default: 256)"
    )
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the most likely token (default: 0.7)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="type of the weights (default: that of their files)",
    )
    parser.add_argument("--base_model", metavar="MODEL", help="base model, in place of the one that the run names")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")


def run(arguments: argparse.Namespace) -> int:
    """Talk until the end of the input.

    Args:
        arguments: Parsed arguments.

    Returns:
        0.

    Raises:
        PreftuneError: A model cannot be loaded, or a value is out of range.
    """
    from preftune.models.tuned import find_tuned

    tuned = find_tuned(arguments.run, base=arguments.base_model)
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from preftune.chat import open_session
    from preftune.chat.terminal import talk
    from preftune.cli.console import plain_warnings
    from preftune.runs.network import go_offline_if_unreachable

    console = Console(highlight=False)
    disable_progress_bar()
    with plain_warnings(console):
        offline = go_offline_if_unreachable([tuned.base])
        names = ("only", "system", "max_new_tokens", "temperature", "seed", "dtype", "trust_remote_code")
        session, notes = open_session(tuned, **{name: getattr(arguments, name) for name in names})
        for note in [*([offline] if offline else []), *notes]:
            print(f"preftune: {note}", file=sys.stderr)
        talk(session, console)
    return 0
