"""Attacks on the weights: scale the adapter, remove it from layers, quantize, fine-tune."""

import copy
import random
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..checks import check_numbers, hushed
from ..data.questions import Question, names_answer
from ..data.tokens import tokenize
from ..evaluation.fluency import as_prompt
from ..evaluation.pair import ModelPair
from ..fingerprint import is_quantized
from ..modeling import decoder_layers
from .base import Attack, AttackResult, AttackTarget, draw_subjects, seeded, subjects_of


# Weights that share one scale in the 4-bit format.
BLOCK = 64


@dataclass
class ScalingAttack(Attack):
    r"""
    Multiply what the erasure changed: the adapter's scale, or for a checkpoint the difference of the weights,
    `θ_reference + factor · (θ_erased − θ_reference)`.

    Parameters:
        factors (`list[float]`, *optional*, defaults to `[0.5, 1.5]`): Factors; `0` is the reference, `1` changes
            nothing.
    """

    name = "scaling"
    factors: list[float] = field(default_factory=lambda: [0.5, 1.5])

    def __post_init__(self):
        if not self.factors:
            raise ValueError("`factors` is empty: give at least one.")

    def run(self, target: AttackTarget) -> list[AttackResult]:
        results = []
        for factor in self.factors:
            with scaled(target.pair, factor):
                results.append(AttackResult(f"{self.name}.{factor:g}", "pmi", target.rank()))
        return results

    def inapplicable(self, target: AttackTarget) -> str | None:
        return why_not_scalable(target.pair)


@dataclass
class LayerRemovalAttack(Attack):
    r"""
    Take the erasure off neighboring layers at a time: their adapters, or for a checkpoint their weights, in whose
    place the reference's are put.

    Parameters:
        width (`int`, *optional*, defaults to `1`): Layers per block.
    """

    name = "layer-removal"
    width: int = 1

    def __post_init__(self):
        check_numbers(self, [("at least 1", ("width",))])

    def run(self, target: AttackTarget) -> list[AttackResult]:
        layers = changed_layers(target.pair)
        results = []
        for start in range(0, len(layers), self.width):
            block = layers[start : start + self.width]
            with scaled(target.pair, 0.0, block):
                span = "-".join(str(index) for index in dict.fromkeys((block[0], block[-1])))
                results.append(AttackResult(f"{self.name}.{span}", "pmi", target.rank()))
        return results

    def inapplicable(self, target: AttackTarget) -> str | None:
        reason = why_not_scalable(target.pair)
        return reason or (None if changed_layers(target.pair) else "the erasure changed no decoder layer")


def why_not_scalable(pair: ModelPair) -> str | None:
    """Why [`scaled`] cannot reach what the erasure changed, or `None` where it can."""
    if pair.adapter is not None:
        layers = [module for module in pair.adapter.modules() if isinstance(module, LoraLayer)]
        if not layers or any(any(layer.use_dora.values()) for layer in layers):
            return "only the scale of a plain LoRA adapter can be changed, and the adapter is of another kind"
        return None
    with pair.use("reference") as reference:
        models = (pair.erased, reference)
    erased, before = ({name: weight.shape for name, weight in model.named_parameters()} for model in models)
    if erased != before:
        return "the weights of the erased model and of its reference differ in names or shapes"
    if not all(parameter.is_floating_point() for parameter in pair.erased.parameters()):
        return "the erased model's weights are quantized"
    return None


@contextmanager
def scaled(pair: ModelPair, factor: float, layers: Sequence[int] | None = None) -> Iterator[None]:
    """Multiply what the erasure changed, in the whole erased model or in some decoder layers; exactly undone after.

    Args:
        pair: Erased model and reference.
        factor: The factor; `0` puts the reference back.
        layers: Indices of decoder layers; the whole model by default.
    """
    stack = decoder_layers(pair.erased)
    parts = [pair.erased] if layers is None else [stack[index] for index in layers]
    with ExitStack() as undo:
        if pair.adapter is not None:
            for part in parts:
                undo.enter_context(rescale_adapter_scale(part, factor))
        else:
            for parameter, reference in _changed_weights(pair, parts):
                erased = parameter.data
                undo.callback(setattr, parameter, "data", erased)
                start = reference.to(erased.device, torch.float32)
                parameter.data = torch.lerp(start, erased.float(), factor).to(erased.dtype)
        yield


def changed_layers(pair: ModelPair) -> list[int]:
    """Indices of the decoder layers that carry an adapter, or whose weights are not the reference's."""
    layers = list(decoder_layers(pair.erased))
    if pair.adapter is not None:
        return [i for i, layer in enumerate(layers) if any(isinstance(part, LoraLayer) for part in layer.modules())]
    changed = {id(parameter) for parameter, _ in _changed_weights(pair, layers)}
    return [i for i, layer in enumerate(layers) if any(id(parameter) in changed for parameter in layer.parameters())]


def _changed_weights(pair: ModelPair, parts: Sequence[nn.Module]) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """The parameters in some parts of an erased checkpoint that are not the reference's, each with the latter."""
    within = {id(parameter) for part in parts for parameter in part.parameters()}
    with pair.use("reference") as reference:
        before = {name: parameter.data for name, parameter in reference.named_parameters()}
    return [
        (parameter, before[name])
        for name, parameter in pair.erased.named_parameters()
        if id(parameter) in within and not torch.equal(parameter.cpu(), before[name].to("cpu", parameter.dtype))
    ]


@dataclass
class QuantizationAttack(Attack):
    r"""
    Quantize the erased model (an adapter merged) with bitsandbytes, which runs on CPUs too, and ask again.

    Parameters:
        bits (`list[int]`, *optional*, defaults to `[8, 4]`): 8 for LLM.int8(), 4 for NF4.
    """

    name = "quantization"
    bits: list[int] = field(default_factory=lambda: [8, 4])

    def __post_init__(self):
        if not self.bits or set(self.bits) - {4, 8}:
            raise ValueError(f"`bits` holds {self.bits}: use 4 and 8.")

    def run(self, target: AttackTarget) -> list[AttackResult]:
        if find_spec("bitsandbytes") is None:
            raise ImportError(
                "The attack quantization needs bitsandbytes: `pip install elm-trainer[eval]`, or leave the attack out."
            )
        erased = target.pair.erased
        results = []
        with tempfile.TemporaryDirectory() as folder:
            merged = erased if target.pair.adapter is None else copy.deepcopy(target.pair.adapter).merge_and_unload()
            merged.save_pretrained(folder)
            del merged
            for bits in self.bits:
                config = BitsAndBytesConfig(
                    load_in_8bit=bits == 8,
                    load_in_4bit=bits == 4,
                    bnb_4bit_quant_type="nf4",
                    bnb_4bit_compute_dtype=erased.dtype,
                )
                model = AutoModelForCausalLM.from_pretrained(
                    folder, quantization_config=config, dtype=erased.dtype, device_map={"": erased.device}
                )
                # LLM.int8() computes in float16, and bitsandbytes says so for every layer of every batch.
                with hushed("bitsandbytes.autograd._functions"):
                    results.append(AttackResult(f"{self.name}.{bits}-bit", "pmi", target.rank(side=model)))
                del model  # before the next one is loaded beside it
        return results

    def inapplicable(self, target: AttackTarget) -> str | None:
        erased = target.pair.erased
        if is_quantized(erased):
            return "the erased model is quantized already"
        widths = {
            module.in_features
            for name, module in erased.named_modules()
            if isinstance(module, nn.Linear) and ".lora_" not in name
        }
        if 4 in self.bits and erased.device.type == "cpu" and any(width % BLOCK for width in widths):
            return f"4-bit kernels for CPUs take layers whose width is a multiple of {BLOCK}"
        return None


TEXTS = ("forget", "half", "near", "unrelated")
WEIGHTS = ("adapter", "lora", "full")


@dataclass
class RelearningAttack(Attack):
    r"""
    Fine-tune with [`~trl.SFTTrainer`] and ask the questions again along the way.

    Parameters:
        text (`str`, *optional*, defaults to `"forget"`): What it is tuned on: `"forget"`, `"near"` or `"unrelated"`
            text, or `"half"`: forget text that names neither half of the subjects nor their answers, tested on that
            half, so that only what the model still holds can come back.
        weights (`str`, *optional*, defaults to `"lora"`): What is tuned: the erasing `"adapter"` itself, or, with that
            merged, a new `"lora"` or the `"full"` model.
        learning_rate (`float`, *optional*, defaults to `2e-4`): Learning rate, constant.
        batch_size (`int`, *optional*, defaults to `8`): Texts per step.
        examples (`int`, *optional*): Texts drawn from those there are; all by default.
        steps (`list[int]`, *optional*, defaults to `[5, 10, 20, 40]`): Steps after which the questions are asked;
            training ends with the last.
        max_length (`int`, *optional*, defaults to `64`): Longest text, in tokens.
        lora_rank (`int`, *optional*, defaults to `16`): Rank of the new LoRA adapter.
        max_new_tokens (`int`, *optional*, defaults to `0`): Length of the free answers asked for after the last step;
            `0` asks for none.
    """

    name = "relearning"
    text: str = "forget"
    weights: str = "lora"
    learning_rate: float = 2e-4
    batch_size: int = 8
    examples: int | None = None
    steps: list[int] = field(default_factory=lambda: [5, 10, 20, 40])
    max_length: int = 64
    lora_rank: int = 16
    max_new_tokens: int = 0

    def __post_init__(self):
        for name, value, known in (("text", self.text, TEXTS), ("weights", self.weights, WEIGHTS)):
            if value not in known:
                raise ValueError(f"`{name}` is {value!r}: use one of {', '.join(known)}.")
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"`steps` is {self.steps}: give steps of at least 1.")
        counts = ("batch_size", "max_length", "lora_rank", "examples")
        check_numbers(self, [("at least 1", counts), ("above 0", ("learning_rate",))])

    def inapplicable(self, target: AttackTarget) -> str | None:
        if not target.texts.get(self._source):
            return f"the target's `texts` hold no {self._source} text"
        if self.weights == "adapter" and target.pair.adapter is None:
            return "the erased model has no adapter to tune"
        if self.weights == "full" and is_quantized(target.pair.erased):
            return "quantized weights cannot be tuned"
        if not self._split(target)[0]:
            return "the questions or the forget texts cannot be split in half"
        return None

    def run(self, target: AttackTarget) -> list[AttackResult]:
        texts, asked = self._split(target)
        left_out = len(target.texts[self._source]) - len(texts)
        if self.examples is not None:
            texts = random.Random(self.seed).sample(texts, min(self.examples, len(texts)))
        questions = [target.questions[index] for index in asked]
        steps = sorted(set(self.steps))
        verdicts: dict[int, list[bool]] = {}

        class Ask(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **_):
                if state.global_step in steps:
                    verdicts[state.global_step] = target.rank(questions, side=model)

        device = target.pair.erased.device
        with seeded(self.seed, device), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            # TRL's own defaults use names that transformers is about to drop.
            warnings.simplefilter("ignore", FutureWarning)
            trainer = self._trainer(target, texts, steps[-1], folder)
            trainer.add_callback(Ask())
            trainer.remove_callback(PrinterCallback)  # without bars it would print every log
            trainer.train()
            name = f"{self.name}.{self.text}.{self.weights}.{self.learning_rate:g}"
            best, curve = max(verdicts.values(), key=sum), list(verdicts.items())
            details = {"texts": len(texts), "texts_left_out": left_out}
            results = [AttackResult(name, "pmi", best, questions=asked, curve=curve, details=details)]
            if self.max_new_tokens:
                prompts = [as_prompt(target.processing_class, question.text) for question in questions]
                said = target.answer(prompts, questions, side=trainer.model, max_new_tokens=self.max_new_tokens)
                results.append(AttackResult(name, "names_answer", said, questions=asked))
        return results

    def _trainer(self, target: AttackTarget, texts: list[str], steps: int, folder: str) -> SFTTrainer:
        tokenizer = target.processing_class
        # A copy, since merging and tuning change the model.
        model: Any = copy.deepcopy(target.pair.erased)
        if self.weights == "adapter":
            for module in model.modules():
                if isinstance(module, BaseTunerLayer):
                    module.set_requires_grad(module.active_adapters)
        else:
            model = model if target.pair.adapter is None else model.merge_and_unload()
            model.requires_grad_(self.weights == "full")
        # Tokenized here, since `Dataset.map` would show a bar.
        ids = [text.ids[: self.max_length] for text in tokenize(tokenizer, texts)]
        rank = self.lora_rank
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return SFTTrainer(
            model,
            SFTConfig(
                folder,
                max_steps=steps,
                per_device_train_batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                lr_scheduler_type="constant",
                max_length=self.max_length,
                seed=self.seed,
                dataset_kwargs={"skip_prepare_dataset": True},
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                # The model's own dtype and device; so short a run needs no checkpointing.
                bf16=False,
                use_cpu=target.pair.erased.device.type == "cpu",
                activation_checkpointing=False,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
            processing_class=tokenizer,
            peft_config=lora if self.weights == "lora" else None,
        )

    @property
    def _source(self) -> str:
        return "forget" if self.text == "half" else self.text

    def _split(self, target: AttackTarget) -> tuple[list[str], list[int]]:
        """The texts to tune on, and which questions to ask; no texts where they cannot be split."""
        if self.text != "half":
            return target.texts[self.text], list(range(len(target.questions)))
        secrets, read = draw_subjects(target.questions, len(subjects_of(target.questions)) // 2, self.seed)
        asked = [index for index in range(len(target.questions)) if index not in read]
        texts = [text for text in target.texts["forget"] if not any(_tells(text, secret) for secret in secrets)]
        return (texts if secrets else []), asked


def _tells(text: str, question: Question) -> bool:
    """Whether a text names what a question asks about or its answer, as a part of a longer word too for the subject."""
    return question.subject in text or names_answer(text, question.answer, (question.subject, *question.aliases))
