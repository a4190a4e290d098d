"""The page's addresses: the list, runs side by side, their news, their data, a prompt, stop and save."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from preftune.errors import DataError, PreftuneError
from preftune.report.page import gather, page_payload
from preftune.report.read import Run, Sweep, distinct_names, read_run, read_sweep
from preftune.ui import control, pages
from preftune.ui.folders import Entry, find, overview, signature
from preftune.ui.generate import checked
from preftune.ui.helper import Helper
from preftune.ui.launch import WORK, Launcher
from preftune.ui.security import Guard, TooLarge

#: Seconds between two looks at the folders.
INTERVAL = 1.0
#: Runs side by side.
MAX_COMPARED = 12


class Live:
    """The application's state: the folder it shows and the processes that load models and data for it.

    Args:
        root: Folder with runs and sweeps.
        token: First part of every address.
        interval: Seconds between two looks at the folders.
    """

    def __init__(self, root: Path, token: str, interval: float = INTERVAL) -> None:
        self.root, self.token, self.interval = root, token, interval
        self.bench = Helper("prompt", "another prompt is being answered")
        self.rows = Helper("rows", "other rows are being loaded")
        self.launcher = Launcher(root)
        self._lock = threading.Lock()
        self._known: dict[str, Entry] = {}
        self._looked = -math.inf

    def close(self) -> None:
        """End what was begun for open pages."""
        self.bench.end()
        self.rows.end()

    # ---- pages -----------------------------------------------------------------------------------------------------

    async def index(self, request: Request) -> Response:
        """The list of runs and sweeps."""
        found = await run_in_threadpool(self._overviews)
        return _html(await run_in_threadpool(pages.index_page, self.root, found))

    async def view(self, request: Request) -> Response:
        """One run, or several side by side, as a report that follows them."""
        chosen = await run_in_threadpool(self._chosen, request)
        if not chosen:
            return PlainTextResponse("no such run; it may have vanished\n", 404)
        return _html(await run_in_threadpool(_of_sound, self._render, chosen))

    def _render(self, chosen: list[Entry]) -> str:
        return pages.view_page(gather(*_read(chosen)), chosen)

    async def news(self, request: Request) -> Response:
        """Numbers and summary of runs, for a page that is open."""
        chosen = await run_in_threadpool(self._chosen, request)
        if not chosen:
            return PlainTextResponse("gone\n", 404)
        return _json(await run_in_threadpool(_of_sound, self._collect, chosen))

    def _collect(self, chosen: list[Entry]) -> dict[str, Any]:
        page = gather(*_read(chosen))
        return {
            "data": page_payload(page),
            "summary": pages.summary_part(page),
            "sections": pages.sections(page),
            "status": [_overview(entry) for entry in chosen],
        }

    async def listing(self, request: Request) -> Response:
        """The list as data."""
        return _json(await run_in_threadpool(self._overviews))

    async def changes(self, request: Request) -> Response:
        """A text that changes whenever something is new, for all runs or for those that are named.

        Pages ask for it every second. A stream would be told sooner, but holds a connection for each tab, and browsers
        open six to one server: the seventh tab would wait for ever.
        """
        keys = request.query_params.getlist("id")
        return _json({"now": await run_in_threadpool(self._signature, keys)})

    def _signature(self, keys: list[str]) -> str:
        found = self._remembered()
        if not keys:
            return "|".join(f"{key}:{signature(entry)}" for key, entry in found.items())
        return "|".join(signature(found[key]) if key in found else "gone" for key in keys)

    def _remembered(self) -> dict[str, Entry]:
        """The runs as they were at most an interval ago: many tabs ask, and looking for runs is most of the work."""
        with self._lock:
            if time.monotonic() > self._looked + self.interval:
                self._known = find(self.root) if self.root.is_dir() else {}
                self._looked = time.monotonic()
            return self._known

    # ---- actions ---------------------------------------------------------------------------------------------------

    async def act(self, request: Request) -> Response:
        """Stop or save a run that goes on; evaluate, export or resume one that does not."""
        content, entry = await self._asked(request)
        name = str(content.get("action"))
        actions: dict[str, Callable[[Path], str]] = {"stop": control.stop, "save": control.save}
        if entry is None or entry.kind != "run" or name not in (*actions, *WORK):
            return _json({"error": "no such run or action"}, 404)
        if name in WORK:
            return _json(await run_in_threadpool(self.launcher.work, entry.folder, name))
        return _json({"done": await run_in_threadpool(actions[name], entry.folder)})

    async def prompt(self, request: Request) -> Response:
        """Answer a prompt with the models before and after training."""
        content, entry = await self._asked(request)
        if entry is None or entry.kind != "run":
            return _json({"error": "no such run"}, 404)
        checked(entry.folder, content)
        asked = {"work": "prompt", "folder": str(entry.folder.absolute()), "content": content}
        return _json(await self.bench.ask(asked, request.is_disconnected))

    async def plan(self, request: Request) -> Response:
        """What a run would do that is asked for."""
        return _json(await self.launcher.plan(await _content(request), request.is_disconnected))

    async def launch(self, request: Request) -> Response:
        """Start a run."""
        return _json(await run_in_threadpool(self.launcher.start, await _content(request)))

    async def launched(self, request: Request) -> Response:
        """What a run prints that was started here."""
        content = await _content(request)
        return _json(await run_in_threadpool(self.launcher.told, str(content.get("name"))))

    async def data(self, request: Request) -> Response:
        """Rows of the training data with their token masks."""
        chosen = await run_in_threadpool(self._chosen, request)
        start = request.query_params.get("start", "0")
        if len(chosen) != 1 or chosen[0].kind != "run" or not start.isdecimal() or len(start) > 12:
            return _json({"error": "no such run or row"}, 404)
        asked = {"work": "rows", "folder": str(chosen[0].folder.absolute()), "start": int(start)}
        return _json(await self.rows.ask(asked, request.is_disconnected))

    async def _asked(self, request: Request) -> tuple[dict[str, Any], Entry | None]:
        content = await _content(request)
        found = await run_in_threadpool(find, self.root)
        return content, found.get(str(content.get("id")))

    def _chosen(self, request: Request) -> list[Entry]:
        found = find(self.root) if self.root.is_dir() else {}
        keys = dict.fromkeys(request.query_params.getlist("id"))
        return [found[key] for key in keys if key in found][:MAX_COMPARED]

    def _overviews(self) -> list[dict[str, Any]]:
        found = find(self.root) if self.root.is_dir() else {}
        return [_overview(entry) for entry in found.values()]


def create(root: Path, token: str, hosts: frozenset[str], *, interval: float = INTERVAL) -> tuple[Guard, Live]:
    """The application with its guard.

    Args:
        root: Folder with runs and sweeps.
        token: First part of every address.
        hosts: Values of the Host header that name this server.
        interval: Seconds between two looks at the folders.

    Returns:
        The ASGI application, and its state.
    """
    live = Live(root, token, interval)
    at = f"/{token}"
    routes = [
        Route(f"{at}/", live.index),
        Route(f"{at}/list", live.listing),
        Route(f"{at}/view", live.view),
        Route(f"{at}/news", live.news),
        Route(f"{at}/changes", live.changes),
        Route(f"{at}/data", live.data),
        Route(f"{at}/act", live.act, methods=["POST"]),
        Route(f"{at}/prompt", live.prompt, methods=["POST"]),
        Route(f"{at}/plan", live.plan, methods=["POST"]),
        Route(f"{at}/launch", live.launch, methods=["POST"]),
        Route(f"{at}/launched", live.launched, methods=["POST"]),
    ]
    # A body that is too large is also one that could not be read, so that both end with a short answer.
    handlers: dict[Any, Any] = {
        PreftuneError: _foreseen,
        TooLarge: _too_large,
        Unreadable: _unreadable,
    }
    return Guard(Starlette(routes=routes, exception_handlers=handlers), token, hosts), live


class Unreadable(Exception):
    """A body that is no JSON object."""


async def _content(request: Request) -> dict[str, Any]:
    """The JSON object that a request brings."""
    try:
        content = await request.json()
    except (ValueError, RecursionError) as error:
        raise Unreadable from error
    if not isinstance(content, dict):
        raise Unreadable
    return content


#: What values that nobody expects can lead to.
_ODD = (PreftuneError, OSError, ValueError, TypeError, AttributeError, ArithmeticError, LookupError, RecursionError)
T = TypeVar("T")


def _of_sound(make: Callable[[list[Entry]], T], chosen: list[Entry]) -> T:
    """A page of those runs of which one can be made: one bad run is one bad run.

    Raises:
        DataError: There is none.
    """
    try:
        return make(chosen)
    except _ODD as error:
        sound = [entry for entry in chosen if len(chosen) > 1 and _can(make, entry)]
        if not sound:
            what = f"the folder holds values that no page can show ({type(error).__name__})"
            raise DataError(what, where=", ".join(entry.label for entry in chosen)) from error
        return make(sound)


def _can(make: Callable[[list[Entry]], Any], entry: Entry) -> bool:
    try:
        make([entry])
    except _ODD:
        return False
    return True


def _overview(entry: Entry) -> dict[str, Any]:
    """One line of the list; a run that cannot be read is one line, and no reason to show none."""
    try:
        return overview(entry)
    except _ODD:
        return {"key": entry.key, "label": entry.label, "kind": entry.kind, "status": "unreadable", "trials": 0}


def _read(chosen: list[Entry]) -> tuple[list[Run], list[Sweep]]:
    """Read the folders; one that vanishes meanwhile is an empty run, not an error."""
    runs, sweeps = [], []
    names = distinct_names([entry.folder for entry in chosen])
    for entry, name in zip(chosen, names, strict=True):
        sweep = read_sweep(entry.folder) if entry.kind == "sweep" else None
        if sweep is not None:
            sweep.name = name
            sweeps.append(sweep)
        else:
            runs.append(read_run(entry.folder, name))
    return runs, sweeps


def _html(text: str) -> Response:
    # Text of models may hold halves of characters, which no encoding knows.
    return Response(text.encode("utf-8", "replace"), media_type="text/html")


def _json(content: Any, status: int = 200) -> Response:
    # Every character beyond ASCII as an escape: halves of characters pass, and come out as such.
    return Response(json.dumps(content, allow_nan=False), status, media_type="application/json")


async def _foreseen(request: Request, error: Exception) -> Response:
    return _json({"error": str(error)}, 409)


async def _too_large(request: Request, error: Exception) -> Response:
    return _json({"error": "the request is too large"}, 413)


async def _unreadable(request: Request, error: Exception) -> Response:
    return _json({"error": "the request is no JSON object"}, 400)
