"""The update of one rollout: score what the algorithm reads, turn rewards into advantages, step.

    experience = select_groups(batch, rollout, cfg)                             # groups that can move the policy
    experience = score(learner, experience, cfg, meter)                         # old_logp, ref_logp, kl, values, ..
    experience, metrics = estimate_advantages(learner, experience, rewards, cfg)
    metrics, tokens = update(learner, experience, cfg, take_step, meter, guard)

`cfg` is train.py's; `meter` (model/flops.py) counts the FLOPs beside each forward. Shapes: P prompts, G completions of
each, C completion tokens.
"""
import math
from copy import copy
from dataclasses import dataclass, replace

import torch

from kernels import is_flat
from model import parallel, sharding
from rl import losses, metrics
from rl.advantages import advantages, is_full, pass_at_k, sampled_kl
from rl.rewards import Rewards
from rl.types import Experience


def select_groups(batch, rollout, cfg, keep_all=False):
    """The Experience of a rollout, its `active` groups marked: those that get forward passes in the update.

    A group is active when some of its tokens train and something can teach them:

        its rewards differ                          always
        they are equal (a flat group)               with --baseline=batch or critic, or --combine=each, which compare
                                                    rewards across groups; with --baseline=zero or one, unless they
                                                    equal that; with a KL penalty or an entropy bonus, but not under
                                                    --refill, which replaces flat groups

    With --baseline=pass_at_k a group is flat when all of it is wrong, or fewer than k of it are.

    The others are dropped under --flat=drop, so that P shrinks. Under --flat=count they stay and count in denominators
    and in the deviation of the batch, without a forward pass. keep_all: every group is active.
    """
    switches = cfg.algorithm
    trained = rollout.mask
    if switches.drop_truncated:
        trained = trained & rollout.ended[..., None]
    active = trained.flatten(1).any(1)                                              # (P,)
    across_groups = switches.compares_groups or switches.combine == "each"
    has_penalty = bool(switches.kl_coef or switches.entropy_coef)
    flat_groups_teach = across_groups or (has_penalty and not switches.refill)
    if not flat_groups_teach:
        active = active & ~teaches_nothing(rollout, cfg)
    if not has_penalty:             # equal to the constant that rewards are compared with: advantages of 0
        active = active & (rollout.reward != switches.without_advantage).any(1)
    if keep_all:
        active = torch.ones_like(active)
    experience = Experience(
        batch=batch, ids=rollout.ids, mask=rollout.mask, trained=trained, ended=rollout.ended, rewards=rollout.rewards,
        sampled_logp=rollout.logp, active=active)
    if switches.flat == "count" or keep_all:
        return experience
    return experience.rows(active.nonzero()[:, 0])


def teaches_nothing(rollout, cfg):
    """Rollout -> (P,) bool: the flat groups, by comparison with the group alone."""
    switches = cfg.algorithm
    if switches.baseline != "pass_at_k":
        return is_flat(rollout.reward)
    weights = rollout.rewards.new_tensor(list(Rewards(cfg.reward).weights.values()))
    return (pass_at_k(is_full(rollout.rewards, weights), switches.pass_k) == 0).all(1)


# ---------------------------------------------------------------- scoring before the update

@torch.no_grad()
def score(learner, experience, cfg, meter):
    """The experience with old_logp, ref_logp, entropy, kl and values, as far as the algorithm reads them.

        policy      with several updates a rollout, KL in the reward, a critic, --top-entropy or --correct
        reference   with a KL penalty; exact KL in the loss waits for the update
        critic      where there is one

    So `grpo_token` with one update a rollout needs no pass at all: its old log-probs are the update's own, detached. In
    the update's own micro-batches, so that the first ratio is exactly 1. Each of several ranks scores those that it
    will update on.
    """
    switches = cfg.algorithm
    has_reference = learner.reference is not None
    kl_in_reward = has_reference and switches.kl_in == "reward"
    several_updates = cfg.rl.epochs * cfg.rl.mini_batches > 1
    needs_policy = (several_updates or kl_in_reward or learner.critic is not None or switches.top_entropy < 1
                    or switches.correct != "none")
    needs_reference = has_reference and (kl_in_reward or switches.kl != "exact")
    if not (needs_policy or needs_reference):
        return experience

    # Zeros where nothing is written below: in groups that are not active, and behind a micro-batch's longest row.
    P, G, C = experience.mask.shape
    filled = {}
    if needs_policy:
        filled["old_logp"] = experience.sampled_logp.new_zeros(P, G, C)
        filled["entropy"] = experience.sampled_logp.new_zeros(P, G, C)
    if needs_reference:
        filled["ref_logp"] = experience.sampled_logp.new_zeros(P, G, C)
    if kl_in_reward:
        filled["kl"] = experience.sampled_logp.new_zeros(P, G, C)
    if learner.critic is not None:
        filled["values"] = experience.sampled_logp.new_zeros(P, G, C + 1)
    experience = replace(experience, **filled)

    for _, indices in experience.split(cfg.rl.mini_batches, cfg.optim.micro_batch, parallel.world()):
        for index in parallel.dealt(indices):
            score_micro_batch(learner, experience, index, filled, cfg, meter)
        if sharding.is_sharded(learner.policy) and parallel.fewer(indices):
            unread = replace(experience, **{name: torch.zeros_like(scores) for name, scores in filled.items()})
            score_micro_batch(learner, unread, indices[0], filled, cfg, copy(meter))
    return replace(experience, **{name: parallel.total(scores) for name, scores in filled.items()})


def score_micro_batch(learner, experience, index, filled, cfg, meter):
    """Writes the scores of the prompts `index` into the tensors `filled` of the experience, by name."""
    switches = cfg.algorithm
    temperature = cfg.sampling.temperature
    micro = experience.rows(index).trim()
    shape = micro.ids.shape
    length = shape[2]
    rows = int(micro.mask.sum())
    if "old_logp" in filled:
        out = learner.policy(micro.batch, micro.ids, temperature, micro.mask)
        meter.forward(learner.policy, micro.batch, shape, rows)
        experience.old_logp[index, :, :length] = out.logp
        experience.entropy[index, :, :length] = out.entropy
    if "ref_logp" in filled and switches.kl == "exact":         # in the reward: the policy was scored, too
        experience.kl[index, :, :length] = exact_kl(learner, micro, out, temperature, meter)
    elif "ref_logp" in filled:
        meter.reference(learner.policy, micro.batch, shape, rows)   # before: it fills in the features of pictures
        ref_logp = learner.reference(micro.batch, micro.ids, temperature, micro.mask).logp
        experience.ref_logp[index, :, :length] = ref_logp
        if "kl" in filled:
            experience.kl[index, :, :length] = sampled_kl(out.logp, ref_logp, switches.kl)
    if "values" in filled:
        experience.values[index, :, :length + 1] = learner.critic(micro.batch, micro.ids, out.hidden)
        if learner.critic.trunk is not None:
            meter.forward(learner.critic.trunk, micro.batch, shape, rows=0)


def exact_kl(learner, micro, out, temperature, meter):
    """KL(policy || reference) (P, G, C) over the whole vocabulary; differentiable in the policy.

    With a teacher as reference, on completions of the policy: on-policy distillation (arXiv 2306.13649, eq. 4 with the
    reverse KL and lambda = 1)."""
    shape = micro.ids.shape
    batch = micro.batch
    if not learner.shares_tower:
        batch = replace(batch, features=batch.features[:0])
    # Counted before: a forward fills in the features of pictures.
    if learner.has_teacher:
        meter.teacher(learner.reference, batch, shape, rows=0)
    else:
        meter.reference(learner.policy, batch, shape, rows=0)
    with torch.no_grad():
        ref_hidden = learner.reference.states(batch, micro.ids)
    meter.exact_kl(learner.policy, learner.reference, int(micro.mask.sum()), backward=out.logp.requires_grad)
    return learner.policy.kl(out.hidden, ref_hidden, learner.reference, micro.mask, temperature)


def drift(old_logp, experience):
    """Largest |ratio - 1| between log-probs (P, G, C) of the policy as it was and those at sampling time."""
    scored_tokens = experience.mask & experience.active[:, None, None]
    ratio = (old_logp - experience.sampled_logp).exp()
    return (ratio - 1).abs().masked_fill(~scored_tokens, 0.0).max()


# ---------------------------------------------------------------- advantages

def estimate_advantages(learner, experience, rewards, cfg):
    """-> (the experience with advantage and returns, metrics of them). rewards: a Rewards."""
    switches = cfg.algorithm
    kl_in_reward = learner.reference is not None and switches.kl_in == "reward"
    weights = experience.rewards.new_tensor(list(rewards.weights.values()))
    advantage, returns = advantages(
        experience, weights, baseline=switches.baseline, std=switches.std, combine=switches.combine,
        kl_coef=learner.kl_coef.item() if kl_in_reward else 0.0, gamma=switches.gamma, lam=switches.lam,
        bootstrap=switches.bootstrap, pass_k=switches.pass_k)
    mask = experience.mask & experience.active[:, None, None]
    found = metrics.of_advantages(advantage, mask)
    if len(experience.kl):
        found["kl_ref"] = metrics.mean(experience.kl[mask])
    if learner.critic is not None:
        found |= metrics.of_values(experience.values[..., :-1], returns, mask)
    return replace(experience, advantage=advantage, returns=returns), found


# ---------------------------------------------------------------- the loss of a micro-batch

def token_weights(experience, switches):
    """What multiplies each token's terms (P, G, C), those of KL and entropy too: normalisation, correction of drift,
    choice of tokens by entropy."""
    e = experience
    weight = losses.weights(e.trained, switches.norm, e.sampled_logp.dtype)
    if switches.correct != "none":
        weight = weight * losses.drift_weights(e.old_logp, e.sampled_logp, e.mask, switches.correct,
                                               switches.correct_cap, switches.correct_level)
    if switches.top_entropy < 1:
        candidates = e.trained & e.active[:, None, None]
        weight = weight * losses.top_entropy(e.entropy, candidates, switches.top_entropy).to(e.entropy.dtype)
    return weight


def unwatched(micro, **values):
    """Stands for rl/recorder.py where nothing records."""


def has_kl_in_loss(learner, switches):
    return learner.reference is not None and switches.kl_in == "loss"


def known_gradient(learner, micro, token_weight, denominator, switches):
    """What the policy loss will send back to log-probs and entropies (P, G, C), or None where that depends on them:
    where the ratio is to stored log-probs, and not 1, or the loss estimates a KL. Exact KL has a head of its own."""
    estimates_kl = has_kl_in_loss(learner, switches) and switches.kl != "exact"
    if len(micro.old_logp) or estimates_kl or switches.loss not in losses.SAME_AT_RATIO_ONE:
        return None
    return losses.sent_at_ratio_one(micro.advantage, token_weight, micro.trained, denominator, switches.entropy_coef)


def loss_of(learner, micro, token_weight, denominator, tokens, cfg, meter, watch=unwatched):
    """Forward of one micro-batch -> (loss, statistics as sums over its trained tokens).

    micro: Experience of P prompts; token_weight (P, G, C); denominator (): that of the whole optimizer step; tokens ():
    trained tokens of the whole step; watch(micro, **values) is shown what it computed for each token, (P, G, C).
    """
    switches = cfg.algorithm
    temperature = cfg.sampling.temperature
    shape = micro.ids.shape
    upstream = known_gradient(learner, micro, token_weight, denominator, switches)
    out = learner.policy(micro.batch, micro.ids, temperature, micro.mask, upstream)
    meter.update(learner.policy, micro.batch, shape, int(micro.mask.sum()), upstream=upstream is not None)
    stats = {}
    if len(micro.old_logp):
        old_logp = micro.old_logp
    else:               # no old log-probs were stored: this is the only update, by the policy that sampled
        old_logp = out.logp.detach()
        stats["drift_max"] = drift(old_logp, micro)
    if switches.ratio == "sequence":
        old_logp = losses.sequence_old_logp(out.logp, old_logp, micro.trained)

    # The KL penalty: an estimate from ref_logp inside the policy loss, or exact and added here.
    kl_in_loss = has_kl_in_loss(learner, switches)
    kl_coef = learner.kl_coef.item() if kl_in_loss else 0.0
    kl = micro.kl
    penalty = {}
    if kl_in_loss and switches.kl != "exact":
        penalty = dict(kl=switches.kl, kl_coef=kl_coef)
    loss, policy_stats = losses.LOSSES[switches.loss](
        out.logp, old_logp, micro.ref_logp if penalty else None, micro.advantage, micro.trained, denominator,
        clip_low=switches.clip_low, clip_high=switches.clip_high, bound=switches.bound or None,
        entropy=out.entropy if switches.entropy_coef else None, entropy_coef=switches.entropy_coef,
        weight=token_weight, **penalty)
    if kl_in_loss and switches.kl == "exact":
        kl = exact_kl(learner, micro, out, temperature, meter).masked_fill(~micro.trained, 0.0)
        loss = loss + kl_coef * (kl * token_weight).sum() / denominator
        policy_stats["kl_ref"] = kl.detach().sum()

    ratio = (out.logp.detach() - old_logp).masked_fill(~micro.trained, 0.0).exp()
    watch(micro, logp=out.logp, entropy=out.entropy, ratio=ratio, kl=kl, weight=token_weight)
    stats |= policy_stats
    stats["entropy"] = (out.entropy.detach() * micro.trained).sum()
    stats["loss"] = loss.detach() * tokens              # as a sum: what is logged is divided by tokens again
    stats["ratio_max"] = ratio.max()
    stats["ratio_min"] = ratio.min()
    if learner.critic is not None:
        value_loss, value_stats = critic_loss(learner.critic, micro, out.hidden, tokens, switches, meter)
        loss = loss + switches.value_coef * value_loss
        stats |= value_stats
    return loss, stats


def critic_loss(critic, micro, hidden, tokens, switches, meter):
    """-> (loss of the critic, statistics as sums over the trained tokens); hidden (P, G, C + 1, D) of the policy."""
    values = critic(micro.batch, micro.ids, hidden)[..., :-1]
    if critic.trunk is not None:
        meter.update(critic.trunk, micro.batch, micro.ids.shape, rows=0)
    # In the critic's own units, so that the gradient that reaches a shared decoder does not grow with the reward.
    loss, stats = losses.value_loss(
        values / critic.scale, micro.values[..., :-1] / critic.scale, micro.returns / critic.scale, micro.trained,
        tokens, switches.value_clip)
    return loss, stats | {"value_loss": loss.detach() * tokens}


# ---------------------------------------------------------------- the optimizer steps

@dataclass
class MiniBatch:
    """What one optimizer step trains on: the prompts (P,) that have a forward, the denominator () of their loss, and
    their number of trained tokens (); of those prompts this rank's micro-batches, each with its token weights
    (P, G, C); fewer: how many of them this rank has fewer than others."""
    active: torch.Tensor
    denominator: torch.Tensor
    tokens: torch.Tensor
    micros: list
    fewer: int = 0


def make_mini_batches(experience, cfg):
    """Experience -> list of MiniBatch, of those with active groups."""
    token_weight = token_weights(experience, cfg.algorithm)
    minis = []
    for rows, indices in experience.split(cfg.rl.mini_batches, cfg.optim.micro_batch, parallel.world()):
        if not indices:
            continue
        active = torch.cat(indices)
        micros = []
        for index in parallel.dealt(indices):
            micro = experience.rows(index).trim()
            micros.append((micro, token_weight[index, :, :micro.mask.shape[-1]]))
        # Over all rows, those that are only counted too.
        denominator = losses.denominator(experience.trained[rows], cfg.algorithm.norm, cfg.sampling.max_new)
        tokens = experience.trained[active].sum()
        minis.append(MiniBatch(active, denominator, tokens, micros, parallel.fewer(indices)))
    return minis


def keep_pace(learner, experience, mini, cfg, meter):
    """Forward and backward of one prompt, which count for nothing: weights in shards are gathered, and their gradients
    summed, by all ranks together, those that have no micro-batch left as well."""
    micro = experience.rows(mini.active[:1]).trim()
    no_weight = torch.zeros_like(micro.sampled_logp)
    loss, _ = loss_of(learner, micro, no_weight, mini.denominator, mini.tokens, cfg, copy(meter))
    (0.0 * loss).backward()         # a critic's loss has no such weights


def update(learner, experience, cfg, take_step, meter, guard, watch=unwatched):
    """epochs x mini_batches optimizer steps on the scored experience -> (metrics, completion tokens that passed).

    take_step() -> {name: gradient norm}, having stepped unless a norm is not finite; take_step(drop=True) only clears
    the gradient. What is not finite is shown to the guard and left out. The update ends early when the KL of a
    mini-batch from the old policy exceeds --kl-stop. Every epoch takes the same mini-batches in the same order, where
    PPO's code and TRL shuffle. watch: see `loss_of`.
    """
    for estimate in (experience.advantage, experience.returns):
        if len(estimate) and not torch.isfinite(estimate[experience.mask]).all():
            guard.bad(experience, math.nan, {})
            return {"updates": 0, "stopped": 0.0}, 0
    if learner.critic is not None:
        learner.critic.see(experience.returns[experience.mask])

    sums = {}               # of the steps that were taken
    all_tokens = 0
    norms = []
    first_stats = {}        # of the first mini-batch, before any step
    stopped = False
    passed = 0              # completion tokens that went through the update
    for mini in make_mini_batches(experience, cfg) * cfg.rl.epochs:
        stats = {}
        for micro, token_weight in mini.micros:
            loss, micro_stats = loss_of(learner, micro, token_weight, mini.denominator, mini.tokens, cfg, meter, watch)
            loss.backward()
            metrics.add(stats, micro_stats)
            passed += int(micro.mask.sum())
        if mini.fewer and sharding.is_sharded(learner.policy):
            keep_pace(learner, experience, mini, cfg, meter)
        stats = metrics.of_all_ranks(stats)
        first_stats = first_stats or stats
        if cfg.algorithm.kl_stop and (stats["kl"] / mini.tokens).item() > cfg.algorithm.kl_stop:
            stopped = True
            take_step(drop=True)
            break
        finite = math.isfinite(stats["loss"].item())
        norm = take_step(drop=not finite)
        if not finite or not all(map(math.isfinite, norm.values())):
            guard.bad(experience.rows(mini.active).trim(), stats["loss"].item() / mini.tokens.item(), norm)
            continue
        guard.good()
        metrics.add(sums, stats)
        all_tokens = all_tokens + mini.tokens
        norms.append(norm)

    found = metrics.means(sums, all_tokens) if norms else {}
    if stopped:
        found["kl"] = (stats["kl"] / mini.tokens).item()
    for name in norms[0] if norms else ():
        found[name] = sum(norm[name] for norm in norms) / len(norms)
    if len(experience.old_logp):
        found["drift_max"] = drift(experience.old_logp, experience).item()
    elif "drift_max" in first_stats:
        found["drift_max"] = first_stats["drift_max"].item()
    return found | {"updates": len(norms), "stopped": float(stopped)}, parallel.total(passed)
