"""Loads the question banks beside this file for lm-evaluation-harness; needs nothing of elm_trainer."""

from pathlib import Path

from datasets import Dataset


def load(bank: str, **_) -> dict[str, Dataset]:
    """The splits of a bank; the harness also passes the metadata of task and model."""
    rows = Dataset.from_json(str(Path(__file__).with_name(f"{bank}.jsonl")))
    splits = rows["split"]
    return {
        split: rows.select([index for index, found in enumerate(splits) if found == split])
        for split in ("dev", "test")
    }
