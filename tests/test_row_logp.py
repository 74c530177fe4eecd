"""kernels.row_logp and row_dlogits_ against the textbook in fp64."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernel_tools import DEVICES, IGNORE, assert_equals
from kernels import row_dlogits_, row_logp, row_logp_reference
from tiny import difference

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("blocks")


def problem(N, V, seed=0, scale=1.0):
    """Logits, and targets with the last column and ignored rows among them."""
    torch.manual_seed(seed)
    target = torch.randint(V, (N,))
    target[::5] = V - 1
    target[3::4] = IGNORE
    return dict(logits=scale * torch.randn(N, V, dtype=torch.float64), target=target)


def test_the_reference_is_the_definition():
    logits, target = problem(7, 11).values()
    logp, entropy = row_logp_reference(logits, target, 0.7, 5.0)
    for row in range(7):
        p = (5 * (logits[row] / 5).tanh() / 0.7).exp()
        p /= p.sum()
        keep = target[row] != IGNORE
        assert logp[row].item() == pytest.approx(p[target[row]].log().item() if keep else 0)
        assert entropy[row].item() == pytest.approx(-(p * p.log()).sum().item() if keep else 0)


@DEVICES
@pytest.mark.parametrize("N, V, temperature, softcap, scale", [
    (1, 2, 1.0, None, 1), (9, 601, 1.0, None, 1), (9, 600, 0.6, None, 3), (6, 128, 1.0, 5.0, 4),
    (6, 601, 0.7, 30.0, 20), (4, 1, 1.0, None, 1), (0, 5, 1.0, None, 1)])
def test_values_and_gradients(N, V, temperature, softcap, scale, device):
    assert_equals(row_logp, row_logp_reference, problem(N, V, scale=scale), ("logits",), device,
                  temperature=temperature, softcap=softcap)


@DEVICES
def test_the_gradient_overwrites_the_logits(device):
    tensors = problem(9, 601)
    logits, target = tensors["logits"].float().to(device), tensors["target"].to(device)
    leaf = logits.clone().requires_grad_()
    logp, entropy = row_logp(leaf, target, 0.7, 8.0)
    g = torch.randn(9, device=device)
    e = torch.randn(9, device=device)
    for loss, upstream in (((g * logp + e * entropy).sum(), (g, e)), ((g * logp).sum(), (g, None)),
                           ((e * entropy).sum(), (None, e))):
        wanted = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
        given = logits.clone()
        assert row_dlogits_(given, target, *upstream, 0.7, 8.0).data_ptr() == given.data_ptr()
        assert difference(given, wanted) < 1e-6


@DEVICES
def test_rows_that_are_not_contiguous(device):
    logits, target = problem(9, 601).values()
    apart = torch.randn(9, 1300, dtype=torch.float64)
    apart[:, 5:606] = logits
    across = logits.T.contiguous().T
    for given in (apart[:, 5:606], across):
        given = given.float().to(device)
        found = row_logp(given, target.to(device))
        assert difference(torch.stack(found).cpu(), torch.stack(row_logp_reference(logits, target))) < 1e-5


@DEVICES
def test_banned_columns_add_nothing_to_the_entropy(device):
    logits, target = problem(6, 601).values()
    logits[:, 100:400] = float("-inf")
    target = target.masked_fill((target >= 100) & (target < 400), 7)
    kept = torch.cat([logits[:, :100], logits[:, 400:]], 1)
    moved = torch.where(target >= 400, target - 300, target)
    leaf = logits.float().to(device).requires_grad_()
    found = row_logp(leaf, target.to(device))
    assert difference(torch.stack(found).detach().cpu(), torch.stack(row_logp_reference(kept, moved))) < 1e-5
    grad = torch.autograd.grad(found[0].sum() + found[1].sum(), leaf)[0]
    assert grad.isfinite().all() and not grad[:, 100:400].any()


@DEVICES
def test_logits_near_200_keep_their_digits(device):
    # z = k/4 + 200 or k/4 - 200: exact in fp32, so whatever error is left is the formula's.
    z = torch.arange(9, dtype=torch.float64)[None] / 4 + torch.tensor([[200.0], [-200.0], [0.0]])
    target = torch.tensor([0, 8, 4])
    logp, entropy = row_logp(z.float().to(device), target.to(device))
    true_logp, true_entropy = row_logp_reference(z, target)
    assert difference(entropy.cpu(), true_entropy) < 5e-7 and difference(logp.cpu(), true_logp) < 3e-7
    z = z.float()
    loses_digits = z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)
    assert difference(loses_digits, true_entropy) > 3e-6


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_nearly_certain_target_keeps_its_gradient(dtype, device):
    # p = 0.99: 1 - p from a p that was rounded to bf16 first would be 20 % off.
    V, p = 5, 0.99
    logits = torch.zeros(1, V, dtype=torch.float64)
    logits[0, V - 1] = torch.tensor(p * (V - 1) / (1 - p)).log()
    logits = logits.to(dtype).to(device).requires_grad_()
    row_logp(logits, torch.tensor([V - 1], device=device))[0].sum().backward()
    p = logits.detach().double().cpu().softmax(-1)
    wanted = torch.eye(V)[V - 1:].double() - p
    wanted[0, V - 1] = p[0, :V - 1].sum()
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert ((logits.grad.cpu().double() - wanted) / wanted).abs().max() < tolerance


@DEVICES
def test_a_certain_target_gives_zero_gradient_and_no_nan(device):
    logits = torch.tensor([[0.0, 0.0, 200.0]], device=device, requires_grad=True)
    logp, entropy = row_logp(logits, torch.tensor([2], device=device))
    (logp + entropy).sum().backward()
    assert logp.item() == entropy.item() == 0 and not logits.grad.any()


def test_rows_beyond_two_to_the_31_numbers():
    # Three rows 2^30 numbers apart: 8 GiB of address space of which three pages are touched. Rows that lie elsewhere in
    # memory may be summed in another order; a row read from the wrong place is off by its whole size.
    program = """
import torch
from kernels import row_dlogits_, row_logp
logits = torch.empty(2**31 + 700).as_strided((3, 601), (2**30, 1))
logits.copy_(torch.randn(3, 601, generator=torch.Generator().manual_seed(0)))
target = torch.tensor([0, 600, 300])
near = logits.clone()
close = dict(rtol=1e-5, atol=1e-6)
assert all(torch.allclose(*pair, **close) for pair in zip(row_logp(logits, target), row_logp(near, target)))
ones = torch.ones(3)
assert torch.allclose(row_dlogits_(logits, target, ones, ones), row_dlogits_(near, target, ones, ones), **close)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("change, names", [
    (dict(logits=torch.zeros(3)), r"logits \(3,\) must have 2"),
    (dict(logits=torch.zeros(2, 3, dtype=torch.long)), "logits must hold floating"),
    (dict(target=torch.zeros(3, dtype=torch.long)), r"target \(3,\).*\(2,\)"),
    (dict(target=torch.zeros(2)), "target.*float32.*integers"),
    (dict(target=torch.tensor([0, 3])), r"target 3 must lie in \[0, 3\)"),
    (dict(target=torch.tensor([-1, 0])), "target -1 must lie"),
    (dict(temperature=float("inf")), "temperature inf"),
    (dict(softcap=-1.0), "softcap -1.0"),
    (dict(logits=torch.zeros(2, 3, device="meta")), "target on cpu must be on meta"),
])
def test_what_does_not_fit_is_named(change, names):
    with pytest.raises(ValueError, match=names):
        row_logp(**dict(logits=torch.zeros(2, 3), target=torch.zeros(2, dtype=torch.long)) | change)
