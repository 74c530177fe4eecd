"""Policy losses: tensors in, (loss, statistics) out. Shapes: P prompts, G completions, C tokens."""
from kernels import policy_loss


def grpo(logp, old_logp, advantage, mask, denominator, clip_low=0.2, clip_high=0.2):
    """GRPO's clipped surrogate (arXiv 2402.03300, eq. 3) without the KL term; kernels/policy_loss.py has the formula.

    It differs from the paper in its normalisation: one denominator for the whole step, the number of its completion
    tokens (as in DAPO, arXiv 2503.14476, eq. 8), not one for each answer, so accumulation stays exact.
    logp, old_logp, mask (P, G, C); advantage (P, G), a constant; old_logp a constant, equal to logp.detach() when there
    is one update a rollout: the ratio is then 1 and the gradient is that of REINFORCE with a baseline.
    """
    return policy_loss(logp, old_logp, None, advantage[..., None], mask, denominator, clip_low, clip_high)


LOSSES = {"grpo": grpo}
