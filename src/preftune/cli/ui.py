"""``preftune ui``: runs and sweeps live, in the browser of this machine."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
from pathlib import Path
from typing import Any

from preftune.errors import ConfigError, SetupError


def add_parser(subparsers: Any) -> None:
    """Add the verb's arguments."""
    parser = subparsers.add_parser(
        "ui",
        description="Show the runs and sweeps below a folder while they train: compare them, browse their data, try "
        "a prompt on the model before and after, save or stop. Only this machine can reach it, with the address that "
        "is printed.",
    )
    parser.add_argument("folder", nargs="?", default=".", metavar="DIR", help="folder with runs (default: this one)")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (default: a free one)")
    parser.add_argument("--open", action="store_true", help="show it in the browser")


def run(arguments: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    folder = Path(arguments.folder)
    if not folder.is_dir():
        raise ConfigError("no such folder", where="preftune ui", value=arguments.folder)
    if not 0 <= arguments.port < 65536:
        raise ConfigError("not a port", where="--port", value=arguments.port, allowed="0 to 65535")
    missing = [name for name in ("starlette", "uvicorn", "plotly") if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(f"needs {', '.join(missing)}", where="preftune ui", remedy="pip install 'preftune[ui]'")
    from preftune.ui.server import doorway, serve

    with contextlib.ExitStack() as stack:

        def announce(address: str) -> None:
            print(f"open {address}\nCtrl-C ends it; runs go on.", flush=True)
            if arguments.open:
                import webbrowser

                webbrowser.open(stack.enter_context(doorway(address)))

        serve(folder, port=arguments.port, announce=announce)
    return 0
