"""``preftune cache``: show or clear the stored reference log-probs and the tokenised data."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb and its two actions."""
    parser = subparsers.add_parser("cache", help="show or clear stored reference log-probs and tokenised data")
    actions = parser.add_subparsers(dest="action", required=True, metavar="info|clear")
    show = actions.add_parser("info", help="where the store lies and what it holds")
    remove = actions.add_parser("clear", help="forget entries and give their disk space back")
    remove.add_argument(
        "--weights_key", metavar="KEY", help="only this reference, and no data; the first digits will do"
    )
    remove.add_argument("--older_than", metavar="AGE", help="only what is unused for this long, such as 12h or 30d")
    for action in (show, remove):
        action.add_argument("--path", metavar="DIR", help="folder of the cache (default: $PREFTUNE_CACHE)")
        action.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print what :func:`preftune.runs.caches.info` or :func:`~preftune.runs.caches.clear` returns."""
    from preftune.runs.caches import clear, info

    if args.action == "info":
        print(info(args.path, as_json=args.json))
    else:
        print(clear(args.path, weights_key=args.weights_key, older_than=args.older_than, as_json=args.json))
    return 0
