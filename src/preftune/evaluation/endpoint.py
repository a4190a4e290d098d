"""Questions to an OpenAI-compatible endpoint: each asked once, failures retried within bounds, answers kept at once."""

from __future__ import annotations

import email.utils
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from preftune.config.secrets import redact
from preftune.errors import ConfigError, SetupError

if TYPE_CHECKING:
    import httpx2

#: Answers of a server that may well be different next time.
_PASSING = frozenset({408, 409, 425, 429})
#: Seconds before the first retry.
FIRST_WAIT = 1.0
_LONGEST_WAIT = 30.0
#: A server that asks for a longer pause than this is not waited for.
_LONGEST_RETRY_AFTER = 300.0


class _Stopped(Exception):
    """Another question has failed for good, or the user has had enough."""


class _TryAgain(Exception):
    """A failure that may pass.

    Args:
        reason: What happened.
        after: Seconds that the server asked to wait, or ``None``.
    """

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Endpoint:
    """One address of a server.

    Args:
        url: Base address such as ``http://localhost:8000/v1``, or the whole one.
        path: What comes behind the base address, such as ``/chat/completions``.
        setting: Name of the setting that the address stands in; ``judge_url`` goes with ``judge_model`` and
            ``judge_key_env``.
        who: What messages call the server, such as ``the judge``.
        key: Secret for the ``Authorization`` header, or ``None``; it is sent and nowhere kept.
        concurrency: Questions in flight at once.
        timeout: Seconds until an answer is given up.
        retries: Further attempts at a question that failed.
        first_wait: Seconds before the first retry; each further one waits twice as long.
        show_progress: Draw a progress bar.

    Attributes:
        num_asked: Requests sent so far, retries included.
        num_kept: Answers so far.
    """

    def __init__(
        self,
        url: str,
        path: str,
        *,
        setting: str,
        who: str,
        key: str | None = None,
        concurrency: int = 4,
        timeout: float = 60.0,
        retries: int = 5,
        first_wait: float = FIRST_WAIT,
        show_progress: bool = False,
    ) -> None:
        self.url = url if url.rstrip("/").endswith(path) else url.rstrip("/") + path
        self.num_asked = 0
        self.num_kept = 0
        self._setting, self._who, self._key = setting, who, key
        self._concurrency, self._timeout, self._retries = concurrency, timeout, retries
        self._first_wait, self._show = first_wait, show_progress
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._not_before = 0.0
        self._random = random.Random(0)

    def ask(
        self,
        bodies: Mapping[str, dict[str, Any]],
        read: Callable[[Any], Any],
        keep: Callable[[str, Any], None],
        description: str,
        unit: str,
    ) -> None:
        """Ask all questions.

        Args:
            bodies: Requests by key.
            read: Takes what is wanted out of an answer; a ``ValueError``, ``KeyError``, ``IndexError`` or ``TypeError``
                means that the answer is none, and is asked for again.
            keep: Gets each key and answer as it arrives, one at a time.
            description: Title of the progress bar.
            unit: What it counts.

        Raises:
            SetupError: The endpoint refuses, or went on failing. What was answered by then is kept.
            ConfigError: The address is none.
        """
        import httpx2

        self._stop.clear()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        with (
            tqdm(total=len(bodies), desc=description, unit=unit, disable=None if self._show else True) as bar,
            httpx2.Client(timeout=self._timeout, headers=headers) as client,
            ThreadPoolExecutor(self._concurrency) as pool,
        ):

            def one(key: str, body: dict[str, Any]) -> None:
                try:
                    answer = self._insist(client, body, read)
                except BaseException:
                    self._stop.set()
                    raise
                with self._lock:
                    keep(key, answer)
                    self.num_kept += 1
                    bar.update()

            futures = [pool.submit(one, key, body) for key, body in bodies.items()]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                # After Ctrl-C or a failure: nothing new is begun, what is in flight is still waited for and kept.
                if not all(future.done() for future in futures):
                    self._stop.set()
                    pool.shutdown(wait=True, cancel_futures=True)
        problems = [f.exception() for f in futures if f.done() and not f.cancelled() and f.exception() is not None]
        for problem in problems:
            if not isinstance(problem, _Stopped):
                assert problem is not None
                raise problem

    def _insist(self, client: httpx2.Client, body: dict[str, Any], read: Callable[[Any], Any]) -> Any:
        for attempt in range(self._retries + 1):
            self._pause(self._not_before - time.monotonic())
            try:
                return self._post(client, body, read)
            except _TryAgain as failure:
                if attempt == self._retries:
                    raise self._given_up(f"failed {attempt + 1} times at one question ({failure})") from failure
                if failure.after is not None and failure.after > _LONGEST_RETRY_AFTER:
                    raise self._given_up(f"asks for a pause of {failure.after:.0f} s ({failure})") from failure
                delay = min(self._first_wait * 2**attempt, _LONGEST_WAIT)
                with self._lock:
                    # Scattered, so that questions that failed together do not come back together.
                    delay *= 1 + 0.25 * self._random.random()
                    if failure.after is not None:
                        # A rate limit holds for all questions.
                        delay = max(delay, failure.after)
                        self._not_before = max(self._not_before, time.monotonic() + failure.after)
                self._pause(delay)
        raise AssertionError("unreachable")

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(max(0.0, seconds)):
            raise _Stopped

    def _post(self, client: httpx2.Client, body: dict[str, Any], read: Callable[[Any], Any]) -> Any:
        import httpx2

        with self._lock:
            self.num_asked += 1
        try:
            response = client.post(self.url, json=body)
        except httpx2.TransportError as error:
            raise _TryAgain(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        except httpx2.InvalidURL as error:
            raise ConfigError("not an address", where=self._setting, value=redact(self.url)) from error
        status = response.status_code
        if status in _PASSING or status >= 500:
            raise _TryAgain(f"status {status}", _retry_after(response.headers.get("retry-after")))
        if status != 200:
            said = self._without_key(" ".join(response.text.split())[:200])
            remedy = (
                f"set {self._setting.replace('url', 'key_env')} to the variable that holds the key"
                if status in (401, 403)
                else None
            )
            remedy = "check the address; it usually ends in /v1" if status in (404, 405) else remedy
            raise SetupError(
                f"{self._who} refuses (status {status}: {said})",
                where=self._setting,
                value=redact(self.url),
                remedy=remedy or f"check {self._setting.replace('url', 'model')} and the endpoint's log",
            )
        try:
            return read(response.json())
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise _TryAgain(f"an answer that is no completion: {error}"[:80]) from error

    def _without_key(self, text: str) -> str:
        """Some servers repeat the key that they refuse."""
        clean = text.replace(self._key, "<key>") if self._key else text
        return str(redact(clean))

    def _given_up(self, why: str) -> SetupError:
        return SetupError(
            f"{self._who} {why}; {self.num_kept} answers are kept",
            where=self._setting,
            value=redact(self.url),
            remedy="run the same command again to go on from there",
        )


def key_from(variable: str | None, setting: str = "judge_key_env") -> str | None:
    """The key of an endpoint from an environment variable.

    Raises:
        ConfigError: The variable is not set.
    """
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(
            "the environment variable is not set",
            where=setting,
            value=variable,
            remedy=f"export {variable}=..., or leave {setting} out",
        )
    return key


def _retry_after(header: str | None) -> float | None:
    """Seconds to wait, from a number or a date; ``None`` where there is neither."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(header)
    except (TypeError, ValueError):
        return None
    return max(0.0, moment.timestamp() - time.time())
