"""Question banks of your own: a file, or the folder that [`make_questions`] writes."""

import json
from pathlib import Path
from typing import Any, get_args

import yaml
from transformers.utils import logging

from ..files import first_damage, read_object
from .questions import PLAIN, SPLITS, Form, Question, check_questions, shuffled_question


logger = logging.get_logger(__name__)
# What a folder of questions holds: a file for each role, and what is to be said about them.
ROLE_FILES = {"erased": "concept.jsonl", "unseen": "unseen.jsonl", "near": "near.jsonl", "far": "far.jsonl"}
RECORD = "questions.json"


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
