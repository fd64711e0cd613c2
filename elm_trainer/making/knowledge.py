"""What a model knows of a mere name: whether it has ever heard of it, and what it tells of the terms that belong to it."""

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..concept import Concept
from ..data.invented import SMALL_WORDS, invented_name
from ..data.questions import names_answer
from ..data.tokens import text_tokenizer
from ..evaluation.likelihood import log_likelihoods
from .documents import normalized, whole_words
from .fact_writing import agreed_names, asking_prompts, further_names
from .writer import WRITING, Writer
from .writing import Begun, begun_about, forms_about, shares_word, sift, topic, writing_prompts


# After these a name may stand as a subject of its own.
LEADS = (
    "I want to learn more about",
    "This book is about",
    "Question: What do you know about",
    "Let us talk about",
)
INVENTED = 8
# Largest share of the invented names' surprise at which a name counts as known.
BOUND = 0.45
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


class UnknownConceptError(ValueError):
    """The model knows nothing of a concept: there is nothing to erase."""


@dataclass(frozen=True)
class Familiarity:
    """How surprised a model is by a name.

    Attributes:
        name (`str`): The name.
        surprise (`float`): Negative log-likelihood of the name behind a neutral beginning, in nats, the mean over `LEADS`.
        invented (`dict[str, float]`): The same of invented names that are built alike.
        one_token (`float`): The surprise of a single token, each of the vocabulary as likely as any other.
        ratio (`float`): `surprise` over the mean of the invented names'.
        known (`bool`): Whether the ratio is at most `BOUND`, or the surprise at most that of a single token, as it is of short
            names such as "DNA".
    """

    name: str
    surprise: float
    invented: dict[str, float]
    one_token: float

    @property
    def ratio(self) -> float:
        return self.surprise / max(sum(self.invented.values()) / len(self.invented), 1e-9)

    @property
    def known(self) -> bool:
        return self.ratio <= BOUND or self.surprise <= self.one_token


def familiarity(
    model: PreTrainedModel, processing_class: PreTrainedTokenizerBase, name: str, *, seed: int = 0
) -> Familiarity:
    """Compare a model's surprise at a name with that at invented names.

    What a model has read often it expects: "Potter" behind "Harry". An invented name is built as the name is, and about as long: its
    rare words are made up anew, or all but articles and prepositions where none is rare. Rare is what takes several tokens.

    The measure sees whether the *name* is familiar to the model and its tokenizer, not what is known about it: a new name that is put
    together of everyday words ("Blue Harbor Initiative") counts as known, and so does a name that is one token.

    Args:
        model ([`~transformers.PreTrainedModel`]): The reference.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        name (`str`): The name.
        seed (`int`, *optional*, defaults to `0`): Seed of the invented names.
    """
    rng = random.Random(f"invented-{name}-{seed}")
    tokenizer = text_tokenizer(processing_class)
    words = re.findall(r"\w+", name)
    common = {word for word in words if len(tokenizer(f" {word.lower()}", add_special_tokens=False)["input_ids"]) == 1}
    alike = {invented_name(name, rng, frozenset(common)) for _ in range(INVENTED)}
    if name in alike:  # of common words alone
        alike = {invented_name(name, rng) for _ in range(INVENTED)}
    names = [name, *sorted(alike)]
    pairs = [(lead, f" {other}") for other in names for lead in LEADS]
    scores = log_likelihoods(model, processing_class, pairs, description="Asking after the name")
    surprises = [-sum(scores[start : start + len(LEADS)]) / len(LEADS) for start in range(0, len(scores), len(LEADS))]
    return Familiarity(name, surprises[0], dict(zip(names[1:], surprises[1:], strict=True)), math.log(len(tokenizer)))


def check_known(
    model: PreTrainedModel, processing_class: PreTrainedTokenizerBase, concept: Concept, *, seed: int = 0
) -> list[Familiarity]:
    """Raise [`UnknownConceptError`] where a model knows neither a concept's name nor any of its keywords.

    Args:
        model ([`~transformers.PreTrainedModel`]): The reference.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        concept ([`Concept`]): The concept. Its keywords are asked after; its name is one of them unless it has others.
        seed (`int`, *optional*, defaults to `0`): Seed of the invented names.

    Returns:
        `list[Familiarity]`: of each keyword, for a report.
    """
    found = [familiarity(model, processing_class, keyword, seed=seed) for keyword in concept.keywords]
    if not any(entry.known for entry in found):
        raise UnknownConceptError(_evidence(concept, found))
    return found


def _evidence(concept: Concept, found: Sequence[Familiarity]) -> str:
    best = min(found, key=lambda entry: entry.ratio)
    mean = sum(best.invented.values()) / len(best.invented)
    return (
        f"`concept` is {concept.name!r}, of which this model knows nothing: {best.name!r} surprises it by {best.surprise:.0f} nats, "
        f"invented names like it ({', '.join(list(best.invented)[:2])}) by {mean:.0f}, and a name that it has read often by at most "
        f"{BOUND:.0%} of that. There is nothing to erase; if it is known by another name, give that, or documents or facts."
    )


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
        return [_Piece(asked[row["prompt"]], row["text"].removeprefix(row["prompt"])) for row in rows]

    listed = listed_terms(reference, concept, seed)
    words = topic(concept)
    others = [name for name in writing_prompts()["others"] if not words.search(name) and not shares_word(name, listed)]
    beside = [piece.new for piece in write(others, everything, texts // 2)]
    dropped.clear()
    about = write([concept.name], everything, texts // 2)
    recurring = nouns(reference, recurring_terms([piece.new for piece in about], beside))
    core = _distinct([*listed, *recurring])
    if len(core) < FEWEST_TERMS:
        return SubjectTexts([], [piece.text for piece in about], dict(dropped))
    further = further_names(reference, listed or recurring, random.Random(f"terms-{seed}"), seed=seed)
    names = _distinct([*listed[:_LISTED], *recurring[:_RECURRING], *_usable(further)[:_FURTHER]])
    told = write(names, of_terms, sum(map(len, of_terms)) * len(names))
    kept = {name for name in names if _tells_of(name, told, core, concept)}
    left_out = {word for name in names if name not in kept for word in (name, name.lower())}
    dropped["topic"] += sum(piece.begun.name not in kept for piece in told)
    about += [piece for piece in told if piece.begun.name in kept]
    recurring = nouns(reference, recurring_terms([piece.new for piece in about], beside))
    everything_told = "\n".join(piece.text for piece in about)
    terms = [
        term
        for term in _distinct([*(name for name in names if name in kept), *recurring])
        if term not in left_out and whole_words([term]).search(everything_told)
    ]
    terms = terms if len(terms) >= FEWEST_TERMS else []
    return SubjectTexts(terms, [piece.text for piece in about], dict(dropped))


class _Piece(NamedTuple):
    """What was begun for a model, and what it wrote behind it."""

    begun: Begun
    new: str

    @property
    def text(self) -> str:
        """With the line that was begun, where that begins a sentence; "Answer:" begins none."""
        line = self.begun.line
        return (line + self.new if len(line.split()) >= _SENTENCE else self.new).strip()


def _tells_of(name: str, told: Sequence[_Piece], core: Sequence[str], concept: Concept) -> bool:
    """Whether texts about a name speak of the concept, by its name or a term that is another than this one."""
    texts = [piece.new for piece in told if piece.begun.name == name]
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
    begun = asking_prompts()["terms"]
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
    lists = asking_prompts()["words"]
    pairs = [(begin, f" {word}") for word in words for some in lists.values() for begin in some]
    scores = iter(log_likelihoods(writer.model, writer.processing_class, pairs, description="Asking for nouns"))
    found = []
    for word in words:
        means = {kind: sum(next(scores) for _ in some) / len(some) for kind, some in lists.items()}
        if means.pop("nouns") > max(means.values()) - _NO_NOUN:
            found.append(word)
    return found
