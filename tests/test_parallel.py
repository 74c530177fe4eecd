"""Several ranks against one process: the same completions, weights and numbers, whatever differs between ranks.

What runs on them stands in ranks.py. Ranks are processes of this machine that speak by gloo.
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ranks
import train
from model import parallel, watchdog
from model.optim import make_optimizer, stepper
from model.runs import checkpoint
from tiny import difference

ROOT = Path(train.__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def on_ranks(count, *words, nodes=1, timeout=300, **options):
    """Runs a script of ROOT on so many ranks -> the finished process. nodes: of a group of ranks each."""
    if nodes == 1:
        command = [*TORCHRUN, "--standalone", f"--nproc-per-node={count}", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=QUIET, cwd=ROOT, **options)
    port = 20000 + os.getpid() % 20000
    groups = []
    for node in range(nodes):
        command = [*TORCHRUN, f"--nnodes={nodes}", f"--node-rank={node}", "--master-addr=127.0.0.1",
                   f"--master-port={port}", f"--nproc-per-node={count // nodes}", *words]
        groups.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=QUIET,
                                       cwd=ROOT))
    said = [group.communicate(timeout=timeout)[0] for group in groups]
    return subprocess.CompletedProcess(command, max(abs(group.returncode) for group in groups), said[0], said[1])


def cases_on(count, folder, *words, nodes=1):
    """What the cases of ranks.py leave on so many ranks."""
    out = folder / "found.pt"
    done = on_ranks(count, "tests/ranks.py", str(out), *words, nodes=nodes)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What the cases leave in one process."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: ranks.step(switches, folder=folder, **how) for name, (switches, how) in ranks.CASES.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return cases_on(2, tmp_path_factory.mktemp("two"), "--shard=none,full")


def check_equal(found, wanted):
    """Raises AssertionError unless completions are the same tokens, and weights and numbers equal to rounding."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name.startswith("ids"):
            assert torch.equal(found[name], value), name
        elif name.startswith("gradient"):
            assert difference(found[name], value) < 1e-5, name
        elif name.startswith("weight"):
            assert difference(found[name], value) < 1e-12, name
        else:
            assert torch.allclose(found[name].double(), value.double(), rtol=1e-9, atol=1e-9, equal_nan=True), name


def test_the_cases_are_what_they_are_named_after(alone):
    before = ranks.model().state_dict()

    def moved(case):
        return [name for name, value in before.items() if not torch.equal(alone[case][f"weight policy.{name}"], value)]

    assert all(moved(name) for name in alone if name not in ("flat everywhere", "not finite", "loss not finite",
                                                             "ends early", "sampled in parts", "adapters",
                                                             "adapters, exact KL", "single precision"))
    assert moved("flat everywhere") == moved("not finite") == moved("loss not finite") == []
    assert alone["not finite"]["skipped"] == alone["loss not finite"]["skipped"] == 1
    assert alone["stopped"]["stopped 0"] == 1 and alone["stopped"]["updates 0"] < 4
    assert alone["flat on one rank"]["flat 0"] == 0.75
    assert alone["adaptive KL"]["kl_coef"] != 0.04
    ends = (alone["ends early"]["ids 0"] == ranks.TOY.eos_id).any(-1)
    assert ends[1].all() and not ends[0].all()          # on the second of two ranks all rows end, on the first not


@pytest.mark.parametrize("name", ranks.CASES)
@pytest.mark.parametrize("shard", ["none", "full"])
def test_two_ranks_equal_one_process(two, alone, shard, name):
    check_equal(two[f"{shard}: {name}"], alone[name])


@pytest.mark.slow
def test_four_ranks_equal_one_process_in_one_node_and_in_two(tmp_path, alone):
    for nodes, shards in ((1, "none,full"), (2, "hybrid")):
        found = cases_on(4, tmp_path, f"--shard={shards}", nodes=nodes)
        assert len(found) == len(alone) * len(shards.split(","))
        for key, one in found.items():
            check_equal(one, alone[key.partition(": ")[2]])


# ---------------------------------------------------------------- planted mistakes

@pytest.mark.slow
@pytest.mark.parametrize("mistake", ranks.MISTAKES)
def test_a_planted_mistake_is_seen_or_ended_by_the_watchdog(mistake, tmp_path, alone):
    case = ranks.MISTAKES[mistake]
    shard = "full" if mistake == "no dummy" else "none"
    out = tmp_path / "found.pt"
    began = time.monotonic()
    done = on_ranks(2, "tests/ranks.py", str(out), f"--mistake={mistake}", f"--shard={shard}", "--patience=5")
    if done.returncode == 0:
        with pytest.raises(AssertionError):
            check_equal(torch.load(out, weights_only=True)[f"{shard}: {case}"], alone[case])
        return
    assert time.monotonic() - began < 60
    assert f"at {case}, {shard}" in done.stderr
