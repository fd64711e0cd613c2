"""A process that is killed ends the run soon and clearly, and nothing of what was saved is lost."""

import subprocess
import time

import pytest
import torch

from .launching import adapter, launch, start
from .train import Run


pytestmark = pytest.mark.distributed


def test_after_kill_9_of_one_process_the_others_end_and_the_run_resumes_to_the_uninterrupted_result(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    dropping = dict(fields=saving, dropout=0.1)
    process = start(
        "ddp", [Run("killed", killed_at=5, **dropping)], tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    _, errors = process.communicate(timeout=300)
    ended = time.time()

    assert process.returncode != 0
    assert ended - float((tmp_path / "killed" / "killed").read_text()) < 60
    assert "Signal 9 (SIGKILL) received" in errors and "rank      : 1" in errors
    assert not (tmp_path / "killed" / "final").exists()
    left = sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*"))
    assert left == ["checkpoint-2", "checkpoint-4"]

    launch("ddp", [Run("resumed", resume="killed/checkpoint-4", **dropping), Run("whole", **dropping)], tmp_path)
    resumed, whole = adapter(tmp_path / "resumed"), adapter(tmp_path / "whole")
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=0, atol=1e-6)
