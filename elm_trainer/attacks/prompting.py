"""Attacks by the prompt: other words, other languages, filler, examples, a begun answer, many samples."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files

import yaml

from ..data.questions import Question
from ..evaluation.fluency import as_prompt
from ..evaluation.multiple_choice import PROMPT
from ..evaluation.pair import SIDES
from .base import ANSWER_TOKENS, Attack, AttackResult, AttackTarget, seeded


@dataclass
class RewordingAttack(Attack):
    r"""
    Ask every question in other words: ranked among its options, and freely as a chat turn.

    Parameters:
        max_new_tokens (`int`, *optional*, defaults to `16`): Length of the free answers; `0` asks for none.
    """

    max_new_tokens: int = ANSWER_TOKENS

    def _ask(self, target: AttackTarget, variant: str, questions: list[Question]) -> list[AttackResult]:
        name = f"{self.name}.{variant}"
        ranked = {side: target.rank(questions, side=side) for side in SIDES}
        results = [AttackResult(name, "pmi", ranked["erased"], ranked["reference"])]
        if self.max_new_tokens:
            prompts = [as_prompt(target.processing_class, question.text) for question in questions]
            said = {side: target.answer(prompts, side=side, max_new_tokens=self.max_new_tokens) for side in SIDES}
            results.append(AttackResult(name, "names_answer", said["erased"], said["reference"]))
        return results

    def _ask_in(self, target: AttackTarget, wordings: Mapping[str, str]) -> list[AttackResult]:
        return [
            result
            for variant, wording in wordings.items()
            for result in self._ask(
                target,
                variant,
                [replace(q, text=wording.format(subject=q.subject, question=q.text)) for q in target.questions],
            )
        ]


@dataclass
class ParaphraseAttack(RewordingAttack):
    """Ask every question in each paraphrase of the concept's data file."""

    name = "paraphrase"

    def run(self, target: AttackTarget) -> list[AttackResult]:
        return self._ask_in(target, target.wordings["paraphrases"])

    def inapplicable(self, target: AttackTarget) -> str | None:
        return None if target.wordings.get("paraphrases") else "the target's `wordings` hold no paraphrases"


@dataclass
class TranslationAttack(RewordingAttack):
    """Ask every question in each language of the concept's data file; names and options stay as they are."""

    name = "translation"

    def run(self, target: AttackTarget) -> list[AttackResult]:
        return self._ask_in(target, target.wordings["translations"])

    def inapplicable(self, target: AttackTarget) -> str | None:
        return None if target.wordings.get("translations") else "the target's `wordings` hold no translations"


@dataclass
class FillerAttack(RewordingAttack):
    """Put unrelated sentences before every question: English, Hindi, Latin, small talk and a poem."""

    name = "filler"

    def run(self, target: AttackTarget) -> list[AttackResult]:
        text = (files("elm_trainer.data") / "attacks" / "fillers.yaml").read_text(encoding="utf-8")
        return self._ask_in(target, yaml.safe_load(text))


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
        subjects = {question.subject for question in target.questions}
        return (
            None if self.shots < len(subjects) else f"{self.shots} shots leave none of {len(subjects)} subjects to ask"
        )

    def run(self, target: AttackTarget) -> list[AttackResult]:
        subjects = sorted({question.subject for question in target.questions})
        if not 0 < self.shots < len(subjects):
            raise ValueError(
                f"`shots` is {self.shots}: use at least 1 and fewer than the {len(subjects)} subjects asked about."
            )
        shown = set(random.Random(self.seed).sample(subjects, self.shots))
        solved = {question.subject: question for question in target.questions if question.subject in shown}
        asked = [index for index, question in enumerate(target.questions) if question.subject not in shown]
        questions = [target.questions[index] for index in asked]
        examples = "".join(f"{PROMPT.format(question=q.text)} {q.answer}\n\n" for q in solved.values())
        prompt = examples.replace("{", "{{").replace("}", "}}") + PROMPT
        ranked = {side: target.rank(questions, side=side, prompt=prompt) for side in SIDES}
        name = f"{self.name}.{self.shots}"
        results = [AttackResult(name, "pmi", ranked["erased"], ranked["reference"], asked)]
        if self.max_new_tokens:
            prompts = [prompt.format(question=question.text) for question in questions]
            said = {
                side: target.answer(prompts, questions, side=side, max_new_tokens=self.max_new_tokens)
                for side in SIDES
            }
            results.append(AttackResult(name, "names_answer", said["erased"], said["reference"], asked))
        return results


@dataclass
class PrefillingAttack(Attack):
    r"""
    Begin the assistant's turn with words that leave only the answer to say, and let it go on greedily.

    Parameters:
        max_new_tokens (`int`, *optional*, defaults to `10`): Length of the continuation.
    """

    name = "prefilling"
    max_new_tokens: int = 10

    def __post_init__(self):
        self._require_positive("max_new_tokens")

    def run(self, target: AttackTarget) -> list[AttackResult]:
        results = []
        for variant, wording in target.wordings["prefills"].items():
            prompts = [
                as_prompt(target.processing_class, question.text) + wording.format(subject=question.subject)
                for question in target.questions
            ]
            said = {side: target.answer(prompts, side=side, max_new_tokens=self.max_new_tokens) for side in SIDES}
            results.append(AttackResult(f"{self.name}.{variant}", "names_answer", said["erased"], said["reference"]))
        return results

    def inapplicable(self, target: AttackTarget) -> str | None:
        return None if target.wordings.get("prefills") else "the target's `wordings` hold no prefills"


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
