"""What every trainer does to its model and data before training."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from preftune.data import DataOptions
from preftune.data.batches import as_table
from preftune.errors import ConfigError, ModelError, flat
from preftune.models.compiled import COMPILE_BACKENDS, CompiledLayers
from preftune.models.loading import read_chat_template
from preftune.models.trust import TOKENIZER_FILES, load_adapter, pinned
from preftune.training.adapters import as_peft_model
from preftune.training.config import PackedConfig


def default_output_dir(model: Any, suffix: str) -> str:
    """Folder name made of the model's name and the method, as TRL makes it."""
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
    return f"{str(name).rstrip('/').split('/')[-1]}-{suffix}"


def prepared_train(dataset: Any, args: PackedConfig, prepare: Callable[[Any], Any]) -> Any:
    """Prepare training data; of a stream, as many rows as the run visits.

    A stream is visited in its own order, never shuffled, as in TRL; ``args`` is changed to say so. Without
    ``max_steps`` it is read to its end. With them it is read until enough rows are left after those that cannot be
    used; what was read is then prepared again as a whole, so that the report tells of all of it.
    """
    import datasets

    if not isinstance(dataset, datasets.IterableDataset):
        return prepare(dataset)
    args.train_sampling_strategy = "sequential"
    if args.max_steps <= 0:
        return prepare(dataset)
    visited = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows: list[Any] = []
    stream, block = iter(dataset), visited + max(visited // 4, 16)
    while True:
        more = list(islice(stream, block))
        rows += more
        prepared = prepare(as_table(rows))
        if len(prepared) >= visited or len(more) < block:
            return prepared
        block = len(rows)


def load(model: Any, tokenizer: Any, args: PackedConfig, quantization_config: Any) -> tuple[Any, Any]:
    """Load model and tokenizer where they are given by name, and make them agree on the padding token."""
    revision = None
    if isinstance(model, str):
        # A JSON string has been parsed by now.
        kwargs = init_kwargs(args)
        if quantization_config is not None:
            if "quantization_config" in kwargs:
                raise ConfigError("quantization_config is given twice", where="model_init_kwargs")
            kwargs["quantization_config"] = quantization_config
        revision = kwargs.get("revision")
        kwargs.setdefault("trust_remote_code", args.trust_remote_code)
        model = from_name(model, args, kwargs)
    else:
        if args.model_init_kwargs is not None:
            warnings.warn(
                "model_init_kwargs has no effect on a model that is loaded already", UserWarning, stacklevel=4
            )
        if quantization_config is not None:
            raise ConfigError(
                "quantization_config has no effect on a model that is loaded already",
                where="quantization_config",
                remedy="pass the model by name",
            )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            "encoder-decoder models are not supported",
            where="model",
            value=type(model).__name__,
            remedy="use a causal language model",
        )
    if tokenizer is None:
        tokenizer = tokenizer_for(model, revision, args)
    if not hasattr(tokenizer, "encode") or hasattr(tokenizer, "tokenizer"):
        raise ModelError(
            "processing_class is no tokenizer; vision-language processors are not supported",
            where="processing_class",
            value=type(tokenizer).__name__,
        )
    if args.pad_token is not None:
        if args.pad_token not in tokenizer.get_vocab():
            raise ConfigError("no such token in the vocabulary", where="pad_token", value=args.pad_token)
        tokenizer.pad_token = args.pad_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if args.chat_template is not None:
        tokenizer.chat_template = read_chat_template(args.chat_template)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def use_template_and_eos(tokenizer: Any, chat_template_path: str | None, eos_token: str | None) -> None:
    """Give a tokenizer another chat template and another end-of-sequence token, where SFT settings name them.

    Args:
        tokenizer: The tokenizer.
        chat_template_path: File with a chat template, or a tokenizer folder to take it from, with the tokens that it
            is made of and its end of sequence.
        eos_token: A token of the vocabulary.

    Raises:
        ConfigError: There is no such file, tokenizer or token.
    """
    if eos_token is not None and eos_token not in tokenizer.get_vocab():
        raise ConfigError("no such token in the vocabulary", where="eos_token", value=eos_token)
    if chat_template_path is not None:
        path = Path(chat_template_path)
        if path.suffix in (".jinja", ".j2"):
            if not path.is_file():
                raise ConfigError("no such file", where="chat_template_path", value=str(path))
            tokenizer.chat_template = path.read_text()
        else:
            source = _tokenizer_at(path)
            tokenizer.chat_template = source.chat_template
            known = tokenizer.get_vocab()
            tokenizer.add_tokens([each for each in source.added_tokens_decoder.values() if each.content not in known])
            tokenizer.eos_token = source.eos_token
    if eos_token is not None:
        tokenizer.eos_token = eos_token


def align_tokens(model: Any, tokenizer: Any) -> None:
    """Let the model end where its tokenizer does; training does so too, and a model may be saved before."""
    from transformers.trainer_utils import align_special_tokens

    align_special_tokens(model, tokenizer)


def make_room(model: Any, tokenizer: Any) -> None:
    """Give a model embeddings for tokens that its tokenizer has got, in multiples of 64 as TRL does.

    Raises:
        ConfigError: They would have to be trained beside an adapter.
    """
    if len(tokenizer) <= model.get_input_embeddings().weight.shape[0]:
        return
    if hasattr(model, "peft_config"):
        raise ConfigError(
            "brings tokens that the model has no embeddings for, which an adapter does not train",
            where="chat_template_path",
            remedy="extend the model first (model.resize_token_embeddings), or name a .jinja file of its own tokens",
        )
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)


def _tokenizer_at(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise ConfigError(
            "no tokenizer to take a chat template from", where="chat_template_path", value=str(folder)
        ) from error


def compiled_layers(model: nn.Module, args: PackedConfig, accelerator: Any) -> CompiledLayers | None:
    """Compile the model's layers where ``torch_compile`` or accelerate's own configuration asks for it."""
    from accelerate.utils import DynamoBackend

    plugin = accelerator.state.dynamo_plugin
    backend, mode = plugin.backend.value.lower(), plugin.mode
    # accelerate would compile the model as a whole, whose forward is entered anew for every row.
    plugin.backend = DynamoBackend.NO
    if args.torch_compile and args.torch_compile_backend:
        backend, mode = args.torch_compile_backend, args.torch_compile_mode
    if backend == "no":
        return None
    if backend not in COMPILE_BACKENDS:
        allowed = ", ".join(COMPILE_BACKENDS)
        raise ConfigError("does not suit packed rows", where="dynamo_backend", value=backend, allowed=allowed)
    return CompiledLayers(model, backend, mode)


def init_kwargs(args: PackedConfig) -> dict[str, Any]:
    """``model_init_kwargs`` as a mapping of its own."""
    given = args.model_init_kwargs
    if isinstance(given, str):
        raise ConfigError("not a mapping", where="model_init_kwargs", value=given, allowed="a JSON object")
    return dict(given or {})


def from_name(name: str, args: PackedConfig, kwargs: dict[str, Any]) -> Any:
    """Load a causal language model by name or path, in fp32 unless another dtype is asked for."""
    from transformers import AutoModelForCausalLM

    dtype = kwargs.get("dtype", "float32")
    if isinstance(dtype, str) and dtype != "auto":
        if dtype not in ("bfloat16", "float16", "float32"):
            raise ConfigError("unknown dtype", where="dtype", value=dtype, allowed="auto, bfloat16, float16, float32")
        dtype = getattr(torch, dtype)
    kwargs["dtype"] = dtype
    if "device_map" not in kwargs and args.device.type == "cuda" and args.world_size == 1:
        kwargs["device_map"] = {"": args.device}
    try:
        if (Path(name) / "adapter_config.json").is_file():
            # transformers would put the adapter on frozen, and the base model would be trained under it.
            return load_adapter(name, kwargs, trained=True)
        return AutoModelForCausalLM.from_pretrained(name, **pinned(name, kwargs))
    except OSError as error:
        raise ModelError("the model cannot be loaded", where=name, remedy=_first_line(error)) from error


def tokenizer_for(model: Any, revision: str | None, args: PackedConfig) -> Any:
    """The tokenizer that belongs to a model."""
    from transformers import AutoTokenizer

    name = model.config._name_or_path
    try:
        keywords = {"revision": revision, "trust_remote_code": args.trust_remote_code}
        return AutoTokenizer.from_pretrained(name, **pinned(name, keywords, files=TOKENIZER_FILES))
    except ModelError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(
            "the model's tokenizer cannot be loaded",
            where=name or type(model).__name__,
            remedy=f"pass processing_class; {_first_line(error)}",
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


def wrap_peft(model: Any, peft_config: Any, args: PackedConfig) -> Any:
    """Put an adapter on the model where one is asked for."""
    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    model = as_peft_model(model)
    if peft_config is not None:
        from peft import PeftConfig, PeftModel, get_peft_model

        if not isinstance(peft_config, PeftConfig):
            raise ConfigError(
                "peft_config is no PEFT configuration",
                where="peft_config",
                value=type(peft_config).__name__,
                allowed="a peft.PeftConfig such as LoraConfig",
            )
        if isinstance(model, PeftModel):
            raise ConfigError(
                "the model already carries an adapter",
                where="peft_config",
                remedy="leave peft_config out to go on training that adapter, or merge it first",
            )
        try:
            model = get_peft_model(model, peft_config)
        except ValueError as error:
            remedy = 'see model.named_modules() for the names; several are a list, such as ["q_proj", "v_proj"]'
            raise ConfigError(flat(error), where="peft_config", remedy=remedy) from error
    if any(getattr(each, "is_prompt_learning", False) for each in getattr(model, "peft_config", {}).values()):
        raise ModelError(
            "prompt learning is not supported: it puts virtual tokens before every sequence",
            where="peft_config" if peft_config is not None else "model",
            remedy="train a LoRA adapter",
        )
    if hasattr(model, "peft_config") and args.gradient_checkpointing:
        model.enable_input_require_grads()
    if quantized:
        # As the QLoRA authors advise; DoRA's magnitudes need more digits than half precision has.
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
        for module in model.modules():
            # On processors with bf16 instructions, bitsandbytes turns 4-bit weights for good into a layout without
            # gradient, the first time they run in evaluation mode.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return model


#: Names under which layers keep a probability of leaving something out.
_DROPOUT = re.compile(r"dropout|pdrop|layerdrop|drop_path")


def disable_dropout(*models: nn.Module | None) -> None:
    """Switch off every dropout of some models, those that attention layers keep as plain numbers included."""
    for module in (module for model in models if model is not None for module in model.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and _DROPOUT.search(name):
                setattr(module, name, 0.0)


def data_options(args: PackedConfig, **extra: Any) -> DataOptions:
    """The data settings of a trainer's configuration."""
    return DataOptions(
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,  # type: ignore[arg-type]
        on_bad_rows=args.on_bad_rows,  # type: ignore[arg-type]
        dataset_format=args.dataset_format,
        append_eos=args.append_eos,
        num_proc=args.dataset_num_proc,
        worker_timeout=args.worker_timeout,
        quarantine_path=args.quarantine_path,
        max_dropped_share=args.max_dropped_share,
        data_cache=args.data_cache,
        transcripts=args.transcripts,  # type: ignore[arg-type]
        plain_text=args.plain_text,  # type: ignore[arg-type]
        environment_turns=args.environment_turns,  # type: ignore[arg-type]
        warn=True,
        **extra,
    )


def add_tags(model: Any, tags: Sequence[str]) -> None:
    """Mark the model card."""
    if hasattr(model, "add_model_tags"):
        model.add_model_tags(list(tags))
