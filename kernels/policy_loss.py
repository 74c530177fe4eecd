"""Policy losses over tokens, gradient and statistics in one pass.

    ratio  = exp(logp - old_logp)
    clip:    gain = min(min(ratio, bound) A, clip(ratio, 1 - clip_low, 1 + clip_high) A)
    cispo:   gain = min(max(ratio, 1 - clip_low), 1 + clip_high) A logp, the first factor a constant
    sapo:    gain = 4 / tau sigmoid(tau (ratio - 1)) A,      tau = tau_positive where A > 0, else tau_negative
    loss   = - sum over tokens of weight (gain - kl_coef KL + entropy_coef entropy) / denominator

PPO's surrogate (arXiv 1707.06347, eq. 7) as GRPO takes it (arXiv 2402.03300, eq. 3), clipped
asymmetrically (DAPO, arXiv 2503.14476, eq. 10); `bound` on the ratio also limits what a negative
advantage can do (dual clip, arXiv 1912.09729, eq. 5). CISPO (arXiv 2506.13585, eq. 4) clips the
weight of a token's gradient and leaves no token out; SAPO (arXiv 2511.20347, eq. 5) fades it out.
KL(policy || reference) by one of Schulman's estimators (joschu.net/blog/kl-approx.html), of
x = ref_logp - logp:

    k1 = - x,      k2 = x^2 / 2,      k3 = exp(x) - 1 - x

    dloss/dlogp = - weight (dgain/dlogp - kl_coef dKL/dlogp) / denominator
    dgain/dlogp:   clip: A ratio where the unclipped term is the smaller,      cispo: A clipped ratio,
                   sapo: 4 A s (1 - s) ratio,  s the sigmoid
    dKL/dlogp:     k1: 1,      k2: - x,      k3: 1 - exp(x)
"""
from typing import Optional, Tuple

import torch
from torch import Tensor

from kernels.backend import (accumulator, check_device, check_floating, check_like, jit, require,
                             tl, triton, use_triton)

SURROGATES = ("clip", "cispo", "sapo")
TAU_POSITIVE = 1.0              # of SAPO, where the advantage is positive
TAU_NEGATIVE = 1.05             # of SAPO, elsewhere
STATISTICS = ("clip_low", "clip_high", "ratio_off", "kl", "kl_ref", "ratio_off_max")    # sums; the last a maximum
BLOCK = 1024                    # tokens of a program


# ---------------------------------------------------------------- reference

def policy_loss_reference(logp, old_logp, ref_logp, advantage, mask, denominator, clip_low=0.2, clip_high=0.2,
                          bound=None, kl="k3", kl_coef=0.0, entropy=None, entropy_coef=0.0, surrogate="clip",
                          weight=1.0):
    """The formula, for autograd to differentiate. All of one shape."""
    ratio = (logp - old_logp).masked_fill(~mask, 0.0).exp()
    if surrogate == "clip":
        bounded = ratio if bound is None else ratio.clamp(max=bound)
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        gain = torch.minimum(bounded * advantage, clipped * advantage)
    elif surrogate == "cispo":
        gain = ratio.clamp(1 - clip_low, 1 + clip_high).detach() * advantage * logp
    else:
        tau = torch.full_like(advantage, TAU_NEGATIVE).masked_fill(advantage > 0, TAU_POSITIVE)
        gain = 4 / tau * (tau * (ratio - 1)).sigmoid() * advantage
    if ref_logp is not None:
        x = (ref_logp - logp).masked_fill(~mask, 0.0)
        estimates = {"k1": -x, "k2": x ** 2 / 2, "k3": x.exp() - 1 - x}
        gain = gain - kl_coef * estimates[kl]
    if entropy is not None:
        gain = gain + entropy_coef * entropy.masked_fill(~mask, 0.0)
    return -(weight * gain * mask).sum() / denominator


# ---------------------------------------------------------------- Triton kernel

@jit
def _kernel(logp, old_logp, ref_logp, entropy, advantage, mask, weight, denominator, dlogp, partial, N, clip_low,
            clip_high, bound, kl_coef, entropy_coef, tau_positive, tau_negative, KL: tl.constexpr,
            ENTROPY: tl.constexpr, SURROGATE: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """One program a block of tokens. Sums go to its row of `partial`: atomic adds have no order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    keep = (tl.load(mask + at, mask=inside, other=0) != 0) & inside
    lp = tl.load(logp + at, mask=keep, other=0.0).to(tl.float32)
    log_ratio = lp - tl.load(old_logp + at, mask=keep, other=0.0).to(tl.float32)
    a = tl.load(advantage + at, mask=keep, other=0.0).to(tl.float32)
    ratio = tl.exp(log_ratio)
    # 1. The surrogate: a token's gain, and the gain's derivative with respect to logp.
    clipped = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high) * a
    if SURROGATE == "clip":
        first = tl.minimum(ratio, bound) * a
        gain = tl.minimum(first, clipped)
        slope = tl.where((first <= clipped) & (ratio <= bound), a, 0.0) * ratio
    elif SURROGATE == "cispo":
        gain = clipped * lp
        slope = clipped
    else:
        tau = tl.where(a > 0, tau_positive, tau_negative)
        s = 1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))
        gain = 4.0 / tau * s * a
        slope = 4.0 * a * s * (1.0 - s) * ratio
    # 2. Its weight in the loss. `minus` times a gain is a loss.
    minus = -1.0 / tl.load(denominator)
    if WEIGHTED:
        minus = minus * tl.load(weight + at, mask=keep, other=0.0).to(tl.float32)
    d = minus * slope
    # 3. KL to the reference, and entropy.
    row = partial + tl.program_id(0) * 7
    if KL != "":
        x = tl.load(ref_logp + at, mask=keep, other=0.0).to(tl.float32) - lp
        k3 = tl.exp(x) - 1.0 - x
        if KL == "k1":
            gain -= kl_coef * -x
            d -= minus * kl_coef
        elif KL == "k2":
            gain -= kl_coef * (0.5 * x * x)
            d += minus * kl_coef * x
        else:
            gain -= kl_coef * k3
            d -= minus * kl_coef * (1.0 - tl.exp(x))
        tl.store(row + 5, tl.sum(tl.where(keep, k3, 0.0), 0))
    if ENTROPY:
        gain += entropy_coef * tl.load(entropy + at, mask=keep, other=0.0).to(tl.float32)
    # 4. The gradient, the loss and, in the order of STATISTICS, the rest.
    off = tl.abs(ratio - 1.0)
    too_low = (ratio < 1.0 - clip_low) & (a < 0) & keep
    too_high = (ratio > 1.0 + clip_high) & (a > 0) & keep
    tl.store(dlogp + at, tl.where(keep, d, 0.0), mask=inside)
    tl.store(row, tl.sum(tl.where(keep, minus * gain, 0.0), 0))
    tl.store(row + 1, tl.sum(tl.where(too_low, 1.0, 0.0), 0))
    tl.store(row + 2, tl.sum(tl.where(too_high, 1.0, 0.0), 0))
    tl.store(row + 3, tl.sum(tl.where(keep, off, 0.0), 0))
    tl.store(row + 4, tl.sum(tl.where(keep, ratio - 1.0 - log_ratio, 0.0), 0))
    tl.store(row + 6, tl.max(tl.where(keep, off, 0.0), 0))


def _tokens_triton(logp, old_logp, ref_logp, entropy, advantage, mask, denominator, clip_low, clip_high, bound, kl,
                   kl_coef, entropy_coef, surrogate, weight):
    N = len(logp)
    programs = triton.cdiv(N, BLOCK)
    dlogp = torch.empty_like(logp)
    partial = torch.zeros(programs, 7, device=logp.device)
    unread = logp                       # stands for the pointer of what is absent
    _kernel[(programs,)](
        logp, old_logp, unread if ref_logp is None else ref_logp, unread if entropy is None else entropy, advantage,
        mask.to(torch.uint8), unread if weight is None else weight, denominator, dlogp, partial, N, clip_low,
        clip_high, min(bound, 3e38), kl_coef, entropy_coef, TAU_POSITIVE, TAU_NEGATIVE,
        KL="" if ref_logp is None else kl, ENTROPY=entropy is not None, SURROGATE=surrogate,
        WEIGHTED=weight is not None, BLOCK=BLOCK)
    sums = torch.cat([partial[:, :6].sum(0), partial[:, 6:].amax(0)])
    return sums, dlogp


# ---------------------------------------------------------------- PyTorch form

def kl_estimates(x):
    """x = ref_logp - logp -> {name: (estimate of the KL, its derivative by logp)}, of x's shape."""
    grown = torch.expm1(x)              # exp(x) - 1, with its digits where x is small
    return {"k1": (-x, torch.ones_like(x)), "k2": (x * x / 2, -x), "k3": (grown - x, -grown)}


def _surrogate_torch(logp, ratio, clipped, minus, advantage, mask, bound, surrogate):
    """-> (gain, dloss/dlogp) of each token; minus: -weight / denominator, 0 at masked tokens."""
    if surrogate == "clip":
        first = ratio.clamp(max=bound) * advantage
        gain = torch.minimum(first, clipped)
        slope = torch.where((first <= clipped) & (ratio <= bound), advantage, 0.0)
        return gain, minus * slope * ratio
    if surrogate == "cispo":
        return clipped * logp, minus * clipped.masked_fill(~mask, 0.0)
    a = advantage.masked_fill(~mask, 0.0)
    tau = torch.full_like(a, TAU_NEGATIVE).masked_fill_(a > 0, TAU_POSITIVE)
    s = (tau * (ratio - 1)).sigmoid()
    return 4 / tau * s * a, minus * (4 * a * s * (1 - s)) * ratio


def _tokens_torch(logp, old_logp, ref_logp, entropy, advantage, mask, denominator, clip_low, clip_high, bound, kl,
                  kl_coef, entropy_coef, surrogate, weight):
    # Whatever stands at masked tokens must not count; times a mask would not do, as 0 * inf is NaN.
    log_ratio = (logp - old_logp).masked_fill_(~mask, 0.0)
    ratio = log_ratio.exp()
    # 1. The surrogate. `minus` times a gain is a loss.
    minus = (-1 / denominator) * mask
    if weight is not None:
        minus = minus * weight.masked_fill(~mask, 0.0)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    gain, d = _surrogate_torch(logp, ratio, clipped, minus, advantage, mask, bound, surrogate)
    # 2. KL to the reference, and entropy.
    sums = torch.zeros(7, dtype=logp.dtype, device=logp.device)
    if ref_logp is not None:
        x = (ref_logp - logp).masked_fill_(~mask, 0.0)
        estimates = kl_estimates(x)
        value, slope = estimates[kl]
        gain = gain - kl_coef * value
        d = d - minus * (kl_coef * slope)
        k3, _ = estimates["k3"]
        sums[5] = k3.sum()
    if entropy is not None:
        gain = gain + entropy_coef * entropy.masked_fill(~mask, 0.0)
    # 3. The loss and, in the order of STATISTICS, the rest.
    off = (ratio - 1).abs()
    sums[0] = (minus * gain.masked_fill_(~mask, 0.0)).sum()
    sums[1] = ((ratio < 1 - clip_low) & (advantage < 0) & mask).sum()
    sums[2] = ((ratio > 1 + clip_high) & (advantage > 0) & mask).sum()
    sums[3] = off.sum()
    sums[4] = (ratio - 1 - log_ratio).sum()
    if off.numel():
        sums[6] = off.max()
    return sums, d


# ---------------------------------------------------------------- either form, without autograd: for other ops, too

def tokens_forward(logp, old_logp, ref_logp, entropy, advantage, mask, denominator, clip_low, clip_high, bound, kl,
                   kl_coef, entropy_coef, surrogate="clip", weight=None):
    """All (N,), denominator () -> (the loss and then STATISTICS (7,), dloss/dlogp (N,))."""
    run = _tokens_triton if use_triton(logp) and logp.numel() else _tokens_torch
    return run(logp, old_logp, ref_logp, entropy, advantage, mask, denominator, clip_low, clip_high, bound, kl,
               kl_coef, entropy_coef, surrogate, weight)


# ---------------------------------------------------------------- op

@torch.library.custom_op("seethink::policy_loss", mutates_args=())
def _op(logp: Tensor, old_logp: Tensor, ref_logp: Optional[Tensor], entropy: Optional[Tensor], advantage: Tensor,
        mask: Tensor, weight: Optional[Tensor], denominator: Tensor, clip_low: float, clip_high: float, bound: float,
        kl: str, kl_coef: float, surrogate: str, entropy_coef: float) -> Tuple[Tensor, Tensor, Tensor]:
    """-> loss (), statistics (6,), dloss/dlogp in the shape of logp."""
    wide = accumulator(logp.dtype)

    def flat(x):
        return None if x is None else x.to(wide).flatten()

    sums, dlogp = tokens_forward(flat(logp), flat(old_logp), flat(ref_logp), flat(entropy), flat(advantage),
                                 mask.flatten(), denominator.to(wide), clip_low, clip_high, bound, kl, kl_coef,
                                 entropy_coef, surrogate, flat(weight))
    return sums[0].clone(), sums[1:].clone(), dlogp.view(logp.shape)


@_op.register_fake
def _(logp, *rest):
    wide = accumulator(logp.dtype)
    loss = logp.new_empty((), dtype=wide)
    return loss, logp.new_empty(len(STATISTICS), dtype=wide), logp.new_empty(logp.shape, dtype=wide)


def _setup(ctx, inputs, output):
    logp, _, _, entropy, _, mask, weight, denominator, *_, entropy_coef = inputs
    _, statistics, dlogp = output
    ctx.save_for_backward(dlogp, mask, weight, denominator)
    ctx.logp_dtype = logp.dtype
    ctx.entropy_dtype = None if entropy is None else entropy.dtype
    ctx.entropy_coef = entropy_coef
    ctx.mark_non_differentiable(statistics, dlogp)


def _gradient(ctx, g, *_):
    dlogp, mask, weight, denominator = ctx.saved_tensors
    dentropy = None
    if ctx.needs_input_grad[3]:
        dentropy = mask * (-ctx.entropy_coef * g / denominator)
        if weight is not None:
            dentropy = dentropy * weight.masked_fill(~mask, 0.0)
        dentropy = dentropy.to(ctx.entropy_dtype)
    return (dlogp * g).to(ctx.logp_dtype), None, None, dentropy, *[None] * 11


_op.register_autograd(_gradient, setup_context=_setup)


def check_options(clip_low, clip_high, bound, kl, denominator, device):
    """-> (bound, inf for None; denominator, a tensor). Raises ValueError on what cannot work."""
    require(0 <= clip_low <= 1, lambda: f"clip_low {clip_low} must lie in [0, 1]")
    require(clip_high >= 0, lambda: f"clip_high {clip_high} must not be negative")
    require(bound is None or bound >= 1 + clip_high,
            lambda: f"bound {bound} must be at least 1 + clip_high {clip_high}")
    require(kl in ("k1", "k2", "k3"), lambda: f"kl {kl!r} must be k1, k2 or k3")
    if not isinstance(denominator, Tensor):
        require(denominator > 0, lambda: f"denominator {denominator} must be positive")
        denominator = torch.full((), float(denominator), dtype=torch.float64, device=device)
    require(denominator.ndim == 0, lambda: f"denominator {tuple(denominator.shape)} must be one number")
    return float("inf") if bound is None else float(bound), denominator


def expanded(name, x, logp):
    """x, a constant, expanded to the shape of logp."""
    check_device(name, x, "logp", logp)
    try:
        return x.detach().expand_as(logp)
    except RuntimeError:
        raise ValueError(f"{name} {tuple(x.shape)} must broadcast to logp {tuple(logp.shape)}") from None


def named(statistics, ref_logp):
    """(6,) -> {name: ()}; without a reference there is no KL to it."""
    found = dict(zip(STATISTICS, statistics))
    if ref_logp is None:
        del found["kl_ref"]
    return found


def policy_loss(logp, old_logp, ref_logp, advantage, mask, denominator, clip_low=0.2, clip_high=0.2, bound=None,
                kl="k3", kl_coef=0.0, entropy=None, entropy_coef=0.0, surrogate="clip", weight=None):
    """A surrogate over tokens, "clip", "cispo" or "sapo", with KL and entropy terms.

    Returns (loss, statistics).
    logp (..); old_logp, ref_logp (or None), entropy (or None) and mask, bool, of its shape;
    advantage and weight (or None) broadcast to it; denominator a number or tensor ().
    Differentiable in logp and entropy, the rest constants. statistics: dict of tensors, sums over
    the mask but for `ratio_off_max`: clip_low, clip_high (tokens whose ratio is beyond the clip on
    the side where it takes the gradient), ratio_off |ratio - 1|, kl (k3 of KL(old || policy), 0 at
    ratio 1), with a reference kl_ref (k3 of KL(policy || ref)). Raises ValueError on what does not
    fit.
    """
    check_floating("logp", logp)
    for name, x in (("old_logp", old_logp), ("ref_logp", ref_logp), ("entropy", entropy), ("mask", mask)):
        if x is not None:
            check_like(name, x, "logp", logp)
    require(surrogate in SURROGATES,
            lambda: f"surrogate {surrogate!r} must be one of {', '.join(SURROGATES)}")
    advantage = expanded("advantage", advantage, logp)
    if weight is not None:
        weight = expanded("weight", weight, logp)
    if ref_logp is not None:
        ref_logp = ref_logp.detach()
    bound, denominator = check_options(clip_low, clip_high, bound, kl, denominator, logp.device)
    loss, statistics, _ = _op(
        logp, old_logp.detach(), ref_logp, entropy, advantage, mask.bool(), weight, denominator, float(clip_low),
        float(clip_high), bound, kl, float(kl_coef), surrogate, float(entropy_coef))
    return loss, named(statistics, ref_logp)
