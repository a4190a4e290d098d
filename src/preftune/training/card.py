"""A model card beside the weights: what was done, with what, and how it came out."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from preftune.models.head import base_model
from preftune.objectives import METHODS
from preftune.ownership import put_text
from preftune.training import provenance
from preftune.training.run import Run
from preftune.training.tasks import TASKS
from preftune.version import __version__

FILE_NAME = "README.md"

#: Settings that every card names.
_DECISIVE = ("beta", "learning_rate", "num_train_epochs", "max_length", "seed")

# Markdown that could change the page when it stands in a value: links, images, code, tables, strike-through, emphasis
# (an underscore inside a word is none), and what makes a heading or a list at the beginning of a line.
_ACTIVE = re.compile(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w)|^[#+=-])")
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s|\Z)")


@dataclass(frozen=True)
class Card:
    """What the card says.

    Attributes:
        title: Name of the tuned model.
        verb: ``dpo`` or ``sft``.
        base_model: Hub id or folder of the model before training.
        datasets: Names of the datasets, as given.
        methods: Names of the losses, empty for SFT.
        papers: ``(title, link)`` of each method's paper.
        settings: The settings that were not left at their default, plus the decisive ones.
        metrics: Final metrics by name.
        data_lines: One line per split about rows kept and dropped.
        versions: Library versions.
        is_adapter: Whether the folder holds a LoRA adapter.
        extra_tags: Further tags for the front matter.
        has_provenance: Whether the folder also holds the record of the run.
        adapter: Rank, scale and modules of the adapter, as its settings name them.
        has_template: Whether the tokenizer has a chat template.
    """

    title: str
    verb: str
    base_model: str
    datasets: Sequence[str] = ()
    methods: Sequence[str] = ()
    papers: Sequence[tuple[str, str]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    data_lines: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    is_adapter: bool = False
    extra_tags: Sequence[str] = ()
    has_provenance: bool = True
    adapter: Mapping[str, Any] = field(default_factory=dict)
    has_template: bool = False


def render(card: Card) -> str:
    """Write the card as Markdown with a YAML front matter; values cannot become markup.

    Args:
        card: What to say.

    Returns:
        The text of ``README.md``.
    """
    parts = [
        _front_matter(card),
        f"# {escape(card.title)}\n",
        _opening(card),
        "## Use\n\n```python\n" + "\n".join(_snippet(card)) + "\n```\n",
        _section("Data", [f"- {escape(line)}" for line in [*card.data_lines]]),
        _section("Results", _table(("metric", "value"), _numbers(card.metrics))),
        _section("Settings", _table(("setting", "value"), [(name, _shown(v)) for name, v in card.settings.items()])),
        _section("Papers", [f"- {escape(title)}: <{_link(link)}>" for title, link in card.papers]),
        _section("Versions", [", ".join(f"{escape(name)} {escape(text)}" for name, text in card.versions.items())]),
        "How the model was made, to the last setting, is in `provenance.json` in this folder.\n" * card.has_provenance,
    ]
    return "\n".join(part for part in parts if part)


def of_run(
    run: Run,
    model_name: str | None,
    dataset_name: str | Sequence[str] | None,
    tags: str | Sequence[str] | None,
) -> Card:
    """What a run knows about its model by itself.

    Args:
        run: The run.
        model_name: Name of the tuned model; by default the output folder's.
        dataset_name: Name of the data, or several.
        tags: Further tags.

    Returns:
        The card.
    """
    methods = [] if run.task.objective is None else list(run.task.objective.names)
    papers = [METHODS[name].paper for name in methods if name in METHODS]
    lines = [line for line in run.state.log_history if "loss" in line or "eval_loss" in line]
    figures = {name: value for line in lines for name, value in line.items()}
    source = str(getattr(base_model(run.model).config, "_name_or_path", "") or "a model")
    settings = {name: provenance.plain(getattr(run.args, name)) for name in _DECISIVE if hasattr(run.args, name)}
    return Card(
        title=model_name or Path(str(run.args.output_dir)).name,
        verb=run.task.name,
        # Where it lies on somebody's disk is nobody else's business.
        base_model=Path(source).name if Path(source).exists() else source,
        datasets=_several(dataset_name),
        methods=methods,
        papers=list(dict.fromkeys((paper.title, paper.link) for paper in papers)),
        settings=settings,
        metrics={k: v for k, v in figures.items() if not k.endswith(("_runtime", "_per_second"))},
        versions={"preftune": __version__, **provenance.versions()},
        is_adapter=hasattr(run.step.forward.model, "peft_config"),
        extra_tags=_several(tags),
        has_provenance=(Path(str(run.args.output_dir)) / provenance.FILE_NAME).is_file(),
    )


def _several(given: str | Sequence[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def write(folder: str | Path, card: Card) -> Path:
    """Write the card into a folder, in place of any template that a library left there.

    What the folder itself tells, of its adapter and its chat template, is added.

    Returns:
        Path of the file.
    """
    target = Path(folder) / FILE_NAME
    adapter = _adapter(Path(folder))
    has_template = card.has_template or (Path(folder) / "chat_template.jinja").is_file()
    put_text(target, render(replace(card, adapter=adapter, has_template=has_template)))
    return target


def _adapter(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def escape(value: Any) -> str:
    """Text that shows as itself in Markdown and HTML, on one line."""
    flat = " ".join(str(value).split())
    return html.escape(_NUMBERED.sub(r"\1\\\2", _ACTIVE.sub(r"\\\1", flat)), quote=False)


def _front_matter(card: Card) -> str:
    fields: dict[str, Any] = {
        "library_name": "peft" if card.is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        # A method may be called like the verb, and a push hands on the model's tags, which are here already.
        "tags": list(dict.fromkeys(["preftune", card.verb, *card.methods, *card.extra_tags])),
    }
    # The Hub resolves these names; paths on somebody's disk would be dead links there.
    if _is_hub_name(card.base_model):
        fields["base_model"] = card.base_model
    hub_datasets = [name for name in card.datasets if _is_hub_name(name)]
    if hub_datasets:
        fields["datasets"] = hub_datasets
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n"


def _is_hub_name(name: str) -> bool:
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or re.search(r"\.(json|jsonl|gz|csv|parquet)\Z", name):
        return False
    return not Path(name).exists()


def _opening(card: Card) -> str:
    kind = f"A {_kind(card)} for" if card.is_adapter else "A version of"
    how = f"tuned on {TASKS[card.verb].trains_on}"
    method = f" with {escape(', '.join(card.methods))}" if card.methods else ""
    data = f", data: {escape(', '.join(card.datasets))}" if card.datasets else ""
    return f"{kind} {escape(card.base_model)}, {how}{method}{data}.\n"


def _kind(card: Card) -> str:
    """``DoRA adapter of rank 16 (alpha 32; q_proj, v_proj)``."""
    found = card.adapter
    name = "DoRA" if found.get("use_dora") else "LoRA"
    if not isinstance(found.get("r"), int):
        return f"{name} adapter"
    modules = found.get("target_modules")
    where = ", ".join(sorted(map(str, modules))) if isinstance(modules, list) else str(modules or "")
    details = escape("; ".join(text for text in (f"alpha {found.get('lora_alpha')}", _shown(where)) if text))
    return f"{name} adapter of rank {found['r']} ({details})"


def _snippet(card: Card) -> list[str]:
    """Python that answers a question; names cannot end its strings."""
    path = json.dumps("path/to/" + re.sub(r"[^\w.-]+", "-", card.title))
    loader = "AutoPeftModelForCausalLM" if card.is_adapter else "AutoModelForCausalLM"
    imports = (
        ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer"]
        if card.is_adapter
        else ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    )
    text = (
        [
            'messages = [{"role": "user", "content": "Hello!"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
        if card.has_template
        else ['inputs = tokenizer("Hello!", return_tensors="pt")']
    )
    return [
        *imports,
        "",
        f"model = {loader}.from_pretrained({path})",
        f"tokenizer = AutoTokenizer.from_pretrained({path})",
        *text,
        "output = model.generate(**inputs, max_new_tokens=256)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def _section(heading: str, lines: Sequence[str]) -> str:
    lines = [line for line in lines if line]
    return f"## {heading}\n\n" + "\n".join(lines) + "\n" if lines else ""


def _table(header: tuple[str, str], rows: Sequence[tuple[str, str]]) -> list[str]:
    if not rows:
        return []
    body = [f"| {escape(name)} | {escape(value)} |" for name, value in rows]
    return [f"| {header[0]} | {header[1]} |", "|---|---|", *body]


def _numbers(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    kept = {name: value for name, value in metrics.items() if isinstance(value, (int, float, str))}
    return [(name, f"{value:.4g}" if isinstance(value, float) else str(value)) for name, value in kept.items()]


def _shown(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _link(link: str) -> str:
    """Only web addresses become links, without characters that end one."""
    clean = re.sub(r"[\s<>\"]", "", link)
    return clean if re.match(r"https?://", clean) else "about:blank"
