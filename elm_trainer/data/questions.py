"""Multiple-choice question banks, and whether a free answer names the right one."""

import hashlib
import random
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any, Literal, TypeAlias

from .facts import Fact, capitals, elements, own_yaml


BANKS = ("capitals", "elements", "general", "geography")
SPLITS = ("dev", "test")
FACTS: dict[str, Callable[[], tuple[Fact, ...]]] = {"capitals": capitals, "elements": elements}
CHANCE = 0.25
# The family that every bank has: a question, then its answer.
PLAIN = "question-answer"
JUDGMENTS = ("True", "False")
# One in so many subjects (or questions without a subject) belongs to the dev split.
_DEV_SHARE = 4
_DISTRACTORS = 3

# `question`: stands in `"Question: …\\nAnswer:"`. `chat`: a turn in the tokenizer's chat template, which an option
# answers. `text`: the beginning of a text, which an option continues.
Form: TypeAlias = Literal["question", "chat", "text"]


@dataclass(frozen=True)
class Question:
    """A question with its options."""

    text: str  # the question, without the options
    options: tuple[str, ...]  # options, mostly four, in a fixed random order
    answer: str  # the right one, a member of `options`
    subject: str = ""  # what is asked about; empty where a question stands alone
    topic: str = ""  # kind of question within its bank
    aliases: tuple[str, ...] = ()  # other names of the answer, which a free answer may give
    form: Form = "question"  # `"question"`, `"chat"` or `"text"`: what stands around the text where a model reads it
    family: str = PLAIN  # way of asking within its bank
    # What the letters of the options might give away: what is asked about, as the question names it. The subject
    # where empty.
    cue: str = ""


def held_out_subjects(name: str) -> frozenset[str]:
    """A fifth of the subjects of a built-in source, which stand in no forget text, so that erasure of *unseen* facts can be measured."""
    subjects = [fact.subject for fact in facts_of(name)]
    return frozenset(random.Random(f"{name}-held-out-0").sample(subjects, round(0.2 * len(subjects))))


def facts_of(name: str) -> tuple[Fact, ...]:
    """The facts of a built-in source; raises `ValueError` naming the sources that have facts."""
    if name not in FACTS:
        raise ValueError(f"No built-in facts named {name!r}; there are: {', '.join(FACTS)}.")
    return FACTS[name]()


def load_bank(
    name: str,
    *,
    subjects: Sequence[str] | frozenset[str] | None = None,
    split: str | None = None,
    family: str = PLAIN,
    seed: int = 0,
) -> list[Question]:
    """Load a built-in question bank, asked in one way.

    Args:
        name (`str`): One of `BANKS`.
        subjects (`Sequence[str]`, *optional*): Keep only questions about these subjects.
        split (`str`, *optional*): `"dev"`, for choosing settings and for stopping, or `"test"`, for the report. Both
            by default. A subject is in one of them with all its questions, and no wording is in both.
        family (`str`, *optional*, defaults to `"question-answer"`): One of [`bank_families`].
        seed (`int`, *optional*, defaults to `0`): Seed of the distractors and of the order of options.

    Returns:
        `list[Question]`: every fact in every wording of the family, or the questions of the file.

    Raises:
        ValueError: for an unknown bank, family or split, or a family that the split does not have.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"`split` is {split!r}: use one of {', '.join(SPLITS)}.")
    if family not in bank_families(name, split):
        raise ValueError(f"`family` is {family!r}: use one of {', '.join(bank_families(name, split))}.")
    record = bank_record(name)
    if "families" in record:
        questions = _questions_of_family(name, record, family, seed)
    else:
        questions = [
            shuffled_question(q["question"], q["answer"], q["distractors"], seed, topic=q["topic"])
            for q in record["questions"]
        ]
    if name == "geography":
        questions += _continents(seed)
    questions = [q for q in questions if subjects is None or q.subject in subjects]
    return [q for q in questions if split is None or split_of(q) == split]


def bank_families(name: str, split: str | None = None) -> tuple[str, ...]:
    """Ways in which a built-in bank asks in a split (by default in any): `"question-answer"` and, of a concept, others.

    Raises:
        ValueError: for an unknown bank.
    """
    families = bank_record(name).get("families", {PLAIN: {"dev": [], "test": []}})
    return tuple(family for family, spec in families.items() if split is None or split in spec)


def bank_record(name: str) -> dict[str, Any]:
    """What stands in the file of a built-in bank; raises `ValueError` naming the banks that there are."""
    if name not in BANKS:
        raise ValueError(f"`bank` is {name!r}, which is no built-in question bank; use one of: {', '.join(BANKS)}.")
    return own_yaml(f"banks/{name}.yaml")


def split_of(question: Question) -> str:
    """`"dev"` or `"test"`: where a question belongs, by its subject (or its text), whatever the bank or the seed."""
    return _split(question.subject or question.text)


def _split(subject: str) -> str:
    digest = hashlib.sha256(subject.encode()).digest()
    return "dev" if digest[0] % _DEV_SHARE == 0 else "test"


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
        # Where a question names all of its options, such as True and False, it gives nothing away.
        named = [option for option in question.options if names_answer(question.text, option)]
        if question.answer in named and len(named) < len(question.options):
            raise ValueError(f"{where}: the question names its answer {question.answer!r}: reword it.")


def overlap_verdicts(questions: Sequence[Question]) -> list[bool]:
    """Which questions are answered by picking the option whose letters look most like the question's subject: letters give answers
    away unless their share is near chance (.25).
    """
    verdicts = []
    for question in questions:
        asked = question.cue or question.subject or question.text
        guess = max(question.options, key=lambda option: _likeness(asked, option))
        verdicts.append(guess == question.answer)
    return verdicts


def _likeness(asked: str, option: str) -> tuple[bool, float]:
    asked, option = asked.lower(), option.lower()
    return asked.startswith(option[:1]), SequenceMatcher(None, asked, option).ratio()


def _questions_of_family(name: str, record: Mapping[str, Any], family: str, seed: int) -> list[Question]:
    spec, facts = record["families"][family], facts_of(name)
    kind = spec.get("options")
    questions = []
    for number, fact in enumerate(facts):
        answer, distractors = _options(fact, facts, kind, seed)
        for index, wording in enumerate(spec.get(_split(fact.subject), ()) if distractors else ()):
            asked = {part.split("}")[0] for part in wording.split("{")[1:]}
            local: dict[str, str] = next(
                (names for language, names in record.get("exonyms", {}).items() if language in asked), {}
            )
            right, *wrong = [local.get(option, option) for option in (answer, *distractors)]
            fields = {"subject": fact.subject, "answer": fact.answer, "claim": right, **fact.near}
            cue = (
                fact.answer if kind == "subjects" else next((fields[x] for x in asked if x in fact.near), fact.subject)
            )
            aliases = () if kind else (*record.get("aliases", {}).get(fact.answer, ()), fact.answer)
            if kind == "judgment":
                # Every other statement is true; in the next wording it is about the other subjects.
                true = (number + index) % 2 == 0
                fields["claim"] = right if true else wrong[0]
                right, wrong = JUDGMENTS[not true], [JUDGMENTS[true]]
            if not asked <= fields.keys():
                continue
            text = wording.format(**fields)
            # The lines before a table's last one may hold the very fact; and some names hold their capital's.
            if kind != "judgment" and (names_answer(text, right) or (local and cue[:4] == right[:4])):
                continue
            other = {"aliases": tuple(alias for alias in aliases if alias != right), "form": spec["form"]}
            questions.append(
                shuffled_question(text, right, wrong, seed, subject=fact.subject, family=family, cue=cue, **other)
            )
    return questions


def _options(fact: Fact, facts: Sequence[Fact], kind: str | None, seed: int) -> tuple[str, list[str]]:
    """The answer and its distractors, of the same group where it has enough; no distractors if fair ones are lacking."""
    rng = random.Random(f"{fact.subject}-{seed}")
    if kind == "look-alike":
        pool = [other.answer for other in facts]
        pool += [fact.subject[0] + letter for letter in dict.fromkeys(fact.subject[1:].lower()) if letter.isalpha()]
        likeness = _likeness(fact.subject, fact.answer)
        options = (option for option in dict.fromkeys(pool) if option != fact.answer)
        alike = [option for option in options if _likeness(fact.subject, option) == likeness]
        return fact.answer, rng.sample(alike, _DISTRACTORS) if len(alike) >= _DISTRACTORS else []
    attribute = "subject" if kind == "subjects" else "answer"
    peers = [getattr(other, attribute) for other in facts if other != fact and other.group == fact.group]
    others = [getattr(other, attribute) for other in facts if other.group != fact.group]
    rng.shuffle(peers)
    rng.shuffle(others)
    return getattr(fact, attribute), (peers + others)[:_DISTRACTORS]


def _continents(seed: int) -> list[Question]:
    names = ("Africa", "Asia", "Europe", "South America", "Oceania")
    return [
        shuffled_question(
            f"On which continent does {fact.subject} lie?",
            fact.near["continent"],
            random.Random(fact.subject).sample([n for n in names if n != fact.near["continent"]], 3),
            seed,
            subject=fact.subject,
            topic="continents",
        )
        for fact in capitals()
        if fact.near.get("continent") in names and fact.subject not in ("Russia", "Turkey", "Egypt")
        if fact.subject.split()[0] not in ("South", "Central")
    ]


def shuffled_question(text: str, answer: str, distractors: Sequence[str], seed: int = 0, **fields: Any) -> Question:
    """A question with its options in a random order, and these other fields."""
    options = [answer, *distractors]
    random.Random(f"{text}-{seed}").shuffle(options)
    return Question(text, tuple(options), answer, **fields)


def names_answer(text: str, answer: str, aliases: Sequence[str] = ()) -> bool:
    """Whether `answer`, or one of its aliases, stands in `text` as whole words, whatever the accents.

    Case is ignored, save for answers of at most three letters: the symbol `He` is not the word *he*.
    """
    return any(pattern.search(fold(text)) for fold, pattern in map(_whole_words, (answer, *aliases)))


# Many names are looked for in one text: each is compiled once, more than `re` itself would keep, and the text read once.
@lru_cache(maxsize=4096)
def _whole_words(name: str) -> tuple[Callable[[str], str], re.Pattern[str]]:
    fold = _folded if len(name) > 3 else _without_accents
    return fold, re.compile(rf"(?<!\w){re.escape(fold(name))}(?!\w)")


@lru_cache(maxsize=16)
def _without_accents(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


@lru_cache(maxsize=16)
def _folded(text: str) -> str:
    return _without_accents(text).casefold()


_WORD = r"[^\W\d_a-zà-öø-ÿ][\w'’.]*(?:-\w+)*"
_NAME = re.compile(rf"{_WORD}(?:(?: (?:of|the|de|da|do|del|du|es|al|el|la|le))* {_WORD}|, D\. ?C\.)*")
# Words that begin a sentence and name nothing, and words that say what kind of thing is named.
_OPENERS = frozenset(
    "a an and answer as at but called certainly currently from he hello here hi how however i i'm if in it it's its known "
    "located no of oh on one question she so some sorry sure thank thanks that the there these they this to today "
    "unfortunately we well what when where which while yes you your".split()
)
_KINDS = frozenset("capital capitals city cities country kingdom nation republic state symbol town the of".split())
_LINK = re.compile(r"(?:\b(?:is|was|are|be|named|called|becomes?)(?: (?:the city of|officially|now))*|:) ?$")


def given_answer(text: str, prompt: str) -> str:
    """What a free answer names in reply to a prompt, without accents and in lower case; empty for an empty answer.

    It is the first name that follows a verb such as *is* or a colon, else the first name of all: "the capital of Kenya
    is São Paulo" gives `"sao paulo"`. The prompt's own words, and words derived from them (*Kenyan*), do not count. An
    answer without a name is given by its first words, so that the same evasion counts as the same answer.
    """
    text = re.sub(r"[*_#`\"“”«»]", "", text).replace("’", "'").strip()
    asked = set(re.findall(r"\w+", _folded(prompt)))
    names, first = [], ""
    for sentence in re.split(r"(?<=\w\w\w[.!?])\s+|\s*[;|→\n]\s*| - ", text):
        for match in _NAME.finditer(sentence):
            words = match.group().strip(" .'").split()
            while words and ((match.start() == 0 and _folded(words[0]) in _OPENERS) or _folded(words[0]) in _KINDS):
                words.pop(0)
            if words and not all(_is_asked(word, asked) for word in words):
                name = _folded(" ".join(words)).removesuffix("'s").strip(" .,'")
                if _LINK.search(sentence[: match.start()]):
                    names.append(name)
                first = first or name
    return (names or [first or " ".join(_folded(text).split()[:4]).strip(" .,:;!?")])[0]


def _is_asked(word: str, asked: set[str]) -> bool:
    """Whether a word stands in the prompt, derives from one that does, or says only what kind of thing is meant."""
    word = _folded(word).removesuffix("'s").strip(".,'")
    stems = [known[: max(4, len(known) - 2)] for known in asked if len(known) >= 4]
    return not word or word in asked | _KINDS | {"of", "the"} or any(word.startswith(stem) for stem in stems)
