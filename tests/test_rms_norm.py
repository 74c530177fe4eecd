"""kernels.rms_norm against torch's own, value and gradients."""
import pytest
import torch

from kernels import rms_norm, rms_norm_reference
from tiny import difference

EPS = 1e-3      # large, so that leaving it out shows


def problem(shape, dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype)
    weight = torch.randn(shape[-1], dtype=dtype)
    x.flatten(0, -2)[::3] *= 0.01           # rows near sqrt(eps)
    return x.requires_grad_(), weight.requires_grad_(), torch.randn(shape, dtype=dtype)


def run(op, x, weight, g):
    out = op(x, weight, EPS)
    dx, dw = torch.autograd.grad((out * g).sum(), (x, weight))
    return dict(out=out.detach(), dx=dx, dw=dw)


def torchs(x, weight, eps):
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


@pytest.mark.parametrize("shape", [(1, 3), (7, 24), (2, 3, 5, 16), (4, 1)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_value_and_gradients_equal_torchs(shape, dtype, tolerance):
    given = problem(shape, dtype)
    assert difference(run(rms_norm, *given), run(torchs, *given)) < tolerance
    assert difference(run(rms_norm_reference, *given), run(torchs, *given)) < tolerance


def test_gradients_equal_finite_differences():
    x, weight, _ = problem((3, 5))
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, EPS), (x, weight))


def test_one_of_the_two_may_be_frozen():
    x, weight, g = problem((4, 6))
    both = run(rms_norm, x, weight, g)
    (rms_norm(x, weight.detach(), EPS) * g).sum().backward()
    (rms_norm(x.detach(), weight, EPS) * g).sum().backward()
    assert difference(x.grad, both["dx"]) < 1e-12 and difference(weight.grad, both["dw"]) < 1e-12


def test_strides_do_not_matter():
    x, weight, g = problem((3, 4, 6))
    turned = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert difference(run(rms_norm, turned, weight, g), run(rms_norm, x, weight, g)) < 1e-14


def test_bf16_keeps_its_statistics_in_fp32():
    torch.manual_seed(0)
    x, weight = torch.randn(9, 4096).bfloat16(), torch.ones(4096).bfloat16()
    exact = torchs(x.double(), weight.double(), EPS)
    assert rms_norm(x, weight, EPS).dtype == torch.bfloat16
    assert ((rms_norm(x, weight, EPS) - exact).abs() <= 2 ** -8 * exact.abs() + 1e-6).all()     # one rounding
