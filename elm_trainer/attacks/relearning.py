"""Fine-tune the erased model and watch the knowledge come back."""

import copy
import random
import tempfile
import warnings
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..data.questions import Question, names_answer
from ..data.tokens import tokenize
from ..evaluation.fluency import as_prompt
from ..fingerprint import is_quantised
from .base import Attack, AttackResult, AttackTarget, draw_subjects, seeded, subjects_of


TEXTS = ("forget", "half", "near", "unrelated")
WEIGHTS = ("adapter", "lora", "full")


@dataclass
class RelearningAttack(Attack):
    r"""
    Fine-tune with [`~trl.SFTTrainer`] and ask the questions again along the way.

    Parameters:
        text (`str`, *optional*, defaults to `"forget"`): What it is tuned on: `"forget"`, `"near"` or `"unrelated"` text,
            or `"half"`: forget text that names neither half of the subjects nor their answers, tested on that half, so
            that only what the model still holds can come back.
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
        if self.learning_rate <= 0:
            raise ValueError(f"`learning_rate` is {self.learning_rate}: it must be above 0.")
        self._require_positive("batch_size", "max_length", "lora_rank")
        if self.examples is not None:
            self._require_positive("examples")

    def inapplicable(self, target: AttackTarget) -> str | None:
        if not target.texts.get(self._source):
            return f"the target's `texts` hold no {self._source} text"
        if self.weights == "adapter" and target.pair.adapter is None:
            return "the erased model has no adapter to tune"
        if self.weights == "full" and is_quantised(target.pair.erased):
            return "quantized weights cannot be tuned"
        return None

    def run(self, target: AttackTarget) -> list[AttackResult]:
        texts, asked = self._split(target)
        details = {"texts": len(texts), "texts_left_out": len(target.texts[self._source]) - len(texts)}
        if self.examples is not None:
            texts = random.Random(self.seed).sample(texts, min(self.examples, len(texts)))
            details["texts"] = len(texts)
        questions = [target.questions[index] for index in asked]
        steps = sorted(set(self.steps))
        verdicts: dict[int, list[bool]] = {}

        class Ask(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **_):
                if state.global_step in steps:
                    verdicts[state.global_step] = target.rank(questions, model=model)

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
            results = [AttackResult(name, "pmi", best, questions=asked, curve=curve, details=details)]
            if self.max_new_tokens:
                prompts = [as_prompt(target.processing_class, question.text) for question in questions]
                said = target.answer(prompts, questions, model=trainer.model, max_new_tokens=self.max_new_tokens)
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
        """The texts to tune on, and which questions to ask."""
        if self.text != "half":
            return target.texts[self.text], list(range(len(target.questions)))
        secrets, read = draw_subjects(target.questions, len(subjects_of(target.questions)) // 2, self.seed)
        asked = [index for index in range(len(target.questions)) if index not in read]
        texts = [text for text in target.texts["forget"] if not any(_tells(text, secret) for secret in secrets)]
        if not secrets or not texts:
            raise ValueError("`text` is 'half', but the questions or the forget texts cannot be split: use 'forget'.")
        return texts, asked


def _tells(text: str, question: Question) -> bool:
    """Whether a text names what a question asks about or its answer, as a part of a longer word too for the subject."""
    return question.subject in text or names_answer(text, question.answer, (question.subject, *question.aliases))
