"""Reading what is searched."""

from __future__ import annotations

import importlib
import math

import pytest

from preftune import DPOConfig
from preftune.config import ModelConfig, ScriptConfig
from preftune.config.fields import Field, fields_of_all
from preftune.errors import ConfigError
from preftune.sweep.space import Dimension, as_flag, draw, grid, parse_params, shown, split_values


@pytest.fixture(scope="module")
def fields() -> dict[str, Field]:
    return fields_of_all({"script": ScriptConfig, "model": ModelConfig, "trainer": DPOConfig})


def test_listed_values_have_the_type_of_their_field(fields: dict[str, Field]) -> None:
    beta, rank, peft = parse_params(["beta=0.05,1", "lora_r=8,16", "use_peft=true,false"], fields)
    assert beta.values == (0.05, 1.0)
    assert isinstance(beta.values[1], float)
    assert rank.values == (8, 16)
    assert peft.values == (True, False)


def test_lists_within_brackets_stay_together(fields: dict[str, Field]) -> None:
    assert split_values("sigmoid,[sigmoid, sft],{a: 1, b: 2}") == ["sigmoid", "[sigmoid, sft]", "{a: 1, b: 2}"]
    (dimension,) = parse_params(["loss_type=ipo,[sigmoid,sft]"], fields)
    assert dimension.values == ("ipo", "[sigmoid,sft]")


@pytest.mark.parametrize(
    ("text", "low", "high", "log", "integer"),
    [
        ("learning_rate=1e-6..1e-4:log", 1e-6, 1e-4, True, False),
        ("beta=0.05..0.5", 0.05, 0.5, False, False),
        ("lora_r=4..64:log", 4, 64, True, True),
    ],
)
def test_ranges(text: str, low: float, high: float, log: bool, integer: bool, fields: dict[str, Field]) -> None:
    (found,) = parse_params([text], fields)
    assert found.is_range
    assert (found.low, found.high, found.log, found.integer) == (low, high, log, integer)


def test_points_of_a_range_are_evenly_spaced_on_its_scale(fields: dict[str, Field]) -> None:
    (rate,) = parse_params(["learning_rate=1e-6..1e-4:log:5"], fields)
    steps = [math.log10(b) - math.log10(a) for a, b in zip(rate.values, rate.values[1:], strict=False)]  # type: ignore[arg-type]
    assert rate.values[0] == 1e-6
    assert rate.values[-1] == 1e-4
    assert steps == pytest.approx([0.5] * 4, abs=1e-5)
    (rank,) = parse_params(["lora_r=4..16:3"], fields)
    assert rank.values == (4, 10, 16)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["bta=0.1"], "did you mean beta"),
        (["beta"], "no values"),
        (["beta="], "no values"),
        (["beta=high"], "not a number"),
        (["beta=0.1", "beta=0.2"], "given twice"),
        (["beta=0.2..0.1"], "empty"),
        (["beta=0..1:log"], "above 0"),
        (["beta=0.1..1:linear"], "unknown option"),
        (["lora_r=1.5"], "integer"),
    ],
)
def test_mistakes_are_told_in_one_line(texts: list[str], says: str, fields: dict[str, Field]) -> None:
    with pytest.raises(ConfigError, match=says) as told:
        parse_params(texts, fields)
    assert "\n" not in str(told.value)


def test_a_grid_is_every_combination_with_the_last_field_fastest() -> None:
    cells = grid([Dimension("a", (1, 2)), Dimension("b", ("x", "y"))])
    assert cells == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]
    with pytest.raises(ConfigError, match="listed values"):
        grid([Dimension("a", low=1, high=2)])


def test_drawn_cells_are_distinct_repeatable_and_within_their_range() -> None:
    dimensions = [Dimension("rate", low=1e-6, high=1e-4, log=True), Dimension("rank", low=4, high=64, integer=True)]
    first, again, other = draw(dimensions, 40, 0), draw(dimensions, 40, 0), draw(dimensions, 40, 1)
    assert first == again
    assert first != other
    assert len({tuple(cell.values()) for cell in first}) == 40
    rates = [float(cell["rate"] or 0) for cell in first]
    assert all(1e-6 <= rate <= 1e-4 for rate in rates)
    # Log-uniform: half of the draws lie below the geometric mean; 40 fair coins give 8 to 32 but for 1 in 10,000.
    assert 8 <= sum(rate < 1e-5 for rate in rates) <= 32
    assert all(isinstance(cell["rank"], int) for cell in first)


def test_drawing_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    optuna = importlib.import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.INFO)
    draw((Dimension("beta", (0.1, 0.2, 0.3)),), 2, 0)
    assert capfd.readouterr() == ("", "")


def test_listed_values_are_drawn_without_repetition_until_none_is_left() -> None:
    cells = draw([Dimension("a", (1, 2)), Dimension("b", (3, 4))], 10, 0)
    assert len(cells) == 4


def test_values_survive_the_command_line() -> None:
    assert [as_flag(value) for value in (None, True, 1e-06, 8, "ipo", [1, 2])] == [
        ("null",),
        ("true",),
        ("1e-06",),
        ("8",),
        ("ipo",),
        ("[1, 2]",),
    ]
    assert float(as_flag(0.1 + 0.2)[0]) == 0.1 + 0.2
    assert shown({"beta": 0.1, "lora_r": 8}) == "beta 0.1, lora_r 8"


@pytest.mark.parametrize("dimension", [Dimension("a", (1, None, "x")), Dimension("b", low=1e-6, high=1, log=True)])
def test_dimensions_survive_json(dimension: Dimension) -> None:
    assert Dimension.from_json(dimension.name, dimension.to_json()) == dimension
