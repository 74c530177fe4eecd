"""The parts of an RL update by hand: weights and denominators, advantages, the critic, what is kept beside a policy."""
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from data.sample import Batch
from kernels import gae, policy_loss
from model.flops import Meter
from model.optim import make_optimizer, stepper
from model.runs import checkpoint
from model.runs.config import change
from model.runs.folder import RunFolder
from rl import losses, metrics
from rl.advantages import advantages, normalised_then_summed, sampled_kl, token_rewards, whiten
from rl.explain import formless_advice, preflight_text
from rl.learner import Critic, Guard, Learner, make_learner
from rl.rewards import RewardOptions, Rewards, overlong
from rl.types import Experience, Rollout
from rl import update as update_module
from rl.algorithms import ALGORITHMS
from rl.update import estimate_advantages, known_gradient, score, select_groups, update
from test_algorithms import C, D, G, LENGTH, REWARDS, Recorder, Table, batch_of, config, problem, run_update
from test_flops import counted
from tiny import difference, make_vlm, prompts, random_completions, to_batch


def double(values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- weights and denominators

def test_weights_and_denominators_by_hand():
    mask = torch.tensor([[[1, 1, 1, 0], [1, 0, 0, 0]], [[1, 1, 0, 0], [0, 0, 0, 0]]]).bool()       # one does not train
    assert losses.weights(mask, "sequence")[..., 0].tolist() == [[pytest.approx(1 / 3), 1], [0.5, 1]]
    assert all((losses.weights(mask, norm) == 1).all() for norm in ("token", "constant", "sum"))
    assert [losses.denominator(mask, norm, 10).item() for norm in losses.NORMS] == [3, 6, 30, 3]


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens_and_exactly_one_on_policy():
    logp, old = double([[[-1.0, -2.0, 50.0]]]), double([[[-1.3, -1.0, -7.0]]])
    mask = torch.tensor([[[True, True, False]]])
    ratio = (logp - losses.sequence_old_logp(logp, old, mask)).exp()
    assert ratio[0, 0, :2].tolist() == pytest.approx([math.exp((0.3 - 1.0) / 2)] * 2)
    assert torch.equal(losses.sequence_old_logp(logp, logp, mask), logp)


def test_weights_against_drift_by_hand():
    off = double([[[math.log(4), math.log(1.5), math.log(0.25), 9.0]]])
    mask = torch.tensor([[[1, 1, 1, 0]]]).bool()
    args = (off, torch.zeros_like(off), mask)
    assert losses.drift_weights(*args, "truncate", 2.0, "token")[0, 0, :3].tolist() == pytest.approx([2, 1.5, 0.25])
    assert losses.drift_weights(*args, "mask", 2.0, "token")[0, 0, :3].tolist() == pytest.approx([0, 1.5, 0])
    assert losses.drift_weights(*args, "truncate", 2.0, "sequence")[0, 0, :3].tolist() == pytest.approx([1.5] * 3)
    assert losses.drift_weights(*args, "mask", 1.2, "sequence")[0, 0, :3].tolist() == [0, 0, 0]
    far = torch.full((1, 1, 2000), 0.05)                # exp(100) is not finite in fp32: masked, not NaN
    args = (far, torch.zeros_like(far), torch.ones_like(far).bool())
    assert not losses.drift_weights(*args, "mask", 2.0, "sequence").any()
    assert (losses.drift_weights(*args, "truncate", 2.0, "sequence") == 2).all()


def test_without_drift_the_correction_changes_nothing():
    policy, e = problem()
    e = replace(e, sampled_logp=e.old_logp)
    plain, *corrected = (run_update(policy, e, config(**switches))[0][0] for switches in (
        {}, dict(correct="truncate"), dict(correct="mask", correct_level="sequence", correct_cap=1.0)))
    assert all(difference(other, plain) < 1e-12 for other in corrected)
    assert difference(run_update(policy, problem()[1], config(correct="truncate"))[0][0], plain) > 1e-3


def test_top_entropy_trains_the_highest_tokens_alone():
    policy, e = problem()
    chosen = losses.top_entropy(e.entropy, e.mask, 0.25)
    assert chosen.sum() == math.ceil(0.25 * int(e.mask.sum())) and not (chosen & ~e.mask).any()
    assert e.entropy[chosen].min() > e.entropy[e.mask & ~chosen].max()
    assert torch.equal(losses.top_entropy(e.entropy, e.mask, 1.0), e.mask)
    (some,), _, done, _ = run_update(policy, e, config(top_entropy=0.25))
    out = policy(e.batch, e.ids, 1.0)                     # tokens of the whole step remain the denominator
    loss, _ = policy_loss(out.logp, e.old_logp, None, done.advantage, chosen, e.mask.sum())
    assert difference(some["policy.logits"], torch.autograd.grad(loss, policy.logits)[0]) < 1e-12


def test_value_loss_by_hand():
    values, old, returns = (double([[row]]) for row in ([1.0, 0.5, 2.0, 9.0], [0.5, 0.5, 2.5, 0.0], [1.0, 0, 3, 0]))
    mask = torch.tensor([[[1, 1, 1, 0]]]).bool()
    # Errors 0, .5, 1. Held within .2 of old: .7, .5, 2.3, errors .3, .5, .7: the larger are .3, .5, 1.
    loss, stats = losses.value_loss(values, old, returns, mask, 3, 0.2)
    assert loss.item() == pytest.approx((0.09 + 0.25 + 1) / 6) and stats["value_clipped"] == 1
    loss, stats = losses.value_loss(values, old, returns, mask, 3)
    assert loss.item() == pytest.approx((0.25 + 1) / 6) and stats["value_clipped"] == 0


def test_overlong_by_hand():
    length = torch.tensor([[1, 6, 8], [9, 10, 10]])
    assert overlong(length, 10, 0.4).tolist() == [[0, 0, -0.5], [-0.75, -1, -1]]


# ---------------------------------------------------------------- advantages

def test_maye_whitened_rewards_average_zero():
    reward = double([[[0.0], [1.0], [1.0], [1.0]]])
    out = whiten(reward, torch.ones(1, 4, 1).bool())
    assert abs(out.mean().item()) < 1e-12 and out.std().item() == pytest.approx(1, rel=1e-5)
    assert whiten(double([[[2.0, 2.0]]]), torch.ones(1, 1, 2).bool()).tolist() == [[[0, 0]]]


def test_gdpo_by_hand():
    # Correctness differs in both groups alike, format in the first alone: normalised first, both count in full.
    rewards = double([[[1, 1], [0, 0]], [[1, 5], [0, 5]]])
    out = normalised_then_summed(rewards, double([1.0, 0.5]))
    a = math.sqrt(0.5)                  # (1 - .5) / std
    total = double([[1.5 * a, -1.5 * a], [a, -a]])
    assert difference(out, total / total.std()) < 1e-5
    assert not normalised_then_summed(torch.ones(2, 3, 2).double(), double([1, 1])).any()


def test_rewards_of_tokens_by_hand():
    mask = torch.tensor([[[1, 1, 0], [1, 1, 1]]]).bool()
    out = token_rewards(double([[1.0, 2.0]]), double([[[0.5, 0.25, 9], [1, 0, 1]]]), mask, 0.1)
    assert difference(out, double([[[-0.05, 0.975, 0], [-0.1, 0, 1.9]]])) < 1e-12


def test_kl_estimators_by_hand():
    kl = {kind: sampled_kl(double([-1.0]), double([-1.5]), kind).item() for kind in ("k1", "k2", "k3")}
    assert kl == pytest.approx({"k1": 0.5, "k2": 0.125, "k3": math.exp(-0.5) - 1 + 0.5})


def experience_of(rewards, lengths, values=None, ended=None):
    """One prompt, a completion for each reward."""
    longest = max(lengths)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None])[None]
    return Experience(batch_of(1), torch.zeros_like(mask).long(), mask, mask,
                      torch.tensor([ended or [True] * len(lengths)]), double([[[r] for r in rewards]]),
                      torch.zeros(mask.shape), torch.ones(1).bool(),
                      values=torch.zeros(0) if values is None else double([values]))


def test_lambda_0_is_temporal_difference_and_lambda_1_monte_carlo():
    e = experience_of([3.0, 1.0], [3, 2], [[1.0, 2.0, 4.0, 9.0], [0.5, 0.25, 7.0, 9.0]])
    td, _ = advantages(e, double([1.0]), "critic", "none", gamma=0.9, lam=0.0)
    assert difference(td[0][e.mask[0]], double([0.9 * 2 - 1, 0.9 * 4 - 2, 3 - 4, 0.9 * 0.25 - 0.5, 1 - 0.25])) < 1e-12
    mc, returns = advantages(e, double([1.0]), "critic", "none", gamma=0.9, lam=1.0)
    assert difference(returns[0][e.mask[0]], double([3 * 0.81, 3 * 0.9, 3, 0.9, 1])) < 1e-12
    assert difference(mc[0][e.mask[0]], returns[0][e.mask[0]] - e.values[0, :, :3][e.mask[0]]) < 1e-12


def test_what_was_cut_off_is_worth_what_the_critic_says_when_asked():
    e = experience_of([0.0, 0.0], [2, 2], [[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]], ended=[True, False])
    _, plain = advantages(e, double([1.0]), "critic", "none")
    _, more = advantages(e, double([1.0]), "critic", "none", bootstrap=True)
    assert not plain.any() and more.tolist() == [[[0, 0], [4, 4]]]


def test_easyr1_gae_takes_several_rows_and_an_empty_completion_is_one_token():
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(5, 7, generator=generator).double() for _ in range(2))
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 0, 2])[:, None]
    both = gae(rewards, values, mask, 0.9, 0.8)
    for row in range(5):
        for one, alone in zip(both, gae(rewards[row:row + 1], values[row:row + 1], mask[row:row + 1], 0.9, 0.8)):
            assert difference(one[row], alone[0]) < 1e-12


# ---------------------------------------------------------------- which groups take part

def rollout_of(rewards, ended=None, lengths=None):
    reward = torch.tensor(rewards)
    shape = reward.shape
    mask = torch.arange(3) < (torch.full(shape, 3) if lengths is None else torch.tensor(lengths))[..., None]
    return Rollout(torch.zeros(*shape, 3).long(), mask, torch.zeros(*shape, 3),
                   torch.ones(shape).bool() if ended is None else torch.tensor(ended), [],
                   [["a"] * shape[1]] * shape[0], {"format": reward, "correctness": reward}, reward[..., None], reward)


@pytest.mark.parametrize("switches, kept", [
    ({}, [0, 2]), (dict(kl_coef=0.1), [0, 1, 2]), (dict(entropy_coef=0.1), [0, 1, 2]),
    (dict(combine="each"), [0, 1, 2]),
    (dict(baseline="critic", std="none"), [0, 1, 2]), (dict(baseline="batch", std="batch"), [0, 1, 2]),
    (dict(drop_truncated=True), [0]), (dict(drop_truncated=True, kl_coef=0.1), [0, 1]),
    (dict(refill=2, kl_coef=0.1), [0, 2])])
def test_groups_that_cannot_move_the_policy_are_left_out(switches, kept):
    rollout = rollout_of([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], [[True, False], [True, True], [False, False]])
    batch = batch_of(3)
    found = select_groups(batch, rollout, config(**switches))
    assert found.batch.ids[:, 0].tolist() == kept
    assert found.trained.any(-1).tolist() == ([[True, False]] + [[True, True]] * (len(kept) - 1)
                                              if "drop_truncated" in switches else [[True, True]] * len(kept))
    assert len(select_groups(batch, rollout, config(), keep_all=True).ids) == 3
    if "refill" not in switches:
        counted = select_groups(batch, rollout, config(flat="count", **switches))
        assert counted.batch.ids[:, 0].tolist() == [0, 1, 2] and counted.active.nonzero()[:, 0].tolist() == kept
        assert [[part.tolist() for part in parts] for _, parts in counted.split(1, 1)] == [[[row] for row in kept]]


def test_a_completion_that_was_cut_off_counts_in_the_baseline_but_does_not_train():
    policy, e = problem()
    cut = replace(e, trained=e.mask & e.ended[..., None])
    (taken,), found, done, _ = run_update(policy, cut, config(norm="sequence"))
    assert (~e.ended).any() and torch.equal(done.advantage, run_update(policy, e, config(norm="sequence"))[2].advantage)
    loss, _ = policy_loss(policy(e.batch, e.ids, 1.0).logp, e.old_logp, None, done.advantage, cut.trained,
                          e.ended.sum(), weight=1 / LENGTH[..., None].double())
    assert difference(taken["policy.logits"], torch.autograd.grad(loss, policy.logits)[0]) < 1e-12


def test_rollouts_and_experiences_of_different_lengths_join():
    policy, e = problem()
    short = e.rows(torch.tensor([2, 0]))
    short = replace(short, mask=short.mask[..., :5], ids=short.ids[..., :5], trained=short.trained[..., :5],
                    sampled_logp=short.sampled_logp[..., :5], old_logp=short.old_logp[..., :5],
                    ref_logp=short.ref_logp[..., :5], entropy=short.entropy[..., :5], values=short.values[..., :6])
    both = Experience.join([short, e])
    assert both.batch.ids[:, 0].tolist() == [2, 0, 0, 1, 2] and both.ids.shape == (5, G, C)
    assert both.values.shape == (5, G, C + 1) and both.rewards.shape == (5, G, 2)
    assert torch.equal(both.old_logp[:2, :, :5], short.old_logp) and torch.equal(both.old_logp[2:], e.old_logp)
    assert both.first(3).batch.ids[:, 0].tolist() == [2, 0, 0] and both.first(9) is both
    one, two = rollout_of([[1.0, 0.0]]), rollout_of([[1.0, 1.0], [0.0, 1.0]])
    joined = Rollout.join([one, two])
    assert joined.reward.tolist() == [[1, 0], [1, 1], [0, 1]] and len(joined.texts) == 3
    assert joined.parts["format"].tolist() == joined.reward.tolist() and joined.ids.shape == (3, 2, 3)


def test_joined_batches_of_pictures_give_what_each_gives(device):
    rows = prompts()
    vlm = make_vlm(device=device)
    parts = [to_batch(some, device) for some in (rows[2:4], rows[:2])]
    ids = random_completions(4, 2, 3, device=device)
    whole = Batch.join([vlm.encode(part) for part in parts])
    with torch.no_grad():
        alone = torch.cat([vlm(part, some).logp for part, some in zip(parts, ids.split(2))])
        assert difference(vlm(whole, ids).logp, alone) < 1e-12
        some = torch.tensor([2, 0], device=device)      # pictures stay with their prompts
        assert difference(vlm(whole.rows(some), ids[some]).logp, alone[some]) < 1e-12


# ---------------------------------------------------------------- scoring on a real model

def setting(device="cpu", tower_trains=False, **switches):
    """A small vision-language model and experience of it, scored under the switches, in fp64; the same on every
    device."""
    rows = prompts()
    vlm, ids = make_vlm(device=device), random_completions(len(rows), 2, 4)
    vlm.visual.requires_grad_(tower_trains)
    mask = torch.arange(4) < torch.randint(1, 5, (len(rows), 2, 1), generator=torch.Generator().manual_seed(1))
    cfg = config(micro_batch=2, mini_batches=2, **switches)
    learner = make_learner(vlm, vlm.config.llm.width, cfg.algorithm)
    if learner.reference is not None:
        with torch.no_grad():
            for p in learner.reference.llm.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).to(device))
    given = [ids, mask, mask, torch.ones(len(rows), 2).bool(),
             torch.rand(len(rows), 2, 2, generator=torch.Generator().manual_seed(3)).double(),
             torch.zeros(mask.shape).double(), torch.ones(len(rows)).bool()]
    e = Experience(vlm.encode(to_batch(rows, device)), *(t.to(device) for t in given))
    meter = Recorder()
    return learner, score(learner, e, cfg, meter), cfg, meter.names


def exact(learner, e, temperature=1.0):
    """KL at every token, from all logits."""
    def every(vlm):
        hidden = vlm.states(e.batch, e.ids)[..., :-1, :]
        return (hidden @ vlm.llm.head.T / temperature).log_softmax(-1)

    p, q = every(learner.policy), every(learner.reference)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "exact"])
def test_kl_in_the_reward_is_that_of_policy_and_reference(kl, device):
    learner, e, cfg, counted = setting(device, kl=kl, kl_in="reward", kl_coef=0.1, baseline="batch", std="batch")
    with torch.no_grad():
        mine, theirs = (vlm(e.batch, e.ids).logp for vlm in (learner.policy, learner.reference))
        wanted = exact(learner, e) if kl == "exact" else sampled_kl(mine, theirs, kl)
    assert difference(e.old_logp[e.mask], mine[e.mask]) < 1e-10 and difference(e.kl[e.mask], wanted[e.mask]) < 1e-10
    assert e.kl[e.mask].abs().max() > 1e-3
    assert counted.count("exact_kl") == (3 if kl == "exact" else 0)


def test_exact_kl_in_the_loss_adds_its_mean_and_its_gradient(device):
    learner, e, cfg, _ = setting(device, kl="exact", kl_coef=0.3)
    e, _ = estimate_advantages(learner, e, REWARDS, cfg)
    taken = []

    def take_step(drop=False):
        taken.append({name: p.grad.clone() for name, p in learner.policy.named_parameters() if p.grad is not None})
        learner.zero_grad(set_to_none=True)
        return {"grad_norm": 1.0}

    def step(kl_coef):
        one = change(cfg, mini_batches=1)
        learner.kl_coef.fill_(kl_coef)
        found, _ = update(learner, e, one, take_step, Recorder(), Guard(None, "rl", 1, None))
        return found

    with_kl, without = step(0.3), step(0.0)
    kl = (exact(learner, e) * e.mask).sum() / e.mask.sum()
    learner.zero_grad(set_to_none=True)
    kl.backward()
    wanted = {name: 0.3 * p.grad for name, p in learner.policy.named_parameters() if p.grad is not None}
    assert with_kl["kl_ref"] == pytest.approx(kl.item(), rel=1e-9) and with_kl["kl_ref"] > 1e-3
    assert with_kl["loss"] - without["loss"] == pytest.approx(0.3 * kl.item(), rel=1e-9)
    for name, gradient in wanted.items():
        assert difference(taken[0][name] - taken[1][name], gradient) < 1e-7, name
    assert all(p.grad is None for p in learner.reference.parameters())


@pytest.mark.parametrize("kl, kl_in", [("exact", "loss"), ("exact", "reward"), ("k3", "loss")])
def test_a_reference_that_keeps_its_features_pays_for_its_image_tower_once(kl, kl_in):
    learner, e, cfg, _ = setting(tower_trains=True, kl=kl, kl_in=kl_in, kl_coef=0.1, epochs=3)
    meter = Meter()

    def take_step(drop=False):
        learner.zero_grad(set_to_none=True)
        return {"grad_norm": 1.0}

    def run():
        scored = score(learner, e, cfg, meter)
        scored, _ = estimate_advantages(learner, scored, REWARDS, cfg)
        update(learner, scored, cfg, take_step, meter, Guard(None, "rl", 1, None))
    assert counted(run) == meter.total


def test_nothing_is_scored_when_no_switch_asks_for_it():
    learner, e, cfg, _ = setting()
    assert e.old_logp.numel() and not e.ref_logp.numel() and not e.values.numel()
    meter = Recorder()
    assert score(learner, replace(e, old_logp=torch.zeros(0)), config(), meter).old_logp.numel() == 0
    assert not meter.names


ON_POLICY = ("grpo_token", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "luspo")     # one update, and no KL
FURTHER = dict(entropy=dict(entropy_coef=0.1), cut_off=dict(drop_truncated=True), dual_clip=dict(bound=1.5),
               no_clip=dict(loss="cispo", clip_low=0.0, clip_high=0.0), exact_kl=dict(kl="exact", kl_coef=0.3))


def one_update(dtype, **switches):
    """-> (gradients of an update of a small model from one rollout, its metrics, FLOPs of the meter, executed ones)."""
    learner, e, cfg, _ = setting(**switches)
    cfg = change(cfg, mini_batches=1)
    e = replace(e, old_logp=torch.zeros(0), trained=e.mask & ~(torch.arange(len(e.mask)) == 1)[:, None, None])
    e, _ = estimate_advantages(learner.to(dtype), e, REWARDS, cfg)
    batch = replace(e.batch, features=e.batch.features.to(dtype))
    e = replace(e, batch=batch, advantage=e.advantage.to(dtype), sampled_logp=e.sampled_logp.to(dtype))
    taken = {}

    def take_step(drop=False):
        taken.update({name: p.grad.clone() for name, p in learner.policy.named_parameters() if p.grad is not None})
        return {"grad_norm": 1.0}

    meter = Meter()
    found = {}
    executed = counted(lambda: found.update(update(learner, e, cfg, take_step, meter, Guard(None, "rl", 1, None))[0]))
    return taken, found, meter.total, executed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("switches", [*(vars(ALGORITHMS[name]) for name in ON_POLICY), *FURTHER.values()],
                         ids=[*ON_POLICY, *FURTHER])
def test_on_policy_the_head_is_told_its_gradient_which_is_the_same_and_costs_a_product_less(switches, dtype,
                                                                                            monkeypatch):
    found, metrics_told, flops_told, executed_told = one_update(dtype, **switches)
    monkeypatch.setattr(update_module, "known_gradient", lambda *arguments: None)
    plain, metrics_plain, flops_plain, executed = one_update(dtype, **switches)
    assert found.keys() == plain.keys() and metrics_told == metrics_plain
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert flops_told == executed_told < flops_plain == executed


def told(stored=False, loss="clip", **switches):
    """What the head would be told; stored: whether old log-probs are, loss: a name."""
    learner, e, cfg, _ = setting(**switches)
    e, _ = estimate_advantages(learner, e, REWARDS, cfg)
    if not stored:
        e = replace(e, old_logp=torch.zeros(0))
    algorithm = SimpleNamespace(**vars(cfg.algorithm) | dict(loss=loss))
    return known_gradient(learner, e, losses.weights(e.trained, "token", torch.float64), e.mask.sum(), algorithm)


def test_where_the_gradient_depends_on_the_log_probs_nothing_is_told():
    assert told() is not None
    for switches in (dict(kl="k3", kl_coef=0.1), dict(kl="k1", kl_coef=0.1), dict(stored=True), dict(loss="of_mine")):
        assert told(**switches) is None


@pytest.mark.parametrize("wrong", [lambda g: 1.01 * g, lambda g: g.roll(1, 0), torch.zeros_like])
def test_an_update_whose_head_was_told_something_else_is_an_error(wrong, monkeypatch):
    right = losses.sent_at_ratio_one

    def mistaken(*arguments):
        return wrong(right(*arguments)[0]), None

    monkeypatch.setattr(losses, "sent_at_ratio_one", mistaken)
    with pytest.raises(RuntimeError, match="sends to logp is not the `upstream`"):
        one_update(torch.float64)


def test_nano_aha_scoring_by_the_reference_overwrites_nothing():
    learner, e, cfg, _ = setting(kl="k3", kl_coef=0.1)
    tensors = [*vars(e.batch).values(), *e._tensors().values()]
    before = [tensor.clone() for tensor in tensors]
    score(learner, e, cfg, Recorder())
    assert all(map(torch.equal, tensors, before))


# ---------------------------------------------------------------- the critic, and PPO on a toy

def test_a_critic_whose_units_change_says_the_same_and_learns_in_the_new_ones():
    critic = Critic(Table(), "shared", D, normalise=True)
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(2, 3, 4, D, generator=torch.Generator().manual_seed(1)).double()
    before = critic(None, None, hidden)
    for _ in range(3):
        critic.see(double([5.0, 7.0, 12.0]))
        assert difference(critic(None, None, hidden), before) < 1e-12
    assert critic.mean.item() == pytest.approx(8)
    assert critic.scale.item() == pytest.approx(double([5.0, 7, 12]).std(correction=0).item())
    plain = Critic(Table(), "shared", D)
    plain.see(double([5.0, 7.0]))
    assert plain.mean == 0 and plain.scale == 1


def test_the_update_shows_its_returns_to_the_critic_and_steps_it_at_its_own_rate():
    policy, e = problem()
    cfg = config("ppo", return_norm=True, value_lr=7.0)
    learner = make_learner(policy, D, cfg.algorithm)
    optimizer = make_optimizer(learner, 0.95, 0.0, learner.critic, cfg.algorithm.value_lr)
    e, _ = estimate_advantages(learner, replace(e, ref_logp=torch.zeros(0)), REWARDS, cfg)
    update(learner, e, cfg, stepper(optimizer, 1e-3, 1.0), Recorder(), Guard(None, "rl", 1, None))
    assert learner.critic.mean.item() == pytest.approx(e.returns[e.mask].mean().item())
    # Adam's first step is the learning rate, whatever the gradient.
    assert learner.critic.head.weight.abs().max().item() == pytest.approx(7e-3, rel=1e-4)
    assert (policy.logits - problem()[0].logits).abs().max().item() == pytest.approx(1e-3, rel=1e-4)


def test_the_gradient_that_reaches_a_shared_decoder_does_not_grow_with_the_rewards():
    gradients = []
    for size in (1.0, 100.0):
        policy, e = problem()
        cfg = config("ppo", return_norm=True, value_clip=0.0, kl_coef=0.0, std="none", value_coef=1e6)
        learner = make_learner(policy, D, cfg.algorithm)
        with torch.no_grad():
            learner.critic.head.weight.copy_(torch.tensor([[0.3, -0.2, 0.1]]))
        learner.critic.momentum = 0.0
        e = replace(e, rewards=size * e.rewards, values=size * e.values, ref_logp=torch.zeros(0))
        e, _ = estimate_advantages(learner, e, REWARDS, cfg)
        learner.critic.see(e.returns[e.mask])           # the head speaks in the new units ..
        with torch.no_grad():
            learner.critic.head.weight.copy_(torch.tensor([[0.3, -0.2, 0.1]]))      # .. and says the same in them
            learner.critic.head.bias.zero_()
        learner.zero_grad(set_to_none=True)
        taken = []
        update(learner, e, cfg, lambda drop=False: taken.append(policy.hidden.grad.clone()) or {"grad_norm": 1.0},
               Recorder(), Guard(None, "rl", 1, None))
        gradients.append(taken[0])
    assert difference(gradients[1], gradients[0]) < 1e-6 and gradients[0].abs().max() > 1


@pytest.mark.parametrize("critic", ["shared", "detached", "separate"])
def test_ppo_on_two_states_reaches_the_known_values_and_the_better_action(critic):
    # One prompt, two tokens of two. The first leads to state 0 or 1; there a right second token pays 1 or .5, a wrong
    # one nothing. gamma = 1. A policy that ends up choosing right is worth 1 at the start and 1 in state 0.
    torch.manual_seed(0)

    class Toy(Table):
        """States of their own after each first token, one-hot, so that a linear head can hold any values."""

        def __init__(self):
            super().__init__(0, 3, 1, 2)
            with torch.no_grad():
                self.logits.zero_()
                self.hidden = torch.nn.Parameter(torch.eye(3, dtype=torch.float64)[:, None].expand(3, 3, 3).clone())

        def rows(self, completions):
            return torch.stack([torch.zeros_like(completions[..., 0]), 1 + completions[..., 0]], -1)

        def states(self, batch, completions):
            at = self.rows(completions)
            return self.hidden[torch.cat([at, at[..., -1:]], -1), 0]

        def __call__(self, batch, completions, temperature, mask=None, upstream=None):
            every = self.logits[self.rows(completions), 0].log_softmax(-1)
            return SimpleNamespace(logp=every.gather(-1, completions[..., None])[..., 0],
                                   entropy=-(every.exp() * every).sum(-1), hidden=self.states(batch, completions))

        def twin(self):
            other = Toy()
            other.load_state_dict(self.state_dict())
            return other

    cfg = config("ppo", kl_coef=0.0, critic=critic, epochs=2, mini_batches=1, value_lr=20.0, value_clip=0.0,
                 value_coef=1.0)
    policy, generator = Toy(), torch.Generator().manual_seed(0)
    learner = make_learner(policy, 3, cfg.algorithm)
    optimizer = make_optimizer(learner, 0.95, 0.0, learner.critic, cfg.algorithm.value_lr)
    pay, pays = Rewards(RewardOptions(rewards="correctness:1")), double([[0.0, 1.0], [0.5, 0.0]])
    found = {}
    for _ in range(150):
        with torch.no_grad():
            p = policy.logits[:, 0].softmax(-1)
            first = torch.multinomial(p[0], 64, replacement=True, generator=generator)
            second = torch.multinomial(p[1 + first], 1, generator=generator)[:, 0]
        ids = torch.stack([first, second], -1)[None]
        mask = torch.ones_like(ids).bool()
        e = Experience(batch_of(1), ids, mask, mask, torch.ones(1, 64).bool(), pays[first, second][None, :, None],
                       policy(None, ids, 1.0).logp.detach(), torch.ones(1).bool())
        e = score(learner, e, cfg, Recorder())
        e, found = estimate_advantages(learner, e, pay, cfg)
        update(learner, e, cfg, stepper(optimizer, 0.02, 10.0), Recorder(), Guard(None, "rl", 1, None))
    with torch.no_grad():
        p = policy.logits[:, 0].softmax(-1)
        ids = torch.tensor([[[0, 1], [1, 0]]])
        start, after = learner.critic(None, ids, policy(None, ids, 1.0).hidden)[0, 0, :2].tolist()
    assert p[0, 0] > 0.9 and p[1, 1] > 0.9
    assert after == pytest.approx(p[1, 1].item(), abs=0.06) and start == pytest.approx(
        (p[0, 0] * p[1, 1] + 0.5 * p[0, 1] * p[2, 0]).item(), abs=0.06)


# ---------------------------------------------------------------- what is kept between rollouts

def test_the_coefficient_follows_the_kl_and_the_reference_the_policy():
    policy = Table()
    learner, switches = Learner(policy, 0.1), config(kl_coef=0.1, kl_target=0.05, ref_sync=3).algorithm
    with torch.no_grad():
        policy.logits.add_(1.0)
    for step, kl in enumerate((0.06, 0.5)):
        learner.after(step, {"kl_ref": kl}, switches)
    assert learner.kl_coef.item() == pytest.approx(0.1 * 1.02 * 1.02)          # both errors are held at .2
    learner.after(3, {"kl_ref": 0.0475}, switches)
    assert learner.kl_coef.item() == pytest.approx(0.1 * 1.02 * 1.02 * 0.995)
    assert not torch.equal(learner.reference.logits, policy.logits)
    learner.after(5, {}, switches)
    assert torch.equal(learner.reference.logits, policy.logits)
    assert not any(p.requires_grad for p in learner.reference.parameters())


def test_an_update_ends_early_when_the_policy_has_gone_far():
    policy, e = problem()
    whole, found, *_ = run_update(policy, e, config(mini_batches=3))
    assert len(whole) == 3 and found["stopped"] == 0
    taken, found, *_ = run_update(policy, e, config(mini_batches=3, kl_stop=1e-3))
    assert found["stopped"] == 1 and found["updates"] == 0 and found["kl"] > 1e-3
    assert found["passed"] == int(e.mask[0].sum())


# ---------------------------------------------------------------- what is not finite

class Saved(dict):
    def __call__(self, path, state):
        self[path.name] = state


@pytest.mark.parametrize("where", ["advantage", "loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_saved_and_ends_the_run_in_the_end(where, tmp_path):
    policy, e = problem()
    learner, cfg, files = make_learner(policy, D, config().algorithm), config(epochs=2), Saved()
    optimizer = make_optimizer(learner, 0.95, 0.0)
    guard = Guard(tmp_path, "rl", 4, files)
    e, _ = estimate_advantages(learner, replace(e, values=torch.zeros(0), ref_logp=torch.zeros(0)), REWARDS, cfg)
    bad = {"advantage": replace(e, advantage=e.advantage * float("nan")), "gradient": e,
           "loss": replace(e, old_logp=e.old_logp - 1e4)}[where]         # a ratio of exp(1e4)
    hook = policy.logits.register_hook(lambda g: g * float("inf")) if where == "gradient" else None
    before, each = policy.logits.detach().clone(), 1 if where == "advantage" else 2       # one a rollout, or a step

    def go(part):
        found, _ = update(learner, part, cfg, stepper(optimizer, 0.1, 1.0), Recorder(), guard)
        return found

    assert go(bad)["updates"] == 0 and torch.equal(policy.logits, before) and policy.logits.grad is None
    assert list(files) == ["bad-rl-1.pt", "bad-rl-2.pt"][:each] and guard.count == each
    assert torch.equal(files["bad-rl-1.pt"]["ids"], e.ids) and "pixels" in files["bad-rl-1.pt"]["batch"]
    if hook:
        hook.remove()
    assert go(e)["updates"] == 2 and guard.count == 0 and not torch.equal(policy.logits, before)
    if where != "gradient":
        with pytest.raises(ValueError, match="4 in a row, training diverged. The last checkpoint is intact"):
            for _ in range(4):
                go(bad)
        assert list(files)[-1] == f"bad-rl-{each + 4}.pt"


def test_a_return_that_is_not_finite_does_not_reach_the_critics_units():
    policy, e = problem()
    cfg, saved = config("ppo", return_norm=True), Saved()
    learner = make_learner(policy, D, cfg.algorithm)
    e, _ = estimate_advantages(learner, replace(e, rewards=e.rewards * float("inf"), kl=torch.zeros(0)), REWARDS, cfg)
    update(learner, e, cfg, None, Recorder(), Guard(Path("."), "rl", 3, saved))
    assert len(saved) == 1 and learner.critic.mean == 0 and learner.critic.scale == 1


def test_a_resumed_stage_goes_on_counting_its_bad_steps(tmp_path):
    policy, e = problem()
    learner = make_learner(policy, D, config().algorithm)
    optimizer = make_optimizer(learner, 0.95, 0.0)
    Guard(tmp_path, "rl", 2, Saved(), learner.bad_steps).bad(e, math.nan, {})
    RunFolder(tmp_path).save_progress("rl", 7, learner, optimizer, Meter(), None)
    saved = checkpoint.load(tmp_path / "progress.pt")

    def resumed(progress):
        folder, other = RunFolder(tmp_path), make_learner(policy, D, config().algorithm)
        folder.progress = progress
        assert folder.take_progress("rl", other, optimizer, Meter(), None) == 7
        return other.bad_steps, Guard(tmp_path, "rl", 2, Saved(), other.bad_steps)

    count, guard = resumed(saved)
    assert count == 1
    with pytest.raises(ValueError, match="; 2 in a row, training diverged"):
        guard.bad(e, math.nan, {})
    guard.good()
    assert count == 0

    older = {name: tensor for name, tensor in saved["module"].items() if name != "bad_steps"}
    count, guard = resumed(saved | dict(module=older))         # begun by a version that did not save the number
    guard.bad(e, math.nan, {})
    assert count == 1


def test_the_saved_batch_of_a_bad_step_can_be_opened(tmp_path):
    _, e = problem()
    Guard(tmp_path, "rl", 2, checkpoint.save).bad(e, float("nan"), {"grad_norm": 1.0})
    state = checkpoint.load(tmp_path / "bad-rl-1.pt")
    assert torch.equal(state["old_logp"], e.old_logp) and torch.equal(state["batch"]["ids"], e.batch.ids)


# ---------------------------------------------------------------- what is said

def test_the_preflight_warns_of_what_cannot_be_learned():
    costs = dict(tokens_per_second=100.0, seconds_encode=0.125, seconds_prefill=0.25, seconds_decode=0.5,
                 seconds_score=0.125, seconds_update=3.0)

    def said(rewards, active=0.5, refill=0, **fields):
        return preflight_text(rollout_of(rewards, **fields), active, costs, 30, refill)

    fine = said([[1.0, 0.0], [0.0, 0.0]])
    assert "warning" not in fine and "pass@2 0.500" in fine and "flat groups 0.50" in fine
    assert "correctness 0.250" in fine and "4.00 s a step (update 3.00), about 2.0 minutes in all" in fine
    ended_by_flops = preflight_text(rollout_of([[1.0, 0.0], [0.0, 0.0]]), 0.5, costs, None)
    assert "4.00 s a step (update 3.00), until it has spent the FLOPs it is given" in ended_by_flops
    assert "5.00 s a step (update 3.00), about 2.5 minutes in all" in said([[1.0, 0.0], [0.0, 0.0]], refill=3)
    assert "almost no completion is right" in said([[0.0, 0.0]])
    assert "almost no group can move the model" in said([[0.0, 0.0]], active=0.0)
    gated = preflight_text(rollout_of([[0.0, 0.0]]), 0.0, costs, 30, advice="do this")
    assert "nothing can be learned: do this" in gated and "almost no group" not in gated
    assert "no completion has the form" not in preflight_text(rollout_of([[1.0, 0.0]]), 0.0, costs, 30, advice="this")
    assert "--method=asked or asked_example, or" in formless_advice("asked_system", "chatml")
    assert "--method" not in formless_advice("asked", "brief") and "--cot-lr" in formless_advice("think", "chatml")
    assert "almost no group can move" not in said([[0.0, 0.0]], active=1.0)         # a critic learns from flat ones too
    assert "every completion is right already" in said([[1.0, 1.0]])
    assert "cut off before they answer" in said([[1.0, 0.0]], ended=[[False, False]])


def test_metrics_of_advantages_and_values_by_hand():
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]]]).bool()
    found = metrics.of_advantages(double([[[1, -2, 50], [3, 0, 0]]]), mask)
    assert found == pytest.approx(dict(advantage_abs=2, advantage_std=math.sqrt(19 / 3), advantage_max=3,
                                       advantage_min=-2))
    returns = double([[[1, 2, 50], [3, 0, 0]]])
    found = metrics.of_values(returns / 2, returns, mask)
    assert found == pytest.approx({"explained_variance": 0.75, "value": 1, "return": 2, "return_std": 1})
    assert "explained_variance" not in metrics.of_values(returns, torch.ones_like(returns), mask)


def test_every_number_a_run_logs_is_defined(tmp_path):
    train.main(["--preset=tiny", f"--out={tmp_path / 'run'}", "--stage=clip,align,cot,ppo,grpo,dapo", "--clip-steps=2",
                "--align-steps=2", "--cot-steps=2", "--epochs=2", "--rl-steps=2", "--eval-greedy=2", "--eval-sampled=2",
                "--rewards=correctness:1,format:0.5,repetition:1"])
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    known = [re.sub(r"<\w+>", r"[a-z]+", name) for name in metrics.DEFINITIONS]
    for stage in ("ppo", "grpo", "dapo"):
        logged = {name for line in lines if line["stage"] == stage for name in line} - {"stage", "method", "step"}
        assert [name for name in logged if not any(re.fullmatch(form, name) for form in known)] == []
        assert {"reward", "reward_std", "reward/repetition", "reward_std/repetition", "flat", "length", "lr",
                "samples"} <= logged
        assert ({"value", "lr_critic", "grad_norm_critic"} <= logged) == (stage == "ppo")
        assert ("reward/overlong" in logged) == (stage == "dapo") and (stage == "dapo") == ("kl_coef" not in logged)


def test_an_interrupted_run_goes_on_with_critic_reference_and_coefficient_as_they_were(tmp_path, monkeypatch):
    small = ["--preset=tiny", "--eval-greedy=1", "--eval-sampled=1", "--eval-samples=1", "--rl-steps=5"]
    train.main([*small, "--stage=clip,align,cot", "--clip-steps=2", "--align-steps=2", "--cot-steps=2",
                f"--out={tmp_path / 'start'}"])
    flags = [*small, "--stage=rl", "--algorithm=ppo", f"--init={tmp_path / 'start/cot.pt'}", "--save-every=1",
             "--critic=separate", "--return-norm", "--kl-target=0.001", "--ref-sync=2", "--epochs=2", "--rl-lr=1e-2",
             f"--rewards={tmp_path / 'mine.py'}:mine:1"]
    # A reward that moves the policy, and with it the reference.
    (tmp_path / "mine.py").write_text("def mine(sample, text):\n    return (sum(map(ord, text)) % 7) / 7\n")
    train.main([*flags, f"--out={tmp_path / 'whole'}"])
    log = train.Run.log

    def stop(self, **line):
        if line.get("step") == 3:
            raise KeyboardInterrupt
        log(self, **line)

    monkeypatch.setattr(train.Run, "log", stop)
    with pytest.raises(KeyboardInterrupt):
        train.main([*flags, f"--out={tmp_path / 'stopped'}"])
    monkeypatch.undo()
    train.main(["--resume", f"--out={tmp_path / 'stopped'}"])
    one, two = (checkpoint.load(tmp_path / name / "rl.pt")["vlm"] for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
             for name in ("whole", "stopped")]
    for one, two in zip(*lines, strict=True):
        timed = {name for name in one if name.startswith("seconds") or name.endswith("per_second")}
        assert {name: one[name] for name in one if name not in timed} == {
            name: two[name] for name in two if name not in timed}
    assert lines[0][-1]["kl_coef"] != 0.01 and lines[0][3]["kl_ref"] > 0


def test_the_numbers_of_the_log_go_to_tensorboard_when_asked(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train.main(["--preset=tiny", f"--out={tmp_path / 'run'}", "--stage=clip", "--clip-steps=3", "--tensorboard"])
    board = reader.EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [event.value for event in board.Scalars("clip/loss")] == pytest.approx([line["loss"] for line in lines])
    assert len(lines) == 3


def test_explain_prints_every_completion_with_its_rewards_and_stops(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--preset=tiny", "--clip-steps=2", "--align-steps=2", "--cot-steps=2"]
    train.main([*small, "--stage=clip,align,cot", "--out=start", "--eval-greedy=1", "--eval-sampled=1"])
    capsys.readouterr()
    train.main([*small, "--stage=ppo", "--init=start/cot.pt", "--explain=3", "--group=2",
                "--rewards=correctness:1,format:0.5,consistency:0.1"])
    said = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert said.count("picture  drawn, 48 x 48") == said.count("gold ") == 3 and said.count("think .'") == 3
    assert len(re.findall(r"^  [12]\. \d+ tokens.*: reward [-\d.]+, advantage [-+][\d.]+$", said, re.M)) == 6
    for name, count in (("correctness", 6), ("format ", 6), ("consistency", 6)):
        assert len(re.findall(rf"^     {name} +[\d.]+ x [\d.]+(, gated)?   \S", said, re.M)) == count
    with pytest.raises(ValueError, match="--explain=3 must come with one stage of reinforcement learning"):
        train.main(["--explain=3"])


def test_the_readme_defines_what_is_logged_as_the_code_does():
    lines = (Path(__file__).parents[1] / "rl/README.md").read_text().splitlines()
    first = lines.index("| name | what | unit | estimator |") + 2
    table = lines[first:first + len(metrics.DEFINITIONS)]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [row[0] for row in rows] == [f"`{name}`" for name in metrics.DEFINITIONS]
    for name, *words in rows:
        assert tuple(cell.replace("&#124;", "|") for cell in words) == metrics.DEFINITIONS[name.strip("`")], name
