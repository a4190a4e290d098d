"""Nothing of the user's is lost: random folders before every verb, kills, and settings that point at each other."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preftune.errors import ConfigError
from tests.faults import sessions, trees
from tests.faults.campaign import Campaign
from tests.faults.conftest import scaled
from tests.faults.verbs import TRAINING, VERBS, furnish, place


@pytest.fixture(scope="module")
def world(campaign: Campaign) -> Path:
    furnish(campaign.server.world)
    return campaign.server.world


def run(campaign: Campaign, out: Path, argv: tuple[str, ...], **options: Any) -> dict[str, Any]:
    return campaign.server.run("verb", out, argv=argv, cache=str(campaign.folder / "cache"), **options)


def assert_clear(answer: dict[str, Any]) -> None:
    """Not a traceback, and where it fails, one line at the end that names no internals."""
    assert answer["ended"] in ("ok", "killed"), answer
    if answer["ended"] == "ok" and answer["code"]:
        assert answer["said"].strip().splitlines()[-1].startswith("preftune: "), answer


# ---- random folders ------------------------------------------------------------------------------------------------


def test_random_folders_before_runs_that_are_killed_and_gone_on_with(tmp_path: Path) -> None:
    tally = sessions.Tally()
    # In memory where it can be: a rename onto a file waits for a disk.
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else tmp_path) as folder:
        for seed in range(scaled(40, 2000)):
            sessions.one_tree(Path(folder, str(seed)), seed, tally)
    print(f"{tally.trees} trees, sessions {dict(tally.ended)}")
    assert not tally.broken, "\n".join(tally.broken[:10])
    # Neither is everything refused, nor does every session come to its end.
    assert min(tally.ended[how] for how in ("done", "refused", "killed")) > tally.trees // 10


def test_random_folders_before_every_verb(campaign: Campaign, world: Path) -> None:
    draw, ended = random.Random(7), Counter[str]()
    for number in range(scaled(6, 132)):
        name = list(VERBS)[number % len(VERBS)]
        out = campaign.place(f"verb-{name}")
        trees.plant(out, draw)
        before, argv = trees.snapshot(out), VERBS[name]
        policy = draw.choice(sessions.POLICIES)
        if name in TRAINING:
            argv = (*argv, "--existing_output", policy)
        for at in (draw.randint(1, 60), None):
            answer = run(campaign, out, argv, at=at)
            assert_clear(answer)
            ended[f"{answer['ended']} {answer.get('code', '')}"] += 1
            gone = trees.lost(before, out, moved=name in TRAINING and policy != "refuse")
            assert not gone, f"{name} ({policy}, killed before {at}): {gone}; {answer}"
            if policy != "refuse":
                before = trees.followed(before, out)
        shutil.rmtree(out)
    print(dict(ended))


# ---- settings that point at each other -----------------------------------------------------------------------------

#: By verb the settings that are written and those that are read, and what each names.
SETTINGS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "dpo": (
        {"--output_dir": "folder", "--quarantine_path": "file", "PREFTUNE_CACHE": "folder"},
        {
            **{"--model_name_or_path": "model", "--ref_model_name_or_path": "model", "--dataset_name": "data"},
            **{"--tokenizer_name_or_path": "model"},
        },
    ),
    "eval": (
        {"--out": "folder", "--quarantine_path": "file", "PREFTUNE_CACHE": "folder"},
        {"--model": "model", "--ref_model": "model", "--compare": "model", "--dataset_name": "data"},
    ),
    "audit": ({"--out": "folder", "--quarantine_path": "file"}, {"--dataset_name": "data"}),
    "convert": ({"--out": "file"}, {"--dataset_name": "data"}),
    "select": (
        {"--out": "folder", "--quarantine_path": "file"},
        {"--model_name_or_path": "model", "--dataset_name": "data"},
    ),
    "advise": ({"--out": "folder", "--write": "file"}, {"--model_name_or_path": "model", "--dataset_name": "data"}),
    "sweep": ({"--out": "folder", "PREFTUNE_CACHE": "folder"}, {"--model_name_or_path": "model"}),
    "run": ({"--out": "folder", "PREFTUNE_CACHE": "folder"}, {"--model": "model", "{world}/pairs.jsonl": "data"}),
    "export": ({"--output_dir": "folder"}, {"{world}/model": "model", "--dataset_name": "data"}),
}
RELATIONS = ("same", "linked", "inside", "holds")


def pairs_of_settings() -> list[tuple[str, str, str, str]]:
    found = []
    for name, (written, read) in SETTINGS.items():
        for ours, theirs in itertools.product(written, {**written, **read}):
            found += [(name, ours, theirs, relation) for relation in RELATIONS if ours != theirs]
    return found


def pointed(world: Path, root: Path, ours: str, theirs: str, kind: str, relation: str) -> tuple[Path, Path]:
    """Two paths that stand in a relation, the second one holding what the setting reads."""
    outer = root / "outer"
    root.mkdir(parents=True, exist_ok=True)
    if relation == "inside":
        second = place(kind, world, outer)
        return (second / "below" if second.is_dir() else second), second
    if relation == "holds":
        outer.mkdir()
        return outer, place(kind, world, outer / "below")
    second = place(kind, world, outer)
    if relation == "linked":
        (root / "link").symlink_to(second)
        return root / "link", second
    return second, second


def test_settings_that_point_at_each_other(campaign: Campaign, world: Path) -> None:
    every = pairs_of_settings()
    chosen = every if scaled(0, 1) else random.Random(3).sample(every, 12)
    outcomes = Counter[str]()
    for name, ours, theirs, relation in chosen:
        root = campaign.place("pointed")
        kinds = {**SETTINGS[name][0], **SETTINGS[name][1]}
        first, second = pointed(world, root, ours, theirs, kinds[theirs], relation)
        before = trees.snapshot(root)
        argv, environment = list(VERBS[name]), {}
        for setting, path in ((ours, first), (theirs, second)):
            if setting == "PREFTUNE_CACHE":
                environment[setting] = str(path)
            elif setting in argv:
                # A word that stands for itself is replaced, a flag's value otherwise.
                argv[argv.index(setting) + setting.startswith("--")] = str(path)
            else:
                argv += [setting, str(path)]
        if "--quarantine_path" in argv:
            argv += ["--on_bad_rows", "skip"]
        answer = run(campaign, root.with_name(root.name + "-out"), tuple(argv), environment=environment)
        assert_clear(answer)
        gone = trees.lost(before, root)
        assert not gone, f"{name}: {ours} {relation} {theirs}: {gone}; {answer}"
        outcomes["refused" if answer["code"] else "harmless"] += 1
        shutil.rmtree(root)
    print(f"{len(chosen)} pairs: {dict(outcomes)}")
    assert outcomes["refused"]


@pytest.mark.parametrize("setting", ["--model_name_or_path", "--ref_model_name_or_path", "--dataset_name"])
@pytest.mark.parametrize("relation", RELATIONS)
def test_an_output_folder_that_is_read_is_refused(
    campaign: Campaign, world: Path, setting: str, relation: str, tmp_path: Path
) -> None:
    kind = "data" if setting == "--dataset_name" else "model"
    first, second = pointed(world, tmp_path / "root", "--output_dir", setting, kind, relation)
    argv = list(VERBS["dpo"])
    argv[argv.index("--output_dir") + 1] = str(first)
    if setting in argv:
        argv[argv.index(setting) + 1] = str(second)
    else:
        argv += [setting, str(second)]
    before = trees.snapshot(tmp_path)
    for policy in sessions.POLICIES:
        answer = run(campaign, tmp_path / "none", (*argv, "--existing_output", policy))
        assert answer["code"] == 2, answer
        assert "output_dir: " in answer["said"]
        assert setting.removeprefix("--") in answer["said"]
        assert trees.snapshot(tmp_path) == before


# ---- runs in one folder --------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_or_makes_room_and_can_be_resumed(campaign: Campaign, world: Path) -> None:
    out = campaign.place("second")
    assert run(campaign, out, VERBS["dpo"])["code"] == 0
    first = trees.snapshot(out)
    refused = run(campaign, out, VERBS["dpo"])
    assert refused["code"] == 2
    assert "results that this run has not written" in refused["said"]
    assert "resume_from_checkpoint" in refused["said"]
    assert trees.snapshot(out) == first
    # The second run is stopped earlier than the first one was, and goes on from its own checkpoint.
    shorter = (*VERBS["dpo"], "--existing_output", "set_aside", "--beta", "0.3", "--max_steps", "2")
    assert run(campaign, out, shorter)["code"] == 0
    held = {name: what for name, what in first.items() if not name.startswith(".preftune/holder")}
    assert not trees.lost(held, out / "earlier-1")
    longer = (*VERBS["dpo"], "--beta", "0.3", "--max_steps", "3", "--resume_from_checkpoint", "true")
    answer = run(campaign, out, longer)
    assert answer["code"] == 0, answer
    assert not trees.lost(held, out / "earlier-1")
    # And the first one still can be.
    again = (*VERBS["dpo"], "--resume_from_checkpoint", "true")
    answer = run(campaign, out / "earlier-1", again)
    assert answer["code"] == 0, answer


def test_the_step_is_what_the_manifest_says(campaign: Campaign, world: Path) -> None:
    from preftune.training.checkpoints import find_checkpoint

    out = campaign.place("renamed")
    assert run(campaign, out, VERBS["dpo"])["code"] == 0
    os.rename(out / "checkpoint-2", out / "checkpoint-900")
    found = find_checkpoint(out)
    assert found.manifest is not None
    assert found.manifest.step == 3


def test_a_full_disk_is_said_by_code_and_last_line(campaign: Campaign, world: Path) -> None:
    out = campaign.place("full")
    seen = set()
    for at in range(12, 80, 4):
        shutil.rmtree(out, ignore_errors=True)
        answer = run(campaign, out, VERBS["dpo"], at=at, strike="full")
        assert answer["ended"] == "ok", answer
        there = {path.name for path in out.glob("checkpoint-*")}
        last = answer["said"].strip().splitlines()[-1] if answer["said"].strip() else ""
        complete = {"checkpoint-2", "checkpoint-3"} <= there and (out / "model.safetensors").exists()
        assert complete or answer["code"] == 6, answer
        if answer["code"] == 6 and (out / "model.safetensors").exists() and "could not be written" in last:
            seen.add(last.split(": ")[2].split(" could")[0])
    assert seen & {"checkpoint-2", "checkpoint-3"}, seen


@pytest.mark.slow
@pytest.mark.parametrize(("strike", "codes"), [("full", {6}), ("interrupt", {130})])
@pytest.mark.parametrize("name", ["run", "export"])
def test_the_whole_path_is_stopped_anywhere_and_the_same_command_goes_on(
    campaign: Campaign, world: Path, name: str, strike: str, codes: set[int]
) -> None:
    """A full disk, or Ctrl-C, at operations spread over all stages: audit, settings, training, evaluation, report."""
    out = campaign.place(f"{name}-whole")
    # An export is made beside its place.
    argv = tuple(word.replace("{out}", "{out}/below") for word in VERBS[name])
    whole = run(campaign, out, argv)
    assert whole["code"] == 0, whole
    # Training goes on without a checkpoint that could not be written, which its last line says.
    results = {path.name for path in (out / "below").iterdir() if not path.name.startswith("checkpoint-")}
    last = whole["operations"]
    points = np.linspace(1, last, min(last, scaled(5, 40))).astype(int)
    seen = Counter[int]()
    for at in dict.fromkeys(points.tolist()):
        shutil.rmtree(out, ignore_errors=True)
        answer = run(campaign, out, argv, at=at, strike=strike)
        assert_clear(answer)
        # A page, a log or a table that cannot be written is said, and does not end the path.
        assert answer["ended"] == "ok", answer
        assert answer["code"] in {0, *codes}, answer
        seen[answer["code"]] += 1
        again = run(campaign, out, (*argv, *(("--overwrite",) if name == "export" else ())))
        assert again["code"] == 0, (at, answer, again)
        missing = results - {path.name for path in (out / "below").iterdir()}
        assert all(name in answer["said"] + answer["told"] for name in missing), (at, missing, answer, again)
        assert not list(out.rglob("*.tmp"))
    assert seen[min(codes)], seen


def test_two_processes_do_not_share_a_folder(campaign: Campaign, world: Path) -> None:
    from preftune.ownership import holding

    out = campaign.place("held")
    with holding(out):
        before = trees.snapshot(out)
        answer = run(campaign, out, VERBS["dpo"])
        assert answer["code"] == 6, answer
        assert f"process {os.getpid()}, started 20" in answer["said"]
        assert trees.snapshot(out) == before
    assert run(campaign, out, VERBS["dpo"])["code"] == 0


def test_a_lock_ends_with_its_process_though_a_child_lives_on(tmp_path: Path) -> None:
    from preftune.ownership import holding

    read, write = os.pipe()
    with holding(tmp_path):
        child = os.fork()
        if not child:
            # As a data-loader worker whose parent is killed: it must not keep the folder locked.
            os.close(write)
            os.read(read, 1)
            os._exit(0)
    with holding(tmp_path):
        pass
    os.close(write)
    os.waitpid(child, 0)
    os.close(read)


@pytest.mark.parametrize("name", ["data", "base.yaml"])
def test_a_sweep_reads_only_what_it_has_written(campaign: Campaign, world: Path, name: str) -> None:
    import datasets

    out = campaign.place("sweep")
    out.mkdir()
    if name == "data":
        rows = datasets.Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "b"}] * 4)
        datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(out / "data"))
    else:
        (out / name).write_text("learning_rate: 1.0\n", encoding="utf-8")
    before = trees.snapshot(out)
    answer = run(campaign, out, VERBS["sweep"])
    assert answer["code"] == 2, answer
    assert f"{name} does not hold" in answer["said"]
    assert not trees.lost(before, out)


def test_a_split_that_cannot_be_saved_leaves_nothing(campaign: Campaign, world: Path) -> None:
    for at in (8, 10, 12, 14, 16):
        out = campaign.place("split")
        answer = run(campaign, out, VERBS["sweep"], at=at, strike="full", lasting=True)
        assert answer["ended"] == "ok", answer
        assert answer["code"] == 6, answer
        assert not [path for path in out.rglob("*.arrow") if path.parent.parent != out / "data"]


def test_a_quarantine_file_of_somebody_else_is_left_alone(campaign: Campaign, world: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"prompt": "p"}\n', encoding="utf-8")
    argv = (*VERBS["dpo"], "--on_bad_rows", "skip", "--quarantine_path", str(mine))
    answer = run(campaign, tmp_path / "out", argv)
    assert answer["code"] == 2, answer
    assert mine.read_text(encoding="utf-8") == '{"prompt": "p"}\n'


def test_an_empty_file_of_an_earlier_run_makes_room_without_a_word(tmp_path: Path) -> None:
    from preftune.ownership import RunFolder
    from preftune.training.checkpoints.output import claim

    RunFolder.open(tmp_path, "first").put_text("alarms.jsonl", "")
    (tmp_path / "samples.jsonl").write_text("")  # nobody's: it stays
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError, match=r"samples\.jsonl"):
            claim(tmp_path, "second", "set_aside_own")
        (tmp_path / "samples.jsonl").unlink()
        claim(tmp_path, "second", "set_aside_own", dry=True)
        assert (tmp_path / "alarms.jsonl").exists()
        claim(tmp_path, "second", "set_aside_own")
    assert not (tmp_path / "alarms.jsonl").exists()
    assert not (tmp_path / "earlier-1").exists()
    RunFolder.open(tmp_path, "third").put_text("alarms.jsonl", "{}\n")
    with pytest.warns(UserWarning, match="held the results of an earlier run"):
        claim(tmp_path, "fourth", "set_aside_own")
    assert (tmp_path / "earlier-1" / "alarms.jsonl").read_text() == "{}\n"
