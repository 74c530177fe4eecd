"""Log-probability of chosen tokens and entropy, straight from hidden states, without an (N, V) tensor.

    logits = h W^T                      (N, V), only ever a chunk of rows at a time, in fp32
    logp, entropy                       as in kernels/row_logp.py: temperature, softcap, both gradients
    dh = dlogits W,      dW = dlogits^T h

One matmul and one row kernel a chunk; the backward computes the chunk's logits again, has the row kernel overwrite them
with their gradient, and takes two more matmuls: 8 N D V FLOPs in all. Nothing of size V outlives its chunk but dW.
"""
from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import accumulator, floating, like, need, positive, targets
from kernels.row_logp import row_logp_reference, rows_backward_, rows_forward

CPU_CHUNK_BYTES = 64 * 2**20    # at most this many bytes of logits at a time on a CPU
CUDA_CHUNK_ROWS = 4096          # accumulating an fp32 dW costs about 245 / rows of the total: 6 % here


def linear_logp_reference(h, weight, target, temperature=1.0, softcap=None, ignore_index=-100):
    """The formula with all logits at once."""
    wide = accumulator(h.dtype)
    return row_logp_reference(h.to(wide) @ weight.to(wide).T, target, temperature, softcap, ignore_index)


def fp32_logits(h, weight, out=None):
    """h (.., D) @ weight (V, D)^T -> (.., V), in fp32 even for bf16 inputs; fp64 stays fp64, for tests.

    Logits rounded to bf16 put a log-prob off by up to 0.09. out: memory to use where h is wide already, or None.
    """
    if h.dtype in (torch.float32, torch.float64):
        return h @ weight.T if out is None else torch.mm(h, weight.T, out=out[:len(h)])
    if h.is_cuda:
        return torch.mm(h.flatten(0, -2), weight.T, out_dtype=torch.float32).view(*h.shape[:-1], -1)
    # A CPU's bf16 matmul rounds its sums. Some rows of the head at a time: all of a 7B's in fp32 are half a gigabyte.
    return torch.cat([h.float() @ part.float().T for part in weight.split(4096)], dim=-1)


# ---------------------------------------------------------------- chunks of rows, for every op with a head

def parts(h, weight, chunk):
    """Slices of rows whose logits are held at one time; chunk None: by memory."""
    if not chunk:
        chunk = CUDA_CHUNK_ROWS if h.is_cuda else max(1, CPU_CHUNK_BYTES // (4 * weight.shape[0]))
    return [slice(start, start + chunk) for start in range(0, len(h), chunk)]


def room(h, weight, chunk):
    """Memory for a chunk's logits, the same for all: on a CPU fresh pages cost a fifth of the matmul. On CUDA, where
    the allocator hands the same memory out again, None."""
    rows = min(len(h), parts(h, weight, chunk)[0].stop) if len(h) else 0
    return None if h.is_cuda else h.new_empty(rows, len(weight), dtype=accumulator(h.dtype))


def on_device(*tensors):
    """On a CPU half precision is widened once, before the chunks: it has no matmul with an fp32 result."""
    return [t if t.is_cuda else t.to(accumulator(t.dtype)) for t in tensors]


class Gradients:
    """dh (N, D) and, in fp32, dW (V, D), filled a chunk at a time; what is not needed is neither computed nor held."""

    def __init__(self, h, weight, need_dh, need_dw):
        self.h, self.weight = h, weight
        self.dh = torch.empty_like(h, memory_format=torch.contiguous_format) if need_dh else h.new_empty(0)
        self.dw = weight.new_zeros(weight.shape if need_dw else 0, dtype=accumulator(weight.dtype))

    def add(self, part, dlogits):
        """dlogits: of the rows `part`, in the dtype of h."""
        if self.dh.numel():
            torch.mm(dlogits, self.weight, out=self.dh[part])
        if self.dw.numel():
            if self.dw.dtype == self.h.dtype:
                self.dw.addmm_(dlogits.T, self.h[part])
            else:
                torch.addmm(self.dw, dlogits.T, self.h[part], out_dtype=self.dw.dtype, out=self.dw)


# ---------------------------------------------------------------- the op

@torch.library.custom_op("seethink::linear_logp", mutates_args=())
def _op(h: Tensor, weight: Tensor, target: Tensor, temperature: float, softcap: Optional[float], ignore_index: int,
        chunk: Optional[int]) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    targets(target, len(weight), ignore_index)
    out = tuple(h.new_empty(len(h), dtype=accumulator(h.dtype)) for _ in range(4))
    wide_h, wide_weight = on_device(h, weight)
    buffer = room(h, weight, chunk)
    for part in parts(h, weight, chunk):
        logits = fp32_logits(wide_h[part], wide_weight, buffer)
        for whole, piece in zip(out, rows_forward(logits, target[part], temperature, softcap, ignore_index)):
            whole[part] = piece
        del logits                      # before the next chunk's are made
    return out


@_op.register_fake
def _(h, weight, target, temperature, softcap, ignore_index, chunk):
    return tuple(h.new_empty(len(h), dtype=accumulator(h.dtype)) for _ in range(4))


@torch.library.custom_op("seethink::linear_logp_backward", mutates_args=())
def _op_backward(g: Optional[Tensor], e: Optional[Tensor], h: Tensor, weight: Tensor, target: Tensor, entropy: Tensor,
                 top: Tensor, log_sum: Tensor, temperature: float, softcap: Optional[float], ignore_index: int,
                 chunk: Optional[int], need_dh: bool, need_dw: bool) -> Tuple[Tensor, Tensor]:
    wide_h, wide_weight = on_device(h, weight)
    gradients, buffer = Gradients(wide_h, wide_weight, need_dh, need_dw), room(h, weight, chunk)
    for part in parts(h, weight, chunk):
        logits = fp32_logits(wide_h[part], wide_weight, buffer)
        some = [None if t is None else t[part] for t in (target, g, e, entropy, top, log_sum)]
        gradients.add(part, rows_backward_(logits, *some, temperature, softcap, ignore_index, dtype=wide_h.dtype))
        del logits
    return gradients.dh.to(h.dtype), gradients.dw.to(weight.dtype)


@_op_backward.register_fake
def _(g, e, h, weight, target, entropy, top, log_sum, temperature, softcap, ignore_index, chunk, need_dh, need_dw):
    return (torch.empty_like(h, memory_format=torch.contiguous_format) if need_dh else h.new_empty(0),
            weight.new_empty(weight.shape if need_dw else (0,)))


def _setup(ctx, inputs, output):
    h, weight, target, *ctx.options = inputs
    _, entropy, top, log_sum = output
    ctx.save_for_backward(h, weight, target, entropy, top, log_sum)
    ctx.mark_non_differentiable(top, log_sum)
    ctx.set_materialize_grads(False)            # a loss without entropy pays nothing for its gradient


def _gradient(ctx, g, e, *_):
    needs = ctx.needs_input_grad[:2]
    if g is None and e is None or not any(needs):
        return (None,) * 7
    dh, dw = _op_backward(g, e, *ctx.saved_tensors, *ctx.options, *needs)
    return dh if needs[0] else None, dw if needs[1] else None, None, None, None, None, None


_op.register_autograd(_gradient, setup_context=_setup)


@register_flop_formula(torch.ops.seethink.linear_logp)
def _flops(h, weight, *args, out_shape=None, **kwargs):
    return 2 * h[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.seethink.linear_logp_backward)
def _flops_backward(g, e, h, weight, *args, out_shape=None, **kwargs):
    return 2 * h[0] * weight[0] * weight[1] * (1 + sum(args[-2:]))


def check(h, weight, target, temperature, softcap, chunk):
    """Raises ValueError for a head that does not fit its states or tokens."""
    floating("h", h, ndim=2)
    floating("weight", weight, ndim=2)
    need(h.shape[1] == weight.shape[1],
         lambda: f"h {tuple(h.shape)} and weight {tuple(weight.shape)} must be (N, D) and (V, D)")
    need(h.dtype == weight.dtype, lambda: f"h {h.dtype} and weight {weight.dtype} must have one dtype")
    like("weight", weight, "h", h, shape=False)
    like("target", target, "h", h, shape=False)
    need(target.shape == h.shape[:1] and target.dtype == torch.int64,
         lambda: f"target {tuple(target.shape)} {target.dtype} must be ({len(h)},) int64, one token for each row of h")
    positive("temperature", temperature)
    if softcap is not None:
        positive("softcap", softcap)
    need(chunk is None or chunk >= 1, lambda: f"chunk {chunk} must be at least 1 row, or None")


def linear_logp(h, weight, target, temperature=1.0, softcap=None, ignore_index=-100, chunk=None):
    """Log-prob of `target` and entropy of each row, from hidden states and the head, a chunk of rows at a time.

    h (N, D); weight (V, D); target (N,) int64, `ignore_index` rows give 0 and 0. Returns (logp, entropy), each (N,)
    fp32 (fp64 for fp64 inputs), differentiable in h and weight. `chunk`: rows at a time (None: 4096 on CUDA, at most
    64 MiB of logits on a CPU). Raises ValueError on what does not fit, tokens outside the vocabulary included (on CUDA
    with SEETHINK_CHECK=1 only: looking at them would wait for the GPU).
    """
    check(h, weight, target, temperature, softcap, chunk)
    return _op(h, weight, target, float(temperature), softcap, ignore_index, chunk)[:2]
