"""Parsers under inputs that grow by coverage: atheris keeps what reaches new code, and changes it further.

``python -m benchmarks.fuzz --only guided`` gives each target its share of ``--guided`` seconds, in a process of its
own, since libFuzzer does not give a process back. Without atheris the kind is left out with a word.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.fuzz_tally import Tally

Target = Callable[[bytes, Path], int | None]


def available() -> bool:
    """Whether atheris is installed."""
    return importlib.util.find_spec("atheris") is not None


# ---- targets --------------------------------------------------------------------------------------------------------


def _classes() -> list[type[Any]]:
    from preftune.training import CPOConfig, DPOConfig, KTOConfig, ORPOConfig, SFTConfig

    return [DPOConfig, KTOConfig, SFTConfig, ORPOConfig, CPOConfig]


def _pick(data: bytes, number: int) -> tuple[int, bytes]:
    return (data[0] % number, data[1:]) if data else (0, b"")


def yaml_settings(data: bytes, folder: Path) -> None:
    """A YAML file of settings."""
    from preftune.config import resolve

    which, text = _pick(data, 5)
    (folder / "c.yaml").write_bytes(text)
    resolve(["--config", str(folder / "c.yaml"), "--output_dir", str(folder), "--use_cpu", "true"], _classes()[which])


def flags(data: bytes, folder: Path) -> None:
    """Flags of the training verbs, separated by NUL."""
    from preftune.config import resolve

    which, text = _pick(data, 5)
    words = text.decode("utf-8", "surrogateescape").split("\0")
    resolve([*words, "--output_dir", str(folder)], _classes()[which])


def files(data: bytes, folder: Path) -> None:
    """Files of rows, read as far as the rows themselves."""
    from preftune.data.locations import read_file

    which, content = _pick(data, 3)
    path = folder / ("rows.jsonl", "rows.json", "rows.csv")[which]
    path.write_bytes(content)
    table = read_file(path)
    table.columns()
    table.example()
    for _ in table:
        pass


def rows(data: bytes, folder: Path) -> int:
    """One row of any format, recognised, converted and tokenised; a sound one stands beside it."""
    from benchmarks.fuzz import VALID_ROW, tiny_tokenizer

    from preftune.data import DataOptions, load, prepare

    text = data.decode("utf-8", "replace").replace("\n", " ").replace("\r", " ")
    path = folder / "rows.jsonl"
    path.write_text(f"{text}\n{text}\n", encoding="utf-8")
    loaded = load(str(path), on_bad_rows="skip")["train"]
    options = DataOptions(max_length=64, on_bad_rows="skip", max_dropped_share=None)
    _, report = prepare(loaded, tiny_tokenizer(), options, "train")
    accounted = report.rows_kept + sum(report.dropped.values()) + sum(report.bad_rows.values())
    # Rows of many answers become several pairs, and nothing may become none.
    return max(0, 2 - accounted) if set(VALID_ROW) <= set(_object(text)) else 0


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def recipes(data: bytes, folder: Path) -> None:
    """Names of recipes, and a recipe with a piece changed."""
    from preftune.config import resolve
    from preftune.recipes.catalogue import RECIPES, find_recipe

    which, text = _pick(data, 2)
    if which == 0:
        find_recipe(text.decode("utf-8", "replace"))
        return
    recipe = RECIPES[sorted(RECIPES)[len(text) % len(RECIPES)]]
    plain = recipe.text().encode()
    at = int.from_bytes(text[:2], "big") % (len(plain) + 1)
    (folder / "r.yaml").write_bytes(plain[:at] + text[2:] + plain[at + len(text[2:]) :])
    own = {"kto": "KTOConfig", "sft": "SFTConfig", "orpo": "ORPOConfig", "cpo": "CPOConfig"}.get(
        recipe.verb, "DPOConfig"
    )
    chosen = next(each for each in _classes() if each.__name__ == own)
    resolve(["--config", str(folder / "r.yaml"), "--output_dir", str(folder), "--use_cpu", "true"], chosen)


def manifest(data: bytes, folder: Path) -> None:
    """A checkpoint's manifest, as bytes and, with a digest that fits, as content."""
    from preftune.errors import DataError
    from preftune.training.checkpoints.manifest import FILE_NAME, FORMAT, InvalidCheckpoint, digest, verify

    which, text = _pick(data, 2)
    content = text
    if which:
        body = {"format": FORMAT, **_object(text.decode("utf-8", "replace"))}
        body.pop("sha256", None)
        content = json.dumps({**body, "sha256": digest(body)}).encode()
    (folder / FILE_NAME).write_bytes(content)
    try:
        verify(folder)
    except InvalidCheckpoint as error:
        raise DataError(str(error)) from error


def trainer_state(data: bytes, folder: Path) -> None:
    """Files of a run folder, read and made into a page."""
    from preftune.report.page import gather, page_payload
    from preftune.report.read import read_all

    names = ("trainer_state.json", "log.jsonl", "alarms.jsonl", "eval.json", "sweep.json", "config.yaml")
    which, text = _pick(data, len(names))
    for name in names:
        (folder / name).unlink(missing_ok=True)
    state = {"log_history": [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}], "global_step": 2, "max_steps": 2}
    (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    (folder / names[which]).write_bytes(text)
    page_payload(gather(*read_all([folder])))


def sweep_params(data: bytes, folder: Path) -> None:
    """What ``--param`` takes, one per line, and the cells that follow."""
    from preftune.config.fields import fields_of
    from preftune.errors import ConfigError
    from preftune.sweep.space import as_flag, draw, grid, parse_params

    texts = data.decode("utf-8", "replace").split("\n")
    known = fields_of(_classes()[0])
    dimensions = parse_params(texts[:4], known)
    count = 1
    for each in dimensions:
        count *= max(1, len(each.values))
    if count > 1000:
        raise ConfigError("too many cells for a fuzzer", where="--param")
    cells = draw(dimensions, 2, 0) if any(each.is_range for each in dimensions) else grid(dimensions)
    for cell in cells[:20]:
        for value in cell.values():
            as_flag(value)


TARGETS: dict[str, tuple[Target, list[bytes]]] = {
    "YAML settings": (
        yaml_settings,
        [b"\0beta: 0.1\nloss_type: [sigmoid, sft]\nloss_weights: [1, 0.2]\n", b"\1max_steps: 3"],
    ),
    "flags": (flags, [b"\0--beta\x000.1\0--loss_type\0ipo", b"\2--packing=true\0--learning_rate\x001e-5"]),
    "files": (files, [b'\0{"prompt": "a"}\n{"prompt": "b"}\n', b'\1[{"a": 1}, {"a": 2}]', b'\2a,b\n"x, y",2\n']),
    "rows": (
        rows,
        [
            b'{"prompt": "a", "chosen": "b", "rejected": "c"}',
            b'{"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "rejected": []}',
            b'{"prompt": "a", "completion": "b", "label": true}',
            b'{"instruction": "a", "input": "b", "output": "c"}',
            b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}',
        ],
    ),
    "recipes": (recipes, [b"\0kto", b"\1\0\0", b"\1\0\x20 beta: 1"]),
    "checkpoint manifests": (
        manifest,
        [b'\1{"step": 1, "resumable": true, "identity": {}, "files": {"a": {"bytes": 0, "sha256": "x"}}}'],
    ),
    "run folders": (
        trainer_state,
        [
            b'\0{"log_history": [{"step": 1, "loss": 1.5, "eval_loss": null}], "global_step": 1}',
            b'\1{"step": 1, "time": 3.5, "loss": 2}\n',
            b'\2{"guard": "overfitting", "step": 3, "action": "warn", "message": "m", "evidence": {"a": 1}}\n',
            b'\3{"metrics": {"accuracy": {"mean": 0.5, "low": 0.1, "high": 0.9, "n": 4}}, "by_length": []}',
            b'\4{"trials": [{"number": 0, "params": {"beta": 0.1}, "state": "complete", "metrics": {}}], "best": null}',
        ],
    ),
    "sweep params": (sweep_params, [b"beta=0.1,0.2", b"learning_rate=1e-6..1e-4:log:5\nloss_type=ipo,[sigmoid,sft]"]),
}


# ---- running --------------------------------------------------------------------------------------------------------


def run_guided(seconds: float, start: int) -> Tally:
    """Run every target for its share of ``seconds``.

    Args:
        seconds: In all.
        start: Seed of libFuzzer.
    """
    total, notes = Tally(), []
    for name in TARGETS:
        with tempfile.TemporaryDirectory() as scratch:
            result = Path(scratch) / "tally.json"
            command = [sys.executable, "-m", "benchmarks.fuzz_guided", name, str(result)]
            command += ["--seconds", str(seconds / len(TARGETS)), "--seed", str(start)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
            if not result.exists():
                total.tracebacks += 1
                total.examples.append(
                    {"input": name, "outcome": f"the fuzzer ended with {done.returncode}: {done.stderr[-800:]}"}
                )
                continue
            found = json.loads(result.read_text(encoding="utf-8"))
        notes.append(f"{name} {found['inputs']:,}")
        add(total, found)
    total.note = "by coverage: " + ", ".join(notes)
    return total


def add(total: Tally, found: Mapping[str, Any]) -> None:
    """Add one target's tally to the total."""
    for each in fields(Tally):
        if each.name not in ("note",):
            setattr(total, each.name, getattr(total, each.name) + found[each.name])


def _dictionary(folder: Path) -> Path:
    """Names of settings and columns, which no mutation finds by itself."""
    from preftune.config.fields import fields_of

    names = {name for each in _classes() for name in fields_of(each)}
    names |= {"prompt", "chosen", "rejected", "messages", "role", "content", "log_history", "step", "files", "trials"}
    names |= {"metrics", "evidence", "null", "true", "NaN", "Infinity", "1e400", "-0", "..", "sigmoid", "ipo"}
    path = folder / "names.dict"
    path.write_text("".join(f'"{name}"\n' for name in sorted(names)), encoding="utf-8")
    return path


def main() -> None:
    """Run one target until its time is over; called by :func:`run_guided`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("result", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # It has no stubs, and is not everywhere.
    atheris: Any = importlib.import_module("atheris")

    scratch = tempfile.mkdtemp(prefix="guided-", dir=options.result.parent)
    from benchmarks.fuzz import quiet_libraries

    quiet_libraries(Path(scratch))
    with atheris.instrument_imports(include=["preftune"], enable_loader_override=False):
        import preftune.data
        import preftune.recipes.catalogue
        import preftune.report.page
        import preftune.sweep.space
        import preftune.training
        import preftune.training.checkpoints.manifest  # noqa: F401
    target, seeds = TARGETS[options.target]
    corpus, work = Path(scratch) / "corpus", Path(scratch) / "work"
    corpus.mkdir()
    work.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    tally, deadline = Tally(), time.monotonic() + options.seconds

    def one(data: bytes) -> None:
        tally.attempt(data, lambda: target(data, work))
        if time.monotonic() > deadline:
            options.result.write_text(json.dumps(asdict(tally)), encoding="utf-8")
            # The way back from libFuzzer leads through its own summary only.
            os._exit(0)

    limits = ["-max_len=1024", "-rss_limit_mb=8192", "-timeout=60", "-verbosity=0"]
    atheris.Setup(
        [sys.argv[0], *limits, f"-seed={options.seed + 1}", f"-dict={_dictionary(Path(scratch))}", str(corpus)], one
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
