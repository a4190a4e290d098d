"""Which model is tuned and how it is loaded: TRL's ``ModelConfig`` and what references and templates need beyond it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from preftune.errors import ConfigError


@dataclass
class ModelConfig:
    """Settings of the model, its tokenizer and its adapter.

    Attributes:
        model_name_or_path: Model to tune: Hub id or folder; a folder with an adapter continues that adapter.
        model_revision: Branch, tag or commit of a Hub model.
        tokenizer_name_or_path: Tokenizer, where it is not in the folder of the model.
        chat_template: Jinja template for conversations: text, or the path of a ``.jinja`` file.
        dtype: Type that the weights are loaded in.
        trust_remote_code: Run Python code that comes with the weights.
        attn_implementation: Attention of the padded path; the packed path brings its own.
        ref_model_name_or_path: Reference model, where it is not the model as loaded.
        ref_model_revision: Branch, tag or commit of the reference model.
        use_peft: Train a LoRA adapter instead of all weights.
        lora_r: Rank.
        lora_alpha: Scale; the update is multiplied by ``alpha / r``.
        lora_dropout: Dropout before the adapter, in [0, 1).
        lora_target_modules: Modules to adapt, or ``all-linear``; by default what PEFT knows of the architecture.
        lora_target_parameters: Parameters to adapt that are no modules, such as experts.
        lora_modules_to_save: Modules to train in full beside the adapter.
        lora_task_type: ``CAUSAL_LM``, the only one there is here.
        use_rslora: Scale by ``alpha / sqrt(r)``.
        use_dora: Learn magnitude and direction apart.
        load_in_8bit: Quantise the frozen weights to 8 bits; needs an adapter.
        load_in_4bit: Quantise the frozen weights to 4 bits; needs an adapter.
        bnb_4bit_quant_type: ``nf4`` or ``fp4``.
        use_bnb_nested_quant: Quantise the quantisation constants too.
        bnb_4bit_quant_storage: Type that packed 4-bit weights are stored in.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Model to tune: Hub id or folder."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a Hub model."})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer, where it is not in the folder of the model."}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "Jinja template for conversations: text, or the path of a .jinja file."}
    )
    dtype: str | None = field(
        default="float32",
        metadata={"help": "Type of the weights.", "choices": ("auto", "bfloat16", "float16", "float32")},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that comes with the weights."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of the padded path; the packed path brings its own."}
    )
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reference model, where it is not the model as loaded."}
    )
    ref_model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the reference model."})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: str | list[str] | None = field(
        default=None, metadata={"help": "Modules to adapt, or all-linear."}
    )
    lora_target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters to adapt that are no modules, such as experts."}
    )
    lora_modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train in full."})
    lora_task_type: str = field(default="CAUSAL_LM", metadata={"help": "Task.", "choices": ("CAUSAL_LM",)})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r)."})
    use_dora: bool = field(default=False, metadata={"help": "Learn magnitude and direction apart (DoRA)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the frozen weights to 8 bits."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the frozen weights to 4 bits."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "4-bit type.", "choices": ("nf4", "fp4")})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantise the quantisation constants too."})
    bnb_4bit_quant_storage: str | None = field(
        default=None, metadata={"help": "Type that 4-bit weights are stored in."}
    )

    def __post_init__(self) -> None:
        """Refuse values out of range and settings that would have no effect.

        Raises:
            ConfigError: Naming the field, the value, and what is allowed.
        """
        if self.load_in_8bit and self.load_in_4bit:
            raise ConfigError("both load_in_8bit and load_in_4bit are set", where="model", remedy="keep one of them")
        if self.lora_r < 1:
            raise ConfigError("out of range", where="lora_r", value=self.lora_r, allowed="1 or more")
        if self.lora_alpha <= 0:
            raise ConfigError("out of range", where="lora_alpha", value=self.lora_alpha, allowed="above 0")
        for name in ("model_name_or_path", "tokenizer_name_or_path", "ref_model_name_or_path", "chat_template"):
            value = getattr(self, name)
            if isinstance(value, str) and value.startswith("~"):
                setattr(self, name, os.path.expanduser(value))
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError("out of range", where="lora_dropout", value=self.lora_dropout, allowed="[0, 1)")
        if isinstance(self.lora_target_modules, list) and len(self.lora_target_modules) == 1:
            # PEFT takes `all-linear` and regular expressions as text only.
            self.lora_target_modules = self.lora_target_modules[0]

    def require_model(self) -> str:
        """The model's name.

        Raises:
            ConfigError: If none is set.
        """
        if not self.model_name_or_path:
            raise ConfigError("no model is named", where="model_name_or_path", remedy="set --model_name_or_path")
        return self.model_name_or_path
