"""kernels.row_logp and row_dlogits_ against the textbook in fp64."""
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch.utils._python_dispatch import TorchDispatchMode

from kernel_tools import DEVICES, IGNORE, NEEDS_GPU, TRITON_DEVICE, WITH_TRITON, assert_equals, error, mostly_slow
from kernel_tools import with_mistakes
from kernels import row_dlogits_, row_logp, row_logp_reference
from kernels.backend import assert_targets
from kernels.row_logp import rows_backward_, rows_forward
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


# ---------------------------------------------------------------- targets, without a host synchronisation

class Calls(TorchDispatchMode):
    """The names of the aten operations that run."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.names.append(function.__name__)
        return function(*arguments, **(named or {}))

    def __enter__(self):
        self.names = []
        return super().__enter__()


@pytest.mark.parametrize("target", [[0, 7], [-1, 6], [-100, 2**40]])
def test_the_assertion_on_the_device_names_what_targets_may_be(target):
    # torch asserts asynchronously on CUDA and at once on a CPU, by one operation.
    with pytest.raises(RuntimeError, match=r"every target must lie in \[0, 7\) or be ignore_index -100"):
        assert_targets(torch.tensor(target), 7, IGNORE)


def test_the_assertion_on_the_device_reads_no_number_back():
    with Calls() as calls:
        assert_targets(torch.tensor([0, 6, IGNORE]), 7, IGNORE)
    assert "_assert_async.msg" in calls.names
    assert not [name for name in calls.names if name.startswith(("_local_scalar_dense", "item", "_to_copy"))]


@NEEDS_GPU
def test_on_a_gpu_no_call_waits_for_it():
    logits = torch.randn(5, 601, device="cuda", requires_grad=True)
    target = torch.tensor([0, 600, IGNORE, 3, 4], device="cuda")
    row_logp(logits, target)                            # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        logp, entropy = row_logp(logits, target)
        (logp + entropy).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------- a gradient narrower than its logits, and padding

@WITH_TRITON
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("V, width", [(601, 640), (601, 601), (256, 320), (3, 64)])
def test_a_narrow_gradient_takes_the_front_of_each_rows_bytes_and_padding_gets_none(V, width, dtype):
    tensors = problem(9, V, scale=2)
    target = tensors["target"].to(TRITON_DEVICE)
    padded = torch.full((9, width), float("nan"), device=TRITON_DEVICE)
    padded[:, :V] = tensors["logits"]
    g, e = torch.randn(2, 9, generator=torch.Generator().manual_seed(1)).to(TRITON_DEVICE)
    leaf = padded[:, :V].double().cpu().requires_grad_()
    logp, entropy = row_logp_reference(leaf, target.cpu())
    wanted = torch.autograd.grad((g.cpu() * logp + e.cpu() * entropy).sum(), leaf)[0]
    _, *statistics = rows_forward(padded[:, :V], target, 1.0, None, IGNORE)
    found = rows_backward_(padded, target, g, e, *statistics, 1.0, None, IGNORE, dtype=dtype, vocab=V)
    assert found.data_ptr() == padded.data_ptr() and found.shape == (9, width) and found.dtype == dtype
    assert not found[:, V:].any()
    # The interpreter cuts digits off where a GPU rounds.
    assert difference(found[:, :V].cpu(), wanted) < 2 * torch.finfo(dtype).eps


@WITH_TRITON
def test_the_kernels_lose_no_digits_to_a_temperature():
    # Logits whose differences are exact: quotients near 300 would be off by 3e-5.
    logits = torch.arange(9.0)[None] / 4 + 200
    target = torch.tensor([3], device=TRITON_DEVICE)
    found = row_logp(logits.to(TRITON_DEVICE), target, 0.7)
    wanted = row_logp_reference(logits.double(), target.cpu(), 0.7)
    assert difference(torch.stack(found).cpu(), torch.stack(wanted)) < 5e-7


# ---------------------------------------------------------------- planted mistakes, each of which must be seen

FILE = importlib.import_module("kernels.row_logp")
IN_KERNELS = dict(
    a_lane_adds_to_a_sum_under_another_maximum=("s = tl.where(grows, e * s + 1.0, s + e)", "s = s + e"),
    no_rescaling_of_the_entropys_sum=("u = tl.where(grows, e * (u - above * s),", "u = tl.where(grows, u,"),
    a_new_maximum_forgets_how_far_it_moved=("e * (u - above * s)", "e * u"),
    lanes_merge_without_rescaling=("u = tl.sum(share * (u + below * s), 0)", "u = tl.sum(share * u, 0)"),
    lanes_merge_sums_of_other_maxima=("s = tl.sum(share * s, 0)", "s = tl.sum(s, 0)"),
    a_maximum_that_starts_at_minus_infinity=("tl.full((BLOCK,), -1e30,", "tl.full((BLOCK,), float('-inf'),"),
    columns_beyond_the_row_count=("tl.where(column < V, x, float(\"-inf\"))", "x"),
    base_e_for_base_2=("    scale = LOG2_E / temperature\n    m = tl.load",
                       "    scale = 1 / temperature\n    m = tl.load"),
    the_log_sum_stays_in_nats=("log_s = tl.load(log_sum + row) * LOG2_E", "log_s = tl.load(log_sum + row)"),
    the_entropy_stays_in_nats=("h = tl.load(entropy + row) * LOG2_E", "h = tl.load(entropy + row)"),
    the_entropys_gradient_stays_in_bits=(" / temperature * LN_2", " / temperature"),
    the_entropy_misses_the_temperature=("tl.log(s) - u / s / temperature", "tl.log(s) - u / s"),
    the_temperature_counts_twice=("tl.store(top + row, largest)", "tl.store(top + row, largest / temperature)"))


@WITH_TRITON
@pytest.mark.parametrize("planted", mostly_slow(IN_KERNELS))
def test_a_mistake_in_the_kernels_is_caught(planted, tmp_path, monkeypatch):
    assert error_with([planted], tmp_path, monkeypatch) > 1e-3


@WITH_TRITON
def test_without_a_mistake_nothing_is_caught(tmp_path, monkeypatch):
    assert error_with([], tmp_path, monkeypatch) < 1e-5


def error_with(planted, folder, monkeypatch):
    copy = with_mistakes(FILE, planted, folder)
    monkeypatch.setattr(copy, "BLOCK", 64)
    tensors = problem(5, 601)
    given = tensors["logits"].float().to(TRITON_DEVICE).requires_grad_()
    wide = given.detach().cpu().double().requires_grad_()
    found = copy.row_logp(given, tensors["target"].to(TRITON_DEVICE), 0.7, 20.0)
    wanted = row_logp_reference(wide, tensors["target"], 0.7, 20.0)
    found = [*found, *torch.autograd.grad(found[0].sum() + 2 * found[1].sum(), given)]
    wanted = [*wanted, *torch.autograd.grad(wanted[0].sum() + 2 * wanted[1].sum(), wide)]
    return max(error(x.detach().cpu(), y.detach()) for x, y in zip(found, wanted))


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
