"""Arms at equal FLOPs, points along their training and on-policy distillation, from the command line."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from data import chat, tokenizer
from data.supply import Supply
from model.runs import checkpoint

TINY = ["--preset=tiny", "--threads=1", "--clip-steps=2", "--align-steps=4", "--sft-steps=4", "--cot-steps=6",
        "--eval-greedy=4", "--eval-sampled=4", "--save-every=2"]
START = "clip,align,sft,cot"


def run(out, *argv):
    train.main([*TINY, f"--out={out}", *argv])
    return out


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    stages = f"{START},rl,rejection_iterated,filtered,perfect,distilled"
    return run(tmp_path_factory.mktemp("arms") / "run", f"--stage={stages}", "--curve=4", "--rl-steps=24")


def spent(folder, name):
    return checkpoint.load(folder / f"{name}.pt")["flops"]


def test_an_arm_ends_with_the_step_in_which_its_flops_reach_those_of_rl(arms):
    lines = [json.loads(line) for line in (arms / "log.jsonl").read_text().splitlines()]
    budget = spent(arms, "rl")
    for arm in ("rejection_iterated", "distilled"):
        flops = [line["flops"] for line in lines if line["stage"] == arm]
        assert flops[-2] < budget <= flops[-1] == spent(arms, arm), arm


def test_the_rate_of_an_arm_follows_the_share_of_its_flops(arms):
    lines = [json.loads(line) for line in (arms / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["stage"] == "rejection_iterated"]
    peak = train.Config().rl.rl_lr
    assert lines[0]["lr"] == pytest.approx(peak / 50)           # of 1000 shares 50 warm up
    share = lines[-2]["flops"] / spent(arms, "rl")              # before the last step
    done = (int(1000 * share) - 50) / 950
    assert lines[-1]["lr"] == pytest.approx(peak * (0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * done))))


def test_a_curve_starts_at_what_an_arm_starts_from_and_ends_at_its_checkpoint(arms):
    rows = [row for row in read(arms / "curve.json") if row["split"] == "id" and row["decoding"] == "t1"]
    assert {row["method"] for row in rows} == {"grpo_token", "rejection_iterated", "filtered", "perfect", "distilled"}
    cot = spent(arms, "cot")
    for name, before in (("rl", cot), ("filtered", cot), ("perfect", 0)):
        of_arm = [row for row in rows if row["stage"] == name]
        assert [row["point"] for row in of_arm][0] == 0 and of_arm[-1]["point"] == 4
        assert of_arm[0]["flops"] == before and of_arm[-1]["flops"] == before + spent(arms, name)
        flops = [row["flops"] for row in of_arm]
        assert flops == sorted(flops) and len({*flops}) == len(flops) > 2
    assert {row["split"] for row in read(arms / "curve.json")} == {"validation", "id", "crowded", "pairs", "walk3",
                                                                   "walk4"}


def test_a_point_of_a_curve_is_the_model_at_its_share_of_the_stage(arms):
    lines = [json.loads(line) for line in (arms / "log.jsonl").read_text().splitlines() if '"stage": "rl"' in line]
    assert checkpoint.load(arms / "curve/rl-2.pt")["flops"] == lines[5]["flops"]            # (2/4)^2 of 24 steps
    half, whole = (checkpoint.load(path)["vlm"] for path in (arms / "curve/perfect-2.pt", arms / "perfect.pt"))
    assert any(not torch.equal(half[name], whole[name]) for name in whole)


def test_the_best_point_of_a_supervised_arm_is_chosen_on_validation_prompts_and_is_an_arm(arms):
    results = {row["method"] for row in read(arms / "results.json")}
    assert {"filtered@best", "perfect@best"} <= results and "grpo_token@best" not in results


def test_no_point_is_lost_to_rounding():
    for points in (4, 100):
        shares = [(point / points) ** 2 for point in range(points + 1)]
        assert [train.points_behind(points, share) for share in shares] == [*range(points + 1)]


def test_points_are_chosen_by_200_validation_prompts_of_another_stream_than_the_tests(monkeypatch, arms, tmp_path):
    cfg = train.change(train.Config(), curve=4)
    asked = []

    def see(contender, cfg, splits):
        options = contender.judge(cfg.judge)
        for split, samples in splits.items():
            asked.append((split, samples[:options.eval_greedy], samples[:options.eval_sampled]))
        return {}
    monkeypatch.setattr(evaluation, "scores_of", see)
    supply = Supply(cfg.data, cfg.teacher, 0)
    followed = SimpleNamespace(cfg=cfg, supply=supply, folder=tmp_path, spent=lambda stages: 0,
                               path=lambda stage: arms / f"{stage}.pt", point=lambda stage, point: tmp_path / "none")
    tests = supply.tests(300)
    train.follow_curves(followed, ["filtered"], {"filtered": "filtered"}, tests)
    of_split = {split: (greedy, sampled) for split, greedy, sampled in asked}
    fresh = [sample.question for sample in supply.tests(200, "val")["id"]]
    for chosen in of_split.pop("validation"):
        assert [sample.question for sample in chosen] == fresh
    assert fresh[:100] != [sample.question for sample in tests["id"][:100]]
    assert all(len(greedy) == len(sampled) == 100 for greedy, sampled in of_split.values()) and len(of_split) == 5


def test_the_best_point_is_the_first_of_equals_and_never_the_start():
    rows = []
    for stage in ("filtered", "rl"):
        for point, value in enumerate((0.9, 0.2, 0.7, 0.7)):
            rows.append(dict(stage=stage, point=point, split="validation", decoding="t1", value=value))
            rows.append(dict(stage=stage, point=point, split="id", decoding="t1", value=1.0 - value))
            rows.append(dict(stage=stage, point=point, split="validation", decoding="greedy", value=point))

    class Folder:
        cfg = train.change(train.Config(), curve=3)

        @staticmethod
        def point(stage, point):
            return f"{stage}-{point}"

    assert train.best_along(Folder, rows) == {"filtered@best": train.Contender("filtered-2")}


@pytest.mark.slow
def test_an_arm_that_was_interrupted_goes_on_to_the_same_end(tmp_path, monkeypatch):
    flags = [f"--stage={START},rl,perfect,distilled", "--rl-steps=30", "--curve=3"]
    whole = run(tmp_path / "whole", *flags)
    log = train.Run.log

    def stop(self, **line):
        if line.get("stage") == "distilled" and line["step"] == 3:
            raise KeyboardInterrupt
        log(self, **line)

    monkeypatch.setattr(train.Run, "log", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", *flags)
    monkeypatch.undo()
    train.main(["--resume", f"--out={tmp_path / 'stopped'}"])
    for name in ("distilled.pt", "curve/distilled-1.pt", "curve/distilled-2.pt"):
        one, two = (checkpoint.load(folder / name) for folder in (whole, tmp_path / "stopped"))
        assert one["flops"] == two["flops"]
        assert all(torch.equal(one["vlm"][key], two["vlm"][key]) for key in one["vlm"]), name
    assert read(whole / "curve.json") == read(tmp_path / "stopped" / "curve.json")


def test_a_teacher_from_a_file_and_what_cannot_be_one(arms, tmp_path, capsys):
    init = [f"--init={arms / 'cot.pt'}", "--stage=distilled", "--rl-steps=2"]
    run(tmp_path / "run", *init, f"--distill-from={arms / 'perfect.pt'}")
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["kl_ref"] > 0 for line in lines)
    with pytest.raises(ValueError, match="--distill-from=perfect must be a stage that comes before distilled"):
        run(tmp_path / "one", *init)
    with pytest.raises(ValueError, match="--distill-from=nothing.pt must be a stage that .* or a checkpoint"):
        run(tmp_path / "two", *init, "--distill-from=nothing.pt")
    with pytest.raises(ValueError, match="--distill-from=.*cot.pt must be another model than"):
        run(tmp_path / "three", *init, f"--distill-from={arms / 'cot.pt'}")
    assert not any((tmp_path / name / "config.json").exists() for name in ("one", "two", "three"))


def test_a_file_that_cannot_teach_is_refused_before_anything_is_trained(arms, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Run, "steps", lambda *_: pytest.fail("training began"))
    state = checkpoint.load(arms / "perfect.pt")
    other = tokenizer.train(["some other words"] * 9, chat.TAGS, 300).saved
    checkpoint.save(tmp_path / "words.pt", state | dict(tokenizer=other))
    wide = train.VLM.from_config(state["vlm_config"] | dict(projector="resampler", queries=5))
    checkpoint.save(tmp_path / "wide.pt", state | dict(vlm=wide.state_dict(), vlm_config=wide.config_dict()))
    stages = f"--stage={START},rl,distilled"
    for name, said in (("words", "have the tokenizer of the student"), ("wide", "make 16 tokens of a picture of 48"),
                       ("clip", "holds no vision-language model")):
        path = arms / "clip.pt" if name == "clip" else tmp_path / f"{name}.pt"
        with pytest.raises(ValueError, match=said):
            run(tmp_path / name, stages, f"--distill-from={path}")
        assert not (tmp_path / name / "config.json").exists()


@pytest.mark.parametrize("options, said", [
    (dict(kl="k3"), "--kl=k3 must be exact, and --kl-in loss, with the stage distilled"),
    (dict(ref_sync=5), "--ref-sync=5 must be 0 with the stage distilled"),
    (dict(kl_coef=0.0), "--kl-coef=0.0 must be above 0 with the stage distilled"),
    (dict(distill_from="clip"), "--distill-from=clip must be a stage with a language model that comes before")])
def test_switches_that_leave_no_distillation_are_refused(options, said):
    with pytest.raises(ValueError) as caught:
        train.change(train.Config(), stage="cot,rl,distilled", flags=" ".join(options), **options).check()
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_a_curve_needs_drawn_scenes(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match="--curve=3 must be 0 with data of your own"):
        train.main([f"--data=jsonl:{tmp_path / 'a.jsonl'}", "--curve=3"])


@pytest.mark.parametrize("options, said", [
    (dict(world="transfer", compare="generalisation"), "--curve=3 must be 0 with stages of a part of the questions"),
    (dict(world="transfer", stage="cot,gold_looks"), "--curve=3 must be 0 with stages of a part of the questions"),
    (dict(eval_set="val"), "--curve=3 must be 0 with --eval-set=val: its best points are chosen by those prompts")])
def test_a_curve_whose_points_would_be_chosen_by_the_wrong_prompts_is_refused(options, said):
    with pytest.raises(ValueError) as caught:
        train.change(train.Config(), curve=3, **options).check()
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
