"""Sampling of next tokens by inverse transform, without a host sync.

    z = logits / temperature,      allowed: not banned, and z at or above the row's floor (top-k, top-p)
    token = the first allowed v with   sum_{w <= v, allowed} e^{z_w}  >  u sum_{allowed} e^{z_w},      u ~ U[0, 1)
    truncated_logp = log of the allowed softmax at the token,      logp = z_token - logsumexp_v z_v, of the full one

One uniform number a row decides; given the same ones, every version draws the same tokens, but where u falls within
rounding of a boundary.
top-k and top-p (nucleus, arXiv 1904.09751, section 3.1) are both a floor on z: the k-th largest, and the smallest of
the fewest tokens whose probabilities reach p. Tokens that tie with the floor stay.
"""
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from kernels.backend import floating, jit, need, tl, use_triton

BLOCK = 4096                    # columns a program holds at a time


class Sampled(NamedTuple):
    """token (..) int64; logp (..) under the full softmax; truncated_logp (..) under what was sampled from."""
    token: Tensor
    logp: Tensor
    truncated_logp: Tensor


@jit
def _kernel(logits, stride, u, floor, banned, token, logp, truncated, temperature, V: tl.constexpr,
            BLOCK: tl.constexpr, FLOOR: tl.constexpr, GREEDY: tl.constexpr):
    """One program a row: once over it for both sums, once more until the cumulated sum passes u."""
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * stride
    least = tl.load(floor + row) if FLOOR else float("-inf")
    m = float("-inf")
    s = 0.0
    m_allowed = float("-inf")
    s_allowed = 0.0
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(base + column, mask=column < V, other=float("-inf")).to(tl.float32) / temperature
        ok = (tl.load(banned + column, mask=column < V, other=1) == 0) & (z >= least)
        new = tl.maximum(m, tl.max(z, 0))
        finite = tl.where(new > float("-inf"), new, 0.0)        # while all are -inf, -inf minus -inf would be NaN
        s = s * tl.exp(m - finite) + tl.sum(tl.exp(z - finite), 0)
        m = new
        za = tl.where(ok, z, float("-inf"))
        new = tl.maximum(m_allowed, tl.max(za, 0))
        finite = tl.where(new > float("-inf"), new, 0.0)
        s_allowed = s_allowed * tl.exp(m_allowed - finite) + tl.sum(tl.exp(za - finite), 0)
        m_allowed = new
    wanted = tl.load(u + row).to(tl.float32) * s_allowed
    before = 0.0
    found = V
    last = 0
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(base + column, mask=column < V, other=float("-inf")).to(tl.float32) / temperature
        ok = (tl.load(banned + column, mask=column < V, other=1) == 0) & (z >= least)
        e = tl.where(ok, tl.exp(z - m_allowed), 0.0)
        # e > 0 too: sums of a tree scan may grow by rounding alone at a token that is not allowed.
        if GREEDY:
            passes = (e > 0) & (z == m_allowed)
        else:
            passes = (e > 0) & (before + tl.cumsum(e, 0) > wanted)
        found = tl.minimum(found, tl.min(tl.where(passes, column, V), 0))
        last = tl.maximum(last, tl.max(tl.where(e > 0, column, 0), 0))
        before += tl.sum(e, 0)
    chosen = tl.where(found < V, found, last)           # rounding may leave the whole sum below u times itself
    z = tl.load(base + chosen).to(tl.float32) / temperature
    tl.store(token + row, chosen.to(tl.int64))
    tl.store(logp + row, z - m - tl.log(s))
    tl.store(truncated + row, z - m_allowed - tl.log(s_allowed))


def _floor(z, banned, top_k, top_p):
    """Per row (N, 1) the smallest z that may be sampled, or None for all."""
    if not top_k and top_p >= 1:
        return None
    ordered = z.masked_fill(banned, float("-inf")).sort(-1, descending=True).values
    floor = ordered[:, min(top_k or z.shape[1], z.shape[1]) - 1:][:, :1]
    if top_p < 1:
        p = ordered.masked_fill(ordered < floor, float("-inf")).softmax(-1, dtype=torch.float64)
        # A token stays if those before it do not reach p yet; the first always does.
        stays = (p.cumsum(-1) - p < top_p).sum(-1, keepdim=True).clamp(min=1)
        floor = torch.maximum(floor, ordered.gather(-1, stays - 1))
    return floor


def _draw(logits: Tensor, u: Optional[Tensor], banned: Tensor, temperature: float, top_k: int,
          top_p: float) -> Tuple[Tensor, Tensor, Tensor]:
    N, V = logits.shape
    greedy = u is None
    if use_triton(logits) and logits.numel():
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        floor = _floor(logits.float() / temperature, banned, top_k, top_p) if top_k or top_p < 1 else None
        token = torch.empty(N, dtype=torch.long, device=logits.device)
        logp, truncated = (torch.empty(N, device=logits.device) for _ in range(2))
        _kernel[(N,)](logits, logits.stride(0), logp if greedy else u, logp if floor is None else floor.contiguous(),
                      banned.to(torch.uint8), token, logp, truncated, temperature, V=V, BLOCK=BLOCK,
                      FLOOR=floor is not None, GREEDY=greedy, num_warps=8)
        return token, logp, truncated
    z = logits / temperature
    floor = _floor(z, banned, top_k, top_p)
    allowed = z.masked_fill(banned if floor is None else banned | (z < floor), float("-inf"))
    p = allowed.softmax(-1)
    if greedy:
        token = allowed.argmax(-1, keepdim=True)
    else:
        # Cumulated in fp64, so that u cannot round up to the total nor a rare token be lost; one that is not allowed
        # has width 0 and is never the first to pass.
        cumulated = p.cumsum(-1, dtype=torch.float64)
        token = torch.searchsorted(cumulated, u[:, None] * cumulated[:, -1:], right=True)
    return token[:, 0], z.log_softmax(-1).gather(-1, token)[:, 0], p.gather(-1, token).log_()[:, 0]


_op = torch.library.custom_op("seethink::sample", _draw, mutates_args=())


@_op.register_fake
def _(logits, u, banned, temperature, top_k, top_p):
    N = len(logits)
    return (logits.new_empty(N, dtype=torch.long), *(logits.new_empty(N) for _ in range(2)))


def sample(logits, generator=None, temperature=1.0, top_k=0, top_p=1.0, banned=None):
    """logits (.., V) -> Sampled(token, logp, truncated_logp), each (..).

    generator: a torch.Generator of the logits' device (None: the default one). temperature 0: the largest allowed
    logit, log-probs at temperature 1. top_k 0 and top_p 1: no truncation. banned: (V,) bool, True is never sampled.
    Raises ValueError on what does not fit; a row without a finite allowed logit gives an arbitrary token and NaN.
    """
    floating("logits", logits)
    V = logits.shape[-1]
    need(0 <= temperature < float("inf"), lambda: f"temperature {temperature} must be finite and not negative")
    need(top_k >= 0, lambda: f"top_k {top_k} must not be negative; 0 is no limit")
    need(0 < top_p <= 1, lambda: f"top_p {top_p} must lie in (0, 1]")
    if banned is None:
        banned = torch.zeros(V, dtype=torch.bool, device=logits.device)
    need(banned.shape == (V,) and banned.dtype == torch.bool,
         lambda: f"banned {tuple(banned.shape)} {banned.dtype} must be ({V},) bool, one entry a token")
    u = None
    if temperature:
        u = torch.rand(*logits.shape[:-1], 1, dtype=torch.float64, device=logits.device, generator=generator).flatten()
    # Eagerly the op's own dispatch would cost as much as drawing from a small vocabulary does.
    draw = _op if torch.compiler.is_compiling() else _draw
    out = draw(logits.detach().flatten(0, -2), u, banned, float(temperature or 1), top_k, float(top_p))
    return Sampled(*(t.view(logits.shape[:-1]) for t in out))
