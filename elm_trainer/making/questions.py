"""`make_questions`: questions about a concept of one's own and what is near it, with checked answers, as files to edit and use again."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..concept import Concept
from ..data.facts import Fact, load_bank
from ..data.questions import (
    PLAIN,
    RECORD,
    ROLE_FILES,
    SPLITS,
    Question,
    names_answer,
    overlap_verdicts,
    question_record,
    shuffled_question,
    split_of,
)
from ..data.sources import load_texts
from ..evaluation.likelihood import score_choices
from ..files import made_before, store_made
from .documents import whole_words
from .make import MadeData, MadeFrom
from .writer import Writer, writing_prompts
from .writing import topic


logger = logging.get_logger(__name__)
FOLDER = "questions"
# Facts with a question in the test split, below which a warning says that little can be measured.
FEWEST = 24
_DISTRACTORS, _DEV_SHARE = 3, 4
# Texts about the concept that a report looks inside the model with, and the share of right guesses that chance allows.
_FORGET_TEXTS, _CHANCE = 64, 0.25
_VERSION = 1
# "I'll" begins no name.
_NAME = r"(?!I['’])[A-ZÀ-ÖØ-Þ][\w'’-]*\w(?: (?:(?:of|de|von|van|la) )?[A-ZÀ-ÖØ-Þ][\w'’-]*\w){0,3}"
_MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
# The first that fits a place is taken.
_KINDS = {
    "date": rf"\d{{1,2}} (?:{_MONTH})(?: \d{{4}})?|(?:{_MONTH}) \d{{1,2}}(?:, \d{{4}})?",
    "year": r"(?:1[0-9]|20)\d\d(?![\d,.]\d)",
    "number": r"\d+(?:[.,]\d+)*(?: (?:percent|million|billion))?",
    "name": _NAME,
}
_SPAN = re.compile("|".join(rf"(?P<{kind}>(?<![\w.,-]){form}(?![\w-]))" for kind, form in _KINDS.items()))
_SENTENCE = re.compile(r"(?<=[.!?])[\"”’)]*\s+|\n+")
# Most cloze questions, words before a span, spans of a sentence; passages that a writer asks about, and words of its answers.
_CLOZE, _LEAD_WORDS, _SPANS, _PASSAGES, _ANSWER_WORDS = 240, 4, 2, 96, 6


@dataclass(frozen=True)
class Asked:
    """A question before it has options."""

    text: str  # or the beginning of a text
    answer: str
    kind: str  # what is asked for: a relation, or `"name"`, `"year"`, `"date"`, `"number"`, `"term"`
    key: str  # what all questions about one fact have in common, which decides its split
    subject: str
    form: str = "text"
    family: str = "cloze"
    untrue: tuple[str, ...] = ()  # distractors to draw from, beside all answers of the same kind
    true: tuple[str, ...] = ()  # other right answers, which are no distractors
    close: frozenset[str] = frozenset()  # the distractors that are taken first


class NoQuestionsError(ValueError):
    """No question about a concept is left that its reference answers."""


@dataclass(frozen=True)
class MadeQuestions:
    """Questions on disk."""

    # The folder, which `--bank` and [`suite_from_files`] take, with a file of JSON lines for each role that has
    # questions (`concept.jsonl`, `unseen.jsonl`, `near.jsonl`, `far.jsonl`), and `questions.json`.
    folder: Path
    # What stands in `questions.json`: by role the counts of questions and of facts in each split, how many candidates
    # there were, and how many were dropped for which reason.
    record: dict[str, Any]
    edited: tuple[str, ...] = ()  # files that were changed by hand since they were made
    reused: bool = False  # whether they were there already

    def summary(self) -> str:
        """What was made, and what was dropped and why, a line each."""
        lines = [f"{self.folder}{' (as before)' if self.reused else ''}:"]
        lines += [f"Changed by hand since they were made: {', '.join(self.edited)}."] if self.edited else []
        for role, counts in self.record["counts"].items():
            facts, dropped = self.record["facts"][role], self.record["dropped"].get(role, {})
            told = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in dropped.items() if count)
            dev = f"{counts['dev']} questions about {facts['dev']} facts in dev"
            told = f"; dropped: {told}" if told else ""
            lines.append(f"{role}: {dev}, {counts['test']} about {facts['test']} in test{told}.")
        return "\n".join(lines)


def make_questions(
    what: MadeFrom,
    made: MadeData,
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    output_dir: str | Path,
    *,
    writer: Writer | None = None,
) -> MadeQuestions:
    """Make questions about a concept, or find those of an earlier call.

    Facts of a table, or those that [`write_facts`] found, are asked for in wordings that stand in no training text, in several
    families; sentences of documents are continued with a name, a number or a date, and a `writer` asks about their passages.
    Questions about neighbors are made of the near texts in the second way, and far ones are the built-in bank `general`.

    A question is kept only where the reference ranks its answer first of four, by log-likelihood and by PMI. **The reference's
    accuracy on them is therefore 1 by selection**, and a model that is merely disturbed falls below it; far questions are not selected.
    Of those that a text-only rule answers (letters like the subject's, the longest option, the commonest answer, the likeliest option
    without the question), no more are kept than chance allows: were all dropped, being none of these would give the answer away.

    Args:
        what ([`MadeFrom`]): What the user has, as for [`make_data`].
        made ([`MadeData`]): The texts that were made of it.
        model ([`~transformers.PreTrainedModel`]): The reference.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        output_dir (`str` or `Path`): Output folder of the run; questions go to `data/questions` in it.
        writer ([`Writer`], *optional*): Who asks about passages of documents; without one there are cloze questions alone.

    Returns:
        [`MadeQuestions`]. Where fewer than 24 facts of the concept are left in the test split, a warning says what to give.

    Raises:
        OSError: whatever the `writer` and the reading of documents and facts raise.
        NoQuestionsError: if no question about the concept is left.
        ValueError: if questions are there that were made from other things.
    """
    concept = cast(Concept, what.concept)
    folder = Path(output_dir) / made.folder.name / FOLDER
    origin = {"data": made.record["origin"], "writer": writer.name if writer else "", "version": _VERSION}
    if folder.exists():
        return MadeQuestions(folder, *made_before(folder, RECORD, origin, "questions"), reused=True)
    candidates, refused = _candidates(what, made, writer)
    rows: dict[str, list[dict[str, Any]]] = {}
    record: dict[str, Any] = {"concept": concept.name, "counts": {}, "facts": {}, "candidates": {}, "dropped": {}}
    for role, asked in candidates.items():
        with_options, without = _with_options(asked, what.seed)
        kept, dropped = _checked(model, processing_class, with_options, what.seed)
        record["candidates"][role] = len(asked)
        record["dropped"][role] = {**refused.get(role, {}), "without_distractors": without, **dropped}
        rows[role] = [question_record(question, split) for _, split, question in kept]
        record["facts"][role] = {split: len({key for key, its, _ in kept if its == split}) for split in SPLITS}
    words = topic(concept)
    far = [q for q in load_bank("general") if not words.search(" ".join((q.text, *q.options)))]
    rows["far"] = [question_record(question, split_of(question)) for question in far]
    record["facts"]["far"] = {split: sum(split_of(q) == split for q in far) for split in SPLITS}
    rows = {role: some for role, some in rows.items() if some}
    record["counts"] = {
        role: {split: sum(row["split"] == split for row in some) for split in SPLITS} for role, some in rows.items()
    }
    _check_enough(concept, rows, record)
    texts = load_texts(made.sources.forget)["text"][:]
    record |= {
        "reference_accuracy": "1 by selection, but for far questions",
        "forget_texts": random.Random(what.seed).sample(texts, min(_FORGET_TEXTS, len(texts))),
        "writer": writer.name if writer else None,
        "origin": origin,
    }
    store_made(folder, {ROLE_FILES[role]: some for role, some in rows.items()}, record, RECORD)
    return MadeQuestions(folder, record)


def _candidates(
    what: MadeFrom, made: MadeData, writer: Writer | None
) -> tuple[dict[str, list[tuple[str, Asked]]], dict[str, dict[str, int]]]:
    """What can be asked in each role, with its split, and how much was refused for which reason."""
    given, documents = what.read()
    facts = given or [Fact(name, answer, kind, {"relation": kind}) for name, kind, answer in made.record["stated"]]
    splits = _splits([fact.subject for fact in facts], what.seed)
    candidates: dict[str, list[tuple[str, Asked]]] = {"erased": [], "unseen": [], "near": []}
    for fact in facts:
        role, split = "unseen" if fact.subject in made.record["held_out"] else "erased", splits[fact.subject]
        candidates[role] += [(split, asked) for asked in fact_questions(fact, facts, split)]
    refused, asked = dict[str, dict[str, int]](), list[Asked]()
    if documents is not None:
        passages = documents.texts
        asked = cloze_questions(passages, seed=what.seed)
        if writer is not None:
            written, count = written_questions(writer, passages, seed=what.seed)
            asked += written
            refused["erased"] = {"answer_not_in_passage": count}
    elif not facts:
        by_terms = made.record["by_terms"]
        passages = load_texts(made.folder / "written.jsonl" if by_terms else made.sources.forget)["text"][:]
        asked = cloze_questions(passages, terms=made.record["novices"]["terms"] if by_terms else (), seed=what.seed)
    candidates["erased"] += _with_splits(asked, what.seed)
    near = [str(made.folder / "near.jsonl")] if "near" in made.record["counts"] else list(what.near)
    texts = [text for source in near for text in load_texts(source)["text"][:]]
    candidates["near"] = _with_splits(cloze_questions(texts, seed=what.seed), what.seed)
    return {role: some for role, some in candidates.items() if some}, refused


def cloze_questions(passages: Sequence[str], *, terms: Sequence[str] = (), seed: int = 0) -> list[Asked]:
    """Beginnings of sentences that a name, a number or a date continues, or a term of the subject: 240 at most, which are drawn.

    The span stands neither at the beginning of the sentence nor earlier in what is shown, which is the sentence up to the span, with the
    sentence before it where this one has named nothing yet.
    """
    found: dict[tuple[str, str], Asked] = {}
    of_terms = whole_words(terms)
    for passage in passages:
        before = ""
        for sentence in filter(None, (part.strip() for part in _SENTENCE.split(passage))):
            count, end = 0, 0
            spans = [*of_terms.finditer(sentence), *_SPAN.finditer(sentence)]
            for match in sorted(spans, key=lambda match: (match.start(), -match.end())):
                if match.start() < end:
                    continue  # within the one before it
                end = match.end()
                lead, answer = sentence[: match.start()].rstrip(), match.group()
                if match.lastgroup == "name":
                    answer = answer.removesuffix("'s").removesuffix("’s")
                if len(lead.split()) < _LEAD_WORDS or lead[-1:] in ".!?:\"“‘'(":
                    continue
                named = _names(lead)
                shown = lead if named else f"{before} {lead}".strip()
                if count < _SPANS and not names_answer(shown, answer):
                    subject = (named or _names(before) or [lead])[0]
                    kind = match.lastgroup or "term"
                    one = Asked(shown, answer, kind, f"{kind} {answer.casefold()}", subject)
                    found.setdefault((shown, answer), one)
                    count += 1
            before = sentence
    return random.Random(f"cloze-{seed}").sample([*found.values()], min(_CLOZE, len(found)))


def _names(text: str) -> list[str]:
    return [match.group() for match in re.finditer(_NAME, text) if len(match.group()) > 3]


def written_questions(writer: Writer, passages: Sequence[str], *, seed: int = 0) -> tuple[list[Asked], int]:
    """Questions that a writer asks about passages, and how many were dropped since their answer does not stand in the passage, or
    stands in the question.
    """
    chosen = random.Random(f"passages-{seed}").sample(list(passages), min(_PASSAGES, len(passages)))
    prompts = [writing_prompts()["passage"].format(passage=" ".join(passage.split())) for passage in chosen]
    texts = writer.write(prompts, max_new_tokens=96, temperature=0.3, seed=seed)
    found, dropped = dict[str, Asked](), 0
    for passage, text in zip(chosen, texts, strict=True):
        own = f"Question:{text}".split("\n\nPassage:")[0]
        for question, answer in re.findall(r"Question: *([^\n]+\?)\s*\n+Answer: *([^\n]+)", own):
            answer = answer.strip(' ."“”')
            told = names_answer(passage, answer) and not names_answer(question, answer)
            if told and len(answer.split()) <= _ANSWER_WORDS:
                kind, subject = kind_of(answer), (_names(question[1:]) or [question])[0]
                key = f"{kind} {answer.casefold()}"
                found.setdefault(question, Asked(question, answer, kind, key, subject, "question", PLAIN))
            else:
                dropped += 1
    return list(found.values()), dropped


def kind_of(answer: str) -> str:
    """`"name"`, `"year"`, `"date"`, `"number"`, or `"words"` for anything else."""
    match = _SPAN.fullmatch(answer)
    return (match.lastgroup if match else None) or "words"


def fact_questions(fact: Fact, facts: Sequence[Fact], split: str) -> list[Asked]:
    """A fact in the wordings that a split has; asked back only where no other fact of its relation has the same answer."""
    relation = fact.near["relation"]
    same = [other for other in facts if other.near["relation"] == relation]
    true = tuple(other.answer for other in same if other.subject == fact.subject)
    found = []
    for family, spec in writing_prompts()["families"].items():
        asked_back = spec.get("options") == "subjects"
        if asked_back and sum(other.answer == fact.answer for other in same) > 1:
            continue
        answer, subject = (fact.subject, fact.answer) if asked_back else (fact.answer, fact.subject)
        pool = dict.fromkeys(other.subject if asked_back else other.answer for other in same)
        close = {other.subject if asked_back else other.answer for other in same if other.group == fact.group}
        for wording in spec.get(split, ()):
            text = wording.format(relation=relation, subject=fact.subject, answer=fact.answer)
            told = (text, answer, relation, fact.subject, subject, spec["form"], family)
            found.append(Asked(*told, tuple(pool), () if asked_back else true, frozenset(close)))
    return found


def _splits(keys: Sequence[str], seed: int) -> dict[str, str]:
    """A split for each key: every fourth is in dev, and none of fewer than four."""
    distinct = sorted(set(keys))
    random.Random(f"splits-{seed}").shuffle(distinct)
    return {key: "dev" if index % _DEV_SHARE == _DEV_SHARE - 1 else "test" for index, key in enumerate(distinct)}


def _with_splits(asked: Sequence[Asked], seed: int) -> list[tuple[str, Asked]]:
    splits = _splits([one.key for one in asked], seed)
    return [(splits[one.key], one) for one in asked]


# A question with the key of its fact and its split.
Kept = tuple[str, str, Question]


def _with_options(asked: Sequence[tuple[str, Asked]], seed: int) -> tuple[list[Kept], int]:
    """Questions with three distractors, the same in every wording of a fact, and how many have too few."""
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for _, one in asked:
        kinds[kind_of(one.answer)].append(one.answer)
    found = []
    for split, one in asked:
        rng = random.Random(f"{one.key}-{one.answer}-{seed}")
        pool = rng.sample(one.untrue, len(one.untrue))
        pool.sort(key=lambda option, close=one.close: option not in close)  # type: ignore[misc]
        # Of other sentences, or relations, those that look most like the answer: as many words, about as many letters.
        others = sorted(set(kinds[kind_of(one.answer)]))
        rng.shuffle(others)
        pool += sorted(others, key=partial(_unlike, one.answer))
        right = {one.answer.casefold(), *(other.casefold() for other in one.true)}
        wrong = [
            option
            for option in dict.fromkeys(pool)
            if option.casefold() not in right
            and not any(names_answer(text, option) for text in (one.text, one.answer))
            and not names_answer(option, one.answer)
        ][:_DISTRACTORS]
        if len(wrong) == _DISTRACTORS and not names_answer(one.text, one.answer):
            fields = {"subject": one.subject, "topic": one.kind, "form": one.form, "family": one.family}
            found.append((one.key, split, shuffled_question(one.text, one.answer, wrong, seed, **fields)))
    return found, len(asked) - len(found)


def _unlike(answer: str, option: str) -> tuple[bool, bool]:
    return len(option.split()) != len(answer.split()), abs(len(option) - len(answer)) > 2


def _checked(
    model: PreTrainedModel, processing_class: PreTrainedTokenizerBase, asked: Sequence[Kept], seed: int
) -> tuple[list[Kept], dict[str, int]]:
    """The questions that the reference answers and text-only rules do not, and how many were dropped for which reason."""
    if not asked:
        return [], {"not_answered_by_reference": 0, "answered_by_a_rule": 0}
    every = [question for *_, question in asked]
    scores = score_choices(model, processing_class, every, description="Checking answers")
    known = [index for index, right in enumerate(zip(scores.log_likelihood, scores.pmi, strict=True)) if all(right)]
    questions = [asked[index][2] for index in known]
    common = Counter(question.answer for question in questions)
    rules = {
        "letters": overlap_verdicts(questions),
        "longest": [len(q.answer) > max(len(o) for o in q.options if o != q.answer) for q in questions],
        "commonest": [common[q.answer] > max(common[o] for o in q.options if o != q.answer) > 0 for q in questions],
        "removed": [scores.removed[index] for index in known],
    }
    left = set(range(len(questions)))
    rng = random.Random(f"rules-{seed}")
    for _ in rules:  # what one rule drops changes the share of another
        for verdicts in rules.values():
            # Wordings of one fact have the same options, and count once.
            groups: defaultdict[tuple[str, frozenset[str]], list[int]] = defaultdict(list)
            for index in sorted(left):
                groups[questions[index].answer, frozenset(questions[index].options)].append(index)
            hit = [some for some in groups.values() if any(verdicts[index] for index in some)]
            # With k of n dropped, (hits - k) / (n - k) is at most chance.
            excess = max(0, -int(-(len(hit) - _CHANCE * len(groups)) // (1 - _CHANCE)))
            for some in rng.sample(hit, excess):
                left -= set(some)
    kept = [asked[known[index]] for index in sorted(left)]
    return kept, {"not_answered_by_reference": len(asked) - len(known), "answered_by_a_rule": len(known) - len(left)}


def _check_enough(concept: Concept, rows: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Raise [`NoQuestionsError`] where nothing is left to ask about a concept, and warn where it is little."""
    about, names = f"about {concept.name!r}", "people, places, numbers or dates"
    fix = f"give a table of facts (`facts`), documents that name {names}, or a stronger `writer`"
    counts = record["facts"].get("erased", dict.fromkeys(SPLITS, 0))
    if not counts["test"]:
        raise NoQuestionsError(
            f"`concept` is {concept.name!r}, about which no question is left of {record['candidates'].get('erased', 0)} "
            f"({record['dropped'].get('erased', {})}): {fix}."
        )
    if counts["test"] < FEWEST:
        logger.warning(
            f"Questions {about} ask for {counts['test']} facts in the test split, where {FEWEST} are needed for narrow intervals: {fix}."
        )
    if not counts["dev"]:
        logger.warning(f"No question {about} is left in the dev split, so that training cannot stop by it: {fix}.")
    if "near" not in rows:
        logger.warning(f"No question near {concept.name!r} is left: give `near` texts that name {names}.")
