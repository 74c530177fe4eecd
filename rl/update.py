"""The update of one rollout: score what the switches ask for, turn rewards into advantages, step.

`cfg` has train.py's fields of the same names; `spend(name, ..)` counts the FLOPs of that name in model/flops.py.
"""
import math
from dataclasses import replace

import torch

from kernels import is_flat
from rl import losses, metrics
from rl.advantages import advantages, sampled_kl
from rl.types import Experience


def informative(batch, rollout, cfg, everyone=False):
    """The Experience of the groups that can move the policy, or of `everyone`.

    A group whose rewards are all equal cannot, unless its tokens' KL or entropy count, or its rewards are compared with
    more than each other; nor can one none of whose tokens train. With --flat=count they stay, to be counted in the
    denominators and in the deviation of the batch, but no forward is spent on them.
    """
    trained = rollout.mask & rollout.ended[..., None] if cfg.drop_truncated else rollout.mask
    active = trained.flatten(1).any(1)
    alone = cfg.baseline in ("mean", "leave_one_out") and cfg.combine == "sum"
    if alone and (cfg.refill or not cfg.kl_coef and not cfg.entropy_coef):
        active &= ~is_flat(rollout.reward)
    whole = Experience(batch, rollout.ids, rollout.mask, trained, rollout.ended, rollout.rewards, rollout.logp,
                       active | everyone)
    return whole if cfg.flat == "count" or everyone else whole.rows(active.nonzero()[:, 0])


@torch.no_grad()
def scored(learner, experience, cfg, spend):
    """With old_logp, ref_logp, entropy, kl, values, as far as they are needed.

    In the update's own micro-batches, so that the first ratio is exactly 1. With one update a rollout and no other need
    there is no pass: the policy's own log-prob, detached, is the old one.
    """
    e, shape = experience, experience.mask.shape
    in_reward = learner.reference is not None and cfg.kl_in == "reward"
    needs_policy = (cfg.epochs * cfg.mini_batches > 1 or learner.critic is not None or in_reward
                    or cfg.top_entropy < 1 or cfg.correct != "none")
    needs_reference = learner.reference is not None and (in_reward or cfg.kl != "exact")
    logp = e.sampled_logp.new_zeros(shape)
    if needs_policy:
        e = replace(e, old_logp=logp, entropy=torch.zeros_like(logp))
    if needs_reference:
        e = replace(e, ref_logp=torch.zeros_like(logp))
    if in_reward:
        e = replace(e, kl=torch.zeros_like(logp))
    if learner.critic is not None:
        e = replace(e, values=logp.new_zeros(*shape[:2], shape[2] + 1))
    if not (needs_policy or needs_reference):
        return e
    for index in (index for _, indices in e.split(cfg.mini_batches, cfg.micro_batch) for index in indices):
        part = e.rows(index).trim()
        C = part.mask.shape[-1]
        if needs_policy:
            out = learner.policy(part.batch, part.ids, cfg.temperature)
            spend("forward", part.batch, part.ids.shape)
            e.old_logp[index, :, :C], e.entropy[index, :, :C] = out.logp, out.entropy
        if needs_reference and cfg.kl == "exact":
            e.kl[index, :, :C] = exact_kl(learner, part, out, cfg, spend)
        elif needs_reference:
            theirs = learner.reference(part.batch, part.ids, cfg.temperature).logp
            spend("reference", part.batch, part.ids.shape)
            e.ref_logp[index, :, :C] = theirs
            if in_reward:
                e.kl[index, :, :C] = sampled_kl(out.logp, theirs, cfg.kl)
        if learner.critic is not None:
            e.values[index, :, :C + 1] = learner.critic(part.batch, part.ids, out.hidden)
            if cfg.critic == "separate":
                spend("forward", part.batch, part.ids.shape, False)
    return e


def exact_kl(learner, part, out, cfg, spend):
    """KL(policy || reference) (P, G, C) over the whole vocabulary; differentiable in the policy."""
    with torch.no_grad():
        theirs = learner.reference.states(part.batch, part.ids)
    spend("reference", part.batch, part.ids.shape, False)
    spend("exact_kl", part.ids.shape, out.logp.requires_grad)
    return learner.policy.kl(out.hidden, theirs, learner.reference, cfg.temperature)


def estimated(learner, experience, weights, cfg):
    """With advantage and returns; -> (experience, metrics of them). weights: name of a reward -> weight."""
    in_reward = cfg.kl_coef and cfg.kl_in == "reward"
    weights = experience.rewards.new_tensor(list(weights.values()))
    advantage, returns = advantages(experience, weights, cfg.baseline, cfg.std, cfg.combine,
                                    learner.kl_coef.item() if in_reward else 0.0, cfg.gamma, cfg.lam, cfg.bootstrap)
    mask = experience.mask & experience.active[:, None, None]
    found = metrics.of_advantages(advantage, mask)
    if len(experience.kl):
        found["kl_ref"] = metrics.mean(experience.kl[mask])
    if learner.critic is not None:
        found |= metrics.of_values(experience.values[..., :-1], returns, mask)
    return replace(experience, advantage=advantage, returns=returns), found


def token_weights(experience, cfg):
    """What multiplies each token's terms, those of KL and entropy too: normalisation, correction of drift, high
    entropy; (P, G, C), (P, G, 1) or None."""
    e = experience
    weight = losses.weights(e.trained, cfg.norm, e.sampled_logp.dtype)
    if cfg.correct != "none":
        correction = losses.drift_weights(e.old_logp, e.sampled_logp, e.mask, cfg.correct, cfg.correct_cap,
                                          cfg.correct_level)
        weight = correction if weight is None else weight * correction
    if cfg.top_entropy < 1:
        chosen = losses.top_entropy(e.entropy, e.trained & e.active[:, None, None], cfg.top_entropy)
        chosen = chosen.to(e.entropy.dtype)
        weight = chosen if weight is None else weight * chosen
    return weight


def drift(old_logp, part):
    """Largest |ratio - 1| between log-probs (P, G, C) of the policy as it was and those at sampling time."""
    known = part.mask & part.active[:, None, None]              # the rest was not scored
    return ((old_logp - part.sampled_logp).exp() - 1).abs().masked_fill(~known, 0.0).max()


def loss_of(learner, part, weight, denominator, tokens, cfg, spend):
    """Forward of one micro-batch -> (loss, statistics as sums over its trained tokens)."""
    out = learner.policy(part.batch, part.ids, cfg.temperature)
    spend("update", part.batch, part.ids.shape)
    old = part.old_logp if len(part.old_logp) else out.logp.detach()
    stats_of_drift = {} if len(part.old_logp) else {"drift_max": drift(old, part)}
    if cfg.ratio == "sequence":
        old = losses.sequence_ratio(out.logp, old, part.trained)
    in_loss = learner.reference is not None and cfg.kl_in == "loss"
    kl_coef = learner.kl_coef.item() if in_loss else 0.0
    sampled = in_loss and cfg.kl != "exact"
    loss, stats = losses.LOSSES[cfg.loss](
        out.logp, old, part.ref_logp if sampled else None, part.advantage, part.trained, denominator,
        clip_low=cfg.clip_low, clip_high=cfg.clip_high, bound=cfg.bound or None, kl=cfg.kl if sampled else "k3",
        kl_coef=kl_coef if sampled else 0.0, entropy=out.entropy if cfg.entropy_coef else None,
        entropy_coef=cfg.entropy_coef, weight=weight)
    if in_loss and not sampled:
        kl = exact_kl(learner, part, out, cfg, spend).masked_fill(~part.trained, 0.0)
        loss = loss + kl_coef * (kl if weight is None else kl * weight).sum() / denominator
        stats["kl_ref"] = kl.detach().sum()
    if cfg.loss == "sapo":
        del stats["clip_low"], stats["clip_high"]               # it has none
    ratio = (out.logp.detach() - old).masked_fill(~part.trained, 0.0).exp()
    stats |= stats_of_drift | {"entropy": (out.entropy.detach() * part.trained).sum(), "loss": loss.detach() * tokens,
                               "ratio_max": ratio.max(), "ratio_min": ratio.min()}
    if learner.critic is not None:
        values = learner.critic(part.batch, part.ids, out.hidden)[..., :-1]
        if cfg.critic == "separate":
            spend("update", part.batch, part.ids.shape, False)
        # In the critic's own units, so that the gradient that reaches a shared decoder does not grow with the reward.
        units = (x / learner.critic.scale for x in (values, part.values[..., :-1], part.returns))
        error, clipped = losses.value_loss(*units, part.trained, tokens, cfg.value_clip)
        loss = loss + cfg.value_coef * error
        stats |= clipped | {"value_loss": error.detach() * tokens}
    return loss, stats


def update(learner, experience, cfg, take_step, spend, guard):
    """epochs x mini_batches optimizer steps on the scored experience; -> metrics of the update.

    take_step() -> {name: gradient norm}, having stepped unless a norm is not finite; take_step(drop=True) only clears
    the gradient. What is not finite is shown to the guard and left out. The update ends early when the KL of a
    mini-batch from the old policy exceeds cfg.kl_stop.
    """
    sums, total, norms, first, stopped, passed = {}, 0, [], {}, False, 0
    if not all(torch.isfinite(x[experience.mask]).all() for x in (experience.advantage, experience.returns) if len(x)):
        guard.bad(experience, math.nan, {})
        return {"updates": 0, "stopped": 0.0}
    if learner.critic is not None:
        learner.critic.see(experience.returns[experience.mask])
    weight = token_weights(experience, cfg)
    minis = []
    for rows, indices in experience.split(cfg.mini_batches, cfg.micro_batch):
        trained = experience.trained[rows]
        parts = [(experience.rows(index).trim(), None if weight is None else weight[index]) for index in indices]
        minis.append((losses.denominator(trained, cfg.norm, cfg.max_new), parts))
    for denominator, parts in minis * cfg.epochs:
        tokens, here = sum(part.trained.sum() for part, _ in parts), {}
        if not parts:
            continue
        for part, some in parts:
            some = some if some is None else some[..., :part.mask.shape[-1]]
            loss, stats = loss_of(learner, part, some, denominator, tokens, cfg, spend)
            loss.backward()
            metrics.add(here, stats)
            passed += int(part.mask.sum())
        first = first or here
        stopped = bool(cfg.kl_stop and (here["kl"] / tokens).item() > cfg.kl_stop)
        if stopped:
            take_step(drop=True)
            break
        finite = math.isfinite(here["loss"].item())
        norm = take_step(drop=not finite)
        if not finite or not all(map(math.isfinite, norm.values())):
            guard.bad(Experience.join([part for part, _ in parts]), here["loss"].item() / tokens.item(), norm)
            continue
        guard.good()
        metrics.add(sums, here)
        total = total + tokens
        norms.append(norm)
    found = metrics.means(sums, total) if norms else {}
    if stopped:
        found["kl"] = (here["kl"] / tokens).item()
    found |= {name: sum(norm[name] for norm in norms) / len(norms) for name in (norms[0] if norms else ())}
    before = drift(experience.old_logp, experience) if len(experience.old_logp) else first.get("drift_max")
    return found | ({} if before is None else {"drift_max": before.item()}) | {
        "updates": len(norms), "stopped": float(stopped), "passed": passed}
