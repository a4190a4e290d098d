"""Which machine this is."""

from __future__ import annotations

import hashlib
import platform


def machine_id() -> str:
    """A name for this machine that tells machines apart and does not tell which it is."""
    return hashlib.sha256(platform.node().encode("utf-8", "replace")).hexdigest()[:16]
