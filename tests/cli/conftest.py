"""A model and data small enough to train in a second, made on the spot."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from preftune.cli.main import main

WORDS = (
    "the",
    "a",
    "film",
    "plot",
    "was",
    "very",
    "nice",
    "dull",
    "good",
    "bad",
    "I",
    "think",
    "it",
    "or",
    "but",
    "great",
)


#: Settings of a run of three steps over :func:`world`.
SMALL_RUN = {
    "model_name_or_path": "model",
    "dataset_name": "pairs.jsonl",
    "max_length": 64,
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "logging_steps": 1,
    "bf16": False,
}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``model`` (two-layer Llama, byte-level BPE) and ``pairs.jsonl`` (16 pairs)."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("world")
    draw = random.Random(0)

    def sentence() -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 9)))

    rows = [{"prompt": sentence() + " :", "chosen": " " + sentence(), "rejected": " " + sentence()} for _ in range(16)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    bpe.train_from_iterator([row["chosen"] for row in rows], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line in this process, in a folder of its own beside links to model and data."""
    (tmp_path / "model").symlink_to(world / "model")
    (tmp_path / "pairs.jsonl").symlink_to(world / "pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(argv))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
