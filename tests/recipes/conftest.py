"""A model that trains in a second, and rows shaped like those of the recipes' datasets."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preftune.cli.main import main

Cli = Callable[..., tuple[int, str, str]]

WORDS = ("film", "plot", "was", "very", "nice", "dull", "good", "bad", "think", "but", "great")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def config_of(verb: str) -> type[Any]:
    """Settings class of a verb."""
    from preftune.runs.settings import settings_classes

    return settings_classes(verb)[0]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``model`` (two-layer Llama that knows conversations), ``pairs.jsonl`` and ``answers.jsonl``."""
    folder = tmp_path_factory.mktemp("recipes")
    draw = random.Random(0)

    def sentence() -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 9)))

    pairs: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    for number in range(12):
        user = {"role": "user", "content": sentence()}
        good, bad = ({"role": "assistant", "content": sentence()} for _ in range(2))
        # The prompt once more as text, and ids and scores, as UltraFeedback has them.
        pair = {"prompt": user["content"], "prompt_id": str(number), "score_chosen": 8.0, "score_rejected": 5.5}
        pairs.append({**pair, "chosen": [user, good], "rejected": [user, bad]})
        answers += [
            {"prompt": [user], "completion": [answer], "label": label} for answer, label in ((good, True), (bad, False))
        ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    chats = [{"messages": row["chosen"]} for row in pairs]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)), encoding="utf-8")
    _save_model(folder / "model", [row["chosen"][1]["content"] for row in pairs])
    return folder


def _save_model(folder: Path, texts: list[str]) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(argv))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
