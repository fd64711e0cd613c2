"""Ask in other words, in other languages, or after unrelated sentences."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files

import yaml

from ...data.questions import Question
from ..fluency import as_prompt
from ..pair import SIDES
from .base import ANSWER_TOKENS, Attack, AttackResult, AttackTarget


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
