"""Where an op runs: Triton on CUDA tensors, PyTorch on all others.

TRITON_INTERPRET=1, set before Triton is imported, runs the Triton kernels on CPU tensors too, in Triton's interpreter:
slow, for study and tests. SEETHINK_CHECK=1 also makes those checks of values that have to wait for a GPU.
"""
import os
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:                     # not published for macOS: every op has its PyTorch form
    triton, tl = None, SimpleNamespace(constexpr=None)

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
CHECK = os.environ.get("SEETHINK_CHECK") == "1"


def jit(kernel):
    """triton.jit, or the plain function where there is no Triton to launch it with."""
    return triton.jit(kernel) if triton else kernel


def use_triton(x):
    return triton is not None and (x.is_cuda or INTERPRET) and x.dtype != torch.float64


def accumulator(dtype):
    """The dtype results are computed in: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def need(ok, message):
    """Raises ValueError(message) unless ok. `message` is made only then: a call that fits pays for no text."""
    if not ok:
        raise ValueError(message())


def positive(name, value):
    need(0 < value < float("inf"), lambda: f"{name} {value} must be positive and finite")


def like(name, x, other_name, other, shape=True):
    """x must lie where `other` does, and (unless told otherwise) have its shape."""
    need(x.device == other.device, lambda: f"{name} on {x.device} must be on {other.device}, as {other_name} is")
    need(not shape or x.shape == other.shape,
         lambda: f"{name} {tuple(x.shape)} must have the shape of {other_name}, {tuple(other.shape)}")


def floating(name, x, ndim=None):
    need(x.is_floating_point(), lambda: f"{name} must hold floating-point numbers, not {x.dtype}")
    need(ndim is None or x.ndim == ndim, lambda: f"{name} {tuple(x.shape)} must have {ndim} dimensions")


def targets(target, vocab, ignore_index):
    """Raises ValueError for a token outside the vocabulary; on a GPU, which looking waits for, with SEETHINK_CHECK."""
    if target.numel() and (not target.is_cuda or CHECK):
        low, high = (t.item() for t in target.masked_fill(target == ignore_index, 0).aminmax())
        need(0 <= low and high < vocab,
             lambda: f"target {low if low < 0 else high} must lie in [0, {vocab}) or be ignore_index {ignore_index}")
