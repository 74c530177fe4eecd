"""Group-relative advantages: how much better each completion did than the others of its prompt.

    mean            A_i = r_i - mean(r)                                 GRPO (arXiv 2402.03300, section 4.1.2)
    leave_one_out   A_i = r_i - mean of the others = G / (G - 1) (r_i - mean(r))        RLOO (arXiv 2402.14740)
    std             A / (std + eps): of the "group" (GRPO), of the "batch", or "none" (Dr. GRPO, arXiv 2503.20783)

A group whose rewards are all equal gives exactly zero, by comparison: rounding in its mean, over a
deviation that is itself only rounding, would otherwise give eight rewards of 0.7 advantages of 0.8
at eps 1e-8.
"""
import torch
from torch import Tensor

from kernels.backend import check_floating, jit, require, tl, use_triton


# ---------------------------------------------------------------- reference

def group_advantage_reference(rewards, std="group", baseline="mean", eps=1e-6):
    """The formula, a group at a time."""
    out = torch.zeros_like(rewards)
    for row, r in enumerate(rewards):
        if r.min() == r.max():
            continue
        if baseline == "mean":
            expected = r.mean()
        else:
            expected = (r.sum() - r) / (len(r) - 1)         # the mean of the others
        scale = {"group": r.std() + eps, "batch": rewards.std() + eps, "none": 1.0}[std]
        out[row] = (r - expected) / scale
    return out


# ---------------------------------------------------------------- Triton kernel

@jit
def _kernel(rewards, out, batch_std, eps, factor, G: tl.constexpr, WIDTH: tl.constexpr, STD: tl.constexpr):
    """One program a group."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    inside = place < G
    r = tl.load(rewards + row * G + place, mask=inside, other=0.0).to(tl.float32)
    centered = tl.where(inside, r - tl.sum(r, 0) / G, 0.0)
    smallest = tl.min(tl.where(inside, r, float("inf")), 0)
    largest = tl.max(tl.where(inside, r, float("-inf")), 0)
    if STD == "group":
        scale = tl.sqrt(tl.sum(centered * centered, 0) / (G - 1)) + eps
    elif STD == "batch":
        scale = tl.load(batch_std) + eps
    else:
        scale = 1.0
    advantage = tl.where(smallest == largest, 0.0, centered * factor / scale)
    tl.store(out + row * G + place, advantage.to(out.dtype.element_ty), mask=inside)


def _advantage_triton(rewards, std, factor, eps):
    P, G = rewards.shape
    rewards = rewards.contiguous()
    out = torch.empty_like(rewards)
    batch_std = rewards.float().std() if std == "batch" else rewards        # read for "batch" only
    width = max(2, 1 << (G - 1).bit_length())
    _kernel[(P,)](rewards, out, batch_std, eps, factor, G=G, WIDTH=width, STD=std)
    return out


# ---------------------------------------------------------------- PyTorch form

def _advantage_torch(rewards, std, factor, eps):
    advantage = rewards - rewards.mean(1, keepdim=True)
    if factor != 1:
        advantage = advantage * factor
    if std == "group":
        advantage = advantage / (rewards.std(1, keepdim=True) + eps)
    elif std == "batch":
        advantage = advantage / (rewards.std() + eps)
    return advantage.masked_fill(is_flat(rewards)[:, None], 0.0)


# ---------------------------------------------------------------- op

@torch.library.custom_op("seethink::group_advantage", mutates_args=())
def _op(rewards: Tensor, std: str, baseline: str, eps: float) -> Tensor:
    G = rewards.shape[1]
    factor = G / (G - 1) if baseline == "leave_one_out" else 1.0
    run = _advantage_triton if use_triton(rewards) and rewards.numel() else _advantage_torch
    return run(rewards, std, factor, eps)


@_op.register_fake
def _(rewards, std, baseline, eps):
    return torch.empty_like(rewards, memory_format=torch.contiguous_format)


def is_flat(rewards):
    """(P, G) -> (P,) bool: all rewards of the group are equal, so it teaches nothing."""
    return rewards.amax(1) == rewards.amin(1)


def group_advantage(rewards, std="group", baseline="mean", eps=1e-6):
    """rewards (P, G) -> advantages (P, G), constants. Deviations are unbiased (n - 1).

    Raises ValueError on what does not fit, and for G = 1.

    >>> group_advantage(torch.tensor([[1.0, 0.0], [0.7, 0.7]]), std="none")
    tensor([[ 0.5000, -0.5000],
            [ 0.0000,  0.0000]])
    """
    check_floating("rewards", rewards, ndim=2)
    require(rewards.shape[1] >= 2,
            lambda: f"rewards {tuple(rewards.shape)} must be (P, G) with G at least 2: a group of one has no "
                    "baseline but itself")
    require(std in ("group", "batch", "none"), lambda: f"std {std!r} must be group, batch or none")
    require(baseline in ("mean", "leave_one_out"), lambda: f"baseline {baseline!r} must be mean or leave_one_out")
    require(eps >= 0, lambda: f"eps {eps} must not be negative")
    return _op(rewards.detach(), std, baseline, float(eps))
