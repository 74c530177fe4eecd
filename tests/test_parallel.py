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
from data.records import RecordFile
from model import parallel, sharding, watchdog
from model.runs import checkpoint
from model.runs.config import change
from rl.recorder import FILE
from rl.report.log import read_log
from test_serve import TOKENIZER, VLM
from tiny import difference

ROOT = Path(train.__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def launcher(count):
    """What a script of ROOT and its flags stand behind, to run on so many ranks of one node; 1: without torchrun."""
    if count == 1:
        return [sys.executable]
    return [*TORCHRUN, "--standalone", f"--nproc-per-node={count}"]


def on_ranks(count, *words, nodes=1, timeout=600, **options):
    """Runs a script of ROOT on so many ranks -> the finished process. nodes: of a group of ranks each."""
    if nodes == 1:
        command = [*launcher(count), *words]
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
    return cases_on(2, tmp_path_factory.mktemp("two"), "--shard=none,some")


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
                                                             "adapters, exact KL", "single precision",
                                                             "half precision"))
    assert moved("flat everywhere") == moved("not finite") == moved("loss not finite") == []
    assert alone["not finite"]["skipped"] == alone["loss not finite"]["skipped"] == 1
    assert alone["stopped"]["stopped 0"] == 1 and alone["stopped"]["updates 0"] < 4
    assert alone["flat on one rank"]["flat 0"] == 0.75
    assert alone["adaptive KL"]["kl_coef"] != 0.04
    ends = (alone["ends early"]["ids 0"] == ranks.TOY.eos_id).any(-1)
    assert ends[1].all() and not ends[0].all()          # on the second of two ranks all rows end, on the first not


def exact(names):
    """Those of the cases that are compared with one process: in bfloat16 a batch of another size rounds to other
    tokens."""
    return [name for name in names if not name.endswith("half precision")]


@pytest.mark.parametrize("name", exact(ranks.CASES))
def test_two_ranks_equal_one_process(two, alone, name):
    check_equal(two[f"none: {name}"], alone[name])


@pytest.mark.parametrize("name", exact(ranks.SOME))
def test_two_ranks_with_weights_in_shards_equal_one_process(two, alone, name):
    check_equal(two[f"full: {name}"], alone[name])


def test_in_half_precision_shards_have_the_gradients_of_whole_weights(two):
    whole, shards = (two[f"{shard}: half precision"] for shard in ("none", "full"))
    assert shards.keys() == whole.keys()
    assert max(difference(shards[name], gradient) for name, gradient in whole.items()) < 0.05       # of rounding


@pytest.mark.slow
def test_four_ranks_equal_one_process_in_one_node_and_in_two(tmp_path, alone):
    for nodes, shards in ((1, "none,full"), (2, "hybrid")):
        found = cases_on(4, tmp_path, f"--shard={shards}", nodes=nodes)
        assert len(found) == len(alone) * len(shards.split(","))
        for key in exact(found):
            check_equal(found[key], alone[key.partition(": ")[2]])


# ---------------------------------------------------------------- what models are asked outside training

def leaves(value):
    """All names and values of nested lists and dicts."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def check_alike(found, wanted, most):
    """Raises AssertionError unless two nested lists are equal, their numbers to `most`."""
    found = [*leaves(found)]
    wanted = [*leaves(wanted)]
    assert len(found) == len(wanted) > 0
    for place, (ours, theirs) in enumerate(zip(found, wanted)):
        is_close = isinstance(theirs, float) and abs(ours - theirs) <= most
        assert ours == theirs or is_close, place


@pytest.fixture(scope="module")
def answers_alone():
    return json.loads(json.dumps({name: ask() for name, ask in ranks.ANSWERS.items()}))


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_all_ranks_get_the_answers_of_one_process(count, tmp_path, answers_alone):
    out = tmp_path / "answers.json"
    done = on_ranks(count, "tests/ranks.py", str(out), "--answers")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert len(found) == count
    for of_rank in found:
        assert of_rank.keys() == answers_alone.keys()
        for name, wanted in answers_alone.items():
            check_alike(of_rank[name], wanted, 1e-9)


def test_what_is_recorded_of_rollouts_is_of_groups_that_differ_and_of_every_second_step(answers_alone):
    lines = answers_alone["rollouts.jsonl, grpo"]
    assert {line["step"] for line in lines} == {0, 2}
    assert {line["role"] for line in lines} >= {"best", "worst", "followed"}
    used = [completion for line in lines if line["updated"] for completion in line["completions"]]
    assert len({str(completion["ratio"]) for completion in used}) > len(used) / 2


# ---------------------------------------------------------------- planted mistakes

@pytest.mark.slow
@pytest.mark.parametrize("mistake", ranks.MISTAKES)
def test_a_planted_mistake_is_seen_or_ended_by_the_watchdog(mistake, tmp_path, alone):
    case = ranks.MISTAKES[mistake]
    shard = "full" if mistake == "no dummy" else "none"
    out = tmp_path / "found.pt"
    done = on_ranks(2, "tests/ranks.py", str(out), f"--mistake={mistake}", f"--shard={shard}", "--patience=5")
    if done.returncode == 0:
        with pytest.raises(AssertionError):
            check_equal(torch.load(out, weights_only=True)[f"{shard}: {case}"], alone[case])
        return
    assert f"at {case}, {shard}" in done.stderr             # who and where, by the watchdog or by who it left behind


# ---------------------------------------------------------------- the watchdog

class Store:
    """In the place of torchrun's."""

    def __init__(self):
        self.kept = {}

    def set(self, key, value):
        self.kept[key] = value.encode()

    def get(self, key):
        return self.kept[key]

    def check(self, keys):
        return all(key in self.kept for key in keys)


def dogs(count, patience=100):
    store = Store()
    return [watchdog.Watchdog(store, rank, count, patience) for rank in range(count)]


def beat(some):
    for dog in some:
        dog.tell()
    for dog in some:
        dog.listen()


def test_a_rank_that_falls_silent_is_named_with_its_place():
    one, two, three = dogs(3)
    two.at = "rl, step 3"
    two.waiting_for = "the gradients"
    beat([one, two, three])
    now = time.monotonic()
    assert one.fault(now) == ""
    one.heard[1] = now - watchdog.SILENCE - 1
    assert "rank 1 has been silent for 50 s; it was at rl, step 3, waiting for the gradients." in one.fault(now)
    beat([two])                     # it was only slow
    one.listen()
    assert one.fault(time.monotonic()) == ""


def test_where_no_rank_gets_on_all_are_named_those_together_that_are_at_one_place():
    every = dogs(3)
    for dog, place in zip(every, ("rl, step 3", "rl, step 2", "rl, step 3")):
        dog.at = place
        dog.marks = 1
    beat(every)
    first = every[0]
    before = first.moved
    first.heard = dict.fromkeys(range(3), before + 101)
    said = first.fault(before + 101)
    assert "no rank has got on for 100 s: ranks 0, 2 at rl, step 3; rank 1 at rl, step 2." in said
    assert first.fault(before + 99) == ""
    every[1].marks = 2              # one rank that gets on is enough
    beat(every)
    assert first.moved > before


# ---------------------------------------------------------------- runs

# Few steps, but completions that differ, so that reinforcement learning has something to learn from.
RUN = ["--preset=tiny", "--device=cpu", "--compare=none", "--clip-steps=4", "--align-steps=4", "--sft-steps=4",
       "--cot-steps=30", "--cot-lr=1e-2", "--forget-close=0.5", "--gated=False", "--max-new=16", "--rl-steps=6",
       "--save-every=2", "--eval-greedy=4", "--eval-sampled=2", "--threads=1", "--dtype=float64"]


def tensors_of(value, name=""):
    """Nested dicts of a checkpoint -> {dotted name: tensor}."""
    if isinstance(value, dict):
        return {key: leaf for part, inner in value.items() for key, leaf in tensors_of(inner, f"{name}.{part}").items()}
    return {name: value} if torch.is_tensor(value) else {}


def compared(name, value):
    """What of a tensor is compared: all but the bias of keys, which changes no attention: what moves it is rounding,
    which Adam makes as large as any step."""
    if not name.endswith("in_proj_bias"):
        return value
    of_queries, _, of_values = value.chunk(3)
    return torch.cat([of_queries, of_values])


def check_same_run(folder, wanted, most=0.0):
    """Raises AssertionError unless two runs left the same stages, their weights equal to `most` of a tensor's largest
    entry, gave the same answers, and recorded the same rollouts."""
    names = sorted(path.name for path in wanted.glob("*.pt"))
    assert sorted(path.name for path in folder.glob("*.pt")) == names
    for name in names:
        ours, theirs = (tensors_of(checkpoint.load(place / name)) for place in (folder, wanted))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if value.is_floating_point():
                assert difference(compared(key, ours[key]), compared(key, value)) <= most, (name, key)
    for name in ("scores.json", "interventions.json"):
        ours, theirs = (json.loads((place / name).read_text()) for place in (folder, wanted))
        assert ours == theirs, name
    check_alike(read_log(folder / FILE), read_log(wanted / FILE), 1.1e-5)           # of the last digit that is written
    assert not [path.name for path in folder.iterdir() if path.name.endswith(".partial")]


def finished(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a run in one process and of uninterrupted runs on two ranks."""
    root = tmp_path_factory.mktemp("runs")
    done = subprocess.run([sys.executable, "train.py", *RUN, f"--out={root / 'alone'}"], capture_output=True, text=True,
                          env=QUIET, cwd=ROOT)
    assert "rank" not in finished(done)
    for shard in ("none", "full"):
        out = finished(on_ranks(2, "train.py", *RUN, f"--shard={shard}", "--check-ranks=1", f"--out={root / shard}"))
        assert out.count("run folder") == 1                 # the first rank alone prints
    return root


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_whole_run_on_two_ranks_equals_one_in_one_process(runs, shard):
    log = [json.loads(line) for line in (runs / shard / "log.jsonl").read_text().splitlines()]
    assert any(line.get("updates") for line in log)
    check_same_run(runs / shard, runs / "alone", most=1e-10)


def workers_of(process):
    """Process ids of torchrun's ranks."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def lines_of(folder):
    log = folder / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def killed_at(line, rank, command, folder):
    """Starts a run, and kills a rank once its log has so many lines -> what it said. Raises AssertionError unless all
    its processes are gone within a minute."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=QUIET,
                               cwd=ROOT)
    while lines_of(folder) < line:
        assert process.poll() is None, process.stdout.read()[-3000:]
        time.sleep(0.02)
    workers = workers_of(process)
    os.kill(workers[rank], signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    return said


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_run_whose_ranks_are_killed_and_resumed_ends_with_the_same_bits(runs, shard, tmp_path):
    # SEETHINK_KILLS=10: at as many moments.
    out = tmp_path / "killed"
    moments = torch.linspace(44, 6, int(os.environ.get("SEETHINK_KILLS", 1))).long().flip(0).tolist()
    command = [*launcher(2), "train.py", *RUN, f"--shard={shard}", f"--out={out}"]
    for number, line in enumerate(moments):
        said = killed_at(line, number % 2, [*command, *["--resume"] * bool(number)], out)
        assert said.count("another rank") == 1
        assert "--resume goes on" in said
    finished(subprocess.run([*command, "--resume"], capture_output=True, text=True, env=QUIET, cwd=ROOT))
    check_same_run(out, runs / shard)


@pytest.mark.slow
def test_torchrun_goes_on_by_itself_from_the_last_checkpoint(runs, tmp_path):
    out = tmp_path / "restarted"
    process = subprocess.Popen([*launcher(2), "--max-restarts=1", "train.py", *RUN, f"--out={out}"],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=QUIET, cwd=ROOT)
    while lines_of(out) < 20:
        time.sleep(0.02)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    assert said.count("done before") >= 3
    check_same_run(out, runs / "none")


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [((1, "none"), (2, "full")), ((2, "full"), (1, "none")),
                                           ((2, "full"), (4, "hybrid")), ((2, "none"), (2, "full"))])
def test_a_run_is_resumed_by_another_number_of_ranks(runs, before, after, tmp_path):
    out = tmp_path / "resumed"

    def command(ranks_and_shard):
        count, shard = ranks_and_shard
        return [*launcher(count), "train.py", *RUN, f"--shard={shard}", f"--out={out}"]

    process = subprocess.Popen(command(before), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=QUIET,
                               cwd=ROOT, start_new_session=True)
    while lines_of(out) < 46:           # in rl
        assert process.poll() is None, process.stdout.read()[-3000:]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (out / "progress.pt").exists()
    finished(subprocess.run([*command(after), "--resume"], capture_output=True, text=True, env=QUIET, cwd=ROOT))
    check_same_run(out, runs / "alone", most=1e-10)


# ---------------------------------------------------------------- a teacher's records

@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A checkpoint in fp64 whose replies end at other lengths, and teach nothing."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    checkpoint.save(path, dict(stage="cot", method="direct", vlm_config=VLM.config_dict(), vlm=VLM.state_dict(),
                               tokenizer=TOKENIZER.saved, config=dict(template="brief", max_new=12, data="")))
    return path


def teach(teacher, folder, *words):
    """The command that writes folder/mine.jsonl, behind `python` or torchrun."""
    return ["train.py", "--stage=teach", f"--teacher={teacher}", f"--records={folder / 'mine.jsonl'}", "--device=cpu",
            "--threads=1", "--teacher-jobs=3", *words]


def check_same_records(folder, wanted):
    """Raises AssertionError unless two folders of records and pictures hold the same bytes; what a kill left of a
    picture, which has another name, does not count."""
    files = []
    for place in (folder, wanted):
        whole = [path for path in place.rglob("*") if path.is_file() and path.suffix != ".partial"]
        files.append({str(path.relative_to(place)): path.read_bytes() for path in whole})
    assert files[0] == files[1]


@pytest.mark.slow
def test_two_ranks_write_the_records_of_one_process(teacher, tmp_path):
    # 8 questions in threes: of the last two batches' second tries a rank may have none.
    words = ["--traces=8", "--teacher-prompting=stages"]
    for name, count in (("alone", 1), ("two", 2)):
        said = finished(on_ranks(count, *teach(teacher, tmp_path / name, *words)))
        assert said.count("of 16 replies kept") == 1
    lines = [json.loads(line) for line in (tmp_path / "alone" / "mine.jsonl").read_text().splitlines()]
    assert len({json.dumps(line["text"]) for line in lines if line.get("attempt")}) > 8
    check_same_records(tmp_path / "two", tmp_path / "alone")


def records_of(folder):
    path = folder / "mine.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_records_are_gone_on_with_by_another_number_of_ranks(before, after, teacher, tmp_path):
    # Greedy, since sampled replies depend on which questions are asked together.
    words = ["--traces=30", "--teacher-temperature=0", "--teacher-tries=1"]
    killed = [*launcher(before), *teach(teacher, tmp_path / "killed", *words)]
    process = subprocess.Popen(killed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=QUIET, cwd=ROOT)
    while records_of(tmp_path / "killed") < 6 + 5:          # 6 are held out
        assert process.poll() is None, process.stdout.read()[-3000:]
        time.sleep(0.005)
    os.kill(workers_of(process)[1] if before == 2 else process.pid, signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert said.count("the same command goes on") == before - 1
    assert records_of(tmp_path / "killed") < 36
    for name, count in (("killed", after), ("whole", 1)):
        finished(on_ranks(count, *teach(teacher, tmp_path / name, *words)))
    check_same_records(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_records_that_another_process_writes_end_all_ranks_with_a_sentence(teacher, tmp_path):
    with RecordFile(tmp_path / "mine.jsonl"):
        done = on_ranks(2, *teach(teacher, tmp_path, "--traces=2"), timeout=120)
    assert done.returncode
    assert done.stderr.count("mine.jsonl is in use by another process") == 1


@pytest.mark.parametrize("flags, said", [
    (dict(), "--teacher= must be a checkpoint or a LLaVA folder with --stage=teach under torchrun"),
    (dict(teacher="http://h/v1"), "--teacher=http://h/v1 must be a checkpoint or a LLaVA folder with --stage=teach"),
    (dict(teacher="mine.py:teach"), "--teacher=mine.py:teach must be a checkpoint"),
    (dict(teacher="a.pt", shard="full"), "--shard=full must be none with --stage=teach")])
def test_only_a_model_of_ones_own_teaches_on_several_ranks(flags, said, monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 2)
    train.check_ranks(change(train.Config(), stage="teach", teacher="a.pt"))
    with pytest.raises(ValueError, match=said):
        train.check_ranks(change(train.Config(), stage="teach", **flags))


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("flag, said", [
    ("--shard=full", "--shard=full must come with torchrun"),
    ("--offload", "--offload=True must come with --shard=full or hybrid"),
    ("--patience=0", "--patience=0 must lie in \\[1, 1000000\\]")])
def test_options_of_ranks_that_cannot_work_are_refused_in_one_sentence(flag, said):
    with pytest.raises(ValueError, match=said):
        train.main([flag])


@pytest.mark.parametrize("options", [dict(seeds=2), dict(grid="norm=token"), dict(tune="rl", seed=100),
                                     dict(bench="step"), dict(explain=1, stage="rl")])
def test_what_one_process_does_is_refused_on_several_ranks(options, monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 2)
    with pytest.raises(ValueError, match="must come without torchrun: it runs as one process"):
        train.check_ranks(change(train.Config(), **options))


def test_shards_are_not_offloaded_from_a_cpu(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(ValueError, match="--offload=True must be left out on a CPU"):
        parallel.start(parallel.ParallelOptions(shard="full", offload=True), "cpu")


def test_hybrid_shards_want_nodes_of_the_same_size(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(sharding, "gather", lambda mine: [mine] * 4)
    assert sharding.ranks_of_a_node() == 4
    monkeypatch.setattr(sharding, "gather", lambda mine: [mine] * 4 + [2, 2])
    monkeypatch.setattr(parallel, "world", lambda: 6)
    with pytest.raises(ValueError, match="the same number of ranks in every node, not 2 and 4"):
        train.check_ranks(change(train.Config(), shard="hybrid"))


@pytest.mark.parametrize("device, count, said", [
    ("auto", 4, "--device=auto must be cpu where torchrun starts 4 ranks on a machine of 2 GPUs"),
    ("cuda:1", 2, "--device=cuda:1 must be auto, cuda or cpu"), ("auto", 2, ""), ("cuda", 2, ""), ("cuda:1", 1, ""),
    ("cpu", 4, "")])
def test_ranks_take_gpus_only_where_the_device_is_one(device, count, said, monkeypatch):
    class Joined(Exception):
        pass

    def join(backend, **options):
        raise Joined(backend)

    taken = []
    for name, value in dict(TORCHELASTIC_RUN_ID="x", RANK=1, LOCAL_RANK=1, WORLD_SIZE=count,
                            LOCAL_WORLD_SIZE=count).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(watchdog, "store_of_torchrun", lambda *_: None)
    monkeypatch.setattr(parallel.dist, "init_process_group", join)
    with pytest.raises(ValueError if said else Joined, match=said or ("gloo" if device == "cpu" else "nccl")):
        parallel.start(parallel.ParallelOptions(), device)
    assert taken == ([] if said or device == "cpu" else [1])
