"""Who may talk to the page: nobody but the browser that was given its address.

The address carries a random token, which other sites cannot know. The Host header is checked, so that a foreign name
that was pointed at this machine (DNS rebinding) is turned away; so is the Origin of everything that changes something.
There are no cookies: a request that another site makes brings nothing along.
"""

from __future__ import annotations

import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 256 * 1024
_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


def new_token() -> str:
    """256 random bits that may stand in an address."""
    return secrets.token_urlsafe(32)


class Guard:
    """Turns away what does not come from the page itself, before any of it is read.

    Args:
        app: The application behind it; its paths begin with the token too.
        token: First part of every path.
        hosts: Values of the Host header that name this server.
    """

    def __init__(self, app: ASGIApp, token: str, hosts: frozenset[str]) -> None:
        self._app, self._token, self._hosts = app, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request and hand it on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        status, why = self._verdict(scope, headers)
        if status:
            await _refuse(send, status, why)
            return
        await self._app(scope, _Limited(receive), _with_headers(send))

    def _verdict(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, str]:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if host not in self._hosts:
            return 421, "this server does not answer to that name"
        first = scope["path"].split("/")[1:2]
        if not first or not secrets.compare_digest(first[0].encode("utf-8", "replace"), self._token.encode()):
            return 404, "not found; open the address that was printed, with its token"
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower() != f"http://{host}":
            return 403, "this request comes from another site"
        if headers.get(b"sec-fetch-site", b"same-origin") not in (b"same-origin", b"none"):
            # The file that `--open` shows leads to the first page, as a link that somebody follows.
            followed = (headers.get(b"sec-fetch-mode"), headers.get(b"sec-fetch-dest")) == (b"navigate", b"document")
            if not (followed and scope["method"] == "GET" and scope["path"] == f"/{self._token}/"):
                return 403, "this request comes from another site"
        if scope["method"] not in ("GET", "HEAD"):
            # Browsers send it with everything that changes something; a form of another site cannot leave it out.
            if origin is None:
                return 403, "a request that changes something needs an Origin"
            if not headers.get(b"content-type", b"").startswith(b"application/json"):
                return 415, "only application/json is accepted"
            length = headers.get(b"content-length", b"0")
            if not length.isdigit() or int(length) > MAX_BODY:
                return 413, f"more than {MAX_BODY} bytes"
        return 0, ""


class TooLarge(Exception):
    """A body that grew past the limit while it was read."""


class _Limited:
    """Counts the bytes of a body, for one that came without a length, or with a wrong one."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._seen = receive, 0

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._seen += len(message.get("body", b""))
            if self._seen > MAX_BODY:
                raise TooLarge
        return message


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
        await send(message)

    return sending


async def _refuse(send: Send, status: int, why: str) -> None:
    body = (why + "\n").encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode()), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
