"""No token leaves a run."""

from __future__ import annotations

import pytest

from preftune.config import is_secret, redact, redact_argv
from preftune.config.secrets import REDACTED

TOKEN = "hf_" + "a1" * 17


@pytest.mark.parametrize(
    "name", ["hub_token", "push_to_hub_token", "api_key", "openai_api_key", "password", "secret", "wandb_key"]
)
def test_names_that_hold_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name", ["pad_token", "eos_token", "max_tokens_per_row", "include_num_input_tokens_seen", "monkey", "beta"]
)
def test_names_that_do_not(name: str) -> None:
    assert not is_secret(name)


def test_nested_values() -> None:
    clean = redact({"hub_token": "abc", "a": [{"api_key": "x"}, f"see {TOKEN}"], "url": "https://me:pw@host/x", "n": 1})
    assert clean == {
        "hub_token": REDACTED,
        "a": [{"api_key": REDACTED}, f"see {REDACTED}"],
        "url": f"https://{REDACTED}@host/x",
        "n": 1,
    }
    assert redact({"hub_token": None}) == {"hub_token": None}


def test_command_lines() -> None:
    argv = ["dpo", "--hub_token", TOKEN, "--beta", "0.1", f"--hub-token={TOKEN}", "--api_key=abc", "--run_name", TOKEN]
    clean = redact_argv(argv)
    assert clean[:6] == ["dpo", "--hub_token", REDACTED, "--beta", "0.1", f"--hub-token={REDACTED}"]
    assert clean[6:] == [f"--api_key={REDACTED}", "--run_name", REDACTED]
