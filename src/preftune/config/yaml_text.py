"""YAML of other people: plain values only, and no more of them than somebody wrote."""

from __future__ import annotations

from typing import Any

import yaml

#: Values after all aliases are followed. Ten lines of aliases of aliases mean millions of values, which are
#: harmless until somebody prints or copies them.
MOST_VALUES = 100_000
#: PyYAML reads about as many in a second or two; a chat template has some ten thousand.
MOST_CHARACTERS = 250_000
#: Levels of nesting; what copies, compares and writes settings calls itself once for each.
DEEPEST = 64


class TooMuch(yaml.YAMLError):
    """A document that grows when its aliases are followed, or that is nested too deep."""


def read_yaml(text: str) -> Any:
    """Read one document with PyYAML's safe loader, within bounds.

    Args:
        text: YAML.

    Returns:
        Mappings, lists and plain values.

    Raises:
        yaml.YAMLError: It is no YAML, holds more than plain values, or is out of bounds.
        ValueError: A number or date that Python cannot hold.
    """
    check_length(text)
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        check_size(node)
        return loader.construct_document(node)
    except RecursionError as error:
        raise TooMuch("it is nested too deep") from error
    except (TypeError, OverflowError) as error:
        # PyYAML looks for most keys that cannot be hashed, and for most dates that are none.
        raise TooMuch("it holds a key or date that cannot be read") from error
    finally:
        loader.dispose()


def check_length(text: str) -> None:
    """Refuse a text that would take long to read.

    Raises:
        TooMuch: It is too long.
    """
    if len(text) > MOST_CHARACTERS:
        raise TooMuch(f"it has more than {MOST_CHARACTERS:,} characters")


def check_size(node: yaml.Node) -> None:
    """Refuse a document that is out of bounds, before anything is made of it.

    Raises:
        TooMuch: It is.
    """
    _count(node, {}, 0)


def _count(node: yaml.Node, known: dict[int, tuple[int, int] | None], depth: int) -> tuple[int, int]:
    """How many values a node stands for, aliases followed, and how deep they are nested."""
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise TooMuch("an alias stands inside of what it names")
    elif depth > DEEPEST:
        raise TooMuch(f"it is nested more than {DEEPEST} deep")
    else:
        known[id(node)] = None
        inside: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inside = node.value
        elif isinstance(node, yaml.MappingNode):
            inside = [part for pair in node.value for part in pair]
        counts = [_count(part, known, depth + 1) for part in inside]
        found = 1 + sum(number for number, _ in counts), 1 + max((levels for _, levels in counts), default=0)
        known[id(node)] = found
    if found[0] > MOST_VALUES:
        raise TooMuch(f"it stands for more than {MOST_VALUES:,} values when its aliases are followed")
    if depth + found[1] > DEEPEST:
        raise TooMuch(f"it is nested more than {DEEPEST} deep")
    return found
