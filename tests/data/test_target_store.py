import gc
import json
import os
import pickle

import pytest
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset

from elm_trainer.data.collator import ElmDataCollator
from elm_trainer.data.target_store import DESCRIPTION_FILE, SHARD_ROWS, RowTargets, TargetStore, fill_store

from .targets import assert_row, layout, make_row, make_rows, positions, store_of


ROWS = 2 * SHARD_ROWS + 3


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = store_of(tmp_path_factory.mktemp("store"), ROWS)
    fill_store(store, range(store.shards), lambda rows: make_rows(rows, store.layout))
    return store


def test_every_row_comes_back_in_any_order(store):
    assert len(store) == ROWS and store.shards == 3
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)).tolist()
    for row in order:
        assert_row(store[row], row, store.layout)
    assert_row(store[-1], ROWS - 1, store.layout)
    assert [len(row["retain_probs"]) for row in store[1:8:3]] == [positions(row)["retain"] for row in (1, 4, 7)]


def test_a_row_beyond_the_last_is_refused(store):
    for row in (ROWS, -ROWS - 1):
        with pytest.raises(IndexError, match=f"stored for {ROWS}"):
            store[row]


def test_what_is_read_can_be_changed_without_changing_the_store(store):
    first = store[4]
    for values in first.values():
        values.zero_()
    assert_row(store[4], 4, store.layout)


def test_a_store_that_was_read_can_be_sent_to_another_process(store):
    store[0]
    sent = pickle.loads(pickle.dumps(store))
    assert_row(sent[ROWS - 1], ROWS - 1, store.layout)


class Rows(Dataset):
    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        return {"row": row, "forget_ids": [1] * (positions(row)["forget"] + 1), "synthetic_ids": []} | {
            "retain_ids": [1] * (positions(row)["retain"] + 1)
        }


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader_read_it_through_the_collator(start, store, tokenizer):
    store[0]  # open in this process too
    collator = ElmDataCollator(tokenizer, targets=RowTargets(store, ["row"], Rows()))
    loader = DataLoader(Rows(), batch_size=32, collate_fn=collator, num_workers=2, multiprocessing_context=start)
    row = 0
    for batch in loader:
        counts = {side: torch.bincount(batch[side]["rows"], minlength=32) for side in ("forget", "retain")}
        places = dict.fromkeys(counts, 0)
        for index in range(len(batch["forget"]["lengths"])):
            found = {"forget_nll": batch["forget"]["target"]["nll"][index : index + 1]}
            for side, count in counts.items():
                end = places[side] + count[index]
                for key, values in batch[side]["target"].items():
                    if key != "nll":
                        found[f"{side}_{key}"] = values[places[side] : end]
                places[side] = end
            assert_row(found, row, store.layout)
            row += 1
    assert row == ROWS


def test_a_description_says_what_the_folder_holds(store):
    description = json.loads((store.folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))
    assert description["rows"] == ROWS and description["shard_rows"] == SHARD_ROWS
    assert description["layout"] == store.layout.to_json() and description["key"] == {"made": "for a test"}


def test_a_damaged_file_is_named_when_it_is_read(tmp_path):
    store = store_of(tmp_path, 3)
    fill_store(store, [0], lambda rows: make_rows(rows, store.layout))
    path = store.path_of(0)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(OSError, match=r"shard-000000\.safetensors are damaged.*delete the file"):
        store[0]


def test_few_files_stay_open_however_many_are_read(tmp_path):
    rows = 70 * SHARD_ROWS
    store = store_of(tmp_path, rows)
    one = make_row(1, store.layout)
    fill_store(store, range(store.shards), lambda some: [one] * len(some))

    def mapped():
        gc.collect()
        with open("/proc/self/maps", encoding="utf-8") as maps:
            return {line.split()[-1] for line in maps if str(tmp_path) in line}

    handles = len(os.listdir("/proc/self/fd"))
    for row in range(0, rows, 50):
        store[row]
    assert 0 < len(mapped()) <= 32
    assert len(os.listdir("/proc/self/fd")) <= handles + 32
    del store
    assert not mapped()
    assert len(os.listdir("/proc/self/fd")) <= handles


def test_a_row_costs_its_own_bytes_whatever_the_file_holds(store):
    # A slice of a mapped file, not the whole tensor.
    with safe_open(store.path_of(0), "pt") as file:
        whole = file.get_slice("forget_probs").get_shape()[0]
    found = store[3]["forget_probs"]
    assert found.untyped_storage().nbytes() == positions(3)["forget"] * 4 * 4 < whole * 4 * 4


def test_an_empty_store_knows_what_is_absent(tmp_path):
    store = TargetStore(tmp_path / "nothing", ROWS, layout())
    assert store.absent() == [0, 1, 2]
    assert not store.is_whole(0)
