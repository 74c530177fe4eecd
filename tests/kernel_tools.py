"""What the tests of all kernels share: devices, and the comparison with a reference in fp64."""
import pytest
import torch

from kernels.backend import INTERPRET
from tiny import difference

DEVICES = pytest.mark.parametrize("device", [
    "cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))])
PLAIN = pytest.mark.skipif(INTERPRET, reason="nothing of it runs in Triton's interpreter")
IGNORE = -100


def rounded(tensors, dtype, device):
    """Floating-point ones become leaves of `dtype`; None and the rest stay."""
    return {name: t if not isinstance(t, torch.Tensor) else t.to(device) if not t.is_floating_point()
            else t.detach().to(device, dtype) for name, t in tensors.items()}


def outputs_and_gradients(op, tensors, wrt, options):
    """{name: fp64 tensor} of all outputs and of the gradients for `wrt` under fixed random upstream gradients."""
    tensors = {name: t.detach().requires_grad_() if name in wrt else t for name, t in tensors.items()}
    out = op(**tensors, **options)
    out = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor)]
    generator = torch.Generator().manual_seed(7)
    loss = sum((t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)).sum()
               for t in out if t.requires_grad)
    grads = torch.autograd.grad(loss, [tensors[name] for name in wrt]) if wrt else ()
    return {**{str(n): t.detach().double() for n, t in enumerate(out)},
            **{f"d{name}": grad.double() for name, grad in zip(wrt, grads)}}


def assert_equals(op, reference, tensors, wrt=(), device="cpu", **options):
    """op in fp32 (1e-5) and, where it is the PyTorch form, fp64 (1e-12), against the reference in fp64.

    The reference gets the same rounded inputs, so that what differs is the op's own doing.
    """
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        given = rounded(tensors, dtype, device)
        wide = rounded(rounded(given, torch.float64, "cpu"), torch.float64, "cpu")
        found = outputs_and_gradients(op, given, wrt, options)
        wanted = outputs_and_gradients(reference, wide, wrt, options)
        assert found.keys() == wanted.keys()
        assert difference({k: v.cpu() for k, v in found.items()}, wanted) < tolerance
