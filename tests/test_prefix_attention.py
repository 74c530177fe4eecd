"""kernels.prefix_attention, two attentions merged, against one softmax over all keys in fp64."""
import inspect

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernel_tools import DEVICES, assert_equals
from kernels import prefix_attention, prefix_attention_reference
from kernels.prefix_attention import masked
from tiny import difference

module = inspect.getmodule(prefix_attention)
NAMES = ("q", "k", "v", "kx", "vx")


def problem(P, G, H, Hk, C, T, K, seed=0):
    """Tensors of NAMES, q and those of the completions laid out as projections leave them."""
    torch.manual_seed(seed)
    q, k, v = (torch.randn(P, G, C, heads, K, dtype=torch.float64).transpose(2, 3) for heads in (H, Hk, Hk))
    kx, vx = (torch.randn(P, T, Hk, K, dtype=torch.float64).transpose(1, 2) for _ in "kv")
    return dict(zip(NAMES, (q, k, v, kx, vx)))


CASES = [
    ((3, 2, 4, 2, 5, 7, 8), [7, 3, 1]), ((2, 3, 3, 3, 6, 4, 16), [4, 4]), ((1, 4, 6, 1, 3, 9, 8), [5]),
    ((2, 2, 2, 2, 1, 5, 8), [5, 2]), ((2, 1, 2, 1, 4, 1, 8), [1, 1]), ((2, 3, 2, 1, 0, 4, 8), [4, 2]),
    ((2, 2, 4, 2, 70, 90, 8), [90, 65]),
]


def test_the_reference_is_the_definition():
    shape, lengths = CASES[0]
    q, k, v, kx, vx = problem(*shape).values()
    found = prefix_attention_reference(q, k, v, kx, vx, lengths)
    P, G, H, C, K = q.shape
    r = H // k.shape[2]
    for p, g, h, c in torch.cartesian_prod(*map(torch.arange, (P, G, H, C))).tolist():
        keys = torch.cat([kx[p, h // r, :lengths[p]], k[p, g, h // r, :c + 1]])
        values = torch.cat([vx[p, h // r, :lengths[p]], v[p, g, h // r, :c + 1]])
        wanted = (keys @ q[p, g, h, c] / K ** 0.5).softmax(0) @ values
        assert difference(found[p, g, h, c], wanted) < 1e-12


@DEVICES
@pytest.mark.parametrize("shape, lengths", CASES)
def test_value_and_gradients(shape, lengths, device):
    assert_equals(prefix_attention, prefix_attention_reference, problem(*shape), NAMES, device, lengths=lengths)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_a_row_may_lie_apart(name):
    shape, lengths = CASES[0]
    tensors = problem(*shape)
    tensors[name] = tensors[name].mT.contiguous().mT
    assert_equals(prefix_attention, prefix_attention_reference, tensors, NAMES, lengths=lengths)


@DEVICES
@pytest.mark.parametrize("shape, lengths", CASES)
def test_the_masked_form(shape, lengths, device):
    assert_equals(masked, prefix_attention_reference, problem(*shape), NAMES, device, lengths=lengths)


@DEVICES
def test_half_precision_is_a_few_roundings_off(device):
    shape, lengths = CASES[-1]
    given = {name: x.to(device, torch.bfloat16).requires_grad_() for name, x in problem(*shape).items()}
    wide = {name: x.detach().cpu().double().requires_grad_() for name, x in given.items()}
    out = prefix_attention(**given, lengths=lengths)
    wanted = prefix_attention_reference(**wide, lengths=lengths)
    assert out.dtype == torch.bfloat16
    assert difference(out.detach().cpu().double(), wanted.detach()) < 2 ** -7
    upstream = torch.randn(wanted.shape, dtype=torch.float64).bfloat16()
    found = torch.autograd.grad(out, list(given.values()), upstream.to(device))
    right = torch.autograd.grad(wanted, list(wide.values()), upstream.double())
    for one, other in zip(found, right):
        assert difference(one.cpu().double(), other) < 2 ** -6


# ---------------------------------------------------------------- the form for CUDA, where there is none

def flash(q, k, v, dropout, causal):
    """What torch's op for CUDA computes, by the one for CPUs: that takes fewer key heads."""
    r = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(r, 1) for x in (k, v))
    return *module._forward_on_cpu(q, k, v, dropout, causal), None, None, q.shape[2], k.shape[2], None, None, None


def flash_backward(g, q, k, v, out, lse, many_q, many_k, max_q, max_k, dropout, causal, seed, offset):
    assert lse.is_contiguous() and (max_q, max_k) == (q.shape[2], k.shape[2])
    Hk = k.shape[1]
    r = q.shape[1] // Hk
    k, v = (x.repeat_interleave(r, 1) for x in (k, v))
    dq, dk, dv = module._backward_on_cpu(g, q, k, v, out, lse, dropout, causal)
    return dq, dk.unflatten(1, (Hk, r)).sum(2), dv.unflatten(1, (Hk, r)).sum(2)


def on_cuda(monkeypatch):
    monkeypatch.setattr(module, "_forward_on_cuda", flash)
    monkeypatch.setattr(module, "_backward_on_cuda", flash_backward)
    monkeypatch.setattr(module, "_forward_cpu", module._forward_cuda)
    monkeypatch.setattr(module, "_backward_cpu", module._backward_cuda)


@pytest.mark.parametrize("shape, lengths", CASES)
def test_the_form_for_cuda(shape, lengths, monkeypatch):
    on_cuda(monkeypatch)
    assert_equals(prefix_attention, prefix_attention_reference, problem(*shape), NAMES, lengths=lengths)


def test_the_form_for_cuda_calls_torchs_ops_as_they_are_declared(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    with FakeTensorMode():
        q, k, v, kx, vx = (torch.empty(x.shape, dtype=torch.bfloat16, device="cuda") for x in
                           problem(3, 2, 4, 2, 5, 7, 8).values())
        assert module.has_flash(q) and not module.has_flash(q.float()) and not module.has_flash(q[..., :4])
        out, lse = module._empty(q)
        module._forward_cuda(q, k, v, kx, vx, [7, 3, 1], out, lse)
        gradients = [torch.empty_like(x) for x in (q, k, v, kx, vx)]
        module._backward_cuda(out, q, k, v, kx, vx, [7, 3, 1], out, lse, *gradients)


# ---------------------------------------------------------------- what is never allocated

class Largest(TorchDispatchMode):
    """Entries of the largest storage that any operation inside makes."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.entries = max(self.entries, x.untyped_storage().nbytes() // x.element_size())
        return out


def largest(run, tensors, lengths):
    """Of value and gradient."""
    with Largest() as seen:
        given = {name: x.requires_grad_() for name, x in tensors.items()}
        out = run(**given, lengths=lengths)
        torch.autograd.grad(out.sum(), list(given.values()))
    return seen.entries


@pytest.mark.parametrize("form", ["cpu", "cuda"])
def test_no_mask_of_all_keys_and_no_repeated_key_is_ever_allocated(form, monkeypatch):
    P, G, H, Hk, C, T, K = shape = 2, 8, 4, 2, 8, 300, 8
    lengths = [300, 200]

    class Plain(torch.autograd.Function):       # the op, its inside open to the mode above
        @staticmethod
        def forward(ctx, *inputs):
            tensors = inputs[:5]
            out, lse = module._empty(tensors[0])
            getattr(module, f"_forward_{form}")(*tensors, lengths, out, lse)
            ctx.save_for_backward(*tensors, out, lse)
            return out

        @staticmethod
        def backward(ctx, g):
            *tensors, out, lse = ctx.saved_tensors
            gradients = [torch.empty_like(x) for x in tensors]
            getattr(module, f"_backward_{form}")(g, *tensors, lengths, out, lse, *gradients)
            return *gradients, None

    if form == "cuda":
        monkeypatch.setattr(module, "_forward_on_cuda", lambda q, k, v, *rest: (torch.zeros_like(q), q[..., 0] * 0))
        monkeypatch.setattr(module, "_backward_on_cuda", lambda g, q, k, v, *rest: (q * 0, k * 0, v * 0))
    mask = P * G * C * (T + C)
    keys = P * G * Hk * (T + C) * K
    used = largest(lambda q, k, v, kx, vx, lengths: Plain.apply(q, k, v, kx, vx, lengths), problem(*shape), lengths)
    assert used <= max(P * G * H * C * K, P * Hk * T * K) < mask < keys
    assert largest(masked, problem(*shape), lengths) >= keys           # which does, and is seen


# ---------------------------------------------------------------- planted mistakes and bad input

PLANTS = [
    ("torch.logaddexp(lse_x, lse_y, out=lse)", "lse.copy_(lse_y)"),
    ("torch.logaddexp(lse_x, lse_y, out=lse)", "lse.copy_(torch.maximum(lse_x, lse_y))"),
    ("share_x = (lse_x - lse)", "share_x = (lse - lse_x)"),
    ("torch.mul(out_x, share_x, out=out)", "out.copy_(out_x)"),
    ("slot >= length[:, None]", "slot > length[:, None]"),
    ("if min(lengths) == T:", "if max(lengths) == T:"),
    ("x.transpose(1, 2).transpose(2, 3).flatten(2, 4)", "x.transpose(1, 2).flatten(2, 4)"),
    ("flatten(0, 1), k, v, 0.0, True)", "flatten(0, 1), k, v, 0.0, False)"),
    ("mine = slice(head, None, r)", "mine = slice(head * H // r, (head + 1) * H // r)"),
    ("torch.add(dq_x[:, :, mine], dq_y, out=dq[:, :, mine])", "dq[:, :, mine] = dq_y"),
    ("            dk_sum += dk_y\n", "            dk_sum = dk_y\n"),
    ("            dv_sum += dv_y\n", ""),
    ("(_as_prompt_queries(t, Hk) for t in (g, q, out, lse))", "(_as_prompt_queries(t, Hk) for t in (g, q, g, lse))"),
    ("dkx.copy_(found[1])", "dkx.copy_(found[1] * 0)"),
    ("found = _backward_on_cpu(gx, qx, kx, vx, out_x, lse_x, 0.0, False, attn_mask=mask)",
     "found = _backward_on_cpu(gx, qx, kx, vx, *_forward_on_cpu(qx, kx, vx, 0.0, False, attn_mask=mask), 0.0, False, "
     "attn_mask=mask)"),
]


def worst(forward, backward, tensors, lengths, reference):
    wide = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    wanted = reference(**wide, lengths=lengths)
    g = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    right = torch.autograd.grad(wanted, list(wide.values()), g)
    out, lse = module._empty(tensors["q"])
    forward(*tensors.values(), lengths, out, lse)
    found = [torch.empty_like(x) for x in tensors.values()]
    backward(g, *tensors.values(), lengths, out, lse, *found)
    return max(difference(one, other) for one, other in zip([out, *found], [wanted.detach(), *right]))


@pytest.mark.parametrize("old, new", PLANTS)
def test_a_planted_mistake_is_caught(old, new):
    source = inspect.getsource(module).partition("- op\n")[0]
    assert source.count(old) >= 1
    scope = {}
    exec(compile(source.replace(old, new), "planted", "exec"), scope)
    shape, lengths = CASES[0]
    tensors = problem(*shape)
    assert worst(module._forward_cpu, module._backward_cpu, tensors, lengths, prefix_attention_reference) < 1e-12
    assert worst(scope["_forward_cpu"], scope["_backward_cpu"], tensors, lengths, prefix_attention_reference) > 1e-3


@pytest.mark.parametrize("change, message", [
    (dict(lengths=[8, 3, 1]), r"lengths \[8, 3, 1\] must be 3 numbers in \[1, 7\]"),
    (dict(lengths=[7, 3]), r"lengths \[7, 3\] must be 3 numbers"),
    (dict(k=torch.zeros(3, 2, 2, 4, 8, dtype=torch.float64)), r"k \(3, 2, 2, 4, 8\) .* must be \(3, 2, 2, 5, 8\)"),
    (dict(vx=torch.zeros(3, 2, 7, 8)), r"vx \(3, 2, 7, 8\) torch.float32 must be"),
    (dict(q=torch.zeros(3, 2, 3, 5, 8, dtype=torch.float64)), "q's 3 heads must be a multiple of kx's 2"),
])
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        prefix_attention(**problem(*CASES[0][0]) | dict(lengths=CASES[0][1]) | change)
