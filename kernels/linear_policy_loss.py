"""The policy loss straight from hidden states and head, its gradient computed on the way forward.

    logp, entropy = linear_logp(h, W, target),      loss = policy_loss(logp, ...)         per token, so chunk by chunk

A token's loss needs no other token, so each chunk's dlogits follow at once from the logits that
gave its loss: three matmuls, 6 N D V FLOPs, where linear_logp computes the logits again and takes
8. What it costs: dh (N, D) and dW are held until the backward, which multiplies them by the
upstream gradient.
"""
from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import accumulator, check_floating, check_like, check_targets
from kernels.linear_logp import (Gradients, check_head, empty_gradients, fp32_logits, head_flops,
                                 linear_logp_reference, logits_buffer, padded_on_gpu, row_chunks, widened_on_cpu)
from kernels.policy_loss import STATISTICS, check_options, named, policy_loss_reference, tokens_forward
from kernels.row_logp import rows_backward_, rows_forward

IGNORED = -100                  # target of masked tokens


# ---------------------------------------------------------------- reference

def linear_policy_loss_reference(h, weight, target, old_logp, ref_logp, advantage, mask, denominator,
                                 temperature=1.0, softcap=None, entropy_coef=0.0, **options):
    """The composed path, with all logits at once."""
    target = target.masked_fill(~mask, IGNORED)
    logp, entropy = linear_logp_reference(h, weight, target, temperature, softcap)
    if old_logp is None:
        old_logp = logp.detach()
    return policy_loss_reference(logp, old_logp, ref_logp, advantage, mask, denominator, entropy=entropy,
                                 entropy_coef=entropy_coef, **options)


# ---------------------------------------------------------------- op, on the kernels of row_logp and policy_loss

@torch.library.custom_op("seethink::linear_policy_loss", mutates_args=())
def _op(h: Tensor, weight: Tensor, target: Tensor, old_logp: Optional[Tensor], ref_logp: Optional[Tensor],
        advantage: Tensor, mask: Tensor, denominator: Tensor, temperature: float, softcap: Optional[float],
        clip_low: float, clip_high: float, bound: float, kl: str, kl_coef: float, entropy_coef: float,
        chunk: Optional[int], need_dh: bool,
        need_dw: bool) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss (), statistics (6,), logp (N,), entropy (N,), dh, dW."""
    target = target.masked_fill(~mask, IGNORED)
    check_targets(target, len(weight), IGNORED)
    dtype = h.dtype
    vocab = len(weight)
    wide = accumulator(dtype)
    h, weight = widened_on_cpu(h, padded_on_gpu(weight))
    denominator = denominator.to(wide)
    logp = h.new_empty(len(h), dtype=wide)
    entropy = h.new_empty(len(h), dtype=wide)
    sums = h.new_zeros(1 + len(STATISTICS), dtype=wide)         # of the loss and the statistics
    largest = h.new_zeros((), dtype=wide)                       # the last statistic is a maximum
    gradients = Gradients(h, weight, need_dh, need_dw)
    chunks = row_chunks(h, weight, chunk, need_dw)
    buffer = logits_buffer(h, weight, chunks)

    def constant(x, rows):
        return None if x is None else x[rows].to(wide).contiguous()

    for rows in chunks:
        # 1. Log-probs and entropies.
        logits = fp32_logits(h[rows], weight, buffer)
        new, H, top, log_sum = rows_forward(logits[:, :vocab], target[rows], temperature, softcap, IGNORED)
        logp[rows] = new
        entropy[rows] = H
        # 2. The loss of these tokens, and its gradient with respect to their log-probs.
        old = new if old_logp is None else constant(old_logp, rows)
        ref = constant(ref_logp, rows)
        chunk_sums, g = tokens_forward(new, old, ref, H, constant(advantage, rows), mask[rows],
                                       denominator, clip_low, clip_high, bound, kl, kl_coef,
                                       entropy_coef)
        sums += chunk_sums
        largest = torch.maximum(largest, chunk_sums[-1])
        # 3. From there back to the head, while the logits are at hand.
        if need_dh or need_dw:
            e = mask[rows] * (-entropy_coef / denominator) if entropy_coef else None
            dlogits = rows_backward_(logits, target[rows], g, e, H, top, log_sum, temperature,
                                     softcap, IGNORED, dtype=h.dtype, vocab=vocab)
            gradients.add(rows, dlogits)
            del dlogits
        del logits                      # before the next chunk's are made
    sums[-1] = largest
    dh, dw = gradients.result(dtype, vocab)
    return sums[0].clone(), sums[1:].clone(), logp, entropy, dh, dw


@_op.register_fake
def _(h, weight, target, *rest):
    need_dh, need_dw = rest[-2:]
    wide = accumulator(h.dtype)
    loss = h.new_empty((), dtype=wide)
    statistics = h.new_empty(len(STATISTICS), dtype=wide)
    logp = h.new_empty(len(h), dtype=wide)
    dh, dw = empty_gradients(h, weight, need_dh, need_dw)
    return loss, statistics, logp, torch.empty_like(logp), dh, dw


def _setup(ctx, inputs, output):
    _, *others, dh, dw = output
    ctx.save_for_backward(dh, dw)
    ctx.mark_non_differentiable(*others, dh, dw)


def _gradient(ctx, g, *_):
    dh, dw = ctx.saved_tensors
    need_dh, need_dw = ctx.needs_input_grad[:2]
    dh = (dh * g).to(dh.dtype) if need_dh else None
    dw = (dw * g).to(dw.dtype) if need_dw else None
    return dh, dw, *[None] * 17


_op.register_autograd(_gradient, setup_context=_setup)


@register_flop_formula(torch.ops.seethink.linear_policy_loss)
def _flops(h, weight, *args, out_shape=None, **kwargs):
    """h and weight are shapes."""
    need_dh, need_dw = args[-2:]
    return head_flops(h, weight) * (1 + need_dh + need_dw)


def linear_policy_loss(h, weight, target, old_logp, ref_logp, advantage, mask, denominator, clip_low=0.2,
                       clip_high=0.2, bound=None, kl="k3", kl_coef=0.0, entropy_coef=0.0, temperature=1.0,
                       softcap=None, chunk=None):
    """policy_loss(linear_logp(h, weight, target), ..) in three matmuls.

    Returns (loss, logp, entropy, statistics). h (N, D), weight (V, D), target (N,) as in
    linear_logp; old_logp (N,), or None on policy (every ratio 1); ref_logp (N,) or None; advantage
    (N,); mask (N,) bool, False rows cost a matmul and give nothing; the rest as in policy_loss.
    Only the loss is differentiable, in h and weight, and once. Raises ValueError on what does not
    fit.
    """
    check_head(h, weight, target, temperature, softcap, chunk)
    for name, x in (("old_logp", old_logp), ("ref_logp", ref_logp), ("advantage", advantage), ("mask", mask)):
        if x is not None:
            check_like(name, x, "target", target)
    check_floating("advantage", advantage)
    bound, denominator = check_options(clip_low, clip_high, bound, kl, denominator, h.device)
    old_logp = None if old_logp is None else old_logp.detach()
    ref_logp = None if ref_logp is None else ref_logp.detach()
    need_dh = torch.is_grad_enabled() and h.requires_grad
    need_dw = torch.is_grad_enabled() and weight.requires_grad
    loss, statistics, logp, entropy, _, _ = _op(
        h, weight, target, old_logp, ref_logp, advantage.detach(), mask.bool(), denominator, float(temperature),
        softcap, float(clip_low), float(clip_high), bound, kl, float(kl_coef), float(entropy_coef), chunk,
        need_dh, need_dw)
    return loss, logp, entropy, named(statistics, ref_logp)
