"""Where an op runs, Triton on CUDA tensors and PyTorch on all others; and the ops' checks.

TRITON_INTERPRET=1, set before Triton is imported, runs the Triton kernels on CPU tensors, too, in
Triton's interpreter: slow, for study and tests. SEETHINK_CHECK=1 also makes the checks of values
that have to wait for a GPU.
"""
import math
import os
from functools import partial
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:                     # not published for macOS: every op has its PyTorch form
    triton = None
    tl = SimpleNamespace(constexpr=float)

LOG2_E = tl.constexpr(math.log2(math.e))       # for kernels, which take exponentials to the base 2
LN_2 = tl.constexpr(math.log(2))
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
CHECK = os.environ.get("SEETHINK_CHECK") == "1"


def jit(kernel=None, **options):
    """triton.jit, or the plain function where there is no Triton to launch it with. Also with options of triton.jit:
    @jit(do_not_specialize=["T"])."""
    if kernel is None:
        return partial(jit, **options)
    return triton.jit(kernel, **options) if triton else kernel


def use_triton(x):
    """Whether the op runs its Triton kernel on x. fp64, for tests, always runs in PyTorch."""
    return triton is not None and (x.is_cuda or INTERPRET) and x.dtype != torch.float64


def accumulator(dtype):
    """The dtype in which results are computed: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


# ---------------------------------------------------------------- checks: each raises ValueError

def require(ok, message):
    """Raises ValueError(message()) unless ok. A function, so that a good call pays for no text."""
    if not ok:
        raise ValueError(message())


def check_positive(name, value):
    require(0 < value < float("inf"), lambda: f"{name} {value} must be positive and finite")


def check_floating(name, x, ndim=None):
    require(x.is_floating_point(), lambda: f"{name} must hold floating-point numbers, not {x.dtype}")
    require(ndim is None or x.ndim == ndim, lambda: f"{name} {tuple(x.shape)} must have {ndim} dimensions")


def check_device(name, x, other_name, other):
    require(x.device == other.device, lambda: f"{name} on {x.device} must be on {other.device}, as {other_name} is")


def check_like(name, x, other_name, other):
    """x must be on the device of `other` and have its shape."""
    check_device(name, x, other_name, other)
    require(x.shape == other.shape,
            lambda: f"{name} {tuple(x.shape)} must have the shape of {other_name}, {tuple(other.shape)}")


def check_targets(target, vocab, ignore_index):
    """Tokens must lie in the vocabulary. On CUDA nothing waits to see them: one that does not ends the process's work
    there, before a kernel reads it, with this text on stderr and torch's error at the next call that waits."""
    if not target.numel():
        return
    if target.is_cuda and not CHECK:
        assert_targets(target, vocab, ignore_index)
        return
    low, high = target.masked_fill(target == ignore_index, 0).aminmax()
    worst = low.item() if low < 0 else high.item()
    require(0 <= worst < vocab,
            lambda: f"target {worst} must lie in [0, {vocab}) or be ignore_index {ignore_index}")


def assert_targets(target, vocab, ignore_index):
    """An assertion on the tensor's own device, without a host synchronisation."""
    fits = (target == ignore_index) | ((target >= 0) & (target < vocab))
    torch._assert_async(fits.all(), f"every target must lie in [0, {vocab}) or be ignore_index {ignore_index}")
