"""Policy losses: tensors in, (loss, statistics) out. Shapes: P prompts, G completions, C tokens."""
import torch


def grpo(logp, old_logp, advantage, mask, denominator, clip_low=0.2, clip_high=0.2):
    """GRPO's clipped surrogate (arXiv 2402.03300, eq. 3) without the KL term.

        - 1/denominator * sum over tokens of min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)

    It differs from the paper in its normalisation: one denominator for the whole step, the number of its completion
    tokens (as in DAPO, arXiv 2503.14476, eq. 8), not one for each answer, so accumulation stays exact.
    logp, old_logp, mask (P, G, C); advantage (P, G), a constant; old_logp a constant, equal to logp.detach() when there
    is one update a rollout: the ratio is then 1 and the gradient is that of REINFORCE with a baseline.
    """
    ratio = ((logp - old_logp) * mask).exp()       # of padding 1: whatever stands there, 0 * inf would be NaN
    a = advantage[..., None]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    token = torch.minimum(ratio * a, clipped * a) * mask
    loss = -token.sum() / denominator
    with torch.no_grad():
        stats = {
            "clip_low": ((ratio < 1 - clip_low) & (a < 0) & mask).sum(),
            "clip_high": ((ratio > 1 + clip_high) & (a > 0) & mask).sum(),
            "ratio_off": ((ratio - 1).abs() * mask).sum(),
            "kl": ((ratio - 1 - (logp - old_logp)) * mask).sum(),
        }
    return loss, stats


LOSSES = {"grpo": grpo}
