"""The four models of the gold standard (taught, never taught, erased, gradient ascent), their settings and training."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import set_seed
from transformers.utils import logging
from trl import SFTConfig

from ..checks import check_numbers
from ..data.invented import CONCEPT, InventedWorld, invented_world
from ..data.sources import ConceptSources, build_erasure_dataset
from ..data.user_sources import Source
from ..evaluation.report import dataset_info, environment
from ..files import (
    discard,
    first_damage,
    folder_checksums,
    json_sha256,
    read_object,
    replacing,
    sealed,
    unsealed,
    write_json,
)
from ..methods.base import ErasureTrainer
from ..methods.elm import ElmConfig, ElmTrainer


@dataclass
class GoldStandardConfig:
    r"""
    What the gold standard is measured on, and how its models are made.

    Parameters:
        seed (`int`, *optional*, defaults to `0`): Seed of the world, the weights, the order of batches and the attack.
        facts (`int`, *optional*, defaults to `24`): Invented facts of each kind.
        prose (`int`, *optional*, defaults to `300`): Plain sentences.
        vocab_size (`int`, *optional*, defaults to `2000`): Most tokens of the tokenizer.
        layers (`int`, *optional*, defaults to `4`): Layers of the models.
        width (`int`, *optional*, defaults to `128`): Their hidden size.
        steps (`int`, *optional*, defaults to `1000`): Steps for which the taught and the never-taught model are
            trained.
        batch_size (`int`, *optional*, defaults to `32`): Texts per step of theirs.
        learning_rate (`float`, *optional*, defaults to `3e-3`): Their largest learning rate (cosine schedule).
        elm (`dict[str, Any]`, *optional*): Fields of [`ElmConfig`] of the erasure.
        ascent (`dict[str, Any]`, *optional*): Fields of [`~trl.SFTConfig`] of gradient ascent.
        lora_rank (`int`, *optional*, defaults to `16`): Rank of the adapters of both, on all linear layers.
        relearning_steps (`list[int]`, *optional*): Steps of relearning after which the questions are asked; it ends
            with the last.
        relearning_learning_rate (`float`, *optional*, defaults to `5e-4`): Learning rate of relearning, constant.
        relearning_batch_size (`int`, *optional*, defaults to `16`): Texts per step of relearning.
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
        sizes = ("steps", "batch_size", "relearning_batch_size", "layers", "width", "lora_rank")
        check_numbers(self, [("at least 1", sizes)])


logger = logging.get_logger(__name__)
# Longer than any text of the invented world, in tokens.
_MAX_LENGTH = 64
# Training arguments of every model: nothing is saved or shown on the way.
_QUIET: dict[str, Any] = {
    "save_strategy": "no", "report_to": "none", "bf16": False, "activation_checkpointing": False,
    "disable_tqdm": True, "logging_strategy": "no",
}  # fmt: skip
# What every model depends on. Adapters depend on more, relearning changes no kept model.
_SHARED = ("seed", "facts", "prose", "vocab_size", "layers", "width", "steps", "batch_size", "learning_rate")


class GradientAscentTrainer(ErasureTrainer):
    """The plainest baseline: raise the negative log-likelihood of forget text, and lower that of retain text."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batches = {name: inputs[name] for name in ("forget", "retain")}
        means = {name: values.mean() for name, values in self.position_losses(model, batches).items()}
        loss = self.weigh(means, {"forget": -1.0, "retain": 1.0})
        return (loss, None) if return_outputs else loss


# How each erased model is made: the trainer, the config of that, and the field of the settings that holds its fields.
_METHODS: dict[str, tuple[type[ErasureTrainer], type[SFTConfig], str]] = {
    "erased": (ElmTrainer, ElmConfig, "elm"),
    "gradient-ascent": (GradientAscentTrainer, SFTConfig, "ascent"),
}
MODELS = ("taught", "never-taught", *_METHODS)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of these texts."""
    pad, end = "<pad>", "<end>"
    tokenizer = Tokenizer(models.BPE())
    # With a space before the first word, a name is the same token wherever it stands.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[pad, end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=end)


def fine_tune(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    callbacks: Sequence[TrainerCallback] = (),
    **settings: Any,
) -> None:
    """Train all weights of a model, in place, to predict texts, each of which is closed by the end-of-text token.

    Args:
        callbacks: Called along the way.
        settings: Fields of [`~transformers.TrainingArguments`]. With one seed, as many texts come in the same order.
    """
    ids = processing_class([text + processing_class.eos_token for text in texts])["input_ids"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(folder, **settings, **_QUIET),
            data_collator=DataCollatorForLanguageModeling(processing_class, mlm=False),
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


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
        self._shared = {
            "texts": dataset_info([*everything, *self.world.forget["novice"], *self.world.held_out_prose]),
            "versions": environment({})["versions"],
            **{name: getattr(config, name) for name in _SHARED},
        }
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
        if name not in MODELS:
            raise ValueError(f"There is no model {name!r}; use one of: {', '.join(MODELS)}.")
        settings: dict[str, Any] = {}
        if name in _METHODS:
            settings = {"method": getattr(self.config, _METHODS[name][2]), "lora_rank": self.config.lora_rank}
        return str(self._cached(name, settings, lambda path: self._make(name).save_pretrained(path)))

    def identity(self) -> dict[str, Any]:
        """Everything the results depend on, as JSON holds it."""
        return json.loads(json.dumps(self._shared | asdict(self.config)))

    def _make(self, name: str) -> PreTrainedModel:
        set_seed(self.config.seed)  # of new weights and adapters
        if name in ("taught", "never-taught"):
            return self._train(self.world.texts(taught=name == "taught"))
        return self._erase(name)

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
            model, self.processing_class, texts, max_steps=config.steps, per_device_train_batch_size=config.batch_size,
            learning_rate=config.learning_rate, lr_scheduler_type="cosine", warmup_steps=config.steps // 20, seed=config.seed,
        )  # fmt: skip
        return model

    def _erase(self, name: str) -> PreTrainedModel:
        """The taught model, erased by either method on the same texts: as many rows as its settings read."""
        config, rank = self.config, self.config.lora_rank
        # Sources are taken in turn: a third of the retain text is prose, the rest facts of the other kinds.
        retain: list[Source] = [self.world.retained[::2], self.world.retained[1::2], self.world.prose]
        kind, args_class, own = _METHODS[name]
        with tempfile.TemporaryDirectory() as folder:
            shared = {"output_dir": folder, "seed": config.seed, "max_length": _MAX_LENGTH, **_QUIET}
            args = args_class(**shared | getattr(config, own))
            trainer = kind(
                self.load("taught"),
                args,
                train_dataset=build_erasure_dataset(
                    {CONCEPT: ConceptSources(self.world.forget, retain)},
                    size=args.max_steps * args.per_device_train_batch_size,
                ),
                processing_class=self.processing_class,
                peft_config=LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            return trainer.model.merge_and_unload()

    def _cached(self, name: str, settings: Mapping[str, Any], write: Callable[[Path], object]) -> Path:
        """The folder of what `write` has written, now or earlier, for these settings."""
        folder = self._cache_dir / f"{name}-{json_sha256(self._shared | dict(settings))[:16]}"
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
