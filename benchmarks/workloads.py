"""What is measured: rows, tokenizer and model, the same for every contender.

Models are random, with a byte-level BPE tokenizer trained on the preference files, or the pretrained one of
``make real`` with its own. Rows are of three kinds: HH transcripts and ShareGPT conversations, from files beside the
checkout or from the Hub; and synthetic rows that follow length statistics, which also stand in for the former where
neither is to be had. :func:`source_of` says which.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import pretrained

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
        spread: Standard deviations of the logarithms of prompt and completion lengths, for synthetic rows.
        about: One line for the report.
    """

    batch_size: int
    max_length: int
    about: str
    overall: int = 0
    ratio: float = 0.0
    spread: tuple[float, float] = (0.6, 0.5)


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

# In place of the real files: medians and spreads of their tokens, as SmolLM2's tokenizer counts them.
STAND_INS = {
    "hh": Workload(8, 1024, "synthetic rows with the lengths of HH (harmless, test)", 112, 2.6, (0.98, 0.95)),
    "dpo_en": Workload(4, 1024, "synthetic rows with the lengths of dpo_en_demo", 390, 0.8, (1.4, 1.2)),
}
FILES = {"hh": "hh_harmless_1700.jsonl.gz", "dpo_en": "dpo_en_demo.json"}
#: Where the Hub has the same rows: repository, and the file or folder in it.
ON_THE_HUB = {
    "hh": ("Anthropic/hh-rlhf", {"data_dir": "harmless-base", "split": "test"}),
    "dpo_en": ("llamafactory/demo_data", {"data_files": "dpo_en_demo.json", "split": "train"}),
}

# Pretrained models, and their names in ``pretrained.py``.
PRETRAINED = {"smollm2-135m": "smollm2"}

# Llama shapes by name. The first two fit two CPU cores; the others are those of published models, for accelerators.
MODELS: dict[str, dict[str, Any]] = {
    "llama-1m": {"hidden": 64, "heads": 4, "kv_heads": 2, "layers": 4, "intermediate": 192},
    "llama-19m": {"hidden": 384, "heads": 6, "kv_heads": 2, "layers": 8, "intermediate": 1024},
    "llama-3.2-1b": {"hidden": 2048, "heads": 32, "kv_heads": 8, "layers": 16, "intermediate": 8192},
    "qwen2.5-0.5b": {"hidden": 896, "heads": 14, "kv_heads": 2, "layers": 24, "intermediate": 4864},
    "llama-3.1-8b": {"hidden": 4096, "heads": 32, "kv_heads": 8, "layers": 32, "intermediate": 14336},
    "smollm2-135m": {"hidden": 576, "heads": 9, "kv_heads": 3, "layers": 30, "intermediate": 1536},
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
    rng = random.Random(f"{name}-{seed}")
    rows = _real_rows(name)
    if rows is None:
        rows = _synthetic_rows(STAND_INS.get(name, WORKLOADS[name]), num_rows, tokenizer, scale, rng)
    else:
        rows = _spread(rows, num_rows)
    rng.shuffle(rows)
    return rows


def source_of(name: str) -> str:
    """Where a workload's rows come from, for the report."""
    if name not in FILES:
        return WORKLOADS[name].about
    if (DATA / FILES[name]).exists():
        return f"{WORKLOADS[name].about} (file {FILES[name]})"
    return f"{WORKLOADS[name].about} (Hub)" if _from_hub(name) is not None else STAND_INS[name].about


def _real_rows(name: str) -> list[Row] | None:
    """Rows of a published data set, or ``None`` where it has to be stood in for."""
    if name == "hh":
        found = _hh_rows()
    elif name == "dpo_en":
        found = _dpo_en_rows()
    else:
        return None
    return found or None


@cache
def _from_hub(name: str) -> list[Row] | None:
    import datasets

    repository, options = ON_THE_HUB[name]
    try:
        return list(datasets.load_dataset(repository, **options))
    except Exception:  # no network, no such repository: whatever it is, there are stand-ins
        return None


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
    for row in published_rows("hh"):
        cuts = {side: row[side].rfind(TURN) + len(TURN) for side in ("chosen", "rejected")}
        prompt = row["chosen"][: cuts["chosen"]]
        sides = {side: row[side][cut:] for side, cut in cuts.items()}
        # A few transcripts differ before the last turn or have an empty answer: no explicit-prompt row fits them.
        same_prompt = row["rejected"][: cuts["rejected"]] == prompt
        if same_prompt and all(text.strip() for text in sides.values()) and sides["chosen"] != sides["rejected"]:
            rows.append({"prompt": prompt, **sides})
    return rows


def published_rows(name: str) -> list[Row]:
    """Rows as published, of a key of :data:`FILES`: of the file beside the checkout, else of the Hub, else none."""
    file = DATA / FILES[name]
    if not file.exists():
        return _from_hub(name) or []
    if file.suffix == ".json":
        content: list[Row] = json.loads(file.read_text(encoding="utf-8"))
        return content
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _dpo_en_rows() -> list[Row]:
    roles = {"human": "user", "gpt": "assistant", "system": "system"}

    def message(turn: dict[str, str]) -> dict[str, str]:
        return {"role": roles[turn["from"]], "content": turn["value"]}

    return [
        {
            "prompt": [message(turn) for turn in row["conversations"]],
            "chosen": [message(row["chosen"])],
            "rejected": [message(row["rejected"])],
        }
        for row in published_rows("dpo_en")
        if row["chosen"]["value"] and row["rejected"]["value"]
    ]


def _synthetic_rows(workload: Workload, num_rows: int, tokenizer: Any, scale: float, rng: random.Random) -> list[Row]:
    words = [token[1:] for token in sorted(tokenizer.get_vocab()) if re.fullmatch("\u0120[a-z]{2,}", token)]
    completion = scale * workload.overall / (1 + workload.ratio)
    prompt = scale * workload.overall - completion
    of_prompt, of_completion = workload.spread

    def text(median: float, sigma: float) -> str:
        # One word is one token, so lengths are exact: log-normal around the median, as text lengths are.
        longest = 0.9 * workload.max_length * median / (prompt + completion)
        length = round(min(max(4, rng.lognormvariate(math.log(median), sigma)), max(4, longest * max(1.0, scale))))
        return "".join(f" {word}" for word in rng.choices(words, k=length))

    return [
        {
            "prompt": text(prompt, of_prompt),
            "chosen": text(completion, of_completion),
            "rejected": text(completion, of_completion),
        }
        for _ in range(num_rows)
    ]


def load_tokenizer(work: Path, model: str = "") -> Any:
    """Return a pretrained model's tokenizer, or the one of random models, trained on first use."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if model in PRETRAINED:
        return AutoTokenizer.from_pretrained(pretrained.folder_of(PRETRAINED[model]))
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
    texts = texts or _invented_texts()
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


def _invented_texts() -> list[str]:
    """Texts of invented words, the common ones often: enough for a tokenizer where no real text is to be had."""
    rng = random.Random(0)
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "ing")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(20_000)]
    weights = [1 / (n + 10) for n in range(len(words))]
    return [" ".join(rng.choices(words, weights, k=200)) for _ in range(2_000)]


def model_folder(work: Path, name: str, tokenizer: Any) -> Path:
    """Return a folder with a pretrained model, or with a randomly initialised one in fp32, made on first use."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if name in PRETRAINED:
        return pretrained.folder_of(PRETRAINED[name])
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
