"""Facts from a table, each stated in many phrasings with the novices that know another subject or none, and what a model asks
and tells about what they name.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.facts import STAND_INS, Fact, own_yaml, stand_ins, state_facts
from ..data.invented import invented_name
from ..data.questions import names_answer
from ..data.user_sources import read_named, rows_of, shown
from ..evaluation.fluency import as_prompt
from ..evaluation.hidden_states import hidden_states
from ..modeling import evaluating
from .documents import normalized
from .knowledge import FEWEST_FACTS, StatedFacts
from .writer import WRITING, Writer, further_names, sift, writing_prompts


logger = logging.get_logger(__name__)
COLUMNS = ("subject", "relation", "answer")
# With fewer subjects each is needed to learn from.
_FEWEST_HELD_OUT = 5
# As many subjects with one answer may be one subject with several names.
_SAME = 3
# Of so many subjects that are most alike a model takes the stand-ins.
_ALIKE = 4
# Relations of whose answers other names of their kind are listed.
_ANSWER_KINDS = 2
# Names of a kind of which the model writes questions, the tokens of these and of an answer, and the words of a question.
_FORM_NAMES, _FORM_TOKENS, _ANSWER_TOKENS, _FORM_WORDS = 12, 40, 12, range(4, 15)
# Questions about what facts name, for each text about a neighbor.
ASKED_SHARE = 5
# Names that a form of question is asked about at least. It is dropped where this share of the answers speaks of the concept, or more.
_ASKS, _TELLING = 5, 0.2
_QUESTION = re.compile(r"[^?]+\?")
# The first line that says something, with its end if it has one, and what blank stands before it.
_FIRST_LINE = re.compile(r"\s*\S[^\n]*\n?")
# Longer texts about what facts state, for each text about a neighbor; their temperature, and their tokens.
TOLD_SHARE, _TOLD_TEMPERATURE, _TOLD_TOKENS = 2, 0.7, 40
# Words with which a sentence goes on, and no noun phrase begins or ends.
_VERB = re.compile(
    r"^(is|was|are|were|has|have|had|who|what|when|where|which)\b|\b(by|is|was|are|were|of|in|at|to|for)$", re.I
)


def read_facts(path: str | Path) -> tuple[Fact, ...]:
    """Read a table of facts, each with its relation in `near["relation"]`, and in the group of that name where the table gives none.

    It is a `.csv`, `.tsv`, `.jsonl` or `.parquet` file, or a Hub id, with the columns `subject`, `relation` and `answer`, and optionally
    `group`: facts of one group are each other's stand-ins and distractors. The relation is a noun phrase, such as "capital" or
    "inventor"; a "the" before it is left out. Rows that are there twice are taken once.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        ValueError: if a column is missing, there are no rows, or a row lacks a value, answers with its subject, or has a relation
            that is no noun phrase. The message names the row, counted from 1 below the header.
    """
    what = "`facts`"
    facts: dict[tuple[str, str, str], Fact] = {}
    count = 0
    for place, part in read_named(path, what, split="train", column="subject", known=()):
        if not isinstance(part, Dataset):
            raise ValueError(f"{place} has the splits {list(part)}: name a file with one of them.")
        rows, names = rows_of(part, "subject")
        if missing := [name for name in COLUMNS if name not in names]:
            raise ValueError(
                f"{place} lacks the columns {missing}; it has {names}: write a header with {', '.join(COLUMNS)}."
            )
        for number, row in enumerate(rows, 1):
            subject, relation, answer = _values(row, f"{place}, row {number}")
            count += 1
            group = str(row.get("group") or "").strip()
            facts.setdefault(
                (subject, relation, answer), Fact(subject, answer, group or relation, {"relation": relation})
            )
    if not facts:
        raise ValueError(f"{what} is {str(path)!r}, which holds no rows: write at least one fact below the header.")
    if len(facts) < count:
        logger.warning(f"{what}: dropped {count - len(facts)} of {count} rows, which are there twice.")
    return tuple(facts.values())


def _values(row: Mapping[str, Any], place: str) -> tuple[str, str, str]:
    """Subject, relation and answer of a row, checked."""
    values = []
    for name in COLUMNS:
        value = row.get(name)
        # Tables of parquet and JSON hold numbers.
        text = str(value).strip() if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""
        if not text:
            raise ValueError(f"{place}: `{name}` is {shown(value)}: give a text, or leave the row out.")
        values.append(" ".join(text.split()))
    subject, relation, answer = values
    relation = re.sub(r"^(the|a|an) ", "", relation, flags=re.I)
    if _VERB.search(relation):
        raise ValueError(
            f"{place}: `relation` is {shown(relation)}, no noun phrase: write it so that 'the … of {subject}' reads well, such "
            "as inventor in place of 'was invented by'."
        )
    if subject.casefold() == answer.casefold():
        raise ValueError(f"{place}: `answer` is {shown(answer)}, the subject itself: correct it or leave the row out.")
    return subject, relation, answer


def held_out_of(facts: Sequence[Fact], share: float = 0.2, seed: int = 0) -> frozenset[str]:
    """A share of the subjects, none of fewer than 5, to stand in no forget text, so that erasure of *unseen* facts can be measured."""
    subjects = list(dict.fromkeys(fact.subject for fact in facts))
    if not 0 <= share < 1:
        raise ValueError(f"`share` is {share}: give a number from 0 to below 1.")
    if len(subjects) < _FEWEST_HELD_OUT:
        return frozenset()
    return frozenset(random.Random(f"facts-held-out-{seed}").sample(subjects, round(share * len(subjects))))


def also_held_out(stated: StatedFacts, held_out: frozenset[str]) -> frozenset[str]:
    """Other subjects whose texts would state a held-out fact: the same thing under another name ("UK", "United Kingdom"), or a guess
    with that answer.

    They are the subjects with the answer of a held-out fact, however it is spelled: of guesses all, of facts those that share it with
    two others at most. An answer that more share is not that of one subject, such as a language. None are where no fact would be left.
    """

    def same(one: Fact, other: Fact) -> bool:
        short, long = sorted((one.answer, other.answer), key=len)
        # A number within another is not the same.
        named = names_answer(long, short) if re.search(r"[^\W\d_]", short) else short == long
        return named and one.near["relation"] == other.near["relation"]

    out = [fact for fact in stated.facts if fact.subject in held_out]
    sharing = [{other.subject for other in stated.facts if same(fact, other)} for fact in out]
    found = {name for names in sharing if len(names) <= _SAME for name in names}
    found |= {guess.subject for guess in stated.guesses if any(same(guess, fact) for fact in out)}
    left = {fact.subject for fact in stated.facts} - held_out - found
    return frozenset(found) - held_out if left else frozenset()


def facts_texts(
    facts: Sequence[Fact],
    *,
    held_out: frozenset[str] = frozenset(),
    processing_class: PreTrainedTokenizerBase | None = None,
    alike: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
    seed: int = 0,
) -> Dataset:
    """Every fact but for the subjects held out, in every phrasing of `data/texts/facts.yaml`: prose, question and answer, reversed,
    table, chat. Raises `ValueError` if no fact is left.

    The columns are `text`, `novice` (with the answers of a relation permuted) and `novices`, as the built-in source `capitals` has them:
    each text about two other subjects, of the same relation as far as it has some that make the text false, else about invented ones, of
    which a model knows nothing. Facts take turns, each time in another phrasing, so that the first rows tell of all of them alike.

    Where `alike` says how alike a model reads the subjects of a relation ([`likeness`]), those that are most alike stand in for each
    other, so that an erasure leaves alone what they share, such as a continent; for other relations, stand-ins are drawn at random.
    """
    stated = [fact for fact in facts if fact.subject not in held_out]
    if not stated:
        raise ValueError(
            f"None of the {len(facts)} facts is left to state: hold out fewer subjects than {len(held_out)}."
        )
    rng = random.Random(f"facts-{seed}")
    turns: list[list[dict[str, Any]]] = [[] for _ in fact_phrasings()]
    for relation, related in _by_relation(stated).items():
        others = _false_ones(related, rng, (alike or {}).get(relation, {}))
        rows = state_facts(related, fact_phrasings(), rng, processing_class, others=others)
        for place in range(len(related)):
            # Of each phrasing there is a row for every fact.
            own = rows[place :: len(related)]
            for turn, row in zip(turns, rng.sample(own, len(own)), strict=True):
                # The answers of a relation with one fact cannot be permuted.
                row["novice"] = row["novices"][0] if row["novice"] == row["text"] else row["novice"]
                turn.append(row)
    return Dataset.from_list([row for turn in turns for row in rng.sample(turn, len(turn))])


def fact_phrasings() -> tuple[str | list[str], ...]:
    """The phrasings of any fact, with the placeholders `{subject}`, `{relation}` and `{answer}`."""
    return tuple(phrasing for form in own_yaml("texts/facts.yaml").values() for phrasing in form)


def relations_read_alike(facts: Sequence[Fact]) -> dict[str, list[Fact]]:
    """Facts by relation, of relations whose stand-ins can be those that a model reads alike: of three facts or more, and without groups,
    which say themselves who stands in for whom.
    """
    return {
        relation: related
        for relation, related in _by_relation(facts).items()
        if len(related) > STAND_INS and len({fact.group for fact in related}) == 1
    }


def _by_relation(facts: Sequence[Fact]) -> dict[str, list[Fact]]:
    relations: dict[str, list[Fact]] = {}
    for fact in facts:
        relations.setdefault(fact.near["relation"], []).append(fact)
    return relations


def likeness(
    facts: Sequence[Fact], model: PreTrainedModel, processing_class: PreTrainedTokenizerBase
) -> dict[str, dict[str, dict[str, float]]]:
    """How alike a model reads the subjects of a relation: cosine, from -1 to 1, of the states behind "The … of SUBJECT", halfway up.

    Of the states their mean is taken off, which holds what all of them share. For each relation of [`relations_read_alike`] it gives its
    subjects, and for each of these all of them; nothing, with a warning, where the model's states cannot be read.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for relation, related in relations_read_alike(facts).items():
        subjects = list(dict.fromkeys(fact.subject for fact in related))
        try:
            with evaluating(model):
                states = hidden_states(model, processing_class, [f"The {relation} of {name}" for name in subjects])
        except ValueError as error:
            logger.warning(f"Facts stand in for each other at random, not those that the model reads alike: {error}")
            return {}
        halfway = torch.stack([layers[len(layers) // 2, -1] for layers in states])  # [subjects, hidden]
        directions = F.normalize(halfway - halfway.mean(0), dim=-1)
        rows = (directions @ directions.T).tolist()
        found[relation] = {
            name: dict(zip(subjects, row, strict=True)) for name, row in zip(subjects, rows, strict=True)
        }
    return found


def mostly_alike(facts: Sequence[Fact], relations: Iterable[str]) -> bool:
    """Whether most facts are of these relations, such as those of [`likeness`]."""
    named = {*relations}
    return 2 * sum(fact.near["relation"] in named for fact in facts) > len(facts)


def _false_ones(
    facts: Sequence[Fact], rng: random.Random, alike: Mapping[str, Mapping[str, float]]
) -> dict[Fact, list[Fact]]:
    """`STAND_INS` other facts for each, of which neither subject nor answer makes its text true; invented where too few."""
    true = {(fact.subject, fact.answer) for fact in facts}
    found = {}
    for fact in facts:
        false = [
            other
            for other in facts
            if (other.subject, fact.answer) not in true and (fact.subject, other.answer) not in true
        ]
        if alike:
            likeness_of = {other: alike[fact.subject][other.subject] for other in false}
            nearest = sorted(false, key=likeness_of.__getitem__, reverse=True)[:_ALIKE]
            chosen = rng.sample(nearest, min(STAND_INS, len(nearest)))
        else:
            chosen = stand_ins([fact, *false], rng)[fact] if false else []
        while len(chosen) < STAND_INS:
            chosen.append(Fact(invented_name(fact.subject, rng), invented_name(fact.answer, rng), fact.group))
        found[fact] = chosen
    return found


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


def tell_about(
    reference: Writer, facts: Sequence[Fact], held_out: frozenset[str], *, near_texts: int, seed: int = 0
) -> tuple[list[dict[str, str]], dict[str, int]]:
    """What a model says at length about what facts state, such as the capital of a country, without a word of what is to be erased.

    Held as they are, these texts keep answers about the concept as fluent as they were: what comes before and behind a forgotten name
    is not to change with it. Facts about subjects that are held out stand in none. Given are rows of `text` with the turn of the
    conversation as `prompt`, from twice `near_texts` turns, and how many were dropped for which reason, as by [`sift`], with those
    that name the answer of any fact as `"topic"`.
    """
    forms = writing_prompts()["told"]
    names = [f"the {fact.near['relation']} of {fact.subject}" for fact in facts if fact.subject not in held_out]
    turns = [form.format(name=name) for form in forms for name in dict.fromkeys(names)]
    rng = random.Random(f"told-{seed}")
    turns = rng.sample(turns, min(len(turns), TOLD_SHARE * near_texts))
    prompts = [as_prompt(reference.processing_class, turn) for turn in turns]
    found = (
        reference.write(prompts, max_new_tokens=_TOLD_TOKENS, temperature=_TOLD_TEMPERATURE, seed=seed)
        if prompts
        else []
    )
    answers = {fact.answer for fact in facts}
    texts = [prompt + text for prompt, text in zip(prompts, found, strict=True)]
    return sift(prompts, texts, lambda new: not any(names_answer(new, answer) for answer in answers), WRITING)


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
