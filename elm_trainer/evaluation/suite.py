"""What an erased model is asked: questions about the concept, and about what must stay."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal, TypeAlias

from ..data.questions import (
    BANKS,
    PLAIN,
    Question,
    bank_families,
    bank_record,
    facts_of,
    held_out_subjects,
    load_bank,
)
from ..data.sources import load_texts


# `erased`: asks for facts that stood in the forget text. `unseen`: for facts of the concept that did not.
# `near`: for neighboring knowledge. `far`: for unrelated knowledge.
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
        concepts (`list[str]`, *optional*): What is erased; the banks of the role `"erased"` by default.
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
    concepts: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.concepts = self.concepts or self.named("erased")

    def named(self, role: Role) -> list[str]:
        """Names of the banks of a role."""
        return [name for name in self.banks if self.roles[name] == role]


def built_in_suite(
    concepts: Sequence[str], questions: int = 120, *, split: str = "test", seed: int = 0
) -> EvaluationSuite:
    """Everything the built-in banks can say about an erasure.

    A concept's bank `<concept>` holds plain questions, and `<concept>-<family>` those of each other family that the
    split has. The facts that stand in no forget text form banks `<concept>-unseen` and `<concept>-unseen-<family>`.

    Args:
        concepts (`Sequence[str]`):
            Erased concepts, among those with built-in facts: `"capitals"`, `"elements"`.
        questions (`int`, *optional*, defaults to `120`):
            Questions drawn from each bank; two thirds of them from another family, two sevenths about facts that stand
            in no forget text, half as many open questions (a tenth about what is to be kept), and a third as many
            prompts. Each subject is asked about once before any is asked about again.
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
    suite.concepts = list(concepts)
    near: set[str] = set()
    for concept in concepts:
        held_out = held_out_subjects(concept)
        seen = {fact.subject for fact in facts_of(concept)} - held_out
        near |= set(bank_record(concept).get("near", ()))
        parts: tuple[tuple[str, Role, Any], ...] = (
            (concept, "erased", seen), (f"{concept}-unseen", "unseen", held_out)
        )  # fmt: skip
        for name, role, subjects in parts:
            for family in bank_families(concept, split):
                bank = load_bank(concept, subjects=frozenset(subjects), split=split, family=family)
                bank_name = name if family == PLAIN else f"{name}-{family}"
                suite.banks[bank_name] = draw_questions(bank, bank_size(questions, role, family), rng)
                suite.roles[bank_name] = role
                # One wording to a figure, so that answers differ for their subjects alone.
                asked = [OpenQuestion(q.text, q.answer, q.aliases) for q in _first_wording(bank, questions // 2, rng)]
                if family == "cloze":
                    suite.cloze[name] = asked
                elif family == PLAIN:
                    suite.open_questions[name] = asked
        prompts = bank_record(concept)["prompts"]
        plain = load_bank(concept, subjects=frozenset(seen), split=split)
        for index, question in enumerate(_first_wording(plain, questions // 3, rng)):
            suite.concept_prompts.append(prompts[index % len(prompts)].format(subject=question.subject))
        suite.forget_texts += _draw(load_texts(concept)["text"][:], len(suite.retain_texts), rng)
    for name in BANKS:
        if name not in concepts:
            bank = load_bank(name, split=split)
            suite.banks[name] = _draw(bank, questions, rng)
            suite.roles[name] = "near" if name in near else "far"
            # A few that are answered freely show what is kept; they are drawn apart, so that no other draw changes.
            kept = _draw(bank, questions // 10, random.Random(seed))
            suite.open_questions[name] = [OpenQuestion(q.text, q.answer, q.aliases) for q in kept]
    return suite


def bank_size(questions: int, role: Role, family: str = PLAIN) -> int:
    """How many questions are drawn into a bank where `questions` is the size of a plain one."""
    if role == "unseen":
        return questions * 2 // 7
    return questions if family == PLAIN else questions * 2 // 3


def draw_questions(bank: Sequence[Question], count: int, rng: random.Random) -> list[Question]:
    """Draw questions in random order so that each subject is asked about once before any is asked about again."""
    shuffled = _draw(bank, len(bank), rng)
    asked: Counter[str] = Counter()
    rounds = []
    for question in shuffled:
        rounds.append(asked[question.subject])
        asked[question.subject] += 1
    order = sorted(range(len(shuffled)), key=rounds.__getitem__)
    return [shuffled[index] for index in order[:count]]


def _first_wording(bank: Sequence[Question], count: int, rng: random.Random) -> list[Question]:
    """One question about each subject, in the first wording that fits it."""
    return _draw(list({question.subject: question for question in reversed(bank)}.values()), count, rng)


def _draw(items: Sequence[Any], count: int, rng: random.Random) -> list[Any]:
    return rng.sample(list(items), min(count, len(items)))
