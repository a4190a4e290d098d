"""How long it takes is said where nobody watches, if it is worth saying: at the beginning, and then once a minute."""

from __future__ import annotations

import pytest

from preftune.terminal.progress import Progress


@pytest.mark.parametrize(
    ("seconds_per_step", "show", "said"),
    [
        # 1,000 tokens, 10 a step; after the first step 2 s pass before the pace is told.
        (0.5, True, "Sampling: about 50 s at most\n"),
        (
            3.0,
            True,
            "Sampling: about 5 min at most\nSampling: 22 %, about 4 min left\nSampling: 42 %, about 3 min left\n"
            "Sampling: 62 %, about 2 min left\nSampling: 82 %, about 50 s left\n",
        ),
        (0.05, True, ""),
        (3.0, False, ""),
    ],
)
def test_the_rest_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seconds_per_step: float, show: bool, said: str
) -> None:
    now = [0.0]
    monkeypatch.setattr("preftune.terminal.progress.time.monotonic", lambda: now[0])
    with Progress(1000, "Sampling", show) as found:
        for _ in range(100):
            now[0] += seconds_per_step
            found.add(10)
    assert capsys.readouterr().err == said


def test_what_was_known_does_not_count_for_the_pace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("preftune.terminal.progress.time.monotonic", lambda: now[0])
    with Progress(1000, "Sampling", True) as found:
        found.skip(900)
        for _ in range(10):
            now[0] += 4.0
            found.add(10)
    # 80 tokens are left after the second step, at 10 tokens in 4 s.
    assert capsys.readouterr().err == "Sampling: about 30 s at most\n"
