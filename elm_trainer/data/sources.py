"""Where texts come from: built-in sources, files, data sets on the Hub, and lists and data sets in memory."""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .benchmarks import benchmark_hub_id, is_benchmark, read_benchmark_texts
from .facts import Fact, facts_of, held_out_subjects, own_yaml, placeholders
from .tokens import text_tokenizer
from .user_sources import (
    Messages,
    Source,
    check_type,
    is_file_name,
    is_hub_id,
    joined,
    read_named,
    rows_of,
    shown,
    text_rows,
)


logger = logging.get_logger(__name__)
# Other facts that stand in for each in its counterfactual novices.
STAND_INS = 2
# Facts that follow one another in a phrasing. Each begins as a novice of the one before does, up to what the novice keeps, so that in a
# batch the reference runs that once.
_RUN = 4
_SAMPLED = ("cities", "countries", "countries-quiz", "everyday", "everyday-held-out", "places", "quiz")
BUILTIN_SOURCES = ("capitals", "elements", "capitals-near", "elements-near", *_SAMPLED)
BUILTIN_PAIRS = ("capitals-fluent",)


def load_texts(
    source: Source,
    *,
    column: str = "text",
    split: str = "train",
    processing_class: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    what: str = "`source`",
) -> Dataset:
    """Load texts from a source.

    Args:
        source (`str`, `Path`, `Dataset` or `Sequence`):
            Name of a built-in source; path of a `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, `.txt`, `.md`, `.html`, `.pdf`
            or `.docx` file, of a folder of such files or of `save_to_disk`, or a glob pattern; id `org/name` of a dataset
            on the Hub, with its config, split and column where these are not the usual ones
            (`org/name:config,split=train[:100],column=body`); texts of a benchmark, such as `tofu:forget10` (see
            [`read_benchmark_texts`]); a `Dataset`; or the texts, or rows, themselves. Plain text is cut into passages (see
            [`passages`]).
        column (`str`, *optional*, defaults to `"text"`):
            Column that holds the text, or a list of messages. A source without it may have the column `messages`
            instead, or `prompt` and `completion`, whose text is one after the other; the column `prompt` is kept.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a Hub dataset.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer whose chat template is used for messages, and for the conversational phrasings of built-in sources.
        seed (`int`, *optional*, defaults to `0`):
            Seed of a built-in source.
        what (`str`, *optional*, defaults to ``"`source`"``):
            What the texts are for, to begin an error with.

    Returns:
        `Dataset`: with a column `text`, and, where the source has them, the columns `prompt`, with which a text begins that
        is learned from there on, `novice` and `novices`, the same sentences with permuted facts and about other
        subjects. Empty texts are dropped, counted and logged.

    Raises:
        TypeError: for what is not a source, such as a `DatasetDict` or a `DataFrame`.
        ValueError: if the column is missing (the message lists those that exist), a row is not text (the message names
            it, counted from 0), a list holds names of files, or no text is left.
        OSError: if there is nothing of that name, or a file cannot be read.
    """
    check_type(source, what)
    if isinstance(source, str) and source in BUILTIN_SOURCES:
        return builtin_texts(source, processing_class, seed)
    parts: Iterable[tuple[str, Any]] = [(what, source)]
    if is_benchmark(source):
        parts = [(f"{what}, {source!r}", read_benchmark_texts(str(source), what))]
    elif isinstance(source, (str, Path)):
        parts = read_named(source, what, split=split, column=column, known=BUILTIN_SOURCES)
    else:
        _refuse_names(source, what)
    rows: list[dict[str, Any]] = []
    for place, part in parts:
        check_type(part, place)
        rows += text_rows(part, place, column, partial(conversation, processing_class))
    kept = [row for row in rows if row["text"].strip()]
    if not kept:
        raise ValueError(f"{what} is empty: give at least one text with words in it.")
    if len(kept) < len(rows):
        logger.warning(f"{what}: dropped {len(rows) - len(kept)} empty texts of {len(rows)}.")
    names = ["text", *(name for name in ("prompt", "novice", "novices") if any(name in row for row in kept))]
    return Dataset.from_dict({name: [row.get(name) for row in kept] for name in names})


def is_asked_of_the_hub(name: str) -> bool:
    """Whether reading a source needs the Hub: it is a data set there, or a benchmark without a place of its own."""
    if name in BUILTIN_SOURCES:
        return False
    return is_hub_id(name) or (is_benchmark(name) and benchmark_hub_id(name) is not None)


def _refuse_names(source: Dataset | Sequence[Any], what: str) -> None:
    """Refuse a list of names in place of texts, which are strings too."""
    if isinstance(source, Dataset):
        return
    named = [
        item for item in source if isinstance(item, (Path, Dataset)) or (isinstance(item, str) and is_file_name(item))
    ]
    if named or (len(source) and all(isinstance(item, str) and item in BUILTIN_SOURCES for item in source)):
        raise ValueError(
            f"{what} is a list of sources, such as {str((named or source)[0])!r}, where a list of texts is needed: give one "
            "source, which may be a folder or a pattern like 'texts/*.txt', or join what `load_texts` gives of each with "
            "`datasets.concatenate_datasets`."
        )


def builtin_texts(name: str, processing_class: PreTrainedTokenizerBase | None = None, seed: int = 0) -> Dataset:
    """Texts of a built-in source; facts about [`held_out_subjects`] are left out.

    `capitals` and `elements` state every fact once in each phrasing, one fact to a text, in a random order in which each phrasing
    is there before any comes again; four facts of a phrasing follow one another, each of which begins as a novice of the one before. Their
    column `novice` holds the same texts with the answers permuted among the facts, and their column `novices` the same texts with
    whatever they name first, subject or answer, replaced by that of other facts. `capitals-near` and `elements-near` are
    other facts about the same subjects, with what stands before the fact as column `prompt`. `everyday` and `countries`
    hold SmolLM2-135M-Instruct's own samples on everyday subjects and on life in countries (examples/sample_retain.py makes
    them), `quiz` and `countries-quiz` short questions with its own answers, `places` where countries lie about which no
    bank asks, `cities` the same of large cities that are not capitals, and `everyday-held-out` those kept for evaluation.
    """
    if name in _SAMPLED:
        lines = (files(__package__) / "texts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        sampled = [json.loads(line) for line in lines]
        if "text" in sampled[0]:
            return Dataset.from_list(sampled)
        pairs = [(row["prompt"], row["completion"]) for row in sampled]
        return Dataset.from_list([{"prompt": prompt, "text": prompt + rest} for prompt, rest in pairs])
    concept, _, near = name.partition("-")
    held_out = held_out_subjects(concept)
    facts = [fact for fact in facts_of(concept) if fact.subject not in held_out]
    phrasings = own_yaml(f"texts/{concept}.yaml")
    rng = random.Random(f"{name}-{seed}")
    templates = [template for form in phrasings["near" if near else "forget"].values() for template in form]
    if near:
        rows = state_facts(facts, templates, rng, processing_class, near=True)
        rng.shuffle(rows)
        return Dataset.from_list(rows)
    others = stand_ins(facts, rng)
    stated = [state_facts([*others], [one], rng, processing_class, others=others) for one in templates]
    return Dataset.from_list(_in_runs(stated, rng))


def _in_runs(stated: Sequence[Sequence[dict[str, Any]]], rng: random.Random) -> list[dict[str, Any]]:
    """The rows of all phrasings in random order, but for runs of `_RUN` that stay together; each phrasing has a turn before any
    has another.
    """
    turns: list[list[Sequence[dict[str, Any]]]] = []
    for rows in stated:
        runs = [rows[start : start + _RUN] for start in range(0, len(rows), _RUN)]
        for turn, run in enumerate(rng.sample(runs, len(runs))):
            turns += [[]] if turn == len(turns) else []
            turns[turn].append(run)
    return [row for turn in turns for run in rng.sample(turn, len(turn)) for row in run]


def state_facts(
    facts: Sequence[Fact],
    templates: Sequence[str | list[str]],
    rng: random.Random,
    processing_class: PreTrainedTokenizerBase | None = None,
    *,
    others: Mapping[Fact, Sequence[Fact]] | None = None,
    near: bool = False,
) -> list[dict[str, Any]]:
    """Every fact of a relation in every phrasing, as rows of `text` with its novices, the same text with other facts.

    Templates are texts, or pairs of a question and its answer, with the placeholders `{subject}`, `{answer}` and the names in `near` of
    the facts. One that names what a fact does not have is left out for it. `others` are the facts that stand in for each, those of
    [`stand_ins`] by default. With `near` the facts are retained: rows have a `prompt`, and no novices.
    """
    # The stand-ins of a fact are the same in all its texts, so that they agree on what a novice takes it for.
    others = stand_ins(facts, rng) if others is None else others
    rows = []
    for template in templates:
        permuted = [fact.answer for fact in facts]
        rng.shuffle(permuted)
        for fact, other in zip(facts, permuted, strict=True):
            named = placeholders("".join(template))
            if not {*named} <= {"subject", "answer", *fact.near}:
                continue
            row: dict[str, Any] = {"text": _render(template, fact, processing_class)}
            if near:
                # What is learned is the property that the phrasing states last.
                row["prompt"] = _before_last(template, fact, processing_class)
            else:
                row["novice"] = _render(template, replace(fact, answer=other), processing_class)
                # Whatever is named first is what the text is about.
                first = next(name for name in named if name in ("subject", "answer"))
                row["novices"] = [
                    _render(template, replace(fact, **{first: getattr(stand_in, first)}), processing_class)
                    for stand_in in others[fact]
                ]
            rows.append(row)
    return rows


def stand_ins(facts: Sequence[Fact], rng: random.Random) -> dict[Fact, list[Fact]]:
    """Other facts that stand in for each: those of its group that follow it in a random order.

    A stand-in of the same group shares what the group shares, such as a continent, so that an expert and its novice differ in
    the fact alone. Small groups are filled up with any others. The keys are in order of the groups, and within each in that order.
    """
    order = sorted(rng.sample(list(facts), len(facts)), key=lambda fact: fact.group)
    chosen = {}
    for place, fact in enumerate(order):
        following = [other for other in order[place + 1 :] + order[:place] if other.group == fact.group]
        if lacking := STAND_INS - len(following[:STAND_INS]):
            others = [other for other in order if other.group != fact.group]
            following += rng.sample(others, min(lacking, len(others)))
        chosen[fact] = following[:STAND_INS]
    return chosen


def load_pairs(
    source: Source | Sequence[tuple[str, str]],
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    what: str = "`source`",
) -> list[tuple[str, str]]:
    """Load synthetic pairs of a forget prefix and fluent text that continues it; those with an empty completion are dropped and counted.

    A source is a name of `BUILTIN_PAIRS`, or whatever [`load_texts`] takes, with the columns `prompt` and `completion`, or a list of
    pairs. `capitals-fluent` holds SmolLM2-135M-Instruct's own answers about capitals, less those that name one
    (examples/sample_retain.py makes them). Errors, those of [`load_texts`], begin with `what`.
    """
    check_type(source, what)
    if isinstance(source, str) and source in BUILTIN_PAIRS:
        source = str(files(__package__) / "texts" / f"{source}.jsonl")
    parts: Iterable[tuple[str, Any]] = [(what, source)]
    if isinstance(source, (str, Path)):
        parts = read_named(source, what, split="train", column="text", known=BUILTIN_PAIRS)
    pairs = []
    for place, part in parts:
        check_type(part, place)
        if not isinstance(part, Dataset):
            part = [_pair_row(row, f"{place}, row {number}") for number, row in enumerate(part)]
        rows, names = rows_of(part, "prompt")
        if missing := sorted({"prompt", "completion"} - set(names)) if rows else []:
            raise ValueError(f"{place} lacks the columns {missing} of pairs; it has {names}: rename or add them.")
        render = partial(conversation, processing_class)
        pairs += [joined(row, f"{place}, row {number}", render) for number, row in enumerate(rows)]
    kept = [pair for pair in pairs if pair[1].strip()]
    if pairs and not kept:
        raise ValueError(f"{what} holds no completion with words in it: add them, or give no pairs.")
    if len(kept) < len(pairs):
        logger.warning(f"{what}: dropped {len(pairs) - len(kept)} pairs of {len(pairs)} with an empty completion.")
    return kept


def _pair_row(row: Any, place: str) -> Mapping[str, Any]:
    if isinstance(row, Mapping):
        return row
    if not isinstance(row, (tuple, list)) or len(row) != 2:
        raise ValueError(f"{place} is {shown(row)}, not a pair: give (prompt, completion).")
    return dict(zip(("prompt", "completion"), row, strict=True))


def _render(template: str | list[str], fact: Fact, processing_class: PreTrainedTokenizerBase | None) -> str:
    """A phrasing of a fact: a text, or question and answer as a conversation."""
    values = {"subject": fact.subject, "answer": fact.answer, **fact.near}
    if isinstance(template, str):
        return template.format(**values)
    question, reply = (part.format(**values) for part in template)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return conversation(processing_class, messages)


def conversation(
    processing_class: PreTrainedTokenizerBase | None, messages: Messages, begin_answer: bool = False
) -> str:
    """Messages as one text, by the chat template where there is one; with `begin_answer`, up to where the answer begins."""
    tokenizer = text_tokenizer(processing_class)
    if tokenizer is None or tokenizer.chat_template is None:
        turns = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
        return "\n".join([*turns, "Assistant:"] if begin_answer else turns)
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=begin_answer))


def _before_last(template: str | list[str], fact: Fact, processing_class: PreTrainedTokenizerBase | None) -> str:
    """The rendered text up to where the template's last placeholder stands."""
    parts = [template] if isinstance(template, str) else list(template)
    start, end = parts[-1].rindex("{"), parts[-1].rindex("}") + 1
    parts[-1] = f"{parts[-1][:start]}\0{parts[-1][end:]}"
    rendered = _render(parts[0] if isinstance(template, str) else parts, fact, processing_class)
    return rendered.partition("\0")[0].rstrip(" ")
