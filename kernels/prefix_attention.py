"""Attention of G completions to the prompt that they share and, causally, to themselves.

    out_c = softmax over the prompt's length tokens t and its own tokens d <= c of (q_c k / sqrt K), times v

Two attentions, to the prompt (x) and to its own (y), merged by their log-sum-exps:

    l = log(e^lx + e^ly),      out = e^(lx - l) out_x + e^(ly - l) out_y

The G completions are more queries on one copy of the prompt's keys, and query heads that share a key head are more
queries on it (grouped-query attention, arXiv 2305.13245): no key is repeated, and no mask (P, G, 1, C, T + C) is held.
Where torch has no flash attention that tells its log-sum-exp (on CUDA in fp32, on other devices) both are.
Merging: FlashAttention-2 2307.08691, section 3.1. Backward: that of each part, given the merged out and l, is exact,
since its softmax p = e^(s - l) and its row sums of g out are then those of the whole.

Shapes: P prompts of T slots, G completions of C tokens, H query heads, Hk key heads, r = H / Hk, K width of a head.
"""
from typing import List, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import accumulator, check_device, check_floating, require


# ---------------------------------------------------------------- reference

def prefix_attention_reference(q, k, v, kx, vx, lengths):
    """The formula with one mask over all keys, repeated for each completion."""
    P, G, H, C, K = q.shape
    T = kx.shape[-2]
    r = H // k.shape[2]
    keys, values = _repeated(kx, k, r), _repeated(vx, v, r)
    sees = _sees(q, lengths, kx.shape[2])
    scores = (q @ keys.transpose(-1, -2)).to(accumulator(q.dtype)) * K ** -0.5
    return scores.masked_fill(~sees, float("-inf")).softmax(-1).to(q.dtype) @ values


def _sees(q, lengths, T):
    """(P, 1, 1, C, T + C), True where a completion's token may look: the real tokens of its prompt, and its own up to
    itself."""
    C = q.shape[3]
    own = torch.arange(C, device=q.device)
    slot = torch.arange(T, device=q.device)
    is_real = slot < torch.tensor(lengths, device=q.device)[:, None]            # (P, T)
    sees_prompt = is_real[:, None].expand(-1, C, -1)
    sees_own = (own[:, None] >= own).expand(len(lengths), -1, -1)
    return torch.cat([sees_prompt, sees_own], dim=-1)[:, None, None]


def _repeated(x, y, r):
    """The keys or values of a prompt (P, Hk, T, K) and of its completions (P, G, Hk, C, K), each r times
    -> (P, G, H, T + C, K)."""
    G = y.shape[1]
    both = torch.cat([x[:, None].expand(-1, G, -1, -1, -1), y], dim=-2)
    return both.repeat_interleave(r, dim=2)


# ---------------------------------------------------------------- a prompt's completions as more queries on its keys

def _as_prompt_queries(x, Hk):
    """(P, G, H, C, ..) -> (P, Hk, r G C, ..)."""
    x = x.unflatten(2, (Hk, -1))                                                # (P, G, Hk, r, C, ..)
    return x.transpose(1, 2).transpose(2, 3).flatten(2, 4)


def _from_prompt_queries(x, G, C):
    """(P, Hk, r G C, ..) -> (P, G, H, C, ..)."""
    x = x.unflatten(2, (-1, G, C))                                              # (P, Hk, r, G, C, ..)
    return x.transpose(2, 3).transpose(1, 2).flatten(2, 3)


def _merge_(out, lse, out_x, lse_x, out_y, lse_y):
    """Writes the whole of two parts into out (.., C, K) and lse (.., C), in fp32 at least."""
    wide = lse.dtype
    torch.logaddexp(lse_x, lse_y, out=lse)
    share_x = (lse_x - lse).exp_()[..., None]
    share_y = (lse_y - lse).exp_()[..., None]
    if out.dtype == wide:
        torch.mul(out_x, share_x, out=out)
        out.addcmul_(out_y, share_y)
    else:
        out.copy_(torch.addcmul(out_x * share_x, out_y.to(wide), share_y))


# ---------------------------------------------------------------- PyTorch form, CPU: flash attention of all prompts

_forward_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _prompt_mask(q, lengths, T):
    """Additive (P, 1, 1, T), 0 on real tokens; None without padding."""
    if min(lengths) == T:
        return None
    length = torch.tensor(lengths, device=q.device)
    slot = torch.arange(T, device=q.device)
    is_padding = slot >= length[:, None]                                        # (P, T)
    mask = torch.zeros(is_padding.shape, dtype=q.dtype, device=q.device)
    return mask.masked_fill_(is_padding, float("-inf"))[:, None, None]


def _forward_cpu(q, k, v, kx, vx, lengths, out, lse):
    P, G, H, C, K = q.shape
    Hk = k.shape[2]
    mask = _prompt_mask(q, lengths, kx.shape[2])
    out_x, lse_x = _forward_on_cpu(_as_prompt_queries(q, Hk), kx, vx, 0.0, False, attn_mask=mask)
    out_x = _from_prompt_queries(out_x, G, C)
    lse_x = _from_prompt_queries(lse_x, G, C)
    k = k.flatten(0, 1)
    v = v.flatten(0, 1)
    r = H // Hk
    for head in range(r):           # this kernel wants as many key heads as query heads, and is causal for these only
        mine = slice(head, None, r)
        out_y, lse_y = _forward_on_cpu(q[:, :, mine].flatten(0, 1), k, v, 0.0, True)
        out_y = out_y.unflatten(0, (P, G))
        lse_y = lse_y.unflatten(0, (P, G))
        _merge_(out[:, :, mine], lse[:, :, mine], out_x[:, :, mine], lse_x[:, :, mine], out_y, lse_y)


def _backward_cpu(g, q, k, v, kx, vx, lengths, out, lse, dq, dk, dv, dkx, dvx):
    P, G, H, C, K = q.shape
    Hk = k.shape[2]
    mask = _prompt_mask(q, lengths, kx.shape[2])
    gx, qx, out_x, lse_x = (_as_prompt_queries(t, Hk) for t in (g, q, out, lse))
    found = _backward_on_cpu(gx, qx, kx, vx, out_x, lse_x, 0.0, False, attn_mask=mask)
    dq_x = _from_prompt_queries(found[0], G, C)
    dkx.copy_(found[1])
    dvx.copy_(found[2])
    k = k.flatten(0, 1)
    v = v.flatten(0, 1)
    r = H // Hk
    wide = lse.dtype                # in which the gradients of a key head's r query heads are summed
    for head in range(r):
        mine = slice(head, None, r)
        gy, qy, out_y, lse_y = (t[:, :, mine].flatten(0, 1) for t in (g, q, out, lse))
        found = _backward_on_cpu(gy, qy, k, v, out_y, lse_y, 0.0, True)
        dq_y, dk_y, dv_y = (t.unflatten(0, (P, G)) for t in found)
        torch.add(dq_x[:, :, mine], dq_y, out=dq[:, :, mine])
        if head == 0:
            dk_sum = dk_y.to(wide)
            dv_sum = dv_y.to(wide)
        else:
            dk_sum += dk_y
            dv_sum += dv_y
    dk.copy_(dk_sum)
    dv.copy_(dv_sum)


# ---------------------------------------------------------------- PyTorch form, CUDA: flash attention by prompt

_forward_on_cuda = torch.ops.aten._scaled_dot_product_flash_attention
_backward_on_cuda = torch.ops.aten._scaled_dot_product_flash_attention_backward


def _as_one_prompt(x):
    """(G, H, C, ..) of one prompt -> (1, H, G C, ..)."""
    return x.transpose(0, 1).flatten(1, 2)[None]


def _from_one_prompt(x, G):
    """The way back."""
    return x[0].unflatten(1, (G, -1)).transpose(0, 1)


def _forward_cuda(q, k, v, kx, vx, lengths, out, lse):
    P, G = q.shape[:2]
    out_y, lse_y = _forward_on_cuda(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), 0.0, True)[:2]
    out_y = out_y.unflatten(0, (P, G))
    lse_y = lse_y.unflatten(0, (P, G))
    for p, length in enumerate(lengths):            # each in its own length: this kernel takes no mask
        keys = kx[p:p + 1, :, :length]
        values = vx[p:p + 1, :, :length]
        out_x, lse_x = _forward_on_cuda(_as_one_prompt(q[p]), keys, values, 0.0, False)[:2]
        _merge_(out[p], lse[p], _from_one_prompt(out_x, G), _from_one_prompt(lse_x, G), out_y[p], lse_y[p])


def _flash_backward_cuda(g, q, k, v, out, lse, causal):
    """No lengths of a packed batch, no dropout: their arguments are empty."""
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    offset = torch.zeros((), dtype=torch.uint64, device=q.device)
    return _backward_on_cuda(g, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, seed,
                             offset)


def _backward_cuda(g, q, k, v, kx, vx, lengths, out, lse, dq, dk, dv, dkx, dvx):
    P, G = q.shape[:2]
    gy, qy, ky, vy, out_y, lse_y = (t.flatten(0, 1) for t in (g, q, k, v, out, lse))
    found = _flash_backward_cuda(gy, qy, ky, vy, out_y, lse_y, causal=True)
    for d, d_y in zip((dq, dk, dv), found):
        d.copy_(d_y.unflatten(0, (P, G)))
    dkx.zero_()
    dvx.zero_()
    for p, length in enumerate(lengths):
        keys = kx[p:p + 1, :, :length]
        values = vx[p:p + 1, :, :length]
        gx, qx, out_x, lse_x = (_as_one_prompt(t[p]) for t in (g, q, out, lse))
        dq_x, dk_x, dv_x = _flash_backward_cuda(gx, qx, keys, values, out_x, lse_x, causal=False)
        dq[p] += _from_one_prompt(dq_x, G)
        dkx[p, :, :length] = dk_x[0]
        dvx[p, :, :length] = dv_x[0]


# ---------------------------------------------------------------- PyTorch form, elsewhere: one mask, keys repeated

def masked(q, k, v, kx, vx, lengths):
    """As `prefix_attention`, on r G copies of each prompt's keys and values, under one mask (P, G, 1, C, T + C)."""
    P, G, H = q.shape[:3]
    r = H // k.shape[2]
    sees = _sees(q, lengths, kx.shape[2]).expand(-1, G, -1, -1, -1).flatten(0, 1)
    keys = _repeated(kx, k, r).flatten(0, 1)
    values = _repeated(vx, v, r).flatten(0, 1)
    return F.scaled_dot_product_attention(q.flatten(0, 1), keys, values, attn_mask=sees).unflatten(0, (P, G))


# ---------------------------------------------------------------- op

def has_flash(q):
    """Whether torch has a flash attention for q (.., K) that tells its log-sum-exp and takes a global one back."""
    if q.device.type == "cpu":
        return True
    if not q.is_cuda or torch.version.hip:
        return False
    if q.dtype not in (torch.float16, torch.bfloat16) or not torch.backends.cuda.is_flash_attention_available():
        return False
    capability = torch.cuda.get_device_capability(q.device)
    widest = 256 if capability in ((8, 0), (9, 0)) else 192     # of a backward: more takes their shared memory
    return capability >= (8, 0) and q.shape[-1] % 8 == 0 and q.shape[-1] <= widest


def _empty(q):
    """(P, G, H, C, K) as the projection after it reads it, the heads of a token side by side; and its log-sum-exp."""
    P, G, H, C, K = q.shape
    out = q.new_empty(P, G, C, H, K).transpose(2, 3)
    return out, q.new_empty(P, G, H, C, dtype=accumulator(q.dtype))


@torch.library.custom_op("seethink::prefix_attention", mutates_args=())
def _op(q: Tensor, k: Tensor, v: Tensor, kx: Tensor, vx: Tensor, lengths: List[int]) -> Tuple[Tensor, Tensor]:
    out, lse = _empty(q)
    if q.numel():
        run = _forward_cuda if q.is_cuda else _forward_cpu
        run(q, k, v, kx, vx, lengths, out, lse)
    return out, lse


@_op.register_fake
def _(q, k, v, kx, vx, lengths):
    return _empty(q)


@torch.library.custom_op("seethink::prefix_attention_backward", mutates_args=())
def _op_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, kx: Tensor, vx: Tensor, lengths: List[int], out: Tensor,
                 lse: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = [torch.empty_like(x) for x in (q, k, v, kx, vx)]
    if q.numel():
        run = _backward_cuda if q.is_cuda else _backward_cpu
        run(g, q, k, v, kx, vx, lengths, out, lse, *gradients)
    else:
        for x in gradients:
            x.zero_()
    return tuple(gradients)


@_op_backward.register_fake
def _(g, q, k, v, kx, vx, lengths, out, lse):
    return tuple(torch.empty_like(x) for x in (q, k, v, kx, vx))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.lengths = inputs[5]
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, g, _):
    *inputs, out, lse = ctx.saved_tensors
    return *_op_backward(g, *inputs, ctx.lengths, out, lse), None


_op.register_autograd(_gradient, setup_context=_setup)


def _pairs(q, kx):
    """Products of a query and a key, the full square as for torch's own attention."""
    P, G, H, C, K = q
    return P * G * H * C * (kx[2] + C) * K


@register_flop_formula(torch.ops.seethink.prefix_attention)
def _flops(q, k, v, kx, *args, out_shape=None, **kwargs):
    """Two matmuls."""
    return 2 * 2 * _pairs(q, kx)


@register_flop_formula(torch.ops.seethink.prefix_attention_backward)
def _flops_backward(g, q, k, v, kx, *args, out_shape=None, **kwargs):
    """Five matmuls: the scores again, and four gradients."""
    return 5 * 2 * _pairs(q, kx)


def prefix_attention(q, k, v, kx, vx, lengths):
    """G completions of each of P prompts attend to their prompt and, causally, to themselves.

    q (P, G, H, C, K); k, v (P, G, Hk, C, K) of the completions, kx, vx (P, Hk, T, K) of the prompts; lengths: the real
    tokens of each prompt, P ints in [1, T]. Returns (P, G, H, C, K), differentiable once in all five tensors. In half
    precision the gradients of keys that many queries share are a bit or two less exact than `masked`'s on a CPU, whose
    kernel sums them unwidened. Raises ValueError on what does not fit.
    """
    check_floating("q", q, ndim=5)
    P, G, H, C, K = q.shape
    T = kx.shape[-2]
    Hk = kx.shape[1]
    for name, x, shape in (("k", k, (P, G, Hk, C, K)), ("v", v, (P, G, Hk, C, K)), ("kx", kx, (P, Hk, T, K)),
                           ("vx", vx, (P, Hk, T, K))):
        check_device(name, x, "q", q)
        require(x.shape == shape and x.dtype == q.dtype,
                lambda: f"{name} {tuple(x.shape)} {x.dtype} must be {shape} {q.dtype}, as q {tuple(q.shape)} and kx "
                        f"{tuple(kx.shape)} ask")
    require(H % Hk == 0, lambda: f"q's {H} heads must be a multiple of kx's {Hk}")
    require(len(lengths) == P and all(1 <= length <= T for length in lengths),
            lambda: f"lengths {lengths} must be {P} numbers in [1, {T}], one a prompt")
    if not has_flash(q):
        return masked(q, k, v, kx, vx, lengths)
    # torch's kernels read rows of K numbers, whatever the strides say.
    inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, kx, vx)]
    return _op(*inputs, lengths)[0]
