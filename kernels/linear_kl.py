"""Exact KL divergence over the vocabulary between two heads' next-token distributions, a chunk of
rows at a time.

    p = softmax(h W^T / temperature),      q = softmax(h_ref W_ref^T / temperature)
    kl = sum_v p_v (log p_v - log q_v) = sum_v [q_v - p_v + p_v (log p_v - log q_v)]
    dz_v = g p_v (log p_v - log q_v - kl),     z the policy's logits over the temperature

The second form is used: no term of it is negative, and rounding in a log-prob moves it by p times
the *difference* of the two distributions, so a small KL keeps its digits. The reference is a
constant. Logits are scratch memory: what is computed from them, the gradient too, takes their place.
"""
from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import (LN_2, LOG2_E, accumulator, check_device, check_floating, check_positive, jit,
                             require, tl, use_triton)
from kernels.linear_logp import (Gradients, empty_gradients, fp32_logits, head_flops, logits_buffer, padded_on_gpu,
                                 row_chunks, widened_on_cpu)
from kernels.row_logp import (BLOCK, capped, in_front, row_blocks, rows_forward, tanh, torch_capped,
                              torch_scaled)


# ---------------------------------------------------------------- reference

def linear_kl_reference(h, weight, h_ref, weight_ref, temperature=1.0, softcap=None, mask=None):
    """The formula with all logits at once."""
    def log_probs(h, weight):
        wide = accumulator(h.dtype)
        z = h.to(wide) @ weight.to(wide).T
        if softcap is not None:
            z = softcap * (z / softcap).tanh()
        return (z / temperature).log_softmax(-1)

    log_p = log_probs(h, weight)
    log_q = log_probs(h_ref, weight_ref).detach()
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kl if mask is None else torch.where(mask, kl, 0.0)


# ---------------------------------------------------------------- Triton kernel

@jit
def _kernel(logits, stride, reference, reference_stride, out, out_stride, keep, g, kl, top, log_sum, top_ref,
            log_sum_ref, temperature, softcap, V: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
            CAPPED: tl.constexpr, BACKWARD: tl.constexpr):
    """One program a row. Forward: its kl. Backward: the gradient, in `out`; of columns V .. WIDTH - 1, of tokens that
    there are not, 0."""
    row = tl.program_id(0)
    kept = tl.load(keep + row) != 0
    base = logits + row.to(tl.int64) * stride
    other = reference + row.to(tl.int64) * reference_stride
    place = out + row.to(tl.int64) * out_stride
    scale = LOG2_E / temperature
    m = tl.load(top + row)
    log_s = tl.load(log_sum + row) * LOG2_E
    m_ref = tl.load(top_ref + row)
    log_s_ref = tl.load(log_sum_ref + row) * LOG2_E
    if BACKWARD:
        upstream = tl.load(g + row) / temperature
        row_kl = tl.load(kl + row)
    total = tl.zeros((BLOCK,), tl.float32)              # of each lane: none waits for another in the loop
    for start in range(0, WIDTH if BACKWARD else V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < V
        raw = tl.load(base + column, mask=inside, other=0.0).to(tl.float32)
        raw_ref = tl.load(other + column, mask=inside, other=0.0)
        log_p = (capped(raw, softcap, CAPPED) - m) * scale - log_s          # to the base 2
        log_q = (capped(raw_ref, softcap, CAPPED) - m_ref) * scale - log_s_ref
        p = tl.exp2(log_p)
        apart = (log_p - log_q) * LN_2
        if BACKWARD:
            d = upstream * p * (apart - row_kl)
            if CAPPED:
                t = tanh(raw / softcap)
                d = d * (1.0 - t * t)
            # `out` may be the front half of the row's own bytes: the block is read before it is written.
            tl.debug_barrier()
            tl.store(place + column, tl.where(kept & inside, d, 0.0).to(out.dtype.element_ty), mask=column < WIDTH)
        else:
            total += tl.where(inside, tl.exp2(log_q) - p + p * apart, 0.0)
    if not BACKWARD:
        tl.store(kl + row, tl.where(kept, tl.sum(total, 0), 0.0))


def _rows_triton(logits, logits_ref, keep, statistics, temperature, softcap, kl, g, dtype, vocab):
    out = in_front(logits, dtype)
    _kernel[(len(logits),)](
        logits, logits.stride(0), logits_ref, logits_ref.stride(0), out, out.stride(0), keep.to(torch.uint8),
        kl if g is None else g, kl, *statistics, temperature, softcap or 1.0, V=vocab, WIDTH=logits.shape[1],
        BLOCK=BLOCK, CAPPED=softcap is not None, BACKWARD=g is not None, num_warps=8)
    return out


# ---------------------------------------------------------------- PyTorch form: some rows at a time

def _rows_torch(logits, logits_ref, keep, statistics, temperature, softcap, kl, g):
    top, log_sum, top_ref, log_sum_ref = (t[:, None] for t in statistics)
    largest = torch_scaled(top, temperature)
    largest_ref = torch_scaled(top_ref, temperature)
    for rows in row_blocks(logits):
        x, t = torch_capped(logits[rows], softcap)
        x_ref, _ = torch_capped(logits_ref[rows], softcap)
        log_p = torch_scaled(x, temperature).sub_(largest[rows]).sub_(log_sum[rows])
        log_q = torch_scaled(x_ref, temperature).sub_(largest_ref[rows]).sub_(log_sum_ref[rows])
        p = log_p.exp()
        if g is None:
            terms = log_q.exp().sub_(p)
            terms += log_p.sub_(log_q).mul_(p)
            kl[rows] = terms.sum(-1) * keep[rows]
            continue
        upstream = (g[rows] * keep[rows] / temperature)[:, None]
        d = log_p.sub_(log_q).sub_(kl[rows, None]).mul_(p).mul_(upstream)
        if t is not None:
            d *= 1 - t * t
        logits[rows] = d                # at temperature 1 without a softcap it is there already
    return logits


# ---------------------------------------------------------------- either form, on logits that exist

def _rows_statistics(logits, logits_ref, temperature, softcap):
    """(N, V) of both heads -> top, log_sum, top_ref, log_sum_ref, each (N,)."""
    token = torch.zeros(len(logits), dtype=torch.long, device=logits.device)   # any: logp is not read
    _, _, top, log_sum = rows_forward(logits, token, temperature, softcap, -100)
    _, _, top_ref, log_sum_ref = rows_forward(logits_ref, token, temperature, softcap, -100)
    return top, log_sum, top_ref, log_sum_ref


def _rows_kl_(logits, logits_ref, keep, statistics, temperature, softcap, kl, g=None, dtype=None, vocab=None):
    """Fills kl (N,); or, given upstream gradients g (N,), overwrites logits (N, V) with their gradient and returns it,
    as `rows_backward_` does. Both logits are used up."""
    if use_triton(logits):
        return _rows_triton(logits, logits_ref, keep, statistics, temperature, softcap, kl, g, dtype or logits.dtype,
                            vocab or logits.shape[1])
    return _rows_torch(logits, logits_ref, keep, statistics, temperature, softcap, kl, g)


# ---------------------------------------------------------------- op

@torch.library.custom_op("seethink::linear_kl", mutates_args=())
def _op(h: Tensor, weight: Tensor, h_ref: Tensor, weight_ref: Tensor, mask: Tensor, temperature: float,
        softcap: Optional[float], chunk: Optional[int]) -> Tuple[Tensor, Tensor]:
    """-> kl (N,), and top, log_sum, top_ref, log_sum_ref (4, N) for the backward."""
    vocab = len(weight)
    kl = h.new_empty(len(h), dtype=accumulator(h.dtype))
    statistics = kl.new_empty(4, len(h))
    h, weight, h_ref, weight_ref = widened_on_cpu(h, padded_on_gpu(weight), h_ref, padded_on_gpu(weight_ref))
    chunks = row_chunks(h, weight, chunk, need_dw=False)
    buffer = logits_buffer(h, weight, chunks)
    buffer_ref = logits_buffer(h_ref, weight_ref, chunks)
    for rows in chunks:
        logits = fp32_logits(h[rows], weight, buffer)[:, :vocab]
        logits_ref = fp32_logits(h_ref[rows], weight_ref, buffer_ref)[:, :vocab]
        of_rows = _rows_statistics(logits, logits_ref, temperature, softcap)
        statistics[:, rows] = torch.stack(of_rows)
        _rows_kl_(logits, logits_ref, mask[rows], of_rows, temperature, softcap, kl[rows])
        del logits, logits_ref          # before the next chunk's are made
    return kl, statistics


@_op.register_fake
def _(h, weight, h_ref, weight_ref, mask, temperature, softcap, chunk):
    kl = h.new_empty(len(h), dtype=accumulator(h.dtype))
    return kl, kl.new_empty(4, len(h))


@torch.library.custom_op("seethink::linear_kl_backward", mutates_args=())
def _op_backward(g: Tensor, kl: Tensor, statistics: Tensor, h: Tensor, weight: Tensor, h_ref: Tensor,
                 weight_ref: Tensor, mask: Tensor, temperature: float, softcap: Optional[float], chunk: Optional[int],
                 need_dh: bool, need_dw: bool) -> Tuple[Tensor, Tensor]:
    dtype = h.dtype
    vocab = len(weight)
    h, weight, h_ref, weight_ref = widened_on_cpu(h, padded_on_gpu(weight), h_ref, padded_on_gpu(weight_ref))
    g = g.contiguous()
    gradients = Gradients(h, weight, need_dh, need_dw)
    chunks = row_chunks(h, weight, chunk, need_dw)
    buffer = logits_buffer(h, weight, chunks)
    buffer_ref = logits_buffer(h_ref, weight_ref, chunks)
    for rows in chunks:
        logits = fp32_logits(h[rows], weight, buffer)
        logits_ref = fp32_logits(h_ref[rows], weight_ref, buffer_ref)
        dlogits = _rows_kl_(logits, logits_ref, mask[rows], statistics[:, rows].unbind(), temperature, softcap,
                            kl[rows], g[rows], dtype=h.dtype, vocab=vocab)
        del logits_ref
        gradients.add(rows, dlogits)
        del logits, dlogits
    return gradients.result(dtype, vocab)


@_op_backward.register_fake
def _(g, kl, statistics, h, weight, h_ref, weight_ref, mask, temperature, softcap, chunk, need_dh, need_dw):
    return empty_gradients(h, weight, need_dh, need_dw)


def _setup(ctx, inputs, output):
    kl, statistics = output
    ctx.save_for_backward(kl, statistics, *inputs[:5])
    ctx.options = inputs[5:]            # temperature, softcap, chunk
    ctx.mark_non_differentiable(statistics)


def _gradient(ctx, g, _):
    need_dh, need_dw = ctx.needs_input_grad[:2]
    if not (need_dh or need_dw):
        return None, None, None, None, None, None, None, None
    dh, dw = _op_backward(g, *ctx.saved_tensors, *ctx.options, need_dh, need_dw)
    return dh if need_dh else None, dw if need_dw else None, None, None, None, None, None, None


_op.register_autograd(_gradient, setup_context=_setup)


@register_flop_formula(torch.ops.seethink.linear_kl)
def _flops(h, weight, h_ref, weight_ref, *args, out_shape=None, **kwargs):
    """All four are shapes."""
    return head_flops(h, weight) + head_flops(h_ref, weight_ref)


@register_flop_formula(torch.ops.seethink.linear_kl_backward)
def _flops_backward(g, kl, statistics, h, weight, h_ref, weight_ref, *args, out_shape=None, **kwargs):
    need_dh, need_dw = args[-2:]
    return head_flops(h, weight) * (1 + need_dh + need_dw) + head_flops(h_ref, weight_ref)


def linear_kl(h, weight, h_ref, weight_ref, temperature=1.0, softcap=None, mask=None, chunk=None):
    """Exact KL(policy || reference) of each row, without an (N, V) tensor.

    h (N, D), weight (V, D) of the policy; h_ref (N, Dr), weight_ref (V, Dr), constants; mask (N,)
    bool, rows that are False give 0. Returns (N,) fp32 (fp64 for fp64 inputs), in nats,
    differentiable in h and weight. `chunk` as in linear_logp; two chunks of logits are held. Raises
    ValueError on what does not fit.
    """
    for name, x in (("h", h), ("weight", weight), ("h_ref", h_ref), ("weight_ref", weight_ref)):
        check_floating(name, x, ndim=2)
        check_device(name, x, "h", h)
        require(x.dtype == h.dtype, lambda: f"{name} {x.dtype} must be {h.dtype}, as h is")
    N, D = h.shape
    V, Dr = weight_ref.shape
    require(weight.shape == (V, D) and h_ref.shape == (N, Dr),
            lambda: f"h {tuple(h.shape)}, weight {tuple(weight.shape)}, h_ref {tuple(h_ref.shape)} and weight_ref "
                    f"{tuple(weight_ref.shape)} must be (N, D), (V, D), (N, Dr) and (V, Dr)")
    check_positive("temperature", temperature)
    if softcap is not None:
        check_positive("softcap", softcap)
    require(chunk is None or chunk >= 1, lambda: f"chunk {chunk} must be at least 1 row, or None")
    if mask is None:
        mask = torch.ones(len(h), dtype=torch.bool, device=h.device)
    check_device("mask", mask, "h", h)
    require(mask.shape == h.shape[:1], lambda: f"mask {tuple(mask.shape)} must be ({len(h)},), one entry a row")
    return _op(h, weight, h_ref.detach(), weight_ref.detach(), mask.bool(), float(temperature), softcap, chunk)[0]
