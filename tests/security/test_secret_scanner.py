"""Keys of thirty kinds, wherever a person may put one: none in any file that is left or line that is printed."""

from __future__ import annotations

import base64
import json
import string
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from preftune.config import redact, redact_argv
from preftune.config.secrets import REDACTED, variable_name
from preftune.errors import ConfigError
from tests.evaluation.hostile_server import completion, hostile, whole
from tests.security.conftest import Cli

_DRAW = Random(0)
_LETTERS = string.ascii_letters + string.digits


def some(number: int, alphabet: str = _LETTERS) -> str:
    return "".join(_DRAW.choice(alphabet) for _ in range(number))


HEX, UPPER = "0123456789abcdef", string.ascii_uppercase + string.digits
#: As their issuers describe them.
KEYS = {
    "Hugging Face": "hf_" + some(34),
    "Hugging Face organisation": "api_org_" + some(34),
    "OpenAI": "sk-proj-" + some(48),
    "OpenAI, old": "sk-" + some(20) + "T3BlbkFJ" + some(20),
    "Anthropic": "sk-ant-api03-" + some(93) + "AA",
    "OpenRouter": "sk-or-v1-" + some(64, HEX),
    "Groq": "gsk_" + some(52),
    "Replicate": "r8_" + some(37),
    "NVIDIA": "nvapi-" + some(64),
    "xAI": "xai-" + some(80),
    "Perplexity": "pplx-" + some(48),
    "GitHub": "ghp_" + some(36),
    "GitHub, fine-grained": "github_pat_" + some(22) + "_" + some(59),
    "GitLab": "glpat-" + some(20),
    "Slack": f"xoxb-{some(12, string.digits)}-{some(12, string.digits)}-{some(24)}",
    "AWS key id": "AKIA" + some(16, UPPER),
    "AWS key id, passing": "ASIA" + some(16, UPPER),
    "Google": "AIza" + some(35),
    "Google OAuth": "ya29." + some(60),
    "JSON web token": f"eyJhbGciOiJIUzI1NiJ9.{some(40)}.{some(43)}",
    "npm": "npm_" + some(36),
    "PyPI": "pypi-AgEIcHlwaS5vcmc" + some(60),
    "Docker": "dckr_pat_" + some(27),
    "DigitalOcean": "dop_v1_" + some(64, HEX),
    "Databricks": "dapi" + some(32, HEX),
    "Vault": "hvs." + some(24),
    "Stripe": "sk_live_" + some(24),
    "SendGrid": f"SG.{some(22)}.{some(43)}",
    "W&B": "wandb_v1_" + some(40),
    "Telegram": f"{some(10, string.digits)}:AA{some(33)}",
}
#: Without a form of their own: known by where they stand.
PLAIN = {
    "hex": some(40, HEX),
    "letters": some(32),
    "AWS secret": some(40),
    "base64": base64.b64encode(some(30).encode()).decode(),
}
PEM = f"-----BEGIN RSA PRIVATE KEY-----\n{some(64)}\n{some(64)}\n-----END RSA PRIVATE KEY-----"

ANYWHERE = (
    "{}", "see {} there", '"{}"', "key={}", "a,{},b", "({})", "https://host/{}/x", "'token': '{}'", "\t{}\n", "run-{}",
)  # fmt: skip
IN_PLACE = (
    "Authorization: Bearer {}",
    "authorization={}",
    '{{"api_key": "{}"}}',
    "{{'hub_token': '{}', 'n': 1}}",
    "https://me:{}@host/path",
    "postgresql://:{}@host/db",
    "postgresql+psycopg2://user:{}@host:5432/db?sslmode=require",
    "postgresql://host/db?user=me&password={}",
    "mysql://host/db?passwd={}&x=1",
    "redis://:{}@host:6379/0",
    "mssql+pyodbc:///?odbc_connect=DRIVER%3D{}",
    "https://bucket.s3.amazonaws.com/rows.jsonl?X-Amz-Expires=60&X-Amz-Signature={}",
    "https://bucket.s3.amazonaws.com/rows.jsonl?X-Amz-Security-Token={}&x=1",
    "https://storage.googleapis.com/b/o?GoogleAccessId=me&Signature={}",
    "https://me.blob.core.windows.net/c/rows.jsonl?sv=2024&sig={}",
    "https://host/v1?key={}",
    "https://hooks.slack.com/services/T000/B000/{}",
    "host=db user=me password={} dbname=x",
    "password='{}'",
    "DefaultEndpointsProtocol=https;AccountName=me;AccountKey={};EndpointSuffix=x",
    "aws_secret_access_key = {}",
    "Bearer {}",
    "{{\"headers\": {{\"Authorization\": \"Bearer {}\"}}}}",
)  # fmt: skip


@pytest.mark.parametrize("kind", KEYS)
def test_known_kinds_anywhere(kind: str) -> None:
    key = KEYS[kind]
    for text in ANYWHERE + IN_PLACE:
        assert key not in redact(text.format(key)), text
        assert key not in " ".join(redact_argv(["dpo", "--run_name", text.format(key)])), text
        assert key not in str(redact({"nested": [{"deep": text.format(key)}], text.format(key): 1})), text
    assert variable_name(key) is None


@pytest.mark.parametrize("kind", PLAIN)
def test_others_where_they_stand(kind: str) -> None:
    key = PLAIN[kind]
    for text in IN_PLACE:
        assert key not in redact(text.format(key)), text
        for argv in (["--run_name", text.format(key)], [f"--run_name={text.format(key)}"]):
            assert key not in " ".join(redact_argv(["dpo", *argv])), text
    for name in ("hub_token", "api_key", "apiKey", "accessToken", "x-api-key", "client_secret", "DB_PASSWORD", "pwd"):
        assert redact({name: key}) == {name: REDACTED}
        assert redact_argv([f"--{name}", key]) == [f"--{name}", REDACTED]
    assert variable_name(key) is None


def test_private_keys_of_many_lines() -> None:
    assert redact(f"a {PEM} b") == f"a {REDACTED} b"
    assert redact(PEM[:100]) == REDACTED


def test_what_is_no_secret_stays() -> None:
    for text in (
        "https://example.com:8000/a@b",
        "https://huggingface.co/org/model",
        "Basic understanding of bearer bonds",
        "max_new_tokens=64 pad_token=<pad> eos_token = '</s>'",
        "C:/data/a@b 12:30",
        "skip-this-word hf_hub task-specific-model-name-of-some-length",
        "Qwen/Qwen2.5-0.5B-Instruct",
        "sha256 " + "0123456789abcdef" * 4,
        "monkey=1&turkey=2",
        "loss=0.69 step=3; lr=1e-6",
    ):
        assert redact(text) == text
    assert redact({"num_tokens": 3, "sort_key": "x", "tokenizer": "y"}) == {
        "num_tokens": 3,
        "sort_key": "x",
        "tokenizer": "y",
    }


def test_what_the_environment_holds_is_known_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, f" {PLAIN['letters']}\n")
        assert PLAIN["letters"] not in redact(f"the server said {PLAIN['letters']}!")
        monkeypatch.delenv(name)
    assert PLAIN["letters"] in redact(f"the server said {PLAIN['letters']}!")


BUSY = {
    "word": "a" * 100_000,
    "addresses": "a://a:a" * 15_000,
    "addresses apart": "a://a:a " * 15_000,
    "logins": "a://a:" + "@a" * 50_000,
    "names": "a=" * 50_000,
    "secret names": "token=" * 15_000,
    "pairs": '"a":"' * 20_000,
    "backslashes": '"token":"' + "\\\\" * 50_000,
    "escaped pairs": '\\\\"token\\\\":\\\\"' * 10_000,
    "headers": "authorization:" * 8_000 + "bearer " * 8_000 + "bearer " + "a" * 50_000,
    "keys": "sk-" * 30_000 + "eyJaaaaaaaaaaaa." * 5_000 + "SG." + "a." * 40_000,
    "private keys": "-----BEGIN PRIVATE KEY-----" * 4_000,
    "webhooks": "https://hooks.slack.com/services/" * 4_000,
    "dots": "a.-" * 40_000,
}


@pytest.mark.parametrize("name", BUSY)
def test_texts_that_keep_a_search_busy(name: str) -> None:
    began = time.process_time()
    redact(BUSY[name])
    assert time.process_time() - began < 5.0


# ---- from end to end -------------------------------------------------------------------------------------------------

ALL = {**KEYS, **PLAIN}


def found_in(data: str | bytes) -> list[str]:
    raw = data if isinstance(data, bytes) else data.encode("utf-8", "replace")
    return [kind for kind, key in ALL.items() if key.encode() in raw]


def written(folder: Path, *, but: tuple[str, ...] = ()) -> dict[str, list[str]]:
    found = {}
    for path in folder.rglob("*"):
        kinds = found_in(str(path.relative_to(folder)))
        if path.is_file() and not path.is_symlink() and path.name not in but:
            kinds += found_in(path.read_bytes())
        if kinds:
            found[str(path.relative_to(folder))] = kinds
    return found


TRAINING = ["--model_name_or_path", "model", "--dataset_name", "pairs.jsonl", "--max_steps", "1", "--save_steps", "1"]


def settings() -> dict[str, Any]:
    """Settings of a run with a key in every corner of them."""
    nested = {f"note_{n}": f"see {key}" for n, key in enumerate(KEYS.values())}
    return {
        "run_name": " ".join(KEYS.values()),
        "hub_token": PLAIN["letters"],
        "model_init_kwargs": {"token": PLAIN["hex"]},
        "hub_model_id": f"me/{KEYS['Hugging Face']}",
        "trackio_space_id": f"https://me:{PLAIN['AWS secret']}@host/x",
        "lr_scheduler_kwargs": {},
        "project": f"https://host/x?sig={PLAIN['base64']}&a={nested['note_0']}",
    }


@pytest.mark.slow
def test_a_run_with_keys_in_flags_and_yaml(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (kind, key) in enumerate(ALL.items()):
        monkeypatch.setenv(f"SOME_{number}_TOKEN" if kind in PLAIN else f"HARMLESS_{number}", key)
    given = settings()
    Path("recipe.yaml").write_text(yaml.safe_dump(given))
    flags = [
        word
        for name, value in given.items()
        for word in (f"--{name}", value if isinstance(value, str) else json.dumps(value))
    ]
    said = []
    for argv in (["--config", "recipe.yaml", *TRAINING, "--output_dir", "a"], [*TRAINING, *flags, "--output_dir", "b"]):
        code, out, err = cli("dpo", *argv, "--logging_steps", "1", "--report_to", "none")
        assert code == 0, err
        said.append(out + err)
    for argv in (
        ["report", "a", "b", "--out", "page.html"],
        ["cite", "a"],
        ["data", "show", *TRAINING[:4], *flags[:2]],
    ):
        code, out, err = cli(*argv)
        said.append(out + err)
    for argv in (
        ["advise", "--config", "recipe.yaml", *TRAINING[:4], "--write", "advised.yaml"],
        ["advise", *TRAINING[:4], *flags, "--json"],
        ["sweep", *TRAINING, *flags, "--param", "beta=0.1,0.2", "--out", "s"],
        ["dpo", *TRAINING, "--run_nam", " ".join(KEYS.values())],
        ["dpo", *TRAINING, "--beta", KEYS["OpenAI"]],
        ["dpo", *TRAINING, "--hub_token", PLAIN["letters"], "extra", PLAIN["letters"]],
        ["dpo", "--model_name_or_path", KEYS["GitHub"], "--dataset_name", KEYS["GitLab"] + ".jsonl"],
    ):
        code, out, err = cli(*argv)
        assert "Traceback" not in err
        said.append(out + err)
    assert Path("advised.yaml").is_file()
    assert {n: found_in(text) for n, text in enumerate(said) if found_in(text)} == {}
    # The recipe is the user's own.
    assert written(Path(), but=("recipe.yaml",)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("status", ["200 OK", "401 Unauthorized", "400 Bad Request"])
def test_a_judge_that_gives_keys_away(cli: Cli, monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    """A refusal that quotes keys, its own and others; answers are data, and stay in ``judge.jsonl`` as they are."""
    monkeypatch.setenv("OPENAI_API_KEY", PLAIN["letters"] + "\n")
    leak = " ".join([*KEYS.values(), PLAIN["letters"]])
    body = completion(f"{leak} [[A]]") if status.startswith("200") else json.dumps({"error": leak}).encode()
    few = ["--num_prompts", "1", "--max_new_tokens", "2", "--judge_retries", "0", "--judge_timeout", "5"]
    argv = ["eval", "--model_name_or_path", "model", "--dataset_name", "pairs.jsonl", "--out", "judged", *few]
    with hostile(whole(body, status)) as server:
        judge = [
            "--judge_url",
            f"{server.url}?key={PLAIN['hex']}",
            "--judge_model",
            "m",
            "--judge_key_env",
            "OPENAI_API_KEY",
        ]
        code, out, err = cli(*argv, *judge, "--judge_against", "chosen")
    assert code in (0, 6), err
    assert found_in(out + err) == []
    assert written(Path(), but=("judge.jsonl",)) == {}


def test_a_key_in_the_place_of_its_name_is_not_kept(cli: Cli) -> None:
    argv = ["eval", "--model_name_or_path", "model", "--dataset_name", "pairs.jsonl", "--out", "judged"]
    for key in ALL.values():
        code, out, err = cli(*argv, "--judge_url", "http://127.0.0.1:9", "--judge_model", "m", "--judge_key_env", key)
        assert (code, found_in(out + err)) == (2, []), err
    assert written(Path()) == {}


@pytest.mark.slow
def test_a_study_s_database(cli: Cli) -> None:
    more = ["--param", "beta=0.1,0.2", "--eval_share", "0.3", "--report_to", "none"]
    for number, text in enumerate(IN_PLACE):
        if text.startswith(("postgresql", "mysql", "redis", "mssql")):
            url = text.format(PLAIN["letters"])
            code, out, err = cli("sweep", *TRAINING, *more, "--out", f"s{number}", "--storage", url)
            assert code != 0
            assert "Traceback" not in err
            assert found_in(out + err) == [], (url, err)
    assert written(Path()) == {}


def test_a_traceback_quotes_no_key(tmp_path: Path) -> None:
    code = (
        "import sys; from preftune.cli import main as m\n"
        "def fail(arguments): raise AssertionError('broken: ' + arguments[0])\n"
        "m._reported = fail; m.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, KEYS["OpenAI"]], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "AssertionError: broken: <redacted>" in done.stderr
    assert found_in(done.stderr) == []


def test_errors_are_one_line_without_what_a_terminal_obeys() -> None:
    said = str(
        ConfigError("no\x1b[2J\x07", where="a\nb", value="\x1b]0;x\x07\x9b31m", remedy="\u202ereverse\ud800\x7f")
    )
    assert said.isprintable()
