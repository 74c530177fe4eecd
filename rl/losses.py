"""Policy and value losses: tensors and a denominator in, (loss, statistics) out.

Shapes: P prompts, G completions, C tokens. A loss is a sum over tokens of weight * term, over a denominator that is
that of the whole optimizer step, so that micro-batches and ranks add up. What the papers call normalisation is the
choice of the two:

    norm        weight      denominator             loss, o_i a completion of n tokens in all
    sequence    1 / |o_i|   completions             1/n sum_i 1/|o_i| sum_t         GRPO (arXiv 2402.03300, eq. 3)
    token       1           tokens                  1/sum|o_i| sum_i sum_t          DAPO (arXiv 2503.14476, eq. 8)
    constant    1           completions * budget    1/n 1/L sum_i sum_t             Dr. GRPO (arXiv 2503.20783, sec. 3)
    sum         1           completions             1/n sum_i sum_t                 LUSPO (arXiv 2602.05261), RLOO

Completions none of whose tokens train (cut off, and left out for it) are not counted.
"""
from functools import partial

import torch

from kernels import policy_loss

NORMS = ("sequence", "token", "constant", "sum")

# All take (logp, old_logp, ref_logp, advantage, mask, denominator) and the options of kernels/policy_loss.py, where
# their formulas stand. A new one is a function here and a line: it need not be a kernel.
LOSSES = {
    "clip": policy_loss,                                # PPO's, GRPO's; DAPO's with clip_high over clip_low
    "cispo": partial(policy_loss, surrogate="cispo"),
    "sapo": partial(policy_loss, surrogate="sapo"),
}


def weights(mask, norm, dtype=torch.float32):
    """mask (P, G, C) -> weight of each token, (P, G, 1), or None where all are 1."""
    return 1 / mask.sum(-1, keepdim=True).clamp(min=1).to(dtype) if norm == "sequence" else None


def denominator(mask, norm, budget):
    """mask (P, G, C), budget: tokens a completion may have -> the micro-batch's part of the step's denominator, ()."""
    if norm == "token":
        return mask.sum()
    return mask.any(-1).sum() * (budget if norm == "constant" else 1)


def sequence_ratio(logp, old_logp, mask):
    """Old log-probs (P, G, C), constants, under which every token's ratio is that of its sequence.

        s_i = exp(1/|o_i| sum_t (logp - old_logp))          GSPO (arXiv 2507.18071, eq. 7)

    logp - result is log s_i in value, and its gradient is logp's own: GSPO-token (eq. 13), which with one advantage a
    sequence has GSPO's gradient.
    """
    off = ((logp.detach() - old_logp) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(mask, logp.detach() - off, old_logp)


def drift_weights(old_logp, sampled_logp, mask, kind, cap, level):
    """Importance weights (P, G, C) against the drift between the update's log-probs and those at sampling time.

        w = exp(old_logp - sampled_logp), of each token, or of the whole sequence (the product over its tokens)

    kind "truncate": min(w, cap) (truncated importance sampling, Yao et al. 2025, "Your efficient RL framework secretly
    brings you off-policy RL training"); "mask": w where 1/cap <= w <= cap, else 0.
    """
    off = (old_logp - sampled_logp).masked_fill(~mask, 0.0)
    if level == "sequence":
        off = off.sum(-1, keepdim=True).expand_as(off)
    w = off.exp()
    return w.clamp(max=cap) if kind == "truncate" else torch.where((w <= cap) & (w >= 1 / cap), w, 0.0)


def top_entropy(entropy, mask, share):
    """(P, G, C) bool: the `share` of all tokens in the mask that have the highest entropy (arXiv 2506.01939, eq. 5)."""
    threshold = torch.quantile(entropy[mask].double(), 1 - share)
    return mask & (entropy >= threshold)


def value_loss(values, old_values, returns, mask, denominator, clip=0.0):
    """Half the squared error of values (P, G, C) against returns, summed over the mask and divided by denominator.

    clip > 0: the larger of that and the error of values held within `clip` of old_values, as PPO's first code did
    (github.com/openai/baselines). Statistics: value_clipped, tokens where the second is the larger.
    """
    error = (values - returns) ** 2
    clipped = torch.zeros_like(mask)
    if clip:
        held = (old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2
        clipped, error = (held > error) & mask, torch.maximum(error, held)
    return 0.5 * error.masked_fill(~mask, 0.0).sum() / denominator, {"value_clipped": clipped.sum()}
