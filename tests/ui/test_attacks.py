"""Attacks on the page: other names, other sites, other folders, too much."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from preftune.ui.server import doorway
from tests.ui.conftest import Server

JSON = {"Content_Type": "application/json"}


def own_origin(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1",
        "127.0.0.1.evil.example:{port}",
        "",
        "[::1]:{port}",
        "0.0.0.0:{port}",
    ],
)
def test_a_foreign_name_for_this_machine_is_turned_away(server: Server, host: str) -> None:
    status, text, _ = server.get("list", Host=host.format(port=server.port))
    # An empty header is no valid request to begin with.
    assert status in ((400, 421) if not host else (421,))
    assert "one" not in text


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LOCALHOST"])
def test_its_own_names_are_answered(server: Server, name: str) -> None:
    assert server.get("list", Host=f"{name}:{server.port}")[0] == 200


@pytest.mark.parametrize("token", ["", "wrong", "..", "%2e%2e", "\u00e9".encode().decode("latin-1"), "x" * 5000])
@pytest.mark.parametrize("path", ["", "list", "events", "view"])
def test_without_the_token_there_is_nothing(server: Server, token: str, path: str) -> None:
    if token.isascii():
        status, text, _ = server.request("GET", path, token=token)
        assert status == 404
        assert "not found" in text.lower()
    assert server.token not in json.dumps(server.request("GET", path, token="wrong"))


def test_a_part_of_the_token_or_more_than_it_does_not_do(server: Server) -> None:
    for token in (server.token[:-1], server.token + "a", server.token.swapcase()):
        assert server.request("GET", "list", token=token)[0] == 404


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://127.0.0.1:{port}", "http://127.0.0.1:1", "file://"]
)
def test_another_site_can_ask_for_nothing_even_with_the_token(server: Server, origin: str) -> None:
    headers = {"Origin": origin.format(port=server.port), **JSON}
    body = json.dumps({"id": server.key("one"), "action": "save"}).encode()
    assert server.request("POST", "act", body, **headers)[0] == 403
    assert server.get("list", Origin=headers["Origin"])[0] == 403
    assert not (server.root / "one" / "SAVE").exists()


def test_a_form_of_another_site_cannot_act(server: Server) -> None:
    body = json.dumps({"id": server.key("one"), "action": "save"}).encode()
    # Without an Origin, as old browsers and programs send it.
    assert server.request("POST", "act", body, **JSON)[0] == 403
    # The content types that a form can send without asking first.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        status, _, _ = server.request("POST", "act", body, Origin=own_origin(server), Content_Type=kind)
        assert status == 415
    headers = {"Origin": own_origin(server), "Sec_Fetch_Site": "cross-site", **JSON}
    assert server.request("POST", "act", body, **headers)[0] == 403
    assert server.get("list", Sec_Fetch_Site="cross-site")[0] == 403


NAVIGATION = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}


def test_a_link_leads_to_the_first_page_and_no_further(server: Server) -> None:
    assert server.get("", **NAVIGATION)[0] == 200
    assert server.request("GET", "", None, "wrong", **NAVIGATION)[0] == 404
    for path in ("list", f"view?id={server.key('one')}", "changes"):
        assert server.get(path, **NAVIGATION)[0] == 403
    for other in ({"Sec_Fetch_Dest": "iframe"}, {"Sec_Fetch_Mode": "no-cors"}, {"Origin": "null"}):
        assert server.get("", **{**NAVIGATION, **other})[0] == 403
    assert server.request("POST", "", b"{}", None, **NAVIGATION, **JSON)[0] in (403, 405)


def test_the_browser_s_command_line_shows_no_token() -> None:
    token = "planted-token-0001"
    with doorway(f"http://127.0.0.1:1234/{token}/") as shown:
        page = Path(shown.removeprefix("file://"))
        assert token not in shown
        assert f'url=http://127.0.0.1:1234/{token}/"' in page.read_text()
        assert page.parent.stat().st_mode & 0o077 == 0
    assert not page.parent.exists()


def test_reading_addresses_change_nothing(server: Server) -> None:
    for path in ("act", "prompt"):
        assert server.get(f"{path}?id={server.key('one')}&action=save")[0] == 405
    assert server.request("OPTIONS", "act", Origin="http://evil.example")[0] == 403


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "..%2foutside",
        "/etc",
        "one/../../outside",
        "linked",
        "sneaky",
        ".",
        "",
        "%00",
        "one",
        "../../../../etc/passwd",
    ],
)
def test_no_path_can_be_asked_for(server: Server, name: str) -> None:
    for place in ("view", "news", "data"):
        assert server.get(f"{place}?id={name}")[0] == 404
    status, said = server.post("act", {"id": name, "action": "save"})
    assert (status, said) == (404, {"error": "no such run or action"})


@pytest.mark.parametrize("path", ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "static/../../app.py", "%2e%2e/list"])
def test_no_file_can_be_asked_for(server: Server, path: str) -> None:
    status, text, _ = server.get(path)
    assert status == 404
    assert "root:" not in text


def test_symbolic_links_that_lead_out_are_not_shown(server: Server) -> None:
    labels = {entry["label"] for entry in json.loads(server.get("list")[1])}
    assert {"one", "deep/trl", "sweep"} <= labels
    assert not {"linked", "sneaky"} & labels


def test_large_bodies_are_refused_before_they_are_read(server: Server) -> None:
    headers = {"Origin": own_origin(server), **JSON}
    assert server.request("POST", "prompt", b"{}", Content_Length="300000", **headers)[0] == 413
    assert server.request("POST", "prompt", b"{}", Content_Length="99999999999999999999", **headers)[0] == 413
    # Without a length: it ends once too much has come.
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    body = chunk * 5 + b"0\r\n\r\n"
    assert server.request("POST", "prompt", body, Transfer_Encoding="chunked", **headers)[0] == 413


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 200_000, b'"text"'])
def test_bodies_that_are_no_object_end_in_a_short_answer(server: Server, body: bytes) -> None:
    status, text, _ = server.request("POST", "act", body, Origin=own_origin(server), **JSON)
    assert (status, json.loads(text)) == (400, {"error": "the request is no JSON object"})


@pytest.mark.parametrize("start", ["-1", "1e9", "99999999999999", "x", "\u0663", "0;ls"])
def test_rows_are_asked_for_by_number(server: Server, start: str) -> None:
    path = f"data?id={server.key('one')}&start={start.encode().hex() if not start.isascii() else start}"
    assert server.get(path)[0] in (404, 409)


def test_answers_forbid_frames_guessing_and_storing(server: Server) -> None:
    for path in ("", "list", f"view?id={server.key('one')}"):
        _, _, headers = server.get(path)
        assert headers["x-frame-options"] == "DENY"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers


def test_it_listens_on_this_machine_alone(server: Server) -> None:
    own = socket.gethostbyname(socket.gethostname())
    if own.startswith("127."):  # no network: another address of the loopback serves as well
        own = "127.0.0.2"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((own, server.port), timeout=5)
