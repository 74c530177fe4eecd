"""kernels.gae against its recurrence a row at a time, and hand-worked numbers."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_tools import DEVICES, assert_equals
from kernels import gae, gae_reference


def problem(B, T, seed=0, bootstrap=True):
    """Masks ragged on the right, with holes, and a row without any step; what stands outside them is far off."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(B, T, dtype=torch.float64, generator=generator)
    values = torch.randn(B, T, dtype=torch.float64, generator=generator)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=generator)
    mask &= torch.rand(B, T, generator=generator) < 0.8
    mask[-1] = B == 1
    rewards = rewards.masked_fill(~mask, 1e6)
    values = values.masked_fill(~mask, float("nan"))
    last = torch.randn(B, dtype=torch.float64, generator=generator) if bootstrap else None
    return dict(rewards=rewards, values=values, mask=mask, bootstrap=last)


def test_by_hand():
    # gamma 1/2, lam 1/2. Row 0: steps at 0, 1, 3, the hole at 2 is passed over; row 1 is cut off before a value of 8.
    rewards = torch.tensor([[0.0, 0, 9, 1], [0, 4, 9, 9]])
    values = torch.tensor([[2.0, 4, 9, 2], [2, 4, 9, 9]])
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0]]).bool()
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5, torch.tensor([0.0, 8.0]))
    # Row 0: A3 = 1 - 2 = -1; A1 = 0 + 2/2 - 4 - 1/4 = -3.25; A0 = 0 + 4/2 - 2 - 3.25/4.
    assert advantages.tolist() == [[-0.8125, -3.25, 0, -1], [0 + 2 - 2 + 4 / 4, 4 + 4 - 4, 0, 0]]
    assert returns.tolist() == [[1.1875, 0.75, 0, 1], [3, 8, 0, 0]]


@DEVICES
@pytest.mark.parametrize("B, T, bootstrap", [(4, 1, True), (3, 128, True), (2, 130, False), (3, 77, True),
                                             (1, 2, False)])
def test_equals_the_recurrence(B, T, bootstrap, device, blocks):
    assert_equals(gae, gae_reference, problem(B, T, bootstrap=bootstrap), (), device, gamma=0.97, lam=0.9)


@DEVICES
@settings(max_examples=10, deadline=None)
@given(B=st.integers(1, 4), T=st.integers(1, 20), seed=st.integers(0, 2**31),
       gamma=st.sampled_from([0.0, 0.5, 1.0]), lam=st.sampled_from([0.0, 0.3, 1.0]))
def test_equals_the_recurrence_whatever_the_mask(device, B, T, seed, gamma, lam):
    assert_equals(gae, gae_reference, problem(B, T, seed), (), device, gamma=gamma, lam=lam)


@DEVICES
def test_lambda_zero_is_the_td_error_and_lambda_one_the_return_less_the_value(device):
    rewards, values = (torch.randn(3, 9, device=device) for _ in range(2))
    mask = torch.ones(3, 9, dtype=torch.bool, device=device)
    following = torch.cat([values[:, 1:], torch.zeros(3, 1, device=device)], 1)
    assert torch.allclose(gae(rewards, values, mask, 0.9, 0.0)[0], rewards + 0.9 * following - values, atol=1e-5)
    to_come = [sum(0.9 ** k * rewards[:, t + k] for k in range(9 - t)) for t in range(9)]
    assert torch.allclose(gae(rewards, values, mask, 0.9, 1.0)[1], torch.stack(to_come, 1), atol=1e-5)


def test_no_rows_and_no_steps():
    for shape in ((0, 4), (3, 0)):
        out = gae(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape).bool(), 1.0, 1.0)
        assert [t.shape for t in out] == [shape, shape]


@pytest.mark.parametrize("options, names", [
    (dict(values=torch.zeros(3)), r"values \(3,\) must have 2"),
    (dict(rewards=torch.zeros(2, 4)), r"rewards \(2, 4\) must have the shape of values, \(2, 3\)"),
    (dict(rewards=torch.zeros(2, 3).double()), "rewards torch.float64 must be torch.float32"),
    (dict(mask=torch.zeros(3, 2)), r"mask \(3, 2\)"),
    (dict(bootstrap=torch.zeros(3)), r"bootstrap \(3,\) must be \(2,\)"),
    (dict(gamma=1.5), "gamma 1.5"), (dict(lam=-0.1), "lam -0.1")])
def test_what_does_not_fit_is_named(options, names):
    good = dict(rewards=torch.zeros(2, 3), values=torch.zeros(2, 3), mask=torch.ones(2, 3), gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match=names):
        gae(**good | options)
