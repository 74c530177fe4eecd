"""A run that is killed, at whatever moment, and resumed equals one that was not; the seed decides a run bit by bit."""
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from model.runs import checkpoint
from rl import rewards
from rl.report import curves
from tiny import samples_shown

ROOT = Path(train.__file__).parent
STAGES = ("clip", "align", "sft", "cot", "rl", "cot_continued", "filtered")
# The tiny preset with enough chains of thought that completions differ, so that RL has something to learn from.
TINY = ["--preset=tiny", "--compare=basic", "--cot-steps=100", "--cot-lr=1e-2", "--forget-close=0.5", "--gated=False",
        "--max-new=24", "--threads=1", "--inspect-every=2"]

# train.py with a bomb: [kind, what, n] dies of SIGKILL
#   step    after the n-th optimizer step of the stage `what`, before it is logged
#   line    with half of the n-th log line of the stage `what` written
#   save    with half of the n-th file named `what` written
#   unlink  when progress.pt is to go, the n-th time
DRIVER = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, ROOT)
import train
from model import optim
from model.runs import checkpoint, folder

kind, what, n = BOMB
count, stage = 0, None

def now(event, name):
    global count
    count += (event, name) == (kind, what)
    return (event, name) == (kind, what) and count == n

def die():
    os.kill(os.getpid(), signal.SIGKILL)

start, step, log, write, unlink = (train.Run.start, train.optimizer_step, train.Run.log, checkpoint.write_atomically,
                                   Path.unlink)

def my_start(self, name):
    global stage
    stage = name
    return start(self, name)

def my_step(*args, **options):
    norm = step(*args, **options)
    if not options.get("drop") and now("step", stage):      # the rehearsal of RL drops its step
        die()
    return norm

def my_log(self, **line):
    if now("line", stage):
        with open(self.log_path, "a") as file:
            file.write(json.dumps(line)[:40])
        die()
    log(self, **line)

def my_write(path, call):
    def half(file):
        call(file)
        size = file.seek(0, 2)
        file.truncate(size // 2)
        file.flush()
        assert Path(file.name).stat().st_size == size // 2 > 0
        die()
    write(path, half if now("save", Path(path).name) else call)

def my_unlink(self, **options):
    if self.name == "progress.pt" and now("unlink", self.name):
        die()
    unlink(self, **options)

train.Run.start, train.optimizer_step, train.Run.log, Path.unlink = my_start, my_step, my_log, my_unlink
optim.optimizer_step = my_step                  # the one that RL takes
checkpoint.write_atomically = my_write
train.main(ARGV)
"""


def killed(out, bomb, resume):
    """Runs train.py until the bomb goes off."""
    argv = [*TINY, f"--out={out}", *(["--resume"] if resume else [])]
    values = "".join(f"{name} = {value!r}\n" for name, value in dict(ROOT=str(ROOT), BOMB=bomb, ARGV=argv).items())
    done = subprocess.run([sys.executable, "-c", values + DRIVER], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, f"{bomb} did not go off: {done.stdout[-500:]} {done.stderr[-2000:]}"


def command_line(*argv):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def log_of(out):
    """The lines of log.jsonl without wall time."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items()
             if not name.startswith("seconds") and not name.endswith("tokens_per_second")} for line in lines]


def flat(value, name=""):
    """Nested dicts and lists of a checkpoint -> one dict of dotted names."""
    if isinstance(value, dict):
        return {key: leaf for part, inner in value.items() for key, leaf in flat(inner, f"{name}.{part}").items()}
    return {name: value}


def differences(a, b):
    """Dotted names under which two checkpoints differ by a bit; how the run was called is left out."""
    a, b = flat(a), flat(b)
    free = (".config.out", ".config.resume", ".log_bytes")      # the log's length: wall times have more digits or fewer
    return [name for name in a.keys() | b.keys() if name not in free and not (
        name in a and name in b and (torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor)
                                     else a[name] == b[name]))]


def moments(log, seed=0):
    """Seeded bombs in the order in which they go off, from what the uninterrupted run logged."""
    rng = random.Random(seed)
    count = {stage: sum(line["stage"] == stage for line in log) for stage in STAGES}
    # Steps with an update: a rollout of flat groups has no optimizer step.
    updates = sum("entropy" in line for line in log if line["stage"] == "rl")
    saves = {stage: (count[stage] - 1) // train.PRESETS["tiny"]["save_every"] for stage in STAGES}
    return [("save", "tokenizer.model", 1),
            ("step", "clip", rng.randint(1, count["clip"])),
            ("step", "align", rng.randint(1, count["align"])),
            ("save", "progress.pt", 1),
            ("line", "sft", rng.randint(1, 2)),
            ("unlink", "progress.pt", 1),
            ("step", "cot", rng.randint(4, count["cot"] // 2)),
            ("save", "progress.pt", rng.randint(1, saves["cot"] // 3)),
            ("save", "cot.pt", 1),
            ("step", "rl", rng.randint(4, updates)),
            ("save", "progress.pt", 1),
            ("step", "cot_continued", rng.randint(1, count["cot_continued"])),
            ("save", "filtered.pt", 1),
            ("save", "scores.json", rng.randint(1, 3))]


@pytest.mark.slow
def test_a_run_killed_at_seeded_moments_and_resumed_equals_one_that_was_not(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command_line(*TINY, f"--out={whole}")
    log = log_of(whole)
    assert [line["stage"] for line in log] == sorted((line["stage"] for line in log), key=STAGES.index)
    assert sum("entropy" in line for line in log if line["stage"] == "rl") >= 5         # RL did learn
    assert differences(checkpoint.load(whole / "cot.pt")["vlm"], checkpoint.load(whole / "rl.pt")["vlm"])

    resumed_at = []
    for bomb in moments(log):
        killed(broken, bomb, resume=(broken / "config.json").exists())
        done = [stage for stage in STAGES if (broken / f"{stage}.pt").exists()]
        resumed_at.append(STAGES[len(done)] if len(done) < len(STAGES) else "evaluation")
        for path in broken.glob("*.pt"):
            checkpoint.load(path)                                           # whatever is there is whole
    assert set(resumed_at) >= {*STAGES, "evaluation"}
    said = command_line(*TINY, f"--out={broken}", "--resume")
    assert "filtered: done before" in said

    for stage in STAGES:
        assert differences(checkpoint.load(whole / f"{stage}.pt"), checkpoint.load(broken / f"{stage}.pt")) == []
    assert log_of(broken) == log
    for name in ("results.json", "scores.json", "differences.json", "verdicts.json", "tokenizer.model", "probe.json",
                 "rollouts.jsonl"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    assert samples_shown(whole) == samples_shown(broken)
    assert sorted(path.name for path in broken.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert not (broken / "progress.pt").exists()


SHORT = ["--preset=tiny", "--patch=24", "--compare=none", "--clip-steps=2", "--align-steps=2", "--sft-steps=0",
         "--cot-steps=2", "--rl-steps=2", "--pictures=64", "--traces=32", "--rl-prompts=16", "--eval-greedy=2",
         "--eval-sampled=2", "--max-new=6", "--threads=1"]


def short_run(out, seed):
    train.main([*SHORT, "--rewards=spelling", "--gated=False", f"--seed={seed}", f"--out={out}"])
    states = {stage: checkpoint.load(out / f"{stage}.pt") for stage in ("clip", "align", "cot", "rl")}
    rows = json.loads((out / "scores.json").read_text())
    return states, rows, log_of(out)


def test_the_seed_decides_a_run_bit_by_bit(tmp_path, monkeypatch):
    # A reward that an untrained model earns differently from sample to sample, so that RL has updates as well.
    monkeypatch.setattr(curves, "curves", lambda *_: b"none")       # takes longer than the run
    monkeypatch.setitem(rewards.REWARDS, "spelling", lambda sample, text: float(len(set(text))))
    (one, scores, log), (two, scores_two, log_two), (other, _, log_other) = (
        short_run(tmp_path / name, seed) for name, seed in (("one", 0), ("two", 0), ("other", 1)))
    assert any("entropy" in line for line in log)
    for stage in one:
        assert differences(one[stage], two[stage]) == []
        model = "clip" if stage == "clip" else "vlm"
        same = flat(one[stage][model]).keys() - set(differences(one[stage][model], other[stage][model]))
        # What another seed leaves alone: biases and norms that no step has moved far, and nothing with two dimensions.
        assert [name for name in same if flat(one[stage][model])[name].dim() > 1] == []
    assert scores == scores_two and log == log_two
    assert log != log_other


@pytest.mark.slow
def test_seeds_side_by_side_equal_runs_of_their_own_and_resume_repeats_no_finished_stage(tmp_path):
    root, alone = tmp_path / "seeds", tmp_path / "alone"
    said = command_line(*SHORT, "--seeds=2", "--seed=3", "--jobs=2", f"--out={root}")
    assert "mean over 2 seeds [95 % t-interval over seeds] sd" in said
    command_line(*SHORT, "--seed=4", f"--out={alone}")
    for stage in ("clip", "align", "cot", "rl"):
        states = [checkpoint.load(folder / f"{stage}.pt") for folder in (alone, root / "seed-4")]
        assert [name for name in differences(*states) if name not in (".config.jobs", ".config.flags")] == []
    results = json.loads((root / "results.json").read_text())
    assert [row for row in results if row["seed"] == 4] == json.loads((alone / "results.json").read_text())
    assert {row["seed"] for row in results} == {3, 4}

    (root / "seed-3/rl.pt").unlink()
    before = (root / "seed-3/cot.pt").read_bytes()
    command_line(*SHORT, "--seeds=2", "--seed=3", "--jobs=2", f"--out={root}", "--resume")
    assert json.loads((root / "results.json").read_text()) == results
    assert (root / "seed-3/cot.pt").read_bytes() == before and (root / "seed-3/rl.pt").exists()
