"""What an attack takes and returns."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..data.questions import Question, check_questions, names_answer
from ..data.tokens import text_tokenizer
from ..evaluation.fluency import generate_answers
from ..evaluation.likelihood import PROMPT, score_choices
from ..evaluation.pair import SIDES, ModelPair, Side


ANSWER_TOKENS = 16
# `prefills`, `paraphrases` and `translations` of a question by name, each with the placeholder `{subject}`.
Wordings: TypeAlias = Mapping[str, Mapping[str, str]]
# Who answers: a side of the pair, or another model.
Answering: TypeAlias = Side | PreTrainedModel | PeftModel


@dataclass(frozen=True)
class AttackResult:
    """One metric of an attack.

    Attributes:
        name (`str`): Name of the attack and of its variant, e.g. `"few-shot.5"`.
        metric (`str`): `"pmi"`, the share of questions ranked rightly, or `"names_answer"`, the share whose free
            answer names the truth.
        erased (`list[bool]`): Verdict on the erased model for each question asked; the best one of a curve.
        reference (`list[bool]`, *optional*): The same attack on the reference; `None` where that has no meaning.
        questions (`list[int]`, *optional*): Which of the target's questions were asked, where not all were.
        curve (`list[tuple[int, list[bool]]]`, *optional*): The verdicts after each step, for attacks in steps.
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
class AttackTarget:
    """An erased model beside its reference, what was erased from it, and what an attacker holds.

    Args:
        pair ([`ModelPair`]): Erased model and reference.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Their tokenizer.
        questions (`list[Question]`): Four-choice questions about the concept; each must name its subject.
        wordings (`dict[str, dict[str, str]]`): `prefills`, `paraphrases` and `translations` of a question by name,
            each with the placeholder `{subject}`.
        texts (`dict[str, list[str]]`): What the model may be fine-tuned on: `forget`, `near` and `unrelated` text.
        batch_size (`int`, *optional*, defaults to `16`): Questions per batch.
        revision (`str`, *optional*): Where questions and texts come from, such as a dataset's commit, for the report.

    Raises:
        TypeError: if `pair` is not a [`ModelPair`].
        ValueError: if a question cannot be asked or does not name its subject, if there are none, or if a wording
            lacks its placeholder.
    """

    pair: ModelPair
    processing_class: PreTrainedTokenizerBase
    questions: list[Question]
    wordings: Wordings = field(default_factory=dict)
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
        side: Answering = "erased",
        prompt: str = PROMPT,
    ) -> list[bool]:
        """Which questions are answered rightly by PMI.

        Args:
            questions: All questions by default.
            prompt: What stands before an option, with the placeholder `{question}`.
        """
        asked = self.questions if questions is None else questions
        with self._use(side) as model:
            return score_choices(model, self.processing_class, asked, batch_size=self.batch_size, prompt=prompt).pmi

    def answer(
        self,
        prompts: Sequence[str],
        questions: Sequence[Question] | None = None,
        *,
        side: Answering = "erased",
        max_new_tokens: int = ANSWER_TOKENS,
        temperature: float = 0.0,
    ) -> list[bool]:
        """Which prompts are answered freely with the truth, in the first line said.

        What follows a line break is not counted: after solved examples the model may ask a further question there.

        Args:
            prompts: One prompt per question; several rounds may follow each other.
            questions: What they ask for; all questions by default.
            max_new_tokens: Length of an answer.
            temperature: Of sampling; `0` is greedy.
        """
        asked = self.questions if questions is None else questions
        with self._use(side) as model:
            answers = generate_answers(
                model, self.processing_class, prompts, max_new_tokens=max_new_tokens, temperature=temperature
            ).texts
        return [
            names_answer(text.strip().partition("\n")[0], question.answer, question.aliases)
            for text, question in zip(answers, list(asked) * (len(prompts) // len(asked)), strict=True)
        ]

    def _use(self, side: Answering) -> AbstractContextManager[PreTrainedModel | PeftModel]:
        return nullcontext(side) if isinstance(side, torch.nn.Module) else self.pair.use(side)

    def ask_both(
        self,
        name: str,
        questions: Sequence[Question],
        prompts: Sequence[str],
        *,
        indices: list[int] | None = None,
        prompt: str = PROMPT,
        max_new_tokens: int = ANSWER_TOKENS,
        ranked: bool = True,
    ) -> list[AttackResult]:
        """Results of the attack `name` on both models: `questions` ranked, unless they are not to be, and `prompts`
        answered freely, unless `max_new_tokens` is 0. `indices` are those of the questions among the target's, where not
        all are asked."""
        results = []
        if ranked:
            reference, erased = (self.rank(questions, side=side, prompt=prompt) for side in SIDES)
            results.append(AttackResult(name, "pmi", erased, reference, indices))
        if max_new_tokens:
            reference, erased = (
                self.answer(prompts, questions, side=side, max_new_tokens=max_new_tokens) for side in SIDES
            )
            results.append(AttackResult(name, "names_answer", erased, reference, indices))
        return results


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

    def rewrite(
        self, processing_class: PreTrainedTokenizerBase, question: Question, given: Wordings, bank: Sequence[Question]
    ) -> dict[str, str]:
        """The prompts with which this attack asks one question, in their final form and by `<attack>.<variant>`: in wordings
        as those of an [`AttackTarget`], or behind examples that are drawn from a bank about the same concept.

        There are none of an attack that changes weights, searches or samples, and of a wording that needs the subject
        of a question without one.
        """
        return {}


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


def subjects_of(questions: Sequence[Question]) -> list[str]:
    """The subjects that questions are about, sorted."""
    return sorted({question.subject for question in questions})


def draw_subjects(questions: Sequence[Question], count: int, seed: int) -> tuple[list[Question], list[int]]:
    """One question about each of `count` drawn subjects, and the indices of the questions about all others."""
    drawn = set(random.Random(seed).sample(subjects_of(questions), count))
    one_each = {question.subject: question for question in questions if question.subject in drawn}
    others = [index for index, question in enumerate(questions) if question.subject not in drawn]
    return list(one_each.values()), others


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
