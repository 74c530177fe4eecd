"""kernels.linear_logp against the definition in fp64, at odd shapes."""
import importlib

import pytest
import torch

from kernel_tools import DEVICES, IGNORE, PLAIN, TRITON_DEVICE, WITH_TRITON, assert_equals, rounded, with_mistakes
from kernels import linear_kl, linear_logp, linear_logp_reference, linear_policy_loss
from kernels.bench import peak_bytes
from kernels.linear_logp import chunk_rows, padded_on_gpu
from tiny import difference

pytestmark = pytest.mark.usefixtures("blocks")


def problem(N, D, V, seed=0):
    """h, weight, target with the last column and ignored rows in it."""
    torch.manual_seed(seed)
    target = torch.randint(V, (N,))
    target[::5] = V - 1
    target[3::4] = IGNORE
    return dict(h=torch.randn(N, D, dtype=torch.float64), weight=torch.randn(V, D, dtype=torch.float64), target=target)


def reference(chunk=None, **rest):
    return linear_logp_reference(**rest)


@DEVICES
@pytest.mark.parametrize("temperature, softcap", [(1.0, None), (0.6, 7.0)])
@pytest.mark.parametrize("N, D, V, chunk", [(1, 3, 2, None), (7, 5, 11, 3), (13, 8, 601, 4), (5, 32, 123, 2),
                                            (9, 1, 3, 9), (4, 3, 1, 1), (6, 5, 7, 100), (0, 3, 5, None)])
def test_values_and_gradients(N, D, V, chunk, temperature, softcap, device):
    assert_equals(linear_logp, reference, problem(N, D, V), ("h", "weight"), device, temperature=temperature,
                  softcap=softcap, chunk=chunk)


def test_the_reference_is_the_definition():
    h, weight, target = problem(7, 5, 11).values()
    p = (h @ weight.T / 0.6).softmax(-1)
    logp, entropy = linear_logp_reference(h, weight, target, 0.6)
    for row in range(7):
        keep = target[row] != IGNORE
        assert logp[row].item() == pytest.approx(p[row, target[row]].log().item() if keep else 0)
        assert entropy[row].item() == pytest.approx(-(p[row] * p[row].log()).sum().item() if keep else 0)


@DEVICES
def test_ignored_rows_give_zero_and_move_nothing(device):
    h, weight, target = rounded(problem(7, 5, 11), torch.float32, device).values()
    ignored = target == IGNORE
    assert ignored.sum() == 1
    h[ignored] = 1e4                # logits whose exp overflows
    h.requires_grad_()
    weight.requires_grad_()
    logp, entropy = linear_logp(h, weight, target)
    dh, dw = torch.autograd.grad((logp * 2 + entropy).sum(), (h, weight))
    assert not logp[ignored].any() and not entropy[ignored].any() and not dh[ignored].any()
    logp, entropy = linear_logp(h[~ignored], weight, target[~ignored])
    assert difference(torch.autograd.grad((logp * 2 + entropy).sum(), weight)[0], dw) < 1e-6


def test_either_output_alone_has_its_gradient():
    tensors = problem(7, 5, 11)
    leaves = (tensors["h"].requires_grad_(), tensors["weight"].requires_grad_())
    for n in (0, 1):
        given = torch.autograd.grad(linear_logp(**tensors)[n].sum(), leaves)
        wanted = torch.autograd.grad(linear_logp_reference(**tensors)[n].sum(), leaves)
        assert all(difference(*pair) < 1e-12 for pair in zip(given, wanted))


@DEVICES
def test_states_that_are_not_contiguous(device):
    h, weight, target = problem(9, 5, 601).values()
    across = (h.T.contiguous().T.float().to(device), weight.repeat(1, 2)[:, 5:].float().to(device))
    found = linear_logp(*across, target.repeat_interleave(2)[::2].to(device))
    assert difference(torch.stack(found).cpu(), torch.stack(linear_logp_reference(h, weight, target))) < 1e-5


@DEVICES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_give_fp32_log_probs(dtype, device):
    h, weight, target = problem(9, 64, 301).values()
    h, weight = ((t / 4).to(dtype).to(device).requires_grad_() for t in (h, weight))
    target = target.to(device)
    logp, entropy = linear_logp(h, weight, target, chunk=4)
    wide = [t.detach().double().requires_grad_() for t in (h, weight)]
    # Products of halves, added up in fp32: logits rounded to bf16 would be off by 2e-3 here.
    true_logp, true_entropy = linear_logp_reference(*wide, target)
    assert logp.dtype == entropy.dtype == torch.float32
    assert difference(logp, true_logp) < 2e-6 and difference(entropy, true_entropy) < 2e-6
    given = torch.autograd.grad((logp + entropy).sum(), (h, weight))
    wanted = torch.autograd.grad((true_logp + true_entropy).sum(), wide)
    # The gradients come back in the inputs' dtype; on a GPU the d-logits are rounded to it as well.
    assert all(a.dtype == dtype and difference(a, b) < 3 * torch.finfo(dtype).eps for a, b in zip(given, wanted))


@PLAIN
@pytest.mark.parametrize("frozen", [True, False])
def test_one_chunk_of_logits_is_held_and_the_gradient_of_a_head_that_trains(frozen):
    N, D, V, chunk = 256, 16, 5003, 16
    h, weight, target = rounded(problem(N, D, V), torch.float32, "cpu").values()
    h.requires_grad_()
    weight.requires_grad_(not frozen)

    def step():
        logp, entropy = linear_logp(h, weight, target, chunk=chunk)
        (logp.sum() + entropy.sum()).backward()
        h.grad = weight.grad = None

    logits, head = 4 * chunk * V, 0 if frozen else 4 * V * D
    # And what the row kernel holds of it at a time, at most 1 MiB in each of four steps here: all of the chunk.
    assert logits + head < peak_bytes(step) < 5.5 * logits + head < 4 * N * V
    assert (weight.grad is None) and h.grad is None


# ---------------------------------------------------------------- upstream gradients that are known ahead

FILE = importlib.import_module("kernels.linear_logp")

def told_and_plain(op, tensors, g, e, leaves=("h", "weight"), **options):
    """-> outputs and gradients with the upstream gradients told ahead, and without."""
    found = []
    for upstream in ((g, e), None):
        given = {name: t.clone().requires_grad_(name in leaves) for name, t in tensors.items()}
        logp, entropy = op(**given, upstream=upstream, **options)
        loss = (logp * g).sum()
        if e is not None:
            loss = loss + (entropy * e).sum()
        found.append([logp, entropy, *torch.autograd.grad(loss, [given[name] for name in leaves])])
    return found


@DEVICES
@pytest.mark.parametrize("leaves", [("h", "weight"), ("h",), ("weight",)], ids=str)
@pytest.mark.parametrize("N, D, V, chunk, temperature, softcap, with_entropy", [
    (7, 5, 11, 3, 1.0, None, False), (13, 8, 601, 4, 0.6, 7.0, True), (6, 5, 64, None, 1.0, None, True),
    (1, 3, 2, 1, 1.0, None, False), (0, 3, 5, None, 1.0, None, True)])
def test_told_ahead_they_give_the_same_values_and_gradients(N, D, V, chunk, temperature, softcap, with_entropy, leaves,
                                                           device):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tensors = rounded(problem(N, D, V), dtype, device)
        wide = torch.promote_types(dtype, torch.float32)
        g, e = torch.randn(2, N, generator=torch.Generator().manual_seed(1)).to(device, wide)
        told, plain = told_and_plain(linear_logp, tensors, g, e if with_entropy else None, leaves, chunk=chunk,
                                     temperature=temperature, softcap=softcap)
        for one, other in zip(told, plain):
            assert one.dtype == other.dtype and torch.equal(one, other)


@DEVICES
@pytest.mark.parametrize("sent", [
    lambda logp, entropy, g: 2 * (logp * g).sum(), lambda logp, entropy, g: (logp * g).sum() + entropy.sum(),
    lambda logp, entropy, g: (logp * g)[1:].sum(), lambda logp, entropy, g: (logp * g).sum() + 0.01 * logp[2]],
    ids=["twice", "entropy, too", "a token less", "a little more of one"])
def test_a_loss_that_sends_something_else_is_an_error(sent, device):
    if device == "cuda":
        pytest.skip("an assertion on the device ends the process's work there")
    h, weight, target = rounded(problem(7, 5, 11), torch.float32, device).values()
    g = torch.ones(7)
    logp, entropy = linear_logp(h.requires_grad_(), weight, target, upstream=(g, None))
    with pytest.raises(RuntimeError, match="the gradient that the loss sends to .* is not the `upstream`"):
        sent(logp, entropy, g).backward()


def test_what_was_told_may_be_off_by_rounding():
    h, weight, target = rounded(problem(7, 5, 11), torch.float32, "cpu").values()
    g = torch.ones(7)
    logp, _ = linear_logp(h.requires_grad_(), weight, target, upstream=(g, None))
    (logp * (g + 1e-6)).sum().backward()
    assert h.grad.any()


@pytest.mark.parametrize("upstream, names", [
    ((torch.ones(6), None), r"upstream g \(6,\) must have the shape of target, \(7,\)"),
    ((torch.ones(7), torch.ones(1)), r"upstream e \(1,\)"), ((None, torch.ones(7)), "upstream g must be a tensor")])
def test_upstream_gradients_that_do_not_fit_are_named(upstream, names):
    h, weight, target = rounded(problem(7, 5, 11), torch.float32, "cpu").values()
    with pytest.raises(ValueError, match=names):
        linear_logp(h.requires_grad_(), weight, target, upstream=upstream)


TOLD = "dlogits = rows_backward_(logits, target[rows], g[rows], None if e is None else e[rows], entropy[rows], top,"
IN_KNOWN = dict(
    the_entropys_gradient_is_left_out=(TOLD, TOLD.replace("None if e is None else e[rows]", "None")),
    every_chunk_has_the_first_ones_gradients=(TOLD, TOLD.replace("g[rows]", "g[:rows.stop - rows.start]")),
    every_chunk_has_the_first_ones_targets=(TOLD, TOLD.replace("target[rows]", "target[:rows.stop - rows.start]")),
    a_chunk_more_than_once=("gradients.add(rows, dlogits)\n        del logits, dlogits             # before",
                            "gradients.add(rows, 2 * dlogits)\n        del logits, dlogits             # before"))


@PLAIN
@pytest.mark.parametrize("planted", IN_KNOWN.values(), ids=IN_KNOWN)
def test_a_mistake_in_what_is_known_ahead_is_caught(planted, tmp_path):
    op = with_mistakes(FILE, [planted], tmp_path).linear_logp
    tensors = rounded(problem(8, 5, 11), torch.float32, "cpu")
    g, e = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    told, plain = told_and_plain(op, tensors, g, e, chunk=4)
    assert max(difference(*pair) for pair in zip(told, plain)) > 1e-2


# ---------------------------------------------------------------- padding, and rows of a chunk

@WITH_TRITON
def test_where_triton_runs_a_head_is_padded_to_64_with_zeros_and_copied_only_then():
    weight = torch.randn(601, 5, device=TRITON_DEVICE)
    padded = padded_on_gpu(weight)
    assert padded.shape == (640, 5) and torch.equal(padded[:601], weight) and not padded[601:].any()
    fits = torch.randn(128, 5, device=TRITON_DEVICE)
    assert padded_on_gpu(fits) is fits
    double = weight.double()
    assert padded_on_gpu(double) is double              # runs in PyTorch


@PLAIN
def test_on_a_cpu_no_head_is_padded():
    weight = torch.randn(601, 5)
    assert padded_on_gpu(weight) is weight


@WITH_TRITON
@pytest.mark.parametrize("op", [linear_logp, linear_kl, linear_policy_loss], ids=lambda op: op.__name__)
def test_no_product_has_a_vocabulary_that_is_no_multiple_of_64(op, monkeypatch):
    h, weight, target = rounded(problem(9, 5, 601), torch.float32, TRITON_DEVICE).values()
    widths = []

    def recorded(dlogits, *rest, **options):
        widths.append(dlogits.shape[-1])
        return product(dlogits, *rest, **options)

    product = torch.mm
    monkeypatch.setattr(torch, "mm", recorded)
    loss = losses(op, h.requires_grad_(), weight.requires_grad_(), target)
    dh, dw = torch.autograd.grad(loss, (h, weight))
    # Of states of 5 numbers with the head, and of the logits' gradient with it.
    assert set(widths) == {5, 640} and dw.shape == weight.shape


def losses(op, h, weight, target):
    """A scalar of each op with a head."""
    if op is linear_logp:
        return op(h, weight, target)[0].sum()
    if op is linear_kl:
        return op(h, weight, h.detach() * 0.9, weight.detach()).sum()
    row = torch.ones(len(h), device=h.device)
    return op(h, weight, target, None, None, row, target >= 0, 5)[0]


def test_chunks_are_smaller_where_no_dw_is_added_up_over_them():
    cuda = torch.device("cuda")
    assert chunk_rows(cuda, 152064, need_dw=True) == 4096
    assert chunk_rows(cuda, 152064, need_dw=False) == 1024
    cpu = torch.device("cpu")
    assert chunk_rows(cpu, 2**14, need_dw=True) == chunk_rows(cpu, 2**14, need_dw=False) == 1024
    assert chunk_rows(cpu, 2**25, need_dw=True) == 1


@PLAIN
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("op, forward", [(linear_logp, [False]), (linear_kl, [False]), (linear_policy_loss, [])],
                         ids=["linear_logp", "linear_kl", "linear_policy_loss"])
def test_each_pass_says_whether_it_adds_up_a_dw(op, forward, frozen, monkeypatch):
    asked = []

    def recorded(device, vocab, need_dw):
        asked.append(need_dw)
        return 4

    monkeypatch.setattr(FILE, "chunk_rows", recorded)
    h, weight, target = rounded(problem(9, 5, 11), torch.float32, "cpu").values()
    weight.requires_grad_(not frozen)
    losses(op, h.requires_grad_(), weight, target).backward()
    assert asked == [*forward, not frozen]


@pytest.mark.parametrize("change, names", [
    (dict(weight=torch.zeros(5, 4)), r"\(2, 3\).*\(5, 4\)"),
    (dict(h=torch.zeros(2, 3, 3)), r"h \(2, 3, 3\) must have 2"),
    (dict(h=torch.zeros(2, 3, dtype=torch.long)), "h must hold floating"),
    (dict(h=torch.zeros(2, 3).double()), "h torch.float64 and weight torch.float32"),
    (dict(weight=torch.zeros(5, 3, device="meta")), "weight on meta must be on cpu"),
    (dict(target=torch.zeros(3, dtype=torch.long)), r"\(3,\).*\(2,\)"),
    (dict(target=torch.zeros(2, 1, dtype=torch.long)), r"\(2, 1\)"),
    (dict(target=torch.zeros(2)), "float32.*int64"),
    (dict(target=torch.tensor([4, 5])), r"target 5 must lie in \[0, 5\)"),
    (dict(target=torch.tensor([-1, 5])), "target -1 must lie"),
    (dict(temperature=0.0), "temperature 0.0"),
    (dict(temperature=float("nan")), "temperature nan"),
    (dict(temperature=float("inf")), "temperature inf"),
    (dict(softcap=0.0), "softcap 0.0"),
    (dict(chunk=0), "chunk 0"),
])
def test_what_does_not_fit_is_named(change, names):
    good = dict(h=torch.zeros(2, 3), weight=torch.zeros(5, 3), target=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=names):
        linear_logp(**good | change)
