"""``preftune sweep``: whole sweeps over the tiny world of the command-line tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from preftune.sweep.board import Board
from preftune.sweep.scores import PER_TOKEN
from tests.cli.conftest import SMALL_RUN, Cli

ROOT = Path(__file__).resolve().parents[2]
GRID = ("--param", "beta=0.05,0.5", "--param", "learning_rate=1e-3,1e-2")


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds reference values that another one has computed."""
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "references"))


def base(**changes: Any) -> str:
    """Write the base settings to the current folder."""
    Path("base.yaml").write_text(yaml.safe_dump({**SMALL_RUN, **changes}), encoding="utf-8")
    return "base.yaml"


def result(folder: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "sweep.json").read_text(encoding="utf-8"))
    return found


def final_metrics(folder: str | Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((Path(folder) / "all_results.json").read_text(encoding="utf-8"))
    return found


def compared(first: dict[str, float], second: dict[str, float]) -> None:
    """Equal in everything that is not time."""
    timed = ("runtime", "per_second")
    names = [name for name in first if not name.endswith(timed)]
    assert "eval_rewards/margins" in names
    assert "train_loss" in names
    for name in names:
        assert second[name] == pytest.approx(first[name], rel=1e-6, abs=1e-9), name


@pytest.mark.slow
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_trials_are_the_runs_of_their_verb_and_the_reference_is_computed_once(cli: Cli, peft: bool) -> None:
    more = {"use_peft": True, "lora_target_modules": "all-linear"} if peft else {}
    code, _, err = cli("sweep", "--config", base(**more), *GRID, "--out", "out", "--eval_share", "0.3")
    assert (code, err) == (0, "")
    found = result()
    assert [trial["params"] for trial in found["trials"]] == [
        {"beta": 0.05, "learning_rate": 0.001},
        {"beta": 0.05, "learning_rate": 0.01},
        {"beta": 0.5, "learning_rate": 0.001},
        {"beta": 0.5, "learning_rate": 0.01},
    ]
    assert {trial["state"] for trial in found["trials"]} == {"complete"}
    # The first trial scored everything, the others nothing.
    scored = [trial["reference_scored"] for trial in found["trials"]]
    assert scored == [found["reference_pairs"], 0, 0, 0]
    assert found["reference_passes"] == 1.0
    # The last one, on whose model three others have been trained before, as a run of its own.
    run = Path("out") / found["trials"][3]["run"]
    assert cli("dpo", "--config", str(run / "config.yaml"), "--output_dir", "alone")[0] == 0
    compared(final_metrics(run), final_metrics("alone"))
    weights = "adapter_model.safetensors" if peft else "model.safetensors"
    kept = [trial["number"] for trial in found["trials"] if (Path("out") / trial["run"] / weights).exists()]
    assert kept == [found["best"]["number"]]
    if kept == [3]:
        assert (run / weights).read_bytes() == (Path("alone") / weights).read_bytes()


@pytest.mark.slow
def test_trials_in_one_forward_end_as_each_alone(cli: Cli) -> None:
    settings = base(use_peft=True, lora_target_modules="all-linear")
    more = ("--eval_share", "0.3", "--keep", "all")
    code, _, err = cli("sweep", "--config", settings, *GRID, "--out", "fused", "--fuse", "3", *more)
    assert (code, err) == (0, "")
    assert cli("sweep", "--config", settings, *GRID, "--out", "alone", *more)[0] == 0
    fused, alone = result("fused"), result("alone")
    assert fused["reference_passes"] == 1.0
    assert fused["best"]["number"] == alone["best"]["number"]
    for one, other in zip(fused["trials"], alone["trials"], strict=True):
        assert (one["params"], one["state"]) == (other["params"], "complete")
        for name, figure in other["metrics"].items():
            assert one["metrics"][name]["mean"] == pytest.approx(figure["mean"], rel=1e-5, abs=1e-6), name
        folders = [Path("fused") / one["run"], Path("alone") / other["run"]]
        weights = [load_file(folder / "adapter_model.safetensors") for folder in folders]
        assert weights[0].keys() == weights[1].keys()
        for name, value in weights[0].items():
            assert float((value - weights[1][name]).abs().max()) <= 1e-5 * float(weights[1][name].abs().max()), name
        histories = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in folders]
        lines = [[line for line in history if "rewards/margins" in line] for history in histories]
        assert [line["loss"] for line in lines[0]] == pytest.approx([line["loss"] for line in lines[1]], rel=1e-5)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--param", "beta=0.1,0.2"), "use_peft"),
        (("--param", "lora_r=2,4", "--use_peft", "true"), "lora_r"),
        (("--param", "beta=0.1,0.2", "--use_peft", "true", "--pruner", "median"), "pruner"),
    ],
)
def test_what_cannot_share_a_forward_is_refused(more: tuple[str, ...], says: str, cli: Cli) -> None:
    code, _, err = cli("sweep", "--config", base(), "--out", "out", "--fuse", "2", *more)
    assert code == 2
    assert says in err
    assert err.count("\n") == 1


def test_result_files_hold_what_others_read(cli: Cli) -> None:
    code, out, _ = cli("sweep", "--config", base(), *GRID, "--out", "out", "--keep", "none", "--num_samples", "4")
    assert code == 0
    found = result()
    assert found["params"] == {"beta": [0.05, 0.5], "learning_rate": [0.001, 0.01]}
    assert (found["method"], found["metric"], found["direction"]) == ("sigmoid", PER_TOKEN, "maximize")
    for trial in found["trials"]:
        accuracy, margin = (trial["metrics"][f"eval_rewards/{name}"] for name in ("accuracies", "margins"))
        assert accuracy["low"] <= accuracy["mean"] <= accuracy["high"]
        assert accuracy["n"] == margin["n"] == 2
        assert trial["metrics"]["eval_kl"]["mean"] is not None
        assert 0 <= trial["metrics"]["eval_tail_share"]["mean"] <= 1
        assert 0 <= trial["metrics"]["eval_tail_share_of_reference"]["mean"] <= 0.01
        assert isinstance(trial["left_reference"], bool)
        assert trial["metrics"]["train_loss"]["mean"] > 0
        run = Path("out") / trial["run"]
        for name in ("trainer_state.json", "provenance.json", "config.yaml", "held_out.npz"):
            assert (run / name).is_file(), name
        assert not list(run.glob("*.safetensors"))
        history = json.loads((run / "trainer_state.json").read_text())["log_history"]
        logged = next(entry for entry in reversed(history) if "eval_rewards/accuracies" in entry)
        assert logged["eval_rewards/accuracies"] == accuracy["mean"]
    cells = found["maps"]["eval_rewards/margins"]["cells"]
    assert [cell["number"] for cell in cells] == [0, 1, 2, 3]
    assert all(isinstance(cell["tied_with_best"], bool) for cell in cells)
    assert found["best"]["config"] == "best.yaml"
    assert "sweet spot" in out
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert found["best"]["reason"].split(";")[0][1:] in page  # the first letter is a capital there
    assert "wrote out/report.html" in out
    assert "1 pass over the data" in out
    # The ready file trains with these very settings.
    assert cli("dpo", "--config", "out/best.yaml")[0] == 0
    compared(final_metrics(Path("out") / found["best"]["run"]), final_metrics("out/best"))


def test_a_pruner_sees_the_deciding_metric(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, float]] = []

    def report(self: Board, claim: Any, value: float, step: int) -> bool:
        told.append((claim.slot, value))
        return bool(claim.slot == 1)

    monkeypatch.setattr(Board, "report", report)
    config = base(eval_strategy="steps", eval_steps=1)
    arguments = ("--param", "beta=0.05,0.5", "--pruner", "median", "--keep", "none")
    assert cli("sweep", "--config", config, *arguments, "--out", "out")[0] == 0
    first, second = result()["trials"]
    # Three steps: two evaluations on the way of the first, and the second is stopped at its first.
    assert [slot for slot, _ in told] == [0, 0, 1]
    assert all(-1 < value < 1 for _, value in told)
    assert (first["state"], second["state"]) == ("complete", "pruned")
    assert "eval_preference_gain" in second["reason"]


def test_finished_sweeps_and_their_weights_are_left_alone(cli: Cli) -> None:
    arguments = ("sweep", "--config", base(), "--param", "beta=0.05,0.5", "--out", "out")
    assert cli(*arguments)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("trainer_state.json")}
    for again in (arguments, ("sweep", "--out", "out")):
        code, out, _ = cli(*again)
        assert code == 0
        assert "2 trials are done" in out
    assert before == {path: path.stat().st_mtime_ns for path in Path("out").rglob("trainer_state.json")}


def test_going_on_takes_what_may_change_and_refuses_the_rest(cli: Cli) -> None:
    assert cli("sweep", "--config", base(), "--param", "beta=0.05,0.5", "--out", "out", "--num_samples", "0")[0] == 0
    assert list(Path("out/trials").glob("*/model.safetensors"))
    for flags in (
        ("--verb", "orpo"),
        ("--search", "tpe"),
        ("--num_trials", "3"),
        ("--eval_share", "0.5"),
        ("--metric", "eval_loss"),
        ("--pruner", "median"),
        ("--diverge_factor", "3"),
        ("--num_samples", "4"),
    ):
        code, _, err = cli("sweep", "--out", "out", *flags)
        assert code == 2, flags
        assert f"a sweep with another {flags[0][2:]} was begun" in err
    code, _, err = cli("sweep", "--out", "out", "--fuse", "2")
    assert code == 2
    assert "use_peft" in err
    # What agrees with the sweep is no change.
    same = ("--verb", "dpo", "--search", "grid", "--num_trials", "2", "--num_samples", "0")
    assert cli("sweep", "--out", "out", *same, "--keep", "none", "--dry_run")[0] == 0
    assert list(Path("out/trials").glob("*/model.safetensors"))
    assert cli("sweep", "--out", "out", *same, "--keep", "none")[0] == 0
    assert not list(Path("out/trials").glob("*/model.safetensors"))


def test_settings_of_one_run_in_a_file_are_told(cli: Cli) -> None:
    settings = base(output_dir="elsewhere")
    code, out, err = cli("sweep", "--config", settings, "--param", "beta=0.1", "--out", "out", "--dry_run")
    assert code == 0, err
    assert "output_dir (base.yaml:" in out
    assert "is not used" in out


def start(*argv: str, **more: str) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    environment = {**os.environ, **more, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(
        [sys.executable, "-m", "preftune", *argv],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def done_trials(folder: str = "out") -> dict[str, int]:
    """Finished trials, by what only their end writes, with the time of writing."""
    return {path.parent.name: path.stat().st_mtime_ns for path in Path(folder).glob("trials/*/provenance.json")}


@pytest.mark.slow
def test_a_killed_sweep_goes_on_without_repeating_a_trial(cli: Cli) -> None:
    process = start("sweep", "--config", base(max_steps=30), *GRID, "--out", "out")
    deadline = time.monotonic() + 240
    while len(done_trials()) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = done_trials()
    assert len(before) < 4
    code, _, err = cli("sweep", "--out", "out")
    assert (code, err) == (0, "")
    after = done_trials()
    assert len(after) == 4
    # Up to one may have been on its last lines when the process died.
    repeated = [name for name in before if after[name] != before[name]]
    assert len(repeated) <= 1
    assert set(repeated) <= {max(before)}
    assert {trial["state"] for trial in result()["trials"]} == {"complete"}
    assert result()["reference_passes"] <= 1.0


@pytest.mark.slow
def test_two_workers_share_the_trials(cli: Cli) -> None:
    process = start("sweep", "--config", base(), *GRID, "--out", "two", "--workers", "2", "--keep", "all")
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert cli("sweep", "--config", base(), *GRID, "--out", "one", "--keep", "all")[0] == 0
    together, alone = result("two"), result("one")
    assert Counter(trial["number"] for trial in together["trials"]) == Counter(range(4))
    for mine, other in zip(together["trials"], alone["trials"], strict=True):
        assert mine["params"] == other["params"]
        mean, expected = ({k: v["mean"] for k, v in each["metrics"].items()} for each in (mine, other))
        assert mean == pytest.approx(expected, rel=1e-6, abs=1e-9)
    journal = (Path("two") / "study.journal").read_text(encoding="utf-8")
    pids = {json.loads(line)["user_attr"]["owner"]["pid"] for line in journal.splitlines() if '"owner"' in line}
    assert os.getpid() not in pids
    assert 1 <= len(pids) <= 2
    # The reference ran once, although both needed it at the same time.
    assert together["reference_pairs"] == sum(
        together["trials"][0][f"reference_{name}"] for name in ("scored", "found")
    )
    assert together["reference_passes"] == 1.0


@pytest.mark.slow
def test_ray_gives_the_same_trials_and_figures(cli: Cli) -> None:
    # A process of its own: Ray leaves threads and sockets behind that the next test would be blamed for.
    process = start("sweep", "--config", base(), *GRID, "--out", "ray", "--ray", "local", "--workers", "2")
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, (out, err)
    assert cli("sweep", "--config", base(), *GRID, "--out", "one")[0] == 0
    on_ray, alone = result("ray"), result("one")
    for mine, other in zip(on_ray["trials"], alone["trials"], strict=True):
        assert mine["params"] == other["params"]
        assert mine["state"] == other["state"] == "complete"
        mean, expected = ({k: v["mean"] for k, v in each["metrics"].items()} for each in (mine, other))
        assert mean == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert on_ray["best"]["number"] == alone["best"]["number"]
    assert on_ray["reference_passes"] == 1.0
    journal = (Path("ray") / "study.journal").read_text(encoding="utf-8")
    pids = {json.loads(line)["user_attr"]["owner"]["pid"] for line in journal.splitlines() if '"owner"' in line}
    assert process.pid not in pids


@pytest.mark.slow
def test_three_by_three_on_transcripts_from_one_command(cli: Cli, preference_files: Path) -> None:
    data = {"dataset_name": str(preference_files / "hh_harmless_1700.jsonl.gz"), "dataset_train_split": "train[:80]"}
    settings = base(**data, max_length=192, max_steps=2, on_bad_rows="skip", max_dropped_share=0.9)
    grid = ("--param", "beta=0.05,0.1,0.2", "--param", "learning_rate=1e-6,1e-5,1e-4")
    code, out, _ = cli("sweep", "--config", settings, *grid, "--out", "out", "--keep", "none")
    assert code == 0
    found = result()
    assert len(found["trials"]) == 9
    assert {trial["state"] for trial in found["trials"]} == {"complete"}
    assert found["best"]["params"]["beta"] in (0.05, 0.1, 0.2)
    assert all(len(each["cells"]) == 9 for each in found["maps"].values())
    # Two steps visit a part of the pairs; all trials together score each of them once.
    assert found["reference_passes"] == 1.0
    assert "held out" in out


def test_ctrl_c_tells_how_to_go_on(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from preftune.sweep.trials import PairTrials

    plain = PairTrials._fit
    calls: list[int] = []

    def interrupted(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, *arguments)

    monkeypatch.setattr(PairTrials, "_fit", interrupted)
    code, out, _ = cli("sweep", "--config", base(), "--param", "beta=0.05,0.5", "--out", "out")
    assert code == 130
    assert "to go on: preftune sweep --out out" in out
    code, out, _ = cli("sweep", "--out", "out")
    assert code == 0
    assert "1 trials are done" in out
    assert len(calls) == 3


@pytest.mark.filterwarnings("ignore:step .* is not finite:UserWarning")
def test_a_diverging_trial_is_ended_and_is_not_the_best(cli: Cli) -> None:
    settings = base(max_steps=12, max_grad_norm=0.0, lr_scheduler_type="constant", optim="sgd")
    grid = ("--param", "learning_rate=1e-3,1e6")
    code, out, _ = cli("sweep", "--config", settings, *grid, "--out", "out", "--keep", "all")
    assert code == 0
    good, bad = result()["trials"]
    assert good["state"] == "complete"
    assert bad["state"] == "diverged", bad["reason"]
    assert bad["reason"]
    assert bad["num_steps"] < 12
    assert result()["best"]["number"] == 0
    assert "diverged" in out


def test_alarms_that_stop_a_run_end_its_trial(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from preftune.sweep.trials import PairTrials

    plain = PairTrials._fit

    def alarmed(self: Any, trial: Any, trainer: Any, watch: Any) -> Any:
        train = trainer.train

        def train_and_stop() -> Any:
            output = train()
            if trial.number == 1:
                alarm = {"guard": "reward_jump", "action": "stop", "message": "margin rose by 40 %"}
                (trial.folder / "alarms.jsonl").write_text(json.dumps(alarm) + "\n{torn", encoding="utf-8")
            return output

        trainer.train = train_and_stop
        return plain(self, trial, trainer, watch)

    monkeypatch.setattr(PairTrials, "_fit", alarmed)
    assert cli("sweep", "--config", base(), "--param", "beta=0.05,0.5", "--out", "out")[0] == 0
    first, second = result()["trials"]
    assert first["state"] == "complete"
    assert (second["state"], second["reason"]) == ("stopped", "guard reward_jump: margin rose by 40 %")
    assert result()["best"]["number"] == 0


def test_a_trial_that_fails_does_not_end_the_sweep(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from preftune.sweep.trials import PairTrials

    plain = PairTrials._fit

    def failing(self: Any, trial: Any, *arguments: Any) -> Any:
        if trial.number == 0:
            raise RuntimeError("something odd")
        return plain(self, trial, *arguments)

    arguments = ("sweep", "--config", base(), "--param", "beta=0.05,0.5", "--out", "out")
    with monkeypatch.context() as patch:
        patch.setattr(PairTrials, "_fit", failing)
        assert cli(*arguments)[0] == 0
    first, second = result()["trials"]
    assert first["state"] == "failed"
    assert "RuntimeError: something odd" in first["reason"]
    assert "Traceback" in (Path("out") / "trials" / "000" / "error.txt").read_text()
    assert second["state"] == "complete"
    assert cli(*arguments, "--retry_failed")[0] == 0
    assert [trial["state"] for trial in result()["trials"]] == ["complete", "complete"]


def test_without_fields_the_methods_own_grid_is_proposed(cli: Cli) -> None:
    code, out, _ = cli("sweep", "--config", base(loss_type="ipo"), "--out", "out", "--dry_run")
    assert code == 0
    assert "9 trials" in out
    assert "beta around 0.01" in out
    assert not Path("out").exists()
    code, out, _ = cli("sweep", "--config", base(loss_type="ipo", beta=0.2), "--out", "out", "--dry_run")
    assert "0.06, 0.2, 0.6" in out


def test_a_test_split_of_the_data_is_what_trials_are_compared_on(cli: Cli) -> None:
    lines = Path("pairs.jsonl").read_text(encoding="utf-8").splitlines()
    Path("data").mkdir()
    Path("data/train.jsonl").write_text("\n".join(lines[:12]), encoding="utf-8")
    Path("data/test.jsonl").write_text("\n".join(lines[12:]), encoding="utf-8")
    arguments = ("sweep", "--config", base(dataset_name="data"), "--param", "beta=0.1,0.5", "--out", "out")
    assert cli(*arguments)[0] == 0
    assert result()["trials"][0]["metrics"]["eval_rewards/accuracies"]["n"] == 4
    assert not Path("out/data").exists()
    assert yaml.safe_load(Path("out/best.yaml").read_text())["dataset_name"] == "data"


def test_random_and_adaptive_search(cli: Cli) -> None:
    arguments = ("--param", "learning_rate=1e-4..1e-2:log", "--num_trials", "2", "--keep", "none")
    for search in ("random", "tpe"):
        code, _, _ = cli("sweep", "--config", base(), *arguments, "--search", search, "--out", search)
        assert code == 0
        rates = [trial["params"]["learning_rate"] for trial in result(search)["trials"]]
        assert len(set(rates)) == 2
        assert all(1e-4 <= rate <= 1e-2 for rate in rates)


def test_settings_of_data_model_and_losses_can_be_searched(cli: Cli) -> None:
    settings = base(use_peft=True, lora_target_modules="all-linear")
    grid = ("--param", "lora_r=2,4", "--param", "loss_type=sigmoid,[sigmoid,sft]")
    assert cli("sweep", "--config", settings, *grid, "--out", "out", "--keep", "all")[0] == 0
    trials = result()["trials"]
    assert {trial["state"] for trial in trials} == {"complete"}
    assert result()["reference_passes"] == 1.0
    for trial in trials:
        config = json.loads((Path("out") / trial["run"] / "adapter_config.json").read_text())
        assert config["r"] == trial["params"]["lora_r"]


def test_lists_and_mappings_are_written_out_for_the_runs_that_follow(cli: Cli) -> None:
    settings = base(lr_scheduler_type="polynomial")
    grid = ("--param", "loss_type=[sigmoid,sft]", "--param", 'lr_scheduler_kwargs={"power": 2.0}')
    more = ("--out", "out", "--keep", "none", "--num_samples", "0", "--retrain_best")
    code, _, err = cli("sweep", "--config", settings, *grid, *more)
    assert code == 0, err
    run = Path("out") / result()["best"]["run"]
    for path in (run / "config.yaml", Path("out/best.yaml")):
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert written["loss_type"] == ["sigmoid", "sft"]
        assert written["lr_scheduler_kwargs"] == {"power": 2.0}
    compared(final_metrics(run), final_metrics("out/best"))


@pytest.mark.parametrize("verb", ["orpo", "cpo"])
def test_reference_free_verbs(cli: Cli, verb: str) -> None:
    arguments = ("--verb", verb, "--param", "beta=0.05,0.5", "--out", "out")
    assert cli("sweep", "--config", base(), *arguments)[0] == 0
    assert {trial["state"] for trial in result()["trials"]} == {"complete"}
    assert result()["reference_passes"] == 0.0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--param", "bta=1"), "did you mean beta"),
        (("--param", "beta=0.1,-1"), "beta"),
        (("--param", "output_dir=a,b"), "cannot be searched"),
        (("--param", "beta=0.1", "--search", "bayes"), "grid, random, tpe"),
        (("--param", "beta=0.1", "--search", "grid", "--num_trials", "3"), "as many trials"),
        (("--param", "beta=0.1", "--metric", "eval_acc"), "eval_rewards/accuracies"),
        (("--param", "beta=0.1", "--metric", "eval_kl", "--num_samples", "0"), "--num_samples"),
        (("--param", "beta=0.1", "--pruner", "median"), "eval_strategy"),
        (("--param", "beta=0.1", "--pruner", "median", "--metric", "train_loss"), "at the end"),
        (("--param", "beta=0.1", "--verb", "kto"), "dpo, orpo, cpo"),
        (("--param", "beta=0.1", "--workers", "0"), "1 or more"),
        (("--param", "beta=0.1", "--eval_share", "1.5"), "less than 1"),
        (("--param", "beta=0.1", "--nonsense", "1"), "nonsense"),
        (("--param", "beta=0.1", "--push_to_hub"), "not pushed"),
        (("--param", "--num_trials", "3"), "--param: needs a value"),
        (("--param", "beta=0.1", "--output_dir", "other"), "--out is the folder"),
        (("--param", "beta=0.1", "--resume_from_checkpoint", "checkpoint-3"), "goes on with a sweep"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(more: tuple[str, ...], says: str, cli: Cli) -> None:
    code, _, err = cli("sweep", "--config", base(), *more, "--out", "out")
    assert code != 0
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert not Path("out", "plan.json").exists()


def test_a_folder_without_a_sweep_cannot_be_gone_on_with(cli: Cli) -> None:
    Path("empty").mkdir()
    for folder in ("absent", "empty"):
        for more in ((), ("--workers", "2"), ("--as_worker",)):
            code, _, err = cli("sweep", "--out", folder, *more)
            assert code == 2
            assert err.startswith("preftune: --out: no sweep was begun here")
            assert folder in err
            assert "--config" in err
    # Nothing was made of the mistyped name.
    assert not Path("absent").exists()


def test_another_sweep_in_the_same_folder_is_refused(cli: Cli) -> None:
    assert cli("sweep", "--config", base(), "--param", "beta=0.1", "--out", "out")[0] == 0
    code, _, err = cli("sweep", "--config", base(), "--param", "beta=0.2", "--out", "out")
    assert code == 2
    assert "another" in err
    assert "preftune sweep --out out" in err
    code, _, err = cli("sweep", "--config", base(max_steps=4), "--param", "beta=0.1", "--out", "out")
    assert "another max_steps" in err
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    code, _, err = cli("sweep", "--config", base(), "--param", "beta=0.1", "--out", "full")
    assert "holds other files" in err
    assert cli("sweep", "--param", "beta=0.1")[2].startswith("preftune: --out")


def test_unusable_data_end_the_sweep_at_once(cli: Cli) -> None:
    code, _, err = cli("sweep", "--config", base(dataset_name="absent.jsonl"), *GRID, "--out", "out")
    assert code == 3
    assert "absent.jsonl" in err
    code, _, err = cli("sweep", "--config", base(model_name_or_path="./absent"), *GRID, "--out", "other")
    assert code == 4
    assert len(err.strip().splitlines()) == 1


def test_retraining_the_sweet_spot(cli: Cli) -> None:
    arguments = ("sweep", "--config", base(), "--param", "beta=0.1,0.5", "--out", "out", "--retrain_best")
    assert cli(*arguments, "--keep", "none")[0] == 0
    assert Path("out/best/model.safetensors").is_file()
    compared(final_metrics(Path("out") / result()["best"]["run"]), final_metrics("out/best"))


def test_trackers_show_the_trials_together(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    settings = base(report_to="tensorboard")
    assert cli("sweep", "--config", settings, "--param", "beta=0.1,0.5", "--out", "out", "--keep", "none")[0] == 0
    for number in ("000", "001"):
        assert list(Path("out/trials", number).rglob("events.out.tfevents*"))
        state = json.loads((Path("out/trials") / number / "provenance.json").read_text())
        assert state["settings"]["trainer"]["run_name"]["value"] == f"out-{number}"
    # A sweep that follows in the same process is a group of its own.
    assert not {"WANDB_RUN_GROUP", "MLFLOW_EXPERIMENT_NAME"} & set(os.environ)


def test_help_lists_the_flags(cli: Cli) -> None:
    code, out, _ = cli("sweep", "--help")
    assert code == 0
    for flag in ("--param", "--out", "--search", "--workers", "--ray", "--storage", "--retrain_best", "--pruner"):
        assert flag in out
    assert "as_worker" not in out
