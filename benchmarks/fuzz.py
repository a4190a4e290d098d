"""Hostile input by the thousand: each ends in success or in one clear error, and no row disappears unseen.

``python -m benchmarks.fuzz`` feeds generated rows, damaged files, configurations and command lines to the code that a
user's input meets first, extreme numbers and lengths to losses and packing, and writes
``benchmarks/results/fuzz.json``, where kinds that are not run this time stay if their code is that of now. Counted are
exceptions that are no :class:`~preftune.errors.PreftuneError` (a user would see a traceback), errors of more than one
line, rows that are neither kept nor accounted for, and results that an independent computation contradicts.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gzip
import io
import json
import logging
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from benchmarks.fuzz_guided import available, run_guided
from benchmarks.fuzz_losses import fuzz_losses
from benchmarks.fuzz_packing import fuzz_long_rows, fuzz_packing
from benchmarks.fuzz_tally import Tally
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks import stale

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
PATTERNS = (
    *stale.ENGINE,
    "src/preftune/data/**/*.py",
    "src/preftune/config/*.py",
    "src/preftune/cli/*.py",
    "benchmarks/fuzz*.py",
)
#: Share of ``--inputs`` that each kind gets.
SHARES = {"rows": 0.35, "files": 0.1, "configs": 0.25, "command lines": 0.3, "losses": 0.5, "packing": 0.25}
#: Rows of a hundred thousand tokens take minutes each.
LONG_ROWS, GUIDED = "rows of 100,000 tokens", "guided"
NUM_LONG_ROWS = 4
PAIR_FIELDS = ("prompt", "chosen", "rejected")
VALID_ROW = {"prompt": "What is it?", "chosen": " A cat of course.", "rejected": " No idea."}


# ---- what is generated ----------------------------------------------------------------------------------------------

# Lone surrogates, private use and the last plane included: JSON can spell them all.
TEXT = st.one_of(
    st.text(max_size=40), st.text(alphabet=st.characters(), max_size=8), st.sampled_from(["", " ", "\x00"])
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT)
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tool_calls"]), SCALARS, max_size=3),
    max_size=4,
)
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "robot"]), "content": TEXT}),
    max_size=4,
)
VALUES = st.one_of(TEXT, TURNS, MESSAGES, SCALARS, st.lists(SCALARS, max_size=3))
COLUMNS = st.sampled_from(
    [
        *PAIR_FIELDS,
        *("messages", "conversations", "completion", "label", "instruction", "input", "output", "text", "system"),
        *("score_chosen", "score_rejected", "margin", "weight", "ranking", "completions", "responses", "question"),
    ]
)
SOUND = st.fixed_dictionaries({name: st.text(min_size=1, max_size=40) for name in PAIR_FIELDS})
PAIR_ROWS = st.tuples(
    st.lists(SOUND, min_size=1, max_size=3),
    st.lists(st.fixed_dictionaries(dict.fromkeys(PAIR_FIELDS, VALUES)), max_size=5),
).map(lambda both: [*both[0], *both[1]])
ANY_ROWS = st.lists(st.dictionaries(COLUMNS, VALUES, max_size=6), min_size=1, max_size=8)


def _names(config_class: type[Any]) -> list[str]:
    from preftune.config import ModelConfig, ScriptConfig
    from preftune.config.fields import fields_of
    from preftune.config.legacy import TABLE

    return sorted({*fields_of(config_class), *fields_of(ScriptConfig), *fields_of(ModelConfig), *TABLE, "betta", ""})


YAML_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
LIKELY = st.sampled_from(
    ["0.1", "1e-6", "-1", "0", "nan", "inf", "true", "no", "sigmoid", "ipo", "[1, 2]", "{a: b}", "x", ""]
)


# ---- what it is fed to ----------------------------------------------------------------------------------------------


def fuzz_rows(tally: Tally, examples: int, start: int, folder: Path) -> None:
    """JSON-lines files of generated rows, loaded and prepared for training."""
    from preftune.data import DataOptions, load, prepare

    tokenizer = tiny_tokenizer()
    file = folder / "rows.jsonl"

    def one(rows: list[dict[str, Any]], whole_pairs: bool) -> int:
        options = DataOptions(max_length=64, on_bad_rows="skip", max_dropped_share=None)
        train = load(str(file), on_bad_rows="skip")["train"]
        _, report = prepare(train, tokenizer, options, "train")
        accounted = report.rows_kept + sum(report.dropped.values()) + sum(report.bad_rows.values())
        return max(0, len(rows) - accounted) if whole_pairs else 0

    @seed(start)
    @_quietly(examples)
    @given(st.one_of(st.tuples(PAIR_ROWS, st.just(True)), st.tuples(ANY_ROWS, st.just(False))))
    def run(case: tuple[list[dict[str, Any]], bool]) -> None:
        rows, whole_pairs = case
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tally.attempt(rows, lambda: one(rows, whole_pairs), weight=len(rows))

    run()


def fuzz_files(tally: Tally, examples: int, start: int, folder: Path) -> None:
    """Files of every format with bytes cut, changed, put in or taken out."""
    from preftune.data import load

    originals = _valid_files(folder)

    @seed(start)
    @_quietly(examples)
    @given(st.sampled_from(sorted(originals)), st.randoms(use_true_random=False))
    def run(name: str, draw: random.Random) -> None:
        content = _damaged(originals[name], draw)
        # A name of its own each time: libraries keep what they have read by name and time.
        file = folder / f"{tally.inputs}-{name}"
        file.write_bytes(content)
        tally.attempt((name, content), lambda: len(load(str(file), on_bad_rows="skip")) * 0)
        file.unlink()

    run()


def _valid_files(folder: Path) -> dict[str, bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = "".join(json.dumps({**VALID_ROW, "prompt": f"{n} ?"}) + "\n" for n in range(5)).encode()
    listed = json.dumps([VALID_ROW] * 3, indent=1).encode()
    table = folder / "valid.parquet"
    pq.write_table(pa.Table.from_pylist([VALID_ROW] * 4), table)
    comma = b"prompt,chosen,rejected\n" + b'"a, b","yes","no"\n' * 4
    return {
        "rows.jsonl": lines,
        "rows.json": listed,
        "rows.csv": comma,
        "rows.jsonl.gz": gzip.compress(lines),
        "rows.parquet": table.read_bytes(),
    }


def _damaged(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(changed) + 1)
        kind = draw.randrange(5)
        if kind == 0:
            del changed[place:]
        elif kind == 1 and changed:
            changed[place % len(changed)] = draw.randrange(256)
        elif kind == 2:
            changed[place:place] = draw.randbytes(draw.randint(1, 20))
        elif kind == 3:
            del changed[place : place + draw.randint(1, 30)]
        else:
            changed[:] = draw.randbytes(draw.randint(0, 60))
        if not changed:
            break
    return bytes(changed)


def fuzz_configs(tally: Tally, examples: int, start: int, folder: Path) -> None:
    """YAML files with known and unknown names, old ones included, and values of every kind; and no YAML at all."""
    from preftune.training import DPOConfig, KTOConfig, SFTConfig

    file = folder / "config.yaml"
    classes = (DPOConfig, KTOConfig, SFTConfig)
    names = st.sampled_from(sorted({name for each in classes for name in _names(each)}))
    mapping = st.dictionaries(names, st.one_of(YAML_VALUES, LIKELY), max_size=6).map(_dumped)
    raw = st.one_of(TEXT, st.text(alphabet=":-[]{}#&*!|>'\"%@` \n\tab1", max_size=60))

    @seed(start)
    @_quietly(examples)
    @given(st.one_of(mapping, mapping, raw), st.sampled_from(classes))
    def run(text: str, config_class: type[Any]) -> None:
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        line = ["--config", str(file), "--output_dir", str(folder / "out"), "--use_cpu", "true"]
        tally.attempt((config_class.__name__, text), lambda: _resolved(line, config_class))

    run()


def _resolved(line: list[str], config_class: type[Any]) -> None:
    from preftune.config import resolve

    resolve(line, config_class)


def _dumped(settings_: dict[str, Any]) -> str:
    try:
        return yaml.safe_dump(settings_, allow_unicode=True)
    except yaml.YAMLError:
        return json.dumps(settings_)


def fuzz_command_lines(tally: Tally, examples: int, start: int, folder: Path) -> None:
    """Flags of the training verbs, read into settings; and whole command lines of the verbs that only look."""
    from preftune.cli.main import main
    from preftune.training import CPOConfig, DPOConfig, KTOConfig, ORPOConfig, SFTConfig

    classes = (DPOConfig, KTOConfig, SFTConfig, ORPOConfig, CPOConfig)
    flags = st.sampled_from(sorted({f"--{name}" for each in classes for name in _names(each) if name}))
    odd = st.one_of(flags.map(lambda name: name[:-1]), flags.map(lambda name: name + "=" + "0.5"), TEXT)
    words = st.one_of(flags, flags, LIKELY, odd)
    lines = st.lists(words, max_size=8)
    looking = st.sampled_from(["methods", "cite", "recipes", "nonsense", "--version", "", "report", "-x"])
    more = st.lists(
        st.one_of(st.sampled_from(["list", "show", "copy", "dpo", "--json", "--help", "..", "/"]), TEXT), max_size=4
    )
    training = st.tuples(st.just("training"), lines)
    other = st.tuples(st.just("looking"), st.tuples(looking, more).map(lambda pair: [pair[0], *pair[1]]))

    def look(argv: list[str]) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            main(argv)

    @seed(start)
    @_quietly(examples)
    @given(st.one_of(training, training, other), st.sampled_from(classes))
    def run(case: tuple[str, list[str]], config_class: type[Any]) -> None:
        kind, argv = case
        if kind == "looking":
            tally.attempt(argv, lambda: look(argv))
        else:
            line = [*argv, "--output_dir", str(folder / "out")]
            tally.attempt((config_class.__name__, argv), lambda: _resolved(line, config_class))

    run()


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer without merges, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )


def _quietly(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


KINDS: dict[str, Callable[[Tally, int, int, Path], None]] = {
    "rows": fuzz_rows,
    "files": fuzz_files,
    "configs": fuzz_configs,
    "command lines": fuzz_command_lines,
    "losses": fuzz_losses,
    "packing": fuzz_packing,
    LONG_ROWS: fuzz_long_rows,
}


def run_kind(kind: str, inputs: int, start: int) -> Tally:
    """Feed about ``inputs`` inputs of one kind; rounds of a few hundred keep the generators varied."""
    tally, rounds = Tally(), 0
    with tempfile.TemporaryDirectory() as name:
        while tally.inputs < inputs:
            # Lists of rows and of pairs hold about three.
            left = inputs - tally.inputs
            several = kind in ("rows", "losses", "packing")
            KINDS[kind](tally, max(1, min(200, left // 3 if several else left)), start + rounds, Path(name))
            rounds += 1
    return tally


def quiet_libraries(home: Path) -> None:
    """Keep libraries from printing, from the network and from the user's own caches."""
    for variable in ("HF_HOME", "XDG_CACHE_HOME", "PREFTUNE_CACHE", "HOME"):
        os.environ[variable] = str(home)
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    logging.disable(logging.CRITICAL)


def environment() -> dict[str, Any]:
    """What a kind was run with."""
    names = ["preftune", "hypothesis", "datasets", "transformers", "torch", *(["atheris"] if available() else [])]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in names},
    }


def main(argv: list[str] | None = None) -> int:
    """Run kinds and put their results beside those of the others.

    Returns:
        1 if anything happened that should not, else 0.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--inputs", type=int, default=12_000, help="rows, files, configurations and command lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", type=float, default=120.0, help="seconds of fuzzing by coverage")
    parser.add_argument("--only", nargs="*", choices=[*KINDS, GUIDED], default=[*KINDS, GUIDED])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    out, here, bad = options.out.resolve(), Path.cwd(), 0
    with tempfile.TemporaryDirectory() as home:
        quiet_libraries(Path(home))
        os.chdir(home)
        for kind in options.only:
            if kind == GUIDED and not available():
                print("guided: left out, atheris is not installed", flush=True)
                continue
            began = time.perf_counter()
            if kind == GUIDED:
                tally = run_guided(options.guided, options.seed)
            else:
                most = NUM_LONG_ROWS if kind == LONG_ROWS else round(options.inputs * SHARES[kind])
                tally = run_kind(kind, most, options.seed)
            bad += tally.num_bad
            seconds = round(time.perf_counter() - began, 1)
            write_kind(
                out,
                {"kind": kind, **vars(tally), "seed": options.seed, "seconds": seconds}
                | {"date": datetime.date.today().isoformat(), "environment": environment()},
            )
            print(kind, {k: v for k, v in vars(tally).items() if k != "examples"}, f"{seconds:.0f} s", flush=True)
        os.chdir(here)
    return 1 if bad else 0


def write_kind(out: Path, found: dict[str, Any]) -> None:
    """Put one kind's result into the file, in place of an earlier one; those of other code leave it."""
    made = stale.stamp(*PATTERNS)
    before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    same = before.get(stale.KEY, {}).get("digest") == made["digest"]
    kinds = {each["kind"]: each for each in before["kinds"]} if same else {}
    kinds[found["kind"]] = found
    order = {name: number for number, name in enumerate([*KINDS, GUIDED])}
    document = {stale.KEY: made, "kinds": sorted(kinds.values(), key=lambda each: order.get(each["kind"], len(order)))}
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_suffix(".tmp")
    beside.write_text(json.dumps(document, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
    os.replace(beside, out)


if __name__ == "__main__":
    sys.exit(main())
