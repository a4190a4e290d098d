"""Two conversations with the same questions: one with the tuned model, one with the reference."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from preftune.config import ModelConfig
from preftune.errors import ConfigError, ModelError, PreftuneError
from preftune.models.decoding import BASE, decode, switchable
from preftune.models.sampling import end_tokens
from preftune.models.tuned import Tuned, load_reference, load_tuned

TUNED, REFERENCE = "tuned", "reference"


@dataclass
class Side:
    """One model's half of the conversation.

    Attributes:
        label: ``tuned`` or ``reference``.
        model: The model.
        adapter_off: Whether it is meant without its adapter.
        messages: What was said so far.
    """

    label: str
    model: Any
    adapter_off: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)


@dataclass
class Answer:
    """What one side is saying.

    Attributes:
        label: Of the side.
        text: So far.
        num_tokens: So far.
        finished: Whether the model ended it itself.
    """

    label: str
    text: str = ""
    num_tokens: int = 0
    finished: bool = False


class Session:
    """A conversation.

    Args:
        sides: Who answers.
        tokenizer: Their tokenizer.
        system: System message.
        max_new_tokens: Longest answer.
        temperature: Of sampling; 0 takes the most likely token.
        seed: Of all draws; both sides get the same random numbers.

    Raises:
        ConfigError: A value is out of range.
        ModelError: The tokenizer has no end-of-text token.
    """

    def __init__(
        self,
        sides: Sequence[Side],
        tokenizer: Any,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("--max_new_tokens", max_new_tokens, 1),
            ("--temperature", temperature, 0),
            ("--seed", seed, 0),
        ):
            if not value >= least:
                raise ConfigError("out of range", where=name, value=value, allowed=f"{least} or more")
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end-of-text token", where="tokenizer", remedy="set its eos_token")
        if system is not None and not tokenizer.chat_template:
            raise ConfigError("has no effect without a chat template", where="--system", value=system)
        self.sides, self.tokenizer = list(sides), tokenizer
        self._system, self._temperature, self._seed = system, temperature, seed
        self._limit = max_new_tokens
        self._turn = 0
        models = {id(side.model) for side in self.sides}
        #: Name of the adapter that is on for some rows of a batch and off for others.
        self._switch = switchable(self.sides[0].model) if len(self.sides) == 2 and len(models) == 1 else None
        self.restart()

    @property
    def one_pass(self) -> bool:
        """Whether both sides are computed together."""
        return self._switch is not None

    def restart(self) -> None:
        """Forget what was said."""
        for side in self.sides:
            side.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def ask(self, question: str) -> Generator[list[Answer], None, None]:
        """Answer a question; closing the iterator early keeps what was said by then.

        Args:
            question: The user's message.

        Yields:
            All answers so far, after every token.

        Raises:
            ConfigError: The template refuses the conversation, or it is longer than the model's positions.
        """
        for side in self.sides:
            side.messages.append({"role": "user", "content": question})
        answers = [Answer(side.label) for side in self.sides]
        try:
            prompts = [self._prompt(side) for side in self.sides]
            limit = min(self._limit, *(self._room(side, ids) for side, ids in zip(self.sides, prompts, strict=True)))
        except PreftuneError:
            for side in self.sides:
                side.messages.pop()
            raise
        self._turn += 1
        uniforms = np.random.default_rng([self._seed, self._turn]).random((1, limit))
        try:
            yield from self._answers(prompts, uniforms, answers)
        finally:
            for side, answer in zip(self.sides, answers, strict=True):
                side.messages.append({"role": "assistant", "content": answer.text})

    def _answers(
        self, prompts: list[list[int]], uniforms: Any, answers: list[Answer]
    ) -> Generator[list[Answer], None, None]:
        if self._switch is not None:
            groups = [(list(range(len(self.sides))), [BASE if s.adapter_off else self._switch for s in self.sides])]
        else:
            groups = [([number], []) for number in range(len(self.sides))]
        for numbers, adapters in groups:
            side = self.sides[numbers[0]]
            ends = end_tokens(side.model, self.tokenizer)
            ids: list[list[int]] = [[] for _ in numbers]
            off: AbstractContextManager[Any] = (
                side.model.disable_adapter() if not adapters and side.adapter_off else nullcontext()
            )
            with off:
                for step in decode(
                    side.model,
                    [prompts[number] for number in numbers],
                    np.repeat(uniforms, len(numbers), axis=0),
                    self._temperature,
                    ends,
                    adapters=adapters or None,
                ):
                    for row, token, _ in step:
                        ids[row].append(token)
                        self._tell(answers[numbers[row]], ids[row], token in ends)
                    yield answers

    def _tell(self, answer: Answer, ids: list[int], finished: bool) -> None:
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # The rest of a character comes with the next tokens.
        answer.text = str(text) if finished else str(text).rstrip("\ufffd")
        answer.num_tokens, answer.finished = len(ids), finished

    def _prompt(self, side: Side) -> list[int]:
        if not self.tokenizer.chat_template:
            text = "".join(message["content"] for message in side.messages)
            return list(self.tokenizer(text)["input_ids"])
        try:
            found = self.tokenizer.apply_chat_template(
                side.messages, tokenize=True, add_generation_prompt=True, return_dict=True
            )
        except Exception as error:  # whatever a template raises about roles and their order
            said = " ".join(str(error).split())[:160]
            raise ConfigError(f"the chat template refuses this conversation ({said})", where="chat_template") from error
        return list(found["input_ids"])

    def _room(self, side: Side, ids: list[int]) -> int:
        if not ids:
            raise ConfigError("nothing to answer", where="message", value="")
        most = getattr(side.model.config.get_text_config(), "max_position_embeddings", None)
        room = self._limit if most is None else int(most) - len(ids)
        if room < 1:
            raise ConfigError(
                f"the conversation is longer than the model's {most} positions", where="message", remedy="say /new"
            )
        return room


def open_session(
    tuned: Tuned, *, dtype: str = "auto", only: str | None = None, trust_remote_code: bool = False, **settings: Any
) -> tuple[Session, list[str]]:
    """Load a run's models for a conversation.

    Args:
        tuned: What a run left.
        dtype: Type of the weights.
        only: ``tuned`` or ``reference``, where one is enough.
        trust_remote_code: Run Python code that comes with the base model.
        settings: Of the :class:`Session`.

    Returns:
        The session, and notes for the user.

    Raises:
        ModelError: A model cannot be loaded.
    """
    how = ModelConfig(dtype=dtype, trust_remote_code=trust_remote_code)
    notes: list[str] = []
    if only == REFERENCE:
        loaded = load_reference(tuned, how)
        sides = [Side(REFERENCE, _placed(loaded.model))]
    else:
        loaded = load_tuned(tuned, how)
        model = _placed(loaded.model)
        sides = [Side(TUNED, model)]
        if only is None and tuned.is_adapter and tuned.reference is None:
            notes += tuned.notes
            sides.append(Side(REFERENCE, model, adapter_off=True))
        elif only is None:
            try:
                sides.append(Side(REFERENCE, _placed(load_reference(tuned, how).model)))
            except PreftuneError as error:
                notes.append(f"no reference beside it: {error}")
    if not loaded.tokenizer.chat_template:
        notes.append("the tokenizer has no chat template: your text is continued as it is")
    return Session(sides, loaded.tokenizer, **settings), notes


def _placed(model: Any) -> Any:
    if torch.accelerator.is_available() and not getattr(model, "hf_device_map", None):
        model.to(torch.accelerator.current_accelerator())
    return model.eval()
