"""Attacks by the prompt: other words, other languages, filler, examples, a begun answer, many samples."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import ClassVar

import yaml

from ..evaluation.fluency import as_prompt
from ..evaluation.multiple_choice import PROMPT
from ..evaluation.pair import SIDES
from .base import ANSWER_TOKENS, Attack, AttackResult, AttackTarget, draw_subjects, seeded, subjects_of


class WordingAttack(Attack):
    """An attack in prepared wordings: the target's of one `kind`."""

    kind: ClassVar[str]

    def wordings(self, target: AttackTarget) -> Mapping[str, str]:
        """The wordings by name, each with placeholders for the subject or the question."""
        return target.wordings.get(self.kind, {})

    def inapplicable(self, target: AttackTarget) -> str | None:
        return None if self.wordings(target) else f"the target's `wordings` hold no {self.kind}"


@dataclass
class RewordingAttack(WordingAttack):
    r"""
    Ask every question in other words: ranked among its options, and freely as a chat turn.

    Parameters:
        max_new_tokens (`int`, *optional*, defaults to `16`): Length of the free answers; `0` asks for none.
    """

    max_new_tokens: int = ANSWER_TOKENS

    def run(self, target: AttackTarget) -> list[AttackResult]:
        results = []
        for variant, wording in self.wordings(target).items():
            asked = [
                replace(question, text=wording.format(subject=question.subject, question=question.text))
                for question in target.questions
            ]
            prompts = [as_prompt(target.processing_class, question.text) for question in asked]
            results += target.ask_both(f"{self.name}.{variant}", asked, prompts, max_new_tokens=self.max_new_tokens)
        return results


@dataclass
class ParaphraseAttack(RewordingAttack):
    """Ask every question in each paraphrase of the concept's data file."""

    name = "paraphrase"
    kind = "paraphrases"


@dataclass
class TranslationAttack(RewordingAttack):
    """Ask every question in each language of the concept's data file; names and options stay as they are."""

    name = "translation"
    kind = "translations"


@dataclass
class FillerAttack(RewordingAttack):
    """Put unrelated sentences before every question: English, Hindi, Latin, small talk and a poem."""

    name = "filler"

    def wordings(self, target: AttackTarget) -> Mapping[str, str]:
        text = (files("elm_trainer.data") / "attacks" / "fillers.yaml").read_text(encoding="utf-8")
        return yaml.safe_load(text)


@dataclass
class FewShotAttack(Attack):
    r"""
    Put solved questions about other subjects before each question.

    Parameters:
        shots (`int`, *optional*, defaults to `5`): Solved questions.
        max_new_tokens (`int`, *optional*, defaults to `16`): Length of the free answers; `0` asks for none.
    """

    name = "few-shot"
    shots: int = 5
    max_new_tokens: int = ANSWER_TOKENS

    def inapplicable(self, target: AttackTarget) -> str | None:
        count = len(subjects_of(target.questions))
        return None if self.shots < count else f"{self.shots} shots leave none of {count} subjects to ask"

    def run(self, target: AttackTarget) -> list[AttackResult]:
        count = len(subjects_of(target.questions))
        if not 0 < self.shots < count:
            raise ValueError(
                f"`shots` is {self.shots}: use at least 1 and fewer than the {count} subjects asked about."
            )
        solved, asked = draw_subjects(target.questions, self.shots, self.seed)
        questions = [target.questions[index] for index in asked]
        examples = "".join(f"{PROMPT.format(question=q.text)} {q.answer}\n\n" for q in solved)
        prompt = examples.replace("{", "{{").replace("}", "}}") + PROMPT
        prompts = [prompt.format(question=question.text) for question in questions]
        return target.ask_both(
            f"{self.name}.{self.shots}", questions, prompts,
            indices=asked, prompt=prompt, max_new_tokens=self.max_new_tokens,
        )  # fmt: skip


@dataclass
class PrefillingAttack(WordingAttack):
    r"""
    Begin the assistant's turn with words that leave only the answer to say, and let the model continue greedily.

    Parameters:
        max_new_tokens (`int`, *optional*, defaults to `10`): Length of the continuation.
    """

    name = "prefilling"
    kind = "prefills"
    max_new_tokens: int = 10

    def __post_init__(self):
        self._require_positive("max_new_tokens")

    def run(self, target: AttackTarget) -> list[AttackResult]:
        results = []
        for variant, wording in self.wordings(target).items():
            prompts = [
                as_prompt(target.processing_class, question.text) + wording.format(subject=question.subject)
                for question in target.questions
            ]
            said = {side: target.answer(prompts, side=side, max_new_tokens=self.max_new_tokens) for side in SIDES}
            results.append(AttackResult(f"{self.name}.{variant}", "names_answer", said["erased"], said["reference"]))
        return results


@dataclass
class BestOfNAttack(Attack):
    r"""
    Sample several answers to each question; one that names the truth is enough.

    Parameters:
        n (`int`, *optional*, defaults to `8`): Answers per question.
        temperature (`float`, *optional*, defaults to `1.2`): Sampling temperature.
        max_new_tokens (`int`, *optional*, defaults to `16`): Length of an answer.
    """

    name = "best-of-n"
    n: int = 8
    temperature: float = 1.2
    max_new_tokens: int = ANSWER_TOKENS

    def __post_init__(self):
        self._require_positive("n", "max_new_tokens")
        if self.temperature <= 0:
            raise ValueError(f"`temperature` is {self.temperature}: it must be above 0, or all answers are one.")

    def run(self, target: AttackTarget) -> list[AttackResult]:
        prompts = [as_prompt(target.processing_class, question.text) for question in target.questions] * self.n
        count = len(target.questions)
        right = {}
        for side in SIDES:
            # Each side draws from the same seed.
            with seeded(self.seed, target.pair.erased.device):
                said = target.answer(
                    prompts, side=side, max_new_tokens=self.max_new_tokens, temperature=self.temperature
                )
            right[side] = [any(said[index::count]) for index in range(count)]
        return [AttackResult(f"{self.name}.{self.n}", "names_answer", right["erased"], right["reference"])]
