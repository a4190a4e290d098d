"""Tokenised data are found again, and only where nothing has changed."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pytest

from preftune.cli.main import main
from preftune.data import arrow, token_cache
from preftune.data.options import DataOptions
from preftune.data.preference import prepare
from preftune.data.sft import prepare_sft
from preftune.data.tokenise import Encoder
from preftune.data.unpaired import prepare_unpaired
from tests.models.tiny import train_tokenizer
from tests.parity import worlds

ROWS: list[dict[str, Any]] = [dict(row) for row in worlds.pair_rows(30)]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
Prepare = Callable[..., Any]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "MIN_ROWS", 1)
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many texts went through a tokenizer, call by call."""
    calls: list[int] = []
    encode = Encoder.encode

    def counted(self: Encoder, texts: Any, **options: Any) -> Any:
        calls.append(len(texts))
        return encode(self, texts, **options)

    monkeypatch.setattr(Encoder, "encode", counted)
    return calls  # type: ignore[return-value]


def tokenizer() -> Any:
    made = train_tokenizer([text for row in ROWS for text in row.values()], 330)
    made.chat_template = TEMPLATE
    return made


def rows(changed: dict[str, Any] | None = None) -> datasets.Dataset:
    return datasets.Dataset.from_list([{**ROWS[0], **(changed or {})}, *ROWS[1:]])


def chat() -> datasets.Dataset:
    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return datasets.Dataset.from_list(
        [
            {
                "prompt": said("user", row["prompt"]),
                "chosen": said("assistant", row["chosen"]),
                "rejected": said("assistant", row["rejected"]),
            }
            for row in ROWS
        ]
    )


def sft_rows() -> datasets.Dataset:
    return datasets.Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS])


def labelled() -> datasets.Dataset:
    return datasets.Dataset.from_list(worlds.unpaired_rows(30))


@pytest.mark.parametrize(
    ("call", "data"),
    [(prepare, rows), (prepare, chat), (prepare_sft, sft_rows), (prepare_unpaired, labelled)],
    ids=["pairs", "chat", "sft", "unpaired"],
)
def test_the_same_data_are_tokenised_once(call: Prepare, data: Any, tokenised: list[int], place: Path) -> None:
    options = DataOptions(max_length=20)
    first, report = call(data(), tokenizer(), options)
    assert tokenised
    assert len(list(place.glob("*.arrow"))) == 1
    used = tokenizer()
    used(["what a tokenizer does in between"] * 3, padding=True, truncation=True, max_length=4)
    for again in (tokenizer(), used):
        tokenised.clear()
        second, other = call(data(), again, options)
        assert not tokenised
        assert second.to_dict() == first.to_dict()
        assert second.features == first.features
        assert vars(other).keys() == vars(report).keys()
        assert str(other) == str(report)
        assert (other.rows_read, other.rows_kept, other.lengths) == (report.rows_read, report.rows_kept, report.lengths)


def changed_tokenizer(change: str) -> Any:
    other = tokenizer()
    if change == "token":
        other.add_tokens(["the a"])
    elif change == "template":
        other.chat_template = TEMPLATE.replace("<", "[")
    elif change == "bos":
        other.add_special_tokens({"bos_token": "<eos>"})
    elif change == "eos":
        other.eos_token = "<bos>"
    return other


@pytest.mark.parametrize(
    "change",
    [
        {"data": rows({"chosen": " another answer"})},
        {"data": rows({"rejected": " another answer"})},
        {"data": rows().shuffle(seed=1)},
        {"data": rows().select(range(29))},
        {"data": rows().add_column("margin", [1.0] * 30)},
        *({"tokenizer": name} for name in ("token", "template", "bos", "eos")),
        {"options": {"max_length": 19}},
        {"options": {"max_prompt_length": 5}},
        {"options": {"truncation_mode": "keep_end"}},
        {"options": {"append_eos": True}},
        {"options": {"enclose": True}},
        {"options": {"chat_template": TEMPLATE + " "}},
        {"code": "another version"},
        {"library": "9.9"},
    ],
    ids=lambda change: str({k: v if isinstance(v, (str, dict)) else "..." for k, v in change.items()}),
)
def test_anything_that_matters_is_another_file(
    change: dict[str, Any], tokenised: list[int], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(rows(), tokenizer(), DataOptions(max_length=20))
    tokenised.clear()
    if "code" in change:
        monkeypatch.setattr(token_cache, "_code_key", lambda: change["code"])
    if "library" in change:
        monkeypatch.setattr("importlib.metadata.version", lambda name: change["library"])
    options = DataOptions(**{"max_length": 20, **change.get("options", {})})
    found, _ = prepare(change.get("data", rows()), changed_tokenizer(change.get("tokenizer", "")), options)
    assert tokenised
    assert len(list(place.glob("*.arrow"))) == 2
    # And what was found is what is found without any file.
    plain, _ = prepare(
        change.get("data", rows()),
        changed_tokenizer(change.get("tokenizer", "")),
        DataOptions(**{"max_length": 20, **change.get("options", {}), "data_cache": False}),
    )
    assert plain.to_dict() == found.to_dict()


def test_how_fast_or_how_strict_does_not_matter(tokenised: list[int]) -> None:
    prepare(rows(), tokenizer(), DataOptions())
    tokenised.clear()
    prepare(rows(), tokenizer(), DataOptions(num_proc=2, worker_timeout=5.0, max_dropped_share=0.5))
    assert not tokenised


def test_templates_that_write_the_date_are_rendered_every_day(
    tokenised: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = tokenizer()
    dated.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + TEMPLATE

    class Tomorrow:
        @staticmethod
        def today() -> str:
            return "2099-01-01"

    prepare(chat(), dated, DataOptions())
    tokenised.clear()
    prepare(chat(), dated, DataOptions())
    assert not tokenised
    monkeypatch.setattr(token_cache, "date", Tomorrow)
    prepare(chat(), dated, DataOptions())
    assert tokenised


def test_bad_rows_are_told_and_set_aside_every_time(tokenised: list[int], tmp_path: Path, place: Path) -> None:
    aside = tmp_path / "aside.jsonl"
    options = DataOptions(on_bad_rows="skip", quarantine_path=str(aside))
    for times in (1, 2):
        _, report = prepare(rows({"chosen": None}), tokenizer(), options)
        assert sum(report.bad_rows.values()) == 1
        assert len(aside.read_text().splitlines()) == times
    assert not list(place.glob("*"))


@pytest.mark.parametrize("content", [b"", b"no Arrow file", None])
def test_a_broken_file_is_made_anew(content: bytes | None, tokenised: list[int], place: Path) -> None:
    first, _ = prepare(rows(), tokenizer(), DataOptions())
    (file,) = place.glob("*.arrow")
    whole = file.read_bytes()
    file.unlink()  # never written in place: the first data set still reads it
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    tokenised.clear()
    again, _ = prepare(rows(), tokenizer(), DataOptions())
    assert tokenised
    assert again.to_dict() == first.to_dict()
    assert file.read_bytes() == whole


def test_a_place_that_cannot_be_written_costs_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "a file"))
    found, _ = prepare(rows(), tokenizer(), DataOptions())
    assert len(found) == 30
    assert "tokenised data are not kept" in caplog.text


def test_it_can_be_switched_off_and_leaves_small_data_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(rows(), tokenizer(), DataOptions(data_cache=False))
    monkeypatch.setattr(token_cache, "MIN_ROWS", 31)
    prepare(rows(), tokenizer(), DataOptions())
    assert not place.exists()


def test_what_is_unused_or_too_much_goes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        prepare(rows({"chosen": f" answer {number}"}), tokenizer(), DataOptions())
        newest = max(place.glob("*.arrow"), key=lambda path: path.stat().st_mtime_ns)
        age = [40 * 86400, 300, 200, 100][number]
        os.utime(newest, (time.time() - age, time.time() - age))
    assert len(token_cache.files()) == 3  # the first had not been used for forty days
    size = token_cache.num_bytes() // 3
    monkeypatch.setattr(token_cache, "MOST_BYTES", int(2.5 * size))
    oldest, second, third = token_cache.files()
    prepare(rows({"chosen": " the last"}), tokenizer(), DataOptions())
    left = token_cache.files()
    assert len(left) == 2
    assert third in left
    assert not {oldest, second} & set(left)


def test_what_a_killed_process_left_goes(place: Path) -> None:
    place.mkdir(parents=True)
    old, young = (f".{'a' * 40}.arrow.{mark * 32}.tmp" for mark in "01")
    # The cache may have been pointed at a folder of somebody's data.
    others = [".x.arrow.old.tmp", "data-00000-of-00001.arrow"]
    for name, age in ((old, 2 * 86400), (young, 60), *((name, 90 * 86400) for name in others)):
        left = place / name
        left.write_bytes(b"half")
        os.utime(left, (time.time() - age, time.time() - age))
    prepare(rows(), tokenizer(), DataOptions())
    assert [path.name for path in place.glob(".*.tmp") if path.name not in others] == [young]
    token_cache.clear()
    assert all((place / name).read_bytes() == b"half" for name in others)


def test_tokens_are_their_owners_alone(place: Path) -> None:
    prepare(rows(), tokenizer(), DataOptions())
    assert place.stat().st_mode & 0o077 == 0


def test_a_folder_of_tokens_that_is_open_is_closed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(rows(), tokenizer(), DataOptions())
    (file,) = token_cache.files()
    for bits in (0o777, 0o755, 0o710):
        place.chmod(bits)
        prepare(rows(), tokenizer(), DataOptions())
        assert place.stat().st_mode & 0o777 == 0o700
    # Somebody else's, who could put anything there: it is neither read nor written.
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    os.utime(file, (0, 0))
    file.write_bytes(b"")
    assert len(prepare(rows(), tokenizer(), DataOptions())[0])
    assert file.read_bytes() == b""


def test_a_file_in_use_counts_as_used(place: Path) -> None:
    prepare(rows(), tokenizer(), DataOptions())
    (file,) = token_cache.files()
    os.utime(file, (0, 0))
    prepare(rows(), tokenizer(), DataOptions())
    assert time.time() - file.stat().st_mtime < 60


_KEY = """
import sys
import threading
from preftune.data import arrow, token_cache
from preftune.data.options import DataOptions
from preftune.data.preference import prepare
from tests.data.test_kept import chat, rows, tokenizer
token_cache.MIN_ROWS = 1
prepare(rows(), tokenizer(), DataOptions(max_length=20))
prepare(chat(), tokenizer(), DataOptions(max_length=20))
print(*sorted(path.name for path in token_cache.files()))
"""


@pytest.mark.slow
def test_another_process_finds_the_same_files(place: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    names = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}
        done = subprocess.run(
            [sys.executable, "-c", _KEY], env=environment, cwd=root, capture_output=True, text=True, check=True
        )
        names.append(done.stdout.split())
    assert len(names[0]) == 2
    assert names[0] == names[1]


def test_the_command_shows_and_clears_them(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(rows(), tokenizer(), DataOptions())
    assert main(["cache", "info"]) == 0
    assert "Tokenised data: 1 files" in capsys.readouterr().out
    assert main(["cache", "clear", "--older_than", "1d"]) == 0
    assert len(token_cache.files()) == 1
    assert main(["cache", "clear"]) == 0
    assert "Removed 1 files of tokenised data" in capsys.readouterr().out
    assert not token_cache.files()


def test_copies_of_a_tokenizer_are_the_same(tokenised: list[int]) -> None:
    one = tokenizer()
    prepare(rows(), one, DataOptions())
    tokenised.clear()
    prepare(rows(), copy.deepcopy(one), DataOptions())
    assert not tokenised


# ---- several processes ----------------------------------------------------------------------------------------------


def at_once(number: int, call: Callable[[], Any]) -> list[Any]:
    """The results of calls in so many threads: a file lock keeps them apart as it does processes."""
    with ThreadPoolExecutor(number) as pool:
        return [each.result(60) for each in [pool.submit(call) for _ in range(number)]]


def test_processes_that_start_together_prepare_once(
    tokenised: list[int], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = [tokenizer() for _ in range(3)]
    plain, _ = prepare(rows(), used[0], DataOptions(max_length=20, data_cache=False))
    once = len(tokenised)
    tokenised.clear()
    encode = Encoder.encode

    def slow(self: Encoder, texts: Any, **options: Any) -> Any:
        time.sleep(0.3)
        return encode(self, texts, **options)

    monkeypatch.setattr(Encoder, "encode", slow)
    found = at_once(3, lambda: prepare(rows(), used.pop(), DataOptions(max_length=20))[0])
    assert len(tokenised) == once
    assert all(each.to_dict() == plain.to_dict() for each in found)
    assert [path.suffix for path in place.iterdir()] == [".arrow"]


def test_rows_that_are_not_kept_are_prepared_by_each(tokenised: list[int], place: Path) -> None:
    data = [*ROWS[:10], {**ROWS[10], "chosen": None}]
    used = [tokenizer() for _ in range(3)]
    options = DataOptions(max_length=20, on_bad_rows="skip")
    found = at_once(3, lambda: prepare(datasets.Dataset.from_list(data), used.pop(), options)[0])
    assert [len(each) for each in found] == [10, 10, 10]
    assert not list(place.iterdir())


def test_nobody_waits_for_a_process_that_has_died(place: Path) -> None:
    prepare(rows(), tokenizer(), DataOptions(max_length=20))
    (path,) = place.glob("*.arrow")
    path.unlink()
    code = "import sys, time, filelock\nlock = filelock.FileLock(sys.argv[1])\nlock.acquire()\nprint(flush=True)\n"
    lock = str(path.with_name(f".{path.name}.lock"))
    with subprocess.Popen([sys.executable, "-c", code + "time.sleep(60)", lock], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        timer = threading.Timer(1.0, holder.kill)
        timer.start()
        began = time.monotonic()
        prepare(rows(), tokenizer(), DataOptions(max_length=20))
        assert 0.5 < time.monotonic() - began < 20
    assert list(place.iterdir()) == [path]


def test_columns_that_arrow_holds_in_several_pieces_only_are_kept_too(
    tokenised: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = prepare(rows(), tokenizer(), DataOptions(max_length=20, data_cache=False))
    monkeypatch.setattr(arrow, "MOST_VALUES", 60)
    first, _ = prepare(rows(), tokenizer(), DataOptions(max_length=20))
    tokenised.clear()
    second, _ = prepare(rows(), tokenizer(), DataOptions(max_length=20))
    assert not tokenised
    assert second.data.column("chosen_ids").num_chunks > 1
    assert first.to_dict() == second.to_dict() == plain.to_dict()
