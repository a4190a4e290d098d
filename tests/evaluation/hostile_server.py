"""An endpoint that does whatever a client least expects, one way for each request, byte by byte."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

Way = Callable[[socket.socket], None]


def completion(content: object) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()


def head(status: str = "200 OK", **headers: object) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def whole(body: bytes, status: str = "200 OK", **headers: object) -> Way:
    """An ordinary answer with an extraordinary content."""
    return lambda peer: peer.sendall(head(status, Content_Length=len(body), **headers) + body)


def raw(data: bytes) -> Way:
    return lambda peer: peer.sendall(data)


def endless(peer: socket.socket) -> None:
    peer.sendall(head(Transfer_Encoding="chunked"))
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    while True:
        peer.sendall(chunk)


def endless_refusal(peer: socket.socket) -> None:
    peer.sendall(head("400 Bad Request", Transfer_Encoding="chunked"))
    while True:
        peer.sendall(b"10000\r\n" + b"n" * 65536 + b"\r\n")


def drip_body(peer: socket.socket) -> None:
    peer.sendall(head(Content_Length=100_000))
    while True:
        peer.sendall(b" ")
        time.sleep(0.05)


def drip_headers(peer: socket.socket) -> None:
    peer.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while True:
        peer.sendall(b"a")
        time.sleep(0.05)


def silent(peer: socket.socket) -> None:
    time.sleep(600)


#: What 10 MB of gzip make of 10 GB; the client sees as much of it as it reads.
_ROW = gzip.compress(b" " * 2**26, 9)
WAYS: dict[str, Way] = {
    "deep JSON": whole(b"[" * 200_000),
    "deep object": whole(b'{"choices":' * 100_000),
    "bad gzip": whole(b"this is no gzip", Content_Encoding="gzip"),
    "cut gzip": whole(gzip.compress(completion("[[A]]"))[:-12], Content_Encoding="gzip"),
    "gzip bomb": whole(_ROW * 16, Content_Encoding="gzip"),
    "unknown packing": whole(completion("[[A]]"), Content_Encoding="zstd"),
    "endless body": endless,
    "endless refusal": endless_refusal,
    "a drip": drip_body,
    "a drip of headers": drip_headers,
    "silence": silent,
    "closed at once": lambda peer: None,
    "no HTTP": raw(b"\x16\x03\x01 this is TLS"),
    "endless header": raw(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 1_000_000),
    "many headers": raw(b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 100_000),
    "no status": raw(b"HTTP/1.1 abc\r\n\r\n"),
    "status 999": raw(head("999 Odd", Content_Length=0)),
    "status 100 for ever": raw(head("100 Continue") * 1000),
    "wrong length": raw(head(Content_Length=1000) + b"{}"),
    "length -1": raw(head(Content_Length=-1) + b"{}"),
    "two lengths": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}"),
    "bad chunks": raw(head(Transfer_Encoding="chunked") + b"zz\r\n{}\r\n"),
    "odd bytes in headers": raw(b"HTTP/1.1 200 OK\r\nRetry-After: \xff\x00\r\nContent-Length: 0\r\n\r\n"),
    "a year's pause": whole(b"", "429 Slow", Retry_After="1e300"),
    "a pause of nan": whole(b"", "429 Slow", Retry_After="nan"),
    "a date far away": whole(b"", "503 Slow", Retry_After="Fri, 31 Dec 99999999 23:59:59 GMT"),
    "redirect": whole(b"", "302 Found", Location="http://127.0.0.1:9/elsewhere"),
    "redirect to itself": whole(b"", "307 Again", Location="/v1/chat/completions"),
    "not UTF-8": whole(b'{"choices": "\xff\xfe"}'),
    "null": whole(b"null"),
    "numbers": whole(b"1e999"),
    "long number": whole(b'{"choices": ' + b"9" * 10_000 + b"}"),
    "content null": whole(completion(None)),
    "content a list": whole(completion([{"type": "text", "text": "[[A]]"}])),
    "choices a number": whole(b'{"choices": 3}'),
    "no message": whole(b'{"choices": [{"message": "[[A]]"}]}'),
    "escapes in a refusal": whole(b"no\x1b[2J\x1b]0;title\x07\r\nno", "400 \x1b[31mred"),
    "surrogates in a refusal": whole(b"\xed\xa0\x80 \xc2\x9b31m", "403 Forbidden"),
    "too long": whole(completion("x" * (9 * 1024 * 1024))),
}


@dataclass
class Hostile:
    """A server that treats every request in one way.

    Attributes:
        way: What it does.
        num_requests: How often it was asked.
        heard: What the requests were.
    """

    way: Way
    num_requests: int = 0
    heard: list[bytes] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            self.num_requests += 1
            threading.Thread(target=self._treat, args=(peer,), daemon=True).start()

    def _treat(self, peer: socket.socket) -> None:
        with peer, contextlib.suppress(OSError):
            self.heard.append(peer.recv(1 << 20))
            self.way(peer)
            peer.shutdown(socket.SHUT_WR)
            # Until the client closes: what it has not read yet would be lost with the socket.
            peer.settimeout(10)
            while peer.recv(1 << 16):
                pass


@contextlib.contextmanager
def hostile(way: Way) -> Iterator[Hostile]:
    """Serve for the length of a block."""
    listener = socket.create_server(("127.0.0.1", 0))
    made = Hostile(way, port=listener.getsockname()[1])
    threading.Thread(target=made._serve, args=(listener,), daemon=True).start()
    try:
        yield made
    finally:
        listener.close()
