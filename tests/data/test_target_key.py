from dataclasses import replace

import pytest
from datasets import Dataset, Features, Sequence, Value, concatenate_datasets

from elm_trainer.concept import Concept
from elm_trainer.data.target_store import contexts_digest, rows_digest, target_key


COLUMNS = ["concept", "forget_ids", "retain_ids"]


def rows(**changed):
    data = {
        "concept": ["capitals", "bio", "capitals"],
        "forget_ids": [[1, 2, 3], [4], [5, 6]],
        "retain_ids": [[7, 8], [9, 10, 11], [12]],
        "synthetic_ids": [[1], [], []],
    }
    return Dataset.from_dict(data | changed)


def test_rows_are_known_by_their_values_alone():
    found = rows_digest(rows(), COLUMNS)
    assert rows_digest(rows(), COLUMNS[::-1]) == found
    assert rows_digest(rows(synthetic_ids=[[2], [3], [4]]), COLUMNS) == found
    parts = concatenate_datasets([rows().select([0]), rows().select([1, 2])])
    assert rows_digest(parts, COLUMNS) == found
    assert rows_digest(rows().select([2, 1, 0]).select([2, 1, 0]), COLUMNS) == found
    narrow = Features({"concept": Value("string")} | {name: Sequence(Value("int32")) for name in COLUMNS[1:]})
    assert rows_digest(rows().select_columns(COLUMNS).cast(narrow), COLUMNS) == found


@pytest.mark.parametrize(
    "other",
    [
        rows(forget_ids=[[1, 2], [3, 4], [5, 6]]),  # the same tokens, cut elsewhere
        rows(forget_ids=[[1, 2, 3], [4], [5, 7]]),
        rows(retain_ids=[[1, 2, 3], [4], [5, 6]]),
        rows(concept=["capitals", "capitals", "bio"]),
        rows().select([1, 0, 2]),
        rows().select([0, 1]),
    ],
)
def test_other_rows_are_told_apart(other):
    assert rows_digest(other, COLUMNS) != rows_digest(rows(), COLUMNS)


def test_which_columns_count_is_part_of_it():
    assert rows_digest(rows(), ["forget_ids"]) != rows_digest(rows(), ["retain_ids"])


def test_many_rows_are_read_whole():
    many = Dataset.from_dict({"forget_ids": [[row] for row in range(2500)]})
    changed = Dataset.from_dict({"forget_ids": [[row] for row in range(2499)] + [[0]]})
    assert rows_digest(many, ["forget_ids"]) != rows_digest(changed, ["forget_ids"])


TEMPLATES = (("An expert on {keywords}:",), ("A novice on {keywords}:",))
CONCEPT = Concept("capitals", ("capital cities",), *TEMPLATES)


def test_contexts_are_known_by_their_tokens_and_by_what_draws_them(tokenizer):
    found = contexts_digest({"capitals": CONCEPT}, tokenizer, 1, 0)
    assert contexts_digest({"capitals": replace(CONCEPT)}, tokenizer, 1, 0) == found
    others = [
        contexts_digest({"bio": CONCEPT}, tokenizer, 1, 0),
        contexts_digest({"capitals": Concept("capitals", ("towns",), *TEMPLATES)}, tokenizer, 1, 0),
        contexts_digest({"capitals": replace(CONCEPT, novice_contexts=("Nobody says:",))}, tokenizer, 1, 0),
        contexts_digest({"capitals": CONCEPT}, tokenizer, 2, 0),
        contexts_digest({"capitals": CONCEPT}, tokenizer, 1, 1),
    ]
    assert len({found, *others}) == 6


def test_a_key_depends_on_every_value_and_not_on_their_order():
    parts = {"settings": {"eta": 1.0, "top_k": 50}, "versions": {"torch": "2"}}
    found = target_key(parts)
    assert target_key({name: parts[name] for name in reversed(parts)}) == found
    assert target_key(parts | {"settings": {"eta": 2.0, "top_k": 50}}) != found
    assert target_key(parts | {"versions": {"torch": "3"}}) != found
    assert len(found) == 64
