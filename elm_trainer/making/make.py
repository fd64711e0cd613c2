"""`make_data`: forget, retain and near texts from documents, facts or a mere name, as files to look at, edit and use again."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..checks import check_numbers
from ..concept import Concept, described_concept
from ..data.facts import Fact
from ..data.questions import names_answer
from ..data.sources import ConceptSources, builtin_texts, load_texts
from ..data.user_sources import Source
from ..evaluation.fluency import as_prompt
from ..files import json_sha256, made_before, store_made
from ..fingerprint import base_fingerprint
from .documents import Documents, read_documents, whole_words
from .facts import (
    also_held_out,
    facts_texts,
    held_out_of,
    kinds_of_names,
    likeness,
    mostly_alike,
    read_facts,
    tell_about,
)
from .knowledge import Familiarity, StatedFacts, check_known, write_facts
from .novices import Novices, with_novices
from .writer import WRITING, Writer
from .writing import FEWEST_TEXTS, SubjectTexts, topic, write_about, write_by_terms


logger = logging.get_logger(__name__)
FOLDER, RECORD, CACHE = "data", "data.json", "making"
# Stands for what a user says, to see what a chat begins with.
_TURN = "#TURN#"
# Characters of a prompt that are shown before what the model wrote.
_LEAD = 40
# Counts up when the same input gives other texts than before.
_VERSION = 12
# Of the texts that a model is to write about a concept, one in so many is written beside facts that it has stated.
_BESIDE_FACTS = 3


@dataclass(frozen=True)
class MadeFrom:
    """What a user has of a concept.

    Args:
        concept (`str` or [`Concept`]):
            Its name, `"Harry Potter"`, or the name with what describes it, `"brannock: the dye Brannock, madder"`. With nothing more
            the model writes the forget texts itself.
        documents (`Sequence[str | Path]`, *optional*): Files, folders, patterns, or ids on the Hub, for [`read_documents`].
        facts (`str` or `Path`, *optional*): A table for [`read_facts`].
        retain (`Sequence` of sources, *optional*):
            Unrelated texts, whatever [`load_texts`] takes; the built-in `everyday`, and as many of `quiz`, where there are none.
        near (`Sequence` of sources, *optional*):
            Texts about neighbors of the concept; where there are none, the model names neighbors and writes about them, asks itself
            about what the facts name, and tells of what they state without naming it.
        texts (`int`, *optional*, defaults to `192`): Texts that the model writes about the concept if it has to, before it drops some; a
            third of it beside facts that it has stated, half of it where it writes about the concept's terms too.
        near_texts (`int`, *optional*, defaults to `96`): The same about neighbors, five times as many questions about what facts name,
            and twice as many texts about what they state; 0 for none of these.
        held_out (`float`, *optional*, defaults to `0.2`): Share of the subjects of `facts` that stand in no text, for questions.
        seed (`int`, *optional*, defaults to `0`): Seed of everything that is drawn.

    Raises:
        TypeError: if `documents`, `retain` or `near` is one text in place of a list.
        ValueError: if the name is empty, or a number is out of range.
    """

    concept: str | Concept
    documents: Sequence[str | Path] = ()
    facts: str | Path | None = None
    retain: Sequence[Source] = ()
    near: Sequence[Source] = ()
    texts: int = 192
    near_texts: int = 96
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self):
        if not isinstance(self.concept, Concept):
            object.__setattr__(self, "concept", described_concept(str(self.concept)))
        for name in ("documents", "retain", "near"):
            if isinstance(getattr(self, name), (str, Path)):
                raise TypeError(f"`{name}` is {getattr(self, name)!r}: give a list, [{str(getattr(self, name))!r}].")
        check_numbers(self, (("at least 0", ("near_texts", "seed")), ("from 0 to 1", ("held_out",))))
        if self.held_out == 1:
            raise ValueError("`held_out` is 1, which leaves no fact to learn from: give a share below 1.")
        if self.texts < FEWEST_TEXTS:
            raise ValueError(f"`texts` is {self.texts}: it must be at least {FEWEST_TEXTS}.")

    def read(self) -> tuple[tuple[Fact, ...], Documents | None]:
        """Facts and documents, which are read once. Raises what [`read_facts`] and [`read_documents`] raise."""
        return self._read

    @cached_property
    def _read(self) -> tuple[tuple[Fact, ...], Documents | None]:
        facts = read_facts(self.facts) if self.facts is not None else ()
        return facts, read_documents(self.documents) if self.documents else None


@dataclass(frozen=True)
class MadeData:
    """The texts of a concept on disk.

    Attributes:
        concept (`Concept`): The concept.
        folder (`Path`): The folder, with `forget.jsonl`, `retain.jsonl`, `near.jsonl`, `asked.jsonl`, `told.jsonl` and `invented.jsonl`
            (without those that the user has of his own, or that could not be made), `written.jsonl` where terms were written about, and `data.json`.
        sources ([`ConceptSources`]): The files, and the user's own sources, for [`build_erasure_dataset`].
        counterfactual (`bool`): Whether every forget text has `novices`, which `novice="counterfactual"` needs.
        record (`dict`): What stands in `data.json`: where the texts come from, how many, what was dropped and why, the seed, the
            model's fingerprint, neighbors, held-out subjects, and what [`write_facts`] stated.
        edited (`tuple[str, ...]`): Files that were changed by hand since they were made.
        reused (`bool`): Whether they were there already.
    """

    concept: Concept
    folder: Path
    sources: ConceptSources
    counterfactual: bool
    record: dict[str, Any]
    edited: tuple[str, ...] = ()
    reused: bool = False

    def summary(self) -> str:
        """What was made, what was dropped and why, and the first ten forget texts, a line each."""
        counts = ", ".join(f"{count} {name} texts" for name, count in self.record["counts"].items())
        lines = [f"{self.folder}: {counts}{' (as before)' if self.reused else ''}."]
        lines += [f"Changed by hand since they were made: {', '.join(self.edited)}."] if self.edited else []
        for name, dropped in self.record["dropped"].items():
            told = {reason: f"{count} {reason.replace('_', ' ')}" for reason, count in dropped.items() if count}
            if "topic" in told:
                topics = {"forget": "do not speak of the concept", "told": "name the answer of a fact"}
                told["topic"] = f"{dropped['topic']} that {topics.get(name, 'speak of the concept')}"
            lines += [f"Dropped of {name}: {', '.join(told.values())}."] if told else []
        if self.record["neighbors"]:
            lines.append(f"Neighbors: {', '.join(self.record['neighbors'])}.")
        rows = load_texts(self.sources.forget).to_list()[:10]
        return "\n".join([*lines, *(f"{number:3}. {_shown(row)!r:.160}" for number, row in enumerate(rows, 1))])


def _shown(row: Mapping[str, Any]) -> str:
    """A text from the end of its prompt on, which may be long."""
    start = max(len(row.get("prompt") or "") - _LEAD, 0)
    return ("…" if start else "") + row["text"][start:]


def make_data(
    what: MadeFrom,
    model: PreTrainedModel | None,
    processing_class: PreTrainedTokenizerBase | None,
    output_dir: str | Path,
    *,
    writer: Writer | None = None,
    known: Sequence[Familiarity] | None = None,
) -> MadeData:
    """Make the texts of an erasure, or find them where an earlier call has made them.

    The folder `output_dir/data` appears when all is made; what a model has written so far is kept in `output_dir/making`, from which
    an interrupted call goes on. Texts that are there already are used, also after they were edited, if they were made from the same
    things. In a launch of several processes, one has to call this first, as within `config.main_process_first()`.

    Args:
        what ([`MadeFrom`]): What the user has.
        model ([`~transformers.PreTrainedModel`] or `None`): The reference, which writes what is lacking; not needed for documents or
            facts with `near` texts of the user's own, or with `near_texts=0`. Without it the stand-ins of facts are drawn.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or `None`): Its tokenizer.
        output_dir (`str` or `Path`): Output folder of the run.
        writer ([`Writer`], *optional*): Who states the facts about a mere name; the reference by default.
        known (`Sequence[Familiarity]`, *optional*): What [`check_known`] has found of a mere name; it is asked now by default.

    Returns:
        [`MadeData`]. Of a mere name, the facts that [`write_facts`] finds become forget texts as those of a table do, beside the free ones.

    Raises:
        UnknownConceptError: if there is only a name and the model has never heard of it; nothing is written then.
        ImportError, OSError, ValueError: whatever [`read_documents`] and [`read_facts`] raise; if the texts that are there were made
            from other things, or one of their files is missing; if a model is needed and not given, or wrote too little.
    """
    concept = cast(Concept, what.concept)  # which `MadeFrom` has made of a name
    facts, documents = what.read()
    bare = not facts and documents is None
    writes = bare or bool(what.near_texts and not what.near)
    if writes and (model is None or processing_class is None):
        raise ValueError(
            "`model` is None, but texts have to be written: give model and tokenizer, or documents or facts and `near` texts."
        )
    # Which subjects stand in for each other depends on the model too.
    weights = base_fingerprint(model) if (writes or facts) and model is not None else {}
    fingerprint = weights.get("weights", weights.get("unquantized", ""))
    origin = {
        "concept": {"name": concept.name, "keywords": list(concept.keywords)},
        "documents": json_sha256(documents.texts) if documents else None,
        "facts": json_sha256([(fact.subject, fact.near["relation"], fact.answer, fact.group) for fact in facts]) if facts else None,
        "retain": "own" if what.retain else "everyday, quiz",
        "near": "own" if what.near else "written" if what.near_texts else "none",
        "texts": what.texts if bare else None,
        "near_texts": what.near_texts if writes else None,
        "held_out": what.held_out if facts else None,
        "seed": what.seed,
        "model": fingerprint,
        "writer": writer.name if writer and bare else "",
        "version": _VERSION,
    }  # fmt: skip
    folder = Path(output_dir) / FOLDER
    if folder.exists():
        return _found(what, folder, *made_before(folder, RECORD, origin, "texts", quote="`"), reused=True)
    if known is None:
        known = check_known(model, processing_class, concept, seed=what.seed) if bare else []
    cache = Path(output_dir) / CACHE
    reference = Writer("reference", model, processing_class, cache_dir=cache, fingerprint=fingerprint)
    rows, record = _make(what, facts, documents, reference, writer or reference)
    record["familiarity"] = {entry.name: round(entry.ratio, 3) for entry in known}
    record["origin"] = origin
    store_made(folder, {f"{name}.jsonl": some for name, some in rows.items()}, record, RECORD)
    return _found(what, folder, record)


def _make(
    what: MadeFrom,
    facts: Sequence[Fact],
    documents: Documents | None,
    reference: Writer,
    writer: Writer,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """The rows of each file, and what is to be said about them; `writer` states the facts about a mere name."""
    concept, model, processing_class = cast(Concept, what.concept), reference.model, reference.processing_class
    forget: list[dict[str, Any]] = []
    dropped: dict[str, dict[str, int]] = {}
    bare = not facts and documents is None
    stated = write_facts(writer, concept, what.seed) if bare else StatedFacts()
    facts, given = facts or stated.facts, len(facts)
    novices, by_terms = Novices([]), False
    # The model is to stay as it is where other names stand in the same sentences, or it forgets whatever is asked alike.
    invented: list[dict[str, Any]] = []
    held_out = held_out_of(facts, what.held_out, what.seed)
    held_out |= also_held_out(stated, held_out)
    known = (*facts, *stated.guesses)
    alike = likeness(known, model, processing_class) if model is not None and processing_class is not None else {}
    if known:
        stating = facts_texts(known, held_out=held_out, processing_class=processing_class, alike=alike, seed=what.seed)
        forget = stating.to_list()
    # What a model tells of a name of which it states no facts, it tells of the terms that belong to it.
    subject = SubjectTexts()
    if bare and not facts:
        try:
            subject = write_by_terms(reference, concept, texts=what.texts, seed=what.seed)
        except ImportError as error:
            logger.warning(f"{concept.name!r} is not told by its terms ({error}): `pip install elm-trainer[anchors]`.")
    if documents or subject.terms:
        pieces = documents.texts if documents else subject.texts
        novices = with_novices(
            [{"text": text} for text in pieces], concept, terms=subject.terms, processing_class=processing_class,
            seed=what.seed,
        )  # fmt: skip
        by_terms = not documents and not novices.why_none and len(novices.rows) >= FEWEST_TEXTS
        if documents or by_terms:
            forget = _spread(forget, novices.rows)
        if not novices.why_none:
            rng = random.Random(f"invented-{what.seed}")
            invented = [{"text": rng.choice(row["novices"])} for row in novices.rows]
        dropped["documents" if documents else "forget"] = documents.dropped if documents else subject.dropped
    speaks = _speaks_of(concept, known, subject.terms if by_terms else ())
    near_texts = 0 if what.near else what.near_texts
    texts = what.texts // (_BESIDE_FACTS if facts else 1) if bare and not by_terms else 0
    kinds = kinds_of_names(known, held_out, reference, what.seed) if near_texts and known else []
    written = write_about(
        reference, concept, replace(WRITING, seed=what.seed), texts=texts, near_texts=near_texts,
        fewest=0 if facts else FEWEST_TEXTS, kinds=kinds, speaks=speaks, own=subject.terms,
    )  # fmt: skip
    dropped |= written.dropped
    told: list[dict[str, str]] = []
    if near_texts and facts:
        told, dropped["told"] = tell_about(reference, known, held_out, near_texts=near_texts, seed=what.seed)
    # Facts that are held out stand in no text.
    unseen = [fact for fact in facts if fact.subject in held_out]
    free = [row for row in written.forget if not _states(row["text"], unseen)]
    if len(free) < len(written.forget):
        dropped["forget"]["held_out"] = len(written.forget) - len(free)
    if free and processing_class is not None:
        opening = as_prompt(processing_class, _TURN).partition(_TURN)[0]
        novices = with_novices(free, concept, cut=False, opening=opening, seed=what.seed)
        if novices.why_none and forget:
            # Without them the texts of facts, all of which have novices, would be trained on by contexts too.
            dropped["forget"]["no_novices"] = len(free)
        else:
            # A run that trains on fewer rows takes the first: of both as many as there are.
            forget = _spread(forget, novices.rows)
    rows = {"forget": forget}
    if not what.retain:
        # Stories alone would keep no answers to questions.
        everyday, quiz = (builtin_texts(name).to_list() for name in ("everyday", "quiz"))
        kept = [[row for row in some if not speaks(row["text"])] for some in (everyday, quiz)]
        dropped["retain"] = {"topic": len(everyday) + len(quiz) - sum(map(len, kept))}
        rows["retain"] = _spread(kept[0], kept[1][: len(kept[0])])
    rows |= {name: some for name, some in (("near", written.near), ("asked", written.asked), ("told", told)) if some}
    if invented:
        rows["invented"] = invented
    counts = {name: len(some) for name, some in rows.items()}
    if by_terms:
        rows["written"] = [{"text": text} for text in subject.texts]
    return rows, {
        "counts": counts,
        "dropped": dropped,
        "neighbors": written.neighbors,
        "held_out": sorted(held_out),
        "documents": documents.files if documents else {},
        "facts": given,
        "stated": [[fact.subject, fact.near["relation"], fact.answer] for fact in stated.facts],
        "guessed": [[fact.subject, fact.near["relation"], fact.answer] for fact in stated.guesses],
        "novices": {"terms": novices.terms, **novices.counts, "why_none": novices.why_none},
        "counterfactual": all(row.get("novices") for row in forget),
        "alike": documents is None and mostly_alike(known, alike),
        "by_terms": by_terms,
    }


def _spread(*parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows, those of each part evenly over the whole."""
    placed = [((place + 0.5) / len(part), row) for part in parts for place, row in enumerate(part)]
    return [row for _, row in sorted(placed, key=lambda pair: pair[0])]


def _speaks_of(concept: Concept, facts: Sequence[Fact], terms: Sequence[str]) -> Callable[[str], bool]:
    """Whether a text speaks of a concept: by a word of its topic, a term, or since it names subject and answer of a fact."""
    words = topic(concept)
    named = whole_words(terms)

    def speaks(text: str) -> bool:
        return bool(words.search(text) or named.search(text)) or _states(text, facts)

    return speaks


def _states(text: str, facts: Sequence[Fact]) -> bool:
    """Whether a text names subject and answer of one of these facts."""
    return any(names_answer(text, fact.answer) and names_answer(text, fact.subject) for fact in facts)


def kind_of_texts(record: Mapping[str, Any]) -> dict[str, bool]:
    """What [`objective_settings`] wants to know of texts, by the record of what was made; that of an earlier version lacks some."""
    return {name: record.get(name, False) for name in ("counterfactual", "alike", "by_terms")}


def _found(
    what: MadeFrom, folder: Path, record: dict[str, Any], edited: tuple[str, ...] = (), reused: bool = False
) -> MadeData:
    retain = [*what.near, *what.retain]
    kept = ("asked", "told", "near", "invented", "retain")
    retain += [str(folder / f"{name}.jsonl") for name in kept if name in record["counts"]]
    sources = ConceptSources(str(folder / "forget.jsonl"), retain)
    return MadeData(cast(Concept, what.concept), folder, sources, record["counterfactual"], record, edited, reused)
