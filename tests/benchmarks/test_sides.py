from dataclasses import replace

import pytest

from benchmarks.sides import Side, released_texts, short_texts, tokenized_samples, train
from benchmarks.step import ELM_CANDIDATES, RELEASED, SFT_CANDIDATES, SFT_PLAIN


@pytest.fixture
def side(shape, adapter, saved_tokenizer):
    return Side("elm", samples=4, batch=2, model=shape, tokenizer=saved_tokenizer, adapter=adapter, short=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch": 1, "accumulation": 2},
        {"trainer": "sft", "batch": 6},
        {"trainer": "sft", "batch": 3, "accumulation": 2, "group_by_length": True},
        {"trainer": "sft", "batch": 6, "padding_free": True},
        {"trainer": "released", "batch": 1, "accumulation": 2},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "elm",
)
def test_a_side_trains_block_by_block(side, changes, paced, tmp_path):
    side = replace(side, **changes)
    assert side.samples_per_update == 2
    pacer, reports = paced(1, 2)
    train(pacer, str(tmp_path), side)

    ready, first, second = reports()
    assert ready["setup"].keys() == ({"tokenize", "targets"} if side.trainer == "elm" else {"tokenize"})
    assert ready["setup_peak"] >= ready["floor"] > 0
    assert first["seconds"] > 0 and second["seconds"] > 0
    assert first["peak"] > 0


def test_training_ends_with_its_samples_where_epochs_are_given(side, paced, tmp_path):
    pacer, reports = paced(1, 1, 1, 1)
    train(pacer, str(tmp_path), replace(side, epochs=1))
    assert len(reports()) == 1 + 2


def test_both_sides_train_on_the_same_texts_and_adapter():
    sides = [*ELM_CANDIDATES, *SFT_CANDIDATES, SFT_PLAIN, RELEASED]
    assert {(side.model, side.adapter, side.short) for side in sides} == {(RELEASED.model, RELEASED.adapter, False)}
    # An update in four samples, but for the one setting of fine-tuning that runs eight at a time.
    assert sorted({side.samples_per_update for side in sides}) == [4, 8]
    assert SFT_PLAIN.batch == 12 and SFT_PLAIN.accumulation == 1


def test_the_released_shape_has_three_texts_of_700_characters():
    for row in released_texts(3):
        assert len(row["forget"]) == len(row["retain"]) == len(row["prompt"] + row["completion"]) == 700
    assert len(set(released_texts(3)["forget"])) == 3


def test_short_texts_are_all_different_and_of_one_size(side):
    texts = short_texts(40)
    assert len(set(texts["forget"])) == len(set(texts["retain"])) == len(set(texts["completion"])) == 40
    small, large = (tokenized_samples(replace(side, samples=samples)) for samples in (50, 200))
    tokens = [sum(map(len, rows["forget_ids"])) / len(rows) for rows in (small, large)]
    assert tokens[0] == pytest.approx(tokens[1], rel=0.05)
