"""What an evaluation says about its rows: the same as a training would."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from preftune.data import DataOptions
from preftune.data.tables import from_dataset
from preftune.errors import DataError
from preftune.evaluation.pairs import EvalPairs, prepare_pairs
from tests.data.conftest import make_tokenizer
from tests.data.test_rendering import FAMILIES


def read(rows: list[dict[str, Any]], **options: Any) -> EvalPairs:
    table = from_dataset("rows", Dataset.from_list(rows))
    return prepare_pairs(table, make_tokenizer(template=FAMILIES["smollm2"]), DataOptions(**options))


def test_ties_are_neither_evaluated_nor_lost() -> None:
    rows = [{"prompt": f"p{n}", "response_a": "a", "response_b": "b", "winner": vote}
            for n, vote in enumerate(("a", "b", "tie"))]  # fmt: skip
    for policy in ("error", "skip"):
        found = read(rows, on_bad_rows=policy, max_dropped_share=0.1)
        assert (len(found.pairs), found.num_rows) == (2, 3)


def test_findings_about_the_first_rows_are_notes() -> None:
    rows = [{"prompt": text, "chosen": f"c{n}", "rejected": "r"} for n, text in enumerate(("p", "", "q"))]
    assert any("the prompt of 1 of the first 3 rows is empty" in note for note in read(rows).notes)


def test_values_are_not_scored_as_answers() -> None:
    rows = [{"prompt": "p", "response": "an answer", "chosen": "1", "rejected": "0"}] * 2
    with pytest.raises(DataError, match="hold numbers or truth values"):
        read(rows)
