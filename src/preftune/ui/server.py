"""Starts the page on this machine, and ends it."""

from __future__ import annotations

import contextlib
import html
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from preftune.errors import SetupError
from preftune.ui.app import INTERVAL, create
from preftune.ui.security import new_token

LOOPBACK = "127.0.0.1"


def serve(root: Path, *, port: int = 0, announce: Callable[[str], None] = print, interval: float = INTERVAL) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        root: Folder with runs and sweeps.
        port: Port; 0 takes a free one.
        announce: Told the address, token included, as soon as it can be opened.
        interval: Seconds between two looks at the folders.

    Raises:
        SetupError: The port is taken.
    """
    import uvicorn

    # Loopback only: the page can stop runs and read data, and there is no encryption on the way.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
    except OSError as error:
        listener.close()
        raise SetupError(
            f"cannot listen ({error.strerror})", where="--port", value=port, remedy="leave --port out for a free one"
        ) from error
    with contextlib.closing(listener):
        port = listener.getsockname()[1]
        token = new_token()
        guard, live = create(root, token, hosts(port), interval=interval)
        config = uvicorn.Config(
            guard,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=1,
        )

        class Server(uvicorn.Server):
            """Ends the work for open pages first: it would keep the server waiting."""

            async def startup(self, sockets: Any = None) -> None:
                """Tell the address once it answers."""
                await super().startup(sockets)
                announce(f"http://{LOOPBACK}:{port}/{token}/")

            async def shutdown(self, sockets: Any = None) -> None:
                """End the work."""
                live.close()
                await super().shutdown(sockets)

        with contextlib.suppress(KeyboardInterrupt):
            Server(config).run([listener])


@contextlib.contextmanager
def doorway(address: str) -> Iterator[str]:
    """A page on the disk that only this user can read and that leads to an address.

    Whoever starts a browser shows its command line, and with it the token, to all users of the machine.

    Args:
        address: Where it leads.

    Yields:
        Its own address, good for the length of the block.
    """
    with tempfile.TemporaryDirectory(prefix="preftune-") as folder:
        # The folder is made for this user alone.
        page = Path(folder) / "open.html"
        link = html.escape(address, quote=True)
        page.write_text(
            f'<!doctype html><meta charset="utf-8"><meta name="referrer" content="no-referrer">'
            f'<meta http-equiv="refresh" content="0; url={link}"><title>preftune</title><a href="{link}">Go on</a>\n',
            encoding="utf-8",
        )
        yield page.as_uri()


def hosts(port: int) -> frozenset[str]:
    """Values of the Host header that name this server."""
    return frozenset({f"{LOOPBACK}:{port}", f"localhost:{port}"})
