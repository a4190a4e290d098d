"""Flags of one verb beside the settings that it shares."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from preftune.config import split_command_line
from preftune.config.own import take_own
from preftune.errors import ConfigError


@dataclass
class Own:
    """Flags.

    Attributes:
        out: A folder.
        number: A number.
        kind: A word.
        loud: A switch.
        param: Texts.
    """

    out: str | None = None
    number: float | None = None
    kind: str = field(default="a", metadata={"choices": ("a", "b")})
    loud: bool = False
    param: list[str] = field(default_factory=list)


def taken(*argv: str) -> tuple[Own, tuple[tuple[str, tuple[str, ...], str], ...]]:
    own, rest = take_own(split_command_line(argv), Own)
    return own, rest.flags


def test_own_flags_are_taken_out_and_the_others_stay_in_order() -> None:
    own, rest = taken("--beta", "0.1", "--out", "x", "--loud", "--number", "7e9", "--seed", "3", "--kind", "b")
    assert own == Own("x", 7e9, "b", True)
    assert [name for name, _, _ in rest] == ["beta", "seed"]


def test_lists_add_up_and_stay_as_written() -> None:
    own, _ = taken("--param", "beta=0.1,0.2", "--param", "seed=1,2", "lr=3")
    assert own.param == ["beta=0.1,0.2", "seed=1,2", "lr=3"]


def test_a_switch_may_be_told_off() -> None:
    assert taken("--loud", "false")[0].loud is False
    assert taken("--loud", "--no_loud")[0].loud is False
    assert taken("--no_loud", "--loud")[0].loud is True


@pytest.mark.parametrize("argv", [("--no_out",), ("--no_loud", "1"), ("--no_bf16",)])
def test_only_switches_are_told_off(argv: tuple[str, ...]) -> None:
    own, rest = taken(*argv)
    assert own == Own()
    assert [flag for _, _, flag in rest] == [argv[0]]


def test_defaults_give_way_to_flags() -> None:
    line = split_command_line(["--out", "flag"])
    own, _ = take_own(line, Own, out="default", number=1.0)
    assert (own.out, own.number) == ("flag", 1.0)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--out",), "--out: needs a value; write --out VALUE"),
        (("--number", "many"), "--number: not a number; got 'many'; allowed: a number"),
        (("--kind", "c"), "--kind: not an allowed value; got 'c'; allowed: a, b"),
        (("--loud", "perhaps"), "--loud: not true or false"),
        (("--param",), "--param: needs a value"),
        (("--number", "1", "2"), "--number: not a number"),
    ],
)
def test_what_does_not_fit_is_one_line(argv: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        taken(*argv)
    assert str(caught.value).startswith(says)
    assert caught.value.exit_code == 2
