"""Old and foreign names of settings, and what became of them: one table.

The names are those of alignment-handbook's recipes (2023 to 2025), of TRL's configs and command line (0.7 to 1.16), and
of ``transformers.TrainingArguments`` before version 5. A name that is a field today is never looked up here.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import yaml

from preftune.config.coercion import Mismatch, coerce
from preftune.config.yaml_text import read_yaml
from preftune.errors import ConfigError

_DROP: Final = object()
_Config = TypeVar("_Config", bound=type[Any])


@dataclass(frozen=True)
class Legacy:
    """What became of one name.

    Attributes:
        old: The name as recipes write it.
        new: The name of today, or ``None`` where there is nothing to set any more.
        sentence: Why, in a few words; for a refused name, what to do instead.
        convert: Old value to new value; ``_DROP`` where the old value asked for nothing.
        inert: Values of a refused name that asked for nothing, so that it can be passed over.
        refused: Whether any other value is an error.
        boolean: Whether the bare flag means true.
    """

    old: str
    new: str | None
    sentence: str
    convert: Callable[[Any], Any] = lambda value: value
    inert: tuple[Any, ...] = ()
    refused: bool = False
    boolean: bool = False


@dataclass(frozen=True)
class Translation:
    """Outcome of a look-up: the new name and value (``name`` is ``None`` where nothing is left), and what to say."""

    name: str | None
    value: Any
    note: str


def _ratio(value: Any) -> float:
    ratio = coerce(value, float, text=True)
    if not 0 <= ratio < 1:
        raise Mismatch("not in [0, 1)", "set warmup_steps instead")
    return float(ratio)


def _true_means(word: str) -> Callable[[Any], Any]:
    return lambda value: word if coerce(value, bool) else _DROP


def _single(value: Any) -> Any:
    values = coerce(value, list[str], text=True)
    if len(values) != 1:
        raise Mismatch("more than one configuration", "use dataset_mixture, where each dataset names its own")
    return values[0]


def _side(value: Any) -> Any:
    if value is None:
        return _DROP
    try:
        return {"left": "keep_end", "right": "keep_start"}[str(value)]
    except KeyError:
        raise Mismatch("not left or right") from None


def _in_mapping(key: str) -> Callable[[Any], Any]:
    return lambda value: _DROP if value is None else {key: coerce(value, bool)}


def _renamed(old: str, new: str, why: str, convert: Callable[[Any], Any] = lambda value: value) -> Legacy:
    return Legacy(old, new, why, convert)


def _switch(old: str, new: str, word: str, why: str) -> Legacy:
    return Legacy(old, new, why, _true_means(word), boolean=True)


def _dropped(old: str, why: str, *, boolean: bool = False) -> Legacy:
    return Legacy(old, None, why, boolean=boolean)


def _refused(old: str, remedy: str, inert: tuple[Any, ...] = (None, False)) -> Legacy:
    return Legacy(old, None, remedy, inert=inert, refused=True, boolean=False in inert)


_ROWS: Final = (
    # Model and tokenizer.
    _renamed("torch_dtype", "dtype", "transformers 5 calls it dtype"),
    _switch(
        "use_flash_attention_2", "attn_implementation", "flash_attention_2", "it is one of several implementations"
    ),
    _renamed("chat_template_path", "chat_template", "a path to a .jinja file may stand there"),
    _renamed("base_model", "model_name_or_path", "TRL's name"),
    _renamed("lora_rank", "lora_r", "PEFT's name"),
    _renamed("micro_batch_size", "per_device_train_batch_size", "transformers' name"),
    _renamed("sequence_len", "max_length", "TRL's name"),
    _renamed("cutoff_len", "max_length", "TRL's name"),
    _renamed("num_epochs", "num_train_epochs", "transformers' name"),
    _renamed("lr", "learning_rate", "transformers' name"),
    _renamed("tokenizer_name", "tokenizer_name_or_path", "the same for every verb"),
    _renamed("ref_model", "ref_model_name_or_path", "named like model_name_or_path"),
    _refused("model_code_revision", "pin model_revision, which also pins the code"),
    _refused("base_model_revision", "the adapter's own configuration names its base model's revision"),
    _refused("ref_model_init_kwargs", "the reference is loaded like the policy; use model_init_kwargs"),
    _dropped("is_encoder_decoder", "only decoder models are trained"),
    _dropped("base_model_attribute_name", "it is found in the model"),
    # Data.
    _renamed("preprocessing_num_workers", "dataset_num_proc", "TRL's name"),
    _renamed("dataset_configs", "dataset_config", "one configuration; several belong into dataset_mixture", _single),
    _renamed("text_column", "dataset_text_field", "TRL's name"),
    _renamed("max_seq_length", "max_length", "TRL's name since 0.16"),
    _renamed("truncation_side", "truncation_mode", "which end is kept", _side),
    _dropped("auto_insert_empty_system_msg", "messages are rendered as they are; none is inserted", boolean=True),
    _dropped("label_pad_token_id", "padding never reaches the loss"),
    _dropped("padding_value", "padding never reaches the loss"),
    _dropped("use_logits_to_keep", "logits are only ever computed where they are needed", boolean=True),
    _dropped("use_num_logits_to_keep", "logits are only ever computed where they are needed", boolean=True),
    _dropped("dataset_batch_size", "rows are tokenised one by one"),
    _refused("max_completion_length", "max_length bounds prompt and completion together", (None,)),
    _refused("max_target_length", "max_length bounds prompt and completion together", (None,)),
    Legacy("streaming", "dataset_streaming", "TRL's name", boolean=True),
    _refused("sanity_check", "use max_steps, or --dry_run"),
    # Objectives.
    _refused("rpo_alpha", "write loss_type: [sigmoid, sft] and loss_weights: [1.0, alpha]", (None,)),
    _refused("reference_free", "choose a reference-free loss_type"),
    _refused("force_use_ref_model", "name the reference with ref_model_name_or_path"),
    _refused("generate_during_eval", "generate with the saved model afterwards"),
    _refused("log_completions", "generate with the saved model afterwards"),
    # Trainer: renamed.
    _renamed("warmup_ratio", "warmup_steps", "a value below 1 is a share of all steps", _ratio),
    _renamed("evaluation_strategy", "eval_strategy", "transformers 5 calls it so"),
    _renamed("hub_model_revision", "hub_revision", "transformers 5 calls it so"),
    _renamed("push_to_hub_revision", "push_to_hub", "hub_revision names the branch"),
    _renamed("push_to_hub_model_id", "hub_model_id", "transformers 5 calls it so"),
    _renamed("push_to_hub_token", "hub_token", "transformers 5 calls it so"),
    _renamed("per_gpu_train_batch_size", "per_device_train_batch_size", "transformers 5 calls it so"),
    _renamed("per_gpu_eval_batch_size", "per_device_eval_batch_size", "transformers 5 calls it so"),
    Legacy("no_cuda", "use_cpu", "transformers 5 calls it so", boolean=True),
    _switch("group_by_length", "train_sampling_strategy", "group_by_length", "one of several strategies"),
    _switch("adafactor", "optim", "adafactor", "one of several optimizers"),
    Legacy(
        "gradient_checkpointing_use_reentrant",
        "gradient_checkpointing_kwargs",
        "one of its keys",
        _in_mapping("use_reentrant"),
        boolean=True,
    ),
    Legacy("split_batches", "accelerator_config", "one of its keys", _in_mapping("split_batches"), boolean=True),
    Legacy("dispatch_batches", "accelerator_config", "one of its keys", _in_mapping("dispatch_batches"), boolean=True),
    # Trainer: gone.
    _dropped(
        "overwrite_output_dir", "checkpoints that lie there are only used with resume_from_checkpoint", boolean=True
    ),
    _dropped("logging_dir", "trackers choose it; for TensorBoard set TENSORBOARD_LOGGING_DIR"),
    _dropped("save_safetensors", "weights are always saved as safetensors", boolean=True),
    _dropped("fp16_backend", "torch's own mixed precision is the only one"),
    _dropped("half_precision_backend", "torch's own mixed precision is the only one"),
    _dropped("fp16_opt_level", "torch's own mixed precision is the only one"),
    _dropped("use_mps_device", "the device is found", boolean=True),
    _dropped("ray_scope", "it never concerned a single run"),
    _dropped("include_tokens_per_second", "num_input_tokens_seen tells it", boolean=True),
    _refused("include_inputs_for_metrics", "write include_for_metrics: [inputs]"),
    _refused("use_ipex", "torch_compile covers it"),
    _refused("jit_mode_eval", "torch_compile covers it"),
    _refused("past_index", "no decoder model uses it", (None, -1)),
    _refused("mp_parameters", "write an accelerate configuration", (None, "")),
    _refused("torchdynamo", "set torch_compile_backend", (None,)),
    _refused("tpu_num_cores", "write an accelerate configuration", (None,)),
    _refused("tpu_metrics_debug", "write debug: tpu_metrics_debug"),
    _refused("fsdp_min_num_params", "write fsdp_config: {min_num_params: N}", (None, 0)),
    _refused(
        "fsdp_transformer_layer_cls_to_wrap", "write fsdp_config: {transformer_layer_cls_to_wrap: [NAME]}", (None,)
    ),
    _refused("push_to_hub_organization", "write hub_model_id: organization/name", (None,)),
    _refused(
        "num_processes", "start with preftune VERB --num_processes N --config FILE, or accelerate launch", (None, 1)
    ),
    _refused(
        "accelerate_config", "start with accelerate launch --config_file CONFIG -m preftune VERB --config FILE", (None,)
    ),
    _refused("env", "set environment variables in the shell; a settings file does not change them", (None, {})),
)

TABLE: Final[dict[str, Legacy]] = {row.old: row for row in _ROWS}


def translate(name: str, value: Any, where: str) -> Translation | None:
    """Look an unknown name up.

    Args:
        name: The name as written, with underscores.
        value: Its value, text where it came from the command line.
        where: File and line, or the flag.

    Returns:
        What became of it, or ``None`` if this is not an old name either.

    Raises:
        ConfigError: If the name stands for something that is refused, or its value cannot be converted.
    """
    row = TABLE.get(name)
    if row is None:
        return None
    plain = _read_text(value)
    shown = str(plain) if len(str(plain)) <= 40 else "..."
    if row.refused:
        # `in` would take 0 for False.
        if any(plain is item or (type(plain) is type(item) and plain == item) for item in row.inert):
            return Translation(None, None, f"{name}: {shown} asks for nothing and was passed over")
        raise ConfigError(f"{name} is not supported", where=where, value=plain, remedy=row.sentence)
    if row.new is None:
        return Translation(None, None, f"{name} was passed over: {row.sentence}")
    try:
        converted = row.convert(plain)
    except Mismatch as reason:
        raise ConfigError(f"{name}: {reason.why}", where=where, value=plain, remedy=reason.remedy) from reason
    if converted is _DROP:
        return Translation(None, None, f"{name}: {shown} asks for nothing and was passed over")
    told = f"{name} -> {row.new}" if converted == plain else f"{name}: {shown} -> {row.new}: {converted}"
    return Translation(row.new, converted, f"{told} ({row.sentence})")


def takes_old_names(config: _Config) -> _Config:
    """Let a settings class understand, in Python, the old names that the command line understands.

    What a name has become is set and told in a warning. A decorator for use above ``@dataclass``.
    """
    begin = config.__init__

    @functools.wraps(begin)
    def __init__(self: Any, *args: Any, **given: Any) -> None:
        known = {field.name for field in dataclasses.fields(config)}
        for name in [name for name in given if name not in known and name in TABLE]:
            found = translate(name, given[name], f"{type(self).__name__}({name})")
            if found is None or found.name not in {None, *known}:
                continue
            del given[name]
            if found.name is not None:
                if found.name in given:
                    raise ConfigError(f"{name} and {found.name} are one setting", where=type(self).__name__)
                given[found.name] = found.value
            warnings.warn(found.note, UserWarning, stacklevel=2)
        begin(self, *args, **given)

    config.__init__ = __init__
    return config


def _read_text(value: Any) -> Any:
    """Old names are met in files and as flags: bring both to YAML's reading."""
    if not isinstance(value, str):
        return value
    try:
        return read_yaml(value)
    except (yaml.YAMLError, ValueError):
        return value
