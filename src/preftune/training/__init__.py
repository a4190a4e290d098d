"""Trainers and their settings."""

from preftune.training.config import PackedConfig
from preftune.training.dpo_config import DPOConfig
from preftune.training.kto_config import KTOConfig
from preftune.training.reference_free_config import CPOConfig, ORPOConfig
from preftune.training.sft_config import SFTConfig
from preftune.training.trainers import CPOTrainer, DPOTrainer, KTOTrainer, ORPOTrainer, SFTTrainer

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
