"""Anchor dictionaries of WHP (arXiv 2310.02238, §2.2): idiosyncratic terms, and the generic ones that stand for them."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import yaml
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..files import write_text
from ..synthesis import SynthesisConfig, sample_texts


logger = logging.get_logger(__name__)

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_SENTENCE_ENDS = ".!?:;|"
# Examples that show a model what a replacement is. They come from other books than a user is likely to erase.
_RETELLING = """A list of names from a book, and the plain invented names that stand for them in a retelling:
Camelot: Greenfield
Sherlock Holmes: Peter Miller
Quidditch: Skyball
Narnia: Westland
Moby Dick: Old Grey
{term}:"""


class Anchor(NamedTuple):
    """A term that was found in a text: its place there, the dictionary's term, and what stands for it in the text's case."""

    start: int
    end: int
    term: str
    replacement: str


class Translation(NamedTuple):
    """A text in which generic terms stand for the anchored ones, and what was replaced, in order."""

    text: str
    anchors: tuple[Anchor, ...]

    def places(self, ends: Sequence[int]) -> list[int | None]:
        """How many characters of the translation stand for the first `end` characters of the text, for ascending `ends`;
        `None` where the text is cut within an anchor.
        """
        places: list[int | None] = []
        shift, passed = 0, 0
        for end in ends:
            while passed < len(self.anchors) and self.anchors[passed].end <= end:
                anchor = self.anchors[passed]
                shift += len(anchor.replacement) - (anchor.end - anchor.start)
                passed += 1
            inside = passed < len(self.anchors) and self.anchors[passed].start < end
            places.append(None if inside else end + shift)
        return places


@dataclass(frozen=True)
class AnchorDictionary:
    """Generic terms by the idiosyncratic terms they stand for.

    A term is found as a whole word and as it is written, in capitals throughout, and, if it begins in lower case, with
    a first capital; its replacement follows. Between East Asian characters, which are written without spaces, a word
    may begin and end anywhere. Where candidates overlap the longest is taken, and the leftmost of equally long ones.

    Args:
        name (`str`): Name of the concept.
        terms (`Mapping[str, str]`): Replacements by term, such as `{"Hogwarts": "Mystic Academy"}`.

    Raises:
        ValueError: if there are no terms, a term or a replacement is no text or has space around it, or a replacement
            holds a term of the dictionary.
    """

    name: str
    terms: Mapping[str, str]

    def __post_init__(self):
        if not isinstance(self.terms, Mapping) or not self.terms:
            raise ValueError(
                f"The anchors of {self.name!r} are {self.terms!r}: give a mapping of terms to replacements."
            )
        for text in (text for pair in self.terms.items() for text in pair):
            if not isinstance(text, str) or not text or text != text.strip():
                raise ValueError(
                    f"The anchors of {self.name!r} hold {text!r}: a term and its replacement must be text without space "
                    "around it; quote words that YAML takes for something else, such as yes or 1984."
                )
        for term, replacement in self.terms.items():
            if found := self.find(replacement):
                raise ValueError(
                    f"The anchors of {self.name!r} replace {term!r} by {replacement!r}, which holds the term "
                    f"{found[0].term!r} itself: choose another replacement."
                )

    @cached_property
    def _forms(self) -> dict[str, tuple[str, str]]:
        """Term and replacement by the forms in which a term may stand in a text; the dictionary's own spelling goes first."""
        forms = {term: (term, replacement) for term, replacement in self.terms.items()}
        for term, replacement in self.terms.items():
            first, other = term[0].upper() + term[1:], replacement[0].upper() + replacement[1:]
            forms.setdefault(first, (term, other))
            forms.setdefault(term.upper(), (term, replacement.upper()))
        return forms

    def find(self, text: str) -> tuple[Anchor, ...]:
        """The terms in a text, longest first where they overlap, in order of place."""
        candidates = [
            Anchor(start, start + len(form), term, replacement)
            for form, (term, replacement) in self._forms.items()
            for start in _occurrences(form, text)
        ]
        found: list[Anchor] = []
        for anchor in sorted(candidates, key=lambda anchor: (anchor.start - anchor.end, anchor.start)):
            if all(anchor.end <= other.start or other.end <= anchor.start for other in found):
                found.append(anchor)
        return tuple(sorted(found))

    def translate(self, text: str) -> Translation:
        """Replace the terms in a text."""
        anchors = self.find(text)
        pieces, start = [], 0
        for anchor in anchors:
            pieces += [text[start : anchor.start], anchor.replacement]
            start = anchor.end
        return Translation("".join([*pieces, text[start:]]), anchors)

    def save(self, path: str | Path) -> None:
        """Write the dictionary to a YAML file, for a human to look over and for [`load_anchors`] to read."""
        record = {"name": self.name, "anchors": dict(self.terms)}
        write_text(path, yaml.safe_dump(record, allow_unicode=True, sort_keys=False))


def counterfactuals(texts: Sequence[str], dictionaries: Sequence[AnchorDictionary]) -> Dataset:
    """Forget texts of your own with their counterfactual novices: the concept's terms replaced by others of their kind.

    Args:
        texts (`Sequence[str]`): Texts about the concept.
        dictionaries (`Sequence[AnchorDictionary]`): A dictionary for each draw, such as several retellings by
            [`ask_replacements`]; the more differ, the less a single replacement is learnt in the concept's place.

    Returns:
        `Dataset`: columns `text` and `novices`, a source of [`ConceptSources`]. Texts in which a dictionary finds no term
        hold nothing to erase; they are dropped, counted and logged.

    Raises:
        ValueError: if there is no dictionary, or no text is left.
    """
    if not dictionaries:
        raise ValueError("`dictionaries` is empty: give at least one `AnchorDictionary`.")
    rows = []
    for text in texts:
        translations = [dictionary.translate(text) for dictionary in dictionaries]
        if all(translation.anchors for translation in translations):
            rows.append({"text": text, "novices": [translation.text for translation in translations]})
    if not rows:
        raise ValueError(
            f"None of the {len(texts)} texts holds a term of every dictionary "
            f"({', '.join(dictionary.name for dictionary in dictionaries)}): add terms, such as those of `find_terms`."
        )
    if len(rows) < len(texts):
        logger.warning(
            f"{len(texts) - len(rows)} of {len(texts)} texts hold no term of a dictionary and were dropped."
        )
    return Dataset.from_list(rows)


def anchor_presets() -> list[str]:
    """Names of the dictionaries that ship with the package."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in (files("elm_trainer.data") / "anchors").iterdir()
        if entry.name.endswith(".yaml")
    )


def load_anchors(name_or_path: str) -> AnchorDictionary:
    """Load a dictionary preset by name, or a dictionary from a YAML file.

    Args:
        name_or_path: A name of [`anchor_presets`], or the path of a YAML file with `name`, the name of the concept,
            and `anchors`, a mapping of terms to replacements.

    Raises:
        ValueError: for an unknown preset (the message lists them), malformed YAML, an unknown or a missing field, and
            for what [`AnchorDictionary`] refuses.
        OSError: if the file cannot be read.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise OSError(f"`anchors` is {name_or_path!r}, which cannot be read ({error}): check the path.") from error
    elif name_or_path in anchor_presets():
        text = (files("elm_trainer.data") / "anchors" / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"`anchors` is {name_or_path!r}, which is no preset; use one of {', '.join(anchor_presets())}, or the "
            "path of a .yaml file."
        )
    try:
        record = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"`anchors` file {name_or_path} is no valid YAML ({error}): correct it.") from error
    fields = ["name", "anchors"]
    if not isinstance(record, dict) or set(record) != set(fields):
        what = sorted(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"`anchors` file {name_or_path} holds {what}: give exactly the fields {fields}.")
    return AnchorDictionary(record["name"], record["anchors"])


def find_terms(
    texts: Sequence[str],
    *,
    unlike: Sequence[str] = (),
    language: str = "en",
    max_zipf: float = 3.5,
    min_count: int = 2,
    common_zipf: float = 5.0,
) -> list[str]:
    """Terms that make texts idiosyncratic: names (runs of words that are capitalized within sentences) and rare words.

    Frequencies are those of the package wordfreq, which holds them for 40 languages and downloads nothing.

    Args:
        unlike: Texts, such as the retain texts, whose words are not idiosyncratic.
        language: Language of the texts, as wordfreq names it.
        max_zipf: Zipf frequency below which a word is rare; 3 is once in a million words, 6 once in a thousand.
        min_count: Fewest occurrences of a term.
        common_zipf: Zipf frequency from which a single capitalized word is no name: 5 is that of the few hundred most
            frequent words, which headings capitalize.

    Returns:
        `list[str]`: the terms, the most frequent in the texts first.

    Raises:
        ImportError: if wordfreq is not installed.
    """
    try:
        from wordfreq import zipf_frequency
    except ImportError as error:
        raise ImportError(
            "Finding rare terms needs the package wordfreq: `pip install wordfreq`, or list the terms yourself."
        ) from error
    words = [list(_words(text)) for text in texts]
    lower = Counter(word for row in words for word, capital, _, _ in row if not capital)
    upper = Counter(word for row in words for word, capital, opens, _ in row if capital and not opens)
    # A name at the beginning of a sentence is told by its other occurrences.
    names = {word for word, count in upper.items() if len(word) > 1 and count > lower[word.lower()]}
    counts: Counter[str] = Counter()
    for row in words:
        for (is_name, _), group in groupby(_runs(row, names), key=lambda entry: entry[:2]):
            run = [word for _, _, word in group]
            if is_name and (len(run) > 1 or zipf_frequency(run[0], language) < common_zipf):
                counts[" ".join(run)] += 1
            elif not is_name:
                counts.update(word for word in run if word.islower() and zipf_frequency(word, language) < max_zipf)
    known = {word.lower() for text in unlike for word, *_ in _words(text)}
    return [
        term
        for term, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if count >= min_count and not known.issuperset(term.lower().split())
    ]


def ask_replacements(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    terms: Sequence[str],
    *,
    max_new_tokens: int = 8,
    batch_size: int = 16,
) -> dict[str, str]:
    """Ask the model itself for generic replacements, greedily: the same model and terms give the same answer.

    The paper asked GPT-4. The smaller the model, the fewer of its answers are usable.

    Args:
        model: The reference, without an adapter.
        terms: Idiosyncratic terms, such as those of [`find_terms`].

    Returns:
        `dict[str, str]`: replacements by term, as [`usable_replacements`] leaves them.

    Raises:
        ValueError: if there are no terms, or no answer is usable.
    """
    if not terms:
        raise ValueError("`terms` is empty: give at least one idiosyncratic term.")
    prompts = [_RETELLING.format(term=term) for term in terms]
    settings = SynthesisConfig(top_k=1, plausibility=0.0, max_new_tokens=max_new_tokens, batch_size=batch_size)
    texts = sample_texts(model, processing_class, prompts, settings)
    answers = [text[len(prompt) :] for prompt, text in zip(prompts, texts, strict=True)]
    replacements = usable_replacements(terms, answers)
    logger.info(f"The model gave a usable replacement for {len(replacements)} of {len(terms)} terms.")
    if not replacements:
        raise ValueError(
            f"The model gave no usable replacement for any of the {len(terms)} terms (for {terms[0]!r} it said "
            f"{answers[0]!r}): ask a larger model, or write the dictionary yourself."
        )
    return replacements


def usable_replacements(terms: Sequence[str], answers: Sequence[str]) -> dict[str, str]:
    """Replacements by term: the first line of each term's answer, unless it is empty, shares a word with any term, or stands
    for an earlier one.
    """
    idiosyncratic = {word.lower() for term in terms for word, *_ in _words(term)} - {"the", "of", "a", "and"}
    replacements: dict[str, str] = {}
    for term, answer in zip(terms, answers, strict=True):
        replacement = answer.strip().partition("\n")[0].strip(" \t\"'.,;:")
        words = {word.lower() for word, *_ in _words(replacement)}
        if words and not words & idiosyncratic and replacement not in replacements.values():
            replacements[term] = replacement
    return replacements


def _occurrences(form: str, text: str) -> Iterator[int]:
    start = text.find(form)
    while start >= 0:
        if _breaks(text, start) and _breaks(text, start + len(form)):
            yield start
        start = text.find(form, start + 1)


def _breaks(text: str, place: int) -> bool:
    """Whether a word may begin or end before the character at `place`."""
    if place in (0, len(text)):
        return True
    return not all(
        (character == "_" or unicodedata.category(character)[0] in "LMN")
        and unicodedata.east_asian_width(character) not in "FW"
        for character in text[place - 1 : place + 1]
    )


def _words(text: str) -> Iterator[tuple[str, bool, bool, bool]]:
    """The words of a text, each with whether it is capitalized, opens a sentence, and follows the last by one space."""
    last = -1
    for match in _WORD.finditer(text):
        word = match[0].removesuffix("'s").removesuffix("’s")
        before = text[max(0, match.start() - 4) : match.start()].rstrip(" \t\"'“”‘’«»()[]*_-–—")
        opens = match.start() == 0 or not before or before[-1] == "\n" or before[-1] in _SENTENCE_ENDS
        follows = match.start() == last + 1 and text[last : match.start()] == " "
        yield word, word[0].isupper(), opens, follows
        last = match.start() + len(word)


def _runs(words: Sequence[tuple[str, bool, bool, bool]], names: set[str]) -> Iterator[tuple[bool, int, str]]:
    """The words, each with whether it is part of a name and the number of its run."""
    run, last = 0, False
    for word, _, opens, follows in words:
        is_name = word in names
        if is_name != last or not follows or (opens and is_name):
            run += 1
        last = is_name
        yield is_name, run, word
