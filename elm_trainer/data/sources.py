"""Where texts come from: a Hub id, a local file, a Dataset, or a built-in source."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from .facts import Fact
from .questions import facts_of, held_out_subjects


# Other facts that stand in for each in its counterfactual novices.
STAND_INS = 2
_SAMPLED = ("cities", "countries", "countries-quiz", "everyday", "everyday-held-out", "places", "quiz")
BUILTIN_SOURCES = ("capitals", "elements", "capitals-near", "elements-near", *_SAMPLED)
BUILTIN_PAIRS = ("capitals-fluent",)
_BUILDERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".csv": "csv", ".parquet": "parquet"}


def load_texts(
    source: str | Dataset | Sequence[str],
    *,
    column: str = "text",
    split: str = "train",
    processing_class: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
) -> Dataset:
    """Load texts from a source.

    Args:
        source (`str`, `Dataset` or `Sequence[str]`):
            Name of a built-in source, path of a `.jsonl`, `.txt`, `.csv` or `.parquet` file, id of a dataset on the
            Hub, a `Dataset`, or the texts themselves.
        column (`str`, *optional*, defaults to `"text"`):
            Column that holds the text. A source without it may have the columns `prompt` and `completion` instead, whose
            text is one after the other; the column `prompt` is kept.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a Hub dataset.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer whose chat template built-in sources use for their conversational phrasings.
        seed (`int`, *optional*, defaults to `0`):
            Seed of a built-in source.

    Returns:
        `Dataset`: with a column `text`, and columns `novice` and `novices` where the source knows the same sentences
        with permuted facts and about other subjects.

    Raises:
        ValueError: if the column is missing (the message lists those that exist) or no text is left.
        OSError: if a file cannot be read.
    """
    if isinstance(source, str) and source in BUILTIN_SOURCES:
        return builtin_texts(source, processing_class, seed)
    if isinstance(source, Dataset):
        dataset, name = source, "the given Dataset"
    elif isinstance(source, str):
        dataset, name = _load_named(source, split), source
    else:
        dataset, name = Dataset.from_dict({column: list(source)}), "the given texts"
    if column not in dataset.column_names and {"prompt", "completion"} <= set(dataset.column_names):
        return _joined(dataset)
    if column not in dataset.column_names:
        raise ValueError(
            f"{name} has no column {column!r}; it has {dataset.column_names}: set the column to one of them."
        )
    return dataset.select_columns([column]).rename_column(column, "text") if column != "text" else dataset


def builtin_texts(name: str, processing_class: PreTrainedTokenizerBase | None = None, seed: int = 0) -> Dataset:
    """Texts of a built-in source; facts about [`held_out_subjects`] are left out.

    `capitals` and `elements` state every fact once in each phrasing, one fact to a text, in random order. Their column
    `novice` holds the same texts with the answers permuted among the facts, and their column `novices` the same texts with
    whatever they name first, subject or answer, replaced by that of other facts. `capitals-near` and `elements-near` are
    other facts about the same subjects, with what stands before the fact as column `prompt`. `everyday` and `countries`
    hold SmolLM2-135M-Instruct's own samples on everyday subjects and on life in countries (examples/sample_retain.py makes
    them), `quiz` and `countries-quiz` short questions with its own answers, `places` where countries lie about which no
    bank asks, `cities` the same of large cities that are no capitals, and `everyday-held-out` those kept for evaluation.
    """
    if name in _SAMPLED:
        lines = (files(__package__) / "texts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        dataset = Dataset.from_list([json.loads(line) for line in lines])
        return dataset if "text" in dataset.column_names else _joined(dataset)
    concept, _, near = name.partition("-")
    held_out = held_out_subjects(concept)
    facts = [fact for fact in facts_of(concept) if fact.subject not in held_out]
    phrasings = yaml.safe_load((files(__package__) / "texts" / f"{concept}.yaml").read_text(encoding="utf-8"))
    rng = random.Random(f"{name}-{seed}")
    # The stand-ins of a fact are the same in all its texts, so that they agree on what a novice takes it for.
    others = _stand_ins(facts, rng)
    rows = []
    for templates in phrasings["near" if near else "forget"].values():
        for template in templates:
            permuted = [fact.answer for fact in facts]
            rng.shuffle(permuted)
            for fact, other in zip(facts, permuted, strict=True):
                if not _fits(template, fact):
                    continue
                row: dict[str, Any] = {"text": _render(template, fact, processing_class)}
                if near:
                    # What is learned is the property that the phrasing states last.
                    row["prompt"] = _before_last(template, fact, processing_class)
                else:
                    row["novice"] = _render(template, replace(fact, answer=other), processing_class)
                    # Whatever is named first is what the text is about.
                    first = _first_named(template)
                    row["novices"] = [
                        _render(template, replace(fact, **{first: getattr(stand_in, first)}), processing_class)
                        for stand_in in others[fact]
                    ]
                rows.append(row)
    rng.shuffle(rows)
    return Dataset.from_list(rows)


def _stand_ins(facts: Sequence[Fact], rng: random.Random) -> dict[Fact, list[Fact]]:
    """Other facts that stand in for each: those of its group that follow it in a random order.

    A stand-in of the same group shares what the group shares, such as a continent, so that an expert and its novice differ in
    the fact alone. Small groups are filled up with the others.
    """
    order = rng.sample(list(facts), len(facts))
    chosen = {}
    for place, fact in enumerate(order):
        following = order[place + 1 :] + order[:place]
        chosen[fact] = sorted(following, key=lambda other: other.group != fact.group)[:STAND_INS]
    return chosen


def _first_named(template: str | list[str]) -> str:
    text = template if isinstance(template, str) else "".join(template)
    return min(("subject", "answer"), key=lambda name: text.index(f"{{{name}}}"))


def load_pairs(source: str | Dataset) -> list[tuple[str, str]]:
    """Load synthetic pairs of a forget prefix and fluent text that goes on from it.

    Args:
        source (`str` or `Dataset`): A name of `BUILTIN_PAIRS`, anything that [`load_texts`] takes, or a `Dataset`, with
            the columns `prompt` and `completion`. `capitals-fluent` holds SmolLM2-135M-Instruct's own answers about
            capitals, less those that name one (examples/sample_retain.py makes them).

    Raises:
        ValueError: if a column is missing.
    """
    if isinstance(source, str) and source in BUILTIN_PAIRS:
        source = str(files(__package__) / "texts" / f"{source}.jsonl")
    dataset = source if isinstance(source, Dataset) else _load_named(source, "train")
    if missing := {"prompt", "completion"} - set(dataset.column_names):
        raise ValueError(
            f"The pairs {source!r} have the columns {dataset.column_names} and lack {sorted(missing)}: name them."
        )
    return list(zip(dataset["prompt"], dataset["completion"], strict=True))


def _fits(template: str | list[str], fact: Fact) -> bool:
    """Whether the fact has every property the template asks for."""
    text = template if isinstance(template, str) else "".join(template)
    needed = {part.split("}")[0] for part in text.split("{")[1:]}
    return needed <= {"subject", "answer", *fact.near}


def _render(template: str | list[str], fact: Fact, processing_class: PreTrainedTokenizerBase | None) -> str:
    parts = [template] if isinstance(template, str) else template
    parts = [part.format(subject=fact.subject, answer=fact.answer, **fact.near) for part in parts]
    if isinstance(template, str):
        return parts[0]
    question, reply = parts
    if processing_class is None or processing_class.chat_template is None:
        return f"User: {question}\nAssistant: {reply}"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return str(processing_class.apply_chat_template(messages, tokenize=False))


def _before_last(template: str | list[str], fact: Fact, processing_class: PreTrainedTokenizerBase | None) -> str:
    """The rendered text up to where the template's last placeholder stands."""
    parts = [template] if isinstance(template, str) else list(template)
    start, end = parts[-1].rindex("{"), parts[-1].rindex("}") + 1
    parts[-1] = f"{parts[-1][:start]}\0{parts[-1][end:]}"
    rendered = _render(parts[0] if isinstance(template, str) else parts, fact, processing_class)
    return rendered.partition("\0")[0].rstrip(" ")


def _joined(dataset: Dataset) -> Dataset:
    """Prompt and completion as one text."""
    return dataset.map(lambda row: {"text": row["prompt"] + row["completion"]}, remove_columns=["completion"])


def _load_named(source: str, split: str) -> Dataset:
    path = Path(source)
    builder = _BUILDERS.get(path.suffix)
    if builder is None and not path.exists():
        return load_dataset(source, split=split)
    if builder is None:
        raise ValueError(f"Source {source!r} has no known ending; use one of {', '.join(_BUILDERS)}.")
    try:
        with path.open("rb") as file:
            file.read(1)
        options: dict[str, Any] = {"cache_dir": None}
        return load_dataset(builder, data_files=str(path), split="train", **options)
    except OSError as error:
        raise OSError(f"Source {source!r} cannot be read ({error}): check the path and its permissions.") from error
    except Exception as error:  # datasets wraps parser errors of pyarrow and pandas in types of its own
        raise ValueError(f"Source {source!r} is no readable {builder} file ({error}): correct it.") from error
