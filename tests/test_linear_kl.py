"""kernels.linear_kl against the definition in fp64."""
import importlib

import pytest
import torch

from kernel_tools import DEVICES, PLAIN, TRITON_DEVICE, WITH_TRITON, assert_equals, error, mostly_slow, rounded
from kernel_tools import with_mistakes
from kernels import linear_kl, linear_kl_reference
from kernels.bench import peak_bytes
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


@PLAIN
def test_two_chunks_of_logits_are_held_and_what_is_computed_takes_their_place():
    N, D, V, chunk = 1024, 8, 1009, 512
    h, weight, h_ref, weight_ref, _ = rounded(problem(N, D, V), torch.float32, "cpu").values()
    h.requires_grad_()

    def step():
        linear_kl(h, weight, h_ref, weight_ref, chunk=chunk).sum().backward()
        h.grad = None

    logits = 2 * 4 * chunk * V
    block = 2**20                       # of rows, of which each pass holds two or three copies
    assert logits < peak_bytes(step) < logits + 3.5 * block


@WITH_TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gradient_takes_the_front_of_each_rows_bytes_and_padding_gets_none(dtype):
    N, V, width = 5, 601, 640
    h, weight, h_ref, weight_ref, _ = problem(N, 6, V).values()
    z = (h @ weight.T).requires_grad_()
    z_ref = h_ref @ weight_ref.T
    eye = torch.eye(V, dtype=torch.float64)
    kl = linear_kl_reference(z, eye, z_ref, eye)
    g = torch.arange(1.0, N + 1)
    wanted = torch.autograd.grad((kl * g).sum(), z)[0]
    logits, logits_ref = torch.full((2, N, width), float("nan"), device=TRITON_DEVICE)
    logits[:, :V] = z.detach()
    logits_ref[:, :V] = z_ref
    statistics = FILE._rows_statistics(logits[:, :V], logits_ref[:, :V], 1.0, None)
    keep = torch.ones(N, dtype=torch.bool, device=TRITON_DEVICE)
    found = FILE._rows_kl_(logits, logits_ref, keep, statistics, 1.0, None, kl.detach().float().to(TRITON_DEVICE),
                           g.to(TRITON_DEVICE), dtype=dtype, vocab=V)
    assert found.data_ptr() == logits.data_ptr() and found.shape == (N, width) and found.dtype == dtype
    assert not found[:, V:].any()
    assert difference(found[:, :V].cpu(), wanted) < {torch.float32: 1e-5, torch.float16: 2e-3}[dtype]


# ---------------------------------------------------------------- planted mistakes, each of which must be seen

FILE = importlib.import_module("kernels.linear_kl")
IN_KERNEL = dict(
    bits_for_nats=("(log_p - log_q) * LN_2", "log_p - log_q"),
    the_references_log_sum_stays_in_nats=("log_s_ref = tl.load(log_sum_ref + row) * LOG2_E",
                                          "log_s_ref = tl.load(log_sum_ref + row)"),
    columns_beyond_the_row_count=("tl.where(inside, tl.exp2(log_q) - p + p * apart, 0.0)",
                                  "tl.exp2(log_q) - p + p * apart"),
    the_other_direction=("tl.exp2(log_q) - p + p * apart", "p - tl.exp2(log_q) - tl.exp2(log_q) * apart"),
    the_gradient_without_the_kl=("upstream * p * (apart - row_kl)", "upstream * p * apart"),
    the_gradient_misses_the_temperature=("upstream = tl.load(g + row) / temperature", "upstream = tl.load(g + row)"),
    the_policys_maximum_for_the_references=("- m_ref) * scale", "- m) * scale"))
IN_PYTORCH = dict(
    the_temperature_counts_twice=("largest = torch_scaled(top, temperature)\n", "largest = top / temperature ** 2\n"),
    the_policys_log_probs_are_used_up=("terms += log_p.sub_(log_q).mul_(p)",
                                       "terms += (log_p.sub_(log_q) + 0 * log_q).mul_(log_p)"),
    the_gradient_without_the_kl=(".sub_(kl[rows, None])", ""),
    the_gradient_stays_elsewhere=("logits[rows] = d  ", "d  "))


def error_with(planted, folder, monkeypatch, device):
    copy = with_mistakes(FILE, planted, folder)
    monkeypatch.setattr(copy, "BLOCK", 64)
    options = dict(temperature=0.7, softcap=6.0)
    given = {**problem(6, 8, 301), **options}
    given = {name: t.float().to(device) if torch.is_tensor(t) and t.is_floating_point() else t
             for name, t in given.items()}
    given["mask"] = given["mask"].to(device)
    wide = {name: t.double().cpu() if torch.is_tensor(t) and t.is_floating_point() else t for name, t in given.items()}
    wide["mask"] = wide["mask"].cpu()
    results = []
    for op, tensors in ((copy.linear_kl, given), (linear_kl_reference, wide)):
        leaves = [tensors[name].requires_grad_() for name in ("h", "weight")]
        kl = op(**tensors)
        upstream = torch.arange(1.0, 7.0, device=kl.device)
        results.append([kl, *torch.autograd.grad((kl * upstream).sum(), leaves)])
    return max(error(x.detach().cpu(), y.detach()) for x, y in zip(*results))


@WITH_TRITON
@pytest.mark.parametrize("planted", mostly_slow(IN_KERNEL))
def test_a_mistake_in_the_kernel_is_caught(planted, tmp_path, monkeypatch):
    assert error_with([planted], tmp_path, monkeypatch, TRITON_DEVICE) > 1e-3


@PLAIN
@pytest.mark.parametrize("planted", IN_PYTORCH.values(), ids=IN_PYTORCH)
def test_a_mistake_in_the_pytorch_form_is_caught(planted, tmp_path, monkeypatch):
    assert error_with([planted], tmp_path, monkeypatch, "cpu") > 1e-3


@DEVICES
def test_without_a_mistake_nothing_is_caught(tmp_path, monkeypatch, device):
    assert error_with([], tmp_path, monkeypatch, device) < 1e-5


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
