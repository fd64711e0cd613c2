import sys
from pathlib import Path

import pytest


pytest.importorskip("lm_eval")


def test_the_benchmark_compares_the_same_items(tiny_model, tokenizer, monkeypatch):
    # As the script finds it.
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    from multiple_choice import compare

    found = compare(tiny_model, tokenizer, bank="capitals", questions=6, batch_size=4, rounds=2)

    assert (found["questions"], found["options"]) == (6, 24)
    for kind in ("clock", "processor"):
        assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in found[kind].values())
    assert found["largest_difference"] < 1e-4
    assert found["equal_verdicts"]
    assert found["accuracy"]["ours"] == found["accuracy"]["harness"]
