"""A long run holds no more at its end than at its beginning."""

import json
import os
import statistics
import subprocess
import sys

import pytest

from .launching import ROOT


pytestmark = pytest.mark.distributed
STEPS = 1000


def endure(folder, steps, *arguments):
    """What the process held every ten steps."""
    command = [sys.executable, "-m", "tests.distributed.endure", str(steps), str(folder), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=500, stdout=subprocess.DEVNULL)
    seen = json.loads((folder / "seen.json").read_text())
    assert seen[-1]["step"] == steps
    return seen


def growth(seen, early, late):
    return statistics.median(e["memory"] for e in late) / statistics.median(e["memory"] for e in early)


def test_a_thousand_steps_leave_memory_files_and_threads_as_they_were(tmp_path):
    seen = endure(tmp_path, STEPS)

    # Caches fill in the first fifth.
    early = [entry for entry in seen if STEPS * 0.2 < entry["step"] <= STEPS * 0.4]
    late = [entry for entry in seen if STEPS * 0.8 < entry["step"]]
    assert growth(seen, early, late) < 1.02
    assert max(entry["files"] for entry in late) <= max(entry["files"] for entry in early)
    assert max(entry["threads"] for entry in late) <= max(entry["threads"] for entry in early)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1000", "checkpoint-900"]


def test_texts_of_all_lengths_do_not_fragment_the_heap(tmp_path):
    seen = endure(tmp_path, 160, "uneven")

    # The lengths of a batch make the process breathe; what gaps between blocks leave behind adds up.
    assert growth(seen, seen[3:8], seen[-5:]) < 1.15
