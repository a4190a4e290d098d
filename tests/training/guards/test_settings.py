"""The ``guards`` setting: every way of writing it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from preftune import ConfigError, DPOConfig, SFTConfig
from preftune.config import resolve
from preftune.training.guards import COMMON, GUARD_NAMES, check_guards, parse_guards
from preftune.training.guards.table import GUARDS


def test_every_name_has_its_guard() -> None:
    assert tuple(sorted(GUARDS)) == tuple(sorted(GUARD_NAMES))
    for guard in GUARDS.values():
        assert guard.cause
        assert guard.remedy
        assert guard.source
        assert guard.threshold_kind in ("published", "heuristic")
        assert guard.needs in ("", "heldout", "generations")


def test_only_a_rule_without_a_number_of_ours_is_called_published() -> None:
    assert [name for name, guard in GUARDS.items() if guard.threshold_kind == "published"] == ["non_finite"]
    # Numbers of others in rules of ours are told apart.
    assert "this project's" in GUARDS["reward_jump"].source
    assert "this project's" in GUARDS["length_exploitation"].source
    page = (Path(__file__).resolve().parents[3] / "docs" / "guards.md").read_text(encoding="utf-8")
    bullets = page.split("\n- **`")[1:]
    assert len(bullets) == len(GUARDS)
    for bullet in bullets:
        name = bullet.partition("`")[0]
        assert "published:" not in bullet
        if name not in ("non_finite",):
            assert "heuristic" in bullet.lower(), name


@pytest.mark.parametrize(
    ("value", "default", "named"),
    [
        ("warn", "warn", {}),
        ("OFF", "off", {}),
        (False, "off", {}),
        (True, "warn", {}),
        ({"overfitting": "stop"}, "warn", {"overfitting": "stop"}),
        ({"default": False, "non_finite": "stop"}, "off", {"non_finite": "stop"}),
        ('{"reward_jump": "off"}', "warn", {"reward_jump": "off"}),
        ("reward_jump=stop, overfitting=off", "warn", {"reward_jump": "stop", "overfitting": "off"}),
    ],
)
def test_all_spellings(value: Any, default: str, named: dict[str, str]) -> None:
    assert parse_guards(value) == (default, named)


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("loud", ("guards", "warn, stop, off")),
        ({"overfiting": "stop"}, ("no such guard", "did you mean overfitting?")),
        ({"overfitting": "loud"}, ("guards.overfitting", "warn, stop, off")),
        ("{overfitting: stop", ("not readable",)),
        (3, ("unknown action", "3")),
    ],
)
def test_what_is_refused_says_why(value: Any, parts: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        DPOConfig(str(tmp_path), guards=value, use_cpu=True)
    for part in parts:
        assert part in str(caught.value)


def test_supervised_training_has_the_common_guards_alone() -> None:
    assert check_guards("stop", COMMON) == {"gradient_spike": "stop", "non_finite": "stop"}
    assert check_guards({"overfitting": "off"}, COMMON) == {"gradient_spike": "warn", "non_finite": "warn"}
    with pytest.raises(ConfigError, match=r"guards\.overfitting: this training has no such guard"):
        check_guards({"overfitting": "stop"}, COMMON)


@pytest.mark.parametrize("name", ["generation_steps", "num_generations", "generation_max_new_tokens"])
def test_numbers_out_of_range(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {name: -1}
    with pytest.raises(ConfigError, match=name):
        DPOConfig(str(tmp_path), use_cpu=True, **options)


def test_supervised_training_draws_no_samples(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="generation_steps"):
        SFTConfig(str(tmp_path), use_cpu=True, generation_steps=5)


@pytest.mark.parametrize(
    ("argv", "yaml", "expected"),
    [
        (["--guards", "off"], None, ("off", {})),
        (["--guards", "stop"], None, ("stop", {})),
        (["--guards", '{"overfitting": "stop"}'], None, ("warn", {"overfitting": "stop"})),
        (["--guards", "default=off,overfitting=stop"], None, ("off", {"overfitting": "stop"})),
        ([], "guards: off", ("off", {})),
        ([], "guards: {default: off, reward_jump: stop}", ("off", {"reward_jump": "stop"})),
        ([], None, ("warn", {})),
    ],
)
def test_flags_and_yaml_say_the_same(argv: list[str], yaml: str | None, expected: Any, tmp_path: Path) -> None:
    if yaml is not None:
        (tmp_path / "run.yaml").write_text(yaml, encoding="utf-8")
        argv = ["--config", str(tmp_path / "run.yaml")]
    settings = resolve(["--use_cpu", *argv], DPOConfig).trainer
    assert parse_guards(settings.guards) == expected
