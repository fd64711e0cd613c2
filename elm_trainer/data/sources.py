"""Where texts come from: a Hub id, a local file, a Dataset, or a built-in source."""

import json
import random
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from .facts import Fact
from .questions import facts_of, held_out_subjects


BUILTIN_SOURCES = ("capitals", "elements", "capitals-near", "elements-near", "everyday", "everyday-held-out")
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
            Column that holds the text.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a Hub dataset.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer whose chat template built-in sources use for their conversational phrasings.
        seed (`int`, *optional*, defaults to `0`):
            Seed of a built-in source.

    Returns:
        `Dataset`: with a column `text`, and a column `novice` where the source knows the same sentences with
        permuted facts.

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
    if column not in dataset.column_names:
        raise ValueError(
            f"{name} has no column {column!r}; it has {dataset.column_names}: set the column to one of them."
        )
    return dataset.select_columns([column]).rename_column(column, "text") if column != "text" else dataset


def builtin_texts(name: str, processing_class: PreTrainedTokenizerBase | None = None, seed: int = 0) -> Dataset:
    """Texts of a built-in source; facts about [`held_out_subjects`] are left out.

    `capitals` and `elements` state every fact once in each phrasing, a few facts of one form to a text, in random
    order. Their column `novice` holds the same texts with the answers permuted among the facts. `capitals-near` and
    `elements-near` are other facts about the same subjects. `everyday` holds SmolLM2-135M-Instruct's own samples on
    everyday subjects (examples/sample_everyday.py makes them), and `everyday-held-out` those kept for evaluation.
    """
    if name.startswith("everyday"):
        lines = (files(__package__) / "texts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return Dataset.from_list([json.loads(line) for line in lines])
    concept, _, near = name.partition("-")
    held_out = held_out_subjects(concept)
    facts = [fact for fact in facts_of(concept) if fact.subject not in held_out]
    phrasings = yaml.safe_load((files(__package__) / "texts" / f"{concept}.yaml").read_text(encoding="utf-8"))
    rng = random.Random(f"{name}-{seed}")
    rows = []
    for form, templates in phrasings["near" if near else "forget"].items():
        for template in templates:
            rng.shuffle(facts)
            permuted = [fact.answer for fact in facts]
            rng.shuffle(permuted)
            # A chat turn stands alone; sentences, dialogues and table rows come a few to a text.
            per_text = 1 if form == "chat" else 3
            pairs = list(zip(facts, permuted, strict=True))
            for start in range(0, len(pairs), per_text):
                group = [pair for pair in pairs[start : start + per_text] if _fits(template, pair[0])]
                if group:
                    rows.append(
                        {
                            "text": _render(template, [(fact, fact.answer) for fact, _ in group], processing_class),
                            "novice": _render(template, group, processing_class),
                        }
                    )
    rng.shuffle(rows)
    dataset = Dataset.from_list(rows)
    return dataset.remove_columns("novice") if near else dataset


def _fits(template: str | list[str], fact: Fact) -> bool:
    """Whether the fact has every property the template asks for."""
    text = template if isinstance(template, str) else "".join(template)
    needed = {part.split("}")[0] for part in text.split("{")[1:]}
    return needed <= {"subject", "answer", *fact.near}


def _render(
    template: str | list[str], pairs: list[tuple[Fact, str]], processing_class: PreTrainedTokenizerBase | None
) -> str:
    if isinstance(template, str):
        return "\n".join(template.format(subject=f.subject, answer=answer, **f.near) for f, answer in pairs)
    [(fact, answer)] = pairs
    question, reply = (part.format(subject=fact.subject, answer=answer, **fact.near) for part in template)
    if processing_class is None or processing_class.chat_template is None:
        return f"User: {question}\nAssistant: {reply}"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return str(processing_class.apply_chat_template(messages, tokenize=False))


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
