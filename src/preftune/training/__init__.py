"""Trainers and their settings."""

from preftune.training.config import DPOConfig, PackedConfig, SFTConfig
from preftune.training.dpo import DPOTrainer
from preftune.training.kto import KTOTrainer
from preftune.training.kto_config import KTOConfig
from preftune.training.reference_free import CPOTrainer, ORPOTrainer
from preftune.training.reference_free_config import CPOConfig, ORPOConfig
from preftune.training.sft import SFTTrainer

__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "ORPOConfig",
    "ORPOTrainer",
    "PackedConfig",
    "SFTConfig",
    "SFTTrainer",
]
