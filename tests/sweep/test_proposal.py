"""The grid that is proposed, for every method with a beta."""

from __future__ import annotations

import pytest

from preftune.errors import ConfigError
from preftune.objectives import METHODS
from preftune.sweep.proposal import propose


@pytest.mark.parametrize("method", [name for name, spec in METHODS.items() if "beta" in spec.defaults])
def test_the_published_values_are_in_the_middle(method: str) -> None:
    spec = METHODS[method]
    found = propose([method], {}, adapter=False)
    beta, rate = found.dimensions
    assert (beta.name, rate.name) == ("beta", "learning_rate")
    assert len(beta.values) == len(rate.values) == 3
    assert beta.values[1] == spec.defaults["beta"]
    assert rate.values[1] == spec.defaults.get("learning_rate", 1e-6)
    assert list(beta.values) == sorted(beta.values, key=lambda value: float(value or 0))
    source = spec.defaults_source
    assert source in found.reasons[0]
    assert (source in found.reasons[1]) == ("learning_rate" in spec.defaults)


def test_scales_differ_between_methods() -> None:
    assert propose(["sigmoid"], {}, adapter=False).dimensions[0].values == (0.03, 0.1, 0.3)
    assert propose(["sigmoid_norm"], {}, adapter=False).dimensions[0].values == (1.5, 5.0, 15.0)
    assert propose(["sppo_hard"], {}, adapter=False).dimensions[0].values == (0.0003, 0.001, 0.003)


def test_adapters_take_ten_times_the_rate_and_what_is_set_stays() -> None:
    full, adapter = (propose(["sigmoid"], {}, adapter=each).dimensions[1].values for each in (False, True))
    assert adapter == pytest.approx([10 * float(rate or 0) for rate in full])
    given = propose(["sigmoid"], {"learning_rate": 2e-5, "beta": 0.4}, adapter=True)
    assert given.dimensions[0].values == (0.12, 0.4, 1.2)
    assert given.dimensions[1].values == (6e-6, 2e-5, 6e-5)


def test_advice_for_the_model_goes_before_what_is_published() -> None:
    found = propose(
        ["sigmoid"], {"beta": 0.2}, adapter=True, advised={"beta": (0.5, "x"), "learning_rate": (3e-4, "y")}
    )
    assert found.dimensions[0].values[1] == 0.2
    assert found.dimensions[1].values[1] == 3e-4
    assert found.reasons[1].endswith("y")


def test_without_a_beta_there_is_nothing_to_propose() -> None:
    with pytest.raises(ConfigError, match="--param"):
        propose(["sft"], {}, adapter=False)
