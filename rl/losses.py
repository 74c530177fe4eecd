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
import torch

from kernels import policy_loss

NORMS = ("sequence", "token", "constant", "sum")


def sapo(*tensors, **options):
    """kernels' policy_loss, less its count of clipped tokens: SAPO fades out and clips none."""
    loss, stats = policy_loss(*tensors, surrogate="sapo", **options)
    return loss, without_clips(stats)


def cispo(*tensors, **options):
    """kernels' policy_loss. Where both clips are 0 its ratio is held at 1 on purpose, the loss is REINFORCE's, and no
    token is counted as clipped."""
    loss, stats = policy_loss(*tensors, surrogate="cispo", **options)
    if options["clip_low"] == options["clip_high"] == 0:
        stats = without_clips(stats)
    return loss, stats


def without_clips(stats):
    return {name: value for name, value in stats.items() if name not in ("clip_low", "clip_high")}


# --loss=NAME. All take (logp, old_logp, ref_logp, advantage, mask, denominator) and the options of
# kernels/policy_loss.py, where their formulas stand, `weight` (P, G, C) of each token among them, and
# return (loss, statistics as sums over the mask). A new one is a function here and a line: it need not be
# a kernel. Its statistics are logged; it owes "kl" where --kl-stop is to work, and where they have
# coefficients the terms of KL (and "kl_ref") and entropy. With one update a rollout every ratio is 1, and
# all of these have one gradient, that of REINFORCE with this advantage.
LOSSES = {
    "clip": policy_loss,                                # PPO's, GRPO's; DAPO's with clip_high over clip_low
    "cispo": cispo,
    "sapo": sapo,
}

SAME_AT_RATIO_ONE = ("clip", "cispo", "sapo")       # that gradient is told to the head ahead; take a changed loss out


def sent_at_ratio_one(advantage, weight, mask, denominator, entropy_coef):
    """What the losses SAME_AT_RATIO_ONE, without a KL term, send back to logp and to entropy (P, G, C) where every
    ratio is 1. advantage broadcasts to weight and mask (P, G, C); denominator (). -> (of logp, of entropy or None).

    Known before the forward, it lets the head compute its gradient with its log-probs (kernels/linear_logp.py).
    """
    denominator = denominator.to(weight.dtype)
    weight = weight.masked_fill(~mask, 0.0)
    of_logp = -1 / denominator * mask * weight * advantage.expand_as(mask).masked_fill(~mask, 0.0)
    if not entropy_coef:
        return of_logp, None
    return of_logp, -entropy_coef / denominator * mask * weight


def weights(mask, norm, dtype=torch.float32):
    """mask (P, G, C) -> weight of each token, (P, G, C)."""
    if norm != "sequence":
        return torch.ones_like(mask, dtype=dtype)
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    return (1 / lengths.to(dtype)).expand(mask.shape)


def denominator(mask, norm, budget):
    """mask (P, G, C) of all prompts of an optimizer step, budget: tokens a completion may have -> denominator, ()."""
    if norm == "token":
        return mask.sum()
    completions = mask.any(-1).sum()
    return completions * budget if norm == "constant" else completions


def sequence_old_logp(logp, old_logp, mask):
    """Old log-probs (P, G, C), constants, under which every token's ratio is that of its sequence.

        s_i = exp(1/|o_i| sum_t (logp - old_logp))          GSPO (arXiv 2507.18071, eq. 7)

    logp - result is log s_i in value, and its gradient is logp's own: GSPO-token (eq. 13), which with one advantage a
    sequence has GSPO's gradient.
    """
    length = mask.sum(-1, keepdim=True).clamp(min=1)
    log_ratio = ((logp.detach() - old_logp) * mask).sum(-1, keepdim=True) / length
    return torch.where(mask, logp.detach() - log_ratio, old_logp)


def drift_weights(old_logp, sampled_logp, mask, kind, cap, level):
    """Importance weights (P, G, C) against the drift between the update's log-probs and those at sampling time.

        w = exp(old_logp - sampled_logp), of each token, or of the whole sequence (the product over its tokens)

    kind "truncate": min(w, cap) (truncated importance sampling, Yao et al. 2025, "Your efficient RL framework secretly
    brings you off-policy RL training"); "mask": w where 1/cap <= w <= cap, else 0.
    """
    log_weight = (old_logp - sampled_logp).masked_fill(~mask, 0.0)
    if level == "sequence":
        log_weight = log_weight.sum(-1, keepdim=True).expand_as(log_weight)
    weight = log_weight.exp()
    if kind == "truncate":
        return weight.clamp(max=cap)
    trusted = (weight <= cap) & (weight >= 1 / cap)
    return torch.where(trusted, weight, 0.0)


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
        held_values = old_values + (values - old_values).clamp(-clip, clip)
        held_error = (held_values - returns) ** 2
        clipped = (held_error > error) & mask
        error = torch.maximum(error, held_error)
    loss = 0.5 * error.masked_fill(~mask, 0.0).sum() / denominator
    return loss, {"value_clipped": clipped.sum()}
