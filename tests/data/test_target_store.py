import gc
import json
import math
import os
import pickle

import datasets
import pytest
import torch
from datasets import Features, Value, concatenate_datasets
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset

from elm_trainer.data.collator import ElmDataCollator
from elm_trainer.data.target_store import (
    DESCRIPTION_FILE,
    LARGEST_STORE,
    SHARD_ROWS,
    Field,
    RowTargets,
    TargetLayout,
    TargetStore,
    decode_ids,
    decode_probs,
    decode_states,
    encode_floats,
    encode_ids,
    encode_probs,
    encode_states,
    fill_store,
    id_bytes,
    reason_against,
)
from elm_trainer.files import json_sha256
from elm_trainer.methods.targets import rows_digest

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


@given(st.lists(st.floats(2**-62, 1, width=32), min_size=1, max_size=20))
def test_a_probability_is_off_by_at_most_its_last_half_bit(values):
    probs = torch.tensor(values)
    packed = encode_probs(probs)
    assert packed.dtype == torch.uint8 and packed.shape == (len(values), 3)
    decoded = decode_probs(packed)
    assert decoded.dtype == torch.float32
    assert ((decoded.double() - probs.double()).abs() <= 2**-19 * probs.double()).all()
    assert torch.equal(encode_probs(decoded), packed)


@given(st.floats(0, 2**-62, width=32))
def test_what_is_nearly_nothing_stays_nearly_nothing(value):
    assert 0 <= decode_probs(encode_probs(torch.tensor([value]))).item() <= 2**-62


def test_zero_one_and_halves_are_exact_and_order_is_kept():
    exact = torch.tensor([0.0, 2**-62, 2**-20, 0.125, 0.5, 1.0])
    assert torch.equal(decode_probs(encode_probs(exact)), exact)
    rising = torch.linspace(0, 1, 5001)
    assert (decode_probs(encode_probs(rising)).diff() >= 0).all()


def test_ties_go_to_the_even_neighbour_and_a_carry_raises_the_exponent():
    step = 2**-18
    ties = torch.tensor([1 + 0.5 * step, 1 + 1.5 * step, 1 - 2**-24])
    assert decode_probs(encode_probs(ties)).tolist() == [1.0, 1 + 2 * step, 1.0]


def test_probabilities_keep_any_shape():
    probs = torch.rand(3, 0, 5), torch.rand(2, 4, 5)
    for values in probs:
        torch.testing.assert_close(decode_probs(encode_probs(values)), values, rtol=2**-19, atol=0)


@pytest.mark.parametrize("value", [math.nan, -1e-9, 2.0, math.inf])
def test_what_is_no_probability_is_refused(value):
    with pytest.raises(FloatingPointError, match="the model's logits are not finite"):
        encode_probs(torch.tensor([0.5, value]))


@given(st.lists(st.floats(-3e8, 3e8, width=32), min_size=1, max_size=8))
def test_a_state_beyond_float16_comes_back_within_its_rounding(values):
    states = torch.tensor([values, [0.001] * len(values)])
    stored = encode_states(states)
    assert stored.dtype == torch.float16 and stored.shape == (2, len(values) + 1) and stored.isfinite().all()
    largest = states.abs().amax(-1, keepdim=True)
    # Half of the last of 11 bits; below that, of the smallest step of float16 beside the largest value.
    assert ((decode_states(stored) - states).abs() <= 2**-11 * states.abs() + 2**-24 * largest.clamp(min=1)).all()


def test_a_state_within_float16_is_stored_as_it_is_there():
    states = torch.tensor([[65504.0, -1e-7, 3.14159], [0.0, 0.0, 0.0]])
    assert torch.equal(encode_states(states)[:, :-1], states.half())
    # Gemma's first token.
    states = torch.tensor([98538.0, -29.0])
    torch.testing.assert_close(decode_states(encode_states(states)), states, rtol=2**-11, atol=0)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_state_that_is_not_finite_is_refused(value):
    with pytest.raises(FloatingPointError, match="the model's logits are not finite"):
        encode_states(torch.tensor([[0.5, value]]))


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(value):
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        encode_floats(torch.tensor([0.5, value]))


@given(st.data(), st.sampled_from([2, 50_257, 65_536, 65_537, 256_000, 1 << 24]))
def test_ids_come_back_whole_in_the_bytes_that_the_vocabulary_needs(data, vocab_size):
    values = data.draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=20))
    ids = torch.tensor([*values, vocab_size - 1])
    packed = encode_ids(ids, vocab_size)
    assert packed.numel() * packed.element_size() == len(ids) * id_bytes(vocab_size)
    assert decode_ids(packed).dtype == torch.int64
    assert torch.equal(decode_ids(packed), ids)


def test_an_id_beyond_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="ids from 3 to 7, but there are 7"):
        encode_ids(torch.tensor([3, 7]), 7)


def test_a_vocabulary_that_three_bytes_do_not_hold_is_refused():
    with pytest.raises(ValueError, match="`vocab_size` is 16777217"):
        id_bytes((1 << 24) + 1)


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


COLUMNS = ["concept", "forget_ids", "retain_ids"]


def dataset(**changed):
    data = {
        "concept": ["capitals", "bio", "capitals"],
        "forget_ids": [[1, 2, 3], [4], [5, 6]],
        "retain_ids": [[7, 8], [9, 10, 11], [12]],
        "synthetic_ids": [[1], [], []],
    }
    return datasets.Dataset.from_dict(data | changed)


def test_rows_are_known_by_their_values_alone():
    found = rows_digest(dataset(), COLUMNS)
    assert rows_digest(dataset(), COLUMNS[::-1]) == found
    assert rows_digest(dataset(synthetic_ids=[[2], [3], [4]]), COLUMNS) == found
    parts = concatenate_datasets([dataset().select([0]), dataset().select([1, 2])])
    assert rows_digest(parts, COLUMNS) == found
    assert rows_digest(dataset().select([2, 1, 0]).select([2, 1, 0]), COLUMNS) == found
    narrow = Features({"concept": Value("string")} | {name: datasets.Sequence(Value("int32")) for name in COLUMNS[1:]})
    assert rows_digest(dataset().select_columns(COLUMNS).cast(narrow), COLUMNS) == found


@pytest.mark.parametrize(
    "other",
    [
        dataset(forget_ids=[[1, 2], [3, 4], [5, 6]]),  # the same tokens, cut elsewhere
        dataset(forget_ids=[[1, 2, 3], [4], [5, 7]]),
        dataset(retain_ids=[[1, 2, 3], [4], [5, 6]]),
        dataset(concept=["capitals", "capitals", "bio"]),
        dataset().select([1, 0, 2]),
        dataset().select([0, 1]),
    ],
)
def test_other_rows_are_told_apart(other):
    assert rows_digest(other, COLUMNS) != rows_digest(dataset(), COLUMNS)


def test_which_columns_count_is_part_of_it():
    assert rows_digest(dataset(), ["forget_ids"]) != rows_digest(dataset(), ["retain_ids"])


def test_many_rows_are_read_whole():
    many = datasets.Dataset.from_dict({"forget_ids": [[row] for row in range(2500)]})
    changed = datasets.Dataset.from_dict({"forget_ids": [[row] for row in range(2499)] + [[0]]})
    assert rows_digest(many, ["forget_ids"]) != rows_digest(changed, ["forget_ids"])


def test_a_key_depends_on_every_value_and_not_on_their_order():
    parts = {"settings": {"eta": 1.0, "top_k": 50}, "versions": {"torch": "2"}}
    found = json_sha256(parts)
    assert json_sha256({name: parts[name] for name in reversed(parts)}) == found
    assert json_sha256(parts | {"settings": {"eta": 2.0, "top_k": 50}}) != found
    assert json_sha256(parts | {"versions": {"torch": "3"}}) != found
    assert len(found) == 64


ENOUGH = dict(rows=100, visits=100, needed=10**9, missing=10**9, free=10**10)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, None),
        ({"visits": 99}, "visits 99 of 100 rows"),
        ({"visits": 1e6}, None),
        ({"free": 2 * 10**9}, None),
        ({"free": 2 * 10**9 - 1}, "more than half of the 1.86 GiB that are free"),
        ({"free": 0, "missing": 0}, None),
        ({"needed": LARGEST_STORE, "missing": 0}, None),
        ({"needed": LARGEST_STORE + 2**30, "missing": 0}, "65 GiB, more than 64 GiB"),
    ],
)
def test_targets_are_stored_where_each_row_is_visited_and_there_is_room(given, reason):
    found = reason_against(**(ENOUGH | given))
    assert found is None if reason is None else reason in found
