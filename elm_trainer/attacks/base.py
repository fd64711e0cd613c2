"""What an attack takes and returns."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..data.questions import Question, check_questions, names_answer
from ..data.tokens import text_tokenizer
from ..evaluation.fluency import generate
from ..evaluation.multiple_choice import PROMPT, score_choices
from ..evaluation.pair import ModelPair, Side


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed Python, numpy and torch, and give all three their state back afterwards."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            set_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


ANSWER_TOKENS = 16


@dataclass
class AttackTarget:
    """An erased model beside its reference, what was erased from it, and what an attacker holds.

    Args:
        pair ([`ModelPair`]): Erased model and reference.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Their tokenizer.
        questions (`list[Question]`): Four-choice questions about the concept; each must name its subject.
        wordings (`dict[str, dict[str, str]]`): `prefills`, `paraphrases` and `translations` of a question by name, each
            with the placeholder `{subject}`.
        texts (`dict[str, list[str]]`): What the model may be fine-tuned on: `forget`, `near` and `unrelated` text.
        batch_size (`int`, *optional*, defaults to `16`): Questions per batch.
        revision (`str`, *optional*): Where questions and texts come from, such as a dataset's commit, for the report.

    Raises:
        TypeError: if `pair` is no [`ModelPair`].
        ValueError: if a question cannot be asked or does not name its subject, if there are none, or if a wording
            lacks its placeholder.
    """

    pair: ModelPair
    processing_class: PreTrainedTokenizerBase
    questions: list[Question]
    wordings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    texts: Mapping[str, list[str]] = field(default_factory=dict)
    batch_size: int = 16
    revision: str | None = None

    def __post_init__(self):
        if not isinstance(self.pair, ModelPair):
            raise TypeError(f"`pair` is of type {type(self.pair).__name__}: give `ModelPair(model, reference)`.")
        self.processing_class = text_tokenizer(self.processing_class)
        check_asked(self.questions)
        for kind, wordings in self.wordings.items():
            for name, wording in wordings.items():
                if "{subject}" not in wording:
                    raise ValueError(f"`wordings` holds {kind}.{name} {wording!r} without {{subject}}: put it in.")

    def rank(
        self,
        questions: Sequence[Question] | None = None,
        *,
        side: Side = "erased",
        model: PreTrainedModel | PeftModel | None = None,
        prompt: str = PROMPT,
    ) -> list[bool]:
        """Which questions are answered rightly by PMI.

        Args:
            questions (`Sequence[Question]`, *optional*): All questions by default.
            side (`Side`, *optional*, defaults to `"erased"`): Who answers.
            model ([`~transformers.PreTrainedModel`], *optional*): Who answers in place of a side.
            prompt (`str`, *optional*): What stands before an option, with the placeholder `{question}`.
        """
        asked = self.questions if questions is None else questions
        with self._answering(side, model) as answering:
            return score_choices(
                answering, self.processing_class, asked, batch_size=self.batch_size, prompt=prompt
            ).pmi

    def answer(
        self,
        prompts: Sequence[str],
        questions: Sequence[Question] | None = None,
        *,
        side: Side = "erased",
        model: PreTrainedModel | PeftModel | None = None,
        max_new_tokens: int = ANSWER_TOKENS,
        temperature: float = 0.0,
    ) -> list[bool]:
        """Which prompts are answered freely with the truth, in the first line said.

        What follows a line break is no answer: after solved examples it would be a question of the model's own.

        Args:
            prompts (`Sequence[str]`): One prompt per question; several rounds may follow each other.
            questions (`Sequence[Question]`, *optional*): What they ask for; all questions by default.
            side (`Side`, *optional*, defaults to `"erased"`): Who answers.
            model ([`~transformers.PreTrainedModel`], *optional*): Who answers in place of a side.
            max_new_tokens (`int`, *optional*, defaults to `16`): Length of an answer.
            temperature (`float`, *optional*, defaults to `0.0`): Of sampling; `0` is greedy.
        """
        asked = self.questions if questions is None else questions
        with self._answering(side, model) as answering:
            answers = generate(
                answering, self.processing_class, prompts, max_new_tokens=max_new_tokens, temperature=temperature
            )
        return [
            names_answer(text.strip().partition("\n")[0], question.answer, question.aliases)
            for text, question in zip(answers, list(asked) * (len(prompts) // len(asked)), strict=True)
        ]

    def _answering(self, side: Side, model: PreTrainedModel | PeftModel | None):
        return self.pair.use(side) if model is None else nullcontext(model)


def check_asked(questions: Sequence[Question]) -> None:
    """Raise `ValueError` unless attacks can ask these questions: each must name its subject."""
    if not questions:
        raise ValueError("`questions` is empty: give at least one question about the concept.")
    check_questions("questions", questions)
    for question in questions:
        if not question.subject:
            raise ValueError(
                f"Question {question.text!r} has no `subject`, which attacks put into their own wordings: set it."
            )


@dataclass(frozen=True)
class AttackResult:
    """One figure of an attack.

    Attributes:
        name (`str`): Name of the attack and of its variant, e.g. `"few-shot.5"`.
        metric (`str`): `"pmi"`, the share of questions ranked rightly, or `"names_answer"`, the share whose free answer
            names the truth.
        erased (`list[bool]`): Verdict on the erased model for each question asked; the best one of a curve.
        reference (`list[bool]`, *optional*): The same attack on the reference; `None` where that has no meaning.
        questions (`list[int]`, *optional*): Which of the target's questions were asked, where not all were.
        curve (`list[tuple[int, list[bool]]]`, *optional*): For attacks that go on: the verdicts after each step.
        details (`dict`, *optional*): What else a reader should know, e.g. how many texts were read.
    """

    name: str
    metric: str
    erased: list[bool]
    reference: list[bool] | None = None
    questions: list[int] | None = None
    curve: list[tuple[int, list[bool]]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Attack(ABC):
    r"""
    Settings of an attack; each subclass adds its own, and carries them out in `run`.

    Parameters:
        seed (`int`, *optional*, defaults to `0`): Seed of everything the attack draws.
    """

    name: ClassVar[str]
    seed: int = 0

    @abstractmethod
    def run(self, target: AttackTarget) -> list[AttackResult]:
        """Attack; the target's models are handed back as they were."""

    def inapplicable(self, target: AttackTarget) -> str | None:
        """Why this attack has no meaning for the target, or `None` where it has."""
        return None

    def settings(self) -> dict[str, Any]:
        """The settings, as they stand in the report."""
        return asdict(self)

    def _require_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}: it must be at least 1.")
