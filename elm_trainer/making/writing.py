"""A model writes about a subject of which only the name is given, about its neighbors, and about the terms that belong to it."""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from transformers.utils import logging

from ..concept import Concept
from ..data.invented import SMALL_WORDS
from ..data.questions import names_answer
from ..evaluation.likelihood import log_likelihoods
from ..synthesis import SynthesisConfig
from .documents import normalized, whole_words
from .facts import ASKED_SHARE, ask_about
from .knowledge import singular
from .writer import WRITING, Begun, Writer, agreed_names, begun_about, further_names, most_named, sift, writing_prompts


logger = logging.get_logger(__name__)
_NAMING_DRAWS, _NAME_TOKENS = 12, 24
_NEIGHBORS, _WORDS_OF_A_NAME = 8, 4
FEWEST_TEXTS = 8
# Lists that are asked for in each way, and the tokens of a text.
_DRAWS, _TOKENS = 8, 48
# Terms that are written about: of those that were listed, that recur, and that were listed further.
_LISTED, _RECURRING, _FURTHER = 24, 16, 24
# Colder than other texts: what is told of a term is to be what the model holds true.
_TEMPERATURE = 0.7
# A word recurs that so many texts hold, so many times as often as English and texts about other subjects do, and that is not frequent.
_FEWEST_TEXTS, _KEYNESS, _FREQUENT, _SHORTEST = 3, 25.0, 5.3, 3
# Zipf frequency from which even a listed word is none of a subject's terms: "people", "school".
_EVERYDAY = 5.6
# A word that a model takes for a verb or an adjective by so many nats is none of a subject's terms.
_NO_NOUN = 2.0
# Of the texts about a term more than this share speak of the subject.
_TELLS = 0.4
# Words of the beginning of a sentence. With fewer terms a subject is not described by them.
_SENTENCE, FEWEST_TERMS = 5, 8
_NO_TERMS = frozenset("etc more others other many".split())
_WORD = re.compile(r"[^\W\d_]+(?:[-'’][^\W\d_]+)*")
_NAME = re.compile(r"[^\W\d_][\w' -]+")


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

    forget, near, asked = list[dict[str, str]](), list[dict[str, str]](), list[dict[str, str]]()
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


def forms_about() -> tuple[list[str], list[str]]:
    """The forms in which a model is to write about a concept: beginnings, and turns of a conversation."""
    about = writing_prompts()["about"]
    return [prompt for form, some in about.items() if form != "chat" for prompt in some], about["chat"]


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
    found: list[str] = []
    for prompt, text in zip(asked, reference.sample(asked, config), strict=True):
        line, whole, _ = text.removeprefix(prompt).partition("\n")
        # The last one is cut off where the line has no end. In order, so that a call that goes on asks the same.
        for name in dict.fromkeys(name.strip(" .;\"'*") for name in line.split(",")[: None if whole else -1]):
            words = name.split()
            usable = 0 < len(words) <= _WORDS_OF_A_NAME and re.fullmatch(r"[^\W\d_][\w' .-]+", name)
            if usable and name.lower() not in prompt.lower() and not topic(concept).search(name):
                found.append(name)
    return [name for name, _ in most_named(found, str.lower)[:_NEIGHBORS]]


@dataclass(frozen=True)
class SubjectTexts:
    """What a model writes about a subject and its terms.

    Attributes:
        terms (`list[str]`): The subject's terms, each of which stands in the texts.
        texts (`list[str]`): The texts, without the beginnings that the model was given, but for such as begin a sentence.
        dropped (`dict[str, int]`): How many texts were dropped for which reason, `"topic"` with a name that tells of something else.
    """

    terms: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)


def write_by_terms(reference: Writer, concept: Concept, *, texts: int, seed: int = 0) -> SubjectTexts:
    """Let a model describe a subject: list its terms, and write about the subject and about each of the terms.

    Terms are what the model lists twice or more as belonging to the subject, what it lists further behind these, and of the words
    that recur in its texts ([`recurring_terms`]) its [`nouns`]. It writes five texts about each of up to 64 of them. A name whose texts
    speak neither of the subject nor of another of its terms, in most cases, tells of something else, such as India, which was listed
    behind Japan as a term of a war: it is left out with its texts.

    Args:
        reference ([`Writer`]): The model, in this process.
        concept ([`Concept`]): The subject.
        texts (`int`): Half of it is written about the subject itself, and as much about other subjects, to compare with.
        seed (`int`, *optional*, defaults to `0`): Seed of all draws.

    Returns:
        [`SubjectTexts`], without terms where the model gives fewer than 8.

    Raises:
        ImportError: if wordfreq is not installed.
    """
    import wordfreq  # noqa: F401  before anything is written

    about_it, turns = forms_about()
    of_terms = (writing_prompts()["near"], writing_prompts()["chat_near"])
    everything = ([*about_it, *of_terms[0]], [*turns, *of_terms[1]])
    dropped: Counter[str] = Counter()

    def write(names: Sequence[str], forms: tuple[list[str], list[str]], count: int) -> list[_Piece]:
        begun = begun_about(reference.processing_class, names, *forms, count)
        asked = {one.prompt: one for one in begun}
        prompts = [one.prompt for one in begun]
        found = reference.write(prompts, max_new_tokens=_TOKENS, temperature=_TEMPERATURE, seed=seed)
        rows, lost = sift(prompts, [a + b for a, b in zip(prompts, found, strict=True)], lambda text: True, WRITING)
        dropped.update(lost)
        pieces = []
        for row in rows:
            _, name, line = asked[row["prompt"]]
            new = row["text"].removeprefix(row["prompt"])
            pieces.append(_Piece(name, new, (line + new if len(line.split()) >= _SENTENCE else new).strip()))
        return pieces

    listed = listed_terms(reference, concept, seed)
    words = topic(concept)
    others = [name for name in writing_prompts()["others"] if not words.search(name) and not shares_word(name, listed)]
    beside = [piece.new for piece in write(others, everything, texts // 2)]
    dropped.clear()
    about = write([concept.name], everything, texts // 2)
    met = recurring_terms([piece.new for piece in about], beside)
    recurring = nouns(reference, met)
    core = _distinct([*listed, *recurring])
    if len(core) < FEWEST_TERMS:
        return SubjectTexts([], [piece.text for piece in about], dict(dropped))
    further = further_names(reference, listed or recurring, random.Random(f"terms-{seed}"), seed=seed)
    names = _distinct([*listed[:_LISTED], *recurring[:_RECURRING], *_usable(further)[:_FURTHER]])
    told = write(names, of_terms, sum(map(len, of_terms)) * len(names))
    kept = {name for name in names if _tells_of(name, told, core, concept)}
    left_out = {word for name in names if name not in kept for word in (name, name.lower())}
    dropped["topic"] += sum(piece.name not in kept for piece in told)
    about += [piece for piece in told if piece.name in kept]
    words_now = recurring_terms([piece.new for piece in about], beside)
    things = {*recurring, *nouns(reference, [word for word in words_now if word not in met])}
    everything_told = "\n".join(piece.text for piece in about)
    terms = [
        term
        for term in _distinct([*(name for name in names if name in kept), *(w for w in words_now if w in things)])
        if term not in left_out and whole_words([term]).search(everything_told)
    ]
    terms = terms if len(terms) >= FEWEST_TERMS else []
    return SubjectTexts(terms, [piece.text for piece in about], dict(dropped))


class _Piece(NamedTuple):
    """What a model wrote about a name, and the same with the line that was begun, where that begins a sentence: "Answer:" begins none."""

    name: str
    new: str
    text: str


def _tells_of(name: str, told: Sequence[_Piece], core: Sequence[str], concept: Concept) -> bool:
    """Whether texts about a name speak of the concept, by its name or a term that is another than this one."""
    texts = [piece.new for piece in told if piece.name == name]
    terms = [concept.name.removeprefix("the "), *(term for term in core if not shares_word(term, [name]))]
    words = whole_words(terms)
    return sum(bool(words.search(text)) for text in texts) > _TELLS * len(texts)


def _distinct(names: Sequence[str]) -> list[str]:
    """Names that differ in more than case and punctuation."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(normalized(name), name)
    return [*found.values()]


def _usable(names: Sequence[str]) -> list[str]:
    """Names that can be terms: neither what ends a list nor a frequent word."""
    from wordfreq import zipf_frequency

    found = []
    for name in (name.strip() for name in names):
        words = set(normalized(name).split()) - SMALL_WORDS - _NO_TERMS
        frequent = len(words) == 1 and zipf_frequency(*words, "en") >= _EVERYDAY
        if words and _NAME.fullmatch(name) and not frequent:
            found.append(name)
    return found


def listed_terms(writer: Writer, concept: Concept, seed: int = 0) -> list[str]:
    """What a model lists as belonging to a subject, twice or more, most often first. Raises `ImportError` without wordfreq."""
    begun = writing_prompts()["terms"]
    # An example that is the subject itself would take its best terms away, since what a prompt holds does not count.
    begun = [begin for begin in begun if not topic(concept).search(begin)] or begun
    prompts = [begin.format(name=concept.name) for begin in begun for _ in range(_DRAWS * 4 // len(begun))]
    # What the prompt holds itself is none of its answers.
    return _usable(agreed_names(writer, prompts, lambda prompt, name: not names_answer(prompt, name), seed))


def recurring_terms(texts: Sequence[str], beside: Sequence[str]) -> list[str]:
    """Words that texts hold far more often than English and other texts do, those first that stand in most texts.

    Args:
        texts (`Sequence[str]`): Texts about a subject.
        beside (`Sequence[str]`): Texts of the same forms about other subjects: what they hold too is the manner of the writer.

    Returns:
        `list[str]`: words of three letters or more in lower case, in three texts or more, 25 times as often as elsewhere; none that
        is among the few hundred most frequent, or that English does not know.

    Raises:
        ImportError: if wordfreq is not installed.
    """
    from wordfreq import zipf_frequency

    of_texts, of_others = (
        [[word.lower() for word in _WORD.findall(text)] for text in some] for some in (texts, beside)
    )
    counts, others = (Counter(word for words in some for word in words) for some in (of_texts, of_others))
    # In the order of the texts, not of a set, which differs from call to call.
    held = Counter(word for words in of_texts for word in dict.fromkeys(words))
    total, others_total = counts.total(), max(others.total(), 1)
    found = []
    for word, texts_of_it in held.most_common():
        zipf = zipf_frequency(word, "en")
        if texts_of_it < _FEWEST_TEXTS or len(word) < _SHORTEST or word in SMALL_WORDS or not 0 < zipf < _FREQUENT:
            continue
        elsewhere = max(10 ** (zipf - 9), others[word] / others_total)
        if counts[word] / total >= _KEYNESS * elsewhere:
            found.append(word)
    return found


def nouns(writer: Writer, words: Sequence[str]) -> list[str]:
    """Those of some words that a model takes for things, in their order.

    What recurs in texts about the human body are organs, and "vital", "plays" and "regulates" too. With these replaced as well, a
    novice reads a sentence of which nothing is left, and goes on as oddly.

    Args:
        writer ([`Writer`]): The model, in this process.
        words (`Sequence[str]`): Words.

    Returns:
        `list[str]`: those that are likelier behind a list of nouns than behind one of verbs or of adjectives, or at most 2 nats less.
    """
    lists = writing_prompts()["words"]
    pairs = [(begin, f" {word}") for word in words for some in lists.values() for begin in some]
    scores = iter(log_likelihoods(writer.model, writer.processing_class, pairs, description="Asking for nouns"))
    found = []
    for word in words:
        means = {kind: sum(next(scores) for _ in some) / len(some) for kind, some in lists.items()}
        if means.pop("nouns") > max(means.values()) - _NO_NOUN:
            found.append(word)
    return found
