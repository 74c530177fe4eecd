"""Sampling of next tokens by inverse transform, without a host sync.

    z = logits / temperature
    token = the first allowed v with   sum_{w <= v, allowed} e^{z_w}  >  u sum_{allowed} e^{z_w},      u ~ U[0, 1)
    logp = z_token - log sum_v e^{z_v}                          under the full softmax
    truncated_logp = z_token - log sum_{allowed} e^{z_v}        under the distribution sampled from

Which tokens are allowed is decided in this order:

    1. banned   tokens are removed.
    2. top_k    keeps the k largest logits of the rest; 0 keeps all.
    3. top_p    keeps the nucleus (arXiv 1904.09751, section 3.1): of softmax(z) over what is left
                by now, the smallest set of most probable tokens whose probabilities add up to at
                least p. The token that crosses p is kept, so at least one token stays.

Tokens that tie with the least probable token kept by 2 or 3 are kept as well; nothing else makes
the set larger. So both steps are one number a row, the floor: the smallest logit that may be
sampled. Logits are compared with it as they came, before the division by the temperature, which
Triton and PyTorch round differently on a GPU: a floor off by that rounding could forbid the token
that it was taken from.

One uniform number a row decides; given the same numbers, every version draws the same tokens,
except where u falls within rounding of a boundary.

The kernels split a row over the vocabulary, because a few rows alone would leave most of a GPU idle:
each part gives its largest logit and its sum of exponentials, of all tokens and of the allowed. From
those follow both totals and the part in which the cumulated sum passes u, and only that part is read
again. Exponentials are to the base 2, as in kernels/row_logp.py.
"""
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from kernels.backend import LOG2_E, check_floating, jit, require, tl, triton, use_triton

BLOCK = 2048                    # columns of a part


class Sampled(NamedTuple):
    """token (..) int64; logp (..) under the full softmax; truncated_logp (..) as sampled."""
    token: Tensor
    logp: Tensor
    truncated_logp: Tensor


# ---------------------------------------------------------------- reference

def allowed_reference(logits, temperature, top_k, top_p, banned):
    """One row's logits (V,) -> the tokens that may be sampled, in ascending order."""
    kept = [v for v in range(len(logits)) if not banned[v]]
    kept.sort(key=lambda v: logits[v].item(), reverse=True)
    if top_k:
        smallest = logits[kept[:top_k][-1]]
        kept = [v for v in kept if logits[v] >= smallest]
    if top_p < 1:
        p = (logits[kept].double() / temperature).softmax(-1)
        count = 0
        mass = 0.0
        while mass < top_p and count < len(kept):
            mass += p[count].item()
            count += 1
        smallest = logits[kept[count - 1]]
        kept = [v for v in kept if logits[v] >= smallest]
    return sorted(kept)


def sample_reference(logits, u, temperature=1.0, top_k=0, top_p=1.0, banned=None):
    """The definition, a row at a time: logits (N, V), uniform numbers u (N,) -> Sampled of (N,)."""
    if banned is None:
        banned = torch.zeros(logits.shape[1], dtype=torch.bool)
    tokens = []
    logps = []
    truncated_logps = []
    for row in range(len(logits)):
        allowed = allowed_reference(logits[row], temperature, top_k, top_p, banned)
        z = logits[row] / temperature
        p = z[allowed].softmax(-1)
        chosen = 0
        mass = p[0]
        while mass <= u[row] and chosen < len(allowed) - 1:
            chosen += 1
            mass = mass + p[chosen]
        tokens.append(allowed[chosen])
        logps.append(z.log_softmax(-1)[allowed[chosen]])
        truncated_logps.append(p[chosen].log())
    return Sampled(torch.tensor(tokens), torch.stack(logps), torch.stack(truncated_logps))


# ---------------------------------------------------------------- the floor, in PyTorch on every device

def sampling_floor(logits, banned, temperature, top_k, top_p):
    """The smallest logit (N, 1) of each row that top_k and top_p allow; None if they allow all."""
    V = logits.shape[1]
    k = min(top_k, V) if top_k else V
    if k == V and top_p == 1:
        return None
    candidates = logits.masked_fill(banned, float("-inf"))
    if top_p == 1:
        return candidates.topk(k, dim=-1).values[:, -1:]        # cheaper than a sort of all
    ordered = candidates.sort(dim=-1, descending=True).values
    floor = ordered[:, k - 1:k]
    # In fp64: an fp32 sum over a vocabulary is off by more than most tokens' probability.
    z = (ordered.double() / temperature).masked_fill_(ordered < floor, float("-inf"))
    cumulated = z.softmax(-1).cumsum_(-1)
    # All tokens whose sums stay below p, and the next one, which crosses it.
    count = (cumulated < top_p).sum(-1, keepdim=True) + 1
    return torch.maximum(floor, ordered.gather(-1, count.clamp_(max=V) - 1))


# ---------------------------------------------------------------- Triton kernels

@jit
def block_of(logits, banned, least, start, V: tl.constexpr, BLOCK: tl.constexpr):
    """A row's logits from column `start` on, in fp32, and which of them are allowed; beyond V: -inf, not allowed."""
    column = start + tl.arange(0, BLOCK)
    x = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
    allowed = (tl.load(banned + column, mask=column < V, other=1) == 0) & (x >= least)
    return x, allowed


@jit
def peak_and_sum(x, scale):
    """The largest of x, and the sum of 2^((x - largest) scale); of all -inf: -inf and 0."""
    m = tl.max(x, 0)
    finite = tl.where(m > float("-inf"), m, 0.0)            # -inf minus -inf would be NaN
    return m, tl.sum(tl.exp2((x - finite) * scale), 0)


@jit
def _parts_kernel(logits, stride, floor, banned, peaks, sums, temperature, V: tl.constexpr, BLOCK: tl.constexpr,
                  FLOOR: tl.constexpr):
    """Programs (N, parts): the peak and the sum of a part, of all tokens and of the allowed, into peaks and sums
    (2, N, parts)."""
    row = tl.program_id(0).to(tl.int64)                     # rows * V passes 2^31
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    least = tl.load(floor + row) if FLOOR else float("-inf")
    scale = LOG2_E / temperature
    x, allowed = block_of(logits + row * stride, banned, least, part * BLOCK, V, BLOCK)
    m, s = peak_and_sum(x, scale)
    m_allowed, s_allowed = peak_and_sum(tl.where(allowed, x, float("-inf")), scale)
    place = row * parts + part
    allowed_place = (tl.num_programs(0) + row) * parts + part
    tl.store(peaks + place, m)
    tl.store(sums + place, s)
    tl.store(peaks + allowed_place, m_allowed)
    tl.store(sums + allowed_place, s_allowed)


@jit
def merged(peaks, sums, inside, scale):
    """Peaks and sums of parts -> the largest peak, and the parts' sums as exponentials under that one."""
    m = tl.load(peaks, mask=inside, other=float("-inf"))
    top = tl.max(m, 0)
    finite = tl.where(top > float("-inf"), top, 0.0)
    return top, tl.exp2((m - finite) * scale) * tl.load(sums, mask=inside, other=0.0)


@jit
def first_or_last(passes, counts, index, END: tl.constexpr):
    """The first index that passes; where rounding lets none, the last one that counts."""
    first = tl.min(tl.where(passes, index, END), 0)
    last = tl.max(tl.where(counts, index, 0), 0)
    return tl.where(first < END, first, last)


@jit
def _draw_kernel(logits, stride, u, floor, banned, peaks, sums, token, logp, truncated, temperature, parts,
                 V: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, FLOOR: tl.constexpr, GREEDY: tl.constexpr):
    """One program a row. MOST >= parts."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    least = tl.load(floor + row) if FLOOR else float("-inf")
    scale = LOG2_E / temperature
    # 1. The parts' sums, of all tokens and of the allowed.
    part = tl.arange(0, MOST)
    inside = part < parts
    place = row * parts + part
    m, s = merged(peaks + place, sums + place, inside, scale)
    place += tl.num_programs(0).to(tl.int64) * parts
    m_allowed, s_allowed = merged(peaks + place, sums + place, inside, scale)
    total = tl.sum(s_allowed, 0)
    # 2. The part in which the cumulated sum passes u times the whole. s > 0, too: rounding in a tree
    # scan may make the sum grow where nothing is added.
    if GREEDY:
        wanted = 0.0
        passes = tl.load(peaks + place, mask=inside, other=float("-inf")) == m_allowed
    else:
        wanted = tl.load(u + row).to(tl.float32) * total
        passes = tl.cumsum(s_allowed, 0) > wanted
    chosen = first_or_last((s_allowed > 0) & passes, s_allowed > 0, part, MOST)
    before = tl.sum(tl.where(part < chosen, s_allowed, 0.0), 0)
    # 3. The token in it.
    x, allowed = block_of(base, banned, least, chosen * BLOCK, V, BLOCK)
    e = tl.where(allowed, tl.exp2((x - m_allowed) * scale), 0.0)
    if GREEDY:
        passes = x == m_allowed
    else:
        passes = before + tl.cumsum(e, 0) > wanted
    found = chosen * BLOCK + first_or_last((e > 0) & passes, e > 0, tl.arange(0, BLOCK), BLOCK)
    x = tl.load(base + found).to(tl.float32)
    tl.store(token + row, found.to(tl.int64))
    tl.store(logp + row, (x - m) / temperature - tl.log(tl.sum(s, 0)))
    tl.store(truncated + row, (x - m_allowed) / temperature - tl.log(total))


def _draw_triton(logits, u, floor, banned, temperature):
    N, V = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    parts = triton.cdiv(V, BLOCK)
    peaks = torch.empty(2, N, parts, device=logits.device)
    sums = torch.empty_like(peaks)
    token = torch.empty(N, dtype=torch.long, device=logits.device)
    logp = torch.empty(N, device=logits.device)
    truncated = torch.empty(N, device=logits.device)
    unread = logp                               # stands for the pointer of what is absent
    greedy = u is None
    truncates = floor is not None
    floor = floor.float().contiguous() if truncates else unread
    banned = banned.to(torch.uint8)
    _parts_kernel[(N, parts)](logits, logits.stride(0), floor, banned, peaks, sums, temperature, V=V, BLOCK=BLOCK,
                              FLOOR=truncates, num_warps=4)
    _draw_kernel[(N,)](logits, logits.stride(0), unread if greedy else u, floor, banned, peaks, sums, token, logp,
                       truncated, temperature, parts, V=V, BLOCK=BLOCK, MOST=triton.next_power_of_2(parts),
                       FLOOR=truncates, GREEDY=greedy, num_warps=4)
    return token, logp, truncated


# ---------------------------------------------------------------- PyTorch form

def _draw_torch(logits, u, floor, banned, temperature):
    z = logits / temperature
    forbidden = banned if floor is None else banned | (logits < floor)
    allowed = z.masked_fill(forbidden, float("-inf"))
    p = allowed.softmax(-1)
    if u is None:
        token = allowed.argmax(-1, keepdim=True)
    else:
        # Cumulated in fp64, so that u cannot round up to the total nor a rare token be lost. A
        # token that is not allowed has width 0 and is never the first to pass.
        cumulated = p.cumsum(-1, dtype=torch.float64)
        token = torch.searchsorted(cumulated, u[:, None] * cumulated[:, -1:], right=True)
    logp = z.log_softmax(-1).gather(-1, token)
    truncated = p.gather(-1, token).log_()
    return token[:, 0], logp[:, 0], truncated[:, 0]


# ---------------------------------------------------------------- op

def _draw(logits: Tensor, u: Optional[Tensor], banned: Tensor, temperature: float, top_k: int,
          top_p: float) -> Tuple[Tensor, Tensor, Tensor]:
    """u (N,) fp64 uniform numbers, or None for the largest allowed logit."""
    floor = sampling_floor(logits, banned, temperature, top_k, top_p)
    if use_triton(logits) and logits.numel():
        return _draw_triton(logits, u, floor, banned, temperature)
    return _draw_torch(logits, u, floor, banned, temperature)


_op = torch.library.custom_op("seethink::sample", _draw, mutates_args=())


@_op.register_fake
def _(logits, u, banned, temperature, top_k, top_p):
    N = len(logits)
    return logits.new_empty(N, dtype=torch.long), logits.new_empty(N), logits.new_empty(N)


def sample(logits, generator=None, temperature=1.0, top_k=0, top_p=1.0, banned=None, u=None):
    """logits (.., V) -> Sampled(token, logp, truncated_logp), each (..).

    generator: a torch.Generator of the logits' device (None: the default one). One number is drawn
    a row, whatever top_k and top_p are.
    u: (..) fp64, numbers in [0, 1) that were drawn before, in place of the generator.
    temperature: 0 takes the largest allowed logit and reports log-probs at temperature 1. top_k,
    top_p: 0 and 1.0 keep all tokens and cost nothing; the head of this file defines the rest. top_k
    alone costs
        a partial sort of each row, top_p a full one, in PyTorch on a GPU, too.
    banned: (V,) bool, True is never sampled.

    logp is under the full softmax(logits / temperature), banned and cut-off tokens included,
    because that is how the update scores the same token: its ratio of new to old policy starts at
    1. It is not the log-prob of the distribution that was sampled from, which is truncated_logp.

    Raises ValueError on what does not fit; a row without a finite allowed logit gives an arbitrary
    token and NaN.
    """
    check_floating("logits", logits)
    V = logits.shape[-1]
    require(0 <= temperature < float("inf"),
            lambda: f"temperature {temperature} must be finite and not negative")
    require(top_k >= 0, lambda: f"top_k {top_k} must not be negative; 0 is no limit")
    require(0 < top_p <= 1, lambda: f"top_p {top_p} must lie in (0, 1]")
    if banned is None:
        banned = torch.zeros(V, dtype=torch.bool, device=logits.device)
    require(banned.shape == (V,) and banned.dtype == torch.bool,
            lambda: f"banned {tuple(banned.shape)} {banned.dtype} must be ({V},) bool, "
                    "one entry a token")
    shape = logits.shape[:-1]
    require(u is None or (u.shape == shape and u.dtype == torch.float64),
            lambda: f"u {tuple(u.shape)} {u.dtype} must be {tuple(shape)} torch.float64, one number a row")
    if not temperature:
        u = None
    elif u is None:
        u = torch.rand(*shape, 1, dtype=torch.float64, device=logits.device, generator=generator)
    if u is not None:
        u = u.flatten()
    # Eagerly the op's own dispatch would cost as much as drawing from a small vocabulary does.
    draw = _op if torch.compiler.is_compiling() else _draw
    token, logp, truncated = draw(logits.detach().flatten(0, -2), u, banned,
                                  float(temperature or 1), top_k, float(top_p))
    return Sampled(token.view(shape), logp.view(shape), truncated.view(shape))
