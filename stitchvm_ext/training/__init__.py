"""Training-time alignment: a LoRA of the generator that raises a value, stitched or clean."""

from .config import TrainingConfig
from .nft import NFTConfig, NFTTrainer
from .prompts import PromptDataset
from .reward_fn import as_reward_fn
from .rewards import CleanReward
from .trainer import Trainer

__all__ = ["CleanReward", "NFTConfig", "NFTTrainer", "PromptDataset", "Trainer", "TrainingConfig", "as_reward_fn"]
