"""The four models of the gold standard: taught, never taught, erased, and erased by plain gradient ascent."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from transformers.trainer_utils import set_seed
from transformers.utils import logging
from trl import SFTConfig

from ...checksums import first_damage, folder_checksums, read_object, sealed, unsealed
from ...data.collator import ElmDataCollator
from ...data.dataset import ConceptSources, build_erasure_dataset
from ...data.given import Source
from ...data.invented import CONCEPT, InventedWorld, invented_world
from ...files import discard, replacing, write_json
from ...methods.base import ErasureTrainer
from ...methods.elm import ElmConfig, ElmTrainer
from ..report import PACKAGES, dataset_info
from .config import GoldStandardConfig
from .training import GradientAscentTrainer, fine_tune, train_tokenizer


logger = logging.get_logger(__name__)
MODELS = ("taught", "never-taught", "erased", "gradient-ascent")
# Longer than any text of the invented world, in tokens.
_MAX_LENGTH = 64


class GoldModels:
    """The world, the tokenizer and the models, each trained once and kept in a folder named after all it depends on.

    Args:
        config ([`GoldStandardConfig`]): Settings.
        cache_dir (`str` or `Path`): Where tokenizer and models are kept.
    """

    def __init__(self, config: GoldStandardConfig, cache_dir: str | Path):
        self.config = config
        self.world: InventedWorld = invented_world(config.facts, config.prose, seed=config.seed)
        self._cache_dir = Path(cache_dir)
        # Folders whose bytes were read once.
        self._whole: set[Path] = set()
        # Both worlds' texts, so that both models read with one tokenizer.
        everything = self.world.texts(taught=True) + self.world.instead
        self._texts = dataset_info([*everything, *self.world.forget["novice"], *self.world.held_out_prose])
        folder = self._cached(
            "tokenizer", {}, lambda path: train_tokenizer(everything, config.vocab_size).save_pretrained(path)
        )
        self.processing_class: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(folder)

    def load(self, name: str) -> PreTrainedModel:
        """A model of `MODELS`, trained now unless it was before."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return LlamaForCausalLM.from_pretrained(self.prepare(name)).to(device).eval()

    def prepare(self, name: str) -> str:
        """The folder of a model of `MODELS`, trained now unless it was before."""
        methods = {"erased": self.config.elm, "gradient-ascent": self.config.ascent}
        settings: dict[str, Any] = {}
        if name in methods:
            settings = {"method": methods[name], "lora_rank": self.config.lora_rank}
        return str(self._cached(name, settings, lambda path: self._make(name).save_pretrained(path)))

    def identity(self) -> dict[str, Any]:
        """Everything the results depend on, as JSON holds it."""
        return json.loads(json.dumps(self._shared() | asdict(self.config)))

    def _make(self, name: str) -> PreTrainedModel:
        set_seed(self.config.seed)  # of new weights and adapters
        if name in ("taught", "never-taught"):
            return self._train(self.world.texts(taught=name == "taught"))
        if name in MODELS:
            return self._erase(name)
        raise ValueError(f"There is no model {name!r}; use one of: {', '.join(MODELS)}.")

    def _train(self, texts: Sequence[str]) -> PreTrainedModel:
        config = self.config
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(self.processing_class),
                hidden_size=config.width,
                intermediate_size=2 * config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=4 * _MAX_LENGTH,
                tie_word_embeddings=True,
                pad_token_id=self.processing_class.pad_token_id,
                bos_token_id=None,
                eos_token_id=self.processing_class.eos_token_id,
            )
        )
        fine_tune(
            model, self.processing_class, texts, steps=config.steps, batch_size=config.batch_size,
            learning_rate=config.learning_rate, schedule="cosine", warmup_steps=config.steps // 20, seed=config.seed,
        )  # fmt: skip
        return model

    def _erase(self, name: str) -> PreTrainedModel:
        with tempfile.TemporaryDirectory() as folder:
            shared: dict[str, Any] = {
                "output_dir": folder,
                "seed": self.config.seed,
                "max_length": _MAX_LENGTH,
                "save_strategy": "no",
                "report_to": "none",
                "bf16": False,
                "activation_checkpointing": False,
                "disable_tqdm": True,
                "logging_strategy": "no",
            }
            trainer: ErasureTrainer
            args: SFTConfig
            if name == "erased":
                args = ElmConfig(**shared | self.config.elm)
                trainer = ElmTrainer(args=args, **self._material(args))
            else:
                args = SFTConfig(**shared | self.config.ascent)
                collator = ElmDataCollator(self.processing_class)
                trainer = GradientAscentTrainer(args=args, data_collator=collator, **self._material(args))
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            return trainer.model.merge_and_unload()

    def _material(self, args: SFTConfig) -> dict[str, Any]:
        """What both methods are given beside their settings: as many rows as they read."""
        # Sources are taken in turn: a third of the retain text is prose, the rest facts of the other kinds.
        retain: list[Source] = [self.world.retained[::2], self.world.retained[1::2], self.world.prose]
        rank = self.config.lora_rank
        return {
            "model": self.load("taught"),
            "train_dataset": build_erasure_dataset(
                {CONCEPT: ConceptSources(self.world.forget, retain)},
                size=args.max_steps * args.per_device_train_batch_size,
            ),
            "processing_class": self.processing_class,
            "peft_config": LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"),
        }

    def _shared(self) -> dict[str, Any]:
        """What every model depends on."""
        config = asdict(self.config)
        names = ("seed", "facts", "prose", "vocab_size", "layers", "width", "steps", "batch_size", "learning_rate")
        return {
            "texts": self._texts,
            "versions": {package: version(package) for package in PACKAGES},
            **{name: config[name] for name in names},
        }

    def _cached(self, name: str, settings: Mapping[str, Any], write: Callable[[Path], object]) -> Path:
        """The folder of what `write` has written, now or earlier, for these settings."""
        depends = json.dumps(self._shared() | dict(settings), sort_keys=True)
        folder = self._cache_dir / f"{name}-{hashlib.sha256(depends.encode()).hexdigest()[:16]}"
        if folder in self._whole:
            return folder
        sums = self._cache_dir / f"{folder.name}.sha256.json"
        if folder.exists() and (reason := _damage(folder, sums)) is not None:
            logger.warning(f"{folder} is damaged, and is made again: {reason}.")
            discard(folder)
        if not folder.exists():
            with replacing(folder) as unfinished:
                write(unfinished)
            write_json(sums, sealed({"files": folder_checksums(folder)}))
        self._whole.add(folder)
        return folder


def _damage(folder: Path, sums: Path) -> str | None:
    """Which file of a kept folder is not as it was written; `None` if all are, or an earlier version kept no checksums."""
    if not sums.exists():
        return None
    try:
        kept = unsealed(read_object(sums))
    except (OSError, ValueError):
        kept = None
    return f"{sums.name} is damaged" if kept is None else first_damage(folder, kept["files"])
