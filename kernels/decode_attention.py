"""Attention of one new token a row, G rows a prompt, to the cache of keys and values that they share.

The cache of a prompt is one sequence of S = T + G used slots: the prompt's T, then for every step G, one a row.

    row g sees   slots 0 .. T - 1 of the prompt and its own slots T + d G + g, d < used; of both, those that are taken
    out_g = softmax over the keys k that row g sees of (q_g k / sqrt K), times v

A slot that is not taken is padding of the prompt, or a step that a row sat out. The softmax is split over the keys: a
part i, a chunk of the prompt's slots or of a row's own, gives its own out_i and log-sum-exp l_i, and the parts are
merged by those (FlashDecoding; FlashAttention-2 2307.08691, section 3.1):

    l = log sum_i e^l_i,      out = sum_i e^(l_i - l) out_i

So many programs share the keys of few rows, each key is read once, the prompt's for all of its rows together, and no
mask (G, S) is made. Query heads that share a key head are more queries on it (arXiv 2305.13245).

Forward only: sampling needs no gradient. Exponentials are to the base 2, which is what a GPU computes: log2(e) is part
of the scale, and the log-sum-exps are to the base 2, too.

Shapes: P prompts of T slots, G rows, H query heads, Hk key heads, r = H / Hk, K width of a head.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import (INTERPRET, accumulator, check_device, check_floating, jit, require, tl, triton,
                             use_triton)

CHUNK = 256                     # keys of a part
BLOCK = 64                      # queries, and keys, that a program holds at a time, at most
BLOCK_BYTES = 2**14             # of those keys, at most; as many of values


# ---------------------------------------------------------------- reference

def decode_attention_reference(q, keys, values, taken, prompt_slots):
    """A row at a time, on copies of what it may see."""
    P, H, G, K = q.shape
    S = keys.shape[2]
    r = H // keys.shape[1]
    slot = torch.arange(S, device=q.device)
    rows = []
    for g in range(G):
        mine = torch.cat([slot[:prompt_slots], slot[prompt_slots + g::G]])
        k = keys[:, :, mine].repeat_interleave(r, dim=1)                        # (P, H, n, K)
        v = values[:, :, mine].repeat_interleave(r, dim=1)
        scores = (q[:, :, g, None] @ k.transpose(-1, -2)).to(accumulator(q.dtype)) * K ** -0.5
        scores = scores.masked_fill(~taken[:, None, None, mine], float("-inf"))     # (P, H, 1, n)
        rows.append(scores.softmax(-1).to(q.dtype) @ v)
    return torch.cat(rows, dim=2)


# ---------------------------------------------------------------- Triton kernels

@jit
def _attend(q, q_head, q_row, keys, key_slot, values, value_slot, taken, out, lse, scale, G, row, first, step, begin,
            count, r: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr,
            CHUNK: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    """The queries of ROWS rows from `row` on look at a part: keys begin .. begin + CHUNK of `count`, where key n is in
    slot first + step n. All pointers are at the prompt and the key head; out and lse at the part, too."""
    i = tl.arange(0, M)                                     # queries: the r heads of a row side by side
    g = row + i // r
    is_query = (i < ROWS * r) & (g < G)
    column = tl.arange(0, WIDTH)
    is_column = column < K
    x = tl.load(q + (i % r)[:, None] * q_head + g[:, None] * q_row + column[None, :],
                mask=is_query[:, None] & is_column[None, :], other=0.0)
    if WIDEN:
        x = x.to(tl.float32)
    # Online softmax: s = sum e^(z-m), a = sum e^(z-m) v, rescaled when the maximum m grows.
    m = tl.full((M,), float("-inf"), tl.float32)
    s = tl.zeros((M,), tl.float32)
    a = tl.zeros((M, WIDTH), tl.float32)
    for start in range(0, CHUNK, BLOCK):
        n = begin + start + tl.arange(0, BLOCK)
        slot = first + step * n
        sees = tl.load(taken + slot, mask=n < count, other=0) != 0
        # Not only what is taken is read: a load that waits for another one is slower than some keys too many.
        is_key = (n < count)[:, None] & is_column[None, :]
        place = slot.to(tl.int64)[:, None]                  # slots times their width pass 2^31
        k = tl.load(keys + place * key_slot + column[None, :], mask=is_key, other=0.0)
        v = tl.load(values + place * value_slot + column[None, :], mask=is_key, other=0.0)
        if WIDEN:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        z = tl.dot(x, tl.trans(k), input_precision=PRECISION) * scale
        z = tl.where(sees[None, :], z, float("-inf"))
        new = tl.maximum(m, tl.max(z, 1))
        finite = tl.where(new > float("-inf"), new, 0.0)    # while all are -inf, -inf minus -inf would be NaN
        e = tl.exp2(z - finite[:, None])
        shrink = tl.exp2(m - finite)
        s = s * shrink + tl.sum(e, 1)
        a = a * shrink[:, None] + tl.dot(e.to(v.dtype), v, input_precision=PRECISION)
        m = new
    # A part of which nothing is seen: log-sum-exp -inf, and 0 for the merge to multiply with 0.
    sum_or_1 = tl.where(s > 0, s, 1.0)
    place = (row * r + i).to(tl.int64)
    tl.store(lse + place, m + tl.log2(sum_or_1), mask=is_query)
    tl.store(out + place[:, None] * K + column[None, :], a / sum_or_1[:, None],
             mask=is_query[:, None] & is_column[None, :])


@jit(do_not_specialize=["G", "T", "used", "prompt_chunks", "parts"])        # or each new value is compiled anew
def _parts_kernel(q, q_prompt, q_head, q_row, keys, key_prompt, key_head, key_slot, values, value_prompt, value_head,
                  value_slot, taken, taken_prompt, out, lse, scale, G, T, used, prompt_chunks, parts,
                  Hk: tl.constexpr, r: tl.constexpr, K: tl.constexpr, M: tl.constexpr, M_OWN: tl.constexpr,
                  WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr,
                  PRECISION: tl.constexpr):
    """Programs (P Hk, tasks). A task is a chunk of the prompt and as many rows as M queries take, or a chunk of one
    row's own keys. A part, of out (P Hk, parts, G r, K) and lse, is a chunk and all of the rows."""
    pair = tl.program_id(0).to(tl.int64)                    # with the strides of a cache it passes 2^31
    task = tl.program_id(1)
    p = pair // Hk
    head = pair % Hk
    q += p * q_prompt + head * r * q_head
    keys += p * key_prompt + head * key_head
    values += p * value_prompt + head * value_head
    taken += p * taken_prompt
    ROWS: tl.constexpr = M // r
    row_blocks = tl.cdiv(G, ROWS)
    if task < prompt_chunks * row_blocks:
        chunk = task // row_blocks
        part = pair * parts + chunk
        _attend(q, q_head, q_row, keys, key_slot, values, value_slot, taken, out + part * G * r * K,
                lse + part * G * r, scale, G, (task % row_blocks) * ROWS, 0, 1, chunk * CHUNK, T,
                r, K, ROWS, M, WIDTH, CHUNK, BLOCK, WIDEN, PRECISION)
    else:
        own = task - prompt_chunks * row_blocks
        row = own % G
        chunk = own // G
        part = pair * parts + prompt_chunks + chunk
        _attend(q, q_head, q_row, keys, key_slot, values, value_slot, taken, out + part * G * r * K,
                lse + part * G * r, scale, G, row, T + row, G, chunk * CHUNK, used,
                r, K, 1, M_OWN, WIDTH, CHUNK, BLOCK, WIDEN, PRECISION)


@jit(do_not_specialize=["G", "parts"])
def _merge_kernel(found, lse, out, G, parts, Hk: tl.constexpr, r: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
                  MOST: tl.constexpr, BLOCK: tl.constexpr):
    """One program a query: its parts, of found (P Hk, parts, G r, K), into out (P, G, H, K). MOST >= parts."""
    query = tl.program_id(0).to(tl.int64)
    pair = query // (G * r)
    i = query % (G * r)
    column = tl.arange(0, WIDTH)
    part = tl.arange(0, MOST)
    l = tl.load(lse + (pair * parts + part) * G * r + i, mask=part < parts, other=float("-inf"))
    top = tl.max(l, 0)
    total = 0.0
    whole = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, MOST, BLOCK):
        part = start + tl.arange(0, BLOCK)
        place = (pair * parts + part) * G * r + i
        l = tl.load(lse + place, mask=part < parts, other=float("-inf"))
        share = tl.exp2(l - top)
        x = tl.load(found + place[:, None] * K + column[None, :], mask=(part < parts)[:, None] & (column < K)[None, :],
                    other=0.0)
        total += tl.sum(share, 0)
        whole += tl.sum(share[:, None] * x, 0)
    head = pair % Hk * r + i % r
    place = (pair // Hk * G + i // r) * Hk * r + head
    tl.store(out + place * K + column, (whole / total).to(out.dtype.element_ty), mask=column < K)


def _power_of_two(n):
    """The next one, as Triton wants its shapes, at least 16, as it wants those of its products."""
    return max(16, 1 << (n - 1).bit_length())


def _constants(G, r, K, dtype):
    """Those of _parts_kernel that shapes and dtype decide, and its warps."""
    width = _power_of_two(K)
    wide = dtype == torch.float32
    # What a program's registers have room for: fp32 takes three products for one.
    queries = min(BLOCK, (2**12 if wide else 2**14) // width)
    keys = min(BLOCK, BLOCK_BYTES // (width * dtype.itemsize))
    return dict(M=max(min(queries, _power_of_two(G * r)), _power_of_two(r)), M_OWN=_power_of_two(r),
                WIDTH=width, CHUNK=CHUNK, BLOCK=min(CHUNK, max(16, keys)),
                WIDEN=INTERPRET and not wide,               # the interpreter multiplies no bf16
                # Three products of tf32 are as exact as fp32; with "ieee" every product would be spilled to memory.
                PRECISION="tf32x3" if wide and not torch.version.hip else "ieee",
                num_warps=8 if wide else 4, num_stages=2)


def _run_triton(q, keys, values, taken, prompt_slots, out):
    P, H, G, K = q.shape
    Hk, S = keys.shape[1:3]
    r = H // Hk
    used = (S - prompt_slots) // G
    prompt_chunks = triton.cdiv(prompt_slots, CHUNK)
    own_chunks = triton.cdiv(used, CHUNK)
    parts = prompt_chunks + own_chunks
    # Rows of K numbers, and of slots, are read as such, whatever the strides say.
    q, keys, values, taken = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, keys, values, taken))
    taken = taken.view(torch.uint8)
    found = torch.empty(P * Hk, parts, G * r, K, dtype=torch.float32, device=q.device)
    lse = torch.empty(P * Hk, parts, G * r, dtype=torch.float32, device=q.device)
    constants = _constants(G, r, K, q.dtype)
    row_blocks = triton.cdiv(G, constants["M"] // r)
    scale = K ** -0.5 * math.log2(math.e)
    _parts_kernel[P * Hk, prompt_chunks * row_blocks + own_chunks * G](
        q, *q.stride()[:3], keys, *keys.stride()[:3], values, *values.stride()[:3], taken, taken.stride(0), found, lse,
        scale, G, prompt_slots, used, prompt_chunks, parts, Hk=Hk, r=r, K=K, **constants)
    _merge_kernel[(P * H * G,)](found, lse, out, G, parts, Hk=Hk, r=r, K=K, WIDTH=constants["WIDTH"],
                                MOST=_power_of_two(parts), BLOCK=16, num_warps=1)


# ---------------------------------------------------------------- PyTorch form: one mask

def visible(taken, prompt_slots, G):
    """(P, G, S), True where a row may look."""
    slot = torch.arange(taken.shape[1], device=taken.device) - prompt_slots
    row = torch.arange(G, device=taken.device)[:, None]
    return taken[:, None] & ((slot < 0) | (slot % G == row))


def masked(q, keys, values, sees):
    """As `decode_attention`, in one call of torch's attention: r G queries of a key head, each under its row of sees
    (P, G, S)."""
    Hk = keys.shape[1]
    r = q.shape[1] // Hk
    queries = q.unflatten(1, (Hk, r)).flatten(2, 3)                             # (P, Hk, r G, K)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=sees.repeat(1, r, 1)[:, None])
    return out.unflatten(2, (r, -1)).flatten(1, 2)


# ---------------------------------------------------------------- op

def _empty(q):
    """(P, H, G, K) as the projection after it reads it, the heads of a token side by side."""
    P, H, G, K = q.shape
    return q.new_empty(P, G, H, K).transpose(1, 2)


def _attention(q: Tensor, keys: Tensor, values: Tensor, taken: Tensor, prompt_slots: int) -> Tensor:
    out = _empty(q)
    if use_triton(q) and q.numel():
        _run_triton(q, keys, values, taken, prompt_slots, out)
    else:
        out.copy_(masked(q, keys, values, visible(taken, prompt_slots, q.shape[2])))
    return out


_op = torch.library.custom_op("seethink::decode_attention", _attention, mutates_args=())


@_op.register_fake
def _(q, keys, values, taken, prompt_slots):
    return _empty(q)


@register_flop_formula(torch.ops.seethink.decode_attention)
def _flops(q, keys, values, taken, prompt_slots, *args, out_shape=None, **kwargs):
    """Two matmuls of each query with its prompt's keys and its row's own, taken or not."""
    P, H, G, K = q
    seen = prompt_slots + (keys[2] - prompt_slots) // G
    return 2 * 2 * P * H * G * seen * K


def decode_attention(q, keys, values, taken, prompt_slots):
    """The new token of each of G rows attends to its prompt and to what its row has written, this token included.

    q (P, H, G, K); keys, values (P, Hk, S, K), the slots in use of a cache: `prompt_slots` of the prompt, then G a
    step, one a row; taken (P, S) bool, the slots that hold a token. What lies in the others must be finite. Returns
    (P, H, G, K), without a gradient; a row that sees no slot at all gives NaN. Raises ValueError on what does not fit.
    """
    check_floating("q", q, ndim=4)
    check_floating("keys", keys, ndim=4)
    P, H, G, K = q.shape
    Hk, S = keys.shape[1:3]
    for name, x in (("keys", keys), ("values", values)):
        check_device(name, x, "q", q)
        require(x.shape == (P, Hk, S, K) and x.dtype == q.dtype,
                lambda: f"{name} {tuple(x.shape)} {x.dtype} must be {(P, Hk, S, K)} {q.dtype}, as q {tuple(q.shape)} "
                        f"and keys {tuple(keys.shape)} ask")
    require(Hk > 0 and H % Hk == 0, lambda: f"q's {H} heads must be a multiple of keys' {Hk}")
    check_device("taken", taken, "q", q)
    require(taken.shape == (P, S) and taken.dtype == torch.bool,
            lambda: f"taken {tuple(taken.shape)} {taken.dtype} must be {(P, S)} torch.bool, one entry a slot")
    require(0 < prompt_slots <= S, lambda: f"prompt_slots {prompt_slots} must lie in [1, {S}], keys' slots")
    require(G > 0 and (S - prompt_slots) % G == 0,
            lambda: f"keys' {S - prompt_slots} slots after the prompt must be a multiple of q's {G} rows")
    # Eagerly the op's own dispatch would cost as much as a small model's attention does.
    attend = _op if torch.compiler.is_compiling() else _attention
    return attend(q.detach(), keys.detach(), values.detach(), taken, prompt_slots)
