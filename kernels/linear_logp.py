"""Log-probability of chosen tokens and entropy from hidden states, without an (N, V) tensor.

    logits = h W^T                      (N, V), only ever a chunk of rows at a time, in fp32
    logp, entropy                       as in kernels/row_logp.py: temperature, softcap, both gradients
    dh = dlogits W,      dW = dlogits^T h

One matmul and one row kernel (kernels/row_logp.py) a chunk. The backward computes the chunk's
logits again, has the row kernel overwrite them with their gradient, and takes two more matmuls:
8 N D V FLOPs in all. Of what has size V only dW outlives its chunk.

Where the upstream gradients are known before the forward (of a supervised loss -1 / tokens, of a
policy loss at ratio 1 minus the weighted advantage), the forward computes dh and dW as well, each
chunk's while its logits are at hand: 6 N D V FLOPs. The backward then hands them out, having
asserted that the loss sends what was told.

On a GPU a head whose V is no multiple of 64 gets rows of zeros up to one, in a copy for the length
of the call: the tensor cores want every dimension of a product in multiples of 16 bytes (cuBLAS,
"Tensor Core Usage"). Their logits are read by no kernel, and their gradient is 0.
"""
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import (accumulator, check_device, check_floating, check_like, check_positive,
                             check_targets, require, use_triton)
from kernels.row_logp import row_logp_reference, rows_backward_, rows_forward

CPU_CHUNK_BYTES = 64 * 2**20    # of logits at a time, at most, on a CPU
CUDA_CHUNK_ROWS = 4096          # accumulating an fp32 dW costs about 245 / rows of the total: 6 % here
CUDA_CHUNK_ROWS_NO_DW = 1024    # nothing is accumulated: a quarter of the memory costs no time
VOCAB_MULTIPLE = 64             # of a head's rows on a GPU


# ---------------------------------------------------------------- reference

def linear_logp_reference(h, weight, target, temperature=1.0, softcap=None, ignore_index=-100):
    """The formula with all logits at once."""
    wide = accumulator(h.dtype)
    return row_logp_reference(h.to(wide) @ weight.to(wide).T, target, temperature, softcap, ignore_index)


# ---------------------------------------------------------------- chunks of rows, for every op with a head

def fp32_logits(h, weight, out=None):
    """h (.., D) @ weight (V, D)^T -> (.., V), in fp32 even for bf16 inputs; fp64 stays fp64.

    Logits rounded to bf16 put a log-prob off by up to 0.09. out: memory for the result, used where
    h, then (N, D), is fp32 or fp64.
    """
    if h.dtype in (torch.float32, torch.float64):
        if out is None:
            return h @ weight.T
        return torch.mm(h, weight.T, out=out[:len(h)])
    if h.is_cuda:
        return torch.mm(h.flatten(0, -2), weight.T, out_dtype=torch.float32).view(*h.shape[:-1], -1)
    # A CPU's bf16 matmul rounds its sums. Some tokens at a time: a 7B's head in fp32 is 0.5 GB.
    h = h.float()
    return torch.cat([h @ tokens.float().T for tokens in weight.split(4096)], dim=-1)


def chunk_rows(device, vocab, need_dw):
    """Rows whose logits are held at one time. need_dw: whether a dW is added up over the chunks."""
    if device.type != "cuda":
        return max(1, CPU_CHUNK_BYTES // (4 * vocab))
    return CUDA_CHUNK_ROWS if need_dw else CUDA_CHUNK_ROWS_NO_DW


def row_chunks(h, weight, chunk, need_dw):
    """Slices of rows whose logits are held at one time. chunk: rows of each; None: `chunk_rows`."""
    chunk = chunk or chunk_rows(h.device, weight.shape[0], need_dw)
    return [slice(start, start + chunk) for start in range(0, len(h), chunk)]


def logits_buffer(h, weight, chunks):
    """Memory for the logits of one chunk, which all chunks use; None on CUDA.

    On a CPU fresh pages cost a fifth of the matmul. CUDA's allocator hands out the same memory.
    """
    if h.is_cuda:
        return None
    rows = min(len(h), chunks[0].stop) if chunks else 0
    return h.new_empty(rows, len(weight), dtype=accumulator(h.dtype))


def padded_vocab(vocab):
    """The next multiple of VOCAB_MULTIPLE."""
    return vocab + -vocab % VOCAB_MULTIPLE


def padded_on_gpu(weight):
    """A head (V, D) with rows of zeros up to a multiple of VOCAB_MULTIPLE, where Triton runs."""
    missing = padded_vocab(len(weight)) - len(weight)
    if not missing or not use_triton(weight):
        return weight
    return F.pad(weight, (0, 0, 0, missing))


def widened_on_cpu(*tensors):
    """Widens half precision on a CPU, once: there it has no matmul with an fp32 result."""
    widened = []
    for t in tensors:
        if not t.is_cuda:
            t = t.to(accumulator(t.dtype))
        widened.append(t)
    return widened


class Gradients:
    """dh (N, D) and, in fp32, dW (V, D), filled a chunk at a time. Empty where not needed. V: of a
    padded head."""

    def __init__(self, h, weight, need_dh, need_dw):
        self.h = h
        self.weight = weight
        self.dh = h.new_empty(h.shape if need_dh else 0)
        self.dw = weight.new_zeros(weight.shape if need_dw else 0, dtype=accumulator(weight.dtype))

    def add(self, rows, dlogits):
        """Adds the chunk `rows`; dlogits (rows, V) in the dtype of h."""
        if self.dh.numel():
            torch.mm(dlogits, self.weight, out=self.dh[rows])
        if not self.dw.numel():
            return
        if self.dw.dtype == self.h.dtype:
            self.dw.addmm_(dlogits.T, self.h[rows])
        else:
            torch.addmm(self.dw, dlogits.T, self.h[rows], out_dtype=self.dw.dtype, out=self.dw)

    def result(self, dtype, vocab):
        """-> dh and dW in dtype, dW without the padding of its head."""
        return self.dh.to(dtype), self.dw[:vocab].to(dtype)


def head_flops(h, weight):
    """Of one matmul between states of shape h (N, D) and a head of shape (V, D): 2 N D V."""
    N, D = h
    V = weight[0]
    return 2 * N * D * V


def empty_gradients(h, weight, need_dh, need_dw):
    """What an op returns for Gradients, without their values: for torch.compile."""
    dh = torch.empty_like(h, memory_format=torch.contiguous_format) if need_dh else h.new_empty(0)
    dw = weight.new_empty(weight.shape) if need_dw else weight.new_empty(0)
    return dh, dw


# ---------------------------------------------------------------- op

@torch.library.custom_op("seethink::linear_logp", mutates_args=())
def _op(h: Tensor, weight: Tensor, target: Tensor, temperature: float, softcap: Optional[float], ignore_index: int,
        chunk: Optional[int]) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    check_targets(target, len(weight), ignore_index)
    out = tuple(h.new_empty(len(h), dtype=accumulator(h.dtype)) for _ in range(4))
    wide_h, wide_weight = widened_on_cpu(h, padded_on_gpu(weight))
    chunks = row_chunks(h, weight, chunk, need_dw=False)
    buffer = logits_buffer(h, wide_weight, chunks)
    for rows in chunks:
        logits = fp32_logits(wide_h[rows], wide_weight, buffer)
        statistics = rows_forward(logits[:, :len(weight)], target[rows], temperature, softcap, ignore_index)
        for whole, of_rows in zip(out, statistics):
            whole[rows] = of_rows
        del logits                      # before the next chunk's are made
    return out


@_op.register_fake
def _(h, weight, target, temperature, softcap, ignore_index, chunk):
    return tuple(h.new_empty(len(h), dtype=accumulator(h.dtype)) for _ in range(4))


@torch.library.custom_op("seethink::linear_logp_backward", mutates_args=())
def _op_backward(g: Optional[Tensor], e: Optional[Tensor], h: Tensor, weight: Tensor, target: Tensor, entropy: Tensor,
                 top: Tensor, log_sum: Tensor, temperature: float, softcap: Optional[float], ignore_index: int,
                 chunk: Optional[int], need_dh: bool, need_dw: bool) -> Tuple[Tensor, Tensor]:
    wide_h, wide_weight = widened_on_cpu(h, padded_on_gpu(weight))
    gradients = Gradients(wide_h, wide_weight, need_dh, need_dw)
    chunks = row_chunks(h, weight, chunk, need_dw)
    buffer = logits_buffer(h, wide_weight, chunks)
    for rows in chunks:
        logits = fp32_logits(wide_h[rows], wide_weight, buffer)
        dlogits = rows_backward_(logits, target[rows], None if g is None else g[rows],
                                 None if e is None else e[rows], entropy[rows], top[rows], log_sum[rows],
                                 temperature, softcap, ignore_index, dtype=wide_h.dtype, vocab=len(weight))
        gradients.add(rows, dlogits)
        del logits, dlogits
    return gradients.result(h.dtype, len(weight))


@_op_backward.register_fake
def _(g, e, h, weight, target, entropy, top, log_sum, temperature, softcap, ignore_index, chunk, need_dh, need_dw):
    return empty_gradients(h, weight, need_dh, need_dw)


def _setup(ctx, inputs, output):
    h, weight, target, *options = inputs
    _, entropy, top, log_sum = output
    ctx.save_for_backward(h, weight, target, entropy, top, log_sum)
    ctx.options = options                       # temperature, softcap, ignore_index, chunk
    ctx.mark_non_differentiable(top, log_sum)
    ctx.set_materialize_grads(False)            # a loss without entropy pays nothing for its gradient


def _gradient(ctx, g, e, *_):
    need_dh, need_dw = ctx.needs_input_grad[:2]
    if (g is None and e is None) or not (need_dh or need_dw):
        return None, None, None, None, None, None, None
    dh, dw = _op_backward(g, e, *ctx.saved_tensors, *ctx.options, need_dh, need_dw)
    return dh if need_dh else None, dw if need_dw else None, None, None, None, None, None


_op.register_autograd(_gradient, setup_context=_setup)


# ---------------------------------------------------------------- op, upstream gradients known

@torch.library.custom_op("seethink::linear_logp_known", mutates_args=())
def _op_known(h: Tensor, weight: Tensor, target: Tensor, g: Tensor, e: Optional[Tensor], temperature: float,
              softcap: Optional[float], ignore_index: int, chunk: Optional[int], need_dh: bool,
              need_dw: bool) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> logp, entropy, and under their upstream gradients g and e, dh and dW."""
    check_targets(target, len(weight), ignore_index)
    logp = h.new_empty(len(h), dtype=accumulator(h.dtype))
    entropy = torch.empty_like(logp)
    wide_h, wide_weight = widened_on_cpu(h, padded_on_gpu(weight))
    gradients = Gradients(wide_h, wide_weight, need_dh, need_dw)
    chunks = row_chunks(h, weight, chunk, need_dw)
    buffer = logits_buffer(h, wide_weight, chunks)
    for rows in chunks:
        logits = fp32_logits(wide_h[rows], wide_weight, buffer)
        statistics = rows_forward(logits[:, :len(weight)], target[rows], temperature, softcap, ignore_index)
        logp[rows], entropy[rows], top, log_sum = statistics
        dlogits = rows_backward_(logits, target[rows], g[rows], None if e is None else e[rows], entropy[rows], top,
                                 log_sum, temperature, softcap, ignore_index, dtype=wide_h.dtype, vocab=len(weight))
        gradients.add(rows, dlogits)
        del logits, dlogits             # before the next chunk's are made
    return logp, entropy, *gradients.result(h.dtype, len(weight))


@_op_known.register_fake
def _(h, weight, target, g, e, temperature, softcap, ignore_index, chunk, need_dh, need_dw):
    logp = h.new_empty(len(h), dtype=accumulator(h.dtype))
    return logp, torch.empty_like(logp), *empty_gradients(h, weight, need_dh, need_dw)


def _setup_known(ctx, inputs, output):
    _, _, _, g, e, *_ = inputs
    _, _, dh, dw = output
    ctx.save_for_backward(g, e, dh, dw)
    ctx.mark_non_differentiable(dh, dw)
    ctx.set_materialize_grads(False)


def assert_sent(name, sent, told):
    """An assertion, which does not wait for a GPU, that the upstream gradients (N,) are those told; None stands for
    0. A loss's kernel may round differently, hence the tolerance."""
    if sent is None and told is None:
        return
    sent = torch.zeros_like(told) if sent is None else sent
    told = torch.zeros_like(sent) if told is None else told
    off = (sent - told).abs() > 1e-3 * told.abs()
    torch._assert_async(~off.any(), f"the gradient that the loss sends to {name} is not the `upstream` that "
                                    "linear_logp was told: tell the right one, or none (a changed policy loss: take "
                                    "its name out of SAME_AT_RATIO_ONE of rl/losses.py)")


def _gradient_known(ctx, sent_g, sent_e, *_):
    g, e, dh, dw = ctx.saved_tensors
    assert_sent("logp", sent_g, g)
    assert_sent("entropy", sent_e, e)
    need_dh, need_dw = ctx.needs_input_grad[:2]
    return dh if need_dh else None, dw if need_dw else None, *[None] * 9


_op_known.register_autograd(_gradient_known, setup_context=_setup_known)


# ---------------------------------------------------------------- what both cost, and the function

@register_flop_formula(torch.ops.seethink.linear_logp)
def _flops(h, weight, *args, out_shape=None, **kwargs):
    """h and weight are shapes."""
    return head_flops(h, weight)


@register_flop_formula(torch.ops.seethink.linear_logp_backward)
def _flops_backward(g, e, h, weight, *args, out_shape=None, **kwargs):
    need_dh, need_dw = args[-2:]
    return head_flops(h, weight) * (1 + need_dh + need_dw)


@register_flop_formula(torch.ops.seethink.linear_logp_known)
def _flops_known(h, weight, *args, out_shape=None, **kwargs):
    need_dh, need_dw = args[-2:]
    return head_flops(h, weight) * (1 + need_dh + need_dw)


def check_head(h, weight, target, temperature, softcap, chunk):
    """Raises ValueError for a head that does not fit its states or tokens."""
    check_floating("h", h, ndim=2)
    check_floating("weight", weight, ndim=2)
    require(h.shape[1] == weight.shape[1],
            lambda: f"h {tuple(h.shape)} and weight {tuple(weight.shape)} must be (N, D) and (V, D)")
    require(h.dtype == weight.dtype,
            lambda: f"h {h.dtype} and weight {weight.dtype} must have one dtype")
    check_device("weight", weight, "h", h)
    check_device("target", target, "h", h)
    require(target.shape == h.shape[:1] and target.dtype == torch.int64,
            lambda: f"target {tuple(target.shape)} {target.dtype} must be ({len(h)},) int64, "
                    "one token for each row of h")
    check_positive("temperature", temperature)
    if softcap is not None:
        check_positive("softcap", softcap)
    require(chunk is None or chunk >= 1, lambda: f"chunk {chunk} must be at least 1 row, or None")


def known(name, x, target, dtype):
    """An upstream gradient as the op takes it; of entropy it may be None."""
    if x is None:
        require(name == "e", lambda: "upstream g must be a tensor; None stands for no gradient of entropy only")
        return None
    check_like(f"upstream {name}", x, "target", target)
    return x.detach().to(accumulator(dtype))


def linear_logp(h, weight, target, temperature=1.0, softcap=None, ignore_index=-100, chunk=None, upstream=None):
    """Log-prob of `target` and entropy of each row, from hidden states and the head.

    h (N, D); weight (V, D); target (N,) int64, `ignore_index` rows give 0 and 0. Returns (logp,
    entropy), each (N,) fp32 (fp64 for fp64 inputs), differentiable in h and weight. `chunk`: rows
    at a time (None: on CUDA 4096 where dW is added up over them, else 1024; at most 64 MiB of logits
    on a CPU). Raises ValueError on what does not fit, tokens outside the vocabulary included (on
    CUDA they are an error of the device, or with SEETHINK_CHECK=1 a ValueError, for which the host
    waits).

    upstream: (g, e) where the gradients (N,) that the loss will send back to logp and entropy are
    known; e may be None, for 0. Spares the backward a matmul; RuntimeError there if the loss sends others.
    """
    check_head(h, weight, target, temperature, softcap, chunk)
    need_dh = torch.is_grad_enabled() and h.requires_grad
    need_dw = torch.is_grad_enabled() and weight.requires_grad
    if upstream is not None and (need_dh or need_dw):
        g, e = (known(name, x, target, h.dtype) for name, x in zip("ge", upstream))
        return _op_known(h, weight, target, g, e, float(temperature), softcap, ignore_index, chunk, need_dh,
                         need_dw)[:2]
    return _op(h, weight, target, float(temperature), softcap, ignore_index, chunk)[:2]
