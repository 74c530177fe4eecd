"""kernels.sample: frequencies against the distribution it should draw from, at fixed seeds; truncation by hand."""
import pytest
import torch

from kernel_tools import DEVICES, PLAIN
from kernels import sample
from kernels.backend import INTERPRET
from tiny import difference

pytestmark = pytest.mark.usefixtures("blocks")
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5])


def ban(size, *tokens):
    return torch.zeros(size, dtype=torch.bool).index_fill(0, torch.tensor(tokens), True)


def draw(logits, n, device="cpu", seed=0, **options):
    generator = torch.Generator(device).manual_seed(seed)
    options = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    return tuple(t.cpu() for t in sample(logits.expand(n, -1).to(device), generator, **options))


def chi_square(token, expected):
    """Of 5 values with 4 degrees of freedom: 18.5 is passed by chance once in a thousand."""
    count = torch.bincount(token, minlength=len(expected))
    inside = expected > 0
    assert not count[~inside].any()
    wanted = expected[inside] * len(token)
    return ((count[inside] - wanted) ** 2 / wanted).sum().item()


@PLAIN
@DEVICES
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_at_the_temperature(temperature, device):
    token, logp, truncated = draw(LOGITS, 20_000, device, temperature=temperature)
    expected = (LOGITS / temperature).softmax(-1)
    assert chi_square(token, expected) < 18.5
    assert chi_square(token, (LOGITS / temperature / 1.2).softmax(-1)) > 50         # a fifth off is seen
    assert difference(logp, expected.log()[token]) < 1e-6 and difference(truncated, logp) < 1e-6


@DEVICES
@pytest.mark.parametrize("options, left", [
    (dict(banned=ban(5, 0)), [1, 2, 3, 4]), (dict(top_k=2), [0, 4]), (dict(top_k=9), [0, 1, 2, 3, 4]),
    # p = .463, .170, .063, .023, .281: two reach .744.
    (dict(top_p=0.7), [0, 4]), (dict(top_p=0.74), [0, 4]), (dict(top_p=0.75), [0, 1, 4]), (dict(top_p=1e-9), [0]),
    # Of three the first two reach .547 + .331 = .878.
    (dict(top_k=3, top_p=0.9, banned=ban(5, 0)), [1, 2, 4]),
    (dict(top_k=3, top_p=0.87, banned=ban(5, 0)), [1, 4])], ids=str)
def test_what_is_left_keeps_its_proportions(options, left, device):
    token, logp, truncated = draw(LOGITS, 40 if INTERPRET else 300, device, **options)
    expected = torch.zeros(5)
    expected[left] = LOGITS[left].softmax(-1)
    assert set(token.tolist()) <= set(left) and chi_square(token, expected) < 18.5
    assert difference(truncated.exp(), expected[token]) < 1e-5
    assert difference(logp, LOGITS.log_softmax(-1)[token]) < 1e-6


@DEVICES
@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_uniform_still_sample_an_allowed_token(u, device, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, device, **kind: torch.full(shape, u, dtype=torch.float64,
                                                                               device=device))
    logits = torch.randn(6, 700, generator=torch.Generator().manual_seed(0))
    token, logp, _ = sample(logits.to(device), banned=ban(700, 0, 1, 699).to(device))
    # Sums of fp32 probabilities lie on both sides of 1.
    assert (token == (2 if u == 0 else 698)).all() and logp.isfinite().all()


@DEVICES
def test_greedy_takes_the_largest_allowed_and_reports_temperature_one(device):
    logits = torch.tensor([[2.0, 1.0, 3.0], [0.0, 5.0, -1.0]]).to(device)
    token, logp, truncated = sample(logits, temperature=0, banned=ban(3, 2).to(device))
    assert token.tolist() == [0, 1]
    assert difference(logp, logits.log_softmax(-1)[[0, 1], [0, 1]]) < 1e-6
    assert difference(truncated, logits[:, :2].log_softmax(-1)[[0, 1], [0, 1]]) < 1e-6


@DEVICES
def test_a_tie_with_the_floor_stays(device):
    token, _, _ = draw(torch.tensor([1.0, 1.0, 1.0, 0.0]), 30, device, top_k=2)
    assert set(token.tolist()) == {0, 1, 2}


@DEVICES
def test_the_same_uniform_numbers_give_the_same_tokens_as_fp64(device):
    # fp64 runs the PyTorch form, whatever draws fp32.
    logits = 3 * torch.randn(24, 601, generator=torch.Generator().manual_seed(0))
    options = dict(temperature=0.8, top_k=300, top_p=0.95, banned=ban(601, 5, 600).to(device))
    found = [sample(logits.to(device, dtype), torch.Generator(device).manual_seed(1), **options)
             for dtype in (torch.float32, torch.float64)]
    assert torch.equal(found[0].token, found[1].token)
    assert difference(found[0].logp, found[1].logp) < 1e-5
    assert difference(found[0].truncated_logp, found[1].truncated_logp) < 1e-5


def test_any_leading_shape():
    out = sample(torch.zeros(2, 3, 7), torch.Generator().manual_seed(0))
    assert [t.shape for t in out] == [(2, 3)] * 3
    assert [t.shape for t in sample(torch.zeros(0, 3, 7))] == [(0, 3)] * 3


@pytest.mark.parametrize("options, names", [
    (dict(logits=torch.zeros(2, 3, dtype=torch.long)), "logits must hold floating"),
    (dict(temperature=-1), "temperature -1"),
    (dict(temperature=float("nan")), "temperature nan"), (dict(top_k=-1), "top_k -1"), (dict(top_p=0.0), "top_p 0.0"),
    (dict(banned=ban(4, 0)), r"banned \(4,\) torch.bool must be \(3,\)")])
def test_what_does_not_fit_is_named(options, names):
    with pytest.raises(ValueError, match=names):
        sample(**dict(logits=torch.zeros(2, 3)) | options)
