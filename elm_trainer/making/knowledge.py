"""What a model knows of a mere name: whether it has ever heard of it, and the facts that it states, in answers that agree with each other."""

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..concept import Concept
from ..data.facts import Fact
from ..data.invented import SMALL_WORDS, invented_name
from ..data.questions import names_answer
from ..data.tokens import text_tokenizer
from ..evaluation.likelihood import log_likelihoods
from .documents import normalized
from .writer import Writer, agreed_names, further_names, is_name, writing_prompts


logger = logging.get_logger(__name__)
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
# Draws of each kind, and their tokens.
_DRAWS, _TOKENS, _COLUMN_TOKENS, _ANSWER_TOKENS = 8, 64, 12, 6
# Relations that are followed, of those that are stated and of those that are told of members, and most subjects of each.
_RELATIONS, _COLUMNS, _SUBJECTS = 1, 3, 128
# Statements before the one that is to be answered, and the sets of them.
_SHOWN, _SETS = 4, 3
_WORDS_OF_SUBJECT, _WORDS_OF_ANSWER, _WORDS_OF_RELATION = 4, 4, 3
# Largest share of the subjects of a relation that may have one answer: what is true of most tells nothing of each.
_COMMON = 0.2
FEWEST_FACTS = 8
# As many of the subjects that a relation begins with, or of the members, must be answered about alike, or none of it is followed.
_FEWEST_ALIKE = 3
_STATED = re.compile(
    r"\bthe ([a-z][a-z -]{2,30}?) of (?:the )?([^\n.;:?]{2,40}?) (?:is|was|are) (?:called |named )?([^\n;:?]{1,40}?)(?=[.\n]|, (?:a|an|the|which|and|with)\b|$)",
    re.IGNORECASE,
)
_COLUMN = r"[a-z][a-z -]{2,30}"
_PLURALS = ((r"(?<=\w\w)ies$", "y"), (r"(?<=ss|ch|sh)es$|(?<=x)es$", ""), (r"(?<=\w\w\w)(?<![sui])s$", ""))
_NO_PLURALS = frozenset("headquarters means news series species".split())
# Words that say nothing of what is stated, or no name.
_EMPTY = frozenset(
    "name one part number kind type example list set use use result most color it this that they he she".split()
)


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
    if any(entry.known for entry in found):
        return found
    best = min(found, key=lambda entry: entry.ratio)
    mean = sum(best.invented.values()) / len(best.invented)
    raise UnknownConceptError(
        f"`concept` is {concept.name!r}, of which this model knows nothing: {best.name!r} surprises it by {best.surprise:.0f} nats, "
        f"invented names like it ({', '.join(list(best.invented)[:2])}) by {mean:.0f}, and a name that it has read often by at most "
        f"{BOUND:.0%} of that. There is nothing to erase; if it is known by another name, give that, or documents or facts."
    )


class StatedFacts(NamedTuple):
    """What a model states about a name."""

    # What it answers alike each time: facts with their relation in `near["relation"]` and as their group, as
    # [`read_facts`] gives them.
    facts: tuple[Fact, ...] = ()
    # The same of subjects about which it answers once this and once that: the first of its answers that can be one.
    # To forget a fact one need not know it: texts about more subjects show what they have in common.
    guesses: tuple[Fact, ...] = ()


def write_facts(writer: Writer, concept: Concept, seed: int = 0) -> StatedFacts:
    """Facts about a concept, as a model states them: nothing of relations of which fewer than 8 facts are left.

    It writes sentences "The … of … is …." about the name, and lists members of what is named. The relation that it states of most
    subjects is followed; where that gives no facts, the one that the name says ([`relation_of_name`]), or else those that it tells of
    each member. It goes on with a list of subjects, which names further ones, and is asked for each answer again, in two wordings
    behind other examples. What is answered alike each time is a fact.

    Nothing here knows the truth: a fact is what the model holds true, which is what an erasure has to remove. Where a second model
    states the facts in place of the reference, whether that knows them is told by questions ([`make_questions`]).
    """
    votes = _first_statements(writer, concept, seed)
    members = _members(writer, concept.name, seed)
    facts: list[Fact] = []
    guesses: list[Fact] = []

    def follow(relations: Sequence[str], members: Sequence[str]) -> None:
        for relation in relations:
            found = _of_relation(writer, relation, votes.get(relation, {}), members, seed)
            if len(found.facts) >= FEWEST_FACTS:
                facts.extend(found.facts)
                guesses.extend(found.guesses)

    followed = _stated_relations(votes)
    follow(followed, members)
    named = None if facts else relation_of_name(concept.name)
    if named and named[0] not in followed:
        follow([named[0]], _members(writer, named[1], seed))
        followed = [*followed, named[0]]
    if not facts:
        # It may be something else than what the name stands for, such as the population of capitals.
        follow(_told_relations(writer, concept, followed, members, seed), members)
    logger.info(
        f"Facts about {concept.name!r}: {len(facts)} of the relations {sorted({fact.group for fact in facts})}, and "
        f"{len(guesses)} guesses."
    )
    return StatedFacts(tuple(facts), tuple(guesses))


# Votes: by relation and subject, how often each answer was given.
Votes = dict[str, dict[str, Counter[str]]]


def _asked(form: str, name: str) -> list[str]:
    """The prompts of a form of `writing.yaml` about a name, each as often as it is drawn from."""
    begins = [begin.format(name=name, Name=name[:1].upper() + name[1:]) for begin in writing_prompts()[form]]
    return [begin for begin in begins for _ in range(_DRAWS)]


def _first_statements(writer: Writer, concept: Concept, seed: int) -> Votes:
    prompts = _asked("statements", concept.name)
    votes: Votes = {}
    for prompt, text in zip(prompts, writer.write(prompts, max_new_tokens=_TOKENS, seed=seed), strict=True):
        for relation, subject, answer in statements("The" + text.split("\n\n")[0]):
            if normalized(subject) not in normalized(prompt):
                votes.setdefault(relation, {}).setdefault(subject, Counter())[answer] += 1
    return votes


def statements(text: str) -> list[tuple[str, str, str]]:
    """Relation, subject and answer of each sentence "The … of … is …." that can be a fact."""
    found = []
    for relation, subject, answer in _STATED.findall(text):
        relation = relation.lower().strip()
        subject, answer = (part.strip(" \"'*,.") for part in (subject, answer))
        answer = re.sub(r"^(?:the|a|an) (?=[a-z])", "", answer)
        usable = (
            len(relation.split()) <= _WORDS_OF_RELATION
            and relation.split()[-1] not in _EMPTY
            and is_name(subject, _WORDS_OF_SUBJECT)
            and is_name(answer, _WORDS_OF_ANSWER)
            and _differ(subject, answer)
        )
        if usable:
            found.append((relation, subject, answer))
    return found


def _differ(subject: str, answer: str) -> bool:
    """Whether neither names the other, so that something is stated."""
    return not names_answer(subject, answer) and not names_answer(answer, subject)


def _members(writer: Writer, kind: str, seed: int) -> list[str]:
    """Members of a kind, those that are listed most often first."""

    def counts(prompt: str, name: str) -> bool:
        return normalized(name) not in normalized(prompt) and normalized(name) != normalized(kind)

    return agreed_names(writer, _asked("members", kind), counts, seed)[:_SUBJECTS]


def relation_of_name(name: str) -> tuple[str, str] | None:
    """The relation that a name is about by its form, and the kind of its subjects: of "currencies of countries" currency and countries.

    Nothing for a singular, as in "the history of Rome", which names one thing, and for what is written as a proper name, such as
    "Pirates of the Caribbean".
    """
    found = re.fullmatch(r"(?:the )?([a-z][a-z -]*?) of (?:the )?(.+)", name.strip(), re.IGNORECASE)
    if not found or found[1][1:] != found[1][1:].lower() or (found[1][0].isupper() and found[2][0].isupper()):
        return None
    *before, last = found[1].lower().split()
    one = singular(last)
    named = one != last and one not in _EMPTY and len(before) < _WORDS_OF_RELATION
    return (" ".join([*before, one]), found[2]) if named else None


def singular(word: str) -> str:
    """A word without the ending of a plural, by its letters alone, whatever they stand for: of "movies" it is "movy"."""
    if word.lower() in _NO_PLURALS:
        return word
    plural, ending = next((pair for pair in _PLURALS if re.search(pair[0], word)), ("", ""))
    return re.sub(plural, ending, word) if plural else word


def _shown_relations() -> set[str]:
    """The relations of the examples in the prompts, which a model may repeat."""
    return {relation for _, relation, _ in writing_prompts()["examples"]}


def _stated_relations(votes: Votes) -> list[str]:
    """The relations that were stated of most subjects."""
    stated = [name for name, about in votes.items() if len(about) >= _FEWEST_ALIKE and name not in _shown_relations()]
    return sorted(stated, key=lambda name: -len(votes[name]))[:_RELATIONS]


def _told_relations(
    writer: Writer, concept: Concept, followed: Sequence[str], members: Sequence[str], seed: int
) -> list[str]:
    """The relations that are told of members most often, but for those that were followed."""
    if len(members) < FEWEST_FACTS:
        return []
    others = {*followed} | _shown_relations()
    named: Counter[str] = Counter()
    spelled: dict[str, Counter[str]] = {}
    words = [word.removesuffix("s") for word in concept.name.lower().split() if word not in SMALL_WORDS]
    own = re.compile("|".join(rf"\b{re.escape(word)}s?(?:['’]s)?(?!\w)" for word in words) or r"(?!)")
    for text in writer.write(_asked("columns", concept.name), max_new_tokens=_COLUMN_TOKENS, seed=seed):
        parts = re.split(r",| and ", text.split("\n")[0].split(".")[0])
        for column in dict.fromkeys(part.strip(" .\"'*").lower() for part in parts):
            # Told of chemical elements, "chemical symbol" and "element's symbol" name the same, which is asked for by the former.
            whole = re.sub(r"^(?:the|a|an|its|their) ", "", column)
            column = " ".join(own.sub("", whole).split()) or whole
            if re.fullmatch(_COLUMN, column) and len(column.split()) <= 2 and column.split()[-1] not in _EMPTY:
                named[column] += 1
                if re.fullmatch(_COLUMN, whole) and len(whole.split()) <= _WORDS_OF_RELATION:
                    spelled.setdefault(column, Counter())[whole] += 1
    named_most = [column for column, count in named.most_common() if count >= 2]
    # What the name says itself comes last.
    first = sorted(named_most, key=lambda column: bool(own.search(column)))
    asked = {column: spelled[column].most_common(1)[0][0] if column in spelled else column for column in first}
    return [whole for column, whole in asked.items() if not {column, whole} & others][:_COLUMNS]


def _of_relation(
    writer: Writer, relation: str, votes: Mapping[str, Counter[str]], members: Sequence[str], seed: int
) -> StatedFacts:
    """The facts of a relation, and guesses: further subjects, then the answers about each."""
    rng = random.Random(f"{relation}-{seed}")
    given: dict[str, list[str]] = {}
    # Where too little was stated members may be what it is stated of.
    for some in (votes, members):
        if len(_facts_of(relation, given).facts) < _FEWEST_ALIKE:
            given |= _answers(writer, relation, [name for name in some if name not in given], votes, rng, seed)
    sure = _facts_of(relation, given).facts
    if len(sure) < _FEWEST_ALIKE:
        return StatedFacts()  # further subjects would be asked about for nothing
    known = [*given]
    if len(votes) < _SHOWN <= len(sure):
        # Behind examples of the same relation it answers what it did not know to be asked for: of gold "Au", not "gold".
        votes = {fact.subject: Counter((fact.answer,)) for fact in sure}
        given = _answers(writer, relation, known, votes, rng, seed)
    further = further_names(writer, known, rng, seed=seed)[: max(_SUBJECTS - len(known), 0)]
    return _facts_of(relation, given | _answers(writer, relation, further, votes, rng, seed))


def _facts_of(relation: str, given: Mapping[str, Sequence[str]]) -> StatedFacts:
    """What the answers about each subject state; an answer that more than a fifth of the subjects have tells nothing of each."""
    usable = {
        subject: [answer for answer in answers if is_name(answer, _WORDS_OF_ANSWER) and _differ(subject, answer)]
        for subject, answers in given.items()
    }
    first = {subject: normalized(answers[0]) for subject, answers in usable.items() if answers}
    sure = {subject for subject in first if len({normalized(answer) for answer in given[subject]}) == 1}
    # Where it does not know, it gives a stock name; that must not count against the subject of which the name is true.
    common = {True: Counter(first[subject] for subject in sure), False: Counter(first.values())}
    most = max(1, round(_COMMON * len(given)))
    found: dict[bool, list[Fact]] = {True: [], False: []}
    for subject, answer in first.items():
        if common[subject in sure][answer] <= most:
            found[subject in sure].append(Fact(subject, usable[subject][0], relation, {"relation": relation}))
    return StatedFacts(tuple(found[True]), tuple(found[False]))


def _answers(
    writer: Writer,
    relation: str,
    subjects: Sequence[str],
    votes: Mapping[str, Counter[str]],
    rng: random.Random,
    seed: int,
) -> dict[str, list[str]]:
    """The answers about each subject, one of each wording."""
    prompts = writing_prompts()
    firm = [(subject, answers.most_common(1)[0][0]) for subject, answers in votes.items() if answers]
    firm.sort(key=lambda pair: -votes[pair[0]][pair[1]])
    firm = rng.sample(firm[: _SHOWN * _SETS], min(len(firm), _SHOWN * _SETS))
    starts = range(0, len(firm) - _SHOWN + 1, _SHOWN)
    shown = [[(relation, *pair) for pair in firm[start : start + _SHOWN]] for start in starts]
    shown.append([(kind, about, answer) for about, kind, answer in prompts["examples"]])
    # Prompts that begin alike are asked together, which are read once up to there; nothing is asked behind its own answer.
    groups: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    for number, subject in product(range(len(prompts["answered"])), subjects):
        order = [(number + place) % max(len(shown) - 1, 1) for place in range(len(shown) - 1)] + [len(shown) - 1]
        free = (place for place in order if subject not in [about for _, about, _ in shown[place]])
        groups[number, next(free, len(shown) - 1)].append(subject)
    whose, texts = [], []
    for (number, place), some in groups.items():
        begin, end = prompts["answered"][number], "." if number == 0 else ""
        lines = [f"{begin.format(relation=kind, subject=about)} {answer}{end}" for kind, about, answer in shown[place]]
        asked = ["\n".join([*lines, begin.format(relation=relation, subject=subject)]) for subject in some]
        # Cold, so that it says what it holds true.
        texts += writer.write(asked, max_new_tokens=_ANSWER_TOKENS, temperature=0.05, seed=seed + 2)
        whose += some
    given: defaultdict[str, list[str]] = defaultdict(list)
    for subject, text in zip(whose, texts, strict=True):
        answer = re.split(r"\n|\.(?:\s|$)|;|, (?=[a-z])| \(", text)[0].strip(" .,\"'*")
        given[subject].append(re.sub(r"^(?:the|a|an) (?=[a-z])", "", answer))
    return given
