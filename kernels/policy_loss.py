"""Policy losses over tokens, gradient and statistics in one pass.

    ratio  = exp(logp - old_logp)
    clip:    gain = min(min(ratio, bound) A, clip(ratio, 1 - clip_low, 1 + clip_high) A)
    cispo:   gain = min(max(ratio, 1 - clip_low), 1 + clip_high) A logp, the first factor a constant
    sapo:    gain = 4 / tau sigmoid(tau (ratio - 1)) A,      tau = tau_positive where A > 0, else tau_negative
    loss   = - sum over tokens of weight (gain - kl_coef KL + entropy_coef entropy) / denominator

PPO's surrogate (arXiv 1707.06347, eq. 7) as GRPO takes it (arXiv 2402.03300, eq. 3), clipped asymmetrically (DAPO,
arXiv 2503.14476, eq. 10); `bound` on the ratio also limits what a negative advantage can do (dual clip, arXiv
1912.09729, eq. 5). CISPO (arXiv 2506.13585, eq. 4) clips the weight of a token's gradient and leaves no token out; SAPO
(arXiv 2511.20347, eq. 5) fades it out. KL(policy || reference) by one of Schulman's estimators
(joschu.net/blog/kl-approx.html), with x = ref_logp - logp:

    k1 = - x,      k2 = x^2 / 2,      k3 = exp(x) - 1 - x

    dloss/dlogp = - weight (dgain/dlogp - kl_coef dKL/dlogp) / denominator
    dgain/dlogp:   clip: A ratio where the unclipped term is the smaller,      cispo: A clipped ratio,
                   sapo: 4 A s (1 - s) ratio,  s the sigmoid
    dKL/dlogp:     k1: 1,      k2: - x,      k3: 1 - exp(x)
"""
from typing import Optional, Tuple

import torch
from torch import Tensor

from kernels.backend import accumulator, floating, jit, like, need, tl, triton, use_triton

SURROGATES = ("clip", "cispo", "sapo")
TAU = (1.0, 1.05)               # of SAPO, where the advantage is positive and where not
STATISTICS = ("clip_low", "clip_high", "ratio_off", "kl", "kl_ref", "ratio_off_max")      # sums, and a maximum
BLOCK = 1024                    # tokens of a program


def policy_loss_reference(logp, old_logp, ref_logp, advantage, mask, denominator, clip_low=0.2, clip_high=0.2,
                          bound=None, kl="k3", kl_coef=0.0, entropy=None, entropy_coef=0.0, surrogate="clip",
                          weight=1.0):
    """The formula, for autograd to differentiate. All of one shape."""
    ratio = (logp - old_logp).masked_fill(~mask, 0.0).exp()
    if surrogate == "clip":
        first = ratio * advantage if bound is None else ratio.clamp(max=bound) * advantage
        gain = torch.minimum(first, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    elif surrogate == "cispo":
        gain = ratio.clamp(1 - clip_low, 1 + clip_high).detach() * advantage * logp
    else:
        tau = torch.full_like(advantage, TAU[1]).masked_fill(advantage > 0, TAU[0])
        gain = 4 / tau * (tau * (ratio - 1)).sigmoid() * advantage
    if ref_logp is not None:
        x = (ref_logp - logp).masked_fill(~mask, 0.0)
        gain = gain - kl_coef * {"k1": -x, "k2": x ** 2 / 2, "k3": x.exp() - 1 - x}[kl]
    if entropy is not None:
        gain = gain + entropy_coef * entropy.masked_fill(~mask, 0.0)
    return -(weight * gain * mask).sum() / denominator


@jit
def _kernel(logp, old_logp, ref_logp, entropy, advantage, mask, weight, denominator, dlogp, partial, N, clip_low,
            clip_high, bound, kl_coef, entropy_coef, tau_positive, tau_negative, KL: tl.constexpr,
            ENTROPY: tl.constexpr, SURROGATE: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """One program a block of tokens; its sums go to a row of `partial`, so that adding up has one order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    keep = (tl.load(mask + at, mask=inside, other=0) != 0) & inside
    lp = tl.load(logp + at, mask=keep, other=0.0).to(tl.float32)
    log_ratio = lp - tl.load(old_logp + at, mask=keep, other=0.0).to(tl.float32)
    a = tl.load(advantage + at, mask=keep, other=0.0).to(tl.float32)
    ratio = tl.exp(log_ratio)
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
    minus = -1.0 / tl.load(denominator)
    if WEIGHTED:
        minus = minus * tl.load(weight + at, mask=keep, other=0.0).to(tl.float32)
    d = minus * slope
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
    off = tl.abs(ratio - 1.0)
    tl.store(dlogp + at, tl.where(keep, d, 0.0), mask=inside)
    tl.store(row, tl.sum(tl.where(keep, minus * gain, 0.0), 0))
    tl.store(row + 1, tl.sum(tl.where((ratio < 1.0 - clip_low) & (a < 0) & keep, 1.0, 0.0), 0))
    tl.store(row + 2, tl.sum(tl.where((ratio > 1.0 + clip_high) & (a > 0) & keep, 1.0, 0.0), 0))
    tl.store(row + 3, tl.sum(tl.where(keep, off, 0.0), 0))
    tl.store(row + 4, tl.sum(tl.where(keep, ratio - 1.0 - log_ratio, 0.0), 0))
    tl.store(row + 6, tl.max(tl.where(keep, off, 0.0), 0))


def kl_estimates(x):
    """x = ref_logp - logp -> {name: (estimate of the KL, its derivative with respect to logp)}, each of x's shape."""
    grown = torch.expm1(x)
    return {"k1": (-x, torch.ones_like(x)), "k2": (x * x / 2, -x), "k3": (grown - x, -grown)}


def _torch(logp, old_logp, ref_logp, entropy, advantage, mask, denominator, clip_low, clip_high, bound, kl, kl_coef,
           entropy_coef, surrogate, weight):
    log_ratio = (logp - old_logp).masked_fill_(~mask, 0.0)         # whatever stands in padding: 0 * inf would be NaN
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    minus = (-1 / denominator) * mask
    if weight is not None:
        minus = minus * weight.masked_fill(~mask, 0.0)
    if surrogate == "clip":
        first = ratio.clamp(max=bound) * advantage
        gain = torch.minimum(first, clipped)
        d = minus * torch.where((first <= clipped) & (ratio <= bound), advantage, 0.0) * ratio
    elif surrogate == "cispo":
        gain, d = clipped * logp, minus * clipped.masked_fill(~mask, 0.0)
    else:
        a = advantage.masked_fill(~mask, 0.0)
        tau = torch.full_like(a, TAU[1]).masked_fill_(a > 0, TAU[0])
        s = (tau * (ratio - 1)).sigmoid()
        gain, d = 4 / tau * s * a, minus * (4 * a * s * (1 - s)) * ratio
    sums = torch.zeros(7, dtype=logp.dtype, device=logp.device)
    if ref_logp is not None:
        x = (ref_logp - logp).masked_fill_(~mask, 0.0)
        estimates = kl_estimates(x)
        value, slope = estimates[kl]
        gain, d = gain - kl_coef * value, d - minus * (kl_coef * slope)
        sums[5] = estimates["k3"][0].sum()
    if entropy is not None:
        gain = gain + entropy_coef * entropy.masked_fill(~mask, 0.0)
    off = (ratio - 1).abs()
    sums[0] = (minus * gain.masked_fill_(~mask, 0.0)).sum()
    sums[1] = ((ratio < 1 - clip_low) & (advantage < 0) & mask).sum()
    sums[2] = ((ratio > 1 + clip_high) & (advantage > 0) & mask).sum()
    sums[3], sums[4] = off.sum(), (ratio - 1 - log_ratio).sum()
    sums[6] = off.max() if off.numel() else 0.0
    return sums, d


def tokens_forward(logp, old_logp, ref_logp, entropy, advantage, mask, denominator, clip_low, clip_high, bound, kl,
                   kl_coef, entropy_coef, surrogate="clip", weight=None):
    """All (N,) but denominator () -> (loss and STATISTICS (7,), dloss/dlogp (N,)), without autograd."""
    if not use_triton(logp) or not logp.numel():
        return _torch(logp, old_logp, ref_logp, entropy, advantage, mask, denominator, clip_low, clip_high, bound, kl,
                      kl_coef, entropy_coef, surrogate, weight)
    N = len(logp)
    programs = triton.cdiv(N, BLOCK)
    dlogp, partial = torch.empty_like(logp), torch.zeros(programs, 7, device=logp.device)
    absent = logp
    _kernel[(programs,)](
        logp, old_logp, absent if ref_logp is None else ref_logp, absent if entropy is None else entropy, advantage,
        mask.to(torch.uint8), absent if weight is None else weight, denominator, dlogp, partial, N, clip_low, clip_high,
        min(bound, 3e38), kl_coef, entropy_coef, *TAU, KL="" if ref_logp is None else kl, ENTROPY=entropy is not None,
        SURROGATE=surrogate, WEIGHTED=weight is not None, BLOCK=BLOCK)
    return torch.cat([partial[:, :6].sum(0), partial[:, 6:].amax(0)]), dlogp


@torch.library.custom_op("seethink::policy_loss", mutates_args=())
def _op(logp: Tensor, old_logp: Tensor, ref_logp: Optional[Tensor], entropy: Optional[Tensor], advantage: Tensor,
        mask: Tensor, weight: Optional[Tensor], denominator: Tensor, clip_low: float, clip_high: float, bound: float,
        kl: str, kl_coef: float, surrogate: str, entropy_coef: float) -> Tuple[Tensor, Tensor, Tensor]:
    wide = accumulator(logp.dtype)
    *flat, weight = (None if t is None else t.to(wide).flatten()
                     for t in (logp, old_logp, ref_logp, entropy, advantage, weight))
    sums, dlogp = tokens_forward(*flat, mask.flatten(), denominator.to(wide), clip_low, clip_high, bound, kl, kl_coef,
                                 entropy_coef, surrogate, weight)
    return sums[0].clone(), sums[1:].clone(), dlogp.view(logp.shape)


@_op.register_fake
def _(logp, *rest):
    wide = accumulator(logp.dtype)
    return (logp.new_empty((), dtype=wide), logp.new_empty(len(STATISTICS), dtype=wide),
            logp.new_empty(logp.shape, dtype=wide))


def _setup(ctx, inputs, output):
    logp, _, _, entropy, _, mask, weight, denominator, *_, entropy_coef = inputs
    _, statistics, dlogp = output
    ctx.save_for_backward(dlogp, mask, weight, denominator)
    ctx.dtypes, ctx.entropy_coef = (logp.dtype, None if entropy is None else entropy.dtype), entropy_coef
    ctx.mark_non_differentiable(statistics, dlogp)


def _gradient(ctx, g, *_):
    dlogp, mask, weight, denominator = ctx.saved_tensors
    of_logp, of_entropy = ctx.dtypes
    dentropy = None
    if ctx.needs_input_grad[3]:
        dentropy = mask * (-ctx.entropy_coef * g / denominator)
        dentropy = (dentropy if weight is None else dentropy * weight.masked_fill(~mask, 0.0)).to(of_entropy)
    return (dlogp * g).to(of_logp), None, None, dentropy, *[None] * 11


_op.register_autograd(_gradient, setup_context=_setup)


def check_options(clip_low, clip_high, bound, kl, denominator, device):
    """Raises ValueError for options that cannot work; -> (bound, denominator tensor)."""
    need(0 <= clip_low <= 1, lambda: f"clip_low {clip_low} must lie in [0, 1]")
    need(clip_high >= 0, lambda: f"clip_high {clip_high} must not be negative")
    need(bound is None or bound >= 1 + clip_high, lambda: f"bound {bound} must be at least 1 + clip_high {clip_high}")
    need(kl in ("k1", "k2", "k3"), lambda: f"kl {kl!r} must be k1, k2 or k3")
    if not isinstance(denominator, Tensor):
        need(denominator > 0, lambda: f"denominator {denominator} must be positive")
        denominator = torch.full((), float(denominator), dtype=torch.float64, device=device)
    need(denominator.ndim == 0, lambda: f"denominator {tuple(denominator.shape)} must be one number")
    return float("inf") if bound is None else float(bound), denominator


def over(name, x, logp):
    """x, a constant, expanded to the shape of logp."""
    like(name, x, "logp", logp, shape=False)
    try:
        return x.detach().expand_as(logp)
    except RuntimeError:
        raise ValueError(f"{name} {tuple(x.shape)} must broadcast to logp {tuple(logp.shape)}") from None


def named(statistics, ref_logp):
    """(6,) -> dict of (); without a reference there is no KL to it."""
    return {name: value for name, value in zip(STATISTICS, statistics) if name != "kl_ref" or ref_logp is not None}


def policy_loss(logp, old_logp, ref_logp, advantage, mask, denominator, clip_low=0.2, clip_high=0.2, bound=None,
                kl="k3", kl_coef=0.0, entropy=None, entropy_coef=0.0, surrogate="clip", weight=None):
    """A surrogate over tokens, "clip", "cispo" or "sapo", with KL and entropy terms. Returns (loss, statistics).

    logp (..); old_logp, ref_logp (or None), entropy (or None) and mask, bool, of its shape; advantage and weight (or
    None) broadcast to it; denominator a number or tensor (). Differentiable in logp and entropy, the rest constants.
    statistics: dict of tensors, sums over the mask but for `ratio_off_max`: clip_low, clip_high (tokens whose ratio is
    beyond the clip on the side where it takes the gradient), ratio_off |ratio - 1|, kl (k3 of KL(old || policy), 0 at
    ratio 1), with a reference kl_ref (k3 of KL(policy || ref)). Raises ValueError on what does not fit.
    """
    floating("logp", logp)
    for name, x in (("old_logp", old_logp), ("ref_logp", ref_logp), ("entropy", entropy), ("mask", mask)):
        if x is not None:
            like(name, x, "logp", logp)
    need(surrogate in SURROGATES, lambda: f"surrogate {surrogate!r} must be one of {', '.join(SURROGATES)}")
    advantage = over("advantage", advantage, logp)
    weight = None if weight is None else over("weight", weight, logp)
    bound, denominator = check_options(clip_low, clip_high, bound, kl, denominator, logp.device)
    loss, statistics, _ = _op(
        logp, old_logp.detach(), None if ref_logp is None else ref_logp.detach(), entropy, advantage,
        mask.bool(), weight, denominator, float(clip_low), float(clip_high), bound, kl, float(kl_coef), surrogate,
        float(entropy_coef))
    return loss, named(statistics, ref_logp)
