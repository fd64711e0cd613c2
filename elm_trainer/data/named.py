"""Texts behind a name: files, folders and data sets of the Hub."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pandas
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from .passages import passages


ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# What `save_to_disk` leaves in its folder.
_SAVED = ("state.json", "dataset_dict.json")


def is_file_name(text: str) -> bool:
    """Whether a text is no more than the name of a file that could be read."""
    return text.lower().endswith(ENDINGS) and len(text.split()) == 1


def is_hub_id(name: str) -> bool:
    """Whether a name is asked of the Hub: it has the form `org/name`, and nothing of that name is here."""
    return bool(_HUB_ID.fullmatch(name)) and not is_file_name(name) and not os.path.exists(name)


def read_named(
    name: str | Path, what: str, *, split: str, column: str, known: Sequence[str]
) -> Iterator[tuple[str, Dataset | DatasetDict]]:
    """The data sets behind a name, each with what to call it.

    Nothing is asked of the network unless a name has the form of a Hub id, `org/name`, and no file is there.

    Args:
        name (`str` or `Path`): A file, a folder of them, a glob pattern, a folder of `save_to_disk`, or a Hub id.
        what (`str`): What the source is for, to begin an error with.
        split (`str`): Split of a Hub data set.
        column (`str`): Column that the passages of a plain text get.
        known (`Sequence[str]`): Names that are known beside these, to guess what a mistyped one means.

    Raises:
        OSError: if there is nothing of that name, or it cannot be read.
        ValueError: for a file of another ending, or one that is not what its ending says.
    """
    place = os.path.expanduser(name)
    if os.path.isdir(place) and any(os.path.exists(os.path.join(place, saved)) for saved in _SAVED):
        yield f"{what}, {str(name)!r}", load_from_disk(place)
    elif os.path.isdir(place) or (glob.has_magic(place) and not os.path.exists(place)):
        if not (paths := _found(place)):
            raise FileNotFoundError(f"{what} is {str(name)!r}, where no file ends in {', '.join(ENDINGS)}: name one.")
        for path in paths:
            yield f"{what}, {str(path)!r}", _read_file(path, what, column)
    elif os.path.exists(place):
        yield f"{what}, {str(name)!r}", _read_file(Path(place), what, column)
    elif isinstance(name, str) and is_hub_id(name):
        yield f"{what}, {name!r}", _read_hub(name, what, split)
    else:
        raise FileNotFoundError(_is_none(str(name), what, known))


def _found(place: str) -> list[Path]:
    """The files of a folder or a pattern, in order of their names."""
    if os.path.isdir(place):
        # What a repository keeps for itself, or tells of itself, is no text of it.
        inside = [
            path
            for path in Path(place).rglob("*")
            if not any(part.startswith(".") for part in path.relative_to(place).parts)
            if path.stem not in ("README", "LICENSE")
        ]
    else:
        inside = [Path(path) for path in glob.glob(place, recursive=True)]
    return sorted(path for path in inside if path.suffix.lower() in ENDINGS and path.is_file())


def _read_file(path: Path, what: str, column: str) -> Dataset:
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"{what} is {str(path)!r}, which has no known ending: use one of {', '.join(ENDINGS)}.")
    try:
        with path.open("rb") as file:
            file.read(1)
        if ending in (".txt", ".md"):
            return Dataset.from_dict({column: passages(path.read_text(encoding="utf-8-sig"))})
        if ending in (".csv", ".tsv"):
            return _read_table(path, "," if ending == ".csv" else "\t")
        options: dict[str, Any] = {"cache_dir": None}
        builder = "parquet" if ending == ".parquet" else "json"
        return load_dataset(builder, data_files=glob.escape(str(path)), split="train", **options)
    except OSError as error:
        raise OSError(f"{what} is {str(path)!r}, which cannot be read ({error}): check the path.") from error
    except Exception as error:  # datasets wraps parser errors of pyarrow and pandas in types of its own
        told = " ".join(str(error.__cause__ or error).split())
        raise ValueError(
            f"{what} is {str(path)!r}, which is no readable {ending} file ({told}): correct it."
        ) from error


def _read_table(path: Path, separator: str) -> Dataset:
    # As text, and nothing taken for a missing value: a text may be "NA" or "1814".
    table = pandas.read_csv(path, sep=separator, dtype=str, na_filter=False, encoding="utf-8-sig")
    if not isinstance(table.index, pandas.RangeIndex):
        raise ValueError("its rows have more fields than its header: put quotes around a text that holds separators")
    return Dataset.from_pandas(table, preserve_index=False)


def _read_hub(name: str, what: str, split: str) -> Dataset:
    try:
        return load_dataset(name, split=split)
    except Exception as error:  # whatever the Hub, the network or the data set's own files make of it
        told = " ".join(str(error).split())
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{what} is {name!r}, for which there is no file here and which cannot be loaded from the Hub with the split "
            f"{split!r} ({told}): check name, split and network."
        ) from error


def _is_none(name: str, what: str, known: Sequence[str]) -> str:
    folder = Path(os.path.expanduser(name)).parent
    beside = [str(Path(name).parent / entry) for entry in os.listdir(folder)] if os.path.isdir(folder) else []
    if near := get_close_matches(name, [*known, *beside], n=1):
        fix = f"did you mean {near[0]!r}?"
    elif len(name.split()) > 1:
        fix = "a text itself goes into a list, ['…']."
    else:
        fix = f"built in are {', '.join(known)}."
    shown = name if len(name) <= 80 else name[:77] + "…"
    return f"{what} is {shown!r}: no built-in source, no file, and no Hub id, which has the form org/name; {fix}"
