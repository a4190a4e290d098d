"""Settings of supervised fine-tuning: TRL's fields with TRL's defaults."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from preftune.config.legacy import takes_old_names
from preftune.errors import ConfigError
from preftune.training.config import PackedConfig, check_choice


@takes_old_names
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
        check_choice("loss_type", self.loss_type, ("nll", "dft"))
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
