import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.packing import exhaustive_rows, text_by_text
from elm_trainer import ElmDataCollator
from elm_trainer.data import packing as packing_module
from elm_trainer.data.packing import (
    PackingPlan,
    PackingRule,
    best_rows,
    find_packing,
    pack,
    pack_batches,
    share_beginnings,
)


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

    packing = pack_batches(batches, PackingRule(left_padded=side == "left", one_row=one_row, apart=apart))

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
    plain = pack_batches([batch], PackingRule(left_padded=False, apart=apart))
    wide = pack_batches([batch], PackingRule(left_padded=False, apart=apart, pad_to_multiple_of=8))

    assert plain.tokens.size(1) in (9, 15) and wide.tokens.shape == (len(plain.tokens), 16)
    rows, columns = plain.slots // plain.tokens.size(1), plain.slots % plain.tokens.size(1)
    real = torch.tensor([True] * 9 + [True] * 4 + [False] * 5 + [True] * 2 + [False] * 7)
    assert torch.equal(wide.slots[real], (rows * 16 + columns)[real])


def drawn(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(5, 256) for _ in range(count)]


def cost(lengths, rows, attention):
    width = max(sum(lengths[text] for text in row) for row in rows)
    return len(rows) * width * (1 + width / attention)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=40), st.sampled_from([1.0, 300.0, 2304.0, math.inf]))
def test_the_rows_are_those_that_cost_least_of_all_numbers_of_rows(lengths, attention):
    assert best_rows(lengths, attention) == exhaustive_rows(lengths, attention)


@pytest.mark.parametrize("count", [96, 384])
def test_many_texts_cost_hardly_more_than_with_every_number_of_rows_tried(count):
    lengths = drawn(count)
    least = cost(lengths, exhaustive_rows(lengths, 2304), 2304)
    assert cost(lengths, best_rows(lengths, 2304), 2304) <= 1.001 * least


def test_the_work_of_packing_grows_with_the_number_of_texts_and_not_with_its_square(monkeypatch):
    puts = []
    replace = packing_module.heapreplace
    monkeypatch.setattr(packing_module, "heapreplace", lambda *given: (puts.append(1), replace(*given))[1])
    counts = []
    for texts in (100, 400, 1600):
        puts.clear()
        best_rows(drawn(texts), 2304)
        counts.append(len(puts) / texts)
    assert max(counts) <= packing_module._TRIED + 1


def test_slots_filled_at_once_are_those_filled_text_by_text():
    lengths = drawn(30)
    batch = {"input_ids": torch.zeros(30, 256, dtype=torch.long), "lengths": lengths}
    made = pack_batches([batch], PackingRule(left_padded=False, attention=2304))
    tokens, position_ids, slots = text_by_text(lengths, 256, best_rows(lengths, 2304))
    assert torch.equal(made.tokens, tokens) and torch.equal(made.slots, slots)
    assert torch.equal(made.position_ids, position_ids)


def test_a_packing_is_taken_only_for_the_sub_batches_and_the_rule_that_it_was_made_for(monkeypatch):
    rule = PackingRule(left_padded=False, attention=100)
    first, second = ({"input_ids": torch.zeros(2, 9, dtype=torch.long), "lengths": ends} for ends in ([9, 4], [3, 9]))
    batch = {"forget": first, "retain": second | {"expert": second}}
    PackingPlan(rule, [("forget", "retain", "synthetic"), ("retain.expert",), ("forget.expert",)]).add(batch)
    made = []
    monkeypatch.setattr(packing_module, "pack_batches", lambda *given: made.append(given))

    together = find_packing([first, batch["retain"]], rule)
    assert together is first["packings"][0] and together.slots.shape == (36,)
    assert find_packing([batch["retain"]["expert"]], rule) is not None and not made
    for other in ([first], [batch["retain"], first], [first, first]):
        find_packing(other, rule)
    find_packing([first, batch["retain"]], PackingRule(left_padded=True, attention=100))
    assert len(made) == 4


texts_alike = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=8)


@given(st.lists(texts_alike, min_size=1, max_size=3), st.sampled_from(["left", "right"]), st.sampled_from([None, 4]))
def test_texts_that_share_a_beginning_see_their_own_tokens_and_no_others(groups, side, multiple):
    class Tokenizer:
        pad_token_id = 0
        padding_side = side

    collator = ElmDataCollator(Tokenizer())
    batches = [collator.pad([(ids, 0) for ids in group]) for group in groups]
    rule = PackingRule(left_padded=side == "left", pad_to_multiple_of=multiple)

    packing = share_beginnings(batches, rule)

    flat = torch.cat([batch["input_ids"].flatten() for batch in batches])
    packed, positions = flat[packing.tokens], packing.position_ids
    rows, width = packed.shape
    assert width % (multiple or 1) == 0 and packing.seen.shape == (rows, width, width)
    real = torch.cat([batch["attention_mask"].flatten() for batch in batches]).bool()
    texts = [text for group in groups for text in group]
    slots = iter(packing.slots[real].split([len(text) for text in texts]))
    for text in texts:
        own = next(slots)
        assert packed.flatten()[own].tolist() == text and positions.flatten()[own].tolist() == [*range(len(text))]
        [row] = set((own // width).tolist())
        for place, slot in enumerate((own % width).tolist()):
            seen = packing.seen[row, slot].nonzero().flatten()
            assert {*seen.tolist()} == {*(own[: place + 1] % width).tolist()}
    distinct = {tuple(text[: end + 1]) for text in texts for end in range(len(text))}
    assert len({*packing.slots[real].tolist()}) == len(distinct)  # all of these texts fit into one row


def test_rows_in_which_texts_share_are_short_unless_a_text_is_long(tokenizer):
    collator = ElmDataCollator(tokenizer)
    short = [[number] * 100 for number in range(5)]
    rule = PackingRule(left_padded=False)
    assert share_beginnings([collator.pad([(ids, 0) for ids in short])], rule).tokens.shape == (3, 200)
    assert share_beginnings([collator.pad([(ids, 0) for ids in [*short, [7] * 600]])], rule).tokens.shape == (2, 600)


def test_texts_share_only_where_that_spares_a_tenth(tiny_model, tokenizer):
    rule, collator = PackingRule(left_padded=False), ElmDataCollator(tokenizer)
    for beginning, shared in ((20, True), (1, False)):
        batch = {"forget": collator.pad([([5] * beginning + [number] * 20, 0) for number in range(4)])}
        PackingPlan(rule, [("forget",), ("retain",)]).share(batch, tiny_model)
        assert len(batch["forget"].get("packings", [])) == shared
