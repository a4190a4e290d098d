"""OpenMP's waiting is decided before torch is loaded, and told where that was too late."""

from __future__ import annotations

import os
import subprocess
import sys

SHOW = "import os; print(os.environ.get('OMP_WAIT_POLICY'))"
TRAIN = """
from preftune.threads import tell_if_spinning
for threads in (1, 4, 4):
    tell_if_spinning(threads)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def test_threads_sleep_where_preftune_comes_first() -> None:
    assert run(f"import preftune; {SHOW}").stdout.strip() == "PASSIVE"
    assert run(f"import preftune, torch; {TRAIN}").stderr == ""


def test_the_users_own_setting_stays() -> None:
    assert run(f"import preftune; {SHOW}", OMP_WAIT_POLICY="ACTIVE").stdout.strip() == "ACTIVE"
    assert run(f"import torch, preftune; {TRAIN}", OMP_WAIT_POLICY="ACTIVE").stderr == ""


def test_a_runtime_that_is_up_already_is_told_of_once() -> None:
    done = run(f"import torch, preftune; {SHOW}; {TRAIN}")
    assert done.stdout.strip() == "None"
    assert done.stderr.count("OMP_WAIT_POLICY=PASSIVE") == 1
    assert "4 threads spin" in done.stderr
    assert len(done.stderr.splitlines()) == 1
