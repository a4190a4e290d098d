"""A prompt, answered by the model before and after training, with the same random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preftune.errors import ConfigError, ModelError
from preftune.report.files import number
from preftune.report.read import read_run

MAX_PROMPT = 20_000
MAX_NEW_TOKENS = 1024


class Stopped(Exception):
    """Nobody waits for the answer any more."""


class Bench:
    """Keeps the models of one run loaded, the last one asked for.

    Args:
        stopped: Asked before every token whether to give up.
    """

    def __init__(self, stopped: Callable[[], bool] = lambda: False) -> None:
        self._stopped = stopped
        self._folder: Path | None = None
        self._models: dict[str, Any] = {}

    def answer(self, folder: Path, request: dict[str, Any]) -> dict[str, Any]:
        """Continue a prompt with both models.

        Args:
            folder: Output folder of the run, with its weights or adapter.
            request: ``prompt``, and perhaps ``max_new_tokens``, ``temperature`` and ``seed``.

        Returns:
            ``answers``: label, text, tokens and whether the model ended it; and a ``note`` where there is one.

        Raises:
            ConfigError: A value is out of range.
            ModelError: The folder holds no model, or it cannot be loaded.
            Stopped: As asked for.
        """
        prompt, limit, temperature, seed = checked(folder, request)
        if folder != self._folder:
            self._models, self._folder = {}, None
            self._models = _load(folder)
            self._folder = folder
        return self._answer(prompt, limit, temperature, seed)

    def _answer(self, prompt: str, limit: int, temperature: float, seed: int) -> dict[str, Any]:
        from preftune.models.sampling import sample_completions

        tokenizer = self._models["tokenizer"]
        text = prompt
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        answers = []
        for label in ("before", "after"):
            model = self._models.get(label)
            if model is None:
                continue
            with self._models["switch"](label), self._interruptible(model):
                options: dict[str, Any] = {"max_new_tokens": limit, "temperature": temperature, "seed": seed}
                sample = sample_completions(model, tokenizer, [text], **options)[0]
            one = {"label": label, "text": sample.text, "num_tokens": len(sample.token_ids), "ended": sample.finished}
            answers.append(one)
        return {"answers": answers, "note": self._models["note"]}

    @contextmanager
    def _interruptible(self, model: Any) -> Iterator[None]:
        def look(*arguments: Any) -> None:
            if self._stopped():
                raise Stopped

        handle = model.register_forward_pre_hook(look)
        try:
            yield
        finally:
            handle.remove()


def checked(folder: Path, request: dict[str, Any]) -> tuple[str, int, float, int]:
    """The prompt and its settings, before anything is loaded for them.

    Raises:
        ConfigError: A value is out of range.
        ModelError: The folder holds no model.
    """
    prompt = request.get("prompt")
    if not isinstance(prompt, str) or not prompt or len(prompt) > MAX_PROMPT:
        raise ConfigError("not a prompt", where="prompt", allowed=f"text of 1 to {MAX_PROMPT} characters")
    limit, temperature, seed = (number(request.get(name, default)) for name, default in _DEFAULTS)
    if limit is None or not 1 <= limit <= MAX_NEW_TOKENS or limit != int(limit):
        raise ConfigError("out of range", where="max_new_tokens", allowed=f"1 to {MAX_NEW_TOKENS}")
    if temperature is None or not 0 <= temperature <= 10:
        raise ConfigError("out of range", where="temperature", allowed="0 to 10")
    if seed is None or not 0 <= seed < 2**32 or seed != int(seed):
        raise ConfigError("out of range", where="seed", allowed="0 to 2^32 - 1")
    if not any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise ModelError("this folder holds no weights yet", where=str(folder), remedy="wait for the end, or save")
    return prompt, int(limit), temperature, int(seed)


_DEFAULTS: tuple[tuple[str, float], ...] = (("max_new_tokens", 64), ("temperature", 1.0), ("seed", 0))


def _load(folder: Path) -> dict[str, Any]:
    """The models of a run; an adapter is switched off for the answer before training."""
    from contextlib import nullcontext

    from preftune.config import ModelConfig
    from preftune.models.loading import load_model_and_tokenizer

    tuned = load_model_and_tokenizer(ModelConfig(model_name_or_path=str(folder)), with_reference=False)
    models: dict[str, Any] = {"after": tuned.model, "tokenizer": tuned.tokenizer, "note": None}
    if hasattr(tuned.model, "disable_adapter"):
        without: Any = tuned.model.disable_adapter
        models["before"] = tuned.model
        models["switch"] = lambda label: without() if label == "before" else nullcontext()
        return models
    models["switch"] = lambda label: nullcontext()
    base = read_run(folder).base_model
    if base is None:
        models["note"] = "the folder does not tell which model it began with"
        return models
    try:
        before = load_model_and_tokenizer(ModelConfig(model_name_or_path=base), with_reference=False)
        models["before"] = before.model
    except (OSError, ModelError) as error:
        models["note"] = f"the model before training could not be loaded: {' '.join(str(error).split())[:300]}"
    return models
