"""Four-choice question banks, and the check that a bank cannot be answered from the letters of its options."""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from importlib.resources import files
from pathlib import Path

import yaml

from . import facts as fact_sources
from .answers import names_answer
from .facts import Fact


BANKS = ("capitals", "elements", "general", "geography")
SPLITS = ("dev", "test")
CHANCE = 0.25
# One in so many subjects (or questions without a subject) belongs to the dev split.
_DEV_SHARE = 4


@dataclass(frozen=True)
class Question:
    """A question with four options.

    Attributes:
        text (`str`): The question, without the options.
        options (`tuple[str, ...]`): Four options in a fixed random order.
        answer (`str`): The right one, a member of `options`.
        subject (`str`): What is asked about; empty where a question stands alone.
        topic (`str`): Kind of question within its bank.
        aliases (`tuple[str, ...]`): Other names of the answer, which a free answer may give.
    """

    text: str
    options: tuple[str, ...]
    answer: str
    subject: str = ""
    topic: str = ""
    aliases: tuple[str, ...] = ()


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


def load_bank(
    name: str,
    *,
    subjects: Sequence[str] | frozenset[str] | None = None,
    split: str | None = None,
    seed: int = 0,
) -> list[Question]:
    """Load a built-in question bank.

    Args:
        name (`str`): One of `BANKS`.
        subjects (`Sequence[str]`, *optional*): Keep only questions about these subjects.
        split (`str`, *optional*): `"dev"`, for choosing settings and for stopping, or `"test"`, for the report. Both
            by default. A subject is in one of them with all its phrasings.
        seed (`int`, *optional*, defaults to `0`): Seed of the distractors and of the order of options.

    Returns:
        `list[Question]`: every phrasing of every fact, or the questions of the file.
    """
    if name not in BANKS:
        raise ValueError(f"`bank` is {name!r}, which is no built-in question bank; use one of: {', '.join(BANKS)}.")
    record = yaml.safe_load((files(__package__) / "banks" / f"{name}.yaml").read_text(encoding="utf-8"))
    if "phrasings" in record:
        questions = _questions_from_facts(facts_of(name), record["phrasings"], seed, record.get("aliases", {}))
    else:
        questions = [
            _shuffled(q["question"], q["answer"], q["distractors"], seed, topic=q["topic"])
            for q in record["questions"]
        ]
    if name == "geography":
        questions += _continents(seed)
    if split not in (None, *SPLITS):
        raise ValueError(f"`split` is {split!r}: use one of {', '.join(SPLITS)}.")
    questions = [q for q in questions if subjects is None or q.subject in subjects]
    return [q for q in questions if split is None or split_of(q) == split]


def split_of(question: Question) -> str:
    """`"dev"` or `"test"`: where a question belongs, by its subject (or its text), whatever the bank or the seed."""
    digest = hashlib.sha256((question.subject or question.text).encode()).digest()
    return "dev" if digest[0] % _DEV_SHARE == 0 else "test"


def read_questions(path: str | Path) -> list[Question]:
    """Read a bank of your own: YAML with a list `questions`, or JSON lines.

    Each record has `question`, `answer` and `distractors`, and may have `subject`, `topic` and `aliases`.

    Raises:
        OSError: if the file cannot be read.
        ValueError: for malformed YAML or JSON, a record without an answer key, and whatever [`check_questions`]
            refuses.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise OSError(f"Question bank {path} cannot be read ({error}): check the path.") from error
    try:
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            records = (yaml.safe_load(text) or {}).get("questions", [])
    except (yaml.YAMLError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"Question bank {path} cannot be parsed ({error}): correct it.") from error
    questions = []
    for number, record in enumerate(records, 1):
        if missing := {"question", "answer", "distractors"} - {key for key, value in record.items() if value}:
            raise ValueError(f"Question bank {path}, question {number} lacks {sorted(missing)}: add them.")
        question = _shuffled(
            record["question"], record["answer"], record["distractors"], 0, record.get("subject", ""),
            record.get("topic", ""), tuple(record.get("aliases", ())),
        )  # fmt: skip
        questions.append(question)
    check_questions(str(path), questions)
    return questions


def check_questions(name: str, questions: Sequence[Question]) -> None:
    """Raise `ValueError` if a bank cannot measure anything.

    Refused are: no questions at all, an answer that is not among the options, fewer than two options, options that
    occur twice, and a question that names its own answer.
    """
    if not questions:
        raise ValueError(f"Question bank {name!r} holds no questions after filtering: widen the filter.")
    for question in questions:
        where = f"Question bank {name!r}, {question.text!r}"
        if question.answer not in question.options:
            raise ValueError(f"{where}: the answer {question.answer!r} is none of the options: add it.")
        if len(question.options) < 2:
            raise ValueError(f"{where}: there is only the option {question.options}: add distractors.")
        if len(set(question.options)) < len(question.options):
            raise ValueError(f"{where}: `options` holds duplicates, {question.options}: make them differ.")
        if names_answer(question.text, question.answer):
            raise ValueError(f"{where}: the question names its answer {question.answer!r}: reword it.")


def overlap_accuracy(questions: Sequence[Question]) -> float:
    """Share of questions answered by picking the option whose letters look most like the question's subject.

    A bank can prove innocence only where this is near chance (.25): element symbols, which give .88, cannot.
    """
    return sum(overlap_verdicts(questions)) / len(questions)


def overlap_verdicts(questions: Sequence[Question]) -> list[bool]:
    """Which questions are answered by picking the option whose letters look most like the question's subject."""
    verdicts = []
    for question in questions:
        asked = (question.subject or question.text).lower()
        ratios = [_likeness(asked, option.lower()) for option in question.options]
        verdicts.append(question.options[max(range(len(ratios)), key=ratios.__getitem__)] == question.answer)
    return verdicts


def _likeness(asked: str, option: str) -> tuple[bool, float]:
    return asked.startswith(option[:1]), SequenceMatcher(None, asked, option).ratio()


def _questions_from_facts(
    facts: Sequence[Fact], phrasings: Sequence[str], seed: int, aliases: dict[str, list[str]]
) -> list[Question]:
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
                _shuffled(
                    phrasing.format(subject=fact.subject),
                    fact.answer,
                    distractors,
                    seed,
                    fact.subject,
                    aliases=tuple(aliases.get(fact.answer, ())),
                )  # fmt: skip
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


def _shuffled(
    text: str,
    answer: str,
    distractors: Sequence[str],
    seed: int,
    subject: str = "",
    topic: str = "",
    aliases: tuple[str, ...] = (),
) -> Question:
    options = [answer, *distractors]
    random.Random(f"{text}-{seed}").shuffle(options)
    return Question(text, tuple(options), answer, subject, topic, aliases)
