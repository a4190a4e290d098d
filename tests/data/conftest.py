"""Small tokenizers and chat templates, made on the spot."""

from __future__ import annotations

from typing import Any

import pytest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes BOS itself, and marks what the assistant wrote.
MARKED = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Opens a thinking tag in the generation prompt that finished turns do not have.
THINKING = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# The generation prompt ends inside what becomes one token with the first word of the answer.
MERGING = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% if shout is defined %}{{ shout }}{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

TEMPLATES = {"chatml": CHATML, "marked": MARKED, "thinking": THINKING, "merging": MERGING}

_TEXT = "the cat sat on a mat and saw that blue sky was very bright while dogs bark at night no yes"
_WORDS = _TEXT.split()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PLAIN = [
    {"prompt": "the cat", "chosen": " sat on a mat", "rejected": " was bright"},
    {"prompt": "the cat sat on a mat and saw that", "chosen": " dogs bark</s>", "rejected": " no"},
    {"prompt": "Human: the sky\n\nAssistant:", "chosen": " blue sky é 日本", "rejected": " night " * 20},
    {"prompt": "the ca", "chosen": "t sat", "rejected": "b"},  # merges across the boundary
    {"prompt": "dogs ", "chosen": "bark", "rejected": "sat"},  # the space belongs to the next token
    {"prompt": "", "chosen": "yes", "rejected": "no no"},
    {"prompt": "bark " * 30, "chosen": "x", "rejected": "y y y y"},
]
CHAT = [
    {"prompt": [user("the cat")], "chosen": [assistant("sat on a mat")], "rejected": [assistant("no")]},
    {
        "prompt": [{"role": "system", "content": "dogs"}, user("a"), assistant("b"), user("bark at night")],
        "chosen": [assistant("yes"), user("very"), assistant("bright " * 12)],
        "rejected": [assistant("no\n")],
    },
    {"prompt": [user("blue " * 25)], "chosen": [assistant("sky")], "rejected": [assistant("night")]},
    {"prompt": [user("on"), assistant("and then")], "chosen": [assistant(" x")], "rejected": [assistant(" y")]},
]


def make_tokenizer(*, adds_bos: bool = False, template: str | None = CHATML) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    text = [" ".join(_WORDS[i:] + _WORDS[:i]) for i in range(len(_WORDS))] + [
        "user assistant system: ",
        "Human: Assistant:",
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(text * 3, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=10_000
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Adds nothing of its own; ChatML template."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer() -> Any:
    """Begins every plain text with BOS."""
    return make_tokenizer(adds_bos=True)
