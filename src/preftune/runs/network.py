"""One quick look whether the Hub answers, instead of half a minute of retries for every file."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

_TIMEOUT_SECONDS = 3.0
_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


def go_offline_if_unreachable(names: Iterable[str | None]) -> str | None:
    """Switch the Hub libraries to cached copies when names are not local and the Hub does not answer.

    Args:
        names: Models and datasets of the run.

    Returns:
        A line for the user if it came to that, else ``None``.
    """
    remote = [name for name in names if name and not Path(name).expanduser().exists()]
    if not remote or is_offline() or hub_answers():
        return None
    from huggingface_hub import constants

    # Read at import time by each library, so that the environment alone would come too late.
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    config = sys.modules.get("datasets.config")
    if config is not None:
        config.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
        config.HF_DATASETS_OFFLINE = True  # type: ignore[attr-defined]
    return f"the Hub cannot be reached; only local copies of {', '.join(remote)} are looked for"


def is_offline() -> bool:
    """Whether the Hub libraries have been told to stay off the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def hub_answers() -> bool:
    """Whether a connection to the Hub can be opened; assumed behind a proxy, where a direct one proves nothing."""
    if any(os.environ.get(name) for name in _PROXIES):
        return True
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=_TIMEOUT_SECONDS):
            return True
    except OSError:
        return False
