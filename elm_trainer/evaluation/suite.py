"""What an erased model is asked: questions about the concept, and about what must stay."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from typing import Any, Literal, TypeAlias

import yaml

from ..data.questions import BANKS, Question, facts_of, held_out_subjects, load_bank
from ..data.sources import load_texts


# `erased`: asks for facts that stood in the forget text. `unseen`: for facts of the concept that did not.
# `near`: for neighbouring knowledge. `far`: for unrelated knowledge.
Role: TypeAlias = Literal["erased", "unseen", "near", "far"]


@dataclass(frozen=True)
class OpenQuestion:
    """A prompt that is answered freely, the true answer, and other names of it."""

    prompt: str
    answer: str
    aliases: tuple[str, ...] = ()


@dataclass
class EvaluationSuite:
    """What is measured.

    Args:
        banks (`dict[str, list[Question]]`): Questions with options, by name of the bank.
        roles (`dict[str, str]`): `"erased"`, `"unseen"`, `"near"` or `"far"`, by name of the bank.
        open_questions (`dict[str, list[OpenQuestion]]`): Questions that are answered freely, by name of the bank.
        cloze (`dict[str, list[OpenQuestion]]`): Beginnings of lines that are completed, by name of the bank.
        concept_prompts (`list[str]`): Prompts about the concept, whose answers are judged for fluency.
        retain_texts (`list[str]`): Retain texts that training did not see.
        forget_texts (`list[str]`): Texts about the concept, for what is measured inside the model.
        max_new_tokens (`int`, *optional*, defaults to `32`): Length of answers to `concept_prompts`.
        answer_tokens (`int`, *optional*, defaults to `16`): Length of answers to open questions.
        revision (`str`, *optional*): Where all this comes from, such as a dataset's commit, for the report.
    """

    banks: dict[str, list[Question]]
    roles: dict[str, Role]
    open_questions: dict[str, list[OpenQuestion]]
    cloze: dict[str, list[OpenQuestion]]
    concept_prompts: list[str]
    retain_texts: list[str]
    forget_texts: list[str] = field(default_factory=list)
    max_new_tokens: int = 32
    answer_tokens: int = 16
    revision: str | None = None

    def named(self, role: Role) -> list[str]:
        """Names of the banks of a role."""
        return [name for name in self.banks if self.roles[name] == role]


def built_in_suite(
    concepts: Sequence[str], questions: int = 120, *, split: str = "test", seed: int = 0
) -> EvaluationSuite:
    """Everything the built-in banks can say about an erasure.

    Args:
        concepts (`Sequence[str]`):
            Erased concepts, among those with built-in facts: `"capitals"`, `"elements"`.
        questions (`int`, *optional*, defaults to `120`):
            Questions drawn from each bank; half as many about subjects that stand in no forget text, which form a
            bank `<concept>-unseen` of their own, half as many open questions, and a third as many prompts.
        split (`str`, *optional*, defaults to `"test"`):
            `"dev"`, for choosing settings and for stopping, or `"test"`, which nothing else may look at.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.

    Raises:
        ValueError: if a concept has no built-in facts to ask for, or the split is unknown.
    """
    rng = random.Random(seed)
    suite = EvaluationSuite({}, {}, {}, {}, [], load_texts("everyday-held-out")["text"][:])
    suite.revision = f"elm-trainer {version('elm-trainer')} {split}"
    near: set[str] = set()
    for concept in concepts:
        held_out = held_out_subjects(concept)
        record = _record(concept)
        near |= set(record.get("near", ()))
        seen = {fact.subject for fact in facts_of(concept)} - held_out
        roles: tuple[tuple[str, Role, Any], ...] = (
            (concept, "erased", seen), (f"{concept}-unseen", "unseen", held_out)
        )  # fmt: skip
        for name, role, subjects in roles:
            bank = load_bank(concept, subjects=frozenset(subjects), split=split)
            suite.banks[name] = _draw(bank, questions if role == "erased" else questions // 2, rng)
            suite.roles[name] = role
            one_each = list({question.subject: question for question in bank}.values())
            suite.open_questions[name] = [
                OpenQuestion(record["phrasings"][0].format(subject=q.subject), q.answer, q.aliases)
                for q in _draw(one_each, questions // 2, rng)
            ]
            suite.cloze[name] = [
                OpenQuestion(cloze.format(subject=q.subject), q.answer, q.aliases)
                for q in _draw(one_each, questions // 2 // len(record["cloze"]), rng)
                for cloze in record["cloze"]
            ]
            if role == "erased":
                for index, question in enumerate(_draw(one_each, questions // 3, rng)):
                    prompt = record["prompts"][index % len(record["prompts"])]
                    suite.concept_prompts.append(prompt.format(subject=question.subject))
        suite.forget_texts += _draw(load_texts(concept)["text"][:], len(suite.retain_texts), rng)
    for name in BANKS:
        if name not in concepts:
            suite.banks[name] = _draw(load_bank(name, split=split), questions, rng)
            suite.roles[name] = "near" if name in near else "far"
            suite.open_questions[name] = [
                OpenQuestion(q.text, q.answer, q.aliases) for q in _draw(suite.banks[name], questions // 2, rng)
            ]
    return suite


def _record(concept: str) -> dict[str, Any]:
    return yaml.safe_load((files("elm_trainer.data") / "banks" / f"{concept}.yaml").read_text(encoding="utf-8"))


def _draw(items: Sequence[Any], count: int, rng: random.Random) -> list[Any]:
    return rng.sample(list(items), min(count, len(items)))
