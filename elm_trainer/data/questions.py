"""Multiple-choice questions, banks of your own in files, and whether a free answer names the right one."""

import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import yaml
from transformers.utils import logging

from ..files import first_damage, read_object


logger = logging.get_logger(__name__)
SPLITS = ("dev", "test")
CHANCE = 0.25
# The family that every bank has: a question, then its answer.
PLAIN = "question-answer"
# What a folder of questions holds: a file for each role, and what is to be said about them.
ROLE_FILES = {"erased": "concept.jsonl", "unseen": "unseen.jsonl", "near": "near.jsonl", "far": "far.jsonl"}
RECORD = "questions.json"
# One in so many subjects (or questions without a subject) belongs to the dev split.
_DEV_SHARE = 4

# `question`: stands in `"Question: …\\nAnswer:"`. `chat`: a turn in the tokenizer's chat template, which an option
# answers. `text`: the beginning of a text, which an option continues.
Form: TypeAlias = Literal["question", "chat", "text"]


@dataclass(frozen=True)
class Question:
    """A question with its options."""

    text: str  # the question, without the options
    options: tuple[str, ...]  # options, mostly four, in a fixed random order
    answer: str  # the right one, a member of `options`
    subject: str = ""  # what is asked about; empty where a question stands alone
    topic: str = ""  # kind of question within its bank
    aliases: tuple[str, ...] = ()  # other names of the answer, which a free answer may give
    form: Form = "question"  # `"question"`, `"chat"` or `"text"`: what stands around the text where a model reads it
    family: str = PLAIN  # way of asking within its bank
    # What the letters of the options might give away: what is asked about, as the question names it. The subject
    # where empty.
    cue: str = ""


def split_of(question: Question) -> str:
    """`"dev"` or `"test"`: where a question belongs, by its subject (or its text), whatever the bank or the seed."""
    return split_by(question.subject or question.text)


def split_by(subject: str) -> str:
    """The split of a subject, or of a text without one."""
    digest = hashlib.sha256(subject.encode()).digest()
    return "dev" if digest[0] % _DEV_SHARE == 0 else "test"


def check_questions(name: str, questions: Sequence[Question]) -> None:
    """Raise `ValueError` if a bank cannot measure anything.

    Refused are: no questions at all, an answer that is not among the options, fewer than two options, options that
    occur twice, and a question that names its own answer.
    """
    if not questions:
        raise ValueError(f"Question bank {name!r} holds no questions after filtering: widen the filter.")
    for question in questions:
        where = f"Question bank {name!r}, {question.text!r}"
        if question.answer not in question.options:
            raise ValueError(f"{where}: the answer {question.answer!r} is none of the options: add it.")
        if len(question.options) < 2:
            raise ValueError(f"{where}: there is only the option {question.options}: add distractors.")
        if len(set(question.options)) < len(question.options):
            raise ValueError(f"{where}: `options` holds duplicates, {question.options}: make them differ.")
        # Where a question names all of its options, such as True and False, it gives nothing away.
        named = [option for option in question.options if names_answer(question.text, option)]
        if question.answer in named and len(named) < len(question.options):
            raise ValueError(f"{where}: the question names its answer {question.answer!r}: reword it.")


def overlap_verdicts(questions: Sequence[Question]) -> list[bool]:
    """Which questions are answered by picking the option whose letters look most like the question's subject: letters give answers
    away unless their share is near chance (.25).
    """
    verdicts = []
    for question in questions:
        asked = question.cue or question.subject or question.text
        guess = max(question.options, key=lambda option: letters_alike(asked, option))
        verdicts.append(guess == question.answer)
    return verdicts


def letters_alike(asked: str, option: str) -> tuple[bool, float]:
    """How much an option looks like what is asked about."""
    asked, option = asked.lower(), option.lower()
    return asked.startswith(option[:1]), SequenceMatcher(None, asked, option).ratio()


def shuffled_question(text: str, answer: str, distractors: Sequence[str], seed: int = 0, **fields: Any) -> Question:
    """A question with its options in a random order, and these other fields."""
    options = [answer, *distractors]
    random.Random(f"{text}-{seed}").shuffle(options)
    return Question(text, tuple(options), answer, **fields)


def read_questions(path: str | Path, split: str | None = None) -> list[Question]:
    """Read a custom bank: YAML with a list `questions`, or JSON lines; of a folder of [`make_questions`] the concept's.

    Each record has `question`, `answer` and `distractors`, and may have `subject`, `topic`, `aliases`, `cue`, `form` (`"question"`,
    `"chat"` or `"text"`), `family` and `split`.

    Args:
        path (`str` or `Path`): The file or the folder.
        split (`str`, *optional*): `"dev"` or `"test"`: leave out the questions of the other one. Those without a split are in both.

    Raises:
        OSError: if the file cannot be read.
        ValueError: for malformed YAML or JSON, a record without an answer key, and whatever [`check_questions`]
            refuses.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"`split` is {split!r}: use one of {', '.join(SPLITS)}.")
    path = Path(path)
    if path.is_dir():
        path = made_folder(path) / ROLE_FILES["erased"]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise OSError(f"Question bank {path} cannot be read ({error}): check the path.") from error
    try:
        if path.suffix == ".jsonl":
            records: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            records = yaml.safe_load(text)
            records = records.get("questions") if isinstance(records, dict) else records
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"Question bank {path} cannot be parsed ({told}): correct it.") from error
    if not isinstance(records, list):
        raise ValueError(
            f"Question bank {path} holds no list `questions`: write one, or JSON lines into a .jsonl file."
        )
    every = [_read_question(record, f"Question bank {path}, question {n}") for n, record in enumerate(records, 1)]
    questions = [
        question
        for question, record in zip(every, records, strict=True)
        if split is None or record.get("split") in (None, "", split)
    ]
    check_questions(str(path), questions)
    return questions


def _read_question(record: Any, where: str) -> Question:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is {record!r}: give a mapping with `question`, `answer` and `distractors`.")
    if missing := {"question", "answer", "distractors"} - {key for key, value in record.items() if value}:
        raise ValueError(f"{where} lacks {sorted(missing)}: add them.")
    lists = {key: record.get(key) or [] for key in ("distractors", "aliases")}
    for key, value in lists.items():
        # YAML reads `No` and 1814 as other things than text, and a lone string would be split into letters.
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(
                f"{where}: `{key}` is {value!r}: give a list of texts, quoted where YAML reads them otherwise."
            )
    for key in ("question", "answer", "subject", "topic", "cue", "family", "form", "split"):
        if not isinstance(value := record.get(key) or "", str):
            raise ValueError(f"{where}: `{key}` is {value!r}, of type {type(value).__name__}: put it in quotes.")
    for key, allowed in (("form", get_args(Form)), ("split", SPLITS)):
        if record.get(key) and record[key] not in allowed:
            raise ValueError(f"{where}: `{key}` is {record[key]!r}: use one of {', '.join(allowed)}.")
    asked: dict[str, Any] = {key: record.get(key) or "" for key in ("subject", "topic", "cue")}
    asked |= {"form": record.get("form") or "question", "family": record.get("family") or PLAIN}
    return shuffled_question(
        record["question"], record["answer"], lists["distractors"], aliases=tuple(lists["aliases"]), **asked
    )


def question_record(question: Question, split: str) -> dict[str, Any]:
    """A question as [`read_questions`] reads it, in a split."""
    fields = {name: getattr(question, name) for name in ("subject", "topic", "form", "family", "cue")}
    distractors = [option for option in question.options if option != question.answer]
    asked = {"question": question.text, "answer": question.answer, "distractors": distractors}
    asked |= {"aliases": list(question.aliases)} if question.aliases else {}
    return asked | {name: value for name, value in fields.items() if value} | {"split": split}


def made_folder(path: str | Path) -> Path:
    """The folder of [`make_questions`] at a path: this one, its `questions`, or its `data/questions`, whichever holds a record."""
    for folder in (Path(path), Path(path) / "questions", Path(path) / "data" / "questions"):
        if (folder / RECORD).is_file():
            return folder
    raise ValueError(
        f"Question bank {path} is a folder without a {RECORD}: name a file, or a folder that `make_questions` wrote."
    )


def read_made(path: str | Path, split: str | None = None) -> tuple[dict[str, list[Question]], dict[str, Any]]:
    """The questions of a folder for [`made_folder`], by the roles that have some in the split (`"erased"`, `"unseen"`, `"near"`, `"far"`),
    and what stands in `questions.json`. Files that were edited are taken as they are.

    Raises:
        ValueError: if the folder has no record, or lacks one of its files; and what [`read_questions`] raises.
    """
    folder = made_folder(path)
    record = read_object(folder / RECORD)
    found: dict[str, list[Question]] = {}
    sums = record.get("files", {})
    for role, name in ROLE_FILES.items():
        if not (folder / name).is_file():
            if name in sums:
                raise ValueError(
                    f"Question bank {folder} lacks {name}, which was made: put it back, or have all made anew."
                )
            continue
        if name in sums and first_damage(folder, {name: sums[name]}):
            logger.warning(f"{folder}: {name} changed since it was made, and is taken as it is.")
        try:
            found[role] = read_questions(folder / name, split)
        except ValueError as error:
            # A role may have questions in one split alone.
            if split is None or role == "erased" or "holds no questions" not in str(error):
                raise
    return found, record


def names_answer(text: str, answer: str, aliases: Sequence[str] = ()) -> bool:
    """Whether `answer`, or one of its aliases, stands in `text` as whole words, whatever the accents.

    Case is ignored, save for answers of at most three letters: the symbol `He` is not the word *he*.
    """
    return any(pattern.search(fold(text)) for fold, pattern in map(_whole_words, (answer, *aliases)))


def without_accents(text: str) -> str:
    """The text in compatibility form, less accents."""
    if text.isascii():
        return text
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


# Many names are looked for in one text: each is compiled once, more than `re` itself would keep, and the text read once.
_plain = lru_cache(maxsize=16)(without_accents)


@lru_cache(maxsize=4096)
def _whole_words(name: str) -> tuple[Callable[[str], str], re.Pattern[str]]:
    fold = _folded if len(name) > 3 else _plain
    return fold, re.compile(rf"(?<!\w){re.escape(fold(name))}(?!\w)")


@lru_cache(maxsize=16)
def _folded(text: str) -> str:
    return _plain(text).casefold()


_WORD = r"[^\W\d_a-zà-öø-ÿ][\w'’.]*(?:-\w+)*"
_NAME = re.compile(rf"{_WORD}(?:(?: (?:of|the|de|da|do|del|du|es|al|el|la|le))* {_WORD}|, D\. ?C\.)*")
# Words that begin a sentence and name nothing, and words that say what kind of thing is named.
_OPENERS = frozenset(
    "a an and answer as at but called certainly currently from he hello here hi how however i i'm if in it it's its known "
    "located no of oh on one question she so some sorry sure thank thanks that the there these they this to today "
    "unfortunately we well what when where which while yes you your".split()
)
_KINDS = frozenset("capital capitals city cities country kingdom nation republic state symbol town the of".split())
_LINK = re.compile(r"(?:\b(?:is|was|are|be|named|called|becomes?)(?: (?:the city of|officially|now))*|:) ?$")


def given_answer(text: str, prompt: str) -> str:
    """What a free answer names in reply to a prompt, without accents and in lower case; empty for an empty answer.

    It is the first name that follows a verb such as *is* or a colon, else the first name of all: "the capital of Kenya
    is São Paulo" gives `"sao paulo"`. The prompt's own words, and words derived from them (*Kenyan*), do not count. An
    answer without a name is given by its first words, so that the same evasion counts as the same answer.
    """
    text = re.sub(r"[*_#`\"“”«»]", "", text).replace("’", "'").strip()
    asked = set(re.findall(r"\w+", _folded(prompt)))
    names, first = [], ""
    for sentence in re.split(r"(?<=\w\w\w[.!?])\s+|\s*[;|→\n]\s*| - ", text):
        for match in _NAME.finditer(sentence):
            words = match.group().strip(" .'").split()
            while words and ((match.start() == 0 and _folded(words[0]) in _OPENERS) or _folded(words[0]) in _KINDS):
                words.pop(0)
            if words and not all(_is_asked(word, asked) for word in words):
                name = _folded(" ".join(words)).removesuffix("'s").strip(" .,'")
                if _LINK.search(sentence[: match.start()]):
                    names.append(name)
                first = first or name
    return (names or [first or " ".join(_folded(text).split()[:4]).strip(" .,:;!?")])[0]


def _is_asked(word: str, asked: set[str]) -> bool:
    """Whether a word stands in the prompt, derives from one that does, or says only what kind of thing is meant."""
    word = _folded(word).removesuffix("'s").strip(".,'")
    stems = [known[: max(4, len(known) - 2)] for known in asked if len(known) >= 4]
    return not word or word in asked | _KINDS | {"of", "the"} or any(word.startswith(stem) for stem in stems)
