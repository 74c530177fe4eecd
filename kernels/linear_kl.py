"""Exact KL divergence over the vocabulary between two heads' next-token distributions, a chunk of rows at a time.

    p = softmax(h W^T / temperature),      q = softmax(h_ref W_ref^T / temperature)
    kl = sum_v p_v (log p_v - log q_v) = sum_v [q_v - p_v + p_v (log p_v - log q_v)]
    dz_v = g p_v (log p_v - log q_v - kl),     z the policy's logits over the temperature

The second form is used: no term of it is negative, and rounding in a log-prob moves it by p times the *difference* of
the two distributions, so a small KL keeps its digits. The reference is a constant.
"""
from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import accumulator, floating, jit, like, need, positive, tl, use_triton
from kernels.linear_logp import Gradients, fp32_logits, on_device, parts, room
from kernels.row_logp import BLOCK, blocks, rows_forward, scaled, tanh, torch_scaled


def linear_kl_reference(h, weight, h_ref, weight_ref, temperature=1.0, softcap=None, mask=None):
    """The formula with all logits at once."""
    def log_probs(h, weight):
        z = h.to(accumulator(h.dtype)) @ weight.to(accumulator(h.dtype)).T
        return ((z if softcap is None else softcap * (z / softcap).tanh()) / temperature).log_softmax(-1)

    p, q = log_probs(h, weight), log_probs(h_ref, weight_ref).detach()
    kl = (p.exp() * (p - q)).sum(-1)
    return kl if mask is None else torch.where(mask, kl, 0.0)


@jit
def _kernel(logits, stride, reference, reference_stride, keep, g, kl, top, log_sum, top_ref, log_sum_ref, temperature,
            softcap, V: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr, BACKWARD: tl.constexpr):
    """Forward: kl of the row. Backward: its gradient in place of the logits."""
    row = tl.program_id(0)
    kept = tl.load(keep + row) != 0
    base = logits + row.to(tl.int64) * stride
    other = reference + row.to(tl.int64) * reference_stride
    m, norm = tl.load(top + row), tl.load(log_sum + row)
    m_ref, norm_ref = tl.load(top_ref + row), tl.load(log_sum_ref + row)
    total = 0.0
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < V
        raw = tl.load(base + column, mask=inside, other=0.0).to(tl.float32)
        raw_ref = tl.load(other + column, mask=inside, other=0.0)
        logp = scaled(raw, temperature, softcap, CAPPED) - m - norm
        logq = scaled(raw_ref, temperature, softcap, CAPPED) - m_ref - norm_ref
        p = tl.exp(logp)
        if BACKWARD:
            d = tl.load(g + row) / temperature * p * (logp - logq - tl.load(kl + row))
            if CAPPED:
                t = tanh(raw / softcap)
                d = d * (1.0 - t * t)
            tl.store(base + column, tl.where(kept, d, 0.0).to(logits.dtype.element_ty), mask=inside)
        else:
            total += tl.sum(tl.where(inside, tl.exp(logq) - p + p * (logp - logq), 0.0), 0)
    if not BACKWARD:
        tl.store(kl + row, tl.where(kept, total, 0.0))


def _rows_triton(logits, reference, keep, statistics, temperature, softcap, kl, g=None):
    _kernel[(len(logits),)](
        logits, logits.stride(0), reference, reference.stride(0), keep.to(torch.uint8), kl if g is None else g, kl,
        *statistics, temperature, softcap or 1.0, V=logits.shape[1], BLOCK=BLOCK, CAPPED=softcap is not None,
        BACKWARD=g is not None, num_warps=8)
    return logits


def _rows_torch(logits, reference, keep, statistics, temperature, softcap, kl, g=None):
    top, log_sum, top_ref, log_sum_ref = (t[:, None] for t in statistics)
    for some in blocks(logits):
        z, t = torch_scaled(logits[some], temperature, softcap)
        z_ref, _ = torch_scaled(reference[some], temperature, softcap)
        logp, logq = z - top[some] - log_sum[some], z_ref - top_ref[some] - log_sum_ref[some]
        p = logp.exp()
        if g is None:
            kl[some] = (logq.exp() - p + p * (logp - logq)).sum(-1) * keep[some]
        else:
            d = p * (logp - logq - kl[some, None]) * (g[some] * keep[some] / temperature)[:, None]
            logits[some] = d if t is None else d * (1 - t * t)
    return logits


def _both(h, weight, h_ref, weight_ref, buffers, part, temperature, softcap):
    """Logits of both heads on the rows `part`, and their softmax statistics (top, log_sum of each)."""
    logits, reference = fp32_logits(h[part], weight, buffers[0]), fp32_logits(h_ref[part], weight_ref, buffers[1])
    nothing = torch.zeros(len(logits), dtype=torch.long, device=h.device)
    statistics = [t for z in (logits, reference) for t in rows_forward(z, nothing, temperature, softcap, -100)[2:]]
    return logits, reference, statistics


@torch.library.custom_op("seethink::linear_kl", mutates_args=())
def _op(h: Tensor, weight: Tensor, h_ref: Tensor, weight_ref: Tensor, mask: Tensor, temperature: float,
        softcap: Optional[float], chunk: Optional[int]) -> Tensor:
    kl = h.new_empty(len(h), dtype=accumulator(h.dtype))
    heads = on_device(h, weight, h_ref, weight_ref)
    buffers = room(h, weight, chunk), room(h, weight, chunk)
    for part in parts(h, weight, chunk):
        logits, reference, statistics = _both(*heads, buffers, part, temperature, softcap)
        run = _rows_triton if use_triton(logits) else _rows_torch
        run(logits, reference, mask[part], statistics, temperature, softcap, kl[part])
        del logits, reference
    return kl


@_op.register_fake
def _(h, weight, h_ref, weight_ref, mask, temperature, softcap, chunk):
    return h.new_empty(len(h), dtype=accumulator(h.dtype))


@torch.library.custom_op("seethink::linear_kl_backward", mutates_args=())
def _op_backward(g: Tensor, kl: Tensor, h: Tensor, weight: Tensor, h_ref: Tensor, weight_ref: Tensor, mask: Tensor,
                 temperature: float, softcap: Optional[float], chunk: Optional[int], need_dh: bool,
                 need_dw: bool) -> Tuple[Tensor, Tensor]:
    heads = on_device(h, weight, h_ref, weight_ref)
    buffers = room(h, weight, chunk), room(h, weight, chunk)
    gradients = Gradients(*heads[:2], need_dh, need_dw)
    for part in parts(h, weight, chunk):
        logits, reference, statistics = _both(*heads, buffers, part, temperature, softcap)
        run = _rows_triton if use_triton(logits) else _rows_torch
        run(logits, reference, mask[part], statistics, temperature, softcap, kl[part], g.contiguous()[part])
        del reference
        gradients.add(part, logits.to(heads[0].dtype))
        del logits
    return gradients.dh.to(h.dtype), gradients.dw.to(weight.dtype)


@_op_backward.register_fake
def _(g, kl, h, weight, h_ref, weight_ref, mask, temperature, softcap, chunk, need_dh, need_dw):
    return (torch.empty_like(h, memory_format=torch.contiguous_format) if need_dh else h.new_empty(0),
            weight.new_empty(weight.shape if need_dw else (0,)))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(output, *inputs[:5])
    ctx.options = inputs[5:]


def _gradient(ctx, g):
    needs = ctx.needs_input_grad[:2]
    dh, dw = _op_backward(g, *ctx.saved_tensors, *ctx.options, *needs) if any(needs) else (None, None)
    return dh if needs[0] else None, dw if needs[1] else None, *[None] * 6


_op.register_autograd(_gradient, setup_context=_setup)


@register_flop_formula(torch.ops.seethink.linear_kl)
def _flops(h, weight, h_ref, weight_ref, *args, out_shape=None, **kwargs):
    return 2 * h[0] * (weight[0] * weight[1] + weight_ref[0] * weight_ref[1])


@register_flop_formula(torch.ops.seethink.linear_kl_backward)
def _flops_backward(g, kl, h, weight, h_ref, weight_ref, *args, out_shape=None, **kwargs):
    return 2 * h[0] * (weight[0] * weight[1] * (1 + sum(args[-2:])) + weight_ref[0] * weight_ref[1])


def linear_kl(h, weight, h_ref, weight_ref, temperature=1.0, softcap=None, mask=None, chunk=None):
    """Exact KL(policy || reference) of each row, without an (N, V) tensor.

    h (N, D), weight (V, D) of the policy; h_ref (N, Dr), weight_ref (V, Dr), constants; mask (N,) bool, rows that are
    False give 0. Returns (N,) fp32 (fp64 for fp64 inputs), in nats, differentiable in h and weight. `chunk` as in
    linear_logp; two chunks of logits are held. Raises ValueError on what does not fit.
    """
    for name, x in (("h", h), ("weight", weight), ("h_ref", h_ref), ("weight_ref", weight_ref)):
        floating(name, x, ndim=2)
        like(name, x, "h", h, shape=False)
        need(x.dtype == h.dtype, lambda: f"{name} {x.dtype} must be {h.dtype}, as h is")
    need(h.shape[1] == weight.shape[1] and h_ref.shape == (len(h), weight_ref.shape[1])
         and len(weight) == len(weight_ref),
         lambda: f"h {tuple(h.shape)}, weight {tuple(weight.shape)}, h_ref {tuple(h_ref.shape)} and weight_ref "
                 f"{tuple(weight_ref.shape)} must be (N, D), (V, D), (N, Dr) and (V, Dr)")
    positive("temperature", temperature)
    if softcap is not None:
        positive("softcap", softcap)
    need(chunk is None or chunk >= 1, lambda: f"chunk {chunk} must be at least 1 row, or None")
    if mask is None:
        mask = torch.ones(len(h), dtype=torch.bool, device=h.device)
    like("mask", mask, "h", h, shape=False)
    need(mask.shape == h.shape[:1], lambda: f"mask {tuple(mask.shape)} must be ({len(h)},), one entry a row")
    return _op(h, weight, h_ref.detach(), weight_ref.detach(), mask.bool(), float(temperature), softcap, chunk)
