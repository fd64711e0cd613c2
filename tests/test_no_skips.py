import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
SKIPS = {
    "a missing package": "import pytest\npytest.importorskip('no_such_package')\ndef test_it(): pass\n",
    "inside": "import pytest\ndef test_it(): pytest.skip('no g++')\n",
    "a mark": "import pytest\n@pytest.mark.skipif(True, reason='no package')\ndef test_it(): pass\n",
}
ALLOWED = {
    "gpu": "import pytest\n@pytest.mark.gpu\ndef test_it(): pytest.skip('no GPU')\n",
    "gemma": "import pytest\npytestmark = [pytest.mark.gemma, pytest.mark.skipif(True, reason='x')]\ndef test_it(): pass\n",
    "expected failure": "import pytest\n@pytest.mark.xfail\ndef test_it(): assert False\n",
}


def run(text, folder, **env):
    (folder / "test_one.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.no_skips", str(folder / "test_one.py")]
    outside = {name: value for name, value in os.environ.items() if name != "CI"}
    return subprocess.run(command, cwd=ROOT, env=outside | env, capture_output=True, text=True)


@pytest.mark.parametrize("text", SKIPS.values(), ids=SKIPS)
def test_a_skip_fails_in_ci_alone(text, tmp_path):
    failed = run(text, tmp_path, CI="true")
    assert failed.returncode not in (0, 5) and "no test is skipped in CI" in failed.stdout
    assert run(text, tmp_path).returncode in (0, 5)


@pytest.mark.parametrize("text", ALLOWED.values(), ids=ALLOWED)
def test_a_marked_test_may_be_skipped(text, tmp_path):
    assert run(text, tmp_path, CI="true").returncode == 0
