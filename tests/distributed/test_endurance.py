"""A long run holds no more at its end than at its beginning."""

import json
import os
import statistics
import subprocess
import sys

import pytest

from .launching import ROOT


pytestmark = pytest.mark.distributed
STEPS = 2000


def test_two_thousand_steps_leave_memory_files_and_threads_as_they_were(tmp_path):
    command = [sys.executable, "-m", "tests.distributed.endure", str(STEPS), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=500, stdout=subprocess.DEVNULL)

    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen[-1]["step"] == STEPS
    # Caches fill in the first fifth.
    early = [entry for entry in seen if STEPS * 0.2 < entry["step"] <= STEPS * 0.4]
    late = [entry for entry in seen if STEPS * 0.8 < entry["step"]]
    growth = statistics.median(e["memory"] for e in late) / statistics.median(e["memory"] for e in early)
    assert growth < 1.02
    assert max(entry["files"] for entry in late) <= max(entry["files"] for entry in early)
    assert max(entry["threads"] for entry in late) <= max(entry["threads"] for entry in early)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1800", "checkpoint-2000"]
