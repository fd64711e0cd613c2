"""What a target store is named after: a hash of everything that the targets depend on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..concept import Concept
from .tokens import text_ids


_ROWS_AT_ONCE = 1000


def target_key(ingredients: Mapping[str, Any]) -> str:
    """SHA-256 of what the targets depend on.

    Args:
        ingredients (`Mapping[str, Any]`): Whatever JSON can hold, in any order.
    """
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def rows_digest(dataset: Dataset, columns: Sequence[str]) -> str:
    """SHA-256 over columns of token ids (lists), numbers or strings of a tokenised dataset, in the order of its rows.

    Args:
        dataset (`Dataset`): Tokenised rows.
        columns (`Sequence[str]`): Columns that are read, lists of lists among them.
    """
    digest = hashlib.sha256(f"{len(dataset)} {sorted(columns)}".encode())
    selected = dataset.select_columns(sorted(columns)).with_format("arrow")
    for table in selected.iter(_ROWS_AT_ONCE):
        for name in table.column_names:
            column = table[name].combine_chunks()
            if not pa.types.is_nested(column.type) or pa.types.is_nested(column.type.value_type):
                digest.update(json.dumps(column.to_pylist()).encode())
                continue
            # As 8 bytes each, whatever type the ids are kept in. The lengths tell where a row ends.
            lengths, ids = column.value_lengths(), column.flatten()
            for values in (lengths, ids):
                digest.update(np.asarray(values, dtype="<i8").tobytes())
    return digest.hexdigest()


def row_key(row: Mapping[str, Any], columns: Sequence[str]) -> int:
    """64 bits of the hash of what a tokenised row holds in some columns, lists of token ids or numbers.

    Args:
        row (`Mapping[str, Any]`): A row as a dataset gives it.
        columns (`Sequence[str]`): Columns that are read.
    """
    return int.from_bytes(hashlib.blake2b(repr([row[name] for name in columns]).encode(), digest_size=8).digest())


def contexts_digest(
    concepts: Mapping[str, Concept], processing_class: PreTrainedTokenizerBase, contexts_per_sample: int, seed: int
) -> str:
    """SHA-256 over the tokens of all contexts, and over what decides which of them a row draws.

    Args:
        concepts (`Mapping[str, Concept]`): Concepts by name.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer.
        contexts_per_sample (`int`): Contexts drawn for a text.
        seed (`int`): Seed of the draw.
    """
    tokens = {
        name: [
            [text_ids(processing_class, context + "\n") for context in contexts]
            for contexts in (concept.expert_contexts, concept.novice_contexts)
        ]
        for name, concept in concepts.items()
    }
    drawn = [tokens, contexts_per_sample, seed, processing_class.bos_token_id]
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()
