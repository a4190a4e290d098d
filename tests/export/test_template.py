"""Chat templates taken apart, and put together again in Ollama's language."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from preftune.errors import ConfigError
from preftune.export.serve import go_template, modelfile
from preftune.export.template import Pieces, take_apart
from tests.export.conftest import TEMPLATE
from tests.models.tiny import train_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A begin token, no system role, another name for the assistant, trimmed texts.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (m['content'] | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# The system message stands inside the first question.
LLAMA2 = (
    "{% set ns = namespace(s='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.s = '<<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' %}{% elif m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + ns.s + m['content'] + ' [/INST]' }}{% set ns.s = '' %}{% else %}"
    "{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Only the last answer keeps its thoughts.
BY_PLACE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' }}{% if m['role'] == 'assistant' and loop.last %}{{ '<think>' }}"
    "{% endif %}{{ m['content'] + ';' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(["a b c"], 300)
    tokenizer.chat_template = template
    found: PreTrainedTokenizerFast = tokenizer
    return found


def rendered(template: str, messages: list[dict[str, str]]) -> str:
    """Go's text/template, as far as it is used: loops over messages with conditions on role and place."""
    match = re.fullmatch(r"\{\{ range \$i, \$m := \.Messages \}\}(.*)\{\{ end \}\}([^{]*)", template, re.DOTALL)
    assert match is not None
    body, tail = match.groups()
    text = ""
    for place, message in enumerate(messages):
        part = re.sub(
            r"\{\{ if eq \$i 0 \}\}\{\{ if ne \.Role \"system\" \}\}(.*?)\{\{ end \}\}\{\{ end \}\}",
            lambda m, place=place, role=message["role"]: m[1] if place == 0 and role != "system" else "",
            body,
            flags=re.DOTALL,
        )
        cases = re.findall(
            r"\{\{ (?:else )?if eq \.Role \"(\w+)\" \}\}(.*?)(?=\{\{ else if|\{\{ end \}\})", part, re.DOTALL
        )
        head = part[: part.index("{{ if eq .Role")]
        text += head + dict(cases)[message["role"]].replace("{{ .Content }}", message["content"])
    return text + tail


TALK = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two.\nThree."},
    {"role": "user", "content": "Four"},
]


@pytest.mark.parametrize(
    ("template", "adds_begin"),
    [
        (TEMPLATE, False),
        (CHATML, False),
        (CHATML, True),
        (GEMMA, False),
        (GEMMA, True),
        ("{{ bos_token }}" + CHATML, True),
        # Some models' mark of a turn is their begin-of-text token, which they do not add.
        (CHATML.replace("<|im_start|>", "<bos>"), False),
    ],
)
def test_the_pieces_make_what_the_template_makes(template: str, adds_begin: bool) -> None:
    tokenizer: Any = tokenizer_with(template)
    if adds_begin:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
        )
    pieces = take_apart(tokenizer)
    assert isinstance(pieces, Pieces)
    assert ("system" in pieces.around) == (template != GEMMA)
    in_go = go_template(pieces)
    assert in_go is not None
    talks = [TALK, TALK[:1]]
    if template != GEMMA:
        talks += [[{"role": "system", "content": "Be brief."}, *talk] for talk in talks]
    for talk in talks:
        expected = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        # What the runtime reads, its own begin-of-text token included, is what the model was trained on.
        begin = "<bos>" if adds_begin and expected.startswith("<bos>") else ""
        assert begin + pieces.render(talk) == expected
        assert begin + rendered(in_go, talk) == expected


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, "no chat template"),
        (LLAMA2, "into the first question"),
        (BY_PLACE, "changes earlier messages|by their place"),
        ("{{ raise_exception('never') }}", "refuses a plain conversation"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "changes the text"),
    ],
    ids=["none", "Llama 2", "by place", "raises", "upper case"],
)
def test_other_templates_are_not_guessed(template: str | None, why: str) -> None:
    tokenizer: Any = tokenizer_with(template)
    found = take_apart(tokenizer)
    assert isinstance(found, str)
    assert re.search(why, found)
    text, problem = modelfile(tokenizer, "./m.gguf")
    assert problem == found
    assert "\nTEMPLATE" not in text
    assert text.startswith("FROM ./m.gguf\n# No TEMPLATE: ")


def test_a_mark_of_turns_that_runtimes_would_add_is_not_guessed() -> None:
    tokenizer: Any = tokenizer_with(CHATML.replace("<|im_start|>", "<bos>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    assert isinstance(take_apart(tokenizer), str)


def test_marks_of_go_templates_are_left_out() -> None:
    marked = "{% set open = '{' + '{' %}" + CHATML.replace("'<|im_start|>", "open + '<|im_start|>")
    pieces = take_apart(tokenizer_with(marked))
    assert isinstance(pieces, Pieces)
    assert go_template(pieces) is None


def test_a_system_message_is_quoted() -> None:
    tokenizer: Any = tokenizer_with(CHATML)
    text, problem = modelfile(tokenizer, ".", system='Say "no".\nAlways.')
    assert problem is None
    assert '\nSYSTEM """Say "no".\nAlways."""\n' in text
    with pytest.raises(ConfigError, match="--system"):
        modelfile(tokenizer, ".", system='a """ b')
