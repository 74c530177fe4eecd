"""What a reader will want to change is one small change in one file: each of tests/diffs is one, and still fits."""
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DIFFS = sorted(ROOT.glob("tests/diffs/*.diff"))


@pytest.mark.skipif(not shutil.which("git"), reason="git applies the diffs")
@pytest.mark.parametrize("path", DIFFS, ids=lambda path: path.stem)
def test_a_diff_is_short_changes_one_file_and_applies(path):
    lines = path.read_text().splitlines()
    assert sum(line.startswith("+++ ") for line in lines) == 1
    changed = [line for line in lines if line.startswith(("+", "-")) and not line.startswith(("+++ ", "--- "))]
    assert 0 < len(changed) <= 15
    done = subprocess.run(["git", "apply", "--check", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
