import signal
import sys
import threading

import pytest

from elm_trainer.data.target_store import SHARD_ROWS, TargetLayout, fill_store, remove_locks

from ..processes import run
from .targets import assert_row, layout, make_rows, store_of


ROWS = 4 * SHARD_ROWS + 1


class Made:
    """Computes rows and remembers which."""

    def __init__(self, kept: TargetLayout | None = None):
        self.kept = kept or layout()
        self.starts: list[int] = []

    def __call__(self, rows):
        self.starts.append(rows.start // SHARD_ROWS)
        return make_rows(rows, self.kept)


def fill(store, made, shards=None):
    fill_store(store, range(store.shards) if shards is None else shards, made)


def test_a_second_filling_computes_nothing_and_changes_no_file(tmp_path):
    store, made = store_of(tmp_path, ROWS), Made()
    fill(store, made)
    assert made.starts == [0, 1, 2, 3, 4] and store.absent() == []
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    fill(store, made)
    assert made.starts == [0, 1, 2, 3, 4]
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")} == before


def short(data: bytes) -> bytes:
    return data[:-1]


def flipped(data: bytes) -> bytes:
    return data[:-200] + bytes([data[-200] ^ 1]) + data[-199:]


def garbage(data: bytes) -> bytes:
    return b"\xff" * 100


def nothing(data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [short, flipped, garbage, nothing])
def test_a_damaged_file_alone_is_made_again(damage, tmp_path):
    store, made = store_of(tmp_path, ROWS), Made()
    fill(store, made)
    path = store.path_of(2)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert [shard for shard in range(5) if not store.is_whole(shard)] == [2]
    made.starts.clear()
    fill(store, made)
    assert made.starts == [2]
    assert path.read_bytes() == whole


def test_files_of_another_layout_or_number_of_rows_are_made_again(tmp_path):
    fill(store_of(tmp_path, ROWS), Made())
    assert not store_of(tmp_path, ROWS + 1).is_whole(4)
    fewer = TargetLayout({"forget_nll": layout().fields["forget_nll"]}, 1000)
    assert not store_of(tmp_path, ROWS, fewer).is_whole(0)


KILLED = """
import os, signal, sys
from pathlib import Path
from elm_trainer.data.target_store import fill_store
from tests.data.targets import make_rows, store_of

store = store_of(Path(sys.argv[1]), int(sys.argv[2]))

def compute(rows):
    if rows.start >= 256:
        os.kill(os.getpid(), signal.SIGKILL)
    return make_rows(rows, store.layout)

fill_store(store, range(store.shards), compute)
"""


def test_a_killed_run_goes_on_after_its_last_whole_file(tmp_path):
    killed = run([sys.executable, "-c", KILLED, tmp_path, str(ROWS)])
    assert killed.returncode == -signal.SIGKILL
    store, made = store_of(tmp_path, ROWS), Made()
    assert store.absent() == [2, 3, 4]
    # As if it had been killed while it wrote.
    (tmp_path / "shard-000002.abc.tmp").write_bytes(b"half")
    fill(store, made)
    assert made.starts == [2, 3, 4]
    assert list(tmp_path.glob("*.tmp")) == []
    for row in range(0, ROWS, 17):
        assert_row(store[row], row, store.layout)


def test_two_runs_at_once_make_each_file_once(tmp_path):
    stores = [store_of(tmp_path, ROWS) for _ in range(2)]
    computed = []
    meeting = threading.Barrier(2)

    def compute(rows):
        if rows.start < 2 * SHARD_ROWS:
            meeting.wait(timeout=60)  # both are computing at this moment
        computed.append(rows.start // SHARD_ROWS)
        return make_rows(rows, layout())

    threads = [threading.Thread(target=fill_store, args=(store, range(5), compute)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(computed) == [0, 1, 2, 3, 4]
    assert all(stores[0].is_whole(shard) for shard in range(5))


def test_whoever_waits_for_a_run_that_dies_makes_its_files(tmp_path):
    store, made = store_of(tmp_path, ROWS), Made()
    began, die = threading.Event(), threading.Event()

    def dying(rows):
        began.set()
        die.wait(timeout=60)
        raise OSError("gone")

    def first():
        with pytest.raises(OSError, match="gone"):
            fill_store(store, [0], dying)

    thread = threading.Thread(target=first)
    thread.start()
    began.wait(timeout=60)

    def compute(rows):
        die.set()  # while the others are made, the first one ends
        return made(rows)

    fill(store, compute)
    thread.join(timeout=60)
    assert sorted(made.starts) == [0, 1, 2, 3, 4] and made.starts[0] == 1
    assert store.absent() == []


def test_the_locks_can_go_when_all_is_made(tmp_path):
    store = store_of(tmp_path, ROWS)
    fill(store, Made())
    remove_locks(store)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


FULL = """
import resource, signal, sys
from pathlib import Path
from elm_trainer.data.target_store import fill_store
from tests.data.targets import make_rows, store_of

store = store_of(Path(sys.argv[1]), int(sys.argv[2]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def compute(rows):
    if rows.start >= 256:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
    return make_rows(rows, store.layout)

try:
    fill_store(store, range(store.shards), compute)
except OSError as error:
    sys.exit(f"refused: {error}")
"""


def test_on_a_full_disk_finished_files_stay_and_no_half_one(tmp_path):
    ended = run([sys.executable, "-c", FULL, tmp_path, str(ROWS)])
    assert ended.returncode == 1 and "refused: " in ended.stderr
    store = store_of(tmp_path, ROWS)
    assert [store.is_whole(shard) for shard in range(5)] == [True, True, False, False, False]
    assert list(tmp_path.glob("*.tmp")) == []
