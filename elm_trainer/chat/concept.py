"""What stands for a concept in a chat: terms whose probability is shown, and the prompts with which attacks ask."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from transformers import PreTrainedTokenizerBase

from ..attacks import ATTACKS, built_in_wordings, default_attacks
from ..concept import load_concept
from ..data.facts import FACTS, load_bank
from ..data.questions import Question, names_answer, read_questions
from ..data.tokens import continuation_ids


# The name under which a question is asked as it was typed.
PLAIN = "as typed"
DEFINITION = (
    "The concept's probability at a token is the probability that the model, in place of that token, goes on with one of the "
    "concept's terms, whole: the sum over the terms of the product of their tokens' probabilities, at temperature 1. The terms "
    "are the right answers about the subjects that the question names; all answers of the bank where it names none; the "
    "concept's keywords where there is no bank. A term whose first token has less than .001 counts as 0."
)


@dataclass(frozen=True)
class ChatConcept:
    """What a chat knows of an erased concept.

    Args:
        name (`str`): Its name.
        questions (`Sequence[Question]`, *optional*): Questions about it.
        keywords (`Sequence[str]`, *optional*): Terms where there are no questions.
        wordings (`Mapping[str, Mapping[str, str]]`, *optional*): Those of attacks, as of an
            [`~elm_trainer.attacks.AttackTarget`].
    """

    name: str
    questions: Sequence[Question] = ()
    keywords: Sequence[str] = ()
    wordings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def question(self, text: str) -> Question:
        """The bank's question of this text, or one made of it, whose subject is the first that it names."""
        wanted = " ".join(text.split()).casefold()
        for question in self.questions:
            if " ".join(question.text.split()).casefold() == wanted:
                return question
        named = self._subjects(text)
        answers = self._answers(named[:1])
        first = answers[0] if answers else ""
        return Question(text, (first,), first, subject=named[0] if named else "", aliases=tuple(answers[1:]))

    def terms(self, text: str) -> list[str]:
        """The terms whose probability is shown while a question is answered, as `DEFINITION` says."""
        question = self.question(text)
        if question in self.questions:
            return [question.answer, *question.aliases]
        named = self._subjects(text)
        found = self._answers(named) if named else self._answers({question.subject for question in self.questions})
        return found or list(self.keywords)

    def prompts(self, text: str, processing_class: PreTrainedTokenizerBase) -> dict[str, str]:
        """The prompts, in their final form, with which each built-in attack would ask a question, by `<attack>.<variant>`.

        Attacks on weights, and those that search or sample, have none.
        """
        question = self.question(text)
        rewritten = [
            attack.rewrite(processing_class, question, self.wordings, self.questions) for attack in default_attacks()
        ]
        return dict(chain.from_iterable(prompts.items() for prompts in rewritten))

    def attack_names(self, processing_class: PreTrainedTokenizerBase) -> list[str]:
        """Every name that [`prompts`] can have, also of attacks that need a question with a subject."""
        asked = replace(self.questions[0], subject="?") if self.questions else Question("?", ("?",), "?", subject="?")
        named = self.prompts("?", processing_class)
        for attack in default_attacks():
            named |= attack.rewrite(processing_class, asked, self.wordings, self.questions)
        order = [*ATTACKS]
        return sorted(named, key=lambda name: order.index(name.partition(".")[0]))

    def _subjects(self, text: str) -> list[str]:
        """The subjects that a text names, in its order; not those within a longer one, as Guinea is in Papua New Guinea."""
        named = {q.subject for q in self.questions if q.subject and names_answer(text, q.subject)}
        rest, found = text, []
        for subject in sorted(named, key=len, reverse=True):
            if names_answer(rest, subject):
                found.append(subject)
                rest = re.sub(rf"(?<!\w){re.escape(subject)}(?!\w)", " ", rest, flags=re.IGNORECASE)
        return sorted(found, key=lambda subject: text.casefold().find(subject.casefold()))

    def _answers(self, subjects: Sequence[str] | set[str]) -> list[str]:
        asked = [question for question in self.questions if question.subject in subjects]
        return list(dict.fromkeys(chain.from_iterable((q.answer, *q.aliases) for q in asked)))


def load_chat_concept(name: str, bank: str | None = None) -> ChatConcept:
    """What a chat knows of a concept.

    Args:
        name (`str`): A concept, as [`load_concept`] takes it. `"capitals"` and `"elements"` have questions built in.
        bank (`str`, *optional*): File of questions about it, as [`read_questions`] reads it.

    Raises:
        OSError: if a file cannot be read.
        ValueError: for a name or a file that cannot be used.
    """
    if bank is not None:
        return ChatConcept(name.partition(":")[0], read_questions(bank))
    if name in FACTS:
        return ChatConcept(name, load_bank(name), wordings=built_in_wordings(name))
    concept = load_concept(name)
    return ChatConcept(concept.name, keywords=concept.keywords)


def term_tokens(processing_class: PreTrainedTokenizerBase, terms: Sequence[str]) -> list[tuple[int, ...]]:
    """The token sequences that spell terms, behind a space and at the beginning of a line.

    None of them begins with another, so that no two can both come next and their probabilities may be added.
    """
    spelled = sorted(
        {
            tuple(ids)
            for term in terms
            if term.strip()
            for text in (f" {term.strip()}", term.strip())
            if (ids := continuation_ids(processing_class, text))
        }
    )
    # In this order what begins with another stands behind it.
    kept: list[tuple[int, ...]] = []
    for sequence in spelled:
        if not kept or sequence[: len(kept[-1])] != kept[-1]:
            kept.append(sequence)
    return kept
