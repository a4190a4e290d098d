"""Whole verbs in a child of the fork server, and the world that they need."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

from tests.faults.worlds import NUM_PAIRS, make_pairs

_TRAINING = (
    *("--model_name_or_path", "{world}/model", "--output_dir", "{out}", "--use_cpu", "true", "--bf16", "false"),
    *("--report_to", "none", "--max_steps", "3", "--save_steps", "1", "--save_total_limit", "2", "--guards", "off"),
    *("--per_device_train_batch_size", "2", "--disable_tqdm", "true", "--advice", "false"),
)
_PAIRS = ("--dataset_name", "{world}/pairs.jsonl")
#: Command lines that write, by name.
VERBS: dict[str, tuple[str, ...]] = {
    "dpo": ("dpo", *_PAIRS, *_TRAINING),
    "orpo": ("orpo", *_PAIRS, *_TRAINING),
    "cpo": ("cpo", *_PAIRS, *_TRAINING),
    "sft": ("sft", "--dataset_name", "{world}/sft.jsonl", *_TRAINING),
    "kto": ("kto", "--dataset_name", "{world}/kto.jsonl", *_TRAINING),
    "eval": ("eval", "--model", "{world}/model", "--ref_model", "{world}/model", *_PAIRS, "--out", "{out}"),
    "audit": ("data", "audit", *_PAIRS, "--out", "{out}"),
    "advise": ("advise", "--model_name_or_path", "{world}/model", *_PAIRS, "--out", "{out}"),
    "report": ("report", "{world}/run", "--out", "{out}/report.html"),
    "recipes": ("recipes", "copy", "zephyr-7b-dpo-full", "{out}/README.md"),
    "convert": ("data", "convert", *_PAIRS, "--out", "{out}/log.jsonl"),
    "select": (
        *("data", "select", *_PAIRS, "--model_name_or_path", "{world}/model", "--out", "{out}", "--use_cpu", "true"),
        *("--bf16", "false", "--max_steps", "2", "--per_device_train_batch_size", "2"),
    ),
    "run": (
        *("run", "{world}/pairs.jsonl", "--model", "{world}/model", "--out", "{out}", "--use_cpu", "true"),
        *("--bf16", "false", "--report_to", "none", "--max_steps", "2", "--num_prompts", "0", "--disable_tqdm", "true"),
        *("--per_device_train_batch_size", "2", "--use_peft", "false", "--gradient_accumulation_steps", "1"),
    ),
    # With pairs to score the export takes a minute.
    "export": ("export", "{world}/model", "--output_dir", "{out}", "--num_pairs", "0"),
    "sweep": (
        *("sweep", *_PAIRS, "--model_name_or_path", "{world}/model", "--out", "{out}", "--param", "beta=0.1,0.2"),
        *("--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--max_steps", "2", "--eval_share", "0.3"),
        *("--num_samples", "0"),
    ),
}
TRAINING = ("dpo", "orpo", "cpo", "sft", "kto")


def furnish(world: Path) -> None:
    """Write what the verbs read, beside the model."""
    pairs = make_pairs(NUM_PAIRS)
    _lines(world / "pairs.jsonl", pairs)
    _lines(world / "sft.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs])
    labelled = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs
        for side in ("chosen", "rejected")
    ]
    _lines(world / "kto.jsonl", labelled)
    (world / "run").mkdir(exist_ok=True)
    log = [{"step": 1, "loss": 0.5, "epoch": 0.5}, {"step": 2, "loss": 0.4, "epoch": 1.0}]
    state = {"global_step": 2, "max_steps": 2, "log_history": log}
    (world / "run" / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def verb(world: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Run a command line. Returns its exit code and what it said on standard error, and on standard output."""
    from preftune.cli.main import main

    argv = [text.format(world=world, out=out, **options.get("places", {})) for text in options["argv"]]
    said, told = io.StringIO(), io.StringIO()
    os.environ.update(options.get("environment", {}))
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(told):
        code = main(argv)
    return {"code": code, "said": said.getvalue()[-9000:], "told": told.getvalue()[-9000:]}


def place(kind: str, world: Path, target: Path) -> Path:
    """A copy of something that a setting may name: a model, data, an output folder, a file or a cache."""
    if kind == "model":
        shutil.copytree(world / "model", target)
    elif kind == "data":
        target.mkdir(parents=True)
        shutil.copy(world / "pairs.jsonl", target / "train.jsonl")
    elif kind == "file":
        shutil.copy(world / "pairs.jsonl", target)
    else:
        target.mkdir(parents=True)
        (target / "notes.txt").write_text("mine", encoding="utf-8")
    return target


JOBS = {"verb": verb}
