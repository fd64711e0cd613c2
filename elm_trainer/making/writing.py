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
_NAMING_DRAWS, _NAME_TOKENS, _BESIDE_TOKENS = 12, 24, 12
NEIGHBORS, _WORDS_OF_A_NAME = 8, 4
FEWEST_TEXTS = 8
_SENTENCE = re.compile(r"[.!?][\"')]*(?=\s|$)|\n")


@dataclass(frozen=True)
class Written:
    """What a model wrote about a concept and its neighbors.

    Attributes:
        forget (`list[dict]`): Rows of `text` about the concept, each with the beginning that the model was given as `prompt`.
        near (`list[dict]`): The same about the neighbors.
        neighbors (`list[str]`): The neighbors, those that the model named most often first.
        dropped (`dict[str, dict[str, int]]`): How many texts of `"forget"` and of `"near"` were dropped for which reason.
    """

    forget: list[dict[str, str]]
    near: list[dict[str, str]]
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
    beside: Sequence[str] = (),
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
        beside (`Sequence[str]`, *optional*):
            What facts about the concept name, such as their subjects: of these short texts on other things are written, twice as many as
            `near_texts`, so that what the facts do not state stays.
        speaks (`Callable`, *optional*):
            Whether a text about neighbors speaks of the concept all the same; whether it has a word of [`topic`] by default.
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

    def write(
        asked: Sequence[str], fits: Callable[[str], bool], what: str, config: SynthesisConfig = config
    ) -> list[dict[str, str]]:
        found = sample_texts(model, processing_class, asked, config, cache_dir=cache_dir, fingerprint=fingerprint)
        rows, dropped[what] = sift(asked, found, fits, config)
        # Asked in order of length, they are read in any.
        random.Random(f"{what}-{config.seed}").shuffle(rows)
        return rows

    def unspoken(rows: list[dict[str, str]], what: str) -> list[dict[str, str]]:
        # What a text goes on with may state a fact about what its beginning names.
        left = [row for row in rows if not speaks(row["text"])]
        dropped[what]["topic"] = len(rows) - len(left)
        return left

    forget: list[dict[str, str]] = []
    near: list[dict[str, str]] = []
    neighbors: list[str] = []
    if texts:
        plain = [prompt for form, some in prompts["about"].items() if form != "chat" for prompt in some]
        asked = _asked(processing_class, [concept.name], plain, prompts["about"]["chat"], texts)
        forget = write(asked, lambda text: bool(words.search(text)), "forget")
        if len(forget) < fewest:
            raise ValueError(
                f"Of {texts} texts that the model wrote about {concept.name!r}, {len(forget)} are left ({dropped['forget']}), and "
                f"{fewest} are needed: describe the concept, '{concept.name}: keyword, keyword', or give documents or facts."
            )
    if near_texts:
        neighbors = name_neighbors(model, processing_class, concept, cache_dir=cache_dir, fingerprint=fingerprint)
    if neighbors:
        asked = _asked(processing_class, neighbors, prompts["near"], prompts["chat_near"], near_texts)
        near = unspoken(write(asked, lambda text: True, "near"), "near")
    if near_texts and beside:
        asked = _asked(processing_class, beside, prompts["beside"], prompts["chat_beside"], 2 * near_texts, mixed=True)
        short = replace(config, max_new_tokens=_BESIDE_TOKENS, min_words=1)
        some = unspoken(write(asked, lambda text: True, "beside", short), "beside")
        near = random.Random(f"near-{config.seed}").sample([*near, *some], len(near) + len(some))
    elif near_texts and not neighbors:
        logger.warning(f"The model names no neighbor of {concept.name!r}: give retain text about some yourself.")
    return Written(forget, near, neighbors, dropped)


@cache
def writing_prompts() -> dict[str, Any]:
    """The prompts of `data/texts/writing.yaml`."""
    return yaml.safe_load((files("elm_trainer.data") / "texts" / "writing.yaml").read_text(encoding="utf-8"))


def _asked(
    processing_class: PreTrainedTokenizerBase,
    names: Sequence[str],
    plain: Sequence[str],
    chat: Sequence[str],
    count: int,
    *,
    mixed: bool = False,
) -> list[str]:
    """`count` prompts, half of them as a conversation where the model has one.

    All names in the first form, then all in the next; with `mixed`, for many names, each in another form than the one before.
    """
    filled = []
    for index in range(count):
        name = names[index % len(names)]
        turn = index // len(names) + (index % len(names) if mixed else 0)
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
