"""The policy loss straight from hidden states and head, its gradient computed on the way forward.

    logp, entropy = linear_logp(h, W, target),      loss = policy_loss(logp, ...)         per token, so chunk by chunk

A token's loss needs no other token, so each chunk's dlogits follow at once from the logits that gave its loss: three
matmuls, 6 N D V FLOPs, where linear_logp computes the logits again and takes 8. What it costs: dh (N, D) and dW are
held until the backward, which multiplies them by the upstream gradient.
"""
from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import accumulator, floating, like, targets
from kernels.linear_logp import Gradients, check, fp32_logits, linear_logp_reference, on_device, parts, room
from kernels.policy_loss import STATISTICS, check_options, named, policy_loss_reference, tokens_forward
from kernels.row_logp import rows_backward_, rows_forward

IGNORED = -100


def linear_policy_loss_reference(h, weight, target, old_logp, ref_logp, advantage, mask, denominator, temperature=1.0,
                                 softcap=None, entropy_coef=0.0, **options):
    """The composed path, with all logits at once."""
    logp, entropy = linear_logp_reference(h, weight, target.masked_fill(~mask, IGNORED), temperature, softcap)
    old_logp = logp.detach() if old_logp is None else old_logp
    return policy_loss_reference(logp, old_logp, ref_logp, advantage, mask, denominator, entropy=entropy,
                                 entropy_coef=entropy_coef, **options)


@torch.library.custom_op("seethink::linear_policy_loss", mutates_args=())
def _op(h: Tensor, weight: Tensor, target: Tensor, old_logp: Optional[Tensor], ref_logp: Optional[Tensor],
        advantage: Tensor, mask: Tensor, denominator: Tensor, temperature: float, softcap: Optional[float],
        clip_low: float, clip_high: float, bound: float, kl: str, kl_coef: float, entropy_coef: float,
        chunk: Optional[int], need_dh: bool,
        need_dw: bool) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    target = target.masked_fill(~mask, IGNORED)
    targets(target, len(weight), IGNORED)
    wide = accumulator(h.dtype)
    logp, entropy = (h.new_empty(len(h), dtype=wide) for _ in range(2))
    sums, largest = h.new_zeros(1 + len(STATISTICS), dtype=wide), h.new_zeros((), dtype=wide)
    wide_h, wide_weight = on_device(h, weight)
    gradients, buffer = Gradients(wide_h, wide_weight, need_dh, need_dw), room(h, weight, chunk)
    denominator = denominator.to(wide)
    for part in parts(h, weight, chunk):
        logits = fp32_logits(wide_h[part], wide_weight, buffer)
        statistics = rows_forward(logits, target[part], temperature, softcap, IGNORED)
        logp[part], entropy[part] = statistics[:2]
        some = [None if t is None else t[part].to(wide).contiguous() for t in (old_logp, ref_logp, advantage)]
        old, ref, a = [statistics[0] if some[0] is None else some[0], *some[1:]]
        found, g = tokens_forward(statistics[0], old, ref, statistics[1], a, mask[part], denominator, clip_low,
                                  clip_high, bound, kl, kl_coef, entropy_coef)
        sums += found
        largest = torch.maximum(largest, found[-1])
        if need_dh or need_dw:
            e = mask[part] * (-entropy_coef / denominator) if entropy_coef else None
            gradients.add(part, rows_backward_(logits, target[part], g, e, *statistics[1:], temperature, softcap,
                                               IGNORED, dtype=wide_h.dtype))
        del logits
    sums[-1] = largest
    return (sums[0].clone(), sums[1:].clone(), logp, entropy, gradients.dh.to(h.dtype), gradients.dw.to(weight.dtype))


@_op.register_fake
def _(h, weight, target, *rest):
    need_dh, need_dw = rest[-2:]
    wide = accumulator(h.dtype)
    return (h.new_empty((), dtype=wide), h.new_empty(len(STATISTICS), dtype=wide),
            h.new_empty(len(h), dtype=wide), h.new_empty(len(h), dtype=wide),
            torch.empty_like(h, memory_format=torch.contiguous_format) if need_dh else h.new_empty(0),
            weight.new_empty(weight.shape if need_dw else (0,)))


def _setup(ctx, inputs, output):
    _, *others, dh, dw = output
    ctx.save_for_backward(dh, dw)
    ctx.mark_non_differentiable(*others, dh, dw)


def _gradient(ctx, g, *_):
    dh, dw = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    return (dh * g).to(dh.dtype) if needs[0] else None, (dw * g).to(dw.dtype) if needs[1] else None, *[None] * 17


_op.register_autograd(_gradient, setup_context=_setup)


@register_flop_formula(torch.ops.seethink.linear_policy_loss)
def _flops(h, weight, *args, out_shape=None, **kwargs):
    return 2 * h[0] * weight[0] * weight[1] * (1 + sum(args[-2:]))


def linear_policy_loss(h, weight, target, old_logp, ref_logp, advantage, mask, denominator, clip_low=0.2, clip_high=0.2,
                       bound=None, kl="k3", kl_coef=0.0, entropy_coef=0.0, temperature=1.0, softcap=None, chunk=None):
    """policy_loss(linear_logp(h, weight, target), ..) in three matmuls. Returns (loss, logp, entropy, statistics).

    h (N, D), weight (V, D), target (N,) as in linear_logp; old_logp (N,), or None on policy (every ratio 1); ref_logp
    (N,) or None; advantage (N,); mask (N,) bool, False rows cost a matmul and give nothing; the rest as in policy_loss.
    The loss alone is differentiable, in h and weight, once. Raises ValueError on what does not fit.
    """
    check(h, weight, target, temperature, softcap, chunk)
    for name, x in (("old_logp", old_logp), ("ref_logp", ref_logp), ("advantage", advantage), ("mask", mask)):
        if x is not None:
            like(name, x, "target", target)
    floating("advantage", advantage)
    bound, denominator = check_options(clip_low, clip_high, bound, kl, denominator, h.device)
    on = torch.is_grad_enabled()
    constants = [None if t is None else t.detach() for t in (old_logp, ref_logp, advantage)]
    loss, statistics, logp, entropy, _, _ = _op(
        h, weight, target, *constants, mask.bool(), denominator, float(temperature), softcap, float(clip_low),
        float(clip_high), bound, kl, float(kl_coef), float(entropy_coef), chunk, on and h.requires_grad,
        on and weight.requires_grad)
    return loss, logp, entropy, named(statistics, ref_logp)
