"""kernels.linear_kl against the definition in fp64."""
import pytest
import torch

from kernel_tools import DEVICES, assert_equals
from kernels import linear_kl, linear_kl_reference
from tiny import difference

pytestmark = pytest.mark.usefixtures("blocks")


def problem(N, D, V, Dr=None, seed=0):
    torch.manual_seed(seed)
    Dr = Dr or D
    return dict(h=torch.randn(N, D, dtype=torch.float64), weight=torch.randn(V, D, dtype=torch.float64),
                h_ref=torch.randn(N, Dr, dtype=torch.float64), weight_ref=torch.randn(V, Dr, dtype=torch.float64),
                mask=torch.arange(N) % 4 != 3)


def test_the_reference_is_the_definition():
    h, weight, h_ref, weight_ref, mask = problem(5, 3, 11).values()
    p = (h @ weight.T / 0.7).softmax(-1)
    q = (h_ref @ weight_ref.T / 0.7).softmax(-1)
    wanted = torch.zeros(5, dtype=torch.float64)
    for row in range(5):
        if mask[row]:
            wanted[row] = sum(x * (x / y).log() for x, y in zip(p[row], q[row]))
    assert difference(linear_kl_reference(h, weight, h_ref, weight_ref, 0.7, None, mask), wanted) < 1e-12


@DEVICES
@pytest.mark.parametrize("N, D, V, Dr, chunk, temperature, softcap", [
    (7, 5, 601, None, None, 1.0, None), (9, 5, 600, 3, 4, 0.7, None), (6, 8, 301, None, 100, 1.3, 6.0),
    (1, 3, 2, None, 1, 1.0, None), (0, 3, 5, None, None, 1.0, None)])
def test_value_and_gradients(N, D, V, Dr, chunk, temperature, softcap, device):
    def reference(chunk, **rest):
        return linear_kl_reference(**rest)

    assert_equals(linear_kl, reference, problem(N, D, V, Dr), ("h", "weight"), device, chunk=chunk,
                  temperature=temperature, softcap=softcap)


@DEVICES
def test_equal_heads_have_exactly_no_divergence_and_a_small_one_keeps_its_digits(device):
    h, weight, *_ = (t.float() for t in problem(6, 8, 601).values())
    h, weight = h.to(device), weight.to(device)
    assert not linear_kl(h, weight, h, weight).any()
    near = weight + 1e-2 * torch.randn(601, 8, generator=torch.Generator().manual_seed(1)).to(device)
    wanted = linear_kl_reference(h.double(), near.double(), h.double(), weight.double())
    assert 1e-4 < wanted.max() < 1e-3
    # The textbook's sum of p (log p - log q) loses a digit more in fp32.
    assert difference(linear_kl(h, near, h, weight), wanted) < 1e-4
    assert difference(linear_kl_reference(h, near, h, weight), wanted) > 2e-4


def test_a_frozen_head_gets_no_gradient():
    h, weight, h_ref, weight_ref, mask = problem(5, 3, 11).values()
    h.requires_grad_()
    linear_kl(h, weight, h_ref, weight_ref, mask=mask).sum().backward()
    assert h.grad.any() and weight.grad is None


@pytest.mark.parametrize("change, names", [
    (dict(h=torch.zeros(2, 4)), r"h \(2, 4\), weight \(5, 3\)"),
    (dict(weight_ref=torch.zeros(6, 3)), r"weight_ref \(6, 3\)"),
    (dict(h_ref=torch.zeros(2, 3).double()), "h_ref torch.float64 must be torch.float32"),
    (dict(mask=torch.ones(3).bool()), r"mask \(3,\) must be \(2,\)"),
    (dict(temperature=0.0), "temperature 0.0"),
    (dict(chunk=0), "chunk 0"),
])
def test_what_does_not_fit_is_named(change, names):
    good = dict(h=torch.zeros(2, 3), weight=torch.zeros(5, 3), h_ref=torch.zeros(2, 3), weight_ref=torch.zeros(5, 3))
    with pytest.raises(ValueError, match=names):
        linear_kl(**good | change)
