"""Training for pass@k, the curriculum, and the report of how thoughts grow."""
import io
from itertools import combinations, product

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import train
from data import scenes
from kernels import group_advantage
from model.runs.config import change, from_command_line
from rl import curriculum
from rl.advantages import is_full, pass_at_k
from rl.report import growth
from rl.types import Rollout
from rl.update import estimate_advantages, select_groups


def by_enumeration(right, k):
    """The paper's definition: every group of k of the completions, its reward normalised over all groups, and for each
    completion the mean over the groups that hold it."""
    groups = list(combinations(range(len(right)), k))
    rewards = torch.tensor([float(any(right[i] for i in group)) for group in groups], dtype=torch.float64)
    deviation = rewards.std(correction=0)
    if deviation == 0:
        return [0.0] * len(right)
    normalised = (rewards - rewards.mean()) / deviation
    return [float(torch.stack([a for a, group in zip(normalised, groups) if i in group]).mean())
            for i in range(len(right))]


@pytest.mark.parametrize("G", (1, 2, 5, 6))
def test_pass_at_k_is_the_mean_over_all_groups_that_hold_a_completion(G):
    every = torch.tensor(list(product((False, True), repeat=G)))
    for k in range(1, G + 1):
        wanted = torch.tensor([by_enumeration(right, k) for right in every.tolist()])
        assert torch.allclose(pass_at_k(every, k), wanted, atol=1e-6), k


def test_pass_at_1_is_the_groups_mean_and_deviation():
    right = torch.tensor([[True, False, False, True, False], [True, True, True, True, False]])
    unbiased = group_advantage(right.double(), eps=0.0)             # over the deviation of G - 1
    assert torch.allclose(pass_at_k(right, 1).double(), unbiased * (5 / 4) ** 0.5, atol=1e-6)


def test_a_lone_right_completion_gains_more_by_pass_at_k_and_one_among_many_nothing():
    lone = torch.tensor([[True] + [False] * 7])
    assert pass_at_k(lone, 4)[0, 0] > 0 > pass_at_k(lone, 4)[0, 1]
    many = torch.tensor([[True] * 5 + [False] * 3])                 # every group of four holds a right one
    assert pass_at_k(many, 4).tolist() == [[0.0] * 8] and pass_at_k(many, 3)[0, 0] > 0


@pytest.mark.parametrize("k", (0, 6))
def test_a_k_that_no_group_has_is_an_error(k):
    with pytest.raises(ValueError, match=rf"^k={k} must lie in \[1, 5\], the completions of a prompt$"):
        pass_at_k(torch.zeros(2, 5, dtype=torch.bool), k)


def test_right_is_what_earns_every_reward_in_full():
    rewards = torch.tensor([[[1.0, 1.0, 0.3], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]])
    assert is_full(rewards, torch.tensor([1.0, 0.1, 0.0])).tolist() == [[True, False, False]]
    assert is_full(rewards, torch.tensor([1.0, 0.0, 0.0])).tolist() == [[True, False, True]]


def earned(*groups):
    """Groups of (correctness after the gate, format) -> a Rollout of completions of one token."""
    rewards = torch.tensor(groups, dtype=torch.float32)                             # (P, G, 2)
    P, G, _ = rewards.shape
    ones = torch.ones(P, G, 1)
    return Rollout(ids=ones.long(), mask=ones.bool(), logp=-ones, ended=ones[..., 0].bool(), rewards=rewards,
                   reward=(rewards * torch.tensor([1.0, 0.1])).sum(-1))


def test_an_update_for_pass_at_k_takes_well_formed_wrong_answers_for_wrong_and_drops_what_teaches_nothing():
    good, wrong, bad = (1, 1), (0, 1), (0, 0)
    rollout = earned([good, wrong, bad, bad], [wrong, wrong, bad, bad], [good, good, good, bad], [good] * 4)
    cfg = change(train.config_of(train.Config(), "rl_pass_at_k"), pass_k=2)

    class Rows:                                     # stands in for the Batch
        def rows(self, index):
            return index.tolist()
    experience = select_groups(Rows(), rollout, cfg)
    assert experience.batch == [0]                  # neither all wrong, nor fewer wrong ones than k
    learner = type("Learner", (), dict(reference=None, critic=None))
    found, _ = estimate_advantages(learner, experience, train.Rewards(cfg.reward), cfg)
    assert found.advantage[0, :, 0].tolist() == pytest.approx(by_enumeration([True, False, False, False], 2))


@pytest.mark.parametrize("flags, said", [
    (["--baseline=pass_at_k", "--pass-k=8"], "--pass-k=8 must lie below --group=8 with --baseline=pass_at_k"),
    (["--baseline=pass_at_k", "--rewards=correctness:1,iou:1"], "--rewards=correctness:1,iou:1 must hold with"),
    (["--baseline=pass_at_k", "--rewards=correctness:1,format:-1"], "--rewards=correctness:1,format:-1 must hold"),
    (["--baseline=pass_at_k", "--std=none"], "--std=none must be group with --baseline=pass_at_k"),
    (["--baseline=pass_at_k", "--overlong-share=0.1"], "--overlong-share=0.1 must be 0 with --baseline=pass_at_k"),
    (["--baseline=pass_at_k", "--kl-coef=0.1", "--kl-in=reward"], "--kl-in=reward must be loss with"),
    (["--curriculum", "--data=jsonl:/no"], "--curriculum=True must be false with --data=jsonl:/no: only drawn scenes"),
    (["--compare=long_walks"], "--compare=long_walks must come with drawn scenes and --world=long_walks"),
    (["--preset=long_walks", "--cot-format=llava_cot"], "--cot-format=llava_cot must be think with --world=long_"),
    (["--world=long_walks", "--cot-format=llava_cot"], "--cot-format=llava_cot must be think with --world=long_walks")])
def test_what_does_not_go_together_is_one_sentence(flags, said):
    # check alone: a run that wrongly goes on would train for minutes
    with pytest.raises(ValueError) as caught:
        from_command_line(train.Config, train.PRESETS, flags, train.__doc__).check()
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


@pytest.mark.parametrize("options, said", [
    (dict(distill_from="sft"), "--distill-from has no effect without the stage distilled"),
    (dict(distill_from="sft", compare="evidence"), ""),
    (dict(replay=0.5, stage="clip,align"), "--replay has no effect without the stage cot"),
    (dict(stage="cot,rl,negative", rates="rl:1e-3"), "--rates has none for negative: --rl-lr or --cot-lr holds, which "
     "beside rates from a ladder is no fair comparison"),
    (dict(stage="rl_walks", compare="generalisation", world="transfer"), "--compare=generalisation without the stage "
     "cot has nothing to hold gain and forgetting against"),
    (dict(replay=0.5), ""), (dict(replay=0.5, world="transfer", stage="replay_looks"), ""),
    (dict(curve=3, tune="cot", seed=100, eval_set="val"), "--curve has no effect with --tune, which follows no arm")])
def test_what_has_no_effect_is_noted(options, said):
    assert change(train.Config(), **options).check() == ([said] if said else [])


def test_rewards_of_weight_0_may_be_anything_beside_pass_at_k():
    cfg = change(train.Config(), baseline="pass_at_k", rewards="correctness:1,length:0")
    train.algorithms.check_pass_at_k(cfg)


def test_the_arms_differ_from_rl_in_one_thing_each():
    cfg = train.Config()
    names = train.COMPARISONS["long_walks"]
    assert names[:4] == ["rl", "rl_slow", "rl_curriculum", "rl_pass_at_k"]
    plain = train.flat(train.config_of(cfg, "rl"))
    for name, changed in (("rl_slow", {"rl_lr"}), ("rl_curriculum", {"curriculum"}), ("rl_pass_at_k", {"baseline"})):
        own = train.flat(train.config_of(cfg, name))
        assert {option for option in own if own[option] != plain[option]} == changed
        assert train.STAGES[name].starts_from == ("cot",) and train.STAGES[name].costs_like == ("rl",)
    assert train.config_of(cfg, "rl_slow").rl.rl_lr == plain["rl_lr"] / 4


# ---------------------------------------------------------------- the curriculum

def test_the_curriculum_opens_the_easy_third_first_and_all_from_half_time_on():
    counts = [curriculum.open_prompts(step / 100, 4800) for step in range(100)]
    assert counts[0] == 1600 and counts == sorted(counts)
    assert counts[49] < 4800 and {*counts[50:]} == {4800}
    assert counts[25] == 3200
    assert [curriculum.open_prompts(share, 1) for share in (0, 1)] == [1, 1]


def test_the_order_is_by_difficulty_and_otherwise_as_it_was():
    assert curriculum.by_difficulty(["bbb", "a", "ccc", "dd", "e"], len) == ["a", "e", "dd", "bbb", "ccc"]


# ---------------------------------------------------------------- the report

def completions():
    """Two prompts, four completions each: what is noted of them. Three looks are wrong, of which two are taken again,
    one of these for the better; one that was right is taken again, for the worse; one only says "wait"."""
    return dict(
        right=[[1, 0, 1, 1], [0, 0, 1, 0]], length=[[10, 12, 14, 16], [20, 20, 20, 24]], text=["", ""],
        kind=["walk4", "walk4"], asked=[[4] * 4] * 2, walked=[[4, 3, 4, 4], [3, 5, 4, 2]],
        rechecks=[[0, 0, 1, 0], [1, 2, 0, 1]], first=[[1, 0, 0, 1], [1, 0, 1, -1]], last=[[1, 0, 1, 1], [0, 0, 1, -1]],
        candidates=[[2] * 4, [3] * 4])


def value_of(found, **where):
    [row] = [row for row in found if all(row[name] == value for name, value in where.items())]
    return row["value"]


def test_the_report_counts_lengths_hops_and_looks_by_hand():
    found = growth.rows({"rl": {"walk4": {"t1": completions()}}}, seed=7)
    by_hand = {"accuracy": 4 / 8, "tokens": 17.0, "hops": 29 / 8, "as asked": 4 / 8, "re-checks": 4 / 8,
               "twice": 1 / 8, "look again": 4, "first look right": 4 / 7, "re-check after wrong": 2 / 3,
               "re-check after right": 1 / 4, "mended": 1 / 2, "mended by chance": 3 / 4, growth.AGAIN: 1 / 2,
               growth.NOT_AGAIN: 0.0}
    assert {row["metric"]: row["value"] for row in found} == pytest.approx(
        {f"growth: {name}": value for name, value in by_hand.items()})
    assert all((row["method"], row["split"], row["decoding"], row["seed"]) == ("rl", "walk4", "t1", 7) for row in found)


def test_pass_at_8_is_unbiased_over_the_samples_and_left_out_where_there_are_fewer():
    raw = {name: [[*row, *row, *row] for row in value] if np.ndim(value) == 2 else value
           for name, value in completions().items()}
    found = growth.rows({"rl": {"walk4": {"t1": raw}}}, seed=0)
    # Of 12 samples 9 and 3 are right: 8 always hold one of 9; of 3 none with C(9, 8) / C(12, 8).
    assert value_of(found, metric="growth: pass@8") == pytest.approx((1 + 1 - 9 / 495) / 2)


def test_shares_of_nothing_and_what_was_not_noted_have_no_rows():
    raw = completions() | dict(rechecks=[[0] * 4] * 2, first=[[1] * 4] * 2)
    found = {row["metric"] for row in growth.rows({"rl": {"walk4": {"t1": raw}}}, seed=0)}
    assert not found & {"growth: mended", f"growth: {growth.AGAIN}", "growth: re-check after wrong"}
    del raw["walked"]
    assert growth.rows({"rl": {"walk4": {"t1": raw}}}, seed=0) == [] and growth.growth_text([]) == ""


def test_the_tables_show_every_method_and_split_and_mean_over_seeds():
    other = completions() | dict(right=[[1, 1, 1, 1], [1, 1, 1, 1]])
    found = growth.rows({"rl": {"walk4": {"t1": completions()}}, "cot": {"walk4": {"t1": other}}}, seed=0)
    found += growth.rows({"rl": {"walk4": {"t1": other}}}, seed=1)
    text = growth.growth_text(found).split("\n\n")
    assert text[0].splitlines()[0] == "Growth, T = 1: accuracy"
    # rl .5 and 1: a t-interval of two seeds, cut to what a share can be
    lines = [line.split() for line in text[0].splitlines()[1:]]
    assert lines == [["walk4"], ["rl", "0.750", "[0.00,", "1.00]"], ["cot", "1.000"]]
    [looks] = [table.splitlines() for table in text if table.startswith("Looks on")]
    means = [word for word in looks[2].split() if word[0] != "[" and word[-1] != "]"]
    assert looks[0].startswith("Looks on walk4") and text[-1].startswith("Behind a wrong first look") and means == [
        "rl", "4", "0.571", "0.667", "0.250", "0.500", "0.750", "0.750", "0.500"]


def test_what_a_second_look_is_worth_is_paired_within_a_seed():
    found = []
    for seed, again, not_again in ((0, 0.3, 0.1), (1, 0.5, 0.2), (2, 0.4, 0.0)):
        for method, metric, value in (("rl", growth.AGAIN, again), ("rl", growth.NOT_AGAIN, not_again),
                                      ("teacher", growth.AGAIN, 1.0), ("teacher", growth.NOT_AGAIN, 0.0)):
            found.append(dict(method=method, split="id", decoding="t1", metric=f"growth: {metric}", value=value,
                              seed=seed))
    title, head, *lines = growth.worth_of_a_look(found, "t1").splitlines()
    assert "over 3 seeds" in title and "these 1 is" in title and head.split() == ["id"]
    # .2, .3, .4
    assert [line.split() for line in lines] == [["rl", "+30.0", "[+5.2,", "+54.8]", "*"]]


def test_arms_are_held_against_their_start_seed_by_seed():
    found = []
    for seed, before, now in ((0, 0.1, 0.3), (1, 0.1, 0.4), (2, 0.1, 0.5)):
        for method, value in (("cot", before), ("rl", now), ("teacher", 0.9)):
            found.append(dict(method=method, split="id", decoding="t1", metric="growth: re-checks", value=value,
                              seed=seed))
    title, head, *lines = growth.against_start(found, "t1").splitlines()
    assert "over 3 seeds" in title and "these 1 is" in title and head.split() == ["re-checks,", "id"]
    # .2, .3, .4: half 4.30265 x .1 / sqrt(3) = .248
    assert [line.split() for line in lines] == [["rl", "+30.0", "[+5.2,", "+54.8]", "*"]]
    assert growth.against_start([row for row in found if row["method"] != "cot"], "t1") == ""


def test_the_picture_is_a_png_and_needs_walks_of_two_lengths():
    scores = {method: {f"walk{hops}": {"t1": completions()} for hops in (1, 2, 6)} for method in ("cot", "rl_slow")}
    picture = Image.open(io.BytesIO(growth.growth_picture(growth.rows(scores, seed=0), 3)))
    assert picture.size[0] == 1600
    assert growth.growth_picture(growth.rows({"rl": {"walk4": {"t1": completions()}, "id": {}}}, seed=0), 3) is None
    assert growth.lengths_of([dict(split=split) for split in ("id", "walk6", "walks", "walk10")]) == {6: "walk6",
                                                                                                     10: "walk10"}


def test_what_is_noted_stands_in_the_raw_scores_a_row_a_prompt():
    samples = scenes.load("walk4", 2, 0)
    found = evaluation.notes(samples, [["a", "bb"], ["", "c"]], lambda sample, text: dict(size=len(text), hops=4))
    assert found == dict(size=[[1, 2], [0, 1]], hops=[[4, 4], [4, 4]])
    assert evaluation.notes(samples, [["a"], ["b"]], None) == {}
    assert evaluation.note_of(train.Config()) is None
    assert evaluation.note_of(change(train.Config(), world="long_walks")) is evaluation.long_walks.noted
