"""A model writes about a subject of which only the name is given, and about the neighbors of it that it names."""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..concept import Concept
from ..data.invented import SMALL_WORDS
from ..evaluation.fluency import as_prompt, repetition
from ..synthesis import SynthesisConfig, sample_texts
from .documents import without_duplicates


logger = logging.get_logger(__name__)
# A little colder than the model's own distribution: what it says more often is what it knows.
WRITING = SynthesisConfig(plausibility=0.0, temperature=0.8, max_new_tokens=48, batch_size=32)
_NAMING_DRAWS, _NAME_TOKENS = 12, 24
# Names of a kind of which the model writes questions, the tokens of these and of an answer, and the words of a question.
_FORM_NAMES, _FORM_TOKENS, _ANSWER_TOKENS, _FORM_WORDS = 12, 40, 8, range(4, 15)
# Questions about what facts name, for each text about a neighbor, and the share of a form's questions that may speak of the concept.
ASKED_SHARE, _TELLING = 5, 0.2
NEIGHBORS, _WORDS_OF_A_NAME = 8, 4
FEWEST_TEXTS = 8
_SENTENCE = re.compile(r"[.!?][\"')]*(?=\s|$)|\n")
_QUESTION = re.compile(r"[^?]+\?")


@dataclass(frozen=True)
class Written:
    """What a model wrote about a concept and its neighbors.

    Attributes:
        forget (`list[dict]`): Rows of `text` about the concept, each with the beginning that the model was given as `prompt`.
        near (`list[dict]`): The same about the neighbors.
        asked (`list[dict]`): Questions about what facts name, with the short answers as `text`.
        neighbors (`list[str]`): The neighbors, those that the model named most often first.
        dropped (`dict[str, dict[str, int]]`): How many texts of `"forget"`, `"near"` and `"asked"` were dropped for which reason.
    """

    forget: list[dict[str, str]]
    near: list[dict[str, str]]
    asked: list[dict[str, str]]
    neighbors: list[str]
    dropped: dict[str, dict[str, int]]


def write_about(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    concept: Concept,
    config: SynthesisConfig | None = None,
    *,
    texts: int = 192,
    near_texts: int = 96,
    fewest: int = FEWEST_TEXTS,
    kinds: Sequence[Sequence[str]] = (),
    speaks: Callable[[str], bool] | None = None,
    cache_dir: str | Path | None = None,
    fingerprint: str = "",
) -> Written:
    """Let the model write what it knows about a concept in many forms, and about other subjects near it.

    The forms are those of `data/texts/writing.yaml`. Dropped are texts with fewer than `min_words` new words or more repetition
    than `max_repetition`, duplicates (see [`without_duplicates`]), texts about the concept in which no word of [`topic`] stands
    behind the prompt, and texts about neighbors in which one does.

    Args:
        model ([`~transformers.PreTrainedModel`]): The reference.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer, with or without a chat template.
        concept ([`Concept`]): The concept.
        config ([`SynthesisConfig`], *optional*, defaults to `WRITING`): Settings; `gamma` plays no role.
        texts (`int`, *optional*, defaults to `192`): Texts to write about the concept, before any is dropped; 0 for none.
        near_texts (`int`, *optional*, defaults to `96`): The same about its neighbors.
        fewest (`int`, *optional*, defaults to `8`): Texts about the concept that must be left.
        kinds (`Sequence[Sequence[str]]`, *optional*):
            Names of each kind that facts about the concept name, such as their subjects: about these the model asks and answers what
            it likes ([`ask_about`]), five times `near_texts` in all, so that what the facts do not state stays.
        speaks (`Callable`, *optional*):
            Whether a text beside those about the concept speaks of it all the same; whether it has a word of [`topic`] by default.
        cache_dir (`str` or `Path`, *optional*): Where finished batches are kept, from which a second call goes on.
        fingerprint (`str`, *optional*): What identifies the model, such as [`model_fingerprint`].

    Returns:
        [`Written`]. Where the model names no usable neighbor, `near` is empty and a warning says so.

    Raises:
        ValueError: if fewer than `fewest` texts about the concept are left.
    """
    config = config or WRITING
    prompts = writing_prompts()
    dropped: dict[str, dict[str, int]] = {}

    words = topic(concept)
    speaks = speaks or (lambda text: bool(words.search(text)))

    def write(begun: Sequence[str], fits: Callable[[str], bool], what: str) -> list[dict[str, str]]:
        found = sample_texts(model, processing_class, begun, config, cache_dir=cache_dir, fingerprint=fingerprint)
        rows, dropped[what] = sift(begun, found, fits, config)
        # Asked in order of length, they are read in any.
        random.Random(f"{what}-{config.seed}").shuffle(rows)
        return rows

    forget: list[dict[str, str]] = []
    near: list[dict[str, str]] = []
    neighbors: list[str] = []
    if texts:
        plain = [prompt for form, some in prompts["about"].items() if form != "chat" for prompt in some]
        begun = _begun(processing_class, [concept.name], plain, prompts["about"]["chat"], texts)
        forget = write(begun, lambda text: bool(words.search(text)), "forget")
        if len(forget) < fewest:
            raise ValueError(
                f"Of {texts} texts that the model wrote about {concept.name!r}, {len(forget)} are left ({dropped['forget']}), and "
                f"{fewest} are needed: describe the concept, '{concept.name}: keyword, keyword', or give documents or facts."
            )
    if near_texts:
        neighbors = name_neighbors(model, processing_class, concept, cache_dir=cache_dir, fingerprint=fingerprint)
    if neighbors:
        begun = _begun(processing_class, neighbors, prompts["near"], prompts["chat_near"], near_texts)
        rows = write(begun, lambda text: True, "near")
        # What a text goes on with may state a fact about what its beginning names.
        near = [row for row in rows if not speaks(row["text"])]
        dropped["near"]["topic"] = len(rows) - len(near)
    asked: list[dict[str, str]] = []
    for number, names in enumerate(kinds if near_texts else ()):
        rows, lost = ask_about(
            model, processing_class, names, replace(config, seed=config.seed + number), speaks,
            count=ASKED_SHARE * near_texts // len(kinds), cache_dir=cache_dir, fingerprint=fingerprint,
        )  # fmt: skip
        asked += rows
        dropped["asked"] = {"topic": dropped.get("asked", {"topic": 0})["topic"] + lost}
    random.Random(f"asked-{config.seed}").shuffle(asked)
    if near_texts and not neighbors and not asked:
        logger.warning(f"The model names no neighbor of {concept.name!r}: give retain text about some yourself.")
    return Written(forget, near, asked, neighbors, dropped)


def ask_about(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    names: Sequence[str],
    config: SynthesisConfig,
    speaks: Callable[[str], bool],
    *,
    count: int,
    cache_dir: str | Path | None = None,
    fingerprint: str = "",
) -> tuple[list[dict[str, str]], int]:
    """Questions of a model's own about names of one kind, such as countries, with its answers.

    It writes questions about some of the names. Each of these is a form that is asked about every name, and a draw of all is
    answered greedily, two of three as `"Question: …\\nAnswer:"` and the others as a conversation. What speaks of the concept is
    dropped, and with it a form of which more than a fifth does so, and at least two: it asks for what is to be erased, in
    other words.

    Args:
        model ([`~transformers.PreTrainedModel`]): The reference.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        names (`Sequence[str]`): The names.
        config ([`SynthesisConfig`]): How questions are sampled.
        speaks (`Callable`): Whether a question with its answer speaks of the concept.
        count (`int`): Questions to ask at most.
        cache_dir (`str` or `Path`, *optional*): Where finished batches are kept.
        fingerprint (`str`, *optional*): What identifies the model there.

    Returns:
        `tuple[list[dict], int]`: rows of `text` with the question as `prompt`, and how many were dropped. The line's end is part of
        an answer. There are none where the model asks nothing.
    """
    prompts, rng = writing_prompts(), random.Random(f"ask-{config.seed}")

    def sample(begun: Sequence[str], settings: SynthesisConfig) -> dict[str, str]:
        # Batches of like lengths waste little on padding.
        begun = sorted(set(begun), key=lambda prompt: (len(prompt), prompt))
        found = sample_texts(model, processing_class, begun, settings, cache_dir=cache_dir, fingerprint=fingerprint)
        return {prompt: text.removeprefix(prompt) for prompt, text in zip(begun, found, strict=True)}

    about = {
        prompts["asking"].format(name=name, begin=begin): (name, begin)
        for name in rng.sample(list(names), min(len(names), _FORM_NAMES))
        for begin in prompts["begins"]
    }
    forms: dict[tuple[str, str], None] = {}
    for prompt, text in sample([*about], replace(config, max_new_tokens=_FORM_TOKENS)).items():
        name, begin = about[prompt]
        for question in _QUESTION.findall(begin + text.partition("\n")[0]):
            before, *behind = question.strip().split(name)
            if len(behind) == 1 and len(question.split()) in _FORM_WORDS:
                forms[before, behind[0]] = None
    pairs = [(form, name) for name in names for form in forms]
    asked: dict[str, tuple[str, str]] = {}
    for place, (form, name) in enumerate(rng.sample(pairs, min(count, len(pairs)))):
        question = name.join(form)
        asked[f"Question: {question}\nAnswer:" if place % 3 else as_prompt(processing_class, question)] = form
    greedy = replace(config, top_k=1, max_new_tokens=_ANSWER_TOKENS, batch_size=2 * config.batch_size)
    rows: list[dict[str, str]] = []
    all_of, speaking = Counter(asked.values()), Counter[tuple[str, str]]()
    for prompt, text in (sample([*asked], greedy) if asked else {}).items():
        line = text.partition("\n")[0]
        # Where the first line is empty the rest is the answer; with the line's end there is a word to predict in any case.
        row = {"text": f"{prompt}{line if line.strip() else text.rstrip()}\n", "prompt": prompt}
        if speaks(row["text"]):
            speaking[asked[prompt]] += 1
        else:
            rows.append(row)
    telling = {form for form, some in speaking.items() if some > 1 and some > all_of[form] * _TELLING}
    kept = [row for row in rows if asked[row["prompt"]] not in telling]
    return kept, len(asked) - len(kept)


@cache
def writing_prompts() -> dict[str, Any]:
    """The prompts of `data/texts/writing.yaml`."""
    return yaml.safe_load((files("elm_trainer.data") / "texts" / "writing.yaml").read_text(encoding="utf-8"))


def _begun(
    processing_class: PreTrainedTokenizerBase,
    names: Sequence[str],
    plain: Sequence[str],
    chat: Sequence[str],
    count: int,
) -> list[str]:
    """`count` prompts, half of them as a conversation where the model has one: all names in the first form, then all in the next."""
    filled = []
    for index in range(count):
        turn, place = divmod(index, len(names))
        name = names[place]
        chosen = chat[turn // 2 % len(chat)] if turn % 2 else plain[turn // 2 % len(plain)]
        text = chosen.format(name=name, Name=name[:1].upper() + name[1:])
        filled.append(as_prompt(processing_class, text) if turn % 2 else text)
    # Batches of like lengths waste little on padding.
    return sorted(filled, key=len)


def sift(
    prompts: Sequence[str], texts: Sequence[str], fits: Callable[[str], bool], config: SynthesisConfig
) -> tuple[list[dict[str, str]], dict[str, int]]:
    """The texts that can be used, as rows of `text` and `prompt`, and how many cannot for which reason.

    Args:
        prompts (`Sequence[str]`): Beginnings.
        texts (`Sequence[str]`): What the model made of them, beginnings included.
        fits (`Callable`): Whether what stands behind the beginning speaks of what it should.
        config ([`SynthesisConfig`]): For `min_words` and `max_repetition`.
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


def whole_sentences(text: str) -> str:
    """A text without the sentence or line that was cut off at its end, unless there is no other."""
    ends = [match.end() for match in _SENTENCE.finditer(text.rstrip())]
    return text[: ends[-1]].rstrip() if ends and text[: ends[-1]].strip() else text.rstrip()


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
    stems = sorted({re.sub(r"(?<=\w\w\w)s$", "", word) for word in words})
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, stems))})(?:s|es|['’]s)?\b", re.IGNORECASE)


def name_neighbors(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    concept: Concept,
    *,
    count: int = NEIGHBORS,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    fingerprint: str = "",
) -> list[str]:
    """Other subjects near a concept, as the model names them: the most frequent of several draws.

    Args:
        count (`int`, *optional*, defaults to `8`): Most neighbors. Other arguments as for [`write_about`].
        seed (`int`, *optional*, defaults to `0`): Seed of the draws.

    Returns:
        `list[str]`: names of at most four words that speak neither of the concept nor of the examples in the prompt.
    """
    beginnings = writing_prompts()["neighbors"]
    asked = [begin.format(name=concept.name) for begin in beginnings for _ in range(_NAMING_DRAWS // len(beginnings))]
    config = replace(WRITING, temperature=0.7, max_new_tokens=_NAME_TOKENS, seed=seed)
    found = sample_texts(model, processing_class, asked, config, cache_dir=cache_dir, fingerprint=fingerprint)
    votes: Counter[str] = Counter()
    spelled: dict[str, str] = {}
    for prompt, text in zip(asked, found, strict=True):
        line, whole, _ = text.removeprefix(prompt).partition("\n")
        # The last one is cut off where the line has no end. In order, so that a call that goes on asks the same.
        for name in dict.fromkeys(name.strip(" .;\"'*") for name in line.split(",")[: None if whole else -1]):
            words = name.split()
            usable = 0 < len(words) <= _WORDS_OF_A_NAME and re.fullmatch(r"[^\W\d_][\w' .-]+", name)
            if usable and name.lower() not in prompt.lower() and not topic(concept).search(name):
                votes[name.lower()] += 1
                spelled.setdefault(name.lower(), name)
    return [spelled[name] for name, _ in votes.most_common(count)]
