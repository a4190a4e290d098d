"""Which settings and texts are secret, so that no key reaches a log, a provenance file, a model card or a terminal."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

REDACTED = "<redacted>"

#: Names whose last word alone says it.
_ALONE = frozenset(
    [
        *("token", "password", "passwd", "passphrase", "pwd", "secret", "secrets", "credential", "credentials"),
        *("authorization", "apikey", "apikeys", "pat"),
    ]
)
#: `max_tokens_per_row` and `sort_key` count or name; `access_tokens` and `api_key` open doors.
_WITH_OWNER = frozenset(["key", "keys", "tokens"])
_OWNERS = frozenset(
    [
        *("access", "account", "api", "auth", "bearer", "bot", "client", "deploy", "encryption", "hf", "hub", "judge"),
        *("kaggle", "master", "oauth", "openai", "anthropic", "private", "refresh", "secret", "service", "session"),
        *("shared", "signing", "subscription", "wandb", "webhook"),
    ]
)
_HARMLESS_NAME = re.compile(
    r"(^|[_.])(pad|eos|bos|unk|sep|cls|mask|special|additional|image|stop|decoder_start|max|max_new|num)_tokens?\Z",
    re.IGNORECASE,
)
#: Parts of an address that sign it, or that hold a whole connection string.
_SIGNATURES = frozenset(
    [
        *("sig", "signature", "key", "auth", "code", "policy", "sas", "odbc_connect", "awsaccesskeyid", "key-pair-id"),
        *("googleaccessid", "x-amz-signature", "x-amz-credential", "x-amz-security-token", "x-goog-signature"),
        *("x-goog-credential", "x-oss-signature", "ossaccesskeyid", "q-signature"),
    ]
)
_SECRET_WORD = re.compile(
    r"token|password|passwd|passphrase|pwd|secret|credential|private_key|authorization|api_?key", re.IGNORECASE
)
#: Keys that their issuers made recognisable, by the prefixes that they publish for scanners.
_SHAPES = (
    r"(?:hf|api_org)_[A-Za-z0-9]{16,}",  # Hugging Face
    r"sk-[A-Za-z0-9_-]{16,}",  # OpenAI, Anthropic, OpenRouter, DeepSeek
    r"gsk_[A-Za-z0-9]{20,}",  # Groq
    r"(?:nvapi|xai|pplx|tgp_v1|csk|fw|jina|voyage|pa|lsv2_pt|lsv2_sk)[-_][A-Za-z0-9_-]{20,}",  # inference services
    r"r8_[A-Za-z0-9]{20,}",  # Replicate
    r"wandb_v1_[A-Za-z0-9_]{20,}",
    r"gh[opusr]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{20,}",
    r"gl(?:pat|ptt|dt|rt|cbt|soat)-[A-Za-z0-9_-]{16,}",  # GitLab
    r"xox[abeoprs]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{10,}",  # Slack
    r"(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}",  # AWS
    r"AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9_-]{16,}|GOCSPX-[A-Za-z0-9_-]{20,}",  # Google
    r"eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*",  # JSON web tokens
    r"npm_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_-]{16,}|dckr_(?:pat|oat)_[A-Za-z0-9_-]{16,}|rubygems_[a-f0-9]{40,}",
    r"do[opr]_v1_[a-f0-9]{40,}|dapi[a-f0-9]{32}(?:-\d)?|hv[sbr]\.[A-Za-z0-9_-]{20,}|sntry[su]_[A-Za-z0-9_=+/-]{20,}",
    r"[rs]k_(?:live|test)_[A-Za-z0-9]{16,}|SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}|key-[a-f0-9]{32}",
    r"sq0[a-z]{3}-[A-Za-z0-9_-]{20,}|shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}|PMAK-[a-f0-9]{20,}-[a-f0-9]{20,}",
    r"ATATT3[A-Za-z0-9_=-]{20,}|lin_api_[A-Za-z0-9]{30,}|ntn_[A-Za-z0-9]{30,}|figd_[A-Za-z0-9_-]{30,}",
    r"\d{8,10}:AA[A-Za-z0-9_-]{30,}",  # Telegram
    r"AGE-SECRET-KEY-1[A-Z0-9]{40,}",
)
_SECRET_VALUE = re.compile(r"(?<![A-Za-z0-9])(?:" + "|".join(_SHAPES) + ")")
_PRIVATE_KEY = re.compile(r"-----BEGIN ([A-Z ]*PRIVATE KEY)-----.*?(?:-----END \1-----|\Z)", re.DOTALL)
_WEBHOOK = re.compile(
    r"(https?:/{1,2}(?:hooks\.slack\.com/services|discord(?:app)?\.com/api/webhooks|[\w.-]+\.webhook\.office\.com)/)"
    r"[^\s\"'<>]+"
)
_HEADER = re.compile(r"\b(authorization\s*[:=]\s*)(?!<redacted>)[^\s\"',]+(?:\s+[^\s\"',]+)?", re.IGNORECASE)
#: A word of a sentence is no key: it has a digit, a sign, or more letters than words have.
_BEARER = re.compile(
    r"\b((?:bearer|basic)\s+)(?=[^\s\"']*[\d_=~+/.-][^\s\"']|[A-Za-z]{20})[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE
)
_ASSIGNED = re.compile(r"([?&;]?)(?<![\w.-])([A-Za-z][\w.-]*)(\s?=\s?)(\"[^\"]*\"|'[^']*'|[^\s&;,\"']+)")
# Each character can be taken in one way only: what is searched may be long, and written to keep the search busy.
_QUOTED = re.compile(r"""(["'])([A-Za-z][\w.-]*)(\1\s*:\s*)(["'])((?:\\.|(?!\4)[^\\])*)\4""", re.DOTALL)
_ESCAPED = re.compile(r"""(\\["'])([A-Za-z][\w.-]*)(\1\s*:\s*)(\\["'])([^"'\\]*)\4""")
# With one slash as well: paths swallow the second one. A port is no password.
_URL_LOGIN = re.compile(
    r"(\w:/{1,2})[^/\s:@]{0,256}:(?!\d{1,5}(?:/|\Z))[^\s@]{0,1024}(?:@[^\s@/]{0,256}){0,4}@|(\w://)[^/\s:@]{1,1024}@"
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
#: Shorter values, such as "1" or "true", are no secrets and occur everywhere.
_SHORTEST = 8
#: Variables of every shell: the working directory, not a password.
_OF_SHELLS = frozenset(["PWD", "OLDPWD"])

_REMEMBERED: set[str] = set()


def remember(secret: str) -> None:
    """Have a value redacted wherever it turns up in this process, whatever it looks like.

    Args:
        secret: The value; one too short to be a key is not remembered.
    """
    if len(secret) >= _SHORTEST:
        _REMEMBERED.add(secret)


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret."""
    words = [word for word in re.split(r"[\W_]+", _CAMEL.sub("_", name).lower()) if word]
    if not words or _HARMLESS_NAME.search(name):
        return False
    owned = words[-1] in _WITH_OWNER and bool(_OWNERS.intersection(words[:-1]))
    return words[-1] in _ALONE or owned or bool(re.search("api_?key", name, re.IGNORECASE))


def redact(value: Any, name: str = "") -> Any:
    """Replace secrets in any nested value.

    Args:
        value: Mappings, sequences and scalars.
        name: Its key.

    Returns:
        A copy without secrets: values under secret names; texts that look like keys, logins and signatures anywhere;
        and what the environment holds under secret names.
    """
    return _redact(value, name, _known())


def redact_argv(argv: Sequence[str]) -> list[str]:
    """Replace secrets in a command line, in both the ``--name value`` and the ``--name=value`` form."""
    clean: list[str] = []
    name = ""
    for token in argv:
        if token.startswith("--"):
            written, equals, value = token[2:].partition("=")
            name = written.replace("-", "_")
            # A name with something else in it is no name: a value that begins with two dashes.
            plain = f"--{written}" if re.fullmatch(r"[\w.-]*", written) else str(redact(f"--{written}"))
            clean.append(f"{plain}={_redact_text(value, name)}" if equals else plain)
            name = "" if equals else name
        else:
            clean.append(_redact_text(token, name))
    return clean


def variable_name(text: str) -> str | None:
    """The text where it is plainly the name of an environment variable, and nothing that could be a key.

    >>> variable_name("OPENAI_API_KEY"), variable_name("sk-abc123")
    ('OPENAI_API_KEY', None)
    """
    parts = text.split("_")
    plain = bool(re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", text)) and all(len(part) <= 16 for part in parts)
    mixed = any(re.search(r"\d[A-Za-z]+\d|[a-z][A-Z]|[A-Z][a-z]+[A-Z]", part) for part in parts)
    return text if plain and not mixed and redact(text) == text else None


def _known() -> list[str]:
    """Values that are secret wherever they occur, the longest first: one may be a part of another."""
    named = ((name, value.strip()) for name, value in os.environ.items() if is_secret(name) and name not in _OF_SHELLS)
    # A folder's path is part of every path below it, and opens nothing; a word may be a password and a folder here.
    held = {
        value for _, value in named if len(value) >= _SHORTEST and not (os.path.isabs(value) and os.path.isdir(value))
    }
    return sorted(held | _REMEMBERED, key=len, reverse=True)


def _redact(value: Any, name: str, known: Iterable[str]) -> Any:
    if name and value not in (None, "", False, True) and (is_secret(name) or _is_misplaced(name, value)):
        return REDACTED
    if isinstance(value, Mapping):
        return {_redact(key, "", known): _redact(entry, str(key), known) for key, entry in value.items()}
    if isinstance(value, str):
        return _clean(value, known)
    if isinstance(value, (list, tuple)):
        return [_redact(entry, "", known) for entry in value]
    return value


def _is_misplaced(name: str, value: Any) -> bool:
    """A key where the name of its environment variable belongs."""
    return name.endswith("key_env") and (not isinstance(value, str) or variable_name(value) is None)


def _clean(text: str, known: Iterable[str]) -> str:
    for secret in known:
        text = text.replace(secret, REDACTED)
    text = _PRIVATE_KEY.sub(REDACTED, text)
    text = _WEBHOOK.sub(rf"\1{REDACTED}", text)
    text = _URL_LOGIN.sub(rf"\1\2{REDACTED}@", text)
    text = _SECRET_VALUE.sub(REDACTED, text)
    text = _BEARER.sub(rf"\1{REDACTED}", text)
    text = _HEADER.sub(rf"\1{REDACTED}", text)
    text = _ESCAPED.sub(_quoted, _QUOTED.sub(_quoted, text))
    return _ASSIGNED.sub(_assigned, text)


def _quoted(found: re.Match[str]) -> str:
    quote, name, colon, other, value = found.groups()
    return f"{quote}{name}{colon}{other}{REDACTED}{other}" if value and is_secret(name) else found[0]


def _assigned(found: re.Match[str]) -> str:
    mark, name, equals, _ = found.groups()
    secret = is_secret(name) or (mark != "" and name.lower() in _SIGNATURES) or name.lower() in ("accountkey", "pwd")
    return f"{mark}{name}{equals}{REDACTED}" if secret else found[0]


def _redact_text(text: str, name: str = "") -> str:
    """A value as typed: mappings and lists are written as JSON or YAML there, and may hold secrets inside."""
    plain = str(redact(text, name))
    if ":" not in text or plain == REDACTED:
        return plain
    import yaml

    from preftune.config.yaml_text import read_yaml

    try:
        value = read_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        # Nothing that a setting could be; what it holds cannot be told.
        return REDACTED if _SECRET_WORD.search(text) else plain
    if not isinstance(value, (dict, list)):
        return plain
    clean = json.dumps(redact(value), default=str, ensure_ascii=False)
    return plain if clean == json.dumps(value, default=str, ensure_ascii=False) else clean
