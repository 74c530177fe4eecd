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
"""
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from kernels.backend import check_floating, jit, require, tl, use_triton

BLOCK = 4096                    # columns that a program holds at a time


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


# ---------------------------------------------------------------- Triton kernel

@jit
def _kernel(logits, stride, u, floor, banned, token, logp, truncated, temperature, V: tl.constexpr,
            BLOCK: tl.constexpr, FLOOR: tl.constexpr, GREEDY: tl.constexpr):
    """One program a row: once over it for both sums, once more until the cumulated sum passes u."""
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * stride           # rows * V passes 2^31
    least = tl.load(floor + row) if FLOOR else float("-inf")
    # 1. Sums of e^z over all tokens and over the allowed, rescaled whenever their maximum grows.
    m = float("-inf")
    s = 0.0
    m_allowed = float("-inf")
    s_allowed = 0.0
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        raw = tl.load(base + column, mask=column < V, other=float("-inf")).to(tl.float32)
        z = raw / temperature
        allowed = (tl.load(banned + column, mask=column < V, other=1) == 0) & (raw >= least)
        new = tl.maximum(m, tl.max(z, 0))
        finite = tl.where(new > float("-inf"), new, 0.0)        # while all are -inf, -inf minus -inf would be NaN
        s = s * tl.exp(m - finite) + tl.sum(tl.exp(z - finite), 0)
        m = new
        z_allowed = tl.where(allowed, z, float("-inf"))
        new = tl.maximum(m_allowed, tl.max(z_allowed, 0))
        finite = tl.where(new > float("-inf"), new, 0.0)
        s_allowed = s_allowed * tl.exp(m_allowed - finite) + tl.sum(tl.exp(z_allowed - finite), 0)
        m_allowed = new
    # 2. The first allowed token at which the cumulated sum passes u times the whole.
    wanted = tl.load(u + row).to(tl.float32) * s_allowed
    before = 0.0
    found = V
    last = 0
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        raw = tl.load(base + column, mask=column < V, other=float("-inf")).to(tl.float32)
        z = raw / temperature
        allowed = (tl.load(banned + column, mask=column < V, other=1) == 0) & (raw >= least)
        e = tl.where(allowed, tl.exp(z - m_allowed), 0.0)
        # e > 0, too: rounding in a tree scan may make the sum grow at a token that is not allowed.
        if GREEDY:
            passes = (e > 0) & (z == m_allowed)
        else:
            passes = (e > 0) & (before + tl.cumsum(e, 0) > wanted)
        found = tl.minimum(found, tl.min(tl.where(passes, column, V), 0))
        last = tl.maximum(last, tl.max(tl.where(e > 0, column, 0), 0))
        before += tl.sum(e, 0)
    # 3. Rounding may leave the whole sum below u times itself: then the last allowed token is
    # meant.
    chosen = tl.where(found < V, found, last)
    z = tl.load(base + chosen).to(tl.float32) / temperature
    tl.store(token + row, chosen.to(tl.int64))
    tl.store(logp + row, z - m - tl.log(s))
    tl.store(truncated + row, z - m_allowed - tl.log(s_allowed))


def _draw_triton(logits, u, floor, banned, temperature):
    N, V = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    token = torch.empty(N, dtype=torch.long, device=logits.device)
    logp = torch.empty(N, device=logits.device)
    truncated = torch.empty(N, device=logits.device)
    unread = logp                               # stands for the pointer of what is absent
    greedy = u is None
    truncates = floor is not None
    _kernel[(N,)](logits, logits.stride(0), unread if greedy else u,
                  floor.float().contiguous() if truncates else unread, banned.to(torch.uint8),
                  token, logp, truncated, temperature, V=V, BLOCK=BLOCK, FLOOR=truncates,
                  GREEDY=greedy, num_warps=8)
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
