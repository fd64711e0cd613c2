"""Texts that a user passes: files and documents, folders, Hub datasets, lists, conversations, prompts with completions; passages."""

import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import pandas
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from transformers import PreTrainedTokenizerBase

from .tokens import Messages, conversation


Source: TypeAlias = str | Path | Dataset | Sequence[str] | Sequence[Mapping[str, Any]]
_PLAIN_ENDINGS = (".txt", ".md")
_DOCUMENT_ENDINGS = (".html", ".htm", ".pdf", ".docx")
# What stands on a page beside its text.
_NO_TEXT = ("script", "style", "noscript", "template", "head", "nav", "footer", "form", "svg", "button")
_BLOCKS = (
    "address", "article", "aside", "blockquote", "dd", "div", "dl", "dt", "figcaption", "figure", "h1", "h2", "h3", "h4", "h5",
    "h6", "header", "hr", "main", "ol", "p", "pre", "section", "table", "ul",
)  # fmt: skip
# A line that is shorter was not wrapped.
_WRAPPED = 40
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", *_PLAIN_ENDINGS, *_DOCUMENT_ENDINGS)
# A passage that is longer would be cut to `max_length` in training, and its end never be read.
_LONGEST = 1000
_SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’»)]*\s")
_HUB_NAME = re.compile(
    r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[\w.-]+))?(,split=(?P<split>[^,]+))?(,column=(?P<column>\w+))?"
)


def document_text(path: Path) -> str:
    """The text of a plain file or a document, paragraphs apart by a blank line; what the libraries raise for a damaged one is passed on.

    Of a web page, navigation, forms and scripts are left out; rows of tables become lines with ` | ` between the cells; of a PDF,
    lines are joined where they were wrapped. What a PDF holds as a picture has no text.
    """
    ending = path.suffix.lower()
    if ending in _PLAIN_ENDINGS:
        return path.read_text(encoding="utf-8-sig")
    read: Callable[[Path], str] = {".pdf": _pdf, ".docx": _docx}.get(ending, _html)
    try:
        text = read(path)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{str(path)!r} needs the package {error.name}, which is not installed: pip install 'elm-trainer[documents]', "
            "or save the document as .txt."
        ) from error
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", re.sub(r"[ \t\xa0]*\n[ \t\xa0]*", "\n", text)).strip()


def _pdf(path: Path) -> str:
    from pypdf import PdfReader

    return "\n\n".join(unwrapped(page.extract_text()) for page in PdfReader(path).pages)


def _docx(path: Path) -> str:
    from docx import Document
    from docx.table import Table

    def lines(table: Any) -> str:
        return "\n".join(" | ".join(cell.text.strip() for cell in row.cells) for row in table.rows)

    parts = Document(str(path)).iter_inner_content()
    return "\n\n".join(lines(part) if isinstance(part, Table) else part.text for part in parts)


def _html(path: Path) -> str:
    from lxml import html

    content = path.read_bytes()
    try:
        content.decode("utf-8")
        encoding = "utf-8"
    except UnicodeDecodeError:
        encoding = None  # the one that the page names
    tree = html.document_fromstring(content, parser=html.HTMLParser(encoding=encoding, remove_comments=True))
    for node in [node for node in tree.iter(*_NO_TEXT) if node.getparent() is not None]:
        node.drop_tree()
    for node in tree.iter():
        inside_pre = node.tag == "pre" or next(node.iterancestors("pre"), None) is not None
        node.text = node.text if inside_pre else _one_line(node.text)
        node.tail = node.tail if inside_pre and node.tag != "pre" else _one_line(node.tail)
        if node.tag in _BLOCKS:
            node.text, node.tail = f"\n\n{node.text or ''}", f"\n\n{node.tail or ''}"
        elif node.tag in ("br", "li", "tr"):
            node.tail = f"\n{node.tail or ''}"
        elif node.tag in ("td", "th") and node.getnext() is not None:
            node.tail = " | "
    return str(tree.text_content())


def _one_line(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "")


def unwrapped(text: str) -> str:
    """A text whose lines are joined where they were wrapped: a long line that the next continues, or half a word."""
    lines: list[str] = []
    for line in (line.strip() for line in text.split("\n")):
        before = lines[-1] if lines else ""
        if line[:1].islower() and re.search(r"\w-$", before):
            lines[-1] = before[:-1] + line
        elif line and len(before) > _WRAPPED and not re.search(r"[.!?:;|]$", before):
            lines[-1] = f"{before} {line}"
        else:
            lines.append(line)
    return "\n".join(lines)


def passages(text: str) -> list[str]:
    """Cut a plain text into passages, losing nothing but the white space between them.

    A blank line ends a passage. In a text without any each line is one, unless most continue in lower case where a long line ended: then
    it is one text that was wrapped. What is longer than 1000 characters is cut behind a line, a sentence or a word.
    """
    blocks = re.split(r"\n\s*\n", text.strip())
    lines = text.strip().split("\n")
    continued = sum(len(before) > _WRAPPED and line[:1].islower() for before, line in pairwise(lines))
    if len(blocks) == 1 and 2 * continued < len(lines):
        blocks = lines
    return [passage for block in blocks for passage in _cut(block.strip()) if passage]


def _cut(block: str) -> Iterator[str]:
    start = 0
    while len(block) - start > _LONGEST:
        head = block[start : start + _LONGEST + 1]
        ends = (head.rfind("\n"), max((match.end() for match in _SENTENCE_END.finditer(head)), default=0))
        end = start + (max(ends) if max(ends) > 0 else max(head.rfind(" "), 0) or _LONGEST)
        yield block[start:end].strip()
        start = end
    yield block[start:].strip()


def check_type(source: Any, what: str) -> None:
    """Raise `TypeError` for what is not a source, saying what to give in its place."""
    if isinstance(source, (Path, Dataset, Sequence)) and not isinstance(source, bytes):
        return
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
        fix = "give a path, a built-in name, a Hub id, a list of texts or a `datasets.Dataset`"
    raise TypeError(f"{what} is of type {type(source).__name__}, not a source of texts: {fix}.")


def text_rows(
    source: Dataset | Sequence[Any], what: str, column: str, processing_class: PreTrainedTokenizerBase | None = None
) -> list[dict[str, Any]]:
    """The texts of a source in memory, as rows of `text`, of `prompt` where a text continues it, and of `novice` and `novices`.

    The source holds texts, or rows with the column `column`, else with `messages`, else with `prompt` and `completion`; each of these is
    text or a list of messages, which [`conversation`] makes text.
    """
    rows, names = rows_of(source, column)
    if column not in names and "messages" in names:
        column = "messages"
    pairs = column not in names and {"prompt", "completion"} <= set(names)
    if column not in names and not pairs:
        raise ValueError(f"{what} has no column {column!r}; it has {names}: set `column` to one of them.")
    found = []
    for number, row in enumerate(rows):
        place = f"{what}, row {number}"
        if pairs:
            prompt, completion = joined(row, place, processing_class)
            found.append({"text": prompt + completion, "prompt": prompt})
            continue
        value: Any = row.get(column)
        told = _is_conversation(value)
        text = _rendered(value, place, processing_class) if told else as_text(value, place, column)
        entry: dict[str, Any] = {"text": text}
        # These belong to the column `text`, as the built-in sources and `counterfactuals` write it.
        beside = row if column == "text" else {}
        # A text that does not begin with its `prompt` is learned whole.
        if isinstance(beside.get("prompt"), str) and text.startswith(beside["prompt"]):
            entry["prompt"] = beside["prompt"]
        if beside.get("novice"):
            entry["novice"] = as_text(beside["novice"], place, "novice")
        if beside.get("novices"):
            entry["novices"] = [as_text(novice, place, "novices") for novice in beside["novices"]]
        found.append(entry)
    return found


def rows_of(source: Dataset | Sequence[Any], column: str) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The rows of a source in memory, and the names of their columns; what is not a row becomes one of `column` alone."""
    if isinstance(source, Dataset):
        return source.with_format(None).to_list(), source.column_names
    rows = [row if isinstance(row, Mapping) else {column: row} for row in source]
    return rows, list(rows[0]) if rows else [column]


def joined(row: Mapping[str, Any], place: str, processing_class: PreTrainedTokenizerBase | None) -> tuple[str, str]:
    """Prompt and completion of a row as texts, to be joined; both may be messages, as TRL takes them."""
    prompt: Any = row.get("prompt")
    completion: Any = row.get("completion")
    if not (_is_conversation(prompt) and _is_conversation(completion)):
        return as_text(prompt, place, "prompt"), as_text(completion, place, "completion")
    begun = _rendered(prompt, place, processing_class, begin_answer=True)
    whole = _rendered([*prompt, *completion], place, processing_class)
    begun = begun if whole.startswith(begun) else ""
    return begun, whole.removeprefix(begun)


def as_text(value: Any, place: str, column: str) -> str:
    """A value of a row that is text."""
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
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        return False
    return all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value)


def _rendered(
    messages: Messages, place: str, processing_class: PreTrainedTokenizerBase | None, begin_answer: bool = False
) -> str:
    for message in messages:
        as_text(message["content"], place, "content")
    try:
        return conversation(processing_class, messages, begin_answer)
    except Exception as error:  # a template may refuse whatever its authors thought of
        raise ValueError(f"{place}: the chat template refuses these messages ({error}): correct them.") from error


def is_file_name(text: str) -> bool:
    """Whether a text is just the name of a file that could be read."""
    return text.lower().endswith(ENDINGS) and len(text.split()) == 1


def is_hub_id(name: str) -> bool:
    """Whether a name is asked of the Hub: it has the form `org/name:config,split=…,column=…`, the rest optional, and is no file here."""
    return bool(_HUB_NAME.fullmatch(name)) and not is_file_name(name) and not os.path.exists(name)


def hub_id(name: str) -> str:
    """The data set's id, `org/name`, in the name of a source on the Hub."""
    found = _HUB_NAME.fullmatch(name)
    return found["id"] if found else name


def is_saved(folder: str | Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return any(os.path.exists(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def load_hub(place: str, config: str | None, split: str, problem: str) -> Dataset:
    """A data set of the Hub. `problem` says what an error is about, with `{told}` for what the Hub, the network or the data set's own
    files made of it; of what cannot be fetched it is an `OSError`, else a `ValueError`.
    """
    try:
        return load_dataset(place, config, split=split)
    except Exception as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(problem.replace("{told}", " ".join(str(error).split()))) from error


def read_named(
    name: str | Path,
    what: str,
    *,
    split: str,
    column: str,
    known: Sequence[str],
    cut: Callable[[str], list[str]] = passages,
) -> Iterator[tuple[str, Dataset | DatasetDict]]:
    """The data sets behind a name, each with what to call it.

    Nothing is asked of the network unless a name has the form of a Hub id, `org/name`, and no file is there.

    Args:
        name (`str` or `Path`): A file, a folder of them, a glob pattern, a folder of `save_to_disk`, or a Hub id, which may
            say more: `org/name:config,split=train[:100],column=body`.
        what (`str`): What the source is for, to begin an error with.
        split (`str`): Split of a Hub data set whose name says none.
        column (`str`): Column that the passages of a plain text get, and the column that a Hub id names.
        known (`Sequence[str]`): Names that are known beside these, to guess what a mistyped one means.
        cut (`Callable`, *optional*, defaults to [`passages`]): Cuts the text of a document.
    """
    place = os.path.expanduser(name)
    if is_saved(place):
        yield f"{what}, {str(name)!r}", load_from_disk(place)
    elif isinstance(name, str) and is_hub_id(name):  # before a pattern, for a split may have brackets
        yield f"{what}, {name!r}", _read_hub(name, what, split, column)
    elif os.path.isdir(place) or (glob.has_magic(place) and not os.path.exists(place)):
        if not (paths := _found(place)):
            raise FileNotFoundError(f"{what} is {str(name)!r}, where no file ends in {', '.join(ENDINGS)}: name one.")
        for path in paths:
            yield f"{what}, {str(path)!r}", _read_file(path, what, column, cut)
    elif os.path.exists(place):
        yield f"{what}, {str(name)!r}", _read_file(Path(place), what, column, cut)
    else:
        raise FileNotFoundError(_is_none(str(name), what, known))


def _found(place: str) -> list[Path]:
    """The files of a folder or a pattern, in order of their names."""
    if os.path.isdir(place):
        # Without what a repository keeps for itself, or says about itself.
        inside = [
            path
            for path in Path(place).rglob("*")
            if not any(part.startswith(".") for part in path.relative_to(place).parts)
            and path.stem not in ("README", "LICENSE")
        ]
    else:
        inside = [Path(path) for path in glob.glob(place, recursive=True)]
    return sorted(path for path in inside if path.suffix.lower() in ENDINGS and path.is_file())


def _read_file(path: Path, what: str, column: str, cut: Callable[[str], list[str]]) -> Dataset:
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"{what} is {str(path)!r}, which has no known ending: use one of {', '.join(ENDINGS)}.")
    try:
        with path.open("rb") as file:
            file.read(1)
        if ending in (*_PLAIN_ENDINGS, *_DOCUMENT_ENDINGS):
            return Dataset.from_dict({column: cut(document_text(path))})
        if ending in (".csv", ".tsv"):
            return _read_table(path, "," if ending == ".csv" else "\t")
        builder = "parquet" if ending == ".parquet" else "json"
        return load_dataset(builder, data_files=glob.escape(str(path)), split="train")
    except ImportError as error:
        raise ImportError(f"{what} is {error}") from error
    except OSError as error:
        raise OSError(f"{what} is {str(path)!r}, which cannot be read ({error}): check the path.") from error
    except Exception as error:  # datasets wraps parser errors of pyarrow and pandas in its own types
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


def _read_hub(name: str, what: str, split: str, column: str) -> Dataset:
    parts = _HUB_NAME.fullmatch(name)
    assert parts is not None
    split = parts["split"] or split
    found = load_hub(
        parts["id"], parts["config"], split,
        f"{what} is {name!r}, for which there is no file here and which cannot be loaded from the Hub with the split {split!r} "
        "({told}): check name, split and network. A config, split or column is named behind the id, "
        "'org/name:config,split=train,column=text'.",
    )  # fmt: skip
    if (given := parts["column"]) is None:
        return found
    if given not in found.column_names:
        raise ValueError(f"{what} is {name!r}, which has the columns {found.column_names}: name one of them.")
    return found.select_columns([given]).rename_columns({given: column})


def _is_none(name: str, what: str, known: Sequence[str]) -> str:
    """What to say of a name that nothing has, with what may be meant."""
    folder = Path(os.path.expanduser(name)).parent
    beside = [str(Path(name).parent / entry) for entry in os.listdir(folder)] if os.path.isdir(folder) else []
    if near := get_close_matches(name, [*known, *beside], n=1):
        fix = f"did you mean {near[0]!r}?"
    elif len(name.split()) > 1:
        fix = "a text itself goes into a list, ['…']."
    else:
        fix = f"built in are {', '.join(known)}."
    return f"{what} is {shown(name)}: no built-in source, no file, and no Hub id, which has the form org/name; {fix}"
