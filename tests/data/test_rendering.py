"""What chat templates make of conversations: every turn's text is found, in whatever form it came."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset

from preftune.data import DataOptions, load, prepare, prepare_sft
from preftune.data.tokenise import Encoder
from preftune.errors import DataError
from tests.data.conftest import CHATML, assistant, make_tokenizer, user

SHIPPED = Path(str(trl.__file__)).parent / "chat_templates"
# The templates of six families of models; SmolLM2's is ChatML with a system turn of its own.
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou are a helpful AI"
    " assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{% if loop.last and system %}[INST] {{ system + '\n\n' + m['content'] }} [/INST]{% else %}"
    "[INST] {{ m['content'] }} [/INST]{% endif %}{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
FAMILIES = {
    **{name: (SHIPPED / f"{name}.jinja").read_text() for name in ("llama3", "qwen3", "gemma", "phi3")},
    "mistral": MISTRAL,
    "smollm2": SMOLLM2,
}
#: Templates that mishandle parts, each in another way: an error, a printed list, JSON, nothing.
BLIND = {
    "plus": CHATML.replace("{{ m['content'] }}", "{{ '' + m['content'] }}"),
    "tilde": CHATML.replace("{{ m['content'] }}", "{{ m['content'] ~ '' }}"),
    "trim": CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim }}"),
    "json": CHATML.replace(
        "{{ m['content'] }}", "{{ m['content'] if m['content'] is string else m['content'] | tojson }}"
    ),
    "nothing": CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m['content'] is string else '' }}"),
    "first part alone": CHATML.replace(
        "{{ m['content'] }}", "{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}"
    ),
}
#: Templates that know nothing but parts.
PARTS_ONLY = CHATML.replace("{{ m['content'] }}", "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}")


def parts(turn: dict[str, Any], pieces: int = 1) -> dict[str, Any]:
    text = turn["content"]
    cut = len(text) // 2 if pieces == 2 else len(text)
    return {**turn, "content": [{"type": "text", "text": one} for one in (text[:cut], text[cut:]) if one]}


def pair(**changes: Any) -> dict[str, Any]:
    plain = {"prompt": [user("the cat sat on")], "chosen": [assistant("a mat at night")], "rejected": [assistant("no")]}
    return {**plain, **changes}


def shown(row: dict[str, Any], template: str, **options: Any) -> tuple[str, str, str]:
    tokenizer = make_tokenizer(template=template)
    dataset, _ = prepare(
        Dataset.from_list([row], on_mixed_types="use_json"), tokenizer, DataOptions(max_length=None, **options)
    )
    ids = dataset[0]
    return tuple(str(tokenizer.decode(ids[name])) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))  # type: ignore[return-value]


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("template", BLIND)
def test_parts_are_joined_where_the_template_does_not_know_them(template: str, pieces: int) -> None:
    row = {field: [parts(turn, pieces) for turn in turns] for field, turns in pair().items()}
    assert shown(row, BLIND[template]) == shown(pair(), BLIND[template])


@pytest.mark.parametrize("template", FAMILIES)
@pytest.mark.parametrize("form", ["one part", "two parts", "strings", "input_text", "no type"])
def test_parts_with_well_known_templates(template: str, form: str) -> None:
    def put(turn: dict[str, Any]) -> dict[str, Any]:
        text = turn["content"]
        return turn | {
            "content": {
                "one part": [{"type": "text", "text": text}],
                "two parts": parts(turn, 2)["content"],
                "strings": [text],
                "input_text": [{"type": "input_text", "text": text}],
                "no type": [{"text": text}],
            }[form]
        }

    row = {field: [put(turn) for turn in turns] for field, turns in pair().items()}
    assert shown(row, FAMILIES[template]) == shown(pair(), FAMILIES[template])


def test_text_becomes_parts_for_a_template_of_parts() -> None:
    assert shown(pair(), PARTS_ONLY) == shown(pair(), CHATML)
    rows = Dataset.from_list([{"messages": pair()["prompt"] + pair()["chosen"]}])
    ids = [
        prepare_sft(rows, make_tokenizer(template=template), DataOptions(), assistant_only_loss=True)[0].to_list()
        for template in (PARTS_ONLY, CHATML)
    ]
    assert ids[0] == ids[1]


DROPS = {
    "system": CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] != 'system' else '' }}"),
    "tool": CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}"),
    "earlier": CHATML.replace("{% for m in messages %}", "{% for m in messages[-2:] %}"),
    "cut": CHATML.replace("{{ m['content'] }}", "{{ m['content'][:18] }}"),
}
LOSES = {
    "system": {"prompt": [{"role": "system", "content": "be"}, user("the cat")]},
    "tool": {"prompt": [user("the cat"), assistant("dogs"), {"role": "tool", "content": "7"}]},
    "earlier": {"prompt": [user("a"), assistant("b"), user("the cat")]},
    "cut": {"prompt": [user("the cat sat on a mat and saw that")]},
}


@pytest.mark.parametrize("kind", DROPS)
def test_a_turn_that_a_template_drops_is_no_silent_loss(kind: str) -> None:
    rows = Dataset.from_list([pair(), pair(**LOSES[kind])])
    tokenizer = make_tokenizer(template=DROPS[kind])
    if kind == "earlier":
        # Two turns are all that it keeps, so that the plain pair is whole.
        assert len(pair()["prompt"]) == 1
    with pytest.raises(DataError, match=r"row 1 .*the chat template leaves out what the"):
        prepare(rows, tokenizer, DataOptions())
    kept, report = prepare(rows, tokenizer, DataOptions(on_bad_rows="skip"))
    assert (len(kept), report.bad_rows) == (1, {"text_lost": 1})
    # TRL trains on what is left: so does its drop-in class, and says so.
    kept, report = prepare(rows, tokenizer, DataOptions(on_bad_rows="warn"))
    assert (len(kept), report.bad_rows) == (2, {"text_lost": 1})
    assert any("text_lost" in line for line in report.findings)


def test_thoughts_that_a_template_keeps_for_the_last_turn_alone_are_no_loss() -> None:
    turns = [user("the cat"), assistant("<think>\nhmm dogs\n</think>\n\nsat"), user("and")]
    prompt, *_ = shown(pair(prompt=turns), FAMILIES["qwen3"])
    assert "sat" in prompt
    assert "hmm" not in prompt


def test_missing_content_is_not_printed_as_none() -> None:
    calls = [{"type": "function", "function": {"name": "look_up", "arguments": {"city": "Paris"}}}]
    with_calls = CHATML.replace(
        "{{ m['content'] }}",
        "{{ m['content'] }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
        "{% endfor %}",
    )
    row = pair(chosen=[{"role": "assistant", "content": None, "tool_calls": calls}])
    assert "None" not in shown(row, with_calls)[1]
    assert 'look_up{"city": "Paris"}' in shown(row, with_calls)[1]


# ---- tools ----------------------------------------------------------------------------------------------------------

TOOLS = CHATML.replace(
    "{{ m['content'] }}",
    "{{ m['content'] or '' }}{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} "
    "{{ c.function.arguments | tojson }}{% endfor %}",
)
TEXT_TOOLS = TOOLS.replace("{{ c.function.arguments | tojson }}", "{{ '```' + c.function.arguments + '```' }}")
PRINTED_TOOLS = TOOLS.replace("{{ c.function.arguments | tojson }}", "{{ c.function.arguments }}")


def called(arguments: Any, **more: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": arguments}}],
        **more,
    }


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TOOLS, 'CALL weather {"city": "Paris"}'),
        (TEXT_TOOLS, 'CALL weather ```{"city": "Paris"}```'),
        (PRINTED_TOOLS, 'CALL weather {"city": "Paris"}'),
    ],
    ids=["json", "text", "printed"],
)
@pytest.mark.parametrize("given", [{"city": "Paris"}, '{"city": "Paris"}'], ids=["mapping", "JSON text"])
def test_arguments_are_encoded_once(template: str, expected: str, given: Any) -> None:
    _, chosen, _ = shown(pair(chosen=[called(given)]), template)
    assert expected in chosen


FORMS: dict[str, dict[str, Any]] = {
    "function_call": {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "weather", "arguments": '{"city": "Paris"}'},
    },
    "ShareGPT": {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
    "ms-swift": {"role": "tool_call", "content": '{"name": "weather", "arguments": {"city": "Paris"}}'},
    "bare": {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": {"city": "Paris"}}]},
    "JSON text": {
        "role": "assistant",
        "content": "",
        "tool_calls": json.dumps([{"function": {"name": "weather", "arguments": {"city": "Paris"}}}]),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_calls_in_the_forms_of_other_projects(form: str) -> None:
    _, chosen, _ = shown(pair(chosen=[FORMS[form]]), TOOLS)
    assert 'CALL weather {"city": "Paris"}' in chosen


@pytest.mark.parametrize("container", ["memory", "parquet", "save_to_disk", "jsonl"])
def test_arrow_adds_no_null_arguments(container: str, tmp_path: Path) -> None:
    rows = [pair(chosen=[called({"city": "Paris"})]), pair(chosen=[called({"unit": "C", "deep": {"a": "x"}})])]
    rows[0]["tools"] = [
        {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
    ]
    rows[1]["tools"] = [{"type": "function", "function": {"name": "weather", "parameters": {"unit": {"enum": ["C"]}}}}]
    data: Any = Dataset.from_list(rows)
    if container == "parquet":
        data.to_parquet(str(tmp_path / "a.parquet"))
        data = load(str(tmp_path / "a.parquet"))["train"]
    elif container == "save_to_disk":
        data.save_to_disk(str(tmp_path / "a"))
        data = load(str(tmp_path / "a"))["train"]
    elif container == "jsonl":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = load(str(tmp_path / "a.jsonl"))["train"]
    tokenizer = make_tokenizer(template="{% if tools %}{{ tools | tojson }}{% endif %}" + TOOLS)
    dataset, _ = prepare(data, tokenizer, DataOptions(max_length=None))
    for ids, mine, others in zip(dataset, ("Paris", '"C"'), ("unit", "city"), strict=True):
        text = str(tokenizer.decode([*ids["prompt_ids"], *ids["chosen_ids"]]))
        assert mine in text
        assert "null" not in text
        assert others not in text


def test_a_null_that_somebody_wrote_stays(tmp_path: Path) -> None:
    rows = [pair(chosen=[called({"city": None, "unit": "C"})]), pair(chosen=[called({"city": "Paris", "unit": "F"})])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer(template=TOOLS)
    dataset, _ = prepare(load(str(tmp_path / "a.jsonl"))["train"], tokenizer, DataOptions())
    assert 'CALL weather {"city": null, "unit": "C"}' in str(tokenizer.decode(dataset[0]["chosen_ids"]))


@pytest.mark.parametrize(
    ("tools", "column"),
    [
        ([{"name": "f"}], "tools"),
        ([{"name": "f"}], "functions"),
        ([json.dumps({"name": "f"})], "tools"),
        ([json.dumps({"name": "f"})], "functions"),
        # The old interface had lists alone.
        (json.dumps([{"name": "f"}]), "tools"),
    ],
)
def test_tools_in_their_forms(tools: Any, column: str) -> None:
    template = "{% if tools %}TOOLS {{ tools | tojson }}{% endif %}" + CHATML
    prompt, *_ = shown(pair(**{column: tools}), template)
    assert prompt.startswith('TOOLS [{"name": "f"}]')


def test_what_a_tool_returned_as_an_object_is_written_as_json() -> None:
    turns = [user("a"), called({"city": "Paris"}), {"role": "tool", "content": {"degrees": "21"}}]
    prompt, *_ = shown(pair(prompt=turns), TOOLS)
    assert '{"degrees": "21"}' in prompt


# ---- structures stored as text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dump", [json.dumps, repr, lambda v: json.dumps(v, indent=1), lambda v: " " + repr(v)])
@pytest.mark.parametrize("sharegpt", [False, True])
def test_conversations_stored_as_text_are_conversations(dump: Any, sharegpt: bool) -> None:
    row = pair()
    if sharegpt:
        names = {"user": "human", "assistant": "gpt"}
        row = {k: [{"from": names[t["role"]], "value": t["content"]} for t in turns] for k, turns in row.items()}
    assert shown({field: dump(turns) for field, turns in row.items()}, CHATML) == shown(pair(), CHATML)


def test_a_text_column_of_conversations_is_for_sft() -> None:
    tokenizer = make_tokenizer()
    turns = [user("the cat"), assistant("sat")]
    ours, _ = prepare_sft(Dataset.from_list([{"text": json.dumps(turns)}]), tokenizer, DataOptions())
    expected, _ = prepare_sft(Dataset.from_list([{"messages": turns}]), tokenizer, DataOptions())
    assert ours.to_list() == expected.to_list()


@pytest.mark.parametrize(
    "text",
    ["[{'role': 'user', 'content': 'a'", '[{"role": "user", "content": }]', "[{'role': 'user', 'content': f()}]"],
)
def test_a_broken_structure_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="stored as text that is neither JSON nor Python"):
        prepare(
            Dataset.from_list([{"prompt": text, "chosen": " sat", "rejected": " no"}]), make_tokenizer(), DataOptions()
        )


@pytest.mark.parametrize("text", ['{"city": "Paris"}', "[1, 2]", "[{1: 2}]", '[{"name": "x"}]', "{'role'", "[link](x)"])
def test_text_that_only_looks_like_a_structure_stays_text(text: str) -> None:
    row = {"prompt": "the cat", "chosen": text, "rejected": " no"}
    tokenizer = make_tokenizer()
    dataset, _ = prepare(Dataset.from_list([row]), tokenizer, DataOptions())
    assert str(tokenizer.decode(dataset[0]["chosen_ids"])) == f"{text}</s>"


def test_a_template_is_asked_once_for_every_shape() -> None:
    """The check of short turns costs one rendering a shape, not one a row."""
    tokenizer = make_tokenizer()
    encoder = Encoder(tokenizer)
    asked = 0
    real = encoder.render

    def counting(*arguments: Any) -> Any:
        nonlocal asked
        asked += len(arguments[0])
        return real(*arguments)

    encoder.render = counting  # type: ignore[method-assign, assignment]
    rows = [{"n": i} for i in range(50)]
    encoder.conversations([[user("a"), assistant(f"b{i}")] for i in range(50)], rows, generation_prompt=False)
    assert asked == 51
