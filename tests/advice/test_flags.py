"""Each risk is seen where it is there, and only there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from preftune.advice import Case, Lengths, Noise, advise
from preftune.advice.case import Flag
from preftune.training.plan import MemoryEstimate

SEVEN = 7_000_000_000
#: A sound run of 7B parameters: Zephyr's settings but for beta.
SOUND: dict[str, Any] = {
    "beta": 0.1,
    "learning_rate": 5e-7,
    "num_train_epochs": 1.0,
    "label_smoothing": 0.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 8,
    "warmup_steps": 0.1,
    "max_length": 1024,
    "eval_strategy": "steps",
    "save_strategy": "steps",
}


def flags(
    method: str = "sigmoid",
    *,
    size: int = SEVEN,
    lora: bool = False,
    noise: Noise | None = None,
    lengths: Lengths | None = None,
    num_pairs: int = 60_000,
    explicit: frozenset[str] = frozenset({"learning_rate"}),
    memory: MemoryEstimate | None = None,
    has_test: bool | None = None,
    **given: Any,
) -> list[Flag]:
    case = Case(
        "dpo",
        (method,),
        size,
        lora,
        num_pairs=num_pairs,
        noise=noise,
        lengths=lengths,
        given={**SOUND, **given},
        explicit=explicit,
        has_test=has_test,
    )
    return list(advise(case, memory=memory).flags)


def titles(found: list[Flag], severity: str | None = None) -> str:
    return " | ".join(flag.title for flag in found if severity in (None, flag.severity))


def test_a_sound_run_is_left_alone() -> None:
    assert flags() == []
    assert flags(noise=Noise(0.02, 0.0, 0.06)) == []
    assert flags(lora=True, learning_rate=5e-6) == []


@pytest.mark.parametrize(
    ("title", "severity", "changes"),
    [
        ("high learning rate with low beta", "warn", {"learning_rate": 5e-6, "beta": 0.01}),
        ("beta 5 is off the scale of sigmoid", "warn", {"beta": 5.0}),
        ("beta 0.1 is off the scale of sigmoid_norm", "warn", {"method": "sigmoid_norm", "beta": 0.1}),
        ("beta 0.1 is off the scale of sppo_hard", "warn", {"method": "sppo_hard", "beta": 0.1}),
        ("an adapter's learning rate for all weights", "warn", {"learning_rate": 1e-5}),
        ("learning rate far too high", "warn", {"learning_rate": 1e-2}),
        ("a full-fine-tuning rate for an adapter", "warn", {"lora": True, "learning_rate": 5e-7}),
        ("learning rate too low", "warn", {"size": 500_000, "learning_rate": 1e-6}),
        ("more epochs than the labels bear", "warn", {"num_train_epochs": 3.0, "noise": Noise(0.3, 0.2, 0.4)}),
        ("label smoothing does nothing with ipo", "problem", {"method": "ipo", "beta": 0.01, "label_smoothing": 0.1}),
        ("all but free of noise", "warn", {"label_smoothing": 0.1, "noise": Noise(0.02, 0.0, 0.05)}),
        ("more label smoothing than there is noise", "warn", {"label_smoothing": 0.4, "noise": Noise(0.2, 0.1, 0.25)}),
        ("next to no information", "problem", {"noise": Noise(0.45, 0.4, 0.5)}),
        ("takes them at their word", "note", {"noise": Noise(0.2, 0.1, 0.3)}),
        ("only 1 pair in a step", "warn", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}),
        ("the whole run has 10 steps", "note", {"max_steps": 10}),
        ("no warm-up", "note", {"warmup_steps": 0}),
        ("nothing is held out", "note", {"eval_strategy": "no"}),
        ("nothing is evaluated during training", "note", {"eval_strategy": "no", "has_test": True}),
        ("may not fit into memory", "problem", {"memory": MemoryEstimate(weights=200, available=100)}),
        ("may not fit into memory", "warn", {"memory": MemoryEstimate(weights=110, available=100)}),
    ],
)
def test_a_risk_is_named_with_remedy_and_source(title: str, severity: str, changes: dict[str, Any]) -> None:
    found = [flag for flag in flags(**changes) if title in flag.title]
    assert len(found) == 1, titles(flags(**changes))
    assert found[0].severity == severity
    assert found[0].detail
    assert found[0].remedy
    assert found[0].source
    assert found[0].threshold_kind in ("published", "heuristic", "computed")


def test_epochs_are_judged_by_the_noise() -> None:
    assert "epochs" not in titles(flags(num_train_epochs=3.0, noise=Noise(0.03, 0.0, 0.06)))
    assert "epochs" in titles(flags(num_train_epochs=3.0, noise=Noise(0.35, 0.25, 0.45)))
    # Not known is not noisy.
    assert "epochs" not in titles(flags(num_train_epochs=3.0), "warn")


def test_truncation_counts_the_pairs_that_lose_tokens() -> None:
    tokens = np.arange(100)
    lengths = Lengths(tokens, tokens, np.zeros(100, dtype=np.int64))
    # Prompt and chosen together have 0, 2, ..., 198 tokens: ten of a hundred have more than 178.
    (found,) = flags(lengths=lengths, max_length=178)
    assert found.title == "max_length 178 cuts 10% of the pairs"
    assert found.severity == "warn"
    assert titles(flags(lengths=lengths, max_length=192), "note") == "max_length 192 cuts 3% of the pairs"
    assert flags(lengths=lengths, max_length=198) == []
    assert flags(lengths=lengths, max_length=None) == []


def test_the_gravest_come_first_and_the_head_of_a_training_shows_few() -> None:
    case = Case(
        "dpo",
        ("sigmoid",),
        500_000,
        num_pairs=1000,
        noise=Noise(0.45, 0.4, 0.5),
        truncated_share=0.5,
        given={
            **SOUND,
            "num_train_epochs": 9.0,
            "beta": 50.0,
            "label_smoothing": 0.0,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "warmup_steps": 0,
            "learning_rate": 1e-7,
        },
    )
    advice = advise(case, memory=MemoryEstimate(weights=3, available=2))
    ranks = [("problem", "warn", "note").index(flag.severity) for flag in advice.flags]
    assert ranks == sorted(ranks)
    assert ranks.count(2) >= 1
    lines = advice.lines()
    assert len(lines) == 5
    assert lines[-1].endswith("more: preftune advise")
    assert "warm-up" not in " ".join(lines)  # a note


def test_what_is_advised_is_not_warned_of() -> None:
    for noise in (None, Noise(0.3, 0.2, 0.4), Noise(0.02, 0.0, 0.08)):
        for size in (500_000, 135_000_000, SEVEN, 70_000_000_000):
            for lora in (False, True):
                case = Case("dpo", ("sigmoid",), size, lora, num_pairs=60_000, noise=noise, given=SOUND)
                values = advise(case).values()
                method = values.pop("loss_type", "sigmoid")
                found = flags(method, size=size, lora=lora, noise=noise, **values)
                assert titles(found) == "", (size, lora, noise)
