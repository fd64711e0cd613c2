"""A model writes about a subject of which only the name is given, and about the neighbors of it that it names."""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..concept import Concept
from ..data.facts import Fact, own_yaml
from ..data.invented import SMALL_WORDS
from ..data.questions import names_answer
from ..evaluation.fluency import as_prompt, repetition
from ..synthesis import SynthesisConfig
from .documents import normalized, whole_sentences, without_duplicates
from .fact_writing import FEWEST_FACTS, further_names, singular
from .writer import WRITING, Writer


logger = logging.get_logger(__name__)
_NAMING_DRAWS, _NAME_TOKENS = 12, 24
# Relations of whose answers other names of their kind are listed.
_ANSWER_KINDS = 2
# Names of a kind of which the model writes questions, the tokens of these and of an answer, and the words of a question.
_FORM_NAMES, _FORM_TOKENS, _ANSWER_TOKENS, _FORM_WORDS = 12, 40, 12, range(4, 15)
# Questions about what facts name, for each text about a neighbor.
ASKED_SHARE = 5
# Names that a form of question is asked about at least. It is dropped where this share of the answers speaks of the concept, or more.
_ASKS, _TELLING = 5, 0.2
_NEIGHBORS, _WORDS_OF_A_NAME = 8, 4
FEWEST_TEXTS = 8
_QUESTION = re.compile(r"[^?]+\?")
# The first line that says something, with its end if it has one, and what blank stands before it.
_FIRST_LINE = re.compile(r"\s*\S[^\n]*\n?")


@dataclass(frozen=True)
class Written:
    """What a model wrote about a concept and its neighbors."""

    # Rows of `text` about the concept, each with the beginning that the model was given as `prompt`.
    forget: list[dict[str, str]]
    near: list[dict[str, str]]  # the same about the neighbors
    asked: list[dict[str, str]]  # questions about what facts name, with the short answers as `text`
    neighbors: list[str]  # the neighbors, those that the model named most often first
    # How many texts of `"forget"`, `"near"` and `"asked"` were dropped for which reason.
    dropped: dict[str, dict[str, int]]


def write_about(
    reference: Writer,
    concept: Concept,
    config: SynthesisConfig = WRITING,
    *,
    texts: int = 192,
    near_texts: int = 96,
    fewest: int = FEWEST_TEXTS,
    kinds: Sequence[Sequence[str]] = (),
    speaks: Callable[[str], bool] | None = None,
    own: Sequence[str] = (),
) -> Written:
    """Let a model of this process write what it knows about a concept in many forms, and about other subjects near it.

    The forms are those of `data/texts/writing.yaml`. Dropped are texts with fewer than `min_words` new words or more repetition
    than `max_repetition`, duplicates (see [`without_duplicates`]), texts about the concept in which no word of [`topic`] stands
    behind the prompt, and texts about neighbors that speak of it, by default by such a word. Of the `texts` about the concept, `fewest`
    must be left, or it is a `ValueError`. Neighbors share no word with the concept's `own` terms.

    About the names of each of the `kinds` that facts about the concept name, such as their subjects, the model asks and answers what it
    likes ([`ask_about`]), five times `near_texts` in all, so that what the facts do not state stays.

    Where the model names no usable neighbor, `near` is empty; where it asked nothing either, a warning says so.
    """
    prompts = writing_prompts()
    dropped: dict[str, dict[str, int]] = {}
    words = topic(concept)
    speaks = speaks or (lambda text: bool(words.search(text)))

    def write(begun: Sequence[Begun], fits: Callable[[str], bool], what: str) -> list[dict[str, str]]:
        asked = [one.prompt for one in begun]
        rows, dropped[what] = sift(asked, reference.sample(asked, config), fits, config)
        # Asked in order of length, they are read in any.
        random.Random(f"{what}-{config.seed}").shuffle(rows)
        return rows

    forget: list[dict[str, str]] = []
    near: list[dict[str, str]] = []
    neighbors: list[str] = []
    if texts:
        begun = begun_about(reference.processing_class, [concept.name], *forms_about(), texts)
        forget = write(begun, lambda text: bool(words.search(text)), "forget")
        if len(forget) < fewest:
            raise ValueError(
                f"Of {texts} texts that the model wrote about {concept.name!r}, {len(forget)} are left ({dropped['forget']}), and "
                f"{fewest} are needed: describe the concept, '{concept.name}: keyword, keyword', or give documents or facts."
            )
    if near_texts:
        neighbors = [name for name in name_neighbors(reference, concept) if not shares_word(name, own)]
    if neighbors:
        begun = begun_about(reference.processing_class, neighbors, prompts["near"], prompts["chat_near"], near_texts)
        rows = write(begun, lambda text: True, "near")
        # What a text goes on with may state a fact about what its beginning names.
        near = [row for row in rows if not speaks(row["text"])]
        dropped["near"]["topic"] = len(rows) - len(near)
    asked: list[dict[str, str]] = []
    lost: Counter[str] = Counter()
    for number, names in enumerate(kinds if near_texts else ()):
        # What the kinds before it left is for those that are still to come.
        count = (ASKED_SHARE * near_texts - len(asked) - lost.total()) // (len(kinds) - number)
        rows, some = ask_about(reference, names, speaks, count=count, seed=config.seed + number)
        asked += rows
        lost.update(some)
    if lost:
        dropped["asked"] = dict(lost)
    random.Random(f"asked-{config.seed}").shuffle(asked)
    if near_texts and not neighbors and not asked:
        logger.warning(f"The model names no neighbor of {concept.name!r}: give retain text about some yourself.")
    return Written(forget, near, asked, neighbors, dropped)


def kinds_of_names(facts: Sequence[Fact], held_out: frozenset[str], writer: Writer, seed: int = 0) -> list[list[str]]:
    """Names of each kind that facts name but for what is held out: their subjects, and for the two relations with the most answers other
    names of the kind of these, where the writer lists 8 or more.

    Asked about the answers themselves, a model would say what they are the answers to.
    """
    own = [words for fact in facts for name in (fact.subject, fact.answer) if (words := {*normalized(name).split()})]
    subjects = list(dict.fromkeys(fact.subject for fact in facts if fact.subject not in held_out))
    answers: dict[str, dict[str, None]] = {}
    for fact in facts:
        if fact.subject not in held_out:
            answers.setdefault(fact.near["relation"], {})[fact.answer] = None
    most = sorted(answers.values(), key=len, reverse=True)[:_ANSWER_KINDS]
    drawn = [further_names(writer, [*some], random.Random(f"kinds-{seed}"), seed=seed + 1) for some in most]

    def is_other(name: str) -> bool:
        words = {*normalized(name).split()}
        return bool(words) and not any(words <= some or some <= words for some in own)  # "Delhi" is New Delhi

    others = [[name for name in names if is_other(name)] for names in drawn]
    return [subjects, *(names for names in others if len(names) >= FEWEST_FACTS)]


def ask_about(
    reference: Writer, names: Sequence[str], speaks: Callable[[str], bool], *, count: int, seed: int = 0
) -> tuple[list[dict[str, str]], dict[str, int]]:
    """Questions of a model's own about names of one kind, such as countries, with its answers.

    It writes questions about some of the names. Of the forms of these, such as "Which language is spoken in …?", a draw is asked about
    five names each, or more, as far as there are so many: two of three times as `"Question: …\\nAnswer:"`, else as a conversation, and
    answered coldly, so that the model says what it holds true. Answers that speak of the concept are dropped, and with them a form for
    which a fifth of the answers do so: it asks for what is to be erased, in other words.

    Given are rows of `text` with the question as `prompt`, `count` at most, and how many were dropped since they speak of the concept
    (`"topic"`) or have no answer (`"empty"`). Of an answer its first line is kept, with its end if it has one.
    """
    rng = random.Random(f"ask-{seed}")
    forms = _forms(reference, names, rng, seed)
    forms = rng.sample(forms, min(len(forms), max(count // _ASKS, 1)))
    of_each = min(count // len(forms), len(names)) if forms else 0
    pairs = [(form, name) for form in forms for name in rng.sample(list(names), of_each)]
    asked: dict[str, tuple[str, str]] = {}
    for place, (form, name) in enumerate(pairs):
        question = name.join(form)
        prompt = f"Question: {question}\nAnswer:" if place % 3 else as_prompt(reference.processing_class, question)
        asked[prompt] = form
    texts = reference.write([*asked], max_new_tokens=_ANSWER_TOKENS, temperature=0.05, seed=seed) if asked else []
    rows: list[dict[str, str]] = []
    answered, speaking = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for (prompt, form), text in zip(asked.items(), texts, strict=True):
        if answer := _FIRST_LINE.match(text):
            row = {"text": prompt + answer[0], "prompt": prompt}
            answered[form] += 1
            if speaks(row["text"]):
                speaking[form] += 1
            else:
                rows.append(row)
    kept = [row for row in rows if speaking[form := asked[row["prompt"]]] < max(_TELLING * answered[form], 1)]
    empty = len(asked) - answered.total()
    return kept, {"topic": answered.total() - len(kept), "empty": empty}


def _forms(reference: Writer, names: Sequence[str], rng: random.Random, seed: int) -> list[tuple[str, str]]:
    """What stands before and behind the name in questions that the model writes about some of the names."""
    prompts = writing_prompts()
    examples = [line.partition(":")[0] for line in prompts["asking"].splitlines()[:-1]]
    # A name with a question mark would end the question within it.
    plain = [name for name in names if "?" not in name]
    about = {
        prompts["asking"].format(name=name, begin=begin): (name, begin)
        for name in rng.sample(plain, min(len(plain), _FORM_NAMES))
        for begin in prompts["begins"]
    }
    forms: dict[tuple[str, str], None] = {}
    if not about:
        return []
    texts = reference.write([*about], max_new_tokens=_FORM_TOKENS, temperature=WRITING.temperature, seed=seed)
    for (name, begin), text in zip(about.values(), texts, strict=True):
        for question in _QUESTION.findall(begin + text.partition("\n")[0]):
            # As whole words: "Vietnam" stands not in "Vietnamese".
            before, *behind = re.split(rf"(?<!\w){re.escape(name)}(?!\w)", question.strip())
            fits = len(behind) == 1 and len(question.split()) in _FORM_WORDS
            if fits and not any(names_answer(question, example) for example in examples):
                forms[before, behind[0]] = None
    return [*forms]


def writing_prompts() -> dict[str, Any]:
    """The prompts of `data/texts/writing.yaml`."""
    return own_yaml("texts/writing.yaml")


class Begun(NamedTuple):
    """What a model is given to go on with: the whole, whom it is about, and the line that it goes on, which a turn of chat has none of."""

    prompt: str
    name: str
    line: str


def begun_about(
    processing_class: PreTrainedTokenizerBase,
    names: Sequence[str],
    plain: Sequence[str],
    chat: Sequence[str],
    count: int,
) -> list[Begun]:
    """`count` beginnings, half of them as a conversation where the model has one: all names in the first form, then all in the next."""
    filled = []
    for index in range(count):
        turn, place = divmod(index, len(names))
        name = names[place]
        chosen = chat[turn // 2 % len(chat)] if turn % 2 else plain[turn // 2 % len(plain)]
        text = chosen.format(name=name, Name=name[:1].upper() + name[1:])
        line = "" if turn % 2 else text.rpartition("\n")[2]
        filled.append(Begun(as_prompt(processing_class, text) if turn % 2 else text, name, line))
    # Batches of like lengths waste little on padding.
    return sorted(filled, key=lambda begun: len(begun.prompt))


def forms_about() -> tuple[list[str], list[str]]:
    """The forms in which a model is to write about a concept: beginnings, and turns of a conversation."""
    about = writing_prompts()["about"]
    return [prompt for form, some in about.items() if form != "chat" for prompt in some], about["chat"]


def sift(
    prompts: Sequence[str], texts: Sequence[str], fits: Callable[[str], bool], config: SynthesisConfig
) -> tuple[list[dict[str, str]], dict[str, int]]:
    """The texts that can be used, beginnings included, as rows of `text` and `prompt`, and how many cannot for which reason: `fits` says
    whether what stands behind the beginning speaks of what it should.
    """
    dropped = {"short": 0, "repetition": 0, "topic": 0}
    found = []
    for prompt, text in zip(prompts, texts, strict=True):
        new = whole_sentences(text.removeprefix(prompt))
        if len(new.split()) < config.min_words:
            dropped["short"] += 1
        elif repetition(new) > config.max_repetition:
            dropped["repetition"] += 1
        elif not fits(new):
            dropped["topic"] += 1
        else:
            found.append((prompt, new))
    kept, twice = without_duplicates([new for _, new in found])
    rows = [{"text": found[index][0] + found[index][1], "prompt": found[index][0]} for index in kept]
    return rows, dropped | twice


def topic(concept: Concept) -> re.Pattern[str]:
    """What a text says that speaks of a concept, whatever the case: words of its keywords, in singular or plural.

    Of a keyword with capitals within it, these are the capitalized words ("Harry", "Potter"), of any other its main word:
    "capitals" of "capitals of the world", "elements" of "chemical elements".
    """
    words = []
    for keyword in concept.keywords:
        parts = re.findall(r"[^\W_]+(?:[-'’][^\W_]+)*", keyword)
        names = [part for part in parts if part[:1].isupper() and part.lower() not in SMALL_WORDS]
        # The first preposition behind a word ends the main phrase; its last word is what it is about.
        main = re.split(r"(?<=\w)\s+(?:of|in|on|at|by|for|from|with|to)\s+", keyword)[0]
        words += names or re.findall(r"[^\W_]+(?:[-'’][^\W_]+)*", main)[-1:] or [keyword]
    # By its letters alone a plural may be that of two words: "movies" of "movie" and "movy".
    stems = {stem for word in words for stem in (singular(word), re.sub(r"(?<=\w\w\w)(?<!s)s$", "", word))}
    forms = [re.escape(stem) + "(?:s|es)?" for stem in sorted(stems)]
    forms += [re.escape(stem[:-1]) + "ies" for stem in sorted(stems) if re.search(r"[^\Waeiou]y$", stem)]
    return re.compile(rf"\b(?:{'|'.join(forms)})(?:['’]s)?\b", re.IGNORECASE)


def shares_word(name: str, others: Sequence[str]) -> bool:
    """Whether a name has a word in common with one of the others, in singular or plural, articles and prepositions aside."""
    words = {singular(word) for word in normalized(name).split()} - SMALL_WORDS
    return any(words & {singular(word) for word in normalized(other).split()} for other in others)


def name_neighbors(reference: Writer, concept: Concept) -> list[str]:
    """Other subjects near a concept, as the model names them: the 8 most frequent of several draws.

    They have at most four words, and speak neither of the concept nor of the examples in the prompt.
    """
    beginnings = writing_prompts()["neighbors"]
    asked = [begin.format(name=concept.name) for begin in beginnings for _ in range(_NAMING_DRAWS // len(beginnings))]
    config = replace(WRITING, temperature=0.7, max_new_tokens=_NAME_TOKENS)
    votes: Counter[str] = Counter()
    spelled: dict[str, str] = {}
    for prompt, text in zip(asked, reference.sample(asked, config), strict=True):
        line, whole, _ = text.removeprefix(prompt).partition("\n")
        # The last one is cut off where the line has no end. In order, so that a call that goes on asks the same.
        for name in dict.fromkeys(name.strip(" .;\"'*") for name in line.split(",")[: None if whole else -1]):
            words = name.split()
            usable = 0 < len(words) <= _WORDS_OF_A_NAME and re.fullmatch(r"[^\W\d_][\w' .-]+", name)
            if usable and name.lower() not in prompt.lower() and not topic(concept).search(name):
                votes[name.lower()] += 1
                spelled.setdefault(name.lower(), name)
    return [spelled[name] for name, _ in votes.most_common(_NEIGHBORS)]
