"""From rewards to advantages."""
import torch


def group_relative(reward, std=True, eps=1e-6):
    """GRPO (arXiv 2402.03300, section 4.1.2): reward minus its group's mean, over the group's standard deviation.

    reward (P, G) -> advantage (P, G). std False leaves the division out (Dr. GRPO, arXiv 2503.20783). A group whose
    rewards are all equal gives exactly zero: rounding in the mean must not be blown up by a tiny deviation.

    >>> group_relative(torch.tensor([[1.0, 0.0], [0.7, 0.7]]), std=False)
    tensor([[ 0.5000, -0.5000],
            [ 0.0000,  0.0000]])
    """
    advantage = reward - reward.mean(1, keepdim=True)
    if std:
        advantage = advantage / (reward.std(1, keepdim=True) + eps)
    return advantage.masked_fill(is_flat(reward)[:, None], 0.0)


def is_flat(reward):
    """(P, G) -> (P,) bool: all rewards of the group are equal, so it teaches nothing."""
    return reward.amax(1) == reward.amin(1)
