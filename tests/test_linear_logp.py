"""kernels.linear_logp against the textbook in fp64, at odd shapes."""
import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import linear_logp, linear_logp_reference
from tiny import difference

module = importlib.import_module("kernels.linear_logp")     # the package's attribute of that name is the function
IGNORE = -100


def problem(N, D, V, dtype=torch.float64, seed=0):
    """h, weight, target with the last column and ignored rows in it, and an upstream gradient for each output."""
    torch.manual_seed(seed)
    target = torch.randint(V, (N,))
    target[::5] = V - 1
    target[3::4] = IGNORE
    h, weight = torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    return h.requires_grad_(), weight.requires_grad_(), target, torch.randn(N, dtype=dtype), torch.randn(N, dtype=dtype)


def textbook(h, weight, target, temperature=1.0):
    """In fp64: (logp, entropy), each (N,)."""
    logp = (h.double() @ weight.double().T / temperature).log_softmax(-1)
    rows = [(row[t], -(row.exp() * row).sum()) if t != IGNORE else (row[0] * 0, row[0] * 0)
            for row, t in zip(logp, target)]
    return tuple(torch.stack(column) for column in zip(*rows))


def all_of(op, h, weight, target, g, e, *options):
    """Both outputs and both gradients, under the loss sum(g logp + e entropy)."""
    logp, entropy = op(h, weight, target, *options)
    grads = torch.autograd.grad((g * logp).sum() + (e * entropy).sum(), (h, weight))
    return dict(logp=logp.detach(), entropy=entropy.detach(), dh=grads[0], dw=grads[1])


class Shapes(TorchDispatchMode):
    """Shapes of every tensor that is made while it is on."""

    def __enter__(self):
        self.seen = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen += [tuple(t.shape) for t in (out if isinstance(out, (tuple, list)) else [out])
                      if isinstance(t, torch.Tensor)]
        return out


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("N, D, V, chunk", [(1, 3, 2, None), (7, 5, 11, 3), (13, 8, 101, 4), (5, 123, 123, 2),
                                            (9, 1, 3, 9), (4, 3, 1, 1), (6, 5, 7, 100)])
def test_value_and_gradients_equal_the_textbook(N, D, V, chunk, temperature):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        h, weight, target, g, e = problem(N, D, V, dtype)
        given = all_of(linear_logp, h, weight, target, g, e, temperature, IGNORE, chunk)
        assert difference(given, all_of(textbook, h, weight, target, g, e, temperature)) < tolerance
        assert given["logp"].dtype == given["entropy"].dtype == dtype


def test_the_reference_equals_the_textbook():
    h, weight, target, g, e = problem(7, 5, 11, torch.float32)
    assert difference(all_of(linear_logp_reference, h, weight, target, g, e, 0.6),
                      all_of(textbook, h, weight, target, g, e, 0.6)) < 1e-5


def test_ignored_rows_give_zero_and_move_nothing():
    h, weight, target, g, e = problem(7, 5, 11)
    given = all_of(linear_logp, h, weight, target, g, e)
    ignored = target == IGNORE
    assert ignored.sum() == 1
    for name in ("logp", "entropy", "dh"):
        assert not given[name][ignored].any()
    kept = [tensor[~ignored] for tensor in (h, target, g, e)]
    assert difference(all_of(linear_logp, kept[0], weight, *kept[1:])["dw"], given["dw"]) < 1e-12


def test_the_chunk_size_changes_nothing():
    h, weight, target, g, e = problem(7, 5, 11)
    whole = all_of(linear_logp, h, weight, target, g, e, 1.0, IGNORE, 7)
    for chunk in (1, 2, 3, 6):
        assert difference(all_of(linear_logp, h, weight, target, g, e, 1.0, IGNORE, chunk), whole) < 1e-14


def test_bfloat16_states_give_fp32_log_probs():
    h, weight, target, _, _ = problem(7, 64, 11, torch.float32)
    h, weight = h.detach().bfloat16(), weight.detach().bfloat16()
    logp, entropy = linear_logp(h, weight, target)
    # Products of bf16 numbers, added up in fp32: logits rounded to bf16 would be off by 2e-3 here.
    z = h.double() @ weight.double().T
    kept = target != IGNORE
    wanted = z.log_softmax(-1)[kept, target[kept]]
    assert logp.dtype == entropy.dtype == torch.float32 and difference(logp[kept], wanted) < 1e-6


def test_no_rows_give_no_rows():
    h, weight = torch.zeros(0, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    logp, entropy = linear_logp(h, weight, torch.zeros(0, dtype=torch.long))
    (logp.sum() + entropy.sum()).backward()
    assert logp.shape == entropy.shape == (0,) and h.grad.shape == (0, 3) and not weight.grad.any()


def test_entropy_keeps_its_digits_at_large_logits():
    # z = k/4 + 200 or k/4 - 200: exact in fp32, so whatever error is left is the formula's.
    V = 9
    weight = torch.stack([torch.arange(V) / 4, torch.full((V,), 200.0)], dim=1)
    h = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]])
    logp, entropy = linear_logp(h, weight, torch.tensor([0, V - 1, 4]))
    true_logp, true_entropy = textbook(h, weight, torch.tensor([0, V - 1, 4]))
    assert difference(entropy, true_entropy) < 3e-7 and difference(logp, true_logp) < 3e-7
    z = h @ weight.T
    loses_digits = z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)
    assert difference(loses_digits, true_entropy) > 3e-6


def test_a_nearly_certain_target_keeps_its_gradient():
    # With the identity as head, h are the logits and dh is dz = onehot - p. p = 0.99: two digits cancel in fp32.
    V, p = 5, 0.99
    h = torch.zeros(1, V)
    h[0, V - 1] = torch.tensor(p * (V - 1) / (1 - p)).log()
    h.requires_grad_()
    linear_logp(h, torch.eye(V), torch.tensor([V - 1]))[0].sum().backward()
    wanted = torch.tensor([[-(1 - p) / (V - 1)] * (V - 1) + [1 - p]])
    assert ((h.grad - wanted) / wanted).abs().max() < 2e-5


def test_a_certain_target_gives_zero_gradient_and_no_nan():
    h = torch.tensor([[0.0, 0.0, 200.0]], requires_grad=True)
    logp, entropy = linear_logp(h, torch.eye(3), torch.tensor([2]))
    (logp + entropy).sum().backward()
    assert logp.item() == entropy.item() == 0 and not h.grad.any()


@pytest.mark.parametrize("chunk", [4, None])
def test_never_more_than_a_chunk_of_logits(chunk, monkeypatch):
    N, D, V = 13, 3, 101
    monkeypatch.setattr(module, "CPU_CHUNK_BYTES", 4 * V * 4 + 5)       # four rows of fp32
    h, weight, target, g, e = problem(N, D, V, torch.float32)
    with Shapes() as shapes:
        all_of(linear_logp, h, weight, target, g, e, 1.0, IGNORE, chunk)
    rows = [shape[0] for shape in shapes.seen if len(shape) == 2 and shape[1] == V]
    assert max(rows) == 4


def test_a_frozen_head_holds_no_gradient_buffer():
    for frozen in (True, False):
        h, weight, target, g, e = problem(13, 3, 101)
        logp, entropy = linear_logp(h, weight.requires_grad_(not frozen), target)
        with Shapes() as shapes:
            ((g * logp).sum() + (e * entropy).sum()).backward()
        assert ((101, 3) in shapes.seen) == (not frozen)
        assert (weight.grad is None) == frozen and h.grad is not None


@pytest.mark.parametrize("h, weight, target, temperature, names", [
    ((2, 3), (5, 4), (2,), 1.0, r"\(2, 3\).*\(5, 4\)"),
    ((2, 3, 3), (5, 3), (2,), 1.0, r"\(N, D\)"),
    ((2, 3), (5, 3), (3,), 1.0, r"\(3,\).*\(2,\)"),
    ((2, 3), (5, 3), (2, 1), 1.0, r"\(2, 1\)"),
    ((2, 3), (5, 3), (2,), 0.0, "temperature 0.0"),
    ((2, 3), (5, 3), (2,), float("nan"), "temperature nan"),
])
def test_shapes_that_do_not_fit_are_named(h, weight, target, temperature, names):
    with pytest.raises(ValueError, match=names):
        linear_logp(torch.zeros(h), torch.zeros(weight), torch.zeros(target, dtype=torch.long), temperature)
