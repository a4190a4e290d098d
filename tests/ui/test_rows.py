"""The data view: rows of every kind of run with the mask that its loss sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preftune.config import ModelConfig
from preftune.data import DataOptions, load, prepare, prepare_sft
from preftune.data.unpaired import prepare_unpaired
from preftune.errors import PreftuneError
from preftune.models.loading import load_tokenizer
from preftune.ui.rows import Rows
from tests.report.folders import write_json, write_lines

ANSWERS = [
    {"prompt": "the nice dull was", "completion": " nice film plot slow", "label": True},
    {"prompt": "the very good was", "completion": " bad", "label": False},
]
TURNS = [{"role": "user", "content": "film"}, {"role": "assistant", "content": "good plot"}]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"


def run_folder(place: Path, world: Path, verb: str, data: Path, **settings: Any) -> Path:
    """What a run of a verb leaves that the data view reads."""
    values = {"model_name_or_path": str(world / "model"), "dataset_name": str(data), **settings}
    recorded = {"trainer": {name: {"value": value, "from": "flag"} for name, value in values.items()}}
    write_json(place / "provenance.json", {"command": ["preftune", verb], "settings": recorded})
    return place


def pieces(row: dict[str, Any]) -> list[list[tuple[str, str, int]]]:
    return [[(run["label"], run["text"], run["num_tokens"]) for run in side["runs"]] for side in row["sides"]]


def text_of(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def test_answers_of_kto(tmp_path: Path, world: Path) -> None:
    data = write_lines(tmp_path / "answers.jsonl", ANSWERS)
    folder = run_folder(tmp_path / "run", world, "kto", data, pairing="none", max_length=12)
    page = Rows().page(folder, 0)
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(world / "model")))
    prepared, _ = prepare_unpaired(load(str(data), pairing="none")["train"], tokenizer, DataOptions(max_length=12))
    assert page["total"] == len(prepared) == 2
    for row, one, label in zip(page["rows"], prepared, ("desirable", "undesirable"), strict=True):
        ((prompt, answer, *dropped),) = pieces(row)
        assert prompt == ("prompt", text_of(tokenizer, one["prompt_ids"]), len(one["prompt_ids"]))
        assert answer == (label, text_of(tokenizer, one["chosen_ids"]), len(one["chosen_ids"]))
        assert [piece[0] for piece in dropped] in ([], ["dropped"])
    assert {piece[0] for row in page["rows"] for piece in pieces(row)[0]} >= {"dropped", "prompt"}
    assert [one["label"] for one in page["legend"]] == ["prompt", "desirable", "undesirable", "dropped"]


def test_pairs_that_kto_takes_apart(tmp_path: Path, world: Path) -> None:
    folder = run_folder(tmp_path / "run", world, "kto", world / "pairs.jsonl", pairing="none")
    page = Rows().page(folder, 0)
    pairs = [json.loads(line) for line in (world / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert page["total"] == 2 * len(pairs)
    expected = [("desirable", pair["chosen"] + "<eos>") for pair in pairs]
    expected += [("undesirable", pair["rejected"] + "<eos>") for pair in pairs]
    assert [pieces(row)[0][1][:2] for row in page["rows"]] == expected[: len(page["rows"])]


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        ([{"prompt": "the film was", "completion": " good"}], {}),
        ([{"prompt": "the film was", "completion": " good"}], {"completion_only_loss": False}),
        ([{"body": "the film was very good"}], {"dataset_text_field": "body"}),
        ([{"messages": TURNS}], {"assistant_only_loss": True, "chat_template": TEMPLATE}),
        ([{"prompt": "the film was", "completion": " good good good"}], {"max_length": 10}),
    ],
    ids=["completion", "all", "text", "assistant", "truncated"],
)
def test_examples_of_sft(rows: list[dict[str, Any]], settings: dict[str, Any], tmp_path: Path, world: Path) -> None:
    data = write_lines(tmp_path / "examples.jsonl", rows)
    masks = {name: settings[name] for name in ("completion_only_loss", "assistant_only_loss") if name in settings}
    options: dict[str, Any] = {"max_length": settings.get("max_length")}
    folder = run_folder(tmp_path / "run", world, "sft", data, **{**settings, **options})
    page = Rows().page(folder, 0)
    model = ModelConfig(model_name_or_path=str(world / "model"), chat_template=settings.get("chat_template"))
    tokenizer = load_tokenizer(model)
    columns = {settings["dataset_text_field"]: "text"} if "dataset_text_field" in settings else None
    source = load(str(data), columns=columns)["train"]
    (one,) = prepare_sft(source, tokenizer, DataOptions(**options), **masks)[0]
    # Nothing predicts the first token.
    mask = [0, *one["loss_mask"][1:]]
    (runs,) = pieces(page["rows"][0])
    labels = [label for label, _, count in runs for _ in range(count) if label != "dropped"]
    assert labels == ["trained on" if bit else "prompt" for bit in mask]
    assert "".join(text for label, text, _ in runs if label != "dropped") == text_of(tokenizer, one["input_ids"])
    assert ("dropped" in [label for label, _, _ in runs]) == ("max_length" in settings)


def test_pairs_of_orpo_are_enclosed(tmp_path: Path, world: Path) -> None:
    folder = run_folder(tmp_path / "run", world, "orpo", world / "pairs.jsonl")
    page = Rows().page(folder, 3)
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(world / "model")))
    prepared, _ = prepare(load(str(world / "pairs.jsonl"))["train"], tokenizer, DataOptions(enclose=True))
    chosen, rejected = pieces(page["rows"][0])
    one = prepared[3]
    assert chosen[-1][1] == text_of(tokenizer, one["chosen_ids"])
    assert rejected[-1][1] == text_of(tokenizer, one["rejected_ids"])
    assert "prompt" in page["remark"]


def test_a_mixture_is_shown(tmp_path: Path, world: Path) -> None:
    several = {"datasets": [{"id": str(world / "pairs.jsonl"), "columns": ["prompt", "chosen", "rejected"]}]}
    folder = run_folder(tmp_path / "run", world, "dpo", world / "pairs.jsonl", dataset_mixture=several)
    content = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    del content["settings"]["trainer"]["dataset_name"]
    write_json(folder / "provenance.json", content)
    assert Rows().page(folder, 0)["total"] == 16


def test_a_trial_that_goes_on_tells_by_its_settings_file(tmp_path: Path, world: Path) -> None:
    lines = [f"model_name_or_path: {world / 'model'}", f"dataset_name: {world / 'pairs.jsonl'}", "max_length: 64"]
    (tmp_path / "config.yaml").write_text("\n".join(lines), encoding="utf-8")
    assert Rows().page(tmp_path, 0)["total"] == 16


@pytest.mark.parametrize("content", [{}, {"settings": {"trainer": {"model_name_or_path": {"value": "nowhere"}}}}])
def test_what_cannot_be_shown_is_said_in_one_line(content: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "provenance.json", content)
    with pytest.raises(PreftuneError) as caught:
        Rows().page(tmp_path, 0)
    assert "\n" not in str(caught.value)
