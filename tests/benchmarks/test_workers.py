import os
from pathlib import Path

import pytest

from benchmarks.workers import Pacer, in_turn, take_turns, workers


def count(pacer: Pacer, folder: str, log: str, name: str) -> None:
    """A side that trains nothing: it writes down when it was asked for an update."""
    assert os.environ["HF_DATASETS_CACHE"] == folder
    pacer.lap("prepare", 1.5)
    going = pacer.start()
    held = []
    while going:
        held.append(bytearray(b"x" * 2**24))
        with open(log, "a", encoding="utf-8") as file:
            file.write(name)
        going = pacer.step()


def fail(pacer: Pacer, folder: str) -> None:
    raise LookupError("no such model")


def test_the_order_turns_round_from_one_round_to_the_next():
    assert [in_turn(["a", "b", "c"], index) for index in range(3)] == [list("abc"), list("cba"), list("abc")]


def test_sides_take_turns_in_processes_of_their_own(tmp_path):
    log = tmp_path / "log"
    sides = {name: (count, (str(log), name)) for name in "ab"}
    with workers(sides, threads=1) as started:
        folders = {name: worker._folder.name for name, worker in started.items()}
        assert all(worker.ready["setup"] == {"prepare": 1.5} for worker in started.values())
        rounds = take_turns(started, 3, {"a": 1, "b": 2})

    assert log.read_text() == "abb" + "bba" + "abb"
    for blocks in rounds.values():
        assert len(blocks) == 3
        assert all(block["seconds"] > 0 and block["peak"] > block["added"] > 0 for block in blocks)
    # What a side holds is its own: each update of 16 MiB shows.
    grown = rounds["b"][2]["added"] - rounds["b"][0]["added"]
    assert grown > 3.5 * 2**24
    assert not any(Path(folder).exists() for folder in folders.values())
    assert len(set(folders.values())) == 2


def test_a_side_that_fails_says_why():
    with pytest.raises(RuntimeError, match="(?s)'broken' failed.*LookupError: no such model"):
        with workers({"broken": (fail, ())}, threads=1):
            pass
