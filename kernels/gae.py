"""Generalised advantage estimation (arXiv 1506.02438, eq. 16), backwards along each row.

    delta_t = r_t + gamma V_{t+1} - V_t,      A_t = delta_t + gamma lam A_{t+1},      return_t = A_t + V_t

Positions outside the mask are not steps: wherever they lie, before, between or after the steps, the
recurrence passes over them, and their advantage and return are 0. After a row's last step the value
is 0 (the episode ended) or `bootstrap` (it was cut off).
"""
from typing import Optional, Tuple

import torch
from torch import Tensor

from kernels.backend import check_device, check_floating, check_like, jit, require, tl, use_triton

BLOCK = 1024                    # steps that are scanned at a time


# ---------------------------------------------------------------- reference

def gae_reference(rewards, values, mask, gamma, lam, bootstrap=None):
    """The recurrence, a row and a step at a time."""
    B, T = values.shape
    advantages = torch.zeros_like(values)
    returns = torch.zeros_like(values)
    for row in range(B):
        next_value = 0.0 if bootstrap is None else bootstrap[row]
        advantage = 0.0
        for t in reversed(range(T)):
            if not mask[row, t]:
                continue
            delta = rewards[row, t] + gamma * next_value - values[row, t]
            advantage = delta + gamma * lam * advantage
            next_value = values[row, t]
            advantages[row, t] = advantage
            returns[row, t] = advantage + values[row, t]
    return advantages, returns


# ---------------------------------------------------------------- Triton kernel

@jit
def nearest(has, value, has_left, value_left):
    """Scanned from the right: the value of the nearest step at or after each place."""
    return has | has_left, tl.where(has_left != 0, value_left, value)


@jit
def affine(a, b, a_left, b_left):
    """Scanned from the right: the maps A -> a A + b, composed."""
    return a_left * a, a_left * b + b_left


@jit
def _kernel(rewards, values, mask, bootstrap, advantages, returns, gamma, lam, T,
            BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row: blocks from the right, two scans each, of next values and of advantages."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    next_value = tl.load(bootstrap + row).to(tl.float32)
    next_advantage = 0.0
    for n in range(BLOCKS):
        t = (BLOCKS - 1 - n) * BLOCK + place
        inside = t < T
        at = row * T + t
        v = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rewards + at, mask=inside, other=0.0).to(tl.float32)
        step = tl.load(mask + at, mask=inside, other=0) != 0
        # 1. The value of the next step. Values and mask one place to the right; at the end of the
        # row or block stands what the block to the right handed on.
        inner = (place < BLOCK - 1) & (t + 1 < T)
        v_right = tl.load(values + at + 1, mask=inner, other=0.0).to(tl.float32)
        step_right = (tl.load(mask + at + 1, mask=inner, other=0) != 0) & inner
        last = place == BLOCK - 1
        has = tl.where(step_right | last, 1, 0)
        value = tl.where(last, next_value, v_right)
        has, v_next = tl.associative_scan((has, value), 0, nearest, reverse=True)
        # 2. The recurrence A_t = a A_{t+1} + b. Where there is no step, a = 1 and b = 0 pass A on.
        delta = r + gamma * v_next - v
        a = tl.where(step, gamma * lam, 1.0)
        b = tl.where(step, delta, 0.0)
        a, b = tl.associative_scan((a, b), 0, affine, reverse=True)
        advantage = a * next_advantage + b
        tl.store(advantages + at, tl.where(step, advantage, 0.0), mask=inside)
        tl.store(returns + at, tl.where(step, advantage + v, 0.0), mask=inside)
        # 3. Place 0 is handed to the block on the left. A sum picks it: blocks have no index.
        next_advantage = tl.sum(tl.where(place == 0, advantage, 0.0), 0)
        next_value = tl.sum(tl.where(place == 0, tl.where(step, v, v_next), 0.0), 0)


def _gae_triton(rewards, values, mask, bootstrap, gamma, lam):
    B, T = values.shape
    advantages = torch.empty_like(values, memory_format=torch.contiguous_format)
    returns = torch.empty_like(advantages)
    block = min(BLOCK, max(2, 1 << (T - 1).bit_length()))
    blocks = -(-T // block)
    _kernel[(B,)](rewards.contiguous(), values.contiguous(), mask.to(torch.uint8).contiguous(),
                  bootstrap.contiguous(), advantages, returns, gamma, lam, T, BLOCKS=blocks,
                  BLOCK=block)
    return advantages, returns


# ---------------------------------------------------------------- PyTorch form

def _gae_torch(rewards, values, mask, bootstrap, gamma, lam):
    # Transposed, so that all rows' numbers of one step are one stretch of memory.
    reward = rewards.T.contiguous()
    value = values.T.contiguous()
    step = mask.T.contiguous()
    next_value = bootstrap
    advantage = torch.zeros_like(bootstrap)
    every = torch.zeros_like(value)
    for t in reversed(range(len(value))):
        delta = reward[t] + gamma * next_value - value[t]
        advantage = torch.where(step[t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(step[t], value[t], next_value)
        every[t] = advantage
    advantages = torch.where(step, every, 0.0).T.contiguous()
    returns = torch.where(step, every + value, 0.0).T.contiguous()
    return advantages, returns


# ---------------------------------------------------------------- op

@torch.library.custom_op("seethink::gae", mutates_args=())
def _op(rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Optional[Tensor], gamma: float,
        lam: float) -> Tuple[Tensor, Tensor]:
    if bootstrap is None:
        bootstrap = values.new_zeros(len(values))
    run = _gae_triton if use_triton(values) and values.numel() else _gae_torch
    return run(rewards, values, mask, bootstrap, gamma, lam)


@_op.register_fake
def _(rewards, values, mask, bootstrap, gamma, lam):
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    return out, torch.empty_like(out)


def gae(rewards, values, mask, gamma, lam, bootstrap=None):
    """Advantages and returns (B, T), constants, at the steps where mask (B, T) is True.

    rewards, values (B, T); bootstrap (B,): the value after each row's last step; None: 0. Raises
    ValueError on what does not fit.
    """
    check_floating("values", values, ndim=2)
    check_floating("rewards", rewards)
    check_like("rewards", rewards, "values", values)
    check_like("mask", mask, "values", values)
    require(rewards.dtype == values.dtype,
            lambda: f"rewards {rewards.dtype} must be {values.dtype}, as values are")
    require(0 <= gamma <= 1, lambda: f"gamma {gamma} must lie in [0, 1]")
    require(0 <= lam <= 1, lambda: f"lam {lam} must lie in [0, 1]")
    if bootstrap is not None:
        check_device("bootstrap", bootstrap, "values", values)
        require(bootstrap.shape == values.shape[:1],
                lambda: f"bootstrap {tuple(bootstrap.shape)} must be ({len(values)},), one value a row")
        bootstrap = bootstrap.detach().to(values.dtype)
    return _op(rewards.detach(), values.detach(), mask.bool(), bootstrap, float(gamma), float(lam))
