"""Offline without a storm of retries."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from preftune.runs import network


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in network._PROXIES:
        monkeypatch.delenv(name, raising=False)


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise OSError("no route")


def test_local_names_ask_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: pytest.fail("asked"))
    assert network.go_offline_if_unreachable([".", None]) is None


def test_an_unreachable_hub_switches_to_local_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    from huggingface_hub import constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    note = network.go_offline_if_unreachable(["org/model", "."])
    assert note is not None
    assert "org/model" in note
    assert constants.HF_HUB_OFFLINE is True
    assert datasets.config.HF_HUB_OFFLINE is True


def test_a_hub_that_answers_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert network.go_offline_if_unreachable(["org/model"]) is None
    assert network.is_offline() is False


def test_behind_a_proxy_nothing_is_concluded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:1")
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert network.hub_answers()
