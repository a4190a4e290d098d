"""One fork server for the whole session, and how much of the suite is run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.faults.campaign import Campaign
from tests.faults.server import ForkServer
from tests.faults.worlds import build

#: All of it is minutes of work: PREFTUNE_FAULTS=full.
FULL = os.environ.get("PREFTUNE_FAULTS") == "full"


def scaled(quick: int, full: int) -> int:
    return full if FULL else quick


@pytest.fixture(scope="session")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    folder = tmp_path_factory.mktemp("faults")
    build(folder)
    server = ForkServer(folder, ("tests.faults.steps", "tests.faults.workers", "tests.faults.verbs"))
    yield Campaign(server, folder)
    server.close()
