"""What is measured: rows, tokenizer and model, the same for every contender.

Everything is made on the spot from a seed and kept in a work folder: a byte-level BPE tokenizer trained on the
preference files, a randomly initialised model, and rows of three kinds: HH transcripts, ShareGPT conversations, and
synthetic rows that follow published length statistics.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
VOCAB_SIZE = 16_000
TURN = "\n\nAssistant:"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """Rows and the settings that go with them.

    Attributes:
        batch_size: Pairs in one optimizer step.
        max_length: Truncation length, as both libraries take it.
        overall: Median tokens of prompt and one completion, for synthetic rows.
        ratio: Median of prompt tokens per completion token, for synthetic rows.
        about: One line for the report.
    """

    batch_size: int
    max_length: int
    about: str
    overall: int = 0
    ratio: float = 0.0


def _synthetic(name: str, overall: int, ratio: float, batch_size: int = 4) -> Workload:
    about = f"synthetic rows with the lengths of {name}: median {overall} tokens, prompt {ratio} x completion"
    return Workload(batch_size, 2048, about, overall, ratio)


# Medians as published with prefix sharing for DPO (2410.20305, table of datasets): overall length, read here as prompt
# plus one completion, and the ratio of prefix to completion.
WORKLOADS = {
    "hh": Workload(8, 1024, "Anthropic HH (harmless, test), short multi-turn transcripts"),
    "dpo_en": Workload(4, 1024, "dpo_en_demo, conversations with long answers"),
    "capybara": _synthetic("Capybara", 1160, 1.59),
    "hh_rlhf": _synthetic("HH-RLHF", 186, 2.15, batch_size=8),
    "metamath": _synthetic("MetaMath-DPO", 872, 3.91),
    "tldr": _synthetic("TLDR", 416, 11.14),
    "helpsteer": _synthetic("Tulu-Helpsteer", 775, 6.34),
    "ultrafeedback": _synthetic("UltraFeedback", 409, 0.42),
}

# Llama shapes by name. The first two fit two CPU cores; the others are those of published models, for accelerators.
MODELS: dict[str, dict[str, Any]] = {
    "llama-1m": {"hidden": 64, "heads": 4, "kv_heads": 2, "layers": 4, "intermediate": 192},
    "llama-19m": {"hidden": 384, "heads": 6, "kv_heads": 2, "layers": 8, "intermediate": 1024},
    "llama-3.2-1b": {"hidden": 2048, "heads": 32, "kv_heads": 8, "layers": 16, "intermediate": 8192},
    "qwen2.5-0.5b": {"hidden": 896, "heads": 14, "kv_heads": 2, "layers": 24, "intermediate": 4864},
    "llama-3.1-8b": {"hidden": 4096, "heads": 32, "kv_heads": 8, "layers": 32, "intermediate": 14336},
}


def make_rows(name: str, num_rows: int, tokenizer: Any, scale: float = 1.0, seed: int = 0) -> list[Row]:
    """Return rows with an explicit prompt.

    Real rows are taken at even steps along the length-ordered file and then shuffled, so that a few rows have nearly
    the same distribution of lengths as all of them and cells of different size can be compared per pair.

    Args:
        name: Key of :data:`WORKLOADS`.
        num_rows: Number of pairs; more than the file has repeats rows with a numbered prompt, so that none is equal.
        tokenizer: Needed for synthetic rows, whose lengths are exact.
        scale: Multiplies the lengths of synthetic rows.
        seed: Of the order, and of synthetic rows.
    """
    workload = WORKLOADS[name]
    rng = random.Random(f"{name}-{seed}")
    if workload.overall:
        rows = _synthetic_rows(workload, num_rows, tokenizer, scale, rng)
    else:
        rows = _spread(_hh_rows() if name == "hh" else _dpo_en_rows(), num_rows)
    rng.shuffle(rows)
    return rows


def _spread(rows: list[Row], num_rows: int) -> list[Row]:
    # A repeated row would be scored once by a content-addressed store, and counted twice.
    rows = list({json.dumps(row): row for row in rows}.values())
    rows = sorted(rows, key=lambda row: sum(len(str(row[side])) for side in ("prompt", "chosen", "rejected")))
    rounds = math.ceil(num_rows / len(rows))
    if rounds > 1:
        return [_numbered(row, i) for i in range(rounds) for row in rows][:num_rows]
    step = len(rows) / num_rows
    return [rows[int((i + 0.5) * step)] for i in range(num_rows)]


def _numbered(row: Row, number: int) -> Row:
    if isinstance(row["prompt"], str):
        return row | {"prompt": f"{number} {row['prompt']}"}
    first, *rest = row["prompt"]
    return row | {"prompt": [{**first, "content": f"{number} {first['content']}"}, *rest]}


def _hh_rows() -> list[Row]:
    rows: list[Row] = []
    with gzip.open(_data_file("hh_harmless_1700.jsonl.gz"), "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            cuts = {side: row[side].rfind(TURN) + len(TURN) for side in ("chosen", "rejected")}
            prompt = row["chosen"][: cuts["chosen"]]
            sides = {side: row[side][cut:] for side, cut in cuts.items()}
            # A few transcripts differ before the last turn or have an empty answer: no explicit-prompt row fits them.
            same_prompt = row["rejected"][: cuts["rejected"]] == prompt
            if same_prompt and all(text.strip() for text in sides.values()) and sides["chosen"] != sides["rejected"]:
                rows.append({"prompt": prompt, **sides})
    return rows


def _dpo_en_rows() -> list[Row]:
    roles = {"human": "user", "gpt": "assistant", "system": "system"}

    def message(turn: dict[str, str]) -> dict[str, str]:
        return {"role": roles[turn["from"]], "content": turn["value"]}

    rows = json.loads(_data_file("dpo_en_demo.json").read_text(encoding="utf-8"))
    return [
        {
            "prompt": [message(turn) for turn in row["conversations"]],
            "chosen": [message(row["chosen"])],
            "rejected": [message(row["rejected"])],
        }
        for row in rows
        if row["chosen"]["value"] and row["rejected"]["value"]
    ]


def _data_file(name: str) -> Path:
    file = DATA / name
    if not file.exists():
        raise SystemExit(f"{file} is absent: only synthetic workloads can be measured, see --only")
    return file


def _synthetic_rows(workload: Workload, num_rows: int, tokenizer: Any, scale: float, rng: random.Random) -> list[Row]:
    words = [token[1:] for token in sorted(tokenizer.get_vocab()) if re.fullmatch("\u0120[a-z]{2,}", token)]
    completion = scale * workload.overall / (1 + workload.ratio)
    prompt = scale * workload.overall - completion

    def text(median: float, sigma: float) -> str:
        # One word is one token, so lengths are exact: log-normal around the median, as text lengths are.
        longest = 0.9 * workload.max_length * median / (prompt + completion)
        length = round(min(max(4, rng.lognormvariate(math.log(median), sigma)), max(4, longest * max(1.0, scale))))
        return "".join(f" {word}" for word in rng.choices(words, k=length))

    return [
        {"prompt": text(prompt, 0.6), "chosen": text(completion, 0.5), "rejected": text(completion, 0.5)}
        for _ in range(num_rows)
    ]


def load_tokenizer(work: Path) -> Any:
    """Return the tokenizer, trained on the preference files on first use."""
    from transformers import PreTrainedTokenizerFast

    folder = work / f"tokenizer-{VOCAB_SIZE}"
    if not (folder / "tokenizer.json").exists():
        _train_tokenizer().save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _train_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [row[side] for row in _hh_rows() for side in ("prompt", "chosen", "rejected")]
    texts += [
        turn["content"] for row in _dpo_en_rows() for side in ("prompt", "chosen", "rejected") for turn in row[side]
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )


def model_folder(work: Path, name: str, tokenizer: Any) -> Path:
    """Return a folder with a randomly initialised model in fp32, made on first use."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = work / f"model-{name}"
    if not (folder / "model.safetensors").exists() and not list(folder.glob("*.index.json")):
        shape = MODELS[name]
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape["hidden"],
            intermediate_size=shape["intermediate"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"],
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder
