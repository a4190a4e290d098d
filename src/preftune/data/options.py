"""Options of data preparation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from preftune.data.formats import check_format_name
from preftune.errors import ConfigError

BadRowPolicy = Literal["error", "skip", "warn"]
TruncationMode = Literal["keep_start", "keep_end"]
ImplicitPrompt = Literal["common_prefix", "transcript"]
Transcripts = Literal["text", "messages"]
PlainText = Literal["text", "messages"]
EnvironmentTurns = Literal["scored", "masked"]


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not among ``allowed``.

    Raises:
        ConfigError: Names the option, the value and the choices.
    """
    if value not in allowed:
        raise ConfigError(f"unknown {name}", where=name, value=value, allowed=", ".join(allowed))


@dataclass(frozen=True)
class DataOptions:
    """How rows become token ids. The defaults are those of TRL's ``DPOConfig``.

    Attributes:
        max_length: Longest sequence (prompt and completion) in tokens; ``None`` keeps all.
        max_prompt_length: Longest prompt in tokens, applied before ``max_length``; ``keep_end`` keeps its last tokens,
            ``keep_start`` its first.
        truncation_mode: Which end of a sequence survives ``max_length``.
        on_bad_rows: ``error`` stops at the first bad row; ``skip`` leaves bad rows out, counts them and writes them to
            ``quarantine_path``; ``warn`` trains on them where TRL would, counts them, and stops where TRL would.
        dataset_format: ``auto``, or a name from :data:`preftune.data.formats.FORMATS`.
        implicit_prompt: Where a row has no prompt column: ``common_prefix`` is TRL's rule (the longest common prefix);
            ``transcript`` first looks for ``Human:``/``Assistant:`` transcripts.
        transcripts: What becomes of ``Human:``/``Assistant:`` transcripts where the tokenizer has a chat template:
            ``text`` trains on them as they are, as TRL does; ``messages`` makes them conversations.
        plain_text: What becomes of other prompts and answers of text where the tokenizer has a chat template: ``text``
            gives them to the model as they are, as TRL does; ``messages`` makes them a question and its answer.
        environment_turns: Turns within an answer that the model does not write (what tools return, later user turns):
            ``scored`` as its own words, as TRL does, or ``masked``.
        append_eos: Append the end-of-sequence token to a conversational completion whose template leaves it out.
        enclose: Begin every sequence of a pair with the beginning-of-sequence token and end it with the
            end-of-sequence token, where the tokenizer has them, whatever template and tokenizer write themselves. The
            rule of TRL's ORPO and CPO trainers.
        num_proc: Processes to tokenise with; used from 2,000 rows on, because starting them costs more before that.
        worker_timeout: Seconds to wait for a process that finishes no batch of 1,000 rows before preparing ends with an
            error; 0 waits for ever.
        quarantine_path: JSON-lines file that skipped rows are appended to.
        max_dropped_share: Refuse to go on when more than this share of the rows is lost; ``None`` only warns.
        chat_template: Jinja template to use instead of the tokenizer's own.
        data_cache: Keep the tokens of 2,000 rows and more on disk, and find them there again.
        warn: Say what was found as Python warnings, as the trainers' classes do.
    """

    max_length: int | None = 1024
    max_prompt_length: int | None = None
    truncation_mode: TruncationMode = "keep_start"
    on_bad_rows: BadRowPolicy = "error"
    dataset_format: str = "auto"
    implicit_prompt: ImplicitPrompt = "common_prefix"
    transcripts: Transcripts = "text"
    plain_text: PlainText = "text"
    environment_turns: EnvironmentTurns = "scored"
    append_eos: bool = False
    enclose: bool = False
    num_proc: int | None = None
    worker_timeout: float = 600.0
    quarantine_path: str | None = None
    max_dropped_share: float | None = None
    chat_template: str | None = None
    data_cache: bool = True
    warn: bool = False

    def __post_init__(self) -> None:
        check_choice("truncation_mode", self.truncation_mode, ("keep_start", "keep_end"))
        check_choice("on_bad_rows", self.on_bad_rows, ("error", "skip", "warn"))
        check_choice("implicit_prompt", self.implicit_prompt, ("common_prefix", "transcript"))
        check_choice("transcripts", self.transcripts, ("text", "messages"))
        check_choice("plain_text", self.plain_text, ("text", "messages"))
        check_choice("environment_turns", self.environment_turns, ("scored", "masked"))
        check_format_name(self.dataset_format)
        for name in ("max_length", "max_prompt_length", "num_proc"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(
                    f"{name} must be a whole number of at least 1", where=name, value=value, allowed="1, 2, ... or null"
                )
        if isinstance(self.worker_timeout, bool) or not 0 <= self.worker_timeout < float("inf"):
            raise ConfigError(
                "not a number of seconds", where="worker_timeout", value=self.worker_timeout, allowed="0 or more"
            )
        share = self.max_dropped_share
        if share is not None and (isinstance(share, bool) or not 0 <= share <= 1):
            raise ConfigError(
                "max_dropped_share must be a share", where="max_dropped_share", value=share, allowed="0 to 1, or null"
            )
        if self.quarantine_path is not None and self.on_bad_rows != "skip":
            raise ConfigError(
                "quarantine_path is only written with on_bad_rows: skip",
                where="quarantine_path",
                value=self.quarantine_path,
                remedy="set on_bad_rows: skip, or leave quarantine_path out",
            )
