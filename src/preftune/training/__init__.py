"""Trainers and their settings."""

from preftune.training.config import DPOConfig, PackedConfig, SFTConfig
from preftune.training.dpo import DPOTrainer
from preftune.training.sft import SFTTrainer

__all__ = ["DPOConfig", "DPOTrainer", "PackedConfig", "SFTConfig", "SFTTrainer"]
