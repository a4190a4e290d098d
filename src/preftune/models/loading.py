"""Model, tokenizer, adapter and quantisation from settings, with every failure turned into one line and a remedy."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from preftune.config import ModelConfig
from preftune.errors import ConfigError, ModelError, SetupError
from preftune.files import parse_json
from preftune.models.explaining import explained
from preftune.models.locating import ADAPTER_FILE, located
from preftune.models.trust import TOKENIZER_FILES, is_commit, load_adapter, pinned

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")


@dataclass(frozen=True)
class Loaded:
    """What training starts from.

    Attributes:
        model: The policy; a ``PeftModel`` where the settings name a folder with an adapter.
        tokenizer: Its tokenizer, chat template set.
        ref_model: An explicit reference model, or ``None`` where the policy as loaded is the reference.
        peft_config: Adapter to add, or ``None``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ref_model: PreTrainedModel | None
    peft_config: PeftConfig | None


def load_model_and_tokenizer(
    config: ModelConfig, *, model_init_kwargs: Mapping[str, Any] | None = None, with_reference: bool = True
) -> Loaded:
    """Load everything that :class:`~preftune.config.ModelConfig` describes.

    Args:
        config: Which model, and how.
        model_init_kwargs: Further keywords for ``from_pretrained``; they win over the settings.
        with_reference: Load ``ref_model_name_or_path``, if it is set.

    Returns:
        Model, tokenizer, reference and adapter settings.

    Raises:
        ConfigError: If settings contradict each other.
        ModelError: If something cannot be found or read.
        SetupError: If a library is missing.
    """
    name = config.require_model()
    _check_folder(name, "model_name_or_path")
    tokenizer = load_tokenizer(config)
    peft_config = peft_config_from(config)
    adapter = _adapter_base(name, config.model_revision)
    if adapter is not None and peft_config is not None:
        raise ConfigError(
            "the model is an adapter already",
            where="use_peft",
            value=True,
            remedy=f"leave use_peft out to go on training it, or run preftune export {name} and train on the result",
        )
    if (config.load_in_4bit or config.load_in_8bit) and peft_config is None and adapter is None:
        field = "load_in_4bit" if config.load_in_4bit else "load_in_8bit"
        raise ConfigError("quantised weights cannot be trained", where=field, value=True, remedy="add --use_peft")
    keywords = _keywords(config, config.model_revision, model_init_kwargs)
    model = _load(name, keywords, "model_name_or_path", is_adapter=adapter is not None)
    reference = _load_reference(config, model_init_kwargs) if with_reference else None
    return Loaded(model, tokenizer, reference, peft_config)


def _load_reference(config: ModelConfig, model_init_kwargs: Mapping[str, Any] | None) -> PreTrainedModel | None:
    name, where = config.ref_model_name_or_path, "ref_model_name_or_path"
    if not name:
        return None
    _check_folder(name, where)
    keywords = _keywords(config, config.ref_model_revision, model_init_kwargs)
    is_adapter = _adapter_base(name, config.ref_model_revision, where) is not None
    return _load(name, keywords, where, is_adapter=is_adapter, trained=False)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer and give it the chat template of the settings.

    An adapter's folder without a tokenizer falls back to its base model's.

    Raises:
        ModelError: If there is none, or it cannot be read.
        ConfigError: If the chat template cannot be found or parsed.
    """
    from transformers import AutoTokenizer

    name = config.tokenizer_name_or_path or config.require_model()
    where = "tokenizer_name_or_path" if config.tokenizer_name_or_path else "model_name_or_path"
    revision = config.model_revision
    base = None if config.tokenizer_name_or_path else _adapter_base(name, revision)
    if base and Path(name).is_dir() and not any(Path(name).glob("tokenizer*")):
        name, revision = located(base, Path(name)), "main"
    if is_commit(revision) and name != config.model_name_or_path:
        # A commit of the model's repository means nothing in another one.
        revision = "main"
    keywords = {"revision": revision, "trust_remote_code": config.trust_remote_code}
    with explained(name, where, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, **pinned(name, keywords, where=where, files=TOKENIZER_FILES)
        )
    if config.chat_template:
        tokenizer.chat_template = read_chat_template(config.chat_template)
    return tokenizer


def read_chat_template(text_or_path: str) -> str:
    """Chat template from text, or from a file that holds one.

    Args:
        text_or_path: Jinja text, or the path of a file.

    Returns:
        The template, checked to be parseable in the sandbox that transformers renders it in.

    Raises:
        ConfigError: If the file is missing or the template is not valid Jinja.
    """
    looks_like_text = "{" in text_or_path or "\n" in text_or_path
    source = "chat_template"
    template = text_or_path
    if not looks_like_text:
        source = text_or_path
        try:
            template = Path(text_or_path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                "cannot read the chat template",
                where="chat_template",
                value=text_or_path,
                allowed="Jinja text, or the path of a UTF-8 file that holds it",
            ) from error
    _check_template(template, source)
    return template


def peft_config_from(config: ModelConfig) -> PeftConfig | None:
    """LoRA settings, or ``None`` without ``use_peft``.

    Raises:
        ConfigError: If PEFT refuses the combination.
    """
    if not config.use_peft:
        return None
    from peft import LoraConfig

    modules = config.lora_target_modules
    if isinstance(modules, str) and re.fullmatch(r"[\w.]+([,\s]+[\w.]+)*[,\s]*", modules):
        # Text is a regular expression for whole paths to PEFT; names alone mean every module that is called so.
        modules = re.findall(r"[\w.]+", modules)
    elif isinstance(modules, list):
        modules = [name for each in modules for name in re.findall(r"[^,\s]+", each)]
    keywords: dict[str, Any] = {
        "task_type": config.lora_task_type,
        "r": config.lora_r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": modules,
        "modules_to_save": config.lora_modules_to_save,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "bias": "none",
    }
    if config.lora_target_parameters is not None:
        keywords["target_parameters"] = config.lora_target_parameters
    try:
        return LoraConfig(**keywords)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(" ".join(str(error).split()), where="lora settings") from error


def quantization_config_from(config: ModelConfig) -> BitsAndBytesConfig | None:
    """Quantisation through bitsandbytes, or ``None`` where none is asked for.

    Raises:
        SetupError: If bitsandbytes is not installed.
    """
    if not (config.load_in_4bit or config.load_in_8bit):
        return None
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        field = "load_in_4bit" if config.load_in_4bit else "load_in_8bit"
        raise SetupError(
            "bitsandbytes is not installed", where=field, remedy="run pip install 'preftune[quantization]'"
        )
    from transformers import BitsAndBytesConfig

    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        # Dequantised products are computed in the type of the remaining weights.
        bnb_4bit_compute_dtype=None if config.dtype == "auto" else config.dtype,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_quant_storage=config.bnb_4bit_quant_storage,
    )


def _keywords(config: ModelConfig, revision: str, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    keywords: dict[str, Any] = {
        "revision": revision,
        "dtype": config.dtype,
        "trust_remote_code": config.trust_remote_code,
    }
    if config.attn_implementation is not None:
        keywords["attn_implementation"] = config.attn_implementation
    quantization = quantization_config_from(config)
    if quantization is not None:
        keywords["quantization_config"] = quantization
        # Quantised weights are placed while they are loaded: one whole copy for each process.
        keywords["device_map"] = {"": _own_device()}
    return keywords | dict(extra or {})


def _own_device() -> str:
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _load(
    name: str, keywords: dict[str, Any], where: str, *, is_adapter: bool, trained: bool = True
) -> PreTrainedModel:
    """Load a model, or an adapter on top of its base model."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel
    with explained(name, where, "adapter" if is_adapter else "model"):
        if is_adapter:
            model = load_adapter(name, keywords, trained=trained, where=where)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, **pinned(name, keywords, where=where))
    return model


def _adapter_base(name: str, revision: str, where: str = "model_name_or_path") -> str | None:
    """Name of the base model where ``name`` is an adapter, else ``None``."""
    from transformers.utils.peft_utils import find_adapter_config_file

    with explained(name, where, "model"):
        path = find_adapter_config_file(name, revision=revision)
        if path is None:
            return None
        base = parse_json(Path(path).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ModelError(
            "the adapter does not name its base model", where=str(path), remedy="add base_model_name_or_path to it"
        )
    return str(base)


def _check_template(template: str, source: str) -> None:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compile_template: Callable[[str], Any] = _compile_jinja_template
    try:
        compile_template(template)
    except TemplateSyntaxError as error:
        raise ConfigError(f"not a valid Jinja template ({error.message})", where=f"{source}:{error.lineno}") from error
    except ImportError as error:
        raise SetupError(str(error), where="chat_template", remedy="run pip install -U jinja2") from error


def _check_folder(name: str, where: str) -> None:
    """Say what is wrong with a path before a loader says something else about it."""
    folder = Path(name).expanduser()
    if folder.is_file():
        raise ModelError("a file, not a folder", where=where, value=name, remedy=f"did you mean {folder.parent}?")
    if not folder.is_dir() or (folder / "config.json").exists() or (folder / ADAPTER_FILE).exists():
        return
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    remedy = f"did you mean {checkpoints[-1]}?" if checkpoints else "give the folder that save_pretrained wrote"
    raise ModelError("a folder without config.json", where=where, value=name, remedy=remedy)
