"""The comparison long_walks from the command line, small."""
import json

import pytest
import torch

import train
from data import long_walks, scenes
from model.runs import checkpoint
from rl import rewards

TINY = ["--preset=tiny", "--threads=1", "--world=long_walks", "--compare=long_walks", "--clip-steps=2",
        "--align-steps=4", "--sft-steps=4", "--cot-steps=6", "--eval-greedy=2", "--eval-sampled=2", "--eval-samples=8",
        "--group=5"]
START = "clip,align,sft,cot"


def read(path):
    return json.loads(path.read_text())


def test_a_curriculum_asks_the_shortest_walks_first_and_in_the_end_all(tmp_path, monkeypatch):
    steps = []                          # of the loop itself: the preflight samples in rl/forecast.py
    roll_out = train.roll_out

    def see(sampler, tokenizer, samples, *rest):
        steps.append([scenes.difficulty(sample) for sample in samples])
        return roll_out(sampler, tokenizer, samples, *rest)
    monkeypatch.setattr(train, "roll_out", see)
    train.main([*TINY, f"--stage={START},rl_curriculum", "--rl-steps=16", "--rl-batch=8",
                "--inspect-every=0", f"--out={tmp_path / 'run'}"])            # records ask prompts of their own
    drawn = scenes.load("train", 64, train.STREAMS["rl"], world=long_walks.WORLD)
    drawn = sorted(map(scenes.difficulty, drawn))
    for step, hops in enumerate(steps):
        count = train.curriculum.open_prompts(step / 16, 64)
        assert max(hops) <= drawn[count - 1]
    assert len(steps) == 16 and {*steps[0]} == {1} and {hops for step in steps[8:] for hops in step} == {1, 2, 3}


def test_training_for_pass_at_k_moves_the_model(tmp_path, monkeypatch):
    # so small a model is never right: a completion shall count as right by its length
    monkeypatch.setitem(rewards.REWARDS, "correctness", lambda sample, text: float(len(text) % 2))
    out = tmp_path / "run"
    train.main([*TINY, f"--stage={START},rl_pass_at_k", "--rewards=correctness:1", "--gated=False", "--rl-steps=2",
                f"--out={out}"])
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert sum(line.get("updates", 0) for line in lines if line["stage"] == "rl_pass_at_k") > 0
    before, after = (checkpoint.load(out / f"{name}.pt")["vlm"] for name in ("cot", "rl_pass_at_k"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_the_whole_comparison_leaves_its_report_and_its_arms_have_the_flops_of_rl(tmp_path, capsys):
    out = tmp_path / "run"
    train.main([*TINY, "--max-new=40", f"--out={out}"])
    methods = ["teacher", "cot", "grpo_token", "rl_slow", "rl_curriculum", "rl_pass_at_k", "filtered", "cot_continued"]
    rows = read(out / "growth.json")
    assert list(dict.fromkeys(row["method"] for row in rows)) == methods
    splits = ["id", *(f"walk{hops}" for hops in range(1, 7)), "crowded"]
    accuracies = [row for row in rows if row["metric"] == "growth: accuracy" and row["decoding"] == "t1"]
    assert [(row["method"], row["split"]) for row in accuracies] == [(m, s) for m in methods for s in splits]
    results = {(row["method"], row["split"]): row["value"] for row in read(out / "results.json")
               if (row["metric"], row["decoding"]) == ("accuracy", "t1")}
    assert all(results[row["method"], row["split"]] == pytest.approx(row["value"]) for row in accuracies)
    assert (out / "growth.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "Growth, T = 1: share that walks exactly as many hops as asked" in said and "Looks on id, T = 1" in said
    # how long the arms of RL at its FLOPs take is not for --rl-steps to tell
    assert (said.count("minutes in all"), said.count("until it has spent the FLOPs")) == (1, 3)
    budget = checkpoint.load(out / "rl.pt")["flops"]
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for arm in ("rl_slow", "rl_curriculum", "rl_pass_at_k"):
        flops = [0, *(line["flops"] for line in lines if line["stage"] == arm)]
        assert flops[-2] < budget <= flops[-1]


def test_the_preset_names_its_world_and_its_comparison():
    cfg = train.change(train.Config(), **train.PRESETS["long_walks"])
    assert cfg.stages()[-6:] == train.COMPARISONS["long_walks"] and cfg.check() == []
    teacher = train.Supply(cfg.data, cfg.teacher, 0).teacher
    assert (type(teacher), teacher.slip) == (long_walks.WalkTeacher, cfg.teacher.slip)
