"""What may be given as texts: types by name, and rows that are text."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pandas
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict


Messages: TypeAlias = Sequence[Mapping[str, Any]]
Source: TypeAlias = str | Path | Dataset | Sequence[str] | Sequence[Mapping[str, Any]]
_ACCEPTED = "give a path, a built-in name, a Hub id, a list of texts or a `datasets.Dataset`"


def check_type(source: Any, what: str) -> None:
    """Raise `TypeError` for what is no source, saying what to give in its place."""
    if isinstance(source, (str, Path, Dataset)) or (isinstance(source, Sequence) and not isinstance(source, bytes)):
        return
    kind = type(source).__name__
    if isinstance(source, (DatasetDict, IterableDatasetDict)):
        first = next(iter(source), "train")
        fix = f"it has the splits {list(source)}: give one, such as `source[{first!r}]`"
    elif isinstance(source, IterableDataset):
        fix = "give `Dataset.from_list(list(source))`, or load it without `streaming=True`"
    elif isinstance(source, pandas.DataFrame):
        fix = "give `Dataset.from_pandas(source)`"
    elif isinstance(source, Mapping):
        fix = "give `Dataset.from_dict(source)`"
    elif hasattr(source, "__iter__"):
        fix = "give `list(source)`"
    else:
        fix = _ACCEPTED
    raise TypeError(f"{what} is of type {kind}, which is no source of texts: {fix}.")


def text_rows(
    source: Dataset | Sequence[Any], what: str, column: str, render: Callable[[Messages, bool], str]
) -> list[dict[str, Any]]:
    """The texts of a source that is at hand, as rows of `text` and of what belongs to it.

    Args:
        source (`Dataset` or `Sequence`): Texts, or rows with the column `column`, else with `messages`, else with `prompt`
            and `completion`. Each of these is text or a list of messages.
        what (`str`): What the texts are for, to begin an error with.
        column (`str`): Column of the texts.
        render (`Callable`): Gives messages as text, with the beginning of an answer where its second argument is `True`.

    Returns:
        `list[dict]`: each with `text`; `prompt` where a text goes on from it, and `novice` and `novices` where there are
        such columns.

    Raises:
        ValueError: if there is no such column, or a row is no text (the message names the row, counted from 0).
    """
    rows, names = rows_of(source, column)
    pairs = column not in names and "messages" not in names and {"prompt", "completion"} <= set(names)
    if column not in names and not pairs:
        if "messages" not in names:
            raise ValueError(f"{what} has no column {column!r}; it has {names}: set `column` to one of them.")
        column = "messages"
    found = []
    for number, row in enumerate(rows):
        place = f"{what}, row {number}"
        if pairs:
            prompt, completion = joined(row, place, render)
            found.append({"text": prompt + completion, "prompt": prompt})
            continue
        entry: dict[str, Any] = {"text": as_text(row.get(column), place, column, render)}
        # These belong to the column `text`, as the built-in sources and `counterfactuals` write it.
        beside = row if column == "text" else {}
        # A text that does not go on from a column of that name is learned whole.
        if isinstance(beside.get("prompt"), str) and entry["text"].startswith(beside["prompt"]):
            entry["prompt"] = beside["prompt"]
        if beside.get("novice"):
            entry["novice"] = as_text(beside["novice"], place, "novice")
        if beside.get("novices"):
            entry["novices"] = [as_text(novice, place, "novices") for novice in beside["novices"]]
        found.append(entry)
    return found


def rows_of(source: Dataset | Sequence[Any], column: str) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The rows of a source that is at hand, and the names of their columns; what is no row is one of `column` alone."""
    if isinstance(source, Dataset):
        return source.with_format(None).to_list(), source.column_names
    rows = [row if isinstance(row, Mapping) else {column: row} for row in source]
    return rows, list(rows[0]) if rows else [column]


def joined(row: Mapping[str, Any], place: str, render: Callable[[Messages, bool], str]) -> tuple[str, str]:
    """Prompt and completion of a row as text, one going on from the other; both may be messages, as TRL takes them."""
    prompt: Any = row.get("prompt")
    completion: Any = row.get("completion")
    if not (_is_conversation(prompt) and _is_conversation(completion)):
        return as_text(prompt, place, "prompt"), as_text(completion, place, "completion")
    begun = _rendered(prompt, place, render, True)
    whole = _rendered([*prompt, *completion], place, render, False)
    begun = begun if whole.startswith(begun) else ""
    return begun, whole.removeprefix(begun)


def as_text(value: Any, place: str, column: str, render: Callable[[Messages, bool], str] | None = None) -> str:
    """A value of a row that is text, or a conversation where it may be rendered."""
    if render is not None and _is_conversation(value):
        return _rendered(value, place, render, False)
    if not isinstance(value, str):
        raise ValueError(
            f"{place}: `{column}` is {shown(value)}, of type {type(value).__name__}, where text is needed: correct the row "
            "or leave it out."
        )
    return value


def shown(value: Any) -> str:
    """A value in an error, in one line however long it is."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, each with `role` and `content`."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value)
    )


def _rendered(messages: Messages, place: str, render: Callable[[Messages, bool], str], begin: bool) -> str:
    for message in messages:
        as_text(message["content"], place, "content")
    try:
        return render(messages, begin)
    except Exception as error:  # a template may refuse whatever its authors thought of
        raise ValueError(f"{place}: the chat template refuses these messages ({error}): correct them.") from error
