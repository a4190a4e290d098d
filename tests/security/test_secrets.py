"""Whatever is secret stays out of every file that is written and every line that is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preftune.config import redact_argv
from preftune.config.secrets import REDACTED
from preftune.runs.run import resume_command
from tests.security.conftest import Cli

# None of them has the form of a known kind of token: they must be recognised by where they stand.
SECRETS = {
    "hub_token": "plantedhubtoken0001",
    "environment_hub": "plantedhubtoken0002",
    "environment_wandb": "plantedwandbkey0003",
    "judge": "plantedjudgekey0004",
    "model_token": "plantedmodeltoken0005",
    "other": "plantedother0006",
    "storage": "plantedpassword0007",
    "url": "plantedpassword0008",
    "shaped": "hf_" + "Planted9" * 4,
}


def found_in(text: str | bytes) -> list[str]:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
    return [name for name, value in SECRETS.items() if value.encode() in data]


def written(folder: Path) -> dict[str, list[str]]:
    """Secrets by file, in names and contents of all files below a folder."""
    found = {}
    for path in folder.rglob("*"):
        names = found_in(str(path.relative_to(folder)))
        names += found_in(path.read_bytes()) if path.is_file() and not path.is_symlink() else []
        if names:
            found[str(path.relative_to(folder))] = names
    return found


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets in the environment."""
    monkeypatch.setenv("HF_TOKEN", SECRETS["environment_hub"])
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", SECRETS["environment_hub"])
    monkeypatch.setenv("WANDB_API_KEY", SECRETS["environment_wandb"])
    monkeypatch.setenv("OPENAI_API_KEY", SECRETS["judge"])
    monkeypatch.setenv("SOME_SETTING", SECRETS["other"])


TRAINING = ["--model_name_or_path", "model", "--dataset_name", "pairs.jsonl", "--max_steps", "2", "--save_steps", "1"]
GUARDED = ["--output_dir", "out", "--logging_steps", "1", "--hub_token", SECRETS["hub_token"]]
KEYWORDS = ["--model_init_kwargs", json.dumps({"token": SECRETS["model_token"]})]


def test_a_run_its_report_and_its_evaluation(cli: Cli) -> None:
    named = ["--run_name", f"run {SECRETS['shaped']}", "--report_to", "none"]
    code, out, err = cli("dpo", *TRAINING, *GUARDED, *KEYWORDS, *named)
    assert code == 0, err
    # Everything that ought to be looked at is there.
    for name in ("provenance.json", "README.md", "log.jsonl", "trainer_state.json", "checkpoint-2/manifest.json"):
        assert (Path("out") / name).is_file(), name
    assert found_in(out + err) == []
    code, out, err = cli("report", "out", "--out", "report.html")
    assert code == 0, err
    assert Path("report.html").stat().st_size > 10_000
    assert found_in(out + err) == []
    reference = ["--ref_model_name_or_path", "model"]
    code, out, err = cli(
        "eval", "--model_name_or_path", "out", *reference, "--dataset_name", "pairs.jsonl", "--out", "evaluated"
    )
    assert code == 0, err
    assert found_in(out + err) == []
    assert written(Path()) == {}


def test_tensorboard_is_told_no_token(cli: Cli) -> None:
    code, out, err = cli("dpo", *TRAINING, *GUARDED, *KEYWORDS, "--report_to", "tensorboard", "--save_strategy", "no")
    assert code == 0, err
    assert found_in(out + err) == []
    assert list(Path().rglob("events.out.tfevents*"))
    assert written(Path()) == {}


def test_addresses_with_a_password(cli: Cli) -> None:
    address = f"https://me:{SECRETS['url']}@127.0.0.1:9/pairs.jsonl"
    model = ["--model_name_or_path", "model"]
    for verb in (("dpo",), ("data", "show"), ("data", "audit"), ("advise",), ("sweep", "--out", "s")):
        data = [address] if verb[-1] == "audit" else ["--dataset_name", address]
        code, out, err = cli(*verb, *data, *model)
        assert code in (2, 3, 6), (verb, out, err)
        assert found_in(out + err) == [], (verb, err)
    code, out, err = cli("dpo", "--dataset_name", "pairs.jsonl", "--model_name_or_path", address)
    assert code == 4
    assert found_in(out + err) == []
    assert written(Path()) == {}


def test_a_sweep_refuses_to_write_a_secret_down(cli: Cli) -> None:
    more = ["--param", "beta=0.1,0.2", "--eval_share", "0.3", "--report_to", "none"]
    code, out, err = cli("sweep", *TRAINING, *KEYWORDS, *more, "--out", "s")
    assert code == 2
    assert "model_init_kwargs: a secret would be written into the sweep's folder" in err
    assert found_in(out + err) == []
    storage = f"postgresql://me:{SECRETS['storage']}@127.0.0.1:9/study"
    code, out, err = cli("sweep", *TRAINING, *more, "--out", "t", "--storage", storage, "--dry_run")
    assert found_in(out + err) == []
    code, out, err = cli("sweep", *TRAINING, *more, "--out", "t", "--storage", storage)
    assert code != 0
    assert "Traceback" not in err
    assert found_in(out + err) == []
    assert written(Path()) == {}


def test_a_judge_s_key(cli: Cli) -> None:
    judge = ["--judge_url", "http://127.0.0.1:9/v1", "--judge_model", "m", "--judge_key_env", "OPENAI_API_KEY"]
    few = ["--num_prompts", "1", "--max_new_tokens", "2", "--judge_retries", "0", "--judge_timeout", "2"]
    argv = ["eval", "--model_name_or_path", "model", "--dataset_name", "pairs.jsonl", "--out", "judged"]
    code, out, err = cli(*argv, *judge, *few)
    assert "Traceback" not in err
    assert found_in(out + err) == []
    assert written(Path()) == {}
    assert code in (0, 6), err


def test_the_command_to_go_on_with_is_printed_without_secrets() -> None:
    said = resume_command("dpo", ["--hub_token", SECRETS["hub_token"], "--beta", "0.1"])
    assert found_in(said) == []
    assert said.endswith("--beta 0.1 --resume_from_checkpoint true")


def test_values_as_they_are_typed() -> None:
    secret = SECRETS["other"]
    for text in (
        f'{{"token": "{secret}"}}',
        f"token: {secret}",
        f"{{a: {{api_key: {secret}}}}}",
        f'[{{"password": "{secret}"}}]',
        f'{{"token": "{secret}"',
        f"https:/me:{secret}@host/x",
        f"https://me:p@{secret}@host/x",
    ):
        for argv in (["--model_init_kwargs", text], [f"--model_init_kwargs={text}"]):
            assert found_in(" ".join(redact_argv(["dpo", *argv]))) == [], argv
    assert redact_argv(["dpo", "--model_init_kwargs.token", secret]) == ["dpo", "--model_init_kwargs.token", REDACTED]
    kept = [
        "dpo",
        "--a",
        '{"pad_token": "x",  "n": [1]}',
        "--where",
        "C:/data/a@b",
        "--t",
        "12:30",
        "--pad_token",
        "<p>",
    ]
    assert redact_argv(kept) == kept
