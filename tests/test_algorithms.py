"""Every algorithm against its paper, a token at a time in fp64; through the same update as a run takes."""
import math
from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from data.sample import Batch
from model.runs.config import change, from_command_line, options
from model.vlm import Output
from rl.algorithms import ALGORITHMS, ARMS, STAGES, labels, of_flags, of_stage
from rl.learner import Guard, make_learner
from rl.rewards import RewardOptions, Rewards
from rl.types import Experience, Rollout
from rl.update import estimate_advantages, select_groups, update
from tiny import difference
from train import COMPARISONS, PRESETS, Config

P, G, C, V, D, BUDGET = 3, 4, 6, 5, 3, 8
LENGTH = torch.tensor([[6, 1, 3, 4], [2, 5, 6, 1], [3, 3, 2, 6]])
MASK = torch.arange(C) < LENGTH[..., None]
EPS = 1e-6


class Table(nn.Module):
    """A policy without a network: logits for each prompt and place, and states to read values from."""

    def __init__(self, seed=0, prompts=P, places=C, vocab=V):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(torch.randn(prompts, places, vocab, generator=generator, dtype=torch.float64))
        self.hidden = nn.Parameter(torch.randn(prompts, places + 1, D, generator=generator, dtype=torch.float64))

    def every(self, batch):
        return self.logits[batch.ids[:, 0]].log_softmax(-1)

    def states(self, batch, completions):
        group, places = completions.shape[1:]
        return self.hidden[batch.ids[:, 0], None, :places + 1].expand(-1, group, -1, -1)

    def __call__(self, batch, completions, temperature, mask=None, upstream=None):
        places = completions.shape[2]
        every = (self.logits[batch.ids[:, 0], None, :places] / temperature).log_softmax(-1)
        every = every.expand(-1, completions.shape[1], -1, -1)
        return Output(every.gather(-1, completions[..., None])[..., 0], -(every.exp() * every).sum(-1),
                      self.states(batch, completions))

    def kl(self, hidden, theirs, reference, mask, temperature):
        raise NotImplementedError

    def base(self):
        return None

    def twin(self):
        other = Table(1, *self.logits.shape)
        other.load_state_dict(self.state_dict())
        return other


def batch_of(prompts):
    ids = torch.arange(prompts)[:, None]
    nothing = torch.zeros(0)
    return Batch(ids, torch.ones(prompts).long(), torch.zeros_like(ids).bool(), nothing, nothing.long(), nothing)


def problem(seed=0, spread=0.4, flat=None):
    """An experience far enough off-policy for every clip to act, with all that any algorithm reads; the rewards of the
    group `flat` are all equal."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ids = torch.randint(V, (P, G, C), generator=generator)
    policy = Table(seed)
    logp = policy(batch_of(P), ids, 1.0).logp.detach()
    old, ref = (torch.where(MASK, logp + spread * normal(P, G, C), 7.0) for _ in range(2))
    rewards = torch.stack([torch.rand(P, G, generator=generator, dtype=torch.float64).round(),
                           torch.rand(P, G, generator=generator, dtype=torch.float64)], -1)
    if flat is not None:
        rewards[flat] = torch.tensor([1.0, 0.5])
    return policy, Experience(
        batch_of(P), ids, MASK, MASK, LENGTH < C, rewards, old + 0.1 * normal(P, G, C), torch.ones(P).bool(),
        old_logp=old, ref_logp=ref,
        entropy=torch.rand(P, G, C, generator=generator, dtype=torch.float64),
        values=torch.where(torch.arange(C + 1) <= LENGTH[..., None], 0.3 * normal(P, G, C + 1), 9.0))


def config(name="", **switches):
    """The config of an algorithm, of the default one for a name that is none, with some options changed."""
    of_algorithm = vars(ALGORITHMS[name]) if name in ALGORITHMS else {}
    common = dict(max_new=BUDGET, rl_batch=6, epochs=1, mini_batches=1, micro_batch=0)
    return change(Config(), **{**common, **of_algorithm, **switches})


REWARDS = Rewards(RewardOptions(rewards="correctness:1,format:0.5"))


class Recorder:
    """In the place of a Meter, which counts the FLOPs of a vision-language model: the names of what was counted."""

    def __init__(self):
        self.names = []

    def forward(self, *args, **options):
        self.names.append("forward")

    def reference(self, *args, **options):
        self.names.append("reference")

    def update(self, *args, **options):
        self.names.append("update")

    def exact_kl(self, *args, **options):
        self.names.append("exact_kl")


def run_update(policy, experience, cfg):
    """-> (the gradients of policy and critic at each optimizer step, metrics, with the tokens that passed, the
    experience with its advantages, the learner)."""
    switches = cfg.algorithm
    learner = make_learner(policy, D, switches)
    if learner.critic is not None:
        with torch.no_grad():
            learner.critic.head.weight.copy_(torch.tensor([[0.3, -0.2, 0.1]]))
    if switches.kl_coef and switches.kl_in == "reward":
        experience = replace(experience, kl=torch.where(MASK, experience.old_logp - experience.ref_logp, 5.0))
    elif not switches.kl_coef:
        experience = replace(experience, ref_logp=torch.zeros(0))
    if learner.critic is None:
        experience = replace(experience, values=torch.zeros(0))
    taken = []

    def take_step(drop=False):
        taken.append({name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None})
        learner.zero_grad(set_to_none=True)
        return {"grad_norm": 1.0}

    experience, found = estimate_advantages(learner, experience, REWARDS, cfg)
    of_steps, passed = update(learner, experience, cfg, take_step, Recorder(), Guard(None, "rl", 3, None))
    return taken, found | of_steps | {"passed": passed}, experience, learner


# ---------------------------------------------------------------- the papers, in loops

class Paper:
    """What the formulas speak of, one completion i and token t at a time."""

    def __init__(self, policy, experience, cfg, without=None):
        e = experience
        out = policy(e.batch, e.ids, 1.0)
        self.cfg, self.groups = cfg.algorithm, [[(p, g) for g in range(G)] for p in range(P)]
        self.all = [i for group in self.groups for i in group if i[0] != without]
        self.n = {i: int(LENGTH[i]) for i in self.all}
        self.logp, self.old, self.ref = ({i: list(x[i]) for i in self.all} for x in (out.logp, e.old_logp, e.ref_logp))
        self.R = {i: (e.rewards[i] * torch.tensor([1.0, 0.5])).sum().item() for i in self.all}
        self.V = {i: e.values[i].tolist() for i in self.all}
        self.out, self.e = out, e

    def ratio(self, i, t):
        return (self.logp[i][t] - self.old[i][t]).exp()

    def s(self, i):
        return (sum(self.logp[i][t] - self.old[i][t] for t in range(self.n[i])) / self.n[i]).exp()

    def clipped(self, ratio, a):
        low, high = 1 - self.cfg.clip_low, 1 + self.cfg.clip_high
        return min(ratio * a, (high if ratio > high else low if ratio < low else ratio) * a)

    def group_mean(self, i):
        return sum(self.R[j] for j in self.groups[i[0]]) / G

    def group_std(self, i):
        return math.sqrt(sum((self.R[j] - self.group_mean(i)) ** 2 for j in self.groups[i[0]]) / (G - 1)) + EPS

    def A(self, i):
        return (self.R[i] - self.group_mean(i)) / self.group_std(i)

    def whitened(self, of):
        """{(i, t): value} less its mean, over its deviation."""
        mean = sum(of.values()) / len(of)
        std = math.sqrt(sum((x - mean) ** 2 for x in of.values()) / (len(of) - 1))
        return {key: (x - mean) / (std + EPS) for key, x in of.items()}

    def tokens(self):
        return sum(self.n.values())

    def k1(self, i, t):
        return (self.old[i][t] - self.ref[i][t]).item()


def grpo(x):
    total = 0
    for i in x.all:
        for t in range(x.n[i]):
            off = x.ref[i][t] - x.logp[i][t]
            total += (x.clipped(x.ratio(i, t), x.A(i)) - x.cfg.kl_coef * (off.exp() - off - 1)) / x.n[i]
    return -total / len(x.all)


def dr_grpo(x):
    return -sum(x.clipped(x.ratio(i, t), x.R[i] - x.group_mean(i)) for i in x.all for t in range(x.n[i])) / (
        len(x.all) * BUDGET)


def dapo(x):
    return -sum(x.clipped(x.ratio(i, t), x.A(i)) for i in x.all for t in range(x.n[i])) / x.tokens()


def gspo(x):
    return -sum(x.clipped(x.s(i), x.A(i)) for i in x.all) / len(x.all)


def cispo(x):
    return -sum(min(x.ratio(i, t).item(), 1.2) * x.A(i) * x.logp[i][t]
                for i in x.all for t in range(x.n[i])) / x.tokens()


def sapo(x):
    total = 0
    for i in x.all:
        tau = 1.0 if x.A(i) > 0 else 1.05
        total += sum((tau * (x.ratio(i, t) - 1)).sigmoid() * 4 / tau * x.A(i) for t in range(x.n[i])) / x.n[i]
    return -total / len(x.all)


def luspo(x):
    return -sum(x.n[i] * x.clipped(x.s(i), x.A(i)) for i in x.all) / len(x.all)


def rloo(x):
    for i in x.all:
        x.R[i] -= x.cfg.kl_coef * sum(x.k1(i, t) for t in range(x.n[i]))
    total = 0
    for i in x.all:
        others = [x.R[j] for j in x.groups[i[0]] if j != i]
        total += sum(x.clipped(x.ratio(i, t), x.R[i] - sum(others) / len(others)) for t in range(x.n[i]))
    return -total / len(x.all)


def reinforce_plus_plus(x):
    A = x.whitened({(i, t): x.R[i] - x.cfg.kl_coef * sum(x.k1(i, later) for later in range(t, x.n[i]))
                    for i in x.all for t in range(x.n[i])})
    return -sum(x.clipped(x.ratio(i, t), A[i, t]) for i in x.all for t in range(x.n[i])) / x.tokens()


def ppo(x):
    A, returns, lam, gamma = {}, {}, x.cfg.lam, x.cfg.gamma
    for i in x.all:
        after, follows = 0.0, 0.0
        for t in reversed(range(x.n[i])):
            r = (x.R[i] if t == x.n[i] - 1 else 0.0) - x.cfg.kl_coef * x.k1(i, t)
            after = r + gamma * follows - x.V[i][t] + gamma * lam * after
            follows, A[i, t], returns[i, t] = x.V[i][t], after, after + x.V[i][t]
    A, total = x.whitened(A), 0
    for i in x.all:
        for t in range(x.n[i]):
            now = (x.out.hidden[i][t] * torch.tensor([0.3, -0.2, 0.1])).sum()
            held = x.V[i][t] + (now - x.V[i][t]).clamp(-0.2, 0.2)
            error = 0.5 * max((now - returns[i, t]) ** 2, (held - returns[i, t]) ** 2)
            total += x.cfg.value_coef * error - x.clipped(x.ratio(i, t), A[i, t])
    return total / x.tokens()


# grpo_token is DAPO's sum with one clip on both sides.
PAPERS = {"grpo_token": dapo, "grpo": grpo, "dr_grpo": dr_grpo, "dapo": dapo, "gspo": gspo, "cispo": cispo,
          "sapo": sapo, "luspo": luspo, "rloo": rloo, "reinforce++": reinforce_plus_plus, "ppo": ppo}


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_an_algorithm_equals_its_paper_in_value_and_gradient(name, seed):
    policy, experience = problem(seed)
    cfg = config(name, **(dict(clip_low=0.05, clip_high=0.08) if name in ("gspo", "luspo") else {}))
    wanted = PAPERS[name](Paper(policy, experience, cfg))
    wanted_gradient = torch.autograd.grad(wanted, policy.logits)[0]
    (taken,), found, *_ = run_update(policy, experience, cfg)
    assert difference(taken["policy.logits"], wanted_gradient) < 1e-12
    if name != "ppo":               # whose loss is logged apart from the critic's
        assert found["loss"] == pytest.approx(wanted.item(), rel=1e-12)
    if name not in ("cispo", "sapo"):
        assert found["clip_low"] > 0.04 and found["clip_high"] > 0.04       # both clips are at work


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("minis", [1, 3])
def test_flat_groups_count_as_the_paper_counts_them(name, minis):
    policy, experience = problem(flat=1)
    cfg = config(name, **(dict(clip_low=0.05, clip_high=0.08) if name in ("gspo", "luspo") else {}))
    rollout = Rollout(experience.ids, experience.mask, experience.sampled_logp, experience.ended, [], [], {},
                      experience.rewards, (experience.rewards * torch.tensor([1.0, 0.5])).sum(-1))
    found = select_groups(experience.batch, rollout, cfg)
    kept = found.batch.ids[:, 0]
    drops = name in ("grpo_token", "dapo")
    assert kept.tolist() == ([0, 2] if drops else [0, 1, 2])
    assert found.active.tolist() == ([True, True] if drops else [True, bool(cfg.algorithm.kl_coef), True])
    rest = {field: getattr(experience, field)[kept] for field in ("old_logp", "ref_logp", "entropy", "values")}
    rest["old_logp"] = torch.where(found.active[:, None, None], rest["old_logp"], 0.0)       # as where none was scored
    taken, metrics, *_ = run_update(policy, replace(found, **rest), change(cfg, mini_batches=minis))
    off = (rest["old_logp"] - found.sampled_logp).exp() - 1
    drift = off[found.mask & found.active[:, None, None]].abs().max().item()
    assert metrics["drift_max"] == pytest.approx(drift, rel=1e-12)
    if minis == 1:
        paper = PAPERS[name](Paper(policy, experience, cfg, without=1 if drops else None))
        assert difference(taken[0]["policy.logits"], torch.autograd.grad(paper, policy.logits)[0]) < 1e-12
    else:           # a mini-batch of nothing but flat groups is no step
        assert len(taken) == (2 if drops or not cfg.algorithm.kl_coef else 3)


def reinforce(x, constant=0.0):
    """Against a constant: of rewards 1 and 0 only right completions, or with 1 only wrong ones, have an advantage."""
    return -sum(x.clipped(x.ratio(i, t), x.R[i] - constant) for i in x.all for t in range(x.n[i])) / x.tokens()


def weighted_likelihood(x):
    return -sum(x.R[i] * x.logp[i][t] for i in x.all for t in range(x.n[i])) / x.tokens()


def grpo_token_kl(x):
    total = 0
    for i in x.all:
        for t in range(x.n[i]):
            off = x.ref[i][t] - x.logp[i][t]
            total += x.clipped(x.ratio(i, t), x.A(i)) - 0.04 * (off.exp() - off - 1)
    return -total / x.tokens()


IN_LOOPS = {"reinforce": reinforce, "negative": partial(reinforce, constant=1.0), "grpo_token_kl": grpo_token_kl,
            "rejection_iterated": weighted_likelihood}


@pytest.mark.parametrize("name", IN_LOOPS)
@pytest.mark.parametrize("seed", [0, 1])
def test_an_arm_equals_its_formula_in_value_and_gradient(name, seed):
    policy, experience = problem(seed)
    cfg = change(of_stage(config(), name), epochs=1, mini_batches=1)
    wanted = IN_LOOPS[name](Paper(policy, experience, cfg))
    (taken,), found, *_ = run_update(policy, experience, cfg)
    assert difference(taken["policy.logits"], torch.autograd.grad(wanted, policy.logits)[0]) < 1e-12
    assert found["loss"] == pytest.approx(wanted.item(), rel=1e-12)
    # a ratio that is held at 1 on purpose is no clipped one
    is_pinned = name == "rejection_iterated"
    assert {"clip_low", "clip_high"} & {*found} == (set() if is_pinned else {"clip_low", "clip_high"})


@pytest.mark.parametrize("name, kept", [("reinforce", [0, 2]), ("negative", [1, 2]), ("grpo_token", [2]),
                                        ("grpo_token_kl", [0, 1, 2])])
def test_groups_that_teach_an_arm_nothing_are_left_out(name, kept):
    policy, experience = problem()
    reward = torch.tensor([[1.0] * 4, [0.0] * 4, [1.0, 0.0, 0.0, 1.0]])
    rollout = Rollout(experience.ids, experience.mask, experience.sampled_logp, experience.ended, [], [], {},
                      reward[..., None], reward)
    found = select_groups(experience.batch, rollout, of_stage(config(), name))
    assert found.batch.ids[:, 0].tolist() == kept


def test_an_arm_is_another_setting_than_the_default_and_its_options_exist():
    for name, switches in ARMS.items():
        arm = of_stage(Config(), name)
        assert arm != Config() and {*switches} <= {*options(Config)}, name
    elsewhere = {"distilled", "rl_slow", "rl_curriculum", "rl_pass_at_k"}       # tests of distillation and of growth
    assert {*IN_LOOPS} | elsewhere == {*ARMS}


def test_every_algorithm_has_a_paper():
    assert set(PAPERS) == set(ALGORITHMS)


def test_the_defaults_are_those_of_the_default_algorithm():
    assert ALGORITHMS[Config().rl.algorithm] == Config().algorithm
    assert all(vars(switches).keys() <= options(Config).keys() for switches in ALGORITHMS.values())


# ---------------------------------------------------------------- what results are called

def named(*argv):
    """The labels of the stages of a command line."""
    cfg = from_command_line(Config, PRESETS, argv, "", more=of_flags)
    return labels(cfg, cfg.stages())


@pytest.mark.parametrize("argv, wanted", [
    ((), {"cot": "cot", "rl": "grpo_token", "filtered": "filtered"}),
    (("--algorithm=grpo",), {"rl": "grpo", "cot_continued": "cot_continued"}),
    (("--algorithm=ppo", "--compare=all"), {"rl": "ppo", "rl_zero": "ppo_zero"}),
    (("--compare=all",), {"rl": "grpo_token", "rl_zero": "grpo_token_zero", "perfect": "perfect"}),
    (("--stage=cot,rl,grpo",), {"rl": "grpo_token", "grpo": "grpo"}),
    (("--compare=rewards",), {"right": "right", "format_gated": "format_gated"}),
    (("--compare=rewards", "--algorithm=ppo"), {"right": "ppo_right"}),
    (("--kl-coef=0.04",), {"rl": "grpo_token[kl_coef=0.04]"}),
    (("--algorithm=grpo", "--kl-coef=0", "--std=none"), {"rl": "grpo[std=none,kl_coef=0.0]"}),
    (("--stage=cot,rl,ppo,dapo", "--kl-coef=0.5"), {
        "rl": "grpo_token[kl_coef=0.5]", "ppo": "ppo[kl_coef=0.5]", "dapo": "dapo[kl_coef=0.5]"}),
    (("--stage=cot,right,format", "--gated=True"), {"right": "right[gated=True]", "format": "format[gated=True]"}),
    (("--epochs=2", "--mini-batches=4", "--rl-lr=1e-4"), {"rl": "grpo_token"})])
def test_a_label_names_the_setting_that_made_it(argv, wanted):
    found = named(*argv)
    assert {stage: found[stage] for stage in wanted} == wanted


@pytest.mark.parametrize("compare", COMPARISONS)
@pytest.mark.parametrize("more", [(), ("--entropy-coef=0.1",), ("--norm=sum", "--gamma=0.9")], ids=str)
def test_no_two_settings_of_a_comparison_share_a_label(compare, more):
    cfg = from_command_line(Config, PRESETS, [f"--compare={compare}", *more], "", more=of_flags)
    found = labels(cfg, cfg.stages())
    assert len({*found.values()}) == len(found) == len(cfg.stages())
    settings = {}
    for stage in set(cfg.stages()) & set(STAGES):
        used = of_stage(cfg, stage)
        asks_only = stage == "rl_zero"
        settings.setdefault(found[stage], set()).add((asks_only, change(used, algorithm="grpo_token")))
    assert all(len(of) == 1 for of in settings.values())


@pytest.mark.parametrize("argv", [
    ["--stage=cot,rl,grpo_token"], ["--stage=cot,rl,rl"], ["--stage=cot,ppo,cot"], ["--stage=rl,format_gated"],
    ["--stage=right,right_gated", "--gated=True"], ["--compare=rewards", "--rewards=format:1"],
    ["--stage=rl,right", "--rewards=correctness:1", "--gated=False"], ["--compare=evidence", "--kl-coef=0.1"]])
def test_a_setting_that_is_named_twice_is_one_sentence(argv):
    cfg = from_command_line(Config, PRESETS, argv, "", more=of_flags)
    with pytest.raises(ValueError, match="--(stage|compare)=.*: .* are one setting with these flags, .*; name it once"):
        cfg.check()


def test_off_policy_the_algorithms_gradients_differ_pairwise():
    policy, experience = problem()
    taken = {name: run_update(policy, experience, config(name))[0][0]["policy.logits"].flatten() for name in PAPERS}
    for one, two in combinations(PAPERS, 2):
        cosine = torch.cosine_similarity(taken[one], taken[two], dim=0).item()
        assert cosine < 0.9999, (one, two, cosine)


def test_the_critics_gradient_reaches_the_shared_decoder_and_stops_at_a_detached_one():
    policy, experience = problem()
    wanted = torch.autograd.grad(ppo(Paper(policy, experience, config("ppo"))), policy.hidden)[0]
    shared, detached, separate = (run_update(policy, experience, config("ppo", critic=kind))[0][0]
                                  for kind in ("shared", "detached", "separate"))
    assert difference(shared["policy.hidden"], wanted) < 1e-12
    assert "policy.hidden" not in detached and not detached.get("policy.hidden", torch.zeros(1)).any()
    assert difference(separate["critic.trunk.hidden"], wanted) < 1e-12 and "policy.hidden" not in separate
    for other in (detached, separate):
        assert difference(other["critic.head.weight"], shared["critic.head.weight"]) < 1e-12
        assert torch.equal(other["policy.logits"], shared["policy.logits"])


# ---------------------------------------------------------------- the first step, micro-batches, mini-batches

PLAIN = [dict(norm=norm, ratio=ratio) for norm in ("sequence", "token", "constant", "sum") for ratio in (
    "token", "sequence")]


@pytest.mark.parametrize("switches", PLAIN, ids=str)
def test_on_policy_the_gradient_is_that_of_reinforce_with_a_baseline_and_every_ratio_exactly_one(switches):
    policy, experience = problem()
    experience = replace(experience, old_logp=torch.zeros(0), ref_logp=torch.zeros(0))
    (taken,), found, done, _ = run_update(policy, experience, config(**switches))
    logp = policy(experience.batch, experience.ids, 1.0).logp
    over = {"sequence": LENGTH[..., None] * P * G, "token": LENGTH.sum(), "constant": P * G * BUDGET, "sum": P * G}
    reinforce = -(done.advantage * logp * MASK / over[switches["norm"]]).sum()
    assert difference(taken["policy.logits"], torch.autograd.grad(reinforce, policy.logits)[0]) < 1e-12
    assert [found[name] for name in ("ratio_off", "ratio_off_max", "kl", "clip_low", "clip_high")] == [0] * 5


@pytest.mark.parametrize("name", [*PAPERS, "corrected", "top_entropy", "truncated"])
def test_micro_batches_give_the_same_gradient(name):
    policy, experience = problem()
    switches = {"corrected": dict(correct="truncate", norm="sequence", correct_level="sequence"),
                "top_entropy": dict(top_entropy=0.3, entropy_coef=0.1),
                "truncated": dict(drop_truncated=True, norm="sequence")}.get(name, {})
    if name == "truncated":
        experience = replace(experience, trained=MASK & experience.ended[..., None])
    whole, *parts = (run_update(policy, experience, config(name, micro_batch=size, **switches))[0]
                     for size in (0, 1, 2, 4))
    for part in parts:
        assert len(part) == len(whole) == 1 and difference(part[0], whole[0]) < 1e-12


def test_mini_batches_and_epochs_take_the_rows_in_order_each_over_its_own_denominator():
    policy, experience = problem()
    cfg = config(mini_batches=3, epochs=2)
    taken, found, done, _ = run_update(policy, experience, cfg)
    assert len(taken) == found["updates"] == 6
    for step, gradient in enumerate(taken):
        row = torch.tensor([step % 3])
        part = done.rows(row)
        alone, _ = update(make_learner(policy, D, cfg.algorithm), part, config(), lambda drop=False: taken.append(
            policy.logits.grad.clone()) or policy.zero_grad() or {"grad_norm": 1.0}, Recorder(), Guard(
                None, "rl", 3, None))
        assert alone["updates"] == 1
        assert difference(taken.pop(), gradient["policy.logits"]) < 1e-12


# ---------------------------------------------------------------- TRL's own loss

TRL = {"grpo": dict(loss_type="grpo"), "dr_grpo": dict(loss_type="dr_grpo"), "dapo": dict(loss_type="dapo"),
       "gspo": dict(loss_type="grpo", importance_sampling_level="sequence"),
       "cispo": dict(loss_type="cispo"), "sapo": dict(loss_type="sapo"),
       "luspo": dict(loss_type="luspo", importance_sampling_level="sequence"), "bound": dict(loss_type="dapo")}


@pytest.mark.parametrize("name", TRL)
def test_trl_computes_the_same_loss_on_the_same_tensors(name):
    trainer = pytest.importorskip("trl").GRPOTrainer
    policy, experience = problem()
    cfg = config(name, **(dict(bound=1.5) if name == "bound" else {}))
    switches = cfg.algorithm
    (taken,), found, done, _ = run_update(policy, experience, cfg)
    out = policy(experience.batch, experience.ids, 1.0)

    class Same:                     # one process: gathering is nothing
        num_processes, sync_gradients = 1, True
        gather = staticmethod(lambda x: x)
        reduce = staticmethod(lambda x, reduction: x)

    stub = SimpleNamespace(
        **{**dict(importance_sampling_level="token"), **TRL[name]}, aux_loss_enabled=False, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, beta=switches.kl_coef, epsilon_low=switches.clip_low,
        epsilon_high=switches.clip_high + (name == "cispo"), use_vllm=False, vllm_importance_sampling_correction=False,
        max_completion_length=BUDGET, current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=switches.bound or None, use_bias_correction_kl=False, sapo_temperature_pos=1.0,
                             sapo_temperature_neg=1.05, steps_per_generation=1),
        accelerator=Same(), model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (out.logp.flatten(0, 1), out.entropy.flatten(0, 1), None))
    mask = MASK.flatten(0, 1).double()
    loss = trainer._compute_loss(stub, None, dict(
        prompt_ids=torch.zeros(P * G, 1), prompt_mask=torch.ones(P * G, 1), completion_ids=done.ids.flatten(0, 1),
        completion_mask=mask, advantages=done.advantage[..., 0].flatten(), num_items_in_batch=mask.sum(),
        old_per_token_logps=done.old_logp.flatten(0, 1), ref_per_token_logps=experience.ref_logp.flatten(0, 1)))
    tolerance = 1e-6 if name == "sapo" else 1e-12       # TRL's temperature is a float32 1.05, whatever the inputs are
    assert found["loss"] == pytest.approx(loss.item(), rel=tolerance)
    assert difference(taken["policy.logits"], torch.autograd.grad(loss, policy.logits)[0]) < tolerance
