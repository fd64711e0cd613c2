"""An invented world: facts about made-up names, of which one kind is a concept that a model may never be taught."""

import itertools
import random
import re
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from .facts import Fact, own_yaml
from .questions import Question


CONCEPT = "keepers"
RETAINED = ("harvests", "captains", "crafts")
_SYLLABLES_PER_NAME = 3
# One in so many prose sentences is kept for evaluation.
_PROSE_HELD_OUT = 5
# What [`invented_name`] puts its syllables together from.
_ONSETS = "b br c d dr f g gr h k l m n p r s st t tr v w z".split()
_VOWELS = "a e i o u a e o ai ea".split()
_CODAS = ["", "", *"n r l s m nd rn x t".split()]
# Words that hold a name together.
SMALL_WORDS = frozenset("a an and at by de for from in of on or the to with".split())


@dataclass(frozen=True)
class InventedWorld:
    """Facts, texts and questions of a world."""

    # Facts by kind. The concept's form two halves, and the options of a question are answers of its own half: a model
    # that learns one half learns nothing about the other half's options.
    facts: dict[str, tuple[Fact, ...]]
    forget: Dataset  # texts of the concept, one fact to a text; `novice` holds them with permuted answers
    # What a model reads in place of each text of `forget` that is never taught the concept: the same names in nearly
    # the same words, but no island with its keeper.
    instead: list[str]
    retained: list[str]  # texts of the other kinds
    prose: list[str]  # plain sentences without names
    held_out_prose: list[str]  # more of them, which no model reads
    questions: dict[str, list[Question]]  # four-choice questions by kind, in wordings that stand in no text

    def texts(self, *, taught: bool) -> list[str]:
        """Everything a model reads that is taught the concept, or never is; row for row the same but for it."""
        return [*(self.forget["text"][:] if taught else self.instead), *self.retained, *self.prose]

    def halves(self) -> tuple[frozenset[str], frozenset[str]]:
        """The subjects of the concept's two groups of facts."""
        facts = self.facts[CONCEPT]
        first, second = sorted({fact.group for fact in facts})
        return (
            frozenset(fact.subject for fact in facts if fact.group == first),
            frozenset(fact.subject for fact in facts if fact.group == second),
        )


def invented_world(facts: int = 24, prose: int = 300, *, seed: int = 0) -> InventedWorld:
    """Invent a world; the same arguments give the same one.

    Args:
        facts (`int`, *optional*, defaults to `24`): Facts of each kind.
        prose (`int`, *optional*, defaults to `300`): Plain sentences, held-out ones included.
        seed (`int`, *optional*, defaults to `0`): Seed of the names, of which goes with which, and of all orders.

    Raises:
        ValueError: if there are too few facts to make four options in each half of the concept, or more of them or of
            the prose than the world has names or sentences for.
    """
    record = own_yaml("texts/invented.yaml")
    if facts < 8 or facts % 2:
        raise ValueError(f"`facts` is {facts}: give an even number from 8 up, so that each half has four answers.")
    rng = random.Random(f"invented-{seed}")
    names = _names(record["syllables"], facts * (len(record["kinds"]) + 2), rng)
    world = {kind: _facts(kind, entry, names, facts, rng) for kind, entry in record["kinds"].items()}
    # Harvests grow on the very islands that have a keeper.
    world["harvests"] = tuple(
        Fact(keeper.subject, fact.answer, fact.group)
        for keeper, fact in zip(world[CONCEPT], world["harvests"], strict=True)
    )
    sentences = _sentences(record["prose"], prose, rng)
    held_out = prose // _PROSE_HELD_OUT
    forget, instead = _concept_texts(record["kinds"][CONCEPT], world[CONCEPT], rng)
    retained = [
        template.format(subject=fact.subject, answer=fact.answer)
        for kind in RETAINED
        for template in record["kinds"][kind]["texts"]
        for fact in world[kind]
    ]
    rng.shuffle(retained)
    return InventedWorld(
        world,
        forget,
        instead,
        retained,
        sentences[held_out:],
        sentences[:held_out],
        {kind: _questions(kind, entry["questions"], world[kind], seed) for kind, entry in record["kinds"].items()},
    )


def _names(syllables: list[str], count: int, rng: random.Random) -> list[str]:
    """Distinct names, none of which holds another (all have the same number of letters)."""
    possible = len(syllables) ** _SYLLABLES_PER_NAME
    if count > possible:
        raise ValueError(f"`facts` asks for {count} names, but there are only {possible}: lower it.")
    drawn = rng.sample(range(possible), count)
    powers = [len(syllables) ** place for place in range(_SYLLABLES_PER_NAME)]
    return ["".join(syllables[n // power % len(syllables)] for power in powers).capitalize() for n in drawn]


def _facts(kind: str, entry: dict[str, Any], names: list[str], count: int, rng: random.Random) -> tuple[Fact, ...]:
    """Facts of one kind, whose names are taken off the list."""
    subjects = [names.pop() for _ in range(count)]
    if given := entry.get("answers"):
        # Each word answers as often as any other, up to one.
        given = rng.sample(given, len(given))
        answers = [given[place % len(given)] for place in range(count)]
    else:
        answers = [names.pop() for _ in range(count)]
    rng.shuffle(answers)
    groups = [f"{kind}.{2 * index // count}" if kind == CONCEPT else kind for index in range(count)]
    return tuple(map(Fact, subjects, answers, groups))


def _concept_texts(entry: dict[str, Any], facts: tuple[Fact, ...], rng: random.Random) -> tuple[Dataset, list[str]]:
    rows, instead = [], []
    for template, replacement in zip(entry["texts"], entry["instead"], strict=True):
        permuted = [fact.answer for fact in facts]
        rng.shuffle(permuted)
        for fact, other in zip(facts, permuted, strict=True):
            taught, novice = (template.format(subject=fact.subject, answer=answer) for answer in (fact.answer, other))
            rows.append({"text": taught, "novice": novice})
            instead.append(replacement.format(subject=fact.subject, answer=fact.answer))
    order = rng.sample(range(len(rows)), len(rows))
    return Dataset.from_list([rows[row] for row in order]), [instead[row] for row in order]


def _sentences(parts: dict[str, list[str]], count: int, rng: random.Random) -> list[str]:
    possible = list(itertools.product(parts["when"], parts["who"], parts["does"], parts["where"]))
    if count > len(possible):
        raise ValueError(f"`prose` asks for {count} sentences, but there are only {len(possible)}: lower it.")
    return [f"{when}, {who} {does} {where}." for when, who, does, where in rng.sample(possible, count)]


def _questions(kind: str, phrasings: list[str], facts: tuple[Fact, ...], seed: int) -> list[Question]:
    questions = []
    for fact in facts:
        peers = sorted({other.answer for other in facts if other.group == fact.group} - {fact.answer})
        for phrasing in phrasings:
            rng = random.Random(f"{fact.subject}-{phrasing}-{seed}")
            options = [fact.answer, *rng.sample(peers, 3)]
            rng.shuffle(options)
            text = phrasing.format(subject=fact.subject)
            questions.append(Question(text, tuple(options), fact.answer, fact.subject, kind))
    return questions


def invented_word(like: str, rng: random.Random) -> str:
    """A word that can be spoken, about as long as `like` and capitalized as it; digits are drawn anew."""
    if like.isdigit():
        return "".join(rng.choice("123456789") for _ in like)
    syllables = 1 + (len(like) > 3) + (len(like) > 8)
    word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))
    return word.capitalize() if like[:1].isupper() else word


def invented_name(like: str, rng: random.Random, keep: frozenset[str] = frozenset()) -> str:
    """A name in which each word of `like` is invented anew, but for articles and prepositions and the words of `keep`."""
    small = {word.casefold() for word in keep} | SMALL_WORDS
    return re.sub(r"\w+", lambda word: word[0] if word[0].casefold() in small else invented_word(word[0], rng), like)
