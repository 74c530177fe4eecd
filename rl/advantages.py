"""From what completions earned to the advantage of every token.

    mean, leave_one_out   a completion against the others of its prompt (kernels/group_advantage.py)
    zero, one             REINFORCE against a constant: of rewards 1 and 0 only the right completions train, with
                          advantage 1, or only the wrong ones, with -1
    pass_at_k             what a completion adds to groups of k of its prompt, of which one right one is enough
    batch                 REINFORCE++ (arXiv 2501.03262, eq. 5-7): reward still to come, whitened over all tokens
    critic                PPO (arXiv 1707.06347): GAE over the critic's values (kernels/gae.py)

Shapes: P prompts, G completions, C tokens, R rewards.
"""
from math import comb, sqrt

import torch

from kernels import gae, group_advantage, kl_estimates

CONSTANTS = {"zero": 0.0, "one": 1.0}
BASELINES = ("mean", "leave_one_out", "batch", "critic", *CONSTANTS, "pass_at_k")


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


def pass_at_k(right, k):
    """right (P, G) bool -> advantages (P, G) fp32 that raise the expected pass@k (arXiv 2508.10751, section 2.4).

    Groups of k are drawn from the G completions of a prompt; one earns 1 if any of its members is right. A group's
    advantage is its reward less the mean over all such groups, over their deviation; a completion's is the mean over
    the groups that hold it. With W wrong ones, of all groups the share R holds a right one, of those that hold a given
    wrong one the share C(W-1, k-1) / C(G-1, k-1) holds none:

        R = 1 - C(W, k) / C(G, k)       sigma = sqrt(R (1 - R))
        right   (1 - R) / sigma         wrong   (1 - R - C(W-1, k-1) / C(G-1, k-1)) / sigma

    Where sigma is 0, all groups earning the same, nothing is taught: no completion is right, or fewer than k are wrong.
    Raises ValueError unless 1 <= k <= G.

    >>> pass_at_k(torch.tensor([[True, False, False], [True, True, False]]), 2)
    tensor([[ 0.7071, -0.3536, -0.3536],
            [ 0.0000,  0.0000,  0.0000]])
    """
    P, G = right.shape
    if not 1 <= k <= G:
        raise ValueError(f"k={k} must lie in [1, {G}], the completions of a prompt")
    pairs = [_pass_advantages(wrong, G, k) for wrong in range(G + 1)]
    of_right, of_wrong = right.new_tensor(pairs, dtype=torch.float32)[(~right).sum(1)].unbind(1)      # (P,) each
    return torch.where(right, of_right[:, None], of_wrong[:, None])


def _pass_advantages(wrong, G, k):
    """-> (advantage of a right completion, of a wrong one) of a prompt with so many wrong ones."""
    fail = comb(wrong, k) / comb(G, k)              # the share of groups of k without a right one
    if fail in (0.0, 1.0):
        return 0.0, 0.0
    sigma = sqrt(fail * (1 - fail))
    fail_with_it = comb(wrong - 1, k - 1) / comb(G - 1, k - 1)
    return fail / sigma, (fail - fail_with_it) / sigma


def is_full(rewards, weights):
    """rewards (P, G, R), weights (R,) -> (P, G) bool: every reward that counts is 1, the most that it can be."""
    return (rewards[..., weights > 0] >= 1).all(-1)


def token_rewards(reward, kl, mask, kl_coef):
    """The reward (P, G) at the last token of each completion, less kl_coef KL (P, G, C) (or empty) at every token."""
    last = mask & ~torch.cat([mask[..., 1:], torch.zeros_like(mask[..., :1])], dim=-1)
    earned = last * reward[..., None]
    return earned - kl_coef * kl * mask if len(kl) else earned


def sampled_kl(logp, ref_logp, kind):
    """KL(policy || reference) (P, G, C), by Schulman's estimators, at tokens drawn from the policy; see kernels."""
    return kl_estimates(ref_logp - logp)[kind][0]


def advantages(experience, weights, baseline="mean", std="group", combine="sum", kl_coef=0.0, gamma=1.0, lam=1.0,
               bootstrap=False, pass_k=1):
    """-> advantage (P, G, C), returns (P, G, C) or empty. weights (R,); kl_coef: of `experience.kl`, in the reward.

    pass_k: k of pass_at_k, which takes for right what earns every reward in full, and for wrong whatever else.
    bootstrap: completions that were cut off go on being worth what the critic says; else they end there.
    """
    reward = (experience.rewards * weights).sum(-1)
    no_returns = torch.zeros(0)
    if baseline not in ("batch", "critic"):
        if baseline == "pass_at_k":
            per_completion = pass_at_k(is_full(experience.rewards, weights), pass_k)
        else:
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
