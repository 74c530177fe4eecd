"""What the tests of all kernels share: devices, the comparison with a reference in fp64, and planted mistakes."""
import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

from kernels.backend import INTERPRET
from tiny import difference

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
WITH_TRITON = pytest.mark.skipif(not INTERPRET and not torch.cuda.is_available(), reason="runs its Triton kernel")
TRITON_DEVICE = "cpu" if INTERPRET or not torch.cuda.is_available() else "cuda"
PLAIN = pytest.mark.skipif(INTERPRET, reason="nothing of it runs in Triton's interpreter")
IGNORE = -100


def rounded(tensors, dtype, device):
    """{name: tensor} on the device, floating-point ones in `dtype`; None stays."""
    found = {}
    for name, t in tensors.items():
        if isinstance(t, torch.Tensor):
            t = t.detach().to(device)
            if t.is_floating_point():
                t = t.to(dtype)
        found[name] = t
    return found


def outputs_and_gradients(op, tensors, wrt, options):
    """{name: fp64 tensor} of all outputs and of the gradients for `wrt` under fixed random upstream gradients."""
    tensors = dict(tensors)
    for name in wrt:
        tensors[name] = tensors[name].detach().requires_grad_()
    out = op(**tensors, **options)
    if not isinstance(out, tuple):
        out = (out,)
    found = {str(n): t.detach().double() for n, t in enumerate(out)}
    if not wrt:
        return found
    generator = torch.Generator().manual_seed(7)
    loss = 0.0
    for t in out:
        if t.requires_grad:
            upstream = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
            loss = loss + (t.double() * upstream).sum()
    grads = torch.autograd.grad(loss, [tensors[name] for name in wrt])
    for name, grad in zip(wrt, grads):
        found[f"d{name}"] = grad.double()
    return found


def assert_equals(op, reference, tensors, wrt=(), device="cpu", **options):
    """op in fp32 (to 1e-5) and fp64 (to 1e-12; always the PyTorch form) against the reference in fp64.

    Both get the same rounded inputs, so that only the op's own rounding differs.
    """
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        given = rounded(tensors, dtype, device)
        wide = rounded(given, torch.float64, "cpu")
        found = outputs_and_gradients(op, given, wrt, options)
        wanted = outputs_and_gradients(reference, wide, wrt, options)
        assert found.keys() == wanted.keys()
        found = {name: t.cpu() for name, t in found.items()}
        assert difference(found, wanted) < tolerance


# ---------------------------------------------------------------- planted mistakes

COPIES = itertools.count()


def with_mistakes(module, planted, folder):
    """A copy of a kernel's file, imported, where each (text, another text) of `planted` is replaced."""
    text = Path(module.__file__).read_text()
    for right, wrong in planted:
        assert text.count(right) == 1, right
        text = text.replace(right, wrong)
    space = f"planted{next(COPIES)}"                    # the op of the file as it is stays
    path = folder / f"{space}.py"
    path.write_text(text.replace("seethink::", f"{space}::").replace("ops.seethink.", f"ops.{space}."))
    spec = importlib.util.spec_from_file_location(space, path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def mostly_slow(mistakes, every=4):
    """{name: planted} as parameters: each takes the interpreter seconds, so one of `every` is in each run, the rest in
    the slow one."""
    return [pytest.param(planted, id=name, marks=[pytest.mark.slow] if number % every else [])
            for number, (name, planted) in enumerate(mistakes.items())]


def error(found, wanted):
    """As `difference`; NaN is as far off as can be."""
    off = difference(found, wanted)
    return float("inf") if off != off else off
