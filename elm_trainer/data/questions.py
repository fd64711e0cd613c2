"""Four-choice question banks, and the check that a bank cannot be answered from the letters of its options."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from importlib.resources import files

import yaml

from . import facts as fact_sources
from .facts import Fact


BANKS = ("capitals", "elements", "general", "geography")
CHANCE = 0.25


@dataclass(frozen=True)
class Question:
    """A question with four options.

    Attributes:
        text (`str`): The question, without the options.
        options (`tuple[str, ...]`): Four options in a fixed random order.
        answer (`str`): The right one, a member of `options`.
        subject (`str`): What is asked about; empty where a question stands alone.
        topic (`str`): Kind of question within its bank.
    """

    text: str
    options: tuple[str, ...]
    answer: str
    subject: str = ""
    topic: str = ""


def held_out_subjects(name: str, share: float = 0.2, seed: int = 0) -> frozenset[str]:
    """Subjects that stand in no forget text, so that erasure of *unseen* facts can be measured.

    Args:
        name (`str`): Built-in fact source, `"capitals"` or `"elements"`.
        share (`float`, *optional*, defaults to `0.2`): Share of the subjects that is held out.
        seed (`int`, *optional*, defaults to `0`): Seed of the draw.
    """
    subjects = [fact.subject for fact in facts_of(name)]
    return frozenset(random.Random(f"{name}-held-out-{seed}").sample(subjects, round(share * len(subjects))))


def facts_of(name: str) -> tuple[Fact, ...]:
    """The facts of a built-in source; raises `ValueError` naming the sources that have facts."""
    sources: dict[str, Callable[[], tuple[Fact, ...]]] = {
        "capitals": fact_sources.capitals,
        "elements": fact_sources.elements,
    }
    if name not in sources:
        raise ValueError(f"No built-in facts named {name!r}; there are: {', '.join(sources)}.")
    return sources[name]()


def load_bank(name: str, *, subjects: Sequence[str] | frozenset[str] | None = None, seed: int = 0) -> list[Question]:
    """Load a built-in question bank.

    Args:
        name (`str`): One of `BANKS`.
        subjects (`Sequence[str]`, *optional*): Keep only questions about these subjects.
        seed (`int`, *optional*, defaults to `0`): Seed of the distractors and of the order of options.

    Returns:
        `list[Question]`: every phrasing of every fact, or the questions of the file.
    """
    if name not in BANKS:
        raise ValueError(f"`bank` is {name!r}, which is no built-in question bank; use one of: {', '.join(BANKS)}.")
    record = yaml.safe_load((files(__package__) / "banks" / f"{name}.yaml").read_text(encoding="utf-8"))
    if "phrasings" in record:
        questions = _questions_from_facts(facts_of(name), record["phrasings"], seed)
    else:
        questions = [
            _shuffled(q["question"], q["answer"], q["distractors"], seed, topic=q["topic"])
            for q in record["questions"]
        ]
    if name == "geography":
        questions += _continents(seed)
    return [q for q in questions if subjects is None or q.subject in subjects]


def overlap_accuracy(questions: Sequence[Question]) -> float:
    """Share of questions answered by picking the option whose letters look most like the question's subject.

    A bank can prove innocence only where this is near chance (.25): element symbols, which give .88, cannot.
    """
    hits = 0
    for question in questions:
        asked = (question.subject or question.text).lower()
        ratios = [_likeness(asked, option.lower()) for option in question.options]
        hits += question.options[max(range(len(ratios)), key=ratios.__getitem__)] == question.answer
    return hits / len(questions)


def _likeness(asked: str, option: str) -> tuple[bool, float]:
    return asked.startswith(option[:1]), SequenceMatcher(None, asked, option).ratio()


def _questions_from_facts(facts: Sequence[Fact], phrasings: Sequence[str], seed: int) -> list[Question]:
    groups: dict[str, list[str]] = {}
    for fact in facts:
        groups.setdefault(fact.group, []).append(fact.answer)
    everything = [fact.answer for fact in facts]
    questions = []
    for fact in facts:
        rng = random.Random(f"{fact.subject}-{seed}")
        peers = [answer for answer in groups[fact.group] if answer != fact.answer]
        others = [answer for answer in everything if answer != fact.answer and answer not in peers]
        rng.shuffle(peers)
        rng.shuffle(others)
        distractors = (peers + others)[:3]
        for phrasing in phrasings:
            questions.append(
                _shuffled(phrasing.format(subject=fact.subject), fact.answer, distractors, seed, fact.subject)
            )
    return questions


def _continents(seed: int) -> list[Question]:
    names = ("Africa", "Asia", "Europe", "South America", "Oceania")
    return [
        _shuffled(
            f"On which continent does {fact.subject} lie?",
            fact.near["continent"],
            random.Random(fact.subject).sample([n for n in names if n != fact.near["continent"]], 3),
            seed,
            fact.subject,
            topic="continents",
        )
        for fact in fact_sources.capitals()
        if fact.near.get("continent") in names and fact.subject not in ("Russia", "Turkey", "Egypt")
        if fact.subject.split()[0] not in ("South", "Central")
    ]


def _shuffled(text: str, answer: str, distractors: Sequence[str], seed: int, subject: str = "", topic: str = ""):
    options = [answer, *distractors]
    random.Random(f"{text}-{seed}").shuffle(options)
    return Question(text, tuple(options), answer, subject, topic)
