"""``preftune dpo`` and ``preftune sft`` from the command line to the files they leave."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from preftune.runs.run import resume_command

from .conftest import Cli

BASE = ("--model_name_or_path", "model", "--dataset_name", "pairs.jsonl", "--per_device_train_batch_size", "4")
TOKEN = "hf_" + "b2" * 17


def test_dry_run_shows_the_plan_and_leaves_nothing(cli: Cli) -> None:
    code, out, _ = cli("dpo", *BASE, "--dry_run", "--torch_dtype", "float32")
    assert code == 0
    assert "16 of 16 rows" in out
    assert "steps of 4 pairs" in out
    assert "- torch_dtype -> dtype" in out
    assert "nothing was trained" in out
    assert not Path("model-DPO").exists()
    code, _, _ = cli("dpo", *BASE, "--dry_run", "--output_dir", "some/where")
    assert code == 0
    assert not Path("some").exists()


def test_no_bar_is_drawn_into_a_file(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Values that have to be computed: those that are known need no bar.
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "references"))
    code, out, err = cli("dpo", *BASE, "--max_steps", "1", "--output_dir", "out", "--torch_dtype", "float32")
    assert code == 0, err
    assert "step 1/1" in out
    assert "Reference" not in err


def test_a_mixture_is_read_without_bars_where_nobody_watches(cli: Cli) -> None:
    mixture = json.dumps({"datasets": [{"id": "pairs.jsonl"}], "test_split_size": 4})
    code, _, err = cli("dpo", "--model_name_or_path", "model", "--dataset_mixture", mixture, "--dry_run")
    assert code == 0, err
    assert "examples/s" not in err


def test_a_run_leaves_weights_metrics_provenance_and_card(cli: Cli) -> None:
    Path("r.yaml").write_text("learning_rate: 1e-4\nwarmup_ratio: 0.5\n", encoding="utf-8")
    code, out, err = cli(
        "dpo", "--config", "r.yaml", *BASE, "--max_steps", "2", "--logging_steps", "1", "--output_dir", "out",
        "--do_eval", "--dataset_test_split", "train[:4]", "--hub_token", TOKEN, "--run_name", f"run {TOKEN}",
    )  # fmt: skip
    assert code == 0, err
    assert re.search(r"step 2/2 +loss \d", out)
    left = {path.name for path in Path("out").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "all_results.json", "trainer_state.json", "provenance.json"} <= left
    results = json.loads(Path("out/all_results.json").read_text())
    assert {"train_loss", "eval_loss", "eval_rewards/accuracies"} <= set(results)
    document = json.loads(Path("out/provenance.json").read_text())
    trainer = document["settings"]["trainer"]
    assert trainer["learning_rate"] == {"value": 1e-4, "from": "file r.yaml:1"}
    assert trainer["warmup_steps"] == {"value": 0.5, "from": "file r.yaml:2 (written as warmup_ratio)"}
    assert trainer["max_steps"] == {"value": 2, "from": "flag --max_steps"}
    assert trainer["beta"] == {"value": 0.1, "from": "default"}
    assert document["data"]["train"]["num_rows"] == 16
    assert document["data"]["test"]["num_rows"] == 4
    assert document["results"]["eval_loss"] == results["eval_loss"]
    assert document["seed"] == 42
    front = yaml.safe_load(Path("out/README.md").read_text().split("---")[1])
    assert front["tags"] == ["preftune", "dpo", "sigmoid"]
    for name in ("provenance.json", "README.md", "all_results.json", "trainer_state.json"):
        assert TOKEN not in Path("out", name).read_text(), name
    assert TOKEN not in out + err


def test_lora_then_going_on_with_the_adapter(cli: Cli) -> None:
    lora = ("--use_peft", "--lora_target_modules", "q_proj,v_proj", "--max_steps", "1")
    code, _, err = cli("dpo", *BASE, *lora, "--output_dir", "first")
    assert code == 0, err
    assert Path("first/adapter_model.safetensors").exists()
    assert "library_name: peft" in Path("first/README.md").read_text()
    again = ("--model_name_or_path", "first", *BASE[2:], "--max_steps", "1", "--output_dir", "second")
    code, _, err = cli("dpo", *again)
    assert code == 0, err
    assert Path("second/adapter_model.safetensors").exists()


def test_sft(cli: Cli) -> None:
    Path("sft.jsonl").write_text('{"prompt": "a film :", "completion": " great"}\n' * 8, encoding="utf-8")
    code, out, err = cli(
        "sft", "--model_name_or_path", "model", "--dataset_name", "sft.jsonl", "--max_steps", "1", "--output_dir", "out"
    )
    assert code == 0, err
    assert "reference" not in out
    assert "completions" in Path("out/README.md").read_text()


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["--dataset_name", "pairs.jsonl"], 2, "model_name_or_path"),
        (["--model_name_or_path", "model"], 2, "--dataset_name"),
        ([*BASE, "--model_name_or_path", "./none"], 4, "no such model folder"),
        ([*BASE, "--model_name_or_path", "pairs.jsonl"], 4, "a file, not a folder"),
        ([*BASE, "--model_name_or_path", "empty"], 4, "without config.json"),
        ([*BASE, "--model_name_or_path", "org/none"], 4, "the Hub cannot be reached"),
        ([*BASE, "--dataset_name", "none.jsonl"], 3, "none.jsonl"),
        ([*BASE, "--resume_from_checkpoint"], 2, "no checkpoint to go on from"),
        ([*BASE, "--resume_from_checkpoint", "model"], 2, "not a checkpoint"),
        ([*BASE, "--load_in_4bit"], 2, "--use_peft"),
        ([*BASE, "--eval_strategy", "steps"], 2, "'test'"),
        ([*BASE, "--do_predict"], 2, "do_predict"),
        ([*BASE, "--no_do_train"], 2, "do_train"),
        ([*BASE, "--chat_template", "{% for %}"], 2, "not a valid Jinja template"),
        ([*BASE, "--chat_template", "none.jinja"], 2, "cannot read the chat template"),
        ([*BASE, "--use_peft", "--lora_target_modules", "none"], 2, "none"),
        ([*BASE, "--max_length", "9"], 3, "up to 10%"),
        ([*BASE, "--output_dir", "/proc/none"], 6, "output_dir"),
        ([*BASE, "--output_dir", "/proc/none", "--dry_run"], 6, "output_dir"),
        ([*BASE, "--output_dir", "pairs.jsonl", "--dry_run"], 6, "output_dir: cannot make the folder (File exists)"),
        ([*BASE, "--output_dir", "dangling", "--dry_run"], 6, "(it is a link to gone, which is not there)"),
        ([*BASE, "--output_dir", "pairs.jsonl/out", "--dry_run"], 6, "output_dir"),
        ([*BASE, "--push_to_hub"], 6, "push_to_hub"),
    ],
)
def test_failures_are_one_line_with_their_exit_code(cli: Cli, argv: list[str], code: int, says: str) -> None:
    Path("empty").mkdir()
    Path("dangling").symlink_to("gone")
    found, _, err = cli("dpo", *argv)
    lines = [line for line in err.splitlines() if line.startswith("preftune: ") and "warning:" not in line]
    assert found == code, err
    assert len(lines) == 1, err
    assert says in lines[0]
    assert "Traceback" not in err


def test_rows_that_truncation_loses_are_accepted_on_request(cli: Cli) -> None:
    code, out, err = cli("dpo", *BASE, "--max_length", "9", "--allow_drops", "--dry_run")
    assert code == 0, err
    assert "dropped" in out


def test_data_show_prints_tokens_and_what_truncation_drops(cli: Cli) -> None:
    code, out, err = cli("data", "show", *BASE[:4], "--num_rows", "2", "--max_length", "14")
    assert code == 0, err
    assert "row 0" in out
    assert "row 1" in out
    assert "row 2" not in out
    assert "dropped" in out


@pytest.mark.parametrize(
    ("verb", "shown"), [("kto", "undesirable: "), ("orpo", "rejected: "), ("cpo", "chosen: "), ("sft", "trained on: ")]
)
def test_data_show_prepares_rows_as_each_verb_does(verb: str, shown: str, cli: Cli) -> None:
    rows = ("--num_rows", "20", "--verb", verb)
    code, out, err = cli("data", "show", *BASE[:4], *rows)
    assert code == 0, err
    assert shown in out
    # Pairs are two answers to kto.
    assert ("row 19" in out) == (verb == "kto")


def test_data_show_goes_on_without_rows_that_cannot_be_shown(cli: Cli) -> None:
    rows = [
        {"prompt": "the plot", "chosen": " was nice", "rejected": answer, "context": "an aside"}
        for answer in (" no", None)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, out, err = cli("data", "show", "--model_name_or_path", "model", "--dataset_name", "rows.jsonl")
    assert code == 0, err
    assert "left out: 1 null; the first is rows.jsonl:2, field 'rejected': 'rejected' is null" in out
    assert "not used, although they hold a part of the conversation: context" in out
    assert "row 0" in out
    strict = ("--on_bad_rows", "error")
    code, out, err = cli("data", "show", "--model_name_or_path", "model", "--dataset_name", "rows.jsonl", *strict)
    assert code != 0
    assert "rows.jsonl:2" in err


def test_plain_text_may_stand_in_another_column(cli: Cli) -> None:
    Path("texts.jsonl").write_text('{"body": "the plot was nice"}\n{"body": "a very good film"}\n', encoding="utf-8")
    data = ("--model_name_or_path", "model", "--dataset_name", "texts.jsonl", "--dataset_text_field", "body")
    code, out, err = cli("data", "show", *data, "--verb", "sft")
    assert code == 0, err
    assert "[+ very good film<eos>+]" in out
    code, _, err = cli("sft", *data, "--output_dir", "out", "--max_steps", "1", "--no_bf16")
    assert code == 0, err


@pytest.mark.parametrize(("rule", "answer"), [("transcript", "[+ the plot"), ("common_prefix", "[+ plot")])
def test_transcripts_are_divided_by_the_rule_that_is_asked_for(cli: Cli, rule: str, answer: str) -> None:
    turn = "\n\nHuman: was it good\n\nAssistant: the "
    row = {"chosen": f"{turn}plot was nice", "rejected": f"{turn}film was dull"}
    Path("talks.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    data = ("--model_name_or_path", "model", "--dataset_name", "talks.jsonl")
    code, out, err = cli("data", "show", *data, "--implicit_prompt", rule)
    assert code == 0, err
    assert answer in out
    if rule == "transcript":
        # The default of the command line, as its help says.
        assert cli("data", "show", *data)[1] == out
        assert "--implicit_prompt  text  [transcript]" in cli("dpo", "--help")[1]


def test_cite_reads_a_run(cli: Cli) -> None:
    options = ("--loss_type", "ipo", "--max_steps", "1", "--output_dir", "out")
    assert cli("dpo", *BASE, *options)[0] == 0
    code, out, _ = cli("cite", "out", "ipo")
    assert code == 0
    assert out.count("@misc") == 1
    assert "2310.12036" in out


def test_methods_as_json(cli: Cli) -> None:
    code, out, _ = cli("methods", "--json")
    names = [row["name"] for row in json.loads(out)]
    assert code == 0
    assert {"sigmoid", "hinge", "ipo"} <= set(names)
    assert cli("methods")[1].count("arXiv:") >= 3


def test_resume_command_replaces_its_own_flag() -> None:
    argv = ["--a", "x y", "--resume_from_checkpoint", "old", "--b=1", "--resume-from-checkpoint=z"]
    assert resume_command("dpo", argv) == "preftune dpo --a 'x y' --b=1 --resume_from_checkpoint true"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(world: Path, tmp_path: Path, number: signal.Signals) -> None:
    paths = ("--model_name_or_path", str(world / "model"), "--dataset_name", str(world / "pairs.jsonl"))
    command = [sys.executable, "-m", "preftune", "dpo", *paths, "--output_dir", str(tmp_path / "out")]
    command += ["--per_device_train_batch_size", "2", "--logging_steps", "1"]
    with subprocess.Popen(
        [*command, "--max_steps", "5000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("step 2/"):
                run.send_signal(number)
                break
        out, err = run.communicate(timeout=120)
    assert run.returncode == 130, err
    assert "stopping after this step" in err
    checkpoint = re.search(r"saved .*checkpoint-(\d+)", out)
    assert checkpoint is not None
    step = int(checkpoint.group(1))
    assert "--resume_from_checkpoint true" in out
    done = subprocess.run(
        [*command, "--max_steps", str(step + 2), "--resume_from_checkpoint", "true"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = [int(n) for n in re.findall(r"^step (\d+)/", done.stdout, re.MULTILINE)]
    assert steps == [step + 1, step + 2]
