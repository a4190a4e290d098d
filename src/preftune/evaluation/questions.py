"""Many questions to an endpoint: several in flight, failures retried within bounds, answers kept as they arrive."""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from preftune.config.secrets import redact
from preftune.errors import SetupError
from preftune.evaluation.endpoint import Endpoint, TryAgain

if TYPE_CHECKING:
    import httpx2

#: Seconds before the first retry.
FIRST_WAIT = 1.0
_LONGEST_WAIT = 30.0
#: A server that asks for a longer pause than this is not waited for.
_LONGEST_RETRY_AFTER = 300.0
#: Seconds that answers on their way are waited for after Ctrl-C.
_LAST_WORDS = 1.3
#: Seconds between two looks at whether there is a reason to stop.
_LOOK = 0.1


class Questions:
    """Asks an endpoint.

    Args:
        endpoint: The endpoint.
        concurrency: Questions in flight at once.
        retries: Further attempts at a question that failed.
        first_wait: Seconds before the first retry; each further one waits twice as long.
        show_progress: Draw a progress bar.

    Attributes:
        num_asked: Requests sent so far, retries included.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        concurrency: int = 4,
        retries: int = 5,
        first_wait: float = FIRST_WAIT,
        show_progress: bool = False,
    ) -> None:
        self.num_asked = 0
        self._endpoint = endpoint
        self._concurrency, self._retries = concurrency, retries
        self._first_wait, self._show = first_wait, show_progress
        self._num_kept = 0
        self._not_before = 0.0
        self._stopping: asyncio.Event
        self._random = random.Random(0)

    def ask(
        self,
        bodies: Mapping[str, dict[str, Any]],
        read: Callable[[Any], Any],
        keep: Callable[[str, Any], None],
        description: str,
        unit: str,
        *,
        num_kept: int = 0,
    ) -> None:
        """Ask all questions.

        Args:
            bodies: Requests by key.
            read: Takes what is wanted out of an answer; see :meth:`Endpoint.ask`.
            keep: Gets each key and answer as it arrives, one at a time, in another thread.
            description: Title of the progress bar.
            unit: What it counts.
            num_kept: Answers that were there before.

        Raises:
            SetupError: The endpoint refuses, or went on failing. What was answered by then is kept.
            ConfigError: The address is none.
        """
        self._num_kept = num_kept
        with tqdm(total=len(bodies), desc=description, unit=unit, disable=None if self._show else True) as bar:

            def arrived(key: str, answer: Any) -> None:
                keep(key, answer)
                self._num_kept += 1
                bar.update()

            self._ask_all(bodies, read, arrived)

    def _ask_all(
        self, bodies: Mapping[str, dict[str, Any]], read: Callable[[Any], Any], keep: Callable[[str, Any], None]
    ) -> None:
        """Ask in a loop of its own, in another thread: here Ctrl-C is heard at once, and a notebook has a loop too."""
        hurry, done, failures = threading.Event(), threading.Event(), list[BaseException]()

        def work() -> None:
            try:
                asyncio.run(self._ask_each(bodies, read, keep, hurry))
            except BaseException as error:
                failures.append(error)
            finally:
                done.set()

        # Not joined: a join that Ctrl-C interrupts takes the thread for ended.
        threading.Thread(target=work, name="questions", daemon=True).start()
        try:
            done.wait()
        except BaseException:
            hurry.set()
            done.wait(2 * _LAST_WORDS)
            raise
        if failures:
            raise failures[0]

    async def _ask_each(
        self,
        bodies: Mapping[str, dict[str, Any]],
        read: Callable[[Any], Any],
        keep: Callable[[str, Any], None],
        hurry: threading.Event,
    ) -> None:
        waiting = iter(bodies.items())
        self._stopping = asyncio.Event()
        async with self._endpoint.client() as client:

            async def take() -> None:
                for key, body in waiting:
                    keep(key, await self._insist(client, body, read))

            takers = [asyncio.ensure_future(take()) for _ in range(min(self._concurrency, len(bodies)))]
            await self._watch(set(takers), hurry)
            found = await asyncio.gather(*takers, return_exceptions=True)
        for problem in found:
            if isinstance(problem, BaseException) and not isinstance(problem, (_Stopped, asyncio.CancelledError)):
                raise problem

    async def _watch(self, takers: set[asyncio.Future[None]], hurry: threading.Event) -> None:
        """After Ctrl-C or a failure nothing new is begun; answers that are on their way are paid for, and kept."""
        left, deadline = takers, math.inf
        while left:
            done, left = await asyncio.wait(left, timeout=_LOOK, return_when=asyncio.FIRST_EXCEPTION)
            if hurry.is_set() or any(taker.exception() for taker in done):
                self._stopping.set()
            if hurry.is_set():
                deadline = min(deadline, time.monotonic() + _LAST_WORDS)
            if time.monotonic() > deadline:
                for taker in left:
                    taker.cancel()
                return

    async def _insist(self, client: httpx2.AsyncClient, body: dict[str, Any], read: Callable[[Any], Any]) -> Any:
        for attempt in range(self._retries + 1):
            await self._pause(self._not_before - time.monotonic())
            self.num_asked += 1
            try:
                return await self._endpoint.ask(client, body, read)
            except TryAgain as failure:
                if attempt == self._retries:
                    raise self._given_up(f"failed {attempt + 1} times at one question ({failure})") from failure
                if failure.after is not None and failure.after > _LONGEST_RETRY_AFTER:
                    raise self._given_up(f"asks for a pause of {failure.after:.0f} s ({failure})") from failure
                # Scattered, so that questions that failed together do not come back together.
                delay = min(self._first_wait * 2**attempt, _LONGEST_WAIT) * (1 + 0.25 * self._random.random())
                if failure.after is not None:
                    # A rate limit holds for all questions.
                    delay = max(delay, failure.after)
                    self._not_before = max(self._not_before, time.monotonic() + failure.after)
                await self._pause(delay)
        raise AssertionError("unreachable")

    async def _pause(self, seconds: float) -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), max(0.0, seconds))
        if self._stopping.is_set():
            raise _Stopped

    def _given_up(self, why: str) -> SetupError:
        return SetupError(
            f"{self._endpoint.role.who} {why}; {self._num_kept} answers are kept",
            where=self._endpoint.role.url,
            value=redact(self._endpoint.url),
            remedy="run the same command again to go on from there",
        )


class _Stopped(Exception):
    """Another question has failed for good, or the user interrupted."""
