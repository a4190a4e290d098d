"""Files that cannot be read end in one line that names them."""

from __future__ import annotations

import collections
import gzip
import json
import os
import random
import shutil
from pathlib import Path

import datasets
import pytest

from preftune.data import load
from preftune.errors import ConfigError, DataError

ROW = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n"
DEEP = "[" * 100_000 + "]" * 100_000
LONG = "1" * 10_000


def test_damaged_compression_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl.gz"
    content = bytearray(gzip.compress((ROW * 50).encode()))
    content[20] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read") as caught:
        load(str(file))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "why"), [(DEEP, "nested too deep"), (LONG, "digits")])
def test_json_that_python_cannot_hold_is_a_bad_row(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(ROW + '{"prompt": ' + text + "}\n")
    with pytest.raises(DataError, match=why) as caught:
        load(str(file))
    assert f"{file}:2" in str(caught.value)
    assert len(load(str(file), on_bad_rows="skip")["train"]) == 1


@pytest.mark.parametrize(("text", "why"), [(DEEP, "nested too deep"), (LONG, "digits")])
def test_a_whole_file_that_python_cannot_hold_is_named(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text("[" + text + "]")
    with pytest.raises(DataError, match=why):
        load(str(file))


def saved(folder: Path, num_rows: int = 200, *, shuffled: bool = False) -> Path:
    rows = [{"prompt": f"p {n}", "chosen": f"c {n}", "rejected": f"r {n}"} for n in range(num_rows)]
    dataset = datasets.Dataset.from_list(rows)
    (dataset.shuffle(seed=0) if shuffled else dataset).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_saved_data_set_that_is_damaged_ends_in_one_line(tmp_path: Path, shuffled: bool) -> None:
    draw = random.Random(int(shuffled))
    whole = saved(tmp_path / "whole", shuffled=shuffled)
    good = load(str(whole))["train"].to_list()
    names = sorted(path.name for path in whole.iterdir())
    outcomes = collections.Counter[str]()
    for trial in range(80):
        folder = tmp_path / str(trial)
        shutil.copytree(whole, folder)
        file = folder / names[trial % len(names)]
        data = bytearray(file.read_bytes())
        match trial % 4:
            case 0:
                data = data[: draw.randrange(len(data))]
            case 1:
                for _ in range(8):
                    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            case 2:
                odd = [b"", b"{}", b"[]", b"null", b'{"_data_files": 3}', b"\x00" * 100, DEEP.encode()]
                data = bytearray(draw.choice(odd))
            case _:
                data[draw.randrange(len(data))] ^= 0xFF
        file.write_bytes(data)
        if trial % 9 == 8:
            file.unlink()
        try:
            found = load(str(folder), on_bad_rows="skip")["train"].to_list()
            outcomes["as it was" if found == good else "other rows"] += 1
        except (DataError, ConfigError) as error:
            outcomes["one line" if str(error).isprintable() else "an odd line"] += 1
    assert not outcomes["an odd line"]
    assert outcomes["one line"] > 20, outcomes


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        load(str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match="holds no data set"):
        load(str(tmp_path))
    (tmp_path / "train.jsonl").write_text(ROW)
    assert len(load(str(tmp_path))["train"]) == 1
    with pytest.raises(DataError, match="neither a file nor a folder"):
        load("/dev/zero")
