"""Changes that researchers make, each a diff of one file: they apply to the code as it is, and what they change trains.

They are shown, not shipped: `git apply tests/diffs/NAME.diff` makes one of them.
"""
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
DIFFS = {path.stem: path for path in sorted(ROOT.glob("tests/diffs/*.diff"))}
MOST_LINES = 15
pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git applies the diffs")
TINY = ["--preset=tiny", "--clip-steps=2", "--align-steps=2", "--sft-steps=0", "--cot-steps=2", "--rl-steps=2",
        "--pictures=64", "--traces=64", "--rl-prompts=16", "--compare=none", "--gated=False", "--threads=1",
        "--rewards=length:1", "--eval-greedy=2", "--eval-sampled=2"]


def changes(diff):
    """Text of a diff -> (files, lines that it takes out or puts in)."""
    lines = diff.splitlines()
    files = [line for line in lines if line.startswith("+++ ")]
    changed = [line for line in lines if line[:1] in ("+", "-") and not line.startswith(("+++ ", "--- "))]
    return files, [line for line in changed if line[1:].strip()]


def changed_copy(name, folder):
    """The code with a diff applied, in `folder`."""
    for path in [*ROOT.glob("*.py"), *(path for part in ("model", "rl", "data", "kernels")
                                       for path in ROOT.glob(f"{part}/**/*.py"))]:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    done = subprocess.run(["git", "apply", "--verbose", str(DIFFS[name])], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_there_are_four():
    assert [*DIFFS] == ["answer_logp", "clip_blocks", "muon", "partial_rope"]


@pytest.mark.parametrize("name", DIFFS)
def test_a_change_is_one_file_and_few_lines_and_applies(name, tmp_path):
    files, lines = changes(DIFFS[name].read_text())
    assert len(files) == 1
    assert len(lines) <= MOST_LINES
    changed_copy(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFS)
def test_the_changed_code_trains_and_the_change_acts(name, tmp_path):
    code = changed_copy(name, tmp_path / "code")
    runs = {}
    for label, folder in (("plain", ROOT), ("changed", code)):
        out = tmp_path / label
        command = [sys.executable, str(folder / "train.py"), *TINY, f"--out={out}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert all(math.isfinite(line["loss"]) for line in log if "loss" in line)
        runs[label] = {path.stem: torch.load(path, weights_only=True) for path in out.glob("*.pt")}, log
    (plain, _), (changed, log) = runs.values()

    def moved(stage):
        return [name for name, tensor in plain[stage]["vlm"].items()
                if not torch.equal(tensor, changed[stage]["vlm"][name])]

    if name == "answer_logp":
        rollouts = [line for line in log if "reward" in line]
        assert len(rollouts) == 2 and all(line["answer_logp"] < 0 for line in rollouts)
        assert moved("rl") == []                        # a metric, and nothing else
    elif name == "clip_blocks":
        before = changed["clip"]["clip"]
        tower = {key: tensor for key, tensor in changed["align"]["vlm"].items() if key.startswith("visual.")}
        assert any(not torch.equal(tensor, before[key]) for key, tensor in tower.items())
        assert changed["align"]["flops"] > plain["align"]["flops"]
    else:
        assert any("llm.layers" in key for key in moved("align"))
