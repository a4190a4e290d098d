"""``preftune methods``: the table of methods."""

from __future__ import annotations

import argparse
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from rich.console import Console

    from preftune.objectives import MethodSpec


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = subparsers.add_parser("methods", help="list the methods with formula, settings and paper")
    parser.add_argument("name", nargs="?", help="one method, in full")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print all methods, or one."""
    from rich.console import Console

    from preftune.objectives import METHODS

    chosen, called = _named(args.name) if args.name else (list(METHODS.values()), None)
    if args.json:
        print(json.dumps([describe(spec) for spec in chosen], indent=2, ensure_ascii=False))
    elif args.name:
        for spec in chosen:
            _print_one(Console(), spec)
        if called:
            print(f"{args.name} is loss_type {called}")
    else:
        _print_all(Console(), chosen)
    return 0


def _named(name: str) -> tuple[list[MethodSpec], str | None]:
    """The methods of a name, and what they are called here where that is something else."""
    from preftune.objectives import METHODS, find_method
    from preftune.objectives.lookup import SYNONYMS

    key = name.lower().replace("-", "_")
    if key in METHODS:
        return [METHODS[key]], None
    called = SYNONYMS.get(key)
    found = [METHODS[word] for word in re.findall(r"\w+", called or "") if word in METHODS]
    return (found, called) if found else ([find_method(name)], None)


def describe(spec: MethodSpec) -> dict[str, Any]:
    """A method's row as plain values.

    Args:
        spec: The row.

    Returns:
        A mapping that ``json.dumps`` takes.
    """
    return {
        "name": spec.name,
        "family": spec.family,
        "formula": spec.formula,
        "needs_reference": spec.needs_reference,
        "paired": spec.paired,
        "settings": {
            knob.name: {"default": knob.default, "allowed": knob.allowed, "meaning": knob.description}
            for knob in spec.knobs.values()
        },
        "published": dict(spec.defaults),
        "published_in": spec.defaults_source,
        "paper": spec.paper.title,
        "equation": spec.equation,
        "link": spec.paper.link,
    }


def _print_all(console: Console, specs: list[MethodSpec]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    console.print(Text("h = beta (r_w - r_l), r = log pi - log pi_ref; `preftune methods NAME` says more", style="dim"))
    family = ""
    for spec in specs:
        if spec.family != family:
            family = spec.family
            console.print(Text(f"\n{family.replace('_', '-')}", style="bold underline"))
        source = f"arXiv:{spec.paper.arxiv}" if spec.paper.arxiv else spec.paper.title
        facts = [source, "reference needed" if spec.needs_reference else "no reference"]
        if spec.knobs:
            facts.append(f"settings: {', '.join(spec.knobs)}")
        console.print(Text.assemble((f"{spec.name:<18}", "bold"), spec.formula))
        console.print(Padding(Text("; ".join(facts), style="dim"), (0, 0, 0, 18)))


def _print_one(console: Console, spec: MethodSpec) -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    equation = f", {spec.equation}" if spec.equation else ""
    published = ", ".join(f"{name} {value}" for name, value in spec.defaults.items())
    source = f" ({spec.defaults_source})" if spec.defaults_source else ""
    rows = [
        ("method", f"{spec.name} ({spec.family.replace('_', '-')})"),
        ("loss", spec.formula),
        ("reference", "needed" if spec.needs_reference else "not needed"),
        ("data", "pairs" if spec.paired else "single answers with a label"),
        *((knob.name, f"{knob.description} {knob.allowed}; default {knob.default}") for knob in spec.knobs.values()),
        ("published", f"{published}{source}" if published else "none"),
        ("paper", f"{spec.paper.title}{equation}"),
        ("link", spec.paper.link),
    ]
    for label, text in rows:
        grid.add_row(label, Text(text))
    console.print(grid)
