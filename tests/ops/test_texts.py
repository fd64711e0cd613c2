import pytest
import torch

from elm_trainer.ops import position_weights, text_mean, text_means, text_sums


def test_position_weights_average_one_over_each_text_and_follow_the_disagreement():
    text = torch.tensor([0, 0, 0, 1, 1])
    weights = position_weights(torch.tensor([1.0, 4.0, 1.0, 2.0, 2.0]), text, 2, share=0.5)
    torch.testing.assert_close(text_mean(weights, text, 2), torch.tensor(1.0))
    assert weights.tolist() == pytest.approx([0.75, 1.5, 0.75, 1.0, 1.0])


def test_text_mean_does_not_depend_on_the_split_into_batches():
    values, text = torch.tensor([1.0, 2.0, 6.0, 4.0]), torch.tensor([0, 0, 1, 1])
    whole = text_mean(values, text, 2)
    halves = (text_mean(values[:2], text[:2], 1) + text_mean(values[2:], text[:2], 1)) / 2
    assert whole.item() == halves.item() == pytest.approx(3.25)


def test_sums_and_means_of_a_text_without_positions_are_zero():
    values, text = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([2, 2, 0])
    assert text_sums(values, text, 3).tolist() == [6.0, 0.0, 3.0]
    assert text_means(values, text, 3).tolist() == [6.0, 0.0, 1.5]
