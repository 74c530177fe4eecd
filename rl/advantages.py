"""From what completions earned to the advantage of every token.

    mean, leave_one_out   a completion against the others of its prompt (kernels/group_advantage.py)
    zero, one             REINFORCE against a constant: of rewards 1 and 0 only the right completions train, with
                          advantage 1, or only the wrong ones, with -1
    batch                 REINFORCE++ (arXiv 2501.03262, eq. 5-7): reward still to come, whitened over all tokens
    critic                PPO (arXiv 1707.06347): GAE over the critic's values (kernels/gae.py)

Shapes: P prompts, G completions, C tokens, R rewards.
"""
import torch

from kernels import gae, group_advantage, kl_estimates

CONSTANTS = {"zero": 0.0, "one": 1.0}
BASELINES = ("mean", "leave_one_out", "batch", "critic", *CONSTANTS)


def whiten(x, mask, scale=True, eps=1e-6):
    """x - mean, divided by the standard deviation if `scale`, both over the mask. The mean is not added back."""
    kept = x[mask]
    centred = x - kept.mean()
    if scale and len(kept) > 1:
        centred = centred / (kept.std() + eps)
    return centred * mask


def normalised_then_summed(rewards, weights, eps=1e-6):
    """GDPO (arXiv 2601.05242): each reward against its group, then the weighted sum against the batch.

    rewards (P, G, R), weights (R,) -> (P, G). A reward that is rarely earned is not drowned by one that varies more.
    """
    total = 0.0
    for reward, weight in zip(rewards.unbind(-1), weights.tolist()):
        total = total + weight * group_advantage(reward, "group", eps=eps)
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
    reward = (experience.rewards * weights).sum(-1)
    no_returns = torch.zeros(0)
    if baseline not in ("batch", "critic"):
        per_completion = of_completions(experience, reward, weights, baseline, std, combine, kl_coef)
        return per_completion[..., None].expand(experience.mask.shape), no_returns
    per_token = token_rewards(reward, experience.kl, experience.mask, kl_coef)
    if baseline == "batch":
        to_come = per_token.flip(-1).cumsum(-1).flip(-1)
        return whiten(to_come, experience.mask, std == "batch"), no_returns
    advantage, returns = by_critic(experience, per_token, gamma, lam, bootstrap)
    if std == "batch":
        advantage = whiten(advantage, experience.mask)
    return advantage, returns


def of_completions(experience, reward, weights, baseline, std, combine, kl_coef):
    """reward (P, G), weights (R,) -> advantage of each completion (P, G), over those of its prompt or a constant."""
    rewards = experience.rewards
    if len(experience.kl):          # of the whole completion, as RLOO has it (arXiv 2402.14740, eq. 1)
        penalty = (experience.kl * experience.mask).sum(-1)
        reward = reward - kl_coef * penalty
        rewards = torch.cat([rewards, -penalty[..., None]], -1)
        weights = torch.cat([weights, weights.new_tensor([float(kl_coef)])])
    if combine == "each":
        return normalised_then_summed(rewards, weights)
    if baseline in CONSTANTS:
        return reward - CONSTANTS[baseline]
    return group_advantage(reward, std, baseline)


def by_critic(experience, per_token, gamma, lam, bootstrap):
    """Rewards of tokens (P, G, C) -> (advantage, returns), (P, G, C) each, by GAE over the critic's values."""
    mask = experience.mask
    values = experience.values[..., :-1]
    after = None
    if bootstrap:
        value_after_last = experience.values.gather(-1, mask.sum(-1, keepdim=True))[..., 0]
        after = (value_after_last * ~experience.ended).flatten()
    rows = per_token.flatten(0, 1).to(values.dtype)
    advantage, returns = gae(rows, values.flatten(0, 1), mask.flatten(0, 1), gamma, lam, after)
    return advantage.view(mask.shape), returns.view(mask.shape)
