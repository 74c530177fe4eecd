"""From what completions earned to the advantage of every token.

    mean, leave_one_out   a completion against the others of its prompt (kernels/group_advantage.py)
    batch                 REINFORCE++ (arXiv 2501.03262, eq. 5-7): reward still to come, whitened over all tokens
    critic                PPO (arXiv 1707.06347): GAE over the critic's values (kernels/gae.py)

Shapes: P prompts, G completions, C tokens, R rewards.
"""
import torch

from kernels import gae, group_advantage, kl_estimates

BASELINES = ("mean", "leave_one_out", "batch", "critic")


def whiten(x, mask, scale=True, eps=1e-6):
    """x - mean, divided by the standard deviation if `scale`, both over the mask. The mean is not added back."""
    kept = x[mask]
    off = x - kept.mean()
    return (off / (kept.std() + eps) if scale and len(kept) > 1 else off) * mask


def normalised_then_summed(rewards, weights, eps=1e-6):
    """GDPO (arXiv 2601.05242): each reward against its group, then the weighted sum against the batch.

    rewards (P, G, R), weights (R,) -> (P, G). A reward that is rarely earned is not drowned by one that varies more.
    """
    total = sum(weight * group_advantage(reward, "group", eps=eps)
                for reward, weight in zip(rewards.unbind(-1), weights.tolist()))
    return whiten(total, torch.ones_like(total, dtype=torch.bool), eps=eps)


def token_rewards(reward, kl, mask, kl_coef):
    """The reward (P, G) at the last token of each completion, less kl_coef KL (P, G, C) (or empty) at every token."""
    last = mask & ~torch.cat([mask[..., 1:], torch.zeros_like(mask[..., :1])], dim=-1)
    earned = last * reward[..., None]
    return earned - kl_coef * kl * mask if len(kl) else earned


def sampled_kl(logp, ref_logp, kind):
    """KL(policy || reference) (P, G, C), by Schulman's estimators, at tokens drawn from the policy; see kernels."""
    return kl_estimates(ref_logp - logp)[kind][0]


def advantages(experience, weights, baseline="mean", std="group", combine="sum", kl_coef=0.0, gamma=1.0, lam=1.0,
               bootstrap=False):
    """-> advantage (P, G, C), returns (P, G, C) or empty. weights (R,); kl_coef: of `experience.kl`, in the reward.

    bootstrap: completions that were cut off go on being worth what the critic says; else they end there.
    """
    e, nothing = experience, torch.zeros(0)
    reward = (e.rewards * weights).sum(-1)
    if baseline in ("mean", "leave_one_out"):
        rewards = e.rewards
        if len(e.kl):           # of the whole completion, as RLOO has it (arXiv 2402.14740, eq. 1)
            penalty = (e.kl * e.mask).sum(-1)
            reward = reward - kl_coef * penalty
            rewards, weights = torch.cat([rewards, -penalty[..., None]], -1), torch.cat([weights, weights.new_tensor([
                float(kl_coef)])])
        per_group = (normalised_then_summed(rewards, weights) if combine == "each"
                     else group_advantage(reward, std, baseline))
        return per_group[..., None].expand(e.mask.shape), nothing
    per_token = token_rewards(reward, e.kl, e.mask, kl_coef)
    if baseline == "batch":
        to_come = per_token.flip(-1).cumsum(-1).flip(-1)
        return whiten(to_come, e.mask, std == "batch"), nothing
    values, mask = e.values[..., :-1], e.mask
    after = e.values.gather(-1, mask.sum(-1, keepdim=True))[..., 0] * ~e.ended if bootstrap else None
    advantage, returns = (t.view(mask.shape) for t in gae(
        per_token.flatten(0, 1).to(values.dtype), values.flatten(0, 1), mask.flatten(0, 1), gamma, lam,
        None if after is None else after.flatten()))
    return (whiten(advantage, mask) if std == "batch" else advantage), returns
