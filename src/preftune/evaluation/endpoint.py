"""One question to an OpenAI-compatible endpoint, however the endpoint behaves: bounded in time and in memory."""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import re
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from preftune.config.secrets import redact, remember, variable_name
from preftune.errors import ConfigError, PreftuneError, SetupError

if TYPE_CHECKING:
    import httpx2

#: Bytes of an answer, unpacked. One of a few hundred tokens has some thousand; one with its log-probs, a million.
MOST_BYTES = 8 * 1024 * 1024
#: Answers of a server that may well be different next time.
_PASSING = frozenset({408, 409, 425, 429})
#: What is read of a refusal, to be quoted.
_MOST_SAID = 4096


@dataclass(frozen=True)
class Role:
    """What an endpoint is for.

    Attributes:
        prefix: Begins the names of its settings: ``judge_url``, ``judge_model``, ``judge_key_env``.
        who: What messages call it.
    """

    prefix: str
    who: str

    @property
    def url(self) -> str:
        """Name of the setting that holds its address."""
        return f"{self.prefix}_url"

    @property
    def model(self) -> str:
        """Name of the setting that names the model there."""
        return f"{self.prefix}_model"

    @property
    def key_env(self) -> str:
        """Name of the setting that names the variable with its key."""
        return f"{self.prefix}_key_env"


JUDGE = Role("judge", "the judge")
SERVER = Role("sampling", "the server")


class TryAgain(Exception):
    """A failure that may pass.

    Args:
        reason: What happened.
        after: Seconds that the server asked to wait, or ``None``.
    """

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Endpoint:
    """The address of a model, and how to ask it.

    Args:
        url: Base address such as ``http://localhost:8000/v1``, or the whole one.
        path: What comes behind the base address, such as ``/chat/completions``.
        role: What it is for.
        key: Secret for the ``Authorization`` header, or ``None``; it is sent and nowhere kept.
        timeout: Seconds until an answer is given up, from the first byte sent to the last one received.

    Raises:
        ConfigError: The key cannot be sent.
    """

    def __init__(self, url: str, path: str, role: Role, *, key: str | None, timeout: float) -> None:
        self.url = url if url.rstrip("/").endswith(path) else url.rstrip("/") + path
        self.role = role
        self._key = None if key is None else checked_key(key, "key", role)
        self._timeout = timeout

    def client(self) -> httpx2.AsyncClient:
        """A client for a number of questions, to be entered."""
        import httpx2

        # Nothing that unpacks by itself: a few bytes can stand for gigabytes.
        headers = {"Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return httpx2.AsyncClient(timeout=self._timeout, headers=headers)

    async def ask(self, client: httpx2.AsyncClient, body: dict[str, Any], read: Callable[[Any], Any]) -> Any:
        """What is wanted of the answer to one request.

        Args:
            client: What :meth:`client` returned.
            body: The request.
            read: Takes it out of the answer's JSON; a ``ValueError``, ``LookupError``, ``TypeError`` or
                ``AttributeError`` means that the answer is none.

        Raises:
            TryAgain: It failed in a way that may pass.
            SetupError: The endpoint refuses.
            ConfigError: The address is none.
        """
        import httpx2

        try:
            # One limit over all: an endpoint that sends a byte a minute is silent for no longer than that.
            answer = await asyncio.wait_for(self._ask(client, body), self._timeout)
        except asyncio.TimeoutError as error:
            raise TryAgain(f"no whole answer within {self._timeout:g} s") from error
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise ConfigError("not an address", where=self.role.url, value=redact(self.url)) from error
        except httpx2.HTTPError as error:
            raise TryAgain(self._said(f"{type(error).__name__}: {error}".rstrip(": "))) from error
        except (UnicodeError, ValueError) as error:
            if isinstance(error, PreftuneError):
                raise
            # Headers and status lines that the HTTP library cannot read.
            raise TryAgain(self._said(f"not HTTP ({type(error).__name__})")) from error
        try:
            return read(json.loads(answer))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise TryAgain("an answer that is no completion") from error

    async def _ask(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> bytes:
        async with client.stream("POST", self.url, json=body) as response:
            status = response.status_code
            if status in _PASSING or status >= 500:
                raise TryAgain(f"status {status}", _retry_after(response.headers.get("retry-after")))
            if status != 200:
                raise self._refusal(status, await _read(response, _MOST_SAID, cut=True))
            return await _read(response, MOST_BYTES)

    def _refusal(self, status: int, answer: bytes) -> SetupError:
        said = self._said(answer.decode("utf-8", "replace"))
        remedy = f"set {self.role.key_env} to the variable that holds the key" if status in (401, 403) else None
        remedy = "check the address; it usually ends in /v1" if status in (404, 405) else remedy
        if 300 <= status < 400:
            said, remedy = "it points elsewhere, where the key is not taken", "name the address itself"
        return SetupError(
            f"{self.role.who} refuses (status {status}: {said})",
            where=self.role.url,
            value=redact(self.url),
            remedy=remedy or f"check {self.role.model} and the endpoint's log",
        )

    def _said(self, text: str) -> str:
        """Words of a server in one line; some repeat the key that they refuse."""
        clean = text.replace(self._key, "<key>") if self._key else text
        return " ".join(str(redact(clean)).split())[:200]


async def _read(response: httpx2.Response, most: int, *, cut: bool = False) -> bytes:
    """The body, unpacked, as far as the limit; a longer one is a failure or, with ``cut``, is cut."""
    packing = response.headers.get("content-encoding", "identity").strip().lower()
    if packing not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise TryAgain(f"an answer packed as {' '.join(packing.split())[:20]!r}, which was not asked for")
    unpacker = None if packing in ("", "identity") else zlib.decompressobj(zlib.MAX_WBITS | 32)
    found = bytearray()
    async for chunk in response.aiter_raw():
        room = most + 1 - len(found)
        try:
            found += chunk[:room] if unpacker is None else unpacker.decompress(chunk, room)
        except zlib.error as error:
            raise TryAgain("an answer that cannot be unpacked") from error
        if len(found) > most:
            if cut:
                break
            raise TryAgain(f"an answer of more than {most // 1024**2} MiB")
    if unpacker is not None and not unpacker.eof and not cut:
        raise TryAgain("an answer that cannot be unpacked")
    return bytes(found[:most])


def _retry_after(header: str | None) -> float | None:
    """Seconds to wait, from a number or a date; ``None`` where there is neither."""
    if not header:
        return None
    try:
        seconds = float(header)
        return max(0.0, seconds) if seconds == seconds else None
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(header)
        return max(0.0, moment.timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def key_from(variable: str | None, role: Role = JUDGE) -> str | None:
    """An endpoint's key from an environment variable; white space around it, as mounted files end in, is left out.

    Raises:
        ConfigError: The variable is not set, or holds what cannot be a key.
    """
    if variable is None:
        return None
    name = checked_variable(variable, role)
    key = os.environ.get(name, "").strip()
    if not key:
        raise ConfigError(
            "the environment variable is not set",
            where=role.key_env,
            value=name,
            remedy=f"export {name}=..., or leave {role.key_env} out",
        )
    return checked_key(key, f"the environment variable {name}", role)


def checked_variable(variable: str, role: Role) -> str:
    """The name of an environment variable, never quoted where it might be the key itself.

    Raises:
        ConfigError: It is not plainly such a name.
    """
    name = variable_name(variable)
    if name is None:
        remember(variable)
        raise ConfigError(
            "not the name of an environment variable",
            where=role.key_env,
            allowed="a name such as OPENAI_API_KEY",
            remedy="if this is the key itself, export it and give the variable's name",
        )
    return name


def checked_key(key: str, where: str, role: Role) -> str:
    """A key that an HTTP header can carry, without the white space around it.

    Args:
        key: The key.
        where: What to call it in the error, which never quotes it.
        role: Whose key it is.

    Raises:
        ConfigError: It has characters that no header takes.
    """
    stripped = key.strip()
    remember(stripped)
    if not re.fullmatch(r"[\x21-\x7e]*", stripped):
        raise ConfigError(
            f"{role.who}'s key has a character that no HTTP header takes",
            where=where,
            allowed="letters, digits and signs of ASCII, on one line",
            remedy="copy the key again",
        )
    return stripped
