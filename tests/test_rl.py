"""The policy loss and what is logged, against hand-worked numbers and naive loops."""
import json
import math
import re
from dataclasses import replace

import pytest
import torch

import train
from data.sample import Sample
from kernels import group_advantage, policy_loss
from model.vlm import Output
from rl import metrics
from rl.report import curves
from rl.rewards import RewardOptions, Rewards
from rl.rollout import read_and_reward
from rl.types import Policy, Rollout
from tiny import difference

EOS = 2


# ---------------------------------------------------------------- the loss

def grpo(logp, old, advantage, mask, *rest):
    return policy_loss(logp, old, None, advantage[..., None], mask, *rest)


def problem(seed=0, spread=0.5):
    torch.manual_seed(seed)
    P, G, C = 3, 5, 7
    logp = -torch.rand(P, G, C, dtype=torch.float64)
    old = logp + spread * torch.randn(P, G, C, dtype=torch.float64)
    advantage = torch.randn(P, G, dtype=torch.float64)
    mask = torch.arange(C) < torch.randint(1, C + 1, (P, G, 1))
    return logp.requires_grad_(), old, advantage, mask


def naive(logp, old, advantage, mask, denominator, low, high):
    """One token at a time, in words: the gain counts only as far as the clip, a loss counts in full."""
    total, count = 0, dict(clip_low=0, clip_high=0, ratio_off=0.0, kl=0.0, ratio_off_max=0.0)
    P, G, C = logp.shape
    for p in range(P):
        for g in range(G):
            for t in range(C):
                if not mask[p, g, t]:
                    continue
                ratio, a = (logp[p, g, t] - old[p, g, t]).exp(), advantage[p, g]
                if a > 0 and ratio > 1 + high:
                    total, count["clip_high"] = total + (1 + high) * a, count["clip_high"] + 1
                elif a < 0 and ratio < 1 - low:
                    total, count["clip_low"] = total + (1 - low) * a, count["clip_low"] + 1
                else:
                    total = total + ratio * a
                r = ratio.item()
                count["ratio_off"] += abs(r - 1)
                count["ratio_off_max"] = max(count["ratio_off_max"], abs(r - 1))
                count["kl"] += r - 1 - math.log(r)
    return -total / denominator, count


@pytest.mark.parametrize("low, high, spread", [(0.2, 0.2, 0.5), (0.1, 0.3, 0.5), (0.3, 0.05, 1.0), (0.2, 0.28, 0.0)])
def test_grpo_equals_a_loop_over_tokens_in_value_gradient_and_statistics(low, high, spread):
    logp, old, advantage, mask = problem(spread=spread)
    loss, stats = grpo(logp, old, advantage, mask, 11, low, high)
    wanted, count = naive(logp, old, advantage, mask, 11, low, high)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert difference(*(torch.autograd.grad(value, logp)[0] for value in (loss, wanted))) < 1e-12
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(count)
    assert (count["clip_low"] > 3 and count["clip_high"] > 3) == (spread > 0)


def test_grpo_by_hand():
    # Ratios 3/2, 1/2, 1 under A = +2, then A = -2; clips 0.8 and 1.3; the last token is masked; denominator 4.
    # A = +2: min(3, 2.6) + min(1, 1.6) = 3.6.   A = -2: min(-3, -2.6) + min(-1, -1.6) = -4.6.   Loss 1/4.
    ratio = torch.tensor([[[1.5, 0.5, 1.0], [1.5, 0.5, 1.0]]], dtype=torch.float64)
    mask = torch.tensor([[[1, 1, 0], [1, 1, 0]]]).bool()
    loss, stats = grpo(ratio.log(), torch.zeros(1, 2, 3), torch.tensor([[2.0, -2.0]]), mask, 4, 0.2, 0.3)
    assert loss.item() == pytest.approx(0.25)
    assert stats["clip_high"] == stats["clip_low"] == 1 and stats["ratio_off"].item() == pytest.approx(2)


def test_the_first_step_is_reinforce_with_a_baseline_and_its_ratio_is_exactly_one():
    logp, _, advantage, mask = problem()
    loss, stats = grpo(logp, logp.detach(), advantage, mask, 11)
    reinforce = -(advantage[..., None] * logp * mask).sum() / 11
    assert difference(*(torch.autograd.grad(value, logp)[0] for value in (loss, reinforce))) < 1e-12
    assert [stats[name].item() for name in ("ratio_off", "kl", "clip_low", "clip_high")] == [0, 0, 0, 0]


@pytest.mark.parametrize("far", [-1000.0, -5.0, 30.0])
def test_what_stands_at_masked_tokens_changes_nothing_however_far_off(far):
    logp, old, advantage, mask = problem()
    (loss, stats), (same, same_stats) = (grpo(logp, o, advantage, mask, 11)
                                         for o in (old, torch.where(mask, old, old + far)))
    assert torch.equal(loss, same) and all(torch.equal(stats[name], same_stats[name]) for name in stats)
    grads = [torch.autograd.grad(value, logp)[0] for value in (loss, same)]
    assert torch.equal(*grads) and not grads[0][~mask].any()


# ---------------------------------------------------------------- a policy of three rows

class Table:
    """One prompt a row, one token a completion: a Policy without a network."""

    def __init__(self, rows):
        self.logits = torch.tensor(rows, dtype=torch.float64, requires_grad=True)

    def __call__(self, batch, completions, temperature, mask=None, upstream=None):
        P, G, C = completions.shape
        every = (self.logits / temperature).log_softmax(-1)[:, None, None].expand(P, G, C, -1)
        logp = every.gather(-1, completions[..., None])[..., 0]
        return Output(logp, -(every.exp() * every).sum(-1), torch.zeros(0))


def test_gradient_of_a_three_row_policy_by_hand():
    policy: Policy = Table([[0.0, 0.0], [math.log(3), 0.0], [0.0, 0.0]])
    tokens = torch.tensor([[[0], [1]], [[0], [1]], [[0], [1]]])
    advantage = group_advantage(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]), "none")
    out = policy(None, tokens, 1.0)
    loss, _ = grpo(out.logp, out.logp.detach(), advantage, torch.ones_like(tokens).bool(), 6)
    loss.backward()
    # d loss / d logits = -1/6 sum_g A_g (onehot_g - p): A = +-1/2 gives -+1/12 (1, -1) whatever p is; the flat row 0.
    assert difference(policy.logits.grad, torch.tensor([[-1, 1], [-1, 1], [0, 0]], dtype=torch.float64) / 12) < 1e-12


def test_a_three_row_policy_learns_what_is_rewarded():
    policy, generator = Table([[0.0] * 4] * 3), torch.Generator().manual_seed(0)
    for _ in range(80):
        tokens = torch.multinomial(policy.logits.detach().softmax(-1), 8, replacement=True,
                                   generator=generator)[..., None]
        reward = (tokens[..., 0] == torch.tensor([[1], [2], [3]])).float()
        out = policy(None, tokens, 1.0)
        loss, _ = grpo(out.logp, out.logp.detach(), group_advantage(reward).double(), tokens > -1, tokens.numel())
        with torch.no_grad():
            policy.logits -= torch.autograd.grad(loss, policy.logits)[0]
    p = policy.logits.detach().softmax(-1)
    assert p[[0, 1, 2], [1, 2, 3]].min() > 0.95


def test_entropy_is_that_of_the_distribution_not_minus_p_log_p_of_the_token():
    # Uniform over e^10 would be 10 nats; over 8 tokens log 8, where -p log p of one token is log(8) / 8.
    out = Table([[0.0] * 8])(None, torch.tensor([[[3]]]), 1.0)
    assert out.entropy.item() == pytest.approx(math.log(8))
    from kernels import linear_logp
    logp, entropy = linear_logp(torch.zeros(1, 3), torch.randn(8, 3), torch.tensor([3]))
    assert entropy.item() == pytest.approx(math.log(8), rel=1e-6)
    assert -(logp.exp() * logp).item() == pytest.approx(math.log(8) / 8, rel=1e-6)


# ---------------------------------------------------------------- weighted sums, and what is logged

def gold(answer):
    return Sample(answer=answer)


FORMED = "<think> a1 b2</think><answer> two</answer>"
SAMPLES = [gold("two"), gold("one")]
TEXTS = [[FORMED, "<answer>two</answer>"], ["<think></think><answer>two</answer>", ""]]
LENGTHS = torch.ones(2, 2).long()


def rewards_of(spec, gated):
    return Rewards(RewardOptions(rewards=spec, gated=gated))


def test_rewards_are_the_weighted_sum_of_their_parts():
    ungated, gated = (rewards_of("correctness:1,format:0.1", gate) for gate in (False, True))
    parts, earned = ungated.score(SAMPLES, TEXTS, LENGTHS)
    assert ungated.total(earned).tolist() == [[pytest.approx(1.1), 1.0], [pytest.approx(0.1), 0.0]]
    assert parts["correctness"].tolist() == [[1, 1], [0, 0]] and parts["format"].tolist() == [[1, 0], [1, 0]]
    same, earned = gated.score(SAMPLES, TEXTS, LENGTHS)
    assert gated.total(earned).tolist() == [[pytest.approx(1.1), 0.0], [pytest.approx(0.1), 0.0]]
    assert same["correctness"].tolist() == [[1, 1], [0, 0]]         # what is logged does not depend on the gate
    _, earned = rewards_of("correctness:1", True).score(SAMPLES, TEXTS, LENGTHS)
    assert earned[..., 0].tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize("spec, names", [("correct:1", "'correct'"), ("", "''"), ("format:x", "'x'"),
                                         ("format:nan", "must lie in"), ("format:inf", "must lie in"),
                                         ("format:1,", "''")])
def test_a_reward_that_cannot_be_read_is_named(spec, names):
    with pytest.raises(ValueError, match=f"--rewards={spec}.*{names}"):
        rewards_of(spec, True)


def test_why_says_what_each_reward_saw():
    ungated, gated = (rewards_of("correctness:1,format:0.5", gate) for gate in (False, True))
    assert gated.why(gold("two"), FORMED) == "reward 1.5; 'two': right; well-formed"
    bare = "<answer>two</answer>"
    assert gated.why(gold("two"), bare) == "reward 0; 'two': right; no single <think>..</think>"
    assert ungated.why(gold("two"), bare).startswith("reward 1; ")
    assert gated.why(gold("one"), bare).startswith("reward 0; 'two': wrong, expected 'one'; ")
    assert gated.why(gold("one"), "").startswith("reward 0; no answer: wrong")


class Letters:
    eos_id = EOS

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i != EOS)


def test_a_rollout_reads_only_what_its_mask_holds():
    text = "<answer>b</answer>"
    ids = torch.tensor([[[*map(ord, text), EOS, ord("x")], [*map(ord, text), ord("x"), EOS]]])
    mask = torch.ones_like(ids).bool()
    mask[0, 0, -1] = False
    done = Output(torch.zeros(0), torch.zeros(0), torch.zeros(0))
    done.ids, done.mask = ids, mask
    rollout = read_and_reward(done, [gold("b")], Letters(), rewards_of("correctness:1,format:0.5", False))
    assert rollout.texts == [[text, text + "x"]] and rollout.reward.tolist() == [[1, 1]]


def test_metrics_of_a_rollout_by_hand():
    mask = torch.tensor([[[1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 1]]]).bool()
    ids = torch.tensor([[[5, EOS, EOS], [5, 6, 7]], [[EOS, 0, 0], [5, 6, EOS]]])
    parts = dict(correctness=torch.tensor([[1.0, 0.0], [0.0, 0.0]]), format=torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    texts = [["wait , wait", "Again: checkered"], ["", "no"]]
    rollout = Rollout(ids, mask, torch.zeros(0), ((ids == EOS) & mask).any(-1), [], texts, parts, torch.zeros(0),
                      torch.tensor([[1.1, 0.1], [0.0, 0.0]]))
    line = metrics.of_rollout(rollout)
    of_rewards = {"reward/correctness": 0.25, "reward_std/correctness": 0.5, "reward/format": 0.5,
                  "reward_std/format": (1 / 3) ** 0.5}
    assert line == pytest.approx(dict(
        reward=0.3, reward_std=(((0.8 ** 2 + 0.2 ** 2 + 2 * 0.3 ** 2) / 3) ** 0.5), flat=0.5, all_right=0,
        none_right=0.5, length=9 / 4, length_right=2, length_wrong=7 / 3, truncated=0.25, words_wait=0.25,
        words_again=0.25, words_check=0, words_verify=0, words_however=0, words_alternatively=0, **of_rewards))
    nothing = dict(parts, correctness=torch.zeros(2, 2))
    assert "length_right" not in metrics.of_rollout(replace(rollout, parts=nothing))        # nothing to take a mean of
    known = [re.sub("<[a-z]+>", "[a-z]+", name) for name in metrics.DEFINITIONS]
    assert all(any(re.fullmatch(name, logged) for name in known) for logged in line)


# Of the metrics, of what train.py adds to a line, and of the arguments that log it.
NAMES = ("reward", "reward_std", "loss", "seconds", "step", "stage", "lr", "flops", "samples", "flat", "self")


def test_a_reward_may_have_the_name_of_a_metric_and_changes_none(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("".join(f"def {name}(sample, text):\n    return {number} / 64\n"
                                              for number, name in enumerate(NAMES)))
    run = ["--preset=tiny", "--stage=clip,align,rl_zero", "--clip-steps=1", "--align-steps=1", "--rl-steps=1",
           "--eval-greedy=1", "--eval-sampled=1"]
    own = ",".join(f"{tmp_path / 'mine.py'}:{name}:0" for name in NAMES)
    monkeypatch.setattr(curves, "curves", lambda *_: b"")
    lines = []
    for folder, more in (("plain", ""), ("own", f",{own}")):
        train.main([*run, f"--rewards=length:1,repetition:1{more}", f"--out={tmp_path / folder}"])
        lines.append(json.loads((tmp_path / folder / "log.jsonl").read_text().splitlines()[-1]))
    plain, with_own = lines
    for number, name in enumerate(NAMES):
        assert with_own.pop(f"reward/{name}") == number / 64 and with_own.pop(f"reward_std/{name}") == 0
    timed = {name for name in plain if name.startswith("seconds") or name.endswith("per_second")}
    assert {name: plain[name] for name in plain if name not in timed} == {
        name: with_own[name] for name in with_own if name not in timed}
    assert plain["length"] > 0 > plain["reward/length"]         # in tokens, and a reward for wrong answers
