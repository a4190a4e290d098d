"""The verbs that train: what each learns from, in one place that costs nothing to import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

#: What a row is for: two answers, one labelled answer, or one example to imitate.
Kind = Literal["pairs", "labelled", "sft"]


@dataclass(frozen=True)
class TrainingVerb:
    """A verb that trains.

    Attributes:
        summary: What it does, one line.
        rows: What it learns from.
        reference: Whether it compares with a reference model.
        example: A file of such rows, for help texts.
    """

    summary: str
    rows: Kind = "pairs"
    reference: bool = False
    example: str = "pairs.jsonl"


TRAINING: Mapping[str, TrainingVerb] = MappingProxyType(
    {
        "sft": TrainingVerb(
            "supervised fine-tuning on completions or conversations", "sft", example="conversations.jsonl"
        ),
        "dpo": TrainingVerb("preference optimisation on pairs (DPO and its family)", reference=True),
        "orpo": TrainingVerb("odds-ratio preference optimisation on pairs, without a reference"),
        "cpo": TrainingVerb("contrastive preference optimisation and SimPO on pairs, without a reference"),
        "kto": TrainingVerb("learning from single answers labelled good or bad", "labelled", True, "answers.jsonl"),
    }
)

#: Verbs that learn preferences, from pairs or from labelled answers.
PREFERENCE_VERBS = tuple(verb for verb, about in TRAINING.items() if about.rows != "sft")
#: Verbs that learn from pairs.
PAIR_VERBS = tuple(verb for verb, about in TRAINING.items() if about.rows == "pairs")
#: Kind of rows that each verb learns from, those of preferences first.
ROWS: Mapping[str, Kind] = MappingProxyType(
    {verb: about.rows for verb, about in sorted(TRAINING.items(), key=lambda each: each[1].rows == "sft")}
)
