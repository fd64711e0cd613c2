"""Rows of random targets for the tests of the store."""

from pathlib import Path

import torch

from elm_trainer.data.target_store import Field, TargetLayout, TargetStore


def layout(top_k: int = 4, vocab_size: int = 1000) -> TargetLayout:
    """All kinds of fields."""
    return TargetLayout(
        {
            "forget_indices": Field("ids", top_k),
            "forget_probs": Field("probs", top_k),
            "forget_weights": Field("floats"),
            "retain_indices": Field("ids", top_k),
            "retain_probs": Field("probs", top_k),
            "forget_nll": Field("floats", per="text"),
        },
        vocab_size,
    )


def positions(row: int) -> dict[str, int]:
    """Positions of a row by sub-batch; some rows have none."""
    return {"forget": row % 5, "retain": 2 + row % 3}


def make_row(row: int, kept: TargetLayout) -> dict[str, torch.Tensor]:
    """The same values for the same row."""
    generator = torch.Generator().manual_seed(row)
    made = {}
    for name, field in kept.fields.items():
        items = 1 if field.per == "text" else positions(row)[name.partition("_")[0]]
        shape = (items,) if field.width is None else (items, field.width)
        if field.kind == "ids":
            made[name] = torch.randint(kept.vocab_size, shape, generator=generator)
        else:
            made[name] = torch.rand(shape, generator=generator)
    return made


def make_rows(rows: range, kept: TargetLayout) -> list[dict[str, torch.Tensor]]:
    return [make_row(row, kept) for row in rows]


def store_of(folder: Path, rows: int, kept: TargetLayout | None = None) -> TargetStore:
    """An empty store whose folder exists."""
    store = TargetStore(folder, rows, kept or layout())
    store.describe({"made": "for a test"})
    return store


def assert_row(found: dict[str, torch.Tensor], row: int, kept: TargetLayout) -> None:
    """The values of a row, as near as they are stored."""
    expected = make_row(row, kept)
    assert found.keys() == expected.keys()
    for name, field in kept.fields.items():
        assert found[name].dtype == (torch.int64 if field.kind == "ids" else torch.float32)
        torch.testing.assert_close(found[name], expected[name], rtol=2**-19 if field.kind == "probs" else 0, atol=0)
