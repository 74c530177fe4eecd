"""What --bench prints and what it compares with."""
import sys
from types import SimpleNamespace

import pytest
import torch

import train
from data.sample import Batch
from kernels import gpu_hour
from model import machine
from model.flops import Meter
from model.runs.config import change
from rl import bench, peers

TINY = ["--rl-steps=2", "--max-new=3", "--rl-batch=2", "--group=2", "--layers=2", "--width=32", "--heads=2",
        "--kv-heads=2", "--ff=32", "--clip-layers=2", "--image-size=16"]


def test_the_time_of_a_step_is_the_sum_of_the_medians_of_its_parts():
    lines = [dict(seconds_decode=decode, seconds_update=update, seconds=9.0)
             for decode, update in ((1.0, 3.0), (0.5, 5.0), (2.0, 1.0))]
    title, decode, update = bench.step_text("4 prompts", lines, {"update": 1.5}).splitlines()
    assert title == "4 prompts: 4.000 s (3.000-5.500) a step, median of 3"
    assert decode.split() == ["decode", "1.000", "s", "25.0", "%"]
    assert update == "  update     3.000 s  75.0 %, 2.0 times its floor of 1.500 s"


def test_floors_worked_by_hand():
    # 2 prompts of 10 tokens, 3 completions each: the second token meets 13 slots, the third 16, of 5 bytes.
    assert bench.cache_read(P=2, T=10, G=3, C=3, slot=5) == 2 * 5 * (13 + 16)
    work = dict(encode=2e9, decode=1e9, update=4e9)
    assert bench.floors(work, (1e9, 1e8), weights=3e8, cache=1e8) == dict(encode=2.0, decode=4.0, update=4.0)
    assert bench.floors(work, (1e9, 1e10), weights=3e8, cache=1e8)["decode"] == 1.0


def test_a_clock_counts_the_work_of_each_part():
    meter = Meter(5)
    clock = bench.WorkClock(torch.device("cpu"), meter)
    for name, flops in (("prefill", 3), ("decode", 4), ("prefill", 2)):
        meter.total += flops
        clock.lap(name)
    assert clock.work == dict(prefill=5, decode=4) and clock.laps.keys() == clock.work.keys()


def test_without_sharing_every_completion_stands_behind_its_own_prompt_and_picture():
    pixels = torch.arange(2.).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    batch = Batch(ids=torch.tensor([[1, 2], [3, 4]]), length=torch.tensor([2, 2]),
                  target=torch.zeros(2, 2, dtype=torch.bool), pixels=pixels, image_row=torch.tensor([0, 1]),
                  features=torch.zeros(0))
    rows = bench.unshared(batch, torch.tensor([[[5, 6, 7]] * 2, [[8, 9, 10]] * 2]))
    assert rows.ids.tolist() == [[1, 2, 5, 6, 7]] * 2 + [[3, 4, 8, 9, 10]] * 2
    assert rows.length.tolist() == [5] * 4 and rows.target.tolist() == [[False] * 2 + [True] * 3] * 4
    assert rows.image_row.tolist() == [0, 1, 2, 3] and rows.pixels[:, 0, 0, 0].tolist() == [0, 0, 1, 1]


def test_its_reward_differs_within_a_group_and_its_samples_come_back():
    assert bench.varied(None, "a") != bench.varied(None, "b") and 0 <= bench.varied(None, "a") < 1
    one, two = bench.samples(2, 8), bench.samples(2, 8)
    assert [sample.question for sample in one] == [sample.question for sample in two]
    assert one[0].images[0].shape == (8, 8, 3) and len(one[0].question.split()) == 12
    assert one[0].images[0].tobytes() == two[0].images[0].tobytes() != one[1].images[0].tobytes()


def test_what_sharing_saves_is_printed():
    found = dict(tokens=2.0, seconds=0.5, seconds_unshared=0.75, faster=1.5, reached=0.75)
    text = bench.prefix_text("4 prompts", found)
    assert text == "update, 4 prompts\n  2.00 times fewer tokens, 1.50 times faster (0.750 -> 0.500 s): 75 %"


def test_others_beside_ours_worked_by_hand():
    text = bench.versus_text("TRL", [3.0, 4.0, 8.0], [1.0, 2.0, 2.0])
    assert text == "TRL: 4.000 s (3.000-8.000), 3.0 times as long, turn by turn 2.0 to 4.0"
    laps = dict(prefill=[1.0, 2.0, 1.0], decode=[2.0, 3.0, 4.0])
    title, prefill, decode = bench.decode_text("8 rows", laps, 100, dict(prefill=0.5, decode=1.0)).splitlines()
    assert title == "8 rows: 5.000 s (3.000-5.000) a rollout, median of 3, 20 tokens a second"
    assert decode == "  decode     3.000 s, 3.0 times its floor of 1.000 s"


def test_a_rollout_is_timed_in_turns_with_generate(capsys):
    train.main(["--bench=decode", *TINY])
    text = capsys.readouterr().out
    assert "2 prompts x 2, 3 new tokens, 4 image tokens, 2 layers, cpu, float32" in text
    assert "generate: " in text and "turn by turn" in text


def test_a_step_is_timed_alone_where_trl_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(peers, "version", lambda package: "")
    train.main(["--bench=step", *TINY])
    text = capsys.readouterr().out
    assert "a step, median of 2" in text and "TRL" not in text


def test_a_step_is_timed_in_turns_with_trls(capsys):
    pytest.importorskip("trl")
    train.main(["--bench=step", *TINY])
    text = capsys.readouterr().out
    assert "a step, median of 2" in text and f"TRL {peers.version('trl')}: " in text


def test_the_bench_takes_as_many_layers_as_there_is_room_for(monkeypatch):
    cfg = change(train.Config(), **train.PRESETS["bench"] | dict(layers=40, width=512, heads=8, kv_heads=8, ff=1024))
    layers = []
    for room in (10 ** 12, 3 * 10 ** 9, 15 * 10 ** 8, 1):
        monkeypatch.setattr(machine, "room", lambda device: room)
        layers.append(train.bench_shape(SimpleNamespace(device=torch.device("cpu")), cfg).llm.layers)
    assert layers[0] == 40 > layers[1] > layers[2] > layers[3] == 1


def test_an_hour_on_a_gpu_leaves_what_it_found_whatever_a_part_does(tmp_path, monkeypatch):
    parts = [gpu_hour.Part("Good", ["-c", "print(6 * 7)"], 60),
             gpu_hour.Part("Slow", ["-c", "import time; print('begun', flush=True); time.sleep(60)"], 2),
             gpu_hour.Part("Bad", ["-c", "raise SystemExit(3)"], 60)]
    monkeypatch.setattr(gpu_hour, "parts", lambda cuda: parts)
    gpu_hour.main(tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text()
    assert "42" in text and "begun" in text
    assert "given up after 2 s" in text and "exit status 3" in text
    assert torch.__version__ in text and sys.version.split()[0] in text
