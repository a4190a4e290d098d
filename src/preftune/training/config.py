"""Settings that all trainers share: TRL's fields with TRL's defaults, and the few that packing adds."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import TrainingArguments
from transformers.utils.import_utils import is_torch_bf16_gpu_available, is_torch_xla_available

from preftune.errors import ConfigError
from preftune.kernels.attention import BACKEND_NAMES
from preftune.models.compiled import COMPILE_BACKENDS, COMPILE_MODES
from preftune.training.fsdp import load_everywhere
from preftune.training.guards.settings import parse_guards
from preftune.training.zero_config import check_installed, load_whole

if TYPE_CHECKING:
    # A bare `off` is false in YAML.
    _Guards = bool | str | dict[str, Any]
else:
    # Argument parsers that are made from the fields take one type each.
    _Guards = str


#: Settings of transformers for a loop that this one replaces: their value that asks for nothing, and why any other has
#: no effect.
_WITHOUT_EFFECT: dict[str, tuple[Any, str]] = {
    "bf16_full_eval": (False, "evaluation computes as training does (bf16)"),
    "fp16_full_eval": (False, "evaluation computes as training does (fp16)"),
    "batch_eval_metrics": (False, "compute_metrics is called once, with everything"),
    "include_for_metrics": ([], "compute_metrics receives rewards"),
    "eval_accumulation_steps": (None, "evaluation keeps rewards alone, no logits"),
    "eval_do_concat_batches": (True, "compute_metrics receives one array"),
    "eval_use_gather_object": (False, "compute_metrics receives one array"),
    "label_names": (None, "what is scored follows from the data"),
}


#: Settings that transformers renamed, and TRL's scripts go on to write.
_FORMER_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def check_choice(name: str, value: object, allowed: tuple[str | None, ...]) -> None:
    """Refuse a value that is none of the allowed ones."""
    if value not in allowed:
        raise ConfigError("unknown value", where=name, value=value, allowed=", ".join(filter(None, allowed)))


#: What settings of words may be.
_CHOICES: dict[str, tuple[Any, ...]] = {
    "truncation_mode": ("keep_start", "keep_end"),
    "packing_mode": ("auto", "packed", "padded"),
    "attention_backend": BACKEND_NAMES,
    "checkpoint_policy": ("needed", "always"),
    "on_bad_rows": ("error", "skip", "warn"),
    "existing_output": ("refuse", "set_aside_own", "set_aside"),
    "transcripts": ("text", "messages"),
    "plain_text": ("text", "messages"),
    "environment_turns": ("scored", "masked"),
    "torch_compile_backend": (None, *COMPILE_BACKENDS),
    "torch_compile_mode": (None, *COMPILE_MODES),
}
_LEAST = {
    "max_length": 2,
    "max_tokens_per_row": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "adam_epsilon": 0,
    "num_train_epochs": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "neftune_noise_alpha": 0,
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
    "generation_steps": 0,
    "num_generations": 2,
    "generation_max_new_tokens": 1,
    "max_skipped_steps": 0,
}


def check_at_least(name: str, value: Any, least: int | float) -> None:
    """Refuse what is no number, or too small a one; ``None`` passes."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError("not a number", where=name, value=value, allowed=f"{least} or more")
    if not value >= least:
        raise ConfigError("value too small", where=name, value=value, allowed=f"{least} or more")


def _check_json(config: TrainingArguments) -> None:
    """Settings that are mappings may be written as JSON; transformers would not say which of them is wrong."""
    for name in config._VALID_DICT_FIELDS:
        value = getattr(config, name)
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                json.loads(value)
            except ValueError as error:
                raise ConfigError(f"no valid JSON ({error})", where=name, value=value) from error


def _has_bf16_accelerator() -> bool:
    return bool(is_torch_bf16_gpu_available() or is_torch_xla_available())


@dataclass
class PackedConfig(TrainingArguments):
    """Settings that every preftune trainer shares. Names and defaults that TRL also has are TRL's.

    Attributes:
        learning_rate: Peak learning rate.
        logging_steps: Log every so many optimizer steps.
        torch_compile: Compile the parts of every layer, for rows of any length. Attention and head are not traced.
        neftune_noise_alpha: Noise on the embeddings of training sequences (NEFTune); a shared prompt carries one noise
            for both of its answers.
        gradient_checkpointing: Recompute activations in the backward where memory asks for it; see
            ``checkpoint_policy``.
        bf16: Mixed precision; by default on unless ``fp16`` is, wherever the hardware takes it. A processor without
            accelerator takes it with ``use_cpu``; TRL refuses to start there otherwise, preftune trains in fp32.
        lr_scheduler_kwargs: Keywords of the schedule, such as ``{min_lr_rate: 0.1}`` for ``cosine_with_min_lr``.
        model_init_kwargs: Keywords for loading the model where it is given by name.
        trust_remote_code: Run code shipped with a model.
        router_aux_loss_coef: Weight of the load-balancing loss of mixture-of-experts models.
        dataset_num_proc: Processes for preparing data.
        worker_timeout: Seconds to wait for a process of ``dataset_num_proc`` or ``dataloader_num_workers`` that makes
            no progress before the run ends with an error; 0 waits for ever.
        max_length: Longest sequence in tokens; ``None`` for no limit.
        truncation_mode: Which end of an overlong sequence survives: ``keep_start`` or ``keep_end``.
        pad_to_multiple_of: Accepted from TRL; packed rows carry no padding, so that numbers other than ``None`` and
            ``"auto"`` only draw a warning.
        padding_free: Accepted from TRL; packed rows are always free of padding.
        activation_offloading: Keep activations in host memory between forward and backward.
        pad_token: Padding token, where the tokenizer's is not to be used.
        chat_template: Chat template, or the path of a file that holds it, in place of the tokenizer's own.
        packing_mode: ``auto`` packs where the model passes gate and probe; ``packed`` insists; ``padded`` never packs.
        attention_backend: Attention kernel for packed rows; ``auto`` takes the fastest that is exact.
        max_tokens_per_row: Token budget of one packed row; derived from memory by default.
        checkpoint_policy: With ``gradient_checkpointing``, recompute ``always``, or only where the estimated
            activations do not fit (``needed``). The numbers are the same either way.
        dataset_format: Name of the data's format; ``auto`` recognises it.
        on_bad_rows: ``error`` stops, ``skip`` sets bad rows aside, ``warn`` goes on where TRL does and says how many.
        quarantine_path: File for rows set aside.
        max_dropped_share: Refuse to start where truncation drops a larger share of the rows; ``None`` only warns.
        existing_output: What to do with another run's results in ``output_dir``: ``refuse`` to start; ``set_aside``,
            move them into a folder ``earlier-N`` there; ``set_aside_own``, move what an earlier run of preftune has
            written and nobody has changed since, and refuse otherwise. The command line refuses by default.
        data_cache: Keep the tokens of large data sets on disk, and find them there again.
        transcripts: What becomes of ``Human:``/``Assistant:`` transcripts where the tokenizer has a chat template:
            ``text`` trains on them as they are, as TRL does; ``messages`` makes them conversations.
        plain_text: What becomes of other prompts and answers of text where the tokenizer has a chat template: ``text``
            trains on them as they are, as TRL does; ``messages`` makes them a question and its answer.
        environment_turns: Turns within an answer that the model does not write (what tools return, later user turns):
            ``scored`` as its own words, as TRL does, or ``masked``.
        append_eos: Add the end-of-sequence token where the chat template leaves it out.
        guards: What happens when a guard fires: ``warn``, ``stop`` or ``off``, for all guards or by name, such as
            ``{overfitting: stop, reward_jump: off}``.
        generation_steps: Sample from the policy every so many optimizer steps, for KL, lengths and ``samples.jsonl``; 0
            never does. Full fine-tuning keeps a copy of the initial weights for it.
        num_generations: Samples drawn each time, one for each of as many prompts of the evaluation or training data.
        generation_max_new_tokens: Longest sample in tokens.
        max_skipped_steps: Optimizer steps in a row that may be skipped because their loss or gradient is not finite;
            one more stops the run.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
    ]

    logging_steps: float = 10
    torch_compile: bool = False
    neftune_noise_alpha: float | None = None
    gradient_checkpointing: bool = True
    bf16: bool | None = None  # type: ignore[assignment]
    lr_scheduler_kwargs: dict[str, Any] | str | None = None

    model_init_kwargs: dict[str, Any] | str | None = None
    trust_remote_code: bool = False
    router_aux_loss_coef: float | None = None
    dataset_num_proc: int | None = None
    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | str | None = "auto"
    padding_free: bool = False
    activation_offloading: bool = False
    pad_token: str | None = None

    chat_template: str | None = None
    packing_mode: str = "auto"
    attention_backend: str = "auto"
    max_tokens_per_row: int | None = None
    checkpoint_policy: str = "needed"
    dataset_format: str = "auto"
    on_bad_rows: str = "warn"
    quarantine_path: str | None = None
    max_dropped_share: float | None = None
    existing_output: str = "set_aside_own"
    transcripts: str = "text"
    plain_text: str = "text"
    environment_turns: str = "scored"
    data_cache: bool = True
    append_eos: bool = False
    guards: _Guards = "warn"
    generation_steps: int = 0
    num_generations: int = 32
    generation_max_new_tokens: int = 128
    max_skipped_steps: int = 3
    worker_timeout: float = 600.0

    def __post_init__(self) -> None:
        parse_guards(self.guards)
        if not 0 <= self.worker_timeout < float("inf"):
            value = self.worker_timeout
            raise ConfigError("not a number of seconds", where="worker_timeout", value=value, allowed="0 or more")
        if self.bf16 is None:
            self.bf16 = not self.fp16 and (self.use_cpu or _has_bf16_accelerator())
        for name, allowed in _CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        for name, least in _LEAST.items():
            check_at_least(name, getattr(self, name), least)
        if self.attention_backend != "auto" and self.packing_mode == "padded":
            said = "attention_backend has no effect with packing_mode: padded, which runs the model's own attention"
            warnings.warn(said, UserWarning, stacklevel=3)
        if self.dataloader_persistent_workers and not self.dataloader_num_workers:
            raise ConfigError(
                "there are no workers to keep",
                where="dataloader_persistent_workers",
                value=True,
                remedy="set dataloader_num_workers to 1 or more",
            )
        if self.pad_to_multiple_of not in (None, "auto", "none", "null"):
            warnings.warn("pad_to_multiple_of has no effect: packed rows are not padded", UserWarning, stacklevel=3)
        if self.label_smoothing_factor:
            raise ConfigError(
                "smoothing over the vocabulary needs logits, which are never built",
                where="label_smoothing_factor",
                value=self.label_smoothing_factor,
                remedy="leave label_smoothing_factor out; label_smoothing of the preference methods is another setting",
            )
        for name, (nothing, why) in _WITHOUT_EFFECT.items():
            if getattr(self, name) != nothing:
                warnings.warn(f"{name} has no effect: {why}", UserWarning, stacklevel=3)
        # With these transformers leaves the model where it is until an evaluation of its own moves it.
        self.bf16_full_eval = self.fp16_full_eval = False
        if self.use_liger_kernel:
            # Its fused loss puts another forward in the model's place, with a head that cannot be reached.
            kernels = {"fused_linear_cross_entropy": False, "cross_entropy": False}
            self.liger_kernel_config = {**(self.liger_kernel_config or {}), **kernels}
        for old, new in _FORMER_NAMES.items():
            # Both are the same setting here, and the former one has a default: no reason for a warning.
            if getattr(self, new, True) is None:
                setattr(self, new, getattr(self, old))
        _check_json(self)
        kwargs = self.gradient_checkpointing_kwargs
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise ConfigError(
                "not a mapping", where="gradient_checkpointing_kwargs", value=kwargs, allowed="{name: value}"
            )
        check_installed(self)
        super().__post_init__()  # type: ignore[no-untyped-call]
        load_everywhere(self)
        load_whole(self)
        self._check_dispatch()

    def _check_dispatch(self) -> None:
        # transformers has made an object of it.
        if getattr(self.accelerator_config, "dispatch_batches", None):
            raise ConfigError(
                "packed examples are not sent from one process to the others: each reads its own share",
                where="accelerator_config",
                value={"dispatch_batches": True},
                remedy="leave dispatch_batches out",
            )
