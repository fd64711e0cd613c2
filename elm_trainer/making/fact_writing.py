"""A model states the facts that it knows about a name, in answers that agree with each other."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from transformers.utils import logging

from ..concept import Concept
from ..data.facts import Fact, own_yaml
from ..data.invented import SMALL_WORDS
from ..data.questions import names_answer
from .documents import normalized
from .writer import Writer


logger = logging.get_logger(__name__)
# Draws of each kind, and their tokens.
_DRAWS, _TOKENS, _LIST_TOKENS, _COLUMN_TOKENS, _ANSWER_TOKENS = 8, 64, 48, 12, 6
# Relations that are followed, of those that are stated and of those that are told of members; draws of further subjects of each, and
# how often from what was drawn before.
_RELATIONS, _COLUMNS, _FURTHER, _ROUNDS = 1, 3, 16, 5
# Most subjects of a relation that are asked about, and most further names that are drawn.
_SUBJECTS, _NAMES = 128, 160
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
_NO_NAME = re.compile(
    r"^(?:it|this|that|these|those|they|he|she|we|you|all|many|some|each|every|a|an|one|any|not|also|very)\b", re.I
)


def asking_prompts() -> dict[str, Any]:
    """The prompts and wordings of `data/texts/asking.yaml`."""
    return own_yaml("texts/asking.yaml")


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
    """The prompts of a form of `asking.yaml` about a name, each as often as it is drawn from."""
    begins = [begin.format(name=name, Name=name[:1].upper() + name[1:]) for begin in asking_prompts()[form]]
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


def is_name(text: str, words: int) -> bool:
    """Whether a text can be a subject or an answer: of few words, and not the beginning of a sentence."""
    return 0 < len(text.split()) <= words and bool(re.search(r"\w", text)) and not _NO_NAME.match(text)


def _members(writer: Writer, kind: str, seed: int) -> list[str]:
    """Members of a kind, those that are listed most often first."""

    def counts(prompt: str, name: str) -> bool:
        return normalized(name) not in normalized(prompt) and normalized(name) != normalized(kind)

    return agreed_names(writer, _asked("members", kind), counts, seed)[:_SUBJECTS]


def agreed_names(writer: Writer, prompts: Sequence[str], counts: Callable[[str, str], bool], seed: int) -> list[str]:
    """Names that are listed behind two prompts or more, most often first; `counts` says which one does behind a prompt."""
    votes: Counter[str] = Counter()
    spelled: dict[str, str] = {}
    for prompt, text in zip(prompts, writer.write(prompts, max_new_tokens=_LIST_TOKENS, seed=seed), strict=True):
        for name in (name for name in _listed(text) if counts(prompt, name)):
            votes[normalized(name)] += 1
            spelled.setdefault(normalized(name), name)
    return [spelled[key] for key, count in votes.most_common() if count >= 2]


def _listed(text: str) -> list[str]:
    """The names in the rest of a line, each once."""
    line, whole, _ = text.partition("\n")
    # The last one is cut off where the line has no end.
    names = [name.strip(" ,.;\"'*") for name in re.split(r",(?: and)? ", line)[: None if whole else -1]]
    names = [re.sub(r"^(?:and |or )|^the (?=[A-Z])|\s*\([^)]*\)?|\)", "", name) for name in names]
    # It may stammer: "China China", "China/China".
    return [
        name
        for name in dict.fromkeys(names)
        if is_name(name, _WORDS_OF_SUBJECT) and len({*re.split(r"[ /]", name)}) == len(re.split(r"[ /]", name))
    ]


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
    return {relation for _, relation, _ in asking_prompts()["examples"]}


def _stated_relations(votes: Votes) -> list[str]:
    """The relations that were stated of most subjects."""
    stated = {
        relation: len(subjects)
        for relation, subjects in votes.items()
        if len(subjects) >= _FEWEST_ALIKE and relation not in _shown_relations()
    }
    return sorted(stated, key=lambda relation: -stated[relation])[:_RELATIONS]


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
    found: tuple[list[Fact], list[Fact]] = [], []
    for subject, answer in first.items():
        if common[subject in sure][answer] <= most:
            fact = Fact(subject, usable[subject][0], relation, {"relation": relation})
            found[subject not in sure].append(fact)
    return StatedFacts(tuple(found[0]), tuple(found[1]))


def further_names(writer: Writer, known: Sequence[str], rng: random.Random, *, seed: int = 0) -> list[str]:
    """Names of the same kind as those that are known, each of which was listed twice or more, the most frequent first. `rng` draws which
    names each list goes on from.
    """
    listed: Counter[str] = Counter()
    spelled = {normalized(name): name for name in known}
    own = {*spelled}
    for turn in range(_ROUNDS):
        pool = [name for key, name in spelled.items() if key in own or listed[key] > 1]
        prompts = [
            asking_prompts()["further"].format(some=", ".join(rng.sample(pool, min(6, len(pool)))))
            for _ in range(_FURTHER)
        ]
        for text in writer.write(prompts, max_new_tokens=_LIST_TOKENS, temperature=1.0, seed=seed + 10 + turn):
            for name in _listed(text):
                listed[normalized(name)] += 1
                spelled.setdefault(normalized(name), name)
    return [spelled[key] for key, count in listed.most_common() if count > 1 and key not in own][:_NAMES]


def _answers(
    writer: Writer,
    relation: str,
    subjects: Sequence[str],
    votes: Mapping[str, Counter[str]],
    rng: random.Random,
    seed: int,
) -> dict[str, list[str]]:
    """The answers about each subject, one of each wording."""
    prompts = asking_prompts()
    firm = [(subject, answers.most_common(1)[0][0]) for subject, answers in votes.items() if answers]
    firm.sort(key=lambda pair: -votes[pair[0]][pair[1]])
    firm = rng.sample(firm[: _SHOWN * _SETS], min(len(firm), _SHOWN * _SETS))
    shown = [
        [(relation, *pair) for pair in firm[start : start + _SHOWN]]
        for start in range(0, len(firm) - _SHOWN + 1, _SHOWN)
    ]
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
