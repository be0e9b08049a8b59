"""Training-time alignment: a LoRA of the generator that raises a value, stitched or clean."""

from .config import TrainingConfig
from .dpo import DPOConfig, DPOTrainer
from .draft import DraftConfig, DraftTrainer
from .nft import NFTConfig, NFTTrainer
from .prompts import PromptDataset
from .reward_fn import as_reward_fn
from .rewards import CleanReward
from .trainer import Trainer

__all__ = [
    "CleanReward", "DPOConfig", "DPOTrainer", "DraftConfig", "DraftTrainer", "NFTConfig", "NFTTrainer", "PromptDataset",
    "Trainer", "TrainingConfig", "as_reward_fn",
]  # fmt: skip
