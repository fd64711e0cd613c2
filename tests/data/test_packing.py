import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elm_trainer import ElmDataCollator
from elm_trainer.data.collator import best_rows, pack, pack_batches


lengths = st.lists(st.integers(1, 20), min_size=1, max_size=12)


@given(lengths, st.sampled_from([1.0, 30.0, math.inf]))
def test_every_text_lies_in_one_row(lengths, attention):
    rows = best_rows(lengths, attention)
    assert sorted(text for row in rows for text in row) == list(range(len(lengths)))


@given(lengths, st.integers(1, 12))
def test_no_row_holds_more_than_another_and_a_text(lengths, count):
    held = [sum(lengths[text] for text in row) for row in pack(lengths, count)]
    assert len(held) == count and max(held) - min(held) <= max(lengths)


def test_rows_that_hold_several_texts_leave_no_gaps_unless_attention_is_dear():
    lengths = [183, 157, 140] * 4
    dense = [sum(lengths[text] for text in row) for row in best_rows(lengths, 1200)]
    assert dense == [323, 323, 323, 323, 314, 314]
    assert len(best_rows(lengths, 10)) == len(lengths)
    assert len(best_rows(lengths, math.inf)) == 1


@given(st.lists(lengths, min_size=1, max_size=3), st.sampled_from(["left", "right"]), st.booleans(), st.booleans())
def test_packed_slots_hold_the_tokens_of_the_padded_batches(groups, side, one_row, apart):
    class Tokenizer:
        pad_token_id = 0
        padding_side = side

    collator = ElmDataCollator(Tokenizer())
    texts = [[list(range(1, length + 1)) for length in group] for group in groups]
    batches = [collator.pad([(ids, 0) for ids in group]) for group in texts]

    packing = pack_batches(batches, left_padded=side == "left", one_row=one_row, apart=apart)

    flat = torch.cat([batch["input_ids"].flatten() for batch in batches])
    real = torch.cat([batch["attention_mask"].flatten() for batch in batches]).bool()
    packed = flat[packing.tokens].flatten()
    # Each text counts 1, 2, 3, ..., so a token is its position plus one wherever it lies.
    assert torch.equal(packed[packing.slots[real]], flat[real])
    if apart:
        assert packing.position_ids is None
    else:
        assert torch.equal(packing.position_ids.flatten()[packing.slots[real]], flat[real] - 1)
    assert len(set(packing.slots[real].tolist())) == int(real.sum())
    if one_row and not apart:
        assert packing.tokens.shape == (1, int(real.sum()))


@pytest.mark.parametrize("apart", [False, True])
def test_rows_are_as_wide_as_a_multiple_that_is_asked_for(apart):
    batch = {"input_ids": torch.zeros(3, 9, dtype=torch.long), "lengths": [9, 4, 2]}
    plain = pack_batches([batch], left_padded=False, apart=apart)
    wide = pack_batches([batch], left_padded=False, apart=apart, pad_to_multiple_of=8)

    assert plain.tokens.size(1) in (9, 15) and wide.tokens.shape == (len(plain.tokens), 16)
    rows, columns = plain.slots // plain.tokens.size(1), plain.slots % plain.tokens.size(1)
    real = torch.tensor([True] * 9 + [True] * 4 + [False] * 5 + [True] * 2 + [False] * 7)
    assert torch.equal(wide.slots[real], (rows * 16 + columns)[real])
