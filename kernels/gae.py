"""Generalised advantage estimation (arXiv 1506.02438, eq. 16), backwards along each row.

    delta_t = r_t + gamma V_{t+1} - V_t,      A_t = delta_t + gamma lam A_{t+1},      return_t = A_t + V_t

Positions outside the mask are no steps: wherever they lie, before, between or after, the recurrence passes over them,
and their advantage and return are 0. After a row's last step the value is 0 (the episode ended) or `bootstrap` (it was
cut off).
"""
from typing import Optional, Tuple

import torch
from torch import Tensor

from kernels.backend import floating, jit, like, need, tl, use_triton

BLOCK = 1024                    # steps that are scanned at a time


def gae_reference(rewards, values, mask, gamma, lam, bootstrap=None):
    """The recurrence, a row and a step at a time."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for row in range(len(values)):
        following, advantage = (0.0 if bootstrap is None else bootstrap[row]), 0.0
        for t in reversed(range(values.shape[1])):
            if mask[row, t]:
                delta = rewards[row, t] + gamma * following - values[row, t]
                following, advantage = values[row, t], delta + gamma * lam * advantage
                advantages[row, t], returns[row, t] = advantage, advantage + values[row, t]
    return advantages, returns


@jit
def nearest(has, value, has_left, value_left):
    """Scanned from the right: the value of the nearest step at or after each place."""
    return has | has_left, tl.where(has_left != 0, value_left, value)


@jit
def affine(a, b, a_left, b_left):
    """Scanned from the right: A -> a A + b, composed."""
    return a_left * a, a_left * b + b_left


@jit
def _kernel(rewards, values, mask, bootstrap, advantages, returns, gamma, lam, T, BLOCKS: tl.constexpr,
            BLOCK: tl.constexpr):
    """One program a row; blocks from the right, each two scans: the following step's value, then the recurrence."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    following = tl.load(bootstrap + row).to(tl.float32)
    carried = 0.0
    for n in range(BLOCKS):
        t = (BLOCKS - 1 - n) * BLOCK + place
        inside = t < T
        at = row * T + t
        v = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rewards + at, mask=inside, other=0.0).to(tl.float32)
        step = tl.load(mask + at, mask=inside, other=0) != 0
        # The same, one place to the right. Past the end of the row or block stands what was carried in.
        inner = (place < BLOCK - 1) & (t + 1 < T)
        v_right = tl.load(values + at + 1, mask=inner, other=0.0).to(tl.float32)
        step_right = (tl.load(mask + at + 1, mask=inner, other=0) != 0) & inner
        last = place == BLOCK - 1
        has, found = tl.associative_scan((tl.where(step_right | last, 1, 0), tl.where(last, following, v_right)), 0,
                                         nearest, reverse=True)
        delta = r + gamma * found - v
        a = tl.where(step, gamma * lam, 1.0)
        b = tl.where(step, delta, 0.0)
        a, b = tl.associative_scan((a, b), 0, affine, reverse=True)
        advantage = a * carried + b
        tl.store(advantages + at, tl.where(step, advantage, 0.0), mask=inside)
        tl.store(returns + at, tl.where(step, advantage + v, 0.0), mask=inside)
        carried = tl.sum(tl.where(place == 0, advantage, 0.0), 0)
        following = tl.sum(tl.where(place == 0, tl.where(step, v, found), 0.0), 0)


@torch.library.custom_op("seethink::gae", mutates_args=())
def _op(rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Optional[Tensor], gamma: float,
        lam: float) -> Tuple[Tensor, Tensor]:
    B, T = values.shape
    advantages, returns = (torch.zeros_like(values, memory_format=torch.contiguous_format) for _ in range(2))
    following = values.new_zeros(B) if bootstrap is None else bootstrap
    if use_triton(values) and values.numel():
        block = min(BLOCK, max(2, 1 << (T - 1).bit_length()))
        inputs = [t.contiguous() for t in (rewards, values, mask.to(torch.uint8), following)]
        _kernel[(B,)](*inputs, advantages, returns, gamma, lam, T, BLOCKS=-(-T // block), BLOCK=block)
        return advantages, returns
    # Steps in rows: each is one stretch of memory.
    reward, value, step = (t.T.contiguous() for t in (rewards, values, mask))
    advantage = torch.zeros_like(following)
    every = torch.zeros_like(value)
    for t in reversed(range(T)):
        delta = reward[t] + gamma * following - value[t]
        advantage = torch.where(step[t], delta + gamma * lam * advantage, advantage)
        following = torch.where(step[t], value[t], following)
        every[t] = advantage
    advantages.copy_(torch.where(step, every, 0.0).T)
    returns.copy_(torch.where(step, every + value, 0.0).T)
    return advantages, returns


@_op.register_fake
def _(rewards, values, mask, bootstrap, gamma, lam):
    return tuple(torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(2))


def gae(rewards, values, mask, gamma, lam, bootstrap=None):
    """Advantages and returns (B, T), constants, of rewards, values (B, T) at the steps where mask (B, T) is True.

    bootstrap (B,): value after each row's last step; None: 0. Raises ValueError on what does not fit.
    """
    floating("values", values, ndim=2)
    floating("rewards", rewards)
    like("rewards", rewards, "values", values)
    like("mask", mask, "values", values)
    need(rewards.dtype == values.dtype, lambda: f"rewards {rewards.dtype} must be {values.dtype}, as values are")
    for name, value in (("gamma", gamma), ("lam", lam)):
        need(0 <= value <= 1, lambda: f"{name} {value} must lie in [0, 1]")
    if bootstrap is not None:
        like("bootstrap", bootstrap, "values", values, shape=False)
        need(bootstrap.shape == values.shape[:1],
             lambda: f"bootstrap {tuple(bootstrap.shape)} must be ({len(values)},), one value a row")
        bootstrap = bootstrap.detach().to(values.dtype)
    return _op(rewards.detach(), values.detach(), mask.bool(), bootstrap, float(gamma), float(lam))
