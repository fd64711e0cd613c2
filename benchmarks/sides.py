"""What is compared: ELM as it is, TRL's supervised fine-tuning, and the released loop, on the same texts and adapter."""

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from elm_trainer import (
    ConceptSources,
    ElmConfig,
    ElmTrainer,
    build_erasure_dataset,
    load_concept,
    load_model_and_tokenizer,
    load_texts,
)
from elm_trainer.modeling import DEMO_MODEL, load_tokenizer

from .released_loop import released_updates, tokenize_samples
from .shapes import Adapter, ModelShape
from .workers import Lap, PacedTraining, Pacer


# As released: rank 256 on all seven projections of layers 4 to 7.
RELEASED_ADAPTER = Adapter(rank=256, layers=(4, 5, 6, 7), alpha=16, dropout=0.05)


@dataclass(frozen=True)
class Side:
    """One side of a comparison."""

    trainer: str  # `"elm"`, `"sft"` or `"released"`
    samples: int  # in the dataset, three texts each; they are gone through again and again
    batch: int  # samples (`"sft"`: texts) in a forward pass
    accumulation: int = 1  # forward passes in an update
    padding_free: bool = False  # TRL's padding-free batches
    group_by_length: bool = False  # batches of texts of like length
    model: str | ModelShape = DEMO_MODEL  # or the shape of one with random weights
    tokenizer: str = DEMO_MODEL  # of a model of random weights
    adapter: Adapter = RELEASED_ADAPTER
    short: bool = False  # short synthetic texts in place of 700 characters
    epochs: int | None = None  # end after so many passes through the samples

    @property
    def samples_per_update(self) -> float:
        """Samples of three texts that an update is made of."""
        return self.batch * self.accumulation / (3 if self.trainer == "sft" else 1)

    @property
    def texts(self) -> Dataset:
        """The samples."""
        return short_texts(self.samples) if self.short else released_texts(self.samples)

    def setting(self) -> str:
        """The batch in words."""
        words = [f"{self.batch} {'texts' if self.trainer == 'sft' else 'samples'} in a forward pass"]
        words += [f"accumulation {self.accumulation}"] * (self.accumulation > 1)
        words += ["padding-free"] * self.padding_free + ["grouped by length"] * self.group_by_length
        return ", ".join(words)


def train(pacer: Pacer, folder: str, side: Side) -> None:
    """Prepare a side and train it, block by block."""
    torch.manual_seed(0)
    model, tokenizer = model_of(side)
    TRAINERS[side.trainer](pacer, folder, side, model, tokenizer, side.texts)


def tokenized_samples(side: Side) -> Dataset:
    """The tokens that a side trains on."""
    with TemporaryDirectory() as folder:
        config = ElmConfig(precompute_targets=False, **common_settings(folder, side))
        return tokenize(side.texts, load_tokenizer(side.tokenizer), config)


def _train_elm(pacer, folder, side, model, tokenizer, dataset) -> None:
    def config(**fields: Any) -> ElmConfig:
        return ElmConfig(preset="released", **common_settings(folder, side), **fields)

    tokenized = _timed(pacer, "tokenize", lambda: tokenize(dataset, tokenizer, config(precompute_targets=False)))
    trainer = ElmTrainer(
        model,
        config(precompute_targets=True),
        train_dataset=tokenized,
        processing_class=tokenizer,
        peft_config=side.adapter.lora(),
        callbacks=[Lap(pacer, "targets"), PacedTraining(pacer)],
    )
    trainer.train()


def _train_sft(pacer, folder, side, model, tokenizer, dataset) -> None:
    fields = common_settings(folder, side)
    elm = ElmConfig(precompute_targets=False, **fields)
    tokenized = _timed(pacer, "tokenize", lambda: tokenize(dataset, tokenizer, elm))
    texts = Dataset.from_dict(
        {"input_ids": [row[f"{name}_ids"] for row in tokenized for name in ("forget", "retain", "synthetic")]}
    )
    config = SFTConfig(
        padding_free=side.padding_free,
        train_sampling_strategy="group_by_length" if side.group_by_length else "random",
        **fields,
    )
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=texts,
        processing_class=tokenizer,
        peft_config=side.adapter.lora(),
        callbacks=[PacedTraining(pacer)],
    )
    trainer.train()


def _train_released(pacer, folder, side, model, tokenizer, dataset) -> None:
    peft_model = get_peft_model(model, side.adapter.lora())
    samples = _timed(pacer, "tokenize", lambda: tokenize_samples(list(dataset), load_concept("capitals"), tokenizer))
    if pacer.start():
        released_updates(peft_model, samples, accumulation=side.accumulation, on_update=pacer.step)


TRAINERS: dict[str, Callable[..., None]] = {"elm": _train_elm, "sft": _train_sft, "released": _train_released}


def tokenize(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: ElmConfig) -> Dataset:
    """Tokens of an erasure dataset, as every trainer of the package makes them.

    A trainer of a model of no size makes them, so that their seconds stand apart from those of the targets.
    """
    shape = ModelShape(hidden=8, intermediate=8, layers=1, heads=1, kv_heads=1, vocab=len(tokenizer))
    lora = LoraConfig(r=1, target_modules=["q_proj"])
    trainer = ElmTrainer(
        shape.model(tokenizer.pad_token_id),
        config,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora,
    )
    return trainer.train_dataset


def model_of(side: Side) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a side, in float32, and its tokenizer."""
    if isinstance(side.model, ModelShape):
        tokenizer = load_tokenizer(side.tokenizer)
        return side.model.model(tokenizer.pad_token_id), tokenizer
    return load_model_and_tokenizer(side.model, dtype="float32")


def common_settings(folder: str, side: Side) -> dict[str, Any]:
    """The settings that all trainers of the package share."""
    return dict(
        output_dir=f"{folder}/run",
        per_device_train_batch_size=side.batch,
        gradient_accumulation_steps=side.accumulation,
        learning_rate=5e-5,
        lr_scheduler_type="constant",
        num_train_epochs=side.epochs or 1_000_000,
        max_length=None,
        bf16=False,
        activation_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


def _timed(pacer: Pacer, name: str, work: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = work()
    pacer.lap(name, time.perf_counter() - started)
    return result


def released_texts(samples: int, characters: int = 700) -> Dataset:
    """Samples of the shape that the released code trains on: forget, retain and synthetic text of 700 characters each.

    The sentences are the built-in ones, joined and cut.
    """
    forget = _joined(load_texts("capitals")["text"], characters, samples)
    retain = _joined(load_texts("everyday")["text"], characters, samples)
    prompt = 40
    more = _joined(load_texts("countries")["text"], characters - prompt, samples)
    pairs = [(text[:prompt], completion) for text, completion in zip(forget, more, strict=True)]
    return _dataset(forget, retain, pairs, samples)


def short_texts(samples: int, words: int = 12, seed: int = 0) -> Dataset:
    """Samples of short synthetic texts, every one another: random words of the built-in texts."""
    rng = random.Random(seed)
    vocabulary = sorted({word for text in load_texts("everyday-held-out")["text"] for word in text.split()})

    def draw() -> list[str]:
        return [" ".join(rng.choices(vocabulary, k=words)) for _ in range(samples)]

    forget, retain, more = draw(), draw(), draw()
    pairs = [(prompt, f" {completion}") for prompt, completion in zip(_halves(forget), _halves(more), strict=True)]
    return _dataset(forget, retain, pairs, samples)


def cut_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> PreTrainedTokenizerBase:
    """A byte-pair tokenizer of the first `size` tokens, which is what it was after so many merges were learned.

    Those of single bytes must be among them. A tokenizer that has no more is given back.
    """
    if len(tokenizer) <= size:
        return tokenizer
    record = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = {token: index for token, index in record["model"]["vocab"].items() if index < size}
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in record["model"]["merges"])
    kept = [pair for pair in pairs if {*pair, "".join(pair)} <= tokens.keys()]
    record["model"] |= {"vocab": tokens, "merges": kept}
    record["added_tokens"] = [token for token in record["added_tokens"] if token["id"] < size]
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if token in tokens}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(record)), **special)


def _halves(texts: Sequence[str]) -> list[str]:
    return [" ".join(text.split()[: len(text.split()) // 2]) for text in texts]


def _joined(texts: Sequence[str], characters: int, count: int) -> list[str]:
    joined, place = [], 0
    for _ in range(count):
        text = ""
        while len(text) < characters:
            text += texts[place % len(texts)] + "\n"
            place += 1
        joined.append(text[:characters])
    return joined


def _dataset(forget: list[str], retain: list[str], pairs: list[tuple[str, str]], samples: int) -> Dataset:
    return build_erasure_dataset({"capitals": ConceptSources(forget, [retain], pairs)}, size=samples)
