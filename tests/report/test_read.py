"""Run folders and sweep folders, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preftune.errors import DataError
from preftune.report.files import Notes, read_lines, read_object
from preftune.report.read import distinct_names, read_all, read_run, read_sweep
from tests.report.folders import history, make_run, make_sweep, make_trl_run, write_json, write_lines


def test_a_whole_run_is_read_without_a_note(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", text="model"))
    assert run.notes == []
    assert run.base_model == "model"
    assert len(run.alarms) == 1
    assert len(run.samples) == 2
    assert run.audit["noise"]["estimate"] == 0.12
    assert run.state["global_step"] == 60


def test_trl_runs_are_read_from_the_root_or_the_last_checkpoint(tmp_path: Path) -> None:
    assert read_run(make_trl_run(tmp_path / "done")).notes == []
    make_trl_run(tmp_path / "stopped", checkpoint=20, num_steps=20)
    # As a number 100 comes after 20, as text before it.
    run = read_run(make_trl_run(tmp_path / "stopped", checkpoint=100, num_steps=100))
    assert run.history[-1]["step"] == 100
    assert run.notes == ["the log is that of checkpoint-100: the folder holds no trainer_state.json of a finished run"]


def test_a_torn_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path: Path) -> None:
    make_trl_run(tmp_path, checkpoint=20, num_steps=20)
    torn = make_trl_run(tmp_path, checkpoint=40, num_steps=40) / "checkpoint-40" / "trainer_state.json"
    torn.write_bytes(torn.read_bytes()[:100])
    run = read_run(tmp_path)
    assert run.history[-1]["step"] == 20
    assert run.notes[0].startswith("trainer_state.json was left out: it is not valid JSON")


@pytest.mark.parametrize("name", ["eval.json", "audit.json", "advice.json", "provenance.json", "trainer_state.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b"null", b"[" * 100_000])
def test_damaged_files_become_notes(tmp_path: Path, name: str, content: bytes) -> None:
    make_run(tmp_path)
    (tmp_path / name).write_bytes(content)
    run = read_run(tmp_path)
    assert len(run.notes) == 1
    assert run.notes[0].startswith(f"{name} was left out: ")


def test_damaged_lines_are_counted_and_an_unfinished_last_line_is_not_damage(tmp_path: Path) -> None:
    path = tmp_path / "alarms.jsonl"
    path.write_text('{"step": 1}\nnot json\n[]\n{"step": 2}\n{"st', encoding="utf-8")
    notes = Notes()
    assert [line["step"] for line in read_lines(path, notes)] == [1, 2]
    assert notes == ["alarms.jsonl: 2 damaged line(s) left out (line 2, 3)"]


def test_numbers_that_are_not_finite_become_none(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": NaN, "b": [Infinity, 1.5], "c": {"d": -Infinity}}', encoding="utf-8")
    assert read_object(tmp_path / "a.json", Notes()) == {"a": None, "b": [None, 1.5], "c": {"d": None}}


def test_the_live_log_is_used_while_it_is_ahead_and_a_resume_replaces_what_it_repeats(tmp_path: Path) -> None:
    events = [
        {"event": "begin", "time": 0.0, "step": 0, "max_steps": 10},
        {"time": 1.0, "step": 1, "epoch": 0.1, "logs": {"loss": 3.0}},
        {"time": 2.0, "step": 2, "epoch": 0.2, "logs": {"loss": 2.0}},
        {"event": "begin", "time": 100.0, "step": 1, "max_steps": 10},
        {"time": 101.0, "step": 2, "epoch": 0.2, "logs": {"loss": 1.0}},
    ]
    write_lines(tmp_path / "log.jsonl", events)
    assert [(line["step"], line["loss"]) for line in read_run(tmp_path).history] == [(1, 3.0), (2, 1.0)]
    make_trl_run(tmp_path, num_steps=5)
    assert read_run(tmp_path).history[0]["loss"] == history(5)[0]["loss"]


def test_a_folder_with_nothing_is_refused_in_one_line_that_names_the_runs_inside(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match="nothing to report on") as caught:
        read_all([tmp_path])
    assert "\n" not in str(caught.value)
    for name in ("trainer_state.json", "log.jsonl", "provenance.json", "eval.json", "audit.json", "advice.json"):
        assert name in str(caught.value)
    make_trl_run(tmp_path / "inner")
    with pytest.raises(DataError, match=r"runs inside it: preftune report .*inner"):
        read_all([tmp_path])
    with pytest.raises(DataError, match="no such folder"):
        read_all([tmp_path / "missing"])


def test_a_file_stands_for_its_folder_and_a_folder_counts_once(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    runs, _ = read_all([tmp_path / "run", tmp_path / "run" / "eval.json"])
    assert [run.name for run in runs] == ["run"]


def test_names_are_as_short_as_they_can_be_and_differ() -> None:
    names = distinct_names([Path("/a/x/run"), Path("/a/y/run"), Path("/a/other")])
    assert names == ["x/run", "y/run", "other"]


def test_a_sweep_brings_its_trials_and_stays_inside_its_folder(tmp_path: Path) -> None:
    sweep = read_sweep(make_sweep(tmp_path / "sweep"))
    assert sweep is not None
    assert len(sweep.runs) == 9
    assert sweep.runs[0].name.startswith(f"trial {sweep.content['best']['number']} (beta ")
    outside = make_trl_run(tmp_path / "elsewhere")
    content = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    (tmp_path / "sweep" / "trials" / "link").symlink_to(outside)
    for place in (str(outside), "../elsewhere", "trials/link", ""):
        content["trials"] = [{"number": 0, "params": {}, "metrics": {}, "run": place}]
        write_json(tmp_path / "sweep" / "sweep.json", content)
        again = read_sweep(tmp_path / "sweep")
        assert again is not None
        assert again.runs == []


def test_a_damaged_sweep_falls_back_to_what_else_the_folder_holds(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(DataError, match="nothing to report on"):
        read_all([tmp_path])


def _trained_and_evaluated(root: Path, model: str, place: Path) -> Path:
    """A run, and an evaluation of ``model`` in another folder."""
    run = root / "run"
    make_trl_run(run)
    place.mkdir(parents=True, exist_ok=True)
    metric = {"mean": 0.7, "low": 0.6, "high": 0.8, "n": 50}
    content = {"model": model, "metrics": {"rewards/accuracies": metric}, "ref_model": "base"}
    (place / "eval.json").write_text(json.dumps(content), encoding="utf-8")
    return run


@pytest.mark.parametrize("where", ["run/eval", "run-eval", "elsewhere/run-eval"])
def test_the_evaluation_of_a_run_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Inside the run, beside it, and in the folder that the command was run in."""
    run = _trained_and_evaluated(tmp_path, str(tmp_path / "run"), tmp_path / where)
    monkeypatch.chdir((tmp_path / where).parent)
    runs, _ = read_all([run])
    assert runs[0].evaluation["metrics"]["rewards/accuracies"]["mean"] == 0.7


@pytest.mark.parametrize("model", ["{root}/run", "run", "./run/"])
def test_a_run_given_with_its_evaluation_is_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = _trained_and_evaluated(tmp_path, model.format(root=tmp_path), tmp_path / "results")
    runs, _ = read_all([run, tmp_path / "results"])
    assert [each.name for each in runs] == ["run"]
    assert runs[0].evaluation


def test_an_evaluation_of_something_else_stays_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = _trained_and_evaluated(tmp_path, "another", tmp_path / "run-eval")
    assert not read_all([run])[0][0].evaluation
    assert len(read_all([run, tmp_path / "run-eval"])[0]) == 2
