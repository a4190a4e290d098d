"""Settings of the trainers: TRL's fields with TRL's defaults, and the few that packing adds."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import TrainingArguments
from transformers.utils.import_utils import is_torch_bf16_gpu_available, is_torch_xla_available

from preftune.errors import ConfigError
from preftune.kernels.attention import BACKEND_NAMES
from preftune.models.compiled import COMPILE_BACKENDS, COMPILE_MODES
from preftune.objectives import Objective, build_objective
from preftune.training.guards.settings import parse_guards

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


def _choice(name: str, value: object, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise ConfigError("unknown value", where=name, value=value, allowed=", ".join(filter(None, allowed)))


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
    "generation_steps": 0,
    "num_generations": 2,
    "generation_max_new_tokens": 1,
    "max_skipped_steps": 0,
}


def _at_least(name: str, value: Any, least: int | float) -> None:
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
        _choice("truncation_mode", self.truncation_mode, ("keep_start", "keep_end"))
        _choice("packing_mode", self.packing_mode, ("auto", "packed", "padded"))
        _choice("attention_backend", self.attention_backend, BACKEND_NAMES)
        _choice("checkpoint_policy", self.checkpoint_policy, ("needed", "always"))
        _choice("on_bad_rows", self.on_bad_rows, ("error", "skip", "warn"))
        _choice("existing_output", self.existing_output, ("refuse", "set_aside_own", "set_aside"))
        _choice("torch_compile_backend", self.torch_compile_backend, (None, *COMPILE_BACKENDS))
        _choice("torch_compile_mode", self.torch_compile_mode, (None, *COMPILE_MODES))
        for name, least in _LEAST.items():
            _at_least(name, getattr(self, name), least)
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
        _check_json(self)
        super().__post_init__()  # type: ignore[no-untyped-call]
        # transformers has made an object of it.
        if getattr(self.accelerator_config, "dispatch_batches", None):
            raise ConfigError(
                "packed examples are not sent from one process to the others: each reads its own share",
                where="accelerator_config",
                value={"dispatch_batches": True},
                remedy="leave dispatch_batches out",
            )


@dataclass
class DPOConfig(PackedConfig):
    """Settings of :class:`~preftune.DPOTrainer`.

    Attributes:
        disable_dropout: Switch dropout off in policy and reference.
        max_prompt_length: Longest prompt in tokens; ``None`` for no limit of its own.
        precompute_ref_log_probs: Compute reference log-probs before training, as is done anyway whenever the reference
            is fixed and ``reference_store`` is on; without the store it is refused.
        precompute_ref_batch_size: Accepted from TRL; the reference pass packs rows under ``max_tokens_per_row``.
        reference_store: Keep reference log-probs on disk and never compute one twice.
        loss_type: One method or several, see ``preftune methods``.
        loss_weights: Weight of each method; all one by default.
        beta: Strength of the pull towards the reference.
        label_smoothing: Assumed share of flipped labels, for the methods that have it.
        f_divergence_type: Divergence between policy and reference.
        f_alpha_divergence_coef: Alpha of ``alpha_divergence``.
        ld_alpha: Weight of completion tokens beyond the shorter answer (LD-DPO); ``None`` for one.
        use_weighting: Weight pairs by the policy's own probability of them (WPO).
        discopop_tau: Temperature of ``discopop``.
        ipo_normalize: Use per-token averages in ``ipo``, as TRL does, rather than sums.
        dpop_lambda: Penalty of ``dpop`` on chosen completions that fall below the reference.
        odpo_alpha: Scale of the offset that ``odpo`` makes of the score gap.
        odpo_transform: Offset of ``odpo`` as ``log`` of the score gap, or the gap itself (``identity``).
        bco_running_delta: Shift the rewards of ``bco_pair`` by their mean over the steps so far, as its paper does.
        sft_average: The SFT term as a mean over all chosen tokens of the step (``batch_tokens``, as TRL) or per pair
            over its own (``pair_tokens``).
        model_adapter_name: Adapter that is trained, where the model carries several; by default the active one.
        ref_adapter_name: Adapter of the same model that is the reference; by default the policy as it is before
            training.
        sync_ref_model: Let the reference follow the policy (TR-DPO).
        ref_model_mixup_alpha: Share of the policy in each synchronisation.
        ref_model_sync_steps: Optimizer steps between synchronisations.
        implicit_prompt: How the prompt is found where the data have none: ``common_prefix`` as TRL does, or
            ``transcript`` at the last assistant turn.
        first_step_check: Verify that policy and reference agree before the first update, and say what is wrong if not.
    """

    learning_rate: float = 1e-6
    disable_dropout: bool = True
    max_prompt_length: int | None = None
    precompute_ref_log_probs: bool = False
    precompute_ref_batch_size: int | None = None
    reference_store: bool = True
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])
    loss_weights: list[float] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None
    use_weighting: bool = False
    discopop_tau: float = 0.05
    ipo_normalize: bool = True
    dpop_lambda: float = 50.0
    odpo_alpha: float = 1.0
    odpo_transform: str = "log"
    bco_running_delta: bool = False
    sft_average: str = "batch_tokens"
    model_adapter_name: str | None = None
    ref_adapter_name: str | None = None
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512
    implicit_prompt: str = "common_prefix"
    first_step_check: bool = True

    def __post_init__(self) -> None:
        given: Any = self.loss_type
        if isinstance(given, str):
            self.loss_type = [given]
        _choice("implicit_prompt", self.implicit_prompt, ("common_prefix", "transcript"))
        _at_least("max_prompt_length", self.max_prompt_length, 1)
        if self.ld_alpha is not None and not 0.0 <= self.ld_alpha <= 1.0:
            raise ConfigError("value out of range", where="ld_alpha", value=self.ld_alpha, allowed="0 to 1, or null")
        if self.sync_ref_model:
            self._check_sync()
        else:
            for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
                if getattr(self, name) != getattr(DPOConfig, name):
                    warnings.warn(f"{name} has no effect without sync_ref_model", UserWarning, stacklevel=3)
        if self.precompute_ref_log_probs and not self.reference_store:
            raise ConfigError(
                "precomputed values are kept in the reference store, which is switched off",
                where="precompute_ref_log_probs",
                value=True,
                remedy="drop reference_store: false, or precompute_ref_log_probs",
            )
        if self.precompute_ref_batch_size is not None:
            warnings.warn(
                "precompute_ref_batch_size has no effect: the reference pass packs rows under max_tokens_per_row",
                UserWarning,
                stacklevel=3,
            )
        self._check_reference(self.build_objective())
        super().__post_init__()

    def _check_reference(self, objective: Objective) -> None:
        """Refuse settings of a reference that no loss looks at."""
        if objective.needs_reference or objective.names == ("sft",):
            return
        for name in ("precompute_ref_log_probs", "sync_ref_model", "ref_adapter_name"):
            if getattr(self, name):
                raise ConfigError(
                    f"{', '.join(objective.names)} has no reference",
                    where=name,
                    value=getattr(self, name),
                    remedy=f"leave {name} out",
                )

    def _check_sync(self) -> None:
        if self.precompute_ref_log_probs:
            raise ConfigError(
                "a reference that follows the policy cannot be precomputed",
                where="precompute_ref_log_probs",
                value=True,
                remedy="turn off precompute_ref_log_probs or sync_ref_model",
            )
        if self.ref_adapter_name is not None:
            raise ConfigError(
                "a reference that follows the policy begins as the policy itself",
                where="ref_adapter_name",
                value=self.ref_adapter_name,
                remedy="leave out ref_adapter_name or sync_ref_model",
            )
        if not 0.0 < self.ref_model_mixup_alpha <= 1.0:
            raise ConfigError(
                "value out of range",
                where="ref_model_mixup_alpha",
                value=self.ref_model_mixup_alpha,
                allowed="more than 0, up to 1",
            )
        _at_least("ref_model_sync_steps", self.ref_model_sync_steps, 1)

    def build_objective(self) -> Objective:
        """The objective that these settings describe; refuses contradictory ones."""
        return build_objective(
            self.loss_type,
            loss_weights=self.loss_weights,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            f_divergence_type=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
            discopop_tau=self.discopop_tau,
            ipo_normalize=self.ipo_normalize,
            dpop_lambda=self.dpop_lambda,
            odpo_alpha=self.odpo_alpha,
            odpo_transform=self.odpo_transform,
            bco_running_delta=self.bco_running_delta,
            sft_average=self.sft_average,
            use_weighting=self.use_weighting,
            ld_alpha=self.ld_alpha,
        )


@dataclass
class SFTConfig(PackedConfig):
    """Settings of :class:`~preftune.SFTTrainer`.

    Attributes:
        dataset_text_field: Column that holds plain text.
        completion_only_loss: Train on completions only; by default where the data have prompt and completion.
        assistant_only_loss: Train on all assistant turns of conversational data.
        eos_token: End-of-sequence token, where the tokenizer's is not to be used.
        chat_template_path: File with a chat template, or a tokenizer folder to take it from.
        shuffle_dataset: Shuffle before training.
        loss_type: ``nll``, or ``dft`` which weights every token by its own probability (2508.05629).
        packing: Accepted from TRL; rows are always packed without mixing examples.
        packing_strategy: Accepted from TRL; ``wrapped`` cuts examples apart and is refused.
        eval_packing: Accepted from TRL.
        dataset_kwargs: ``{"skip_prepare_dataset": true}`` takes the data as tokenised.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]
        *PackedConfig._VALID_DICT_FIELDS,
        "dataset_kwargs",
    ]

    learning_rate: float = 2e-5
    dataset_text_field: str = "text"
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    eos_token: str | None = None
    chat_template_path: str | None = None
    shuffle_dataset: bool = False
    loss_type: str = "nll"
    packing: bool = False
    packing_strategy: str = "bfd"
    eval_packing: bool | None = None
    dataset_kwargs: dict[str, Any] | str | None = None

    def __post_init__(self) -> None:
        if self.loss_type == "chunked_nll":
            warnings.warn("loss_type chunked_nll is the former name of nll", FutureWarning, stacklevel=3)
            self.loss_type = "nll"
        _choice("loss_type", self.loss_type, ("nll", "dft"))
        if self.generation_steps:
            raise ConfigError(
                "samples are drawn by the preference trainers alone",
                where="generation_steps",
                value=self.generation_steps,
                remedy="leave it out and sample from the saved model",
            )
        if self.packing and self.packing_strategy not in ("bfd", "ffd"):
            raise ConfigError(
                "preftune packs whole examples and never cuts one apart",
                where="packing_strategy",
                value=self.packing_strategy,
                allowed="bfd, ffd",
                remedy="drop packing_strategy",
            )
        if self.eval_packing is not None:
            warnings.warn(
                "eval_packing has no effect: rows are packed without mixing examples", UserWarning, stacklevel=3
            )
        if isinstance(self.dataset_kwargs, dict) and set(self.dataset_kwargs) - {"skip_prepare_dataset"}:
            # Older recipes carry add_special_tokens and append_concat_token here, which TRL no longer reads either.
            unread = ", ".join(sorted(set(self.dataset_kwargs) - {"skip_prepare_dataset"}))
            warnings.warn(f"dataset_kwargs: {unread} has no effect", UserWarning, stacklevel=3)
        super().__post_init__()
