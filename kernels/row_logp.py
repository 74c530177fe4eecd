"""Log-probability of chosen tokens and entropy from rows of logits, and their gradient in place.

    z = logits / temperature,     with a softcap (Gemma 2, arXiv 2408.00118): z = cap tanh(logits / cap) / temperature
    top = max_v z_v,     log_sum = log sum_v exp(z_v - top),     log p_v = z_v - top - log_sum
    logp = log p_target,     entropy = - sum_v p_v log p_v = log_sum - sum_v p_v (z_v - top)

The other form of the entropy, logsumexp - sum p z, loses its digits when |z| is large; so do
log-probs whose two statistics are added up before they are stored. For upstream gradients g of logp
and e of entropy:

    dz = g (onehot(target) - p) - e p (log p + entropy)
    dlogits = dz / temperature,       with a softcap: times 1 - tanh(logits / cap)^2

What is kept for the backward is the largest logit, under the softcap but before the temperature, and
log_sum: a difference of two logits is more exact than one of two quotients.

The kernels take exponentials to the base 2, which is what a GPU computes: e^(x / temperature) =
2^(x scale), scale = log2(e) / temperature.
"""
from typing import Optional, Tuple

import torch
from torch import Tensor

from kernels.backend import (LN_2, LOG2_E, accumulator, check_device, check_floating, check_positive,
                             check_targets, jit, require, tl, use_triton)

BLOCK = 4096                    # columns that a program holds at a time
CACHE_BYTES = 2**20             # of rows that PyTorch passes over several times: they fit a core's cache


# ---------------------------------------------------------------- reference

def row_logp_reference(logits, target, temperature=1.0, softcap=None, ignore_index=-100):
    """The lines that every other version must equal."""
    z = logits.to(accumulator(logits.dtype))
    if softcap is not None:
        z = softcap * (z / softcap).tanh()
    log_p = (z / temperature).log_softmax(-1)
    keep = target != ignore_index
    logp = log_p.gather(-1, target.masked_fill(~keep, 0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.where(keep, logp, 0.0), torch.where(keep, entropy, 0.0)


# ---------------------------------------------------------------- Triton kernels: one program a row

@jit
def tanh(x):
    """Of any finite x. Written out, because the interpreter has no libdevice."""
    t = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - t) / (1.0 + t)
    return tl.where(x < 0, -t, t)


@jit
def capped(raw, softcap, CAPPED: tl.constexpr):
    """Raw logits of any dtype -> fp32, under the softcap."""
    x = raw.to(tl.float32)
    if CAPPED:
        x = softcap * tanh(x / softcap)
    return x


@jit
def add_to_lanes(x, m, s, u, scale):
    """Takes a block of logits x into each lane's m = max x, s = sum 2^((x - m) scale) and u = sum 2^((x - m) scale)
    (x - m). One exponential does: either the sums shrink by it, where m grows to x, or x adds it to them."""
    above = x - m
    e = tl.exp2(-tl.abs(above) * scale)
    grows = above > 0
    u = tl.where(grows, e * (u - above * s), u + tl.where(e > 0, e * above, 0.0))       # 0 times -inf would be NaN
    s = tl.where(grows, e * s + 1.0, s + e)
    return tl.maximum(m, x), s, u


@jit
def _forward_kernel(logits, stride, target, logp, entropy, top, log_sum, temperature, softcap, ignore_index,
                    V: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr):
    """Once over the row; an ignored row is not read."""
    row = tl.program_id(0)
    wanted = tl.load(target + row)
    if wanted == ignore_index:
        tl.store(logp + row, 0.0)
        tl.store(entropy + row, 0.0)
        tl.store(top + row, 0.0)
        tl.store(log_sum + row, 0.0)
    else:
        base = logits + row.to(tl.int64) * stride       # rows * V passes 2^31
        scale = LOG2_E / temperature
        # 1. A softmax for each lane, of the columns that it sees: no lane waits for another in the loop. A maximum
        # starts below any logit, not at -inf, from which no difference could be taken.
        lane = tl.arange(0, BLOCK)
        m = tl.full((BLOCK,), -1e30, tl.float32)
        s = tl.zeros((BLOCK,), tl.float32)
        u = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            column = start + lane
            x = capped(tl.load(base + column, mask=column < V, other=0.0), softcap, CAPPED)
            m, s, u = add_to_lanes(tl.where(column < V, x, float("-inf")), m, s, u, scale)
        # 2. All lanes' together.
        largest = tl.max(m, 0)
        below = m - largest
        share = tl.exp2(below * scale)
        u = tl.sum(share * (u + below * s), 0)
        s = tl.sum(share * s, 0)
        x = capped(tl.load(base + wanted), softcap, CAPPED)
        tl.store(logp + row, (x - largest) / temperature - tl.log(s))
        tl.store(entropy + row, tl.log(s) - u / s / temperature)
        tl.store(top + row, largest)
        tl.store(log_sum + row, tl.log(s))


@jit
def _backward_kernel(logits, stride, out, out_stride, target, g, e, entropy, top, log_sum, temperature, softcap,
                     ignore_index, V: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr):
    """Once over the row, from the statistics of the forward. Columns V .. WIDTH - 1, of tokens that there are not, get
    a gradient of 0."""
    row = tl.program_id(0)
    wanted = tl.load(target + row)
    keep = wanted != ignore_index
    base = logits + row.to(tl.int64) * stride
    place = out + row.to(tl.int64) * out_stride
    scale = LOG2_E / temperature
    m = tl.load(top + row)
    log_s = tl.load(log_sum + row) * LOG2_E
    h = tl.load(entropy + row) * LOG2_E
    g_row = tl.load(g + row) / temperature
    e_row = tl.load(e + row) / temperature * LN_2
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        raw = tl.load(base + column, mask=column < V, other=0.0).to(tl.float32)
        logp = (capped(raw, softcap, CAPPED) - m) * scale - log_s           # to the base 2, as log_s and h are
        p = tl.exp2(logp)
        onehot = tl.where(column == wanted, 1.0, 0.0)
        # In fp32, before any rounding: 1 - p of a likely target, from p in bf16, is 20 % off.
        d = g_row * (onehot - p) - tl.where(p > 0, e_row * p * (logp + h), 0.0)
        if CAPPED:
            t = tanh(raw / softcap)
            d = d * (1.0 - t * t)
        # `out` may be the front half of the row's own bytes: the block is read before it is written.
        tl.debug_barrier()
        tl.store(place + column, tl.where(keep & (column < V), d, 0.0).to(out.dtype.element_ty), mask=column < WIDTH)


def _forward_triton(logits, target, temperature, softcap, ignore_index):
    N, V = logits.shape
    out = [logits.new_empty(N, dtype=torch.float32) for _ in range(4)]
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    _forward_kernel[(N,)](logits, logits.stride(0), target.contiguous(), *out, temperature, softcap or 1.0,
                          ignore_index, V=V, BLOCK=BLOCK, CAPPED=softcap is not None, num_warps=8)
    return out


def in_front(logits, dtype):
    """Memory (N, V) for a gradient of dtype in place of logits (N, V): a narrower one takes the front of each row's
    own bytes."""
    return logits if dtype == logits.dtype else logits.view(dtype)[:, :logits.shape[1]]


def _backward_triton_(logits, target, g, e, entropy, top, log_sum, temperature, softcap, ignore_index, dtype, vocab):
    N, width = logits.shape
    out = in_front(logits, dtype)
    zero = torch.zeros_like(top) if g is None or e is None else None
    g = zero if g is None else g.contiguous()
    e = zero if e is None else e.contiguous()
    _backward_kernel[(N,)](logits, logits.stride(0), out, out.stride(0), target.contiguous(), g, e, entropy, top,
                           log_sum, temperature, softcap or 1.0, ignore_index, V=vocab, WIDTH=width, BLOCK=BLOCK,
                           CAPPED=softcap is not None, num_warps=8)
    return out


# ---------------------------------------------------------------- PyTorch form: some rows at a time

def row_blocks(logits):
    """Slices of rows that fit a core's cache together."""
    step = max(1, CACHE_BYTES // (4 * max(1, logits.shape[1])))
    return [slice(start, start + step) for start in range(0, len(logits), step)]


def torch_capped(raw, softcap):
    """Raw logits -> fp32 (fp64 stays), under the softcap, and tanh(logits / cap) or None without a cap."""
    x = raw.to(accumulator(raw.dtype))
    if softcap is None:
        return x, None
    t = (x / softcap).tanh_()
    return t * softcap, t


def torch_scaled(x, temperature):
    """x / temperature; x itself, not a copy, at temperature 1."""
    return x if temperature == 1 else x / temperature


def _forward_torch(logits, target, temperature, softcap, ignore_index):
    out = [logits.new_empty(len(logits), dtype=accumulator(logits.dtype)) for _ in range(4)]
    logp, entropy, top, log_sum = out
    keep = target != ignore_index
    chosen = target.masked_fill(~keep, 0)[:, None]
    for rows in row_blocks(logits):
        x, _ = torch_capped(logits[rows], softcap)
        log_p = torch_scaled(x, temperature).log_softmax(-1)
        torch.amax(x, -1, out=top[rows])
        log_sum[rows] = -log_p.amax(-1)                 # at the largest z, log p = -log_sum exactly
        logp[rows] = log_p.gather(-1, chosen[rows])[:, 0]
        # Clamped, a logit of -inf adds 0 to the entropy; 0 * -inf would be NaN.
        entropy[rows] = -log_p.exp().mul_(log_p.clamp_(min=-1e30)).sum(-1)
    for tensor in out:
        tensor.masked_fill_(~keep, 0)
    return out


def _backward_torch_(logits, target, g, e, entropy, top, log_sum, temperature, softcap, ignore_index, dtype):
    keep = target != ignore_index
    chosen = target.masked_fill(~keep, 0)[:, None]
    largest = torch_scaled(top, temperature)[:, None]       # rounded as the z that it is subtracted from
    if g is not None:
        g = (g * keep / temperature)[:, None]
    if e is not None:
        e = (e * keep / temperature)[:, None]
    for rows in row_blocks(logits):
        x, t = torch_capped(logits[rows], softcap)
        logp = (torch_scaled(x, temperature) - largest[rows]).sub_(log_sum[rows, None])
        p = logp.exp()
        if e is None:
            d = p.mul_(-g[rows])
        else:
            d = logp.clamp_(min=-1e30).add_(entropy[rows, None]).mul_(p).mul_(-e[rows])
            if g is not None:
                d.addcmul_(p, g[rows], value=-1)
        if g is not None:
            d.scatter_add_(-1, chosen[rows], g[rows])
        if t is not None:
            d.mul_(1 - t * t)
        logits[rows] = d
    logits[~keep] = 0           # their statistics are 0, so exp(z) may be inf, and 0 * inf is not 0
    return logits.to(dtype)


# ---------------------------------------------------------------- either form, without autograd: for other ops, too

def rows_forward(logits, target, temperature, softcap, ignore_index):
    """logits (N, V), target (N,) -> logp, entropy, top, log_sum, each (N,)."""
    run = _forward_triton if use_triton(logits) and len(logits) else _forward_torch
    return run(logits, target, temperature, softcap, ignore_index)


def rows_backward_(logits, target, g, e, entropy, top, log_sum, temperature, softcap, ignore_index, dtype=None,
                   vocab=None):
    """Overwrites logits (N, V) with their gradient and returns it.

    g, e (N,): upstream gradients; None stands for 0. dtype of the gradient; None: of the logits.
    From Triton a narrower one lies in the front of each row's bytes. vocab: for Triton, how many of
    the V columns are tokens; the gradient of the others is 0; None: all are.
    """
    dtype = dtype or logits.dtype
    arguments = (target, g, e, entropy, top, log_sum, temperature, softcap, ignore_index, dtype)
    if use_triton(logits) and len(logits):
        return _backward_triton_(logits, *arguments, vocab or logits.shape[1])
    return _backward_torch_(logits, *arguments)


# ---------------------------------------------------------------- ops

@torch.library.custom_op("seethink::row_logp", mutates_args=())
def _op(logits: Tensor, target: Tensor, temperature: float, softcap: Optional[float],
        ignore_index: int) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    check_targets(target, logits.shape[1], ignore_index)
    return tuple(rows_forward(logits, target, temperature, softcap, ignore_index))


@_op.register_fake
def _(logits, target, temperature, softcap, ignore_index):
    return tuple(logits.new_empty(len(logits), dtype=accumulator(logits.dtype)) for _ in range(4))


@torch.library.custom_op("seethink::row_dlogits_", mutates_args=("logits",))
def _op_backward_(logits: Tensor, target: Tensor, g: Optional[Tensor], e: Optional[Tensor], entropy: Tensor,
                  top: Tensor, log_sum: Tensor, temperature: float, softcap: Optional[float],
                  ignore_index: int) -> None:
    rows_backward_(logits, target, g, e, entropy, top, log_sum, temperature, softcap, ignore_index)


@_op_backward_.register_fake
def _(logits, *rest):
    return None             # it writes to its argument


def _setup(ctx, inputs, output):
    logits, target, *options = inputs
    _, entropy, top, log_sum = output
    ctx.save_for_backward(logits, target, entropy, top, log_sum)
    ctx.options = options               # temperature, softcap, ignore_index
    ctx.mark_non_differentiable(top, log_sum)
    ctx.set_materialize_grads(False)    # a loss without entropy pays nothing for its gradient


def _gradient(ctx, g, e, *_):
    logits, target, *statistics = ctx.saved_tensors
    if g is None and e is None:
        return None, None, None, None, None
    dlogits = logits.clone(memory_format=torch.contiguous_format)
    _op_backward_(dlogits, target, g, e, *statistics, *ctx.options)
    return dlogits, None, None, None, None


_op.register_autograd(_gradient, setup_context=_setup)


def check(logits, target, temperature, softcap):
    """Raises ValueError on what does not fit."""
    check_floating("logits", logits, ndim=2)
    check_device("target", target, "logits", logits)
    require(target.shape == logits.shape[:1] and not target.is_floating_point(),
            lambda: f"target {tuple(target.shape)} {target.dtype} must hold ({len(logits)},) integers, one a row")
    check_positive("temperature", temperature)
    if softcap is not None:
        check_positive("softcap", softcap)


def row_logp(logits, target, temperature=1.0, softcap=None, ignore_index=-100):
    """Log-prob of `target` and entropy under softmax(z) of each row of logits.

    logits (N, V), entries of -inf allowed; target (N,) int64, `ignore_index` rows give 0 and 0.
    Returns (logp, entropy), each (N,) fp32 (fp64 for fp64 logits), differentiable in logits. Raises
    ValueError on what does not fit.
    """
    check(logits, target, temperature, softcap)
    return _op(logits, target, float(temperature), softcap, ignore_index)[:2]


def row_dlogits_(logits, target, g, e=None, temperature=1.0, softcap=None, ignore_index=-100):
    """Overwrites logits (N, V) with the gradient of sum(g logp + e entropy), and returns them.

    g, e (N,); None stands for 0.
    """
    check(logits, target, temperature, softcap)
    require(logits.stride(-1) == 1, lambda: f"logits of strides {logits.stride()} must be contiguous within a row")
    logits = logits.detach()
    _, entropy, top, log_sum = _op(logits, target, float(temperature), softcap, ignore_index)
    _op_backward_(logits, target, g, e, entropy, top, log_sum, float(temperature), softcap, ignore_index)
    return logits
