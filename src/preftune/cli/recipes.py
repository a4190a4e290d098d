"""``preftune recipes``: list, show or copy the recipes that ship."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING

from preftune.recipes import RECIPES, Recipe, copy_recipe, find_recipe

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb and its three actions."""
    parser = subparsers.add_parser("recipes", help="list, show or copy the published recipes")
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|show|copy")
    listing = actions.add_parser("list", help="all recipes: verb, model, what sets each apart")
    listing.add_argument("--json", action="store_true", help="print JSON")
    show = actions.add_parser("show", help="print a recipe's YAML")
    copy = actions.add_parser("copy", help="write a recipe's YAML to a file, to edit and to run")
    for action in (show, copy):
        action.add_argument("name", metavar="NAME", help="a name that `preftune recipes list` prints")
    copy.add_argument("path", nargs="?", metavar="PATH", help="file or existing folder (default: NAME.yaml here)")


def run(args: argparse.Namespace) -> int:
    """Do what is asked."""
    if args.action == "show":
        print(find_recipe(args.name).text(), end="")
    elif args.action == "copy":
        target = copy_recipe(args.name, args.path)
        command = shlex.join(["preftune", find_recipe(args.name).verb, "--config", str(target)])
        print(f"wrote {target}\nto run it: {command}")
    else:
        print(as_json() if args.json else as_text())
    return 0


def as_json() -> str:
    """All recipes with their source, as JSON."""
    return json.dumps([asdict(recipe) for recipe in RECIPES.values()], indent=2)


def as_text() -> str:
    """All recipes as a table, one line each."""
    rows = [("recipe", "verb", "model", ""), *(_row(recipe) for recipe in RECIPES.values())]
    widths = [max(len(row[column]) for row in rows) + 2 for column in range(3)]
    lines = ["".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)) + row[3] for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _row(recipe: Recipe) -> tuple[str, str, str, str]:
    return (recipe.name, recipe.verb, recipe.model, recipe.summary)
