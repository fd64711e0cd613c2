import multiprocessing

import pytest

from benchmarks.shapes import Adapter, ModelShape
from benchmarks.workers import Pacer


@pytest.fixture
def shape(tokenizer):
    return ModelShape(hidden=32, intermediate=64, layers=3, heads=4, kv_heads=2, vocab=len(tokenizer))


@pytest.fixture
def adapter():
    return Adapter(rank=4, layers=(1, 2))


@pytest.fixture(scope="session")
def saved_tokenizer(tokenizer, tmp_path_factory):
    """The demo's tokenizer in a folder, from which it loads faster than from the model's own file."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def paced():
    """Trains in this process: makes a pacer that is asked for blocks of the given updates, and what it reports."""

    def make(*updates):
        here, there = multiprocessing.Pipe()
        for wanted in (*updates, None):
            here.send(wanted)

        def reports():
            found = []
            while here.poll():
                found.append(here.recv())
            return found

        return Pacer(there), reports

    return make
