"""TRL's GRPO training with any loss of the family: `PMPOTrainer` and `PMPOConfig` where `GRPOTrainer` and `GRPOConfig` stood."""

from pmpo_kernels.integrations.trl.config import PMPOConfig
from pmpo_kernels.integrations.trl.trainer import PMPOTrainer

__all__ = ["PMPOConfig", "PMPOTrainer"]
