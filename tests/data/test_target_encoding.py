import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elm_trainer.data.target_files import decode_ids, decode_probs, encode_floats, encode_ids, encode_probs, id_bytes


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
