"""Evaluations whose data do not divide by the number of processes; started by a launcher, writes what it measured."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import preftune
from tests.parity import worlds


def rows_of(kind: str) -> list[dict[str, Any]]:
    """Eight rows for a trainer."""
    if kind == "KTO":
        return worlds.unpaired_rows(8)
    return [{"text": row["prompt"]} for row in worlds.pair_rows(8)] if kind == "SFT" else worlds.pair_rows(8)


def different(path: str) -> Any:
    """A reference that differs from the policy: equal ones leave rewards, and who wins, to rounding."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def measured(kind: str, path: str, out: Path) -> list[dict[str, Any]]:
    """What a trainer of a kind measures on one and on five held-out rows."""
    trainer_class, config_class = getattr(preftune, f"{kind}Trainer"), getattr(preftune, f"{kind}Config")
    settings = {**worlds.DEFAULTS, **({"undesirable_weight": 1.5} if kind == "KTO" else {})}
    # KTO exchanges completions within the examples of a step: they have to be the same ones.
    settings["per_device_train_batch_size"] = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    own = {} if kind == "SFT" else {"compute_metrics": lambda found: {"rewards": found.predictions.ravel().tolist()}}
    if kind in ("DPO", "KTO"):
        own["ref_model"] = different(path)
    trainer = trainer_class(
        model=path,
        args=config_class(output_dir=str(out), **settings),
        train_dataset=Dataset.from_list(rows_of(kind)),
        processing_class=AutoTokenizer.from_pretrained(path),
        **own,
    )
    found = [trainer.evaluate(Dataset.from_list(rows_of(kind)[:number])) for number in (1, 5)]
    timing = ("runtime", "per_second", "epoch")
    return [{name: value for name, value in each.items() if not name.endswith(timing)} for each in found]


if __name__ == "__main__":
    model, folder = sys.argv[1:]
    for each in ("SFT", "DPO", "KTO", "ORPO"):
        (Path(folder) / f"{each}-{os.environ['RANK']}.json").write_text(json.dumps(measured(each, model, Path(folder))))
