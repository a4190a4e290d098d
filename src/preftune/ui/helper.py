"""Work that takes long, in a process of its own: one thing at a time, given up when nobody waits for it any more.

The server itself loads no model and no data. It answers at once whatever is being generated, and it can end whenever
it is told to, because a process can be killed and a thread cannot.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from preftune.errors import PreftuneError, SetupError

#: Seconds for stopping at the next token; loading a model cannot be interrupted, and is killed.
_GRACE = 1.0
#: Seconds between two looks at whether the browser is still there.
_LOOK = 0.1
_MOST_BYTES = 64 * 1024 * 1024


class Refused(PreftuneError):
    """What the process answered, word for word."""


class Helper:
    """A process that is started by the first request and keeps what it has loaded.

    Args:
        work: What it does, for messages: ``prompt`` or ``rows``.
        busy: What to say to whoever comes while it is at work.
    """

    def __init__(self, work: str, busy: str) -> None:
        self._work, self._busy = work, busy
        self._process: asyncio.subprocess.Process | None = None
        self._killed: asyncio.subprocess.Process | None = None
        self._at_work = False
        self._ended = False

    async def ask(self, request: dict[str, Any], gone: Callable[[], Awaitable[bool]]) -> dict[str, Any]:
        """Have one request answered.

        Args:
            request: What :mod:`preftune.ui.worker` takes.
            gone: Tells whether whoever asked has left.

        Returns:
            The answer.

        Raises:
            SetupError: It is at work already, or has died.
            Refused: It says why it cannot.
        """
        if self._at_work or self._ended:
            what = "the page is being closed" if self._ended else self._busy
            raise SetupError(what, where=self._work, remedy=None if self._ended else "try again when it is done")
        self._at_work = True
        try:
            return await self._answered(request, gone)
        finally:
            self._at_work = False

    def end(self) -> None:
        """Kill the process; whatever it was doing is refused, and nothing new is begun."""
        self._ended = True
        self._kill()

    async def _answered(self, request: dict[str, Any], gone: Callable[[], Awaitable[bool]]) -> dict[str, Any]:
        process = await self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        reading = asyncio.ensure_future(process.stdout.readline())
        try:
            await _send(process.stdin, request)
            while not reading.done():
                await asyncio.wait({reading}, timeout=_LOOK)
                if not reading.done() and await gone():
                    await self._give_up(process.stdin, reading)
                    break
        except (ConnectionError, ValueError):
            self._kill()
        except BaseException:
            # The request was cancelled: its answer would be taken for that to the next one.
            self._kill()
            raise
        if not reading.done():
            reading.cancel()
        # Whoever has left will not read that it was given up.
        line = reading.result() if reading.done() and not reading.cancelled() and not reading.exception() else b""
        return self._understood(line)

    def _understood(self, line: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(line)
            if "error" in answer:
                raise Refused(str(answer["error"]))
            found: dict[str, Any] = answer["ok"]
            return found
        except (ValueError, KeyError, TypeError) as error:
            self._kill()
            why = "the page is being closed" if self._ended else "its process ended before it was done"
            raise SetupError(why, where=self._work, remedy="see what the server printed") from error

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        # Modules are looked for where this process found them, and not in whatever folder is the current one.
        places = os.pathsep.join(os.path.abspath(place) for place in sys.path if place)
        process = self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "preftune.ui.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": places},
            cwd="/",
            limit=_MOST_BYTES,
            # Ctrl-C in the terminal is meant for the server, which ends the process itself.
            start_new_session=True,
        )
        if self._ended:
            self._kill()
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):
            await _send(process.stdin, {"folder": os.getcwd()})
        return process

    async def _give_up(self, to: asyncio.StreamWriter, reading: asyncio.Future[bytes]) -> None:
        with contextlib.suppress(ConnectionError):
            await _send(to, {"work": "stop"})
        done, _ = await asyncio.wait({reading}, timeout=_GRACE)
        if not done:
            self._kill()

    def _kill(self) -> None:
        # Its end is heard of a little later; the next request must not be sent to it.
        self._killed, self._process = self._process or self._killed, None
        if self._killed is not None and self._killed.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._killed.kill()


async def _send(to: asyncio.StreamWriter, content: dict[str, Any]) -> None:
    to.write(json.dumps(content).encode() + b"\n")
    await to.drain()
