from dataclasses import replace

import pytest

from benchmarks.step import REAL, REAL_SIZES, SIDE, SIZES, measure_growth


def test_growth_trains_every_sample_of_every_size(shape, adapter, saved_tokenizer):
    side = replace(SIDE, model=shape, adapter=adapter, tokenizer=saved_tokenizer, batch=2)
    figure = measure_growth(repeats=2, threads=1, side=side, sizes=(6, 10))

    assert len(figure["rounds"]) == 2 and all(ratio > 0 for ratio in figure["rounds"])
    assert (figure["at_least"], figure["at_most"]) == (0.9, 1.1)
    assert figure["updates"] == {"6": 3, "10": 5}
    for key in ("seconds_per_sample", "time_ratios", "memory_ratios", "setup_seconds_per_sample"):
        assert figure[key].keys() == {"6", "10"}
    assert figure["time_ratios"]["6"] == figure["memory_ratios"]["6"] == 1
    assert figure["setup_seconds_per_sample"]["10"].keys() == {"tokenize", "targets"}


def test_sizes_too_small_for_the_rounds_are_refused():
    with pytest.raises(ValueError, match="`sizes` has 8.*raise them"):
        measure_growth(repeats=5, threads=1, sizes=(8, 1000))


def test_growth_is_measured_to_ten_thousand_samples_and_on_the_real_model_to_a_thousand():
    assert SIZES == (100, 1_000, 10_000) and REAL_SIZES == (100, 1_000)
    assert SIDE.epochs == REAL.epochs == 1
    assert isinstance(REAL.model, str)
