"""Turn the texts of an erasure dataset into the token ids that the collator bundles."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl import SFTConfig

from ..data.collator import align
from ..data.tokens import text_ids, tokenize_pair


logger = logging.get_logger(__name__)
SIDES = ("forget", "retain", "synthetic")
# Columns of a tokenized dataset, which the Trainer leaves to the collator.
COLUMNS = (
    "row", "concept", "forget_ids", "retain_ids", "retain_start", "novice_ids", "novices_ids", "aligned",
    "synthetic_ids", "completion_start",
)  # fmt: skip


def check_texts(dataset: Dataset, name: str) -> None:
    """Raise `ValueError` unless a dataset called `name` holds text in each row, and not empty texts alone."""
    plain = dataset.with_format(None)
    completions = plain["completion"][:]
    for column in ("concept", "forget", "retain", "prompt", "completion"):
        values = plain[column][:]
        for row, (value, completion) in enumerate(zip(values, completions, strict=True)):
            without_pair = value is None and not completion and column in ("prompt", "completion")
            if not isinstance(value, str) and not without_pair:
                raise ValueError(
                    f"`{name}`, row {row}: `{column}` is {str(value)[:60]}, of type {type(value).__name__}, where text is "
                    "needed: correct the row or leave it out."
                )
        if column in ("forget", "retain") and not any(map(str.strip, values)):
            raise ValueError(f"`{name}` has only empty texts in its column {column!r}: fill the {column} set.")


def tokenize_row(
    example: Mapping[str, Any], processing_class: PreTrainedTokenizerBase, limit: int | None
) -> dict[str, Any]:
    """Token ids of one row of an erasure dataset, each text cut to `limit` tokens.

    Args:
        example (`Mapping[str, Any]`): Row of [`build_erasure_dataset`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer.
        limit (`int`, *optional*): Tokens that are kept of a text.

    Returns:
        `dict[str, Any]`: `COLUMNS` but for `row`; `too_long`, which of `SIDES` were cut; and `usable`, whether each text
        still has a token to predict.
    """
    starts = {"forget": 0, "retain": 0, "synthetic": 0}
    texts: dict[str, list[int]] = {"forget": text_ids(processing_class, example["forget"]), "synthetic": []}
    if prompt := example.get("retain_prompt"):
        answer = example["retain"].removeprefix(prompt)
        texts["retain"], starts["retain"] = tokenize_pair(processing_class, prompt, answer)
    else:
        texts["retain"] = text_ids(processing_class, example["retain"])
    if example["completion"]:
        pair = tokenize_pair(processing_class, example["prompt"], example["completion"])
        texts["synthetic"], starts["synthetic"] = pair
    kept = {side: texts[side][:limit] for side in SIDES}
    left = {side: len(kept[side]) - max(starts[side], 1) for side in SIDES}
    novices = [text_ids(processing_class, text)[:limit] for text in example.get("novices") or []]
    return {f"{side}_ids": kept[side] for side in SIDES} | {
        "concept": example["concept"],
        "retain_start": starts["retain"],
        "completion_start": starts["synthetic"],
        "novice_ids": text_ids(processing_class, example.get("novice") or "")[:limit],
        "novices_ids": novices,
        "aligned": align(kept["forget"], novices),
        "too_long": [len(kept[side]) < len(texts[side]) for side in SIDES],
        "usable": min(left["forget"], left["retain"]) > 0 and (left["synthetic"] > 0 or not texts["synthetic"]),
    }


def tokenize_dataset(
    dataset: Dataset, processing_class: PreTrainedTokenizerBase, args: SFTConfig, limit: int | None, name: str
) -> Dataset:
    """The rows of an erasure dataset as token ids, numbered in the column `row`, without those that hold nothing to learn.

    Args:
        dataset (`Dataset`): Rows of [`build_erasure_dataset`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer.
        args (`SFTConfig`): Config, for `shuffle_dataset` and the like.
        limit (`int`, *optional*): Tokens that are kept of a text.
        name (`str`): What messages call the dataset.

    Raises:
        ValueError: if no row is left.
    """
    length = args.length_column_name if args.train_sampling_strategy == "group_by_length" else None

    def tokenize(example: Mapping[str, Any]) -> dict[str, Any]:
        tokens = tokenize_row(example, processing_class, limit)
        # What the sampler of transformers groups by.
        return tokens | ({length: sum(len(tokens[f"{side}_ids"]) for side in SIDES)} if length else {})

    # Names of the texts are kept apart from their tokens, which alone stay in the dataset.
    dataset = dataset.with_format(None).map(
        tokenize,
        remove_columns=dataset.column_names,
        num_proc=args.dataset_num_proc,
        desc=f"Tokenizing {name} dataset",
    )
    flags = dataset.select_columns(["too_long", "usable"])[:]
    usable = [row for row, fits in enumerate(flags["usable"]) if fits]
    dropped = len(dataset) - len(usable)
    truncated = {side: sum(cut) for side, cut in zip(SIDES, zip(*flags["too_long"], strict=True), strict=True)}
    if any(truncated.values()) or dropped:
        logger.warning(
            f"The {name} dataset: cut to `max_length={limit}` tokens: {truncated}; dropped {dropped} of {len(dataset)} rows "
            "that hold nothing to learn after that."
        )
    if not usable:
        raise ValueError(
            f"`max_length` is {limit}, at which every text of the {name} dataset truncates to nothing: raise it, or give "
            "texts of two tokens and more."
        )
    dataset = dataset.remove_columns(["too_long", "usable"]).select(usable)
    if args.shuffle_dataset:
        dataset = dataset.shuffle(seed=args.seed)
    return dataset.add_column("row", list(range(len(dataset))))


def rows_digest(dataset: Dataset, columns: Sequence[str]) -> str:
    """SHA-256 over columns of a tokenized dataset, in the order of its rows."""
    digest = hashlib.sha256(f"{len(dataset)} {sorted(columns)}".encode())
    for table in dataset.select_columns(sorted(columns)).with_format("arrow").iter(1000):
        for name in table.column_names:
            column = table[name].combine_chunks()
            if not pa.types.is_nested(column.type) or pa.types.is_nested(column.type.value_type):
                digest.update(json.dumps(column.to_pylist()).encode())
                continue
            # As 8 bytes each, whatever type the ids are kept in. The lengths tell where a row ends.
            for values in (column.value_lengths(), column.flatten()):
                digest.update(np.asarray(values, dtype="<i8").tobytes())
    return digest.hexdigest()
