"""Settings of the gold standard."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class GoldStandardConfig:
    r"""
    What the gold standard is measured on, and how its models are made.

    Parameters:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the world, the weights, the order of batches and the attack.
        facts (`int`, *optional*, defaults to `24`):
            Invented facts of each kind.
        prose (`int`, *optional*, defaults to `300`):
            Plain sentences.
        vocab_size (`int`, *optional*, defaults to `2000`):
            Most tokens of the tokenizer.
        layers (`int`, *optional*, defaults to `4`):
            Layers of the models.
        width (`int`, *optional*, defaults to `128`):
            Their hidden size.
        steps (`int`, *optional*, defaults to `1000`):
            Steps for which the taught and the never-taught model are trained.
        batch_size (`int`, *optional*, defaults to `32`):
            Texts per step of theirs.
        learning_rate (`float`, *optional*, defaults to `3e-3`):
            Their largest learning rate (cosine schedule).
        elm (`dict[str, Any]`, *optional*):
            Fields of [`ElmConfig`] of the erasure.
        ascent (`dict[str, Any]`, *optional*):
            Fields of [`~trl.SFTConfig`] of gradient ascent.
        lora_rank (`int`, *optional*, defaults to `16`):
            Rank of the adapters of both, on all linear layers.
        relearning_steps (`list[int]`, *optional*):
            Steps of relearning after which the questions are asked; it ends with the last.
        relearning_learning_rate (`float`, *optional*, defaults to `5e-4`):
            Learning rate of relearning, constant.
        relearning_batch_size (`int`, *optional*, defaults to `16`):
            Texts per step of relearning.
    """

    seed: int = 0
    facts: int = 24
    prose: int = 300
    vocab_size: int = 2000
    layers: int = 4
    width: int = 128
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 3e-3
    elm: dict[str, Any] = field(
        default_factory=lambda: {
            "expert_steps": 60,
            "novice_steps": 60,
            "teacher_batch_size": 32,
            "eta": 2.0,
            "tau": 1.0,
            "top_k": 100,
            "plausibility": 0.01,
            "fact_share": 0.5,
            "retain_weight": 10.0,
            "consistency_weight": 0.0,
            "learning_rate": 2e-3,
            "max_steps": 100,
            "per_device_train_batch_size": 32,
        }
    )
    ascent: dict[str, Any] = field(
        default_factory=lambda: {"learning_rate": 1e-3, "max_steps": 40, "per_device_train_batch_size": 32}
    )
    lora_rank: int = 16
    relearning_steps: list[int] = field(default_factory=lambda: [5, 10, 20, 30, 40, 60, 80, 100, 120, 140, 160, 200])
    relearning_learning_rate: float = 5e-4
    relearning_batch_size: int = 16

    def __post_init__(self):
        if not self.relearning_steps or min(self.relearning_steps) < 1:
            raise ValueError(f"`relearning_steps` is {self.relearning_steps}: give steps of at least 1.")
        for name in ("steps", "batch_size", "relearning_batch_size", "layers", "width", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}: it must be at least 1.")
