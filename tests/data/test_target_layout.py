import pytest
import torch
from safetensors import safe_open

from elm_trainer.data.target_files import Field, TargetLayout
from elm_trainer.data.target_store import TargetStore, fill_store

from .targets import layout, make_rows, positions


@pytest.mark.parametrize(
    ("vocab_size", "forget", "retain"),
    [(49_152, 100 * (2 + 3) + 4, 100 * (2 + 3)), (151_936, 100 * (3 + 3) + 4, 100 * (3 + 3))],
)
def test_the_bytes_of_a_token_are_those_of_the_files(vocab_size, forget, retain, tmp_path):
    kept = layout(100, vocab_size)
    kept = TargetLayout({name: field for name, field in kept.fields.items() if name != "forget_nll"}, vocab_size)
    rows = 200
    store = TargetStore(tmp_path, rows, kept)
    fill_store(store, range(store.shards), lambda some: make_rows(some, kept))

    total = {side: sum(positions(row)[side] for row in range(rows)) for side in ("forget", "retain")}
    expected = total["forget"] * forget + total["retain"] * retain + 4 * rows * len(kept.fields)
    assert kept.total_bytes(total, rows) == expected
    size = 0
    for shard in range(store.shards):
        path = store.path_of(shard)
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        # One more offset than rows.
        size += path.stat().st_size - header - 4 * len(kept.fields)
        assert header < 2048
        with safe_open(path, "pt") as file:
            assert all("offsets" in name or name in kept.fields for name in file.keys())
    assert size == expected


def test_the_bytes_that_the_docstring_names_are_true():
    for vocab_size, forget, retain in ((49_152, 254, 250), (151_936, 304, 300)):
        kept = layout(50, vocab_size)
        sizes = [kept.item_bytes(f"{side}_{key}") for side in ("forget", "retain") for key in ("indices", "probs")]
        assert (sum(sizes[:2]) + kept.item_bytes("forget_weights"), sum(sizes[2:])) == (forget, retain)
        assert str(forget) in TargetLayout.__doc__ and str(retain) in TargetLayout.__doc__


def test_values_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"`forget_probs` has the shape \(3, 5\)"):
        layout(4).encode("forget_probs", torch.rand(3, 5))


def test_layouts_that_differ_are_written_differently():
    kept = layout()
    others = [layout(5), layout(4, 999), TargetLayout(dict(kept.fields) | {"more": Field("floats")}, 1000)]
    assert len({str(one.to_json()) for one in (kept, *others)}) == 4
    assert layout().to_json() == kept.to_json()
