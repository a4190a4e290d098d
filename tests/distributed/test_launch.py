"""Ways to start several processes: the flag of the command line, and the files under ``examples/launch``."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from preftune.cli.main import main
from preftune.errors import ConfigError, SetupError
from preftune.runs.launcher import LAUNCHED, Processes, launch
from tests.parity import worlds

EXAMPLES = Path(__file__).parents[2] / "examples" / "launch"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    made = worlds.World(tmp_path_factory.mktemp("world"))
    lines = [json.dumps(row) for row in worlds.pair_rows(13)]
    Path(made.path, "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return made


def flags(world: worlds.World, out: Path, batch: int) -> list[str]:
    return (
        f"--model_name_or_path {world.path} --dataset_name {world.path}/rows.jsonl --output_dir {out} --bf16 false "
        f"--use_cpu true --report_to none --num_train_epochs 1 --save_strategy no --learning_rate 1e-3 "
        f"--per_device_train_batch_size {batch} --reference_store false --max_length 128"
    ).split()


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


# ---- watching processes ---------------------------------------------------------------------------------------------


def python(program: str) -> list[str]:
    return [sys.executable, "-c", f"import os, sys, time, signal\nrank = int(os.environ['RANK'])\n{program}"]


def test_processes_find_their_place(tmp_path: Path) -> None:
    program = "open(sys.argv[1] + f'/{rank}', 'w').write(' '.join(os.environ[n] for n in sys.argv[2:]))"
    names = ["WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", LAUNCHED]
    assert launch(3, [*python(program), str(tmp_path), *names], print) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == [f"3 {rank} 3 1" for rank in range(3)]


def test_a_mistake_that_all_find_is_not_told_again() -> None:
    said: list[str] = []
    assert launch(2, python("sys.exit(2)"), said.append) == 2
    assert said == []


def test_one_that_fails_alone_is_named_and_the_others_are_ended() -> None:
    said: list[str] = []
    began = time.monotonic()
    assert launch(2, python("sys.exit(4) if rank == 1 else time.sleep(60)"), said.append) == 4
    assert time.monotonic() - began < 15
    assert len(said) == 1
    assert "process 1 of 2" in said[0]
    assert "exit code 4" in said[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_killed_is_named_with_the_signal(rank: int) -> None:
    said: list[str] = []
    program = f"os.kill(os.getpid(), signal.SIGKILL) if rank == {rank} else sys.exit(time.sleep(0.5) or 6)"
    with pytest.raises(SetupError, match=rf"process {rank} of 2 \(pid \d+\): was ended by SIGKILL.*memory was short"):
        launch(2, python(program), said.append)
    assert "was ended by SIGKILL; the others are ended" in said[0]


def test_one_that_hears_nothing_is_ended_too() -> None:
    ignoring = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    program = f"{ignoring}if rank: sys.exit(1)\nwhile True: time.sleep(1)"
    began = time.monotonic()
    assert launch(2, python(program), lambda text: None) == 1
    assert time.monotonic() - began < 15


def test_asked_to_stop_they_take_their_time(tmp_path: Path) -> None:
    """One has left already while the other still saves."""
    leaves = (
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(7 * (1 - rank)), print(f'left {rank}'), sys.exit(130)))"
    )
    program = f"{leaves}\nopen('{tmp_path}/' + str(rank), 'w').close()\nwhile True: time.sleep(0.1)"
    code = (
        "import sys\nfrom preftune.runs.launcher import launch\n"
        f"sys.exit(launch(2, {python(program)!r}, lambda text: print(text, file=sys.stderr)))"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.05)
    run.terminate()
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert err == ""
    assert sorted(out.split("\n")) == ["", "left 0", "left 1"]


# ---- the flag -------------------------------------------------------------------------------------------------------


def test_only_a_number_is_taken_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Processes().to_launch() is None
    assert Processes(2).to_launch() == 2
    with pytest.raises(ConfigError, match="1 or more"):
        Processes(0).to_launch()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="a launcher has started 4 processes already"):
        Processes(2).to_launch()
    monkeypatch.setenv(LAUNCHED, "1")
    assert Processes(2).to_launch() is None


@pytest.mark.parametrize("verb", ["eval", "advise"])
def test_verbs_that_do_not_train_refuse_it(verb: str, capsys: pytest.CaptureFixture[Any]) -> None:
    assert main([verb, "--num_processes", "2"]) != 0
    assert "num_processes" in capsys.readouterr().err


@pytest.mark.slow
def test_a_wrong_setting_is_told_once(world: worlds.World, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "preftune", "dpo", "--num_processes", "2", *flags(world, tmp_path, 2)]
    done = run([*command, "--beta", "much"])
    assert done.returncode == ConfigError.exit_code
    assert done.stderr.count("beta") == 1
    assert "Traceback" not in done.stderr


# ---- the examples ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_ways_end_with_the_same_weights(world: worlds.World, tmp_path: Path) -> None:
    preftune = [sys.executable, "-m", "preftune", "dpo"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / "ddp.yaml")]
    ways = {
        "one": ([*preftune, *flags(world, tmp_path / "one", 4)], {}),
        "flag": ([*preftune, "--num_processes", "2", *flags(world, tmp_path / "flag", 2)], {}),
        "accelerate": (
            [*accelerate, "--num_processes", "2", "-m", "preftune", "dpo", *flags(world, tmp_path / "accelerate", 2)],
            {},
        ),
        "torchrun": (["sh", str(EXAMPLES / "torchrun.sh"), *flags(world, tmp_path / "torchrun", 2)], {"GPUS": "2"}),
    }
    for command, environment in ways.values():
        done = run(command, **environment)
        assert done.returncode == 0, done.stderr[-3000:]
    for name in ways:
        assert_same_weights(tmp_path / "one", tmp_path / name)


def assert_same_weights(one: Path, other: Path) -> None:
    mine, others = (load_file(folder / "model.safetensors") for folder in (one, other))
    for key, value in mine.items():
        assert float((others[key] - value).norm()) <= 1e-5 * float(value.norm()), key


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


#: Stand-ins for Slurm's programs: two machines, which are both this one.
_SLURM = {
    "scontrol": "echo 127.0.0.1; echo 127.0.0.1",
    "srun": """for n in 0 1; do SLURM_NODEID=$n "$@" & started="$started $!"; done
for each in $started; do wait $each || exit $?; done""",
}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["torchrun", "slurm"])
def test_two_machines_end_with_the_same_weights(way: str, world: worlds.World, tmp_path: Path) -> None:
    """One process on each; both machines are this one."""
    done = run([sys.executable, "-m", "preftune", "dpo", *flags(world, tmp_path / "one", 4)])
    assert done.returncode == 0, done.stderr[-3000:]
    given, settings = flags(world, tmp_path / "two", 2), {"GPUS": "1", "PORT": free_port()}
    if way == "slurm":
        for name, text in _SLURM.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
            (tmp_path / name).chmod(0o755)
        settings |= {"SLURM_JOB_NODELIST": "machine[0-1]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
        settings |= {"SLURM_SUBMIT_DIR": str(EXAMPLES), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        results = [run(["bash", str(EXAMPLES / "slurm.sbatch"), *given], **settings)]
    else:
        with ThreadPoolExecutor(2) as pool:
            command = ["sh", str(EXAMPLES / "torchrun.sh"), *given]
            machines = [{"NODES": "2", "NODE": str(n), **settings} for n in range(2)]
            results = list(pool.map(lambda machine: run(command, **machine), machines))
    assert [each.returncode for each in results] == [0] * len(results), results[0].stderr[-3000:]
    record = json.loads((tmp_path / "two" / "provenance.json").read_text(encoding="utf-8"))
    assert record["machine"]["num_processes"] == 2
    assert_same_weights(tmp_path / "one", tmp_path / "two")


#: The command line, with streams that are read while they are trained on from the first row on.
_LATE = """
import sys
from preftune.cli.main import main
from preftune.training import streams
streams.MOST_ROWS_AHEAD, streams.BLOCK = 0, 5
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_processes_divide_a_stream(world: worlds.World, tmp_path: Path) -> None:
    """It ends and begins again on the way, and the run goes on in its middle."""
    more = ["--max_steps", "6", "--dataset_streaming", "true", "--save_strategy", "steps", "--save_steps", "4"]
    one = run([sys.executable, "-m", "preftune", "dpo", *flags(world, tmp_path / "one", 4), *more])
    assert one.returncode == 0, one.stderr[-3000:]
    two = [*flags(world, tmp_path / "two", 2), *more]
    done = run([sys.executable, "-m", "preftune", "dpo", "--num_processes", "2", *two])
    assert done.returncode == 0, done.stderr[-3000:]
    # Its steps go on over its end, where rows that are read ahead make a smaller one.
    program = [sys.executable, "-c", _LATE, "dpo"]
    assert launch(1, [*program, *flags(world, tmp_path / "one-late", 4), *more], print) == 0
    late = [*program, *flags(world, tmp_path / "late", 2), *more]
    assert launch(2, late, print) == 0
    again = [*late, "--resume_from_checkpoint", str(tmp_path / "late" / "checkpoint-4")]
    again[again.index(str(tmp_path / "late"))] = str(tmp_path / "again")
    assert launch(2, again, print) == 0
    for alone, together in (("one", "two"), ("one-late", "late")):
        assert_same_weights(tmp_path / alone, tmp_path / together)
    kept = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("late", "again")]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_reads_the_shipped_files(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    read = load_config_from_file(str(EXAMPLES / f"{name}.yaml"))
    assert read.num_processes == 8


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_shells_read_the_shipped_scripts(name: str) -> None:
    assert run(["bash", "-n", str(EXAMPLES / name)]).returncode == 0
