"""What there is to run in the first hour on a GPU, in under ten minutes: `python -m kernels.bench --gpu-hour`.

Tests of all that has a GPU branch, every kernel against fp64 and timed, decoding and a step of RL, each in a process of
its own. RESULTS.md is written after each, so that nothing is lost where one hangs or the hour ends. Without a GPU: the
same with few tests and small sizes, to see that it works.
"""
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("sample", "row_logp", "linear_logp", "linear_kl", "policy_loss", "group_advantage", "gae", "prefix_attention",
         "decode_attention", "rms_norm", "generate", "shared_prefix", "update", "ops")


class Part(NamedTuple):
    """Arguments of Python; the seconds after which it is given up."""
    title: str
    arguments: list
    limit: int


def parts(cuda):
    """What to run, in order of what would be missed most."""
    if not cuda:
        return [Part("Tests", ["-m", "pytest", "-q", "tests/test_sample.py"], 120),
                Part("Kernels", ["-m", "kernels.bench", "--rows=256", "--vocab=2000", "--rounds=1", "--check"], 120),
                Part("Decoding", ["train.py", "--bench=decode", "--rl-steps=1", "--max-new=8"], 120),
                Part("A step", ["train.py", "--bench=step", "--rl-steps=1", "--max-new=8"], 120)]
    tests = [f"tests/test_{name}.py" for name in TESTS]
    bf16 = "--dtype=bfloat16"
    return [Part("Tests", ["-m", "pytest", "-q", *tests], 180),
            Part("Kernels", ["-m", "kernels.bench", "--check"], 120),
            Part("Decoding, 0.5 B", ["train.py", "--preset=bench-0.5b", "--bench=decode", bf16], 60),
            Part("Decoding, 7 B", ["train.py", "--preset=bench-7b", "--bench=decode"], 90),
            Part("A step, 0.5 B", ["train.py", "--preset=bench-0.5b", bf16], 60),
            Part("A step, 7 B", ["train.py", "--preset=bench-7b"], 90)]


def run(part):
    """-> what a part printed last, and how it ended."""
    start = time.perf_counter()
    try:
        done = subprocess.run([sys.executable, *part.arguments], cwd=ROOT, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, errors="replace", timeout=part.limit)
        printed = done.stdout
        ended = f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        printed = (error.stdout or b"").decode(errors="replace")
        ended = f"given up after {part.limit} s"
    return printed[-8000:].strip(), f"{ended}, {time.perf_counter() - start:.0f} s"


def main(path):
    """Runs all parts and writes `path` after each."""
    cuda = torch.cuda.is_available()
    card = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    text = (f"# What ran, and how fast\n\n`python -m kernels.bench --gpu-hour` on {card}, torch {torch.__version__}, "
            f"CUDA {torch.version.cuda}, Python {sys.version.split()[0]}.\n")
    for part in parts(cuda):
        print(part.title, flush=True)
        printed, ended = run(part)
        text += f"\n## {part.title}\n\n`python {' '.join(part.arguments)}`: {ended}\n\n```text\n{printed}\n```\n"
        path.write_text(text)
    print(f"written: {path}")
