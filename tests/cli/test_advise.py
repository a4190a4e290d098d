"""``preftune advise`` and the lines at the head of a training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from .conftest import Cli

BASE = ("--model_name_or_path", "model", "--dataset_name", "pairs.jsonl")


def test_the_table_says_what_why_and_who(cli: Cli) -> None:
    code, out, err = cli("advise", *BASE, "--beta", "5", "--verbose")
    assert code == 0, err
    flat = " ".join(out.split())
    for word in ("learning_rate", "max_length", "users' practice", "2305.18290", "sources disagree", "memory: about"):
        assert word in flat
    assert "https://arxiv.org/abs/2305.18290" in flat
    assert "beta 5 is off the scale of sigmoid" in flat
    assert not Path("model-DPO").exists()


def test_it_is_short_and_ends_with_the_next_command(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = cli("advise", *BASE)
    assert code == 0, err
    lines = out.rstrip().splitlines()
    assert len(lines) <= 26
    # The command itself is never broken, so that it can be copied.
    assert all(len(line.rstrip()) <= 80 for line in lines[:-1])
    assert "practice notes" not in out
    assert (
        lines[-1] == "next: preftune advise --model_name_or_path model --dataset_name pairs.jsonl --write advised.yaml"
    )
    code, out, err = cli("advise", *BASE, "--write", "advised.yaml")
    assert code == 0, err
    assert "next: preftune dpo --config advised.yaml" in out.splitlines()
    # Settings that are as advised are trained with.
    code, out, err = cli("advise", "--config", "advised.yaml")
    assert code == 0, err
    assert "next: preftune dpo --config advised.yaml" in out.splitlines()


def test_risks_are_those_of_values_that_somebody_set(cli: Cli) -> None:
    code, out, err = cli("advise", *BASE, "--json")
    assert code == 0, err
    # TRL's defaults have no warm-up, and a rate at which this model does not move: the table replaces them.
    assert json.loads(out)["flags"] == []
    code, out, err = cli("advise", *BASE, "--json", "--learning_rate", "1e-6")
    assert code == 0, err
    (found,) = json.loads(out)["flags"]
    assert "too low" in found["title"]
    # An adapter that is asked for is not a rate that was set.
    code, out, err = cli("advise", *BASE, "--json", "--use_peft")
    assert code == 0, err
    assert json.loads(out)["flags"] == []


@pytest.mark.parametrize("flags", [(), ("--use_peft", "--lora_r", "4"), ("--noise", "0.3"), ("--verb", "orpo")])
def test_its_own_file_is_not_criticised_and_holds_data_out(cli: Cli, flags: tuple[str, ...]) -> None:
    code, _, err = cli("advise", *BASE, *flags, "--write", "advised.yaml")
    assert code == 0, err
    content = yaml.safe_load(Path("advised.yaml").read_text(encoding="utf-8"))
    assert content["test_split_size"] == 0.1
    assert content["eval_strategy"] == "steps"
    noise = flags if flags[:1] == ("--noise",) else ()
    verb = flags if flags[:1] == ("--verb",) else ()
    code, out, err = cli("advise", "--config", "advised.yaml", "--json", *noise, *verb)
    assert code == 0, err
    again = json.loads(out)
    assert again["flags"] == []
    values = {setting["field"]: setting["value"] for setting in again["settings"]}
    assert {name: content[name] for name in ("beta", "learning_rate", "num_train_epochs")} == {
        name: values[name] for name in ("beta", "learning_rate", "num_train_epochs")
    }


def test_memory_and_time_are_those_of_the_advised_settings_and_of_the_dry_run(cli: Cli) -> None:
    code, out, err = cli("advise", *BASE, "--json", "--write", "advised.yaml")
    assert code == 0, err
    told = json.loads(out)
    code, out, err = cli("advise", "--config", "advised.yaml", "--json")
    assert code == 0, err
    again = json.loads(out)
    # A tenth of the pairs is held out by the file that was written.
    assert again["time"]["num_steps"] <= told["time"]["num_steps"]
    code, out, err = cli("dpo", "--config", "advised.yaml", "--dry_run")
    assert code == 0, err
    shown = " ".join(out.replace("│", " ").split())
    from preftune.terminal.units import size

    assert f"about {size(again['memory']['total'])} (weights" in shown
    assert f"of {again['time']['step_seconds']:.2g} s" in shown


@pytest.mark.parametrize("columns", ["80", "160"])
def test_names_of_settings_are_whole_in_any_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    code, out, err = cli("advise", *BASE)
    assert code == 0, err
    for name in ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"):
        assert sum(line.split()[:1] == [name] for line in out.splitlines()) == 1, name
    code, out, err = cli("advise", *BASE, "--verbose")
    assert "recipe zephyr-7b-dpo-full" in " ".join(out.split())


def test_json_alone_is_on_stdout(cli: Cli) -> None:
    code, out, err = cli("advise", *BASE, "--json", "--noise", "0.3", "--out", "folder")
    assert code == 0, err
    content = json.loads(out)
    assert {"settings", "flags", "memory", "time"} <= set(content)
    values = {setting["field"]: setting["value"] for setting in content["settings"]}
    assert values["loss_type"] == "robust"
    assert values["label_smoothing"] == 0.3
    assert content["num_pairs"] == 16
    assert json.loads(Path("folder/advice.json").read_text(encoding="utf-8")) == content


def test_the_written_configuration_trains(cli: Cli) -> None:
    Path("mine.yaml").write_text(
        "model_name_or_path: model\ndataset_name: pairs.jsonl\nlearning_rate: 1e-7\nwarmup_ratio: 0.0\nseed: 7\n"
        "loss_type: [sigmoid]\nsave_strategy: 'no'\n",
        encoding="utf-8",
    )
    code, _, err = cli("advise", "--config", "mine.yaml", "--noise", "0.2", "--write", "advised.yaml")
    assert code == 0, err
    content = yaml.safe_load(Path("advised.yaml").read_text(encoding="utf-8"))
    assert content["seed"] == 7
    assert content["loss_type"] == "robust"
    assert content["learning_rate"] == 2.5e-4
    code, _, err = cli("dpo", "--config", "advised.yaml", "--output_dir", "out", "--max_steps", "2")
    assert code == 0, err
    provenance = json.loads(Path("out/provenance.json").read_text(encoding="utf-8"))
    trainer = provenance["settings"]["trainer"]
    assert trainer["learning_rate"]["value"] == 2.5e-4
    assert trainer["label_smoothing"]["value"] == 0.2
    assert trainer["seed"]["value"] == 7
    code, _, err = cli("advise", "--config", "mine.yaml", "--write", "advised.yaml")
    assert code == 2
    assert "left as it is" in err


@pytest.mark.parametrize(
    ("flags", "verb", "method"),
    [
        (("--loss_type", "ipo"), "dpo", "ipo"),
        (("--loss_type", "simpo"), "cpo", "simpo"),
        (("--simpo_gamma", "1", "--loss_type", "alphapo", "--alpha", "0.25"), "cpo", "alphapo"),
        (("--loss_type", "orpo"), "orpo", "orpo"),
        (("--loss_type", "kto"), "kto", "kto"),
        (("--desirable_weight", "1.3"), "kto", "kto"),
        (("--verb", "cpo"), "cpo", "cpo"),
        ((), "dpo", "sigmoid"),
    ],
)
def test_the_verb_is_found_from_the_settings(cli: Cli, flags: tuple[str, ...], verb: str, method: str) -> None:
    code, out, err = cli("advise", "--num_parameters", "1e6", "--num_pairs", "1000", "--json", *flags)
    assert code == 0, err
    content = json.loads(out)
    assert (content["verb"], content["methods"]) == (verb, [method])


def test_a_number_of_parameters_stands_for_a_model(cli: Cli) -> None:
    code, out, err = cli(
        "advise", "--num_parameters", "7e9", "--num_pairs", "60000", "--machine", "a100-80g", "--bf16", "--json"
    )
    assert code == 0, err
    memory = json.loads(out)["memory"]
    assert memory["machine"] == "a100-80g"
    # Weights, gradients and two moments in fp32: sixteen bytes each, and half-precision copies.
    assert 16 * 7e9 < memory["total"] < 24 * 7e9
    assert memory["fits"] is False


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--model_name_or_path", "./nowhere"), 4, "--num_parameters"),
        ((), 2, "--num_parameters"),
        (("--num_parameters", "0"), 2, "1 or more"),
        (("--num_parameters", "many"), 2, "--num_parameters"),
        (("--num_parameters", "1e6", "--noise", "0.7"), 2, "0 to 0.5"),
        (("--num_parameters", "1e6", "--noise", "0.1", "--audit", "x"), 2, "keep one"),
        (("--num_parameters", "1e6", "--audit", "nowhere"), 3, "audit"),
        (("--num_parameters", "1e6", "--machine", "abacus"), 2, "h200"),
        (("--num_parameters", "1e6", "--verb", "sft"), 2, "dpo, orpo, cpo, kto"),
        (("--num_parameters", "1e6", "--bta", "1"), 2, "did you mean beta"),
    ],
)
def test_mistakes_are_one_line(cli: Cli, flags: tuple[str, ...], code: int, said: str) -> None:
    found, _, err = cli("advise", *flags)
    assert found == code, err
    assert said in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--out", "pairs.jsonl"), 6, "--out: cannot write into the folder"),
        (("--out", "pairs.jsonl/sub"), 6, "--out: cannot write into the folder"),
        (("--write", "pairs.jsonl/mine.yaml"), 2, "--write: cannot make the folder"),
        (("--write", "pairs.jsonl"), 2, "left as it is"),
    ],
)
def test_files_that_cannot_be_written_are_told_before_the_table(
    cli: Cli, flags: tuple[str, ...], code: int, said: str
) -> None:
    found, out, err = cli("advise", *BASE, *flags)
    assert found == code, err
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert "learning_rate" not in out


def test_an_audit_in_the_output_folder_is_used(cli: Cli) -> None:
    Path("out").mkdir()
    noise = {"estimate": 0.3, "low": 0.2, "high": 0.4, "judge": "a judge"}
    Path("out/audit.json").write_text(json.dumps({"noise": noise}), encoding="utf-8")
    code, out, err = cli("advise", *BASE, "--output_dir", "out", "--json")
    assert code == 0, err
    assert json.loads(out)["noise"]["estimate"] == 0.3
    code, out, err = cli("dpo", *BASE, "--output_dir", "out", "--max_steps", "40", "--num_train_epochs", "9")
    assert code == 0, err
    left = json.loads(Path("out/advice.json").read_text(encoding="utf-8"))
    assert left["noise"]["estimate"] == 0.3


def single_answers(name: str) -> None:
    """Twelve labelled answers, each to a prompt of its own."""
    rows = [{"prompt": f"Q {n} :", "completion": f" answer {n}", "label": n % 2 > 0} for n in range(12)]
    Path(name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


@pytest.mark.parametrize("flags", [("--verb", "kto"), ("--loss_type", "kto")])
def test_single_answers_are_advised_on_as_kto_trains_on_them(cli: Cli, flags: tuple[str, ...]) -> None:
    single_answers("single.jsonl")
    data = ("--model_name_or_path", "model", "--dataset_name", "single.jsonl")
    code, out, err = cli("advise", *data, *flags, "--json", "--write", "advised.yaml")
    assert code == 0, err
    assert json.loads(out)["num_pairs"] == 12
    # Held-out rows leave five good answers for six bad ones.
    balance = ("--desirable_weight", "1.2")
    code, _, err = cli("kto", "--config", "advised.yaml", "--output_dir", "out", "--max_steps", "1", *balance)
    assert code == 0, err
    # Whoever asks for pairs gets them, and there are none.
    code, _, err = cli("advise", *data, *flags, "--pairing", "best_worst")
    assert code == 3


def test_help_is_printed(cli: Cli) -> None:
    code, out, _ = cli("advise", "--help")
    assert code == 0
    assert "--num_parameters" in out


# ---- at the head of a training ---------------------------------------------------------------------------------------


def test_a_training_says_what_is_risky_and_leaves_the_advice(cli: Cli) -> None:
    code, out, err = cli("dpo", *BASE, "--output_dir", "out", "--max_steps", "1", "--beta", "50")
    assert code == 0, err
    warned = [line for line in out.splitlines() if line.startswith("! ")]
    assert 1 <= len(warned) <= 5
    assert any("beta 50 is off the scale" in line for line in warned)
    left = json.loads(Path("out/advice.json").read_text(encoding="utf-8"))
    assert left["num_pairs"] == 16
    assert left["memory"]["total"] > 0


@pytest.mark.parametrize("off", [("--advice", "off"), ("--no_advice",)])
def test_it_can_be_switched_off(cli: Cli, off: tuple[str, ...]) -> None:
    code, out, err = cli("dpo", *BASE, "--output_dir", "out", "--max_steps", "1", "--beta", "50", *off)
    assert code == 0, err
    assert not [line for line in out.splitlines() if line.startswith("! ")]
    assert not Path("out/advice.json").exists()


def test_nothing_is_said_where_all_is_well_and_a_dry_run_leaves_nothing(cli: Cli) -> None:
    code, out, err = cli("dpo", *BASE, "--learning_rate", "2.5e-4", "--num_train_epochs", "3", "--dry_run")
    assert code == 0, err
    assert "! " not in out
    assert not Path("model-DPO").exists()


def test_a_broken_advice_does_not_stop_a_training(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from preftune.advice import inputs

    def broken(*_: object) -> None:
        raise ZeroDivisionError("by accident")

    monkeypatch.setattr(inputs, "advise_at_start", broken)
    code, out, err = cli("dpo", *BASE, "--output_dir", "out", "--max_steps", "1")
    assert code == 0, err
    assert "no advice.json (ZeroDivisionError: by accident)" in out


@pytest.mark.parametrize("verb", ["orpo", "cpo", "kto"])
def test_the_other_preference_verbs_are_advised_too(cli: Cli, verb: str) -> None:
    code, out, err = cli(verb, *BASE, "--output_dir", "out", "--max_steps", "1", "--beta", "90")
    assert code == 0, err
    assert "no advice" not in out
    left = json.loads(Path("out/advice.json").read_text(encoding="utf-8"))
    assert left["verb"] == verb
    assert any("off the scale" in flag["title"] for flag in left["flags"])
