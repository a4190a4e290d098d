"""What serving an exported folder takes: an Ollama Modelfile and the command lines of vLLM and llama.cpp."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from preftune.errors import ConfigError
from preftune.export.template import Pieces, take_apart

MODELFILE = "Modelfile"
TEMPLATE_FILE = "chat_template.jinja"


def modelfile(tokenizer: Any, weights: str, *, system: str | None = None) -> tuple[str, str | None]:
    """An Ollama Modelfile with the run's own template.

    Args:
        tokenizer: The model's tokenizer.
        weights: What it is made from, relative to the file: a GGUF file, or ``.`` for safetensors.
        system: A system message for all conversations.

    Returns:
        Its text, and why it has no template, or ``None``.

    Raises:
        ConfigError: A Modelfile cannot hold this system message.
    """
    lines = [f"FROM {weights}"]
    pieces = take_apart(tokenizer)
    template = go_template(pieces) if isinstance(pieces, Pieces) else None
    problem = None
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    else:
        problem = pieces if isinstance(pieces, str) else "its text has marks that Ollama's templates use"
        lines.append(f"# No TEMPLATE: {problem}. Ollama then takes the one inside the GGUF file.")
    if system is not None:
        if '"""' in system:
            raise ConfigError("a Modelfile cannot hold three quotes in a row", where="--system", value=system)
        lines.append(f'SYSTEM """{system}"""')
    stops = [token for token in dict.fromkeys([tokenizer.eos_token]) if token and '"' not in token]
    lines += [f'PARAMETER stop "{token}"' for token in stops]
    return "\n".join(lines) + "\n", problem


def go_template(pieces: Pieces) -> str | None:
    """The pieces of a chat template in the language of Ollama's templates; ``None`` where it has no words for them."""
    texts = [pieces.default, pieces.opening, *(text for pair in pieces.around.values() for text in pair)]
    if any(mark in text for text in texts for mark in ("{{", "}}", '"""')):
        return None
    begin = f'{{{{ if eq $i 0 }}}}{{{{ if ne .Role "system" }}}}{pieces.default}{{{{ end }}}}{{{{ end }}}}'
    cases = ""
    for word, role in zip(("if", "else if", "else if"), sorted(pieces.around, key=_ORDER.index), strict=False):
        before, after = pieces.around[role]
        cases += f'{{{{ {word} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
    first = begin if pieces.default else ""
    return f"{{{{ range $i, $m := .Messages }}}}{first}{cases}{{{{ end }}}}{{{{ end }}}}{pieces.opening}"


_ORDER = ("system", "user", "assistant")


def commands(folder: Path, dtype: str, gguf: Path | None, *, has_template: bool) -> list[tuple[str, str]]:
    """Complete command lines.

    Args:
        folder: The exported folder.
        dtype: Type of its weights.
        gguf: The GGUF file, where there is one.
        has_template: Whether the folder holds a chat template.

    Returns:
        ``(program, command)`` of vLLM, and of llama.cpp and Ollama where they have something to load.
    """
    name = served_name(folder)
    template = f" --chat-template {shlex.quote(str(folder / TEMPLATE_FILE))}" if has_template else ""
    kind = "half" if dtype == "float16" else dtype
    found = [
        ("vLLM", f"vllm serve {shlex.quote(str(folder))} --served-model-name {name} --dtype {kind}{template}"),
    ]
    if gguf is not None:
        own = f" --jinja --chat-template-file {shlex.quote(str(folder / TEMPLATE_FILE))}" if has_template else ""
        found.append(("llama.cpp", f"llama-server -m {shlex.quote(str(gguf))} --alias {name}{own}"))
    file = shlex.quote(str(folder / MODELFILE))
    found.append(("Ollama", f"ollama create {name} -f {file} && ollama run {name}"))
    return found


def served_name(folder: Path) -> str:
    """A short name for the model: that of the run, where the folder lies inside one."""
    resolved = folder.resolve()
    name = resolved.parent.name if resolved.name == "export" else resolved.name
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "model"
