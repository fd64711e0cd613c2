"""Datasets of one's own, or changed after they were made: taken as they are meant, or refused by row and column."""

import pytest
from datasets import Dataset

from elm_trainer import ElmConfig
from elm_trainer.methods.validation import check_columns, tokenize_dataset


ROWS = {
    "concept": ["capitals"] * 3,
    "forget": ["Oslo is a capital.", "Rome is one.", "So is Lima."],
    "retain": ["Bread needs flour."] * 3,
    "prompt": ["The capital", None, ""],
    "completion": [" is big.", None, ""],
}


@pytest.mark.parametrize(
    ("column", "value"),
    [("concept", None), ("forget", None), ("retain", None), ("prompt", None), ("forget", [{"role": "user", "content": "hi"}]),
     ("retain", 1814)],
)  # fmt: skip
def test_what_is_no_text_is_named_by_row_and_column(column, value):
    values = [value] + ROWS[column][1:] if value is None else [value] * 3
    with pytest.raises(ValueError, match=rf"`train_dataset`, row 0: `{column}` is .*, of type {type(value).__name__}"):
        check_columns({"train_dataset": Dataset.from_dict(ROWS | {column: values})})


def test_rows_without_a_pair_may_hold_none_there():
    check_columns({"train_dataset": Dataset.from_dict(ROWS)})


def test_a_dataset_in_the_format_of_torch_gives_the_same_tokens(tokenizer, tmp_path):
    dataset = Dataset.from_dict(ROWS)
    args = ElmConfig(str(tmp_path), bf16=False, report_to="none")
    plain, torch = (
        tokenize_dataset(given, tokenizer, args, 50, "train") for given in (dataset, dataset.with_format("torch"))
    )
    assert plain[:] == torch[:]
