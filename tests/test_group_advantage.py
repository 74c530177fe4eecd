"""kernels.group_advantage against numpy and hand-worked numbers."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_tools import DEVICES, assert_equals
from kernels import group_advantage, group_advantage_reference, is_flat
from tiny import difference

KINDS = pytest.mark.parametrize("std, baseline", [(std, baseline) for std in ("group", "batch", "none")
                                                  for baseline in ("mean", "leave_one_out")])


def with_numpy(rewards, std, baseline, eps):
    r = np.asarray(rewards, dtype=np.float64)
    G = r.shape[1]
    if baseline == "mean":
        expected = r.mean(1, keepdims=True)
    else:
        expected = (r.sum(1, keepdims=True) - r) / (G - 1)
    scale = {"group": r.std(1, ddof=1, keepdims=True) + eps, "batch": r.std(ddof=1) + eps, "none": 1.0}[std]
    flat = r.max(1, keepdims=True) == r.min(1, keepdims=True)
    return torch.from_numpy(np.where(flat, 0.0, (r - expected) / scale))


def test_by_hand():
    # Mean 1/2, deviations +-1/2, variance 4 (1/4) / 3 = 1/3: advantage +- sqrt(3) / 2.
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 3.0]], dtype=torch.float64)
    wanted = [math.sqrt(3) / 2 * sign for sign in (1, -1, -1, 1)]
    assert group_advantage(rewards, eps=0.0)[0].tolist() == pytest.approx(wanted)
    assert group_advantage(rewards, eps=0.0)[1].tolist() == pytest.approx(wanted)
    assert group_advantage(rewards, "none").tolist() == [[0.5, -0.5, -0.5, 0.5], [1, -1, -1, 1]]
    assert group_advantage(rewards, "none", "leave_one_out")[0].tolist() == pytest.approx([2/3, -2/3, -2/3, 2/3])


@KINDS
@DEVICES
@settings(max_examples=10, deadline=None)
@given(P=st.integers(1, 5), G=st.integers(2, 9), seed=st.integers(0, 2**31))
def test_equals_numpy_and_the_reference(std, baseline, device, P, G, seed):
    rewards = torch.randint(0, 4, (P, G), generator=torch.Generator().manual_seed(seed)).double() / 3
    assert_equals(group_advantage, group_advantage_reference, dict(rewards=rewards), (), device, std=std,
                  baseline=baseline)
    assert difference(group_advantage(rewards, std, baseline), with_numpy(rewards, std, baseline, 1e-6)) < 1e-12


@KINDS
@DEVICES
@pytest.mark.parametrize("G", [2, 3, 8])
def test_identical_rewards_give_exactly_zero(std, baseline, G, device):
    rewards = torch.tensor([0.7, 0.1 + 0.2, 1.1, 1e-8, -3.3, 12345.678], dtype=torch.float64)[:, None].expand(6, G)
    for dtype in (torch.float32, torch.float64):
        assert not group_advantage(rewards.to(device, dtype), std, baseline).any()


def test_rounding_in_the_mean_is_what_the_exact_zero_guards_against():
    rewards = torch.full((1, 8), 0.7)
    assert (rewards - rewards.mean(1, keepdim=True)).any()
    assert is_flat(rewards).tolist() == [True]
    assert is_flat(torch.tensor([[0.7, 0.7], [0.7, 0.8]])).tolist() == [True, False]


@KINDS
def test_advantages_of_a_group_average_to_zero(std, baseline):
    rewards = torch.rand(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
    rewards[0] = torch.tensor([1, 1, 1, 0, 1, 1, 0])
    advantage = group_advantage(rewards, std, baseline)
    assert advantage.mean(1).abs().max() < 1e-12 and advantage.std(1).min() > 0.1
    # Adding a constant changes nothing.
    assert difference(group_advantage(rewards + 5, std, baseline), advantage) < 1e-9
    if std == "group" and baseline == "mean":
        assert difference(advantage.std(1), torch.ones(5)) < 1e-4


@pytest.mark.parametrize("options, names", [
    (dict(rewards=torch.zeros(3)), r"rewards \(3,\) must have 2"), (dict(rewards=torch.zeros(3, 1)), "a group of one"),
    (dict(rewards=torch.zeros(2, 2, dtype=torch.long)), "rewards must hold floating"),
    (dict(std="row"), "std 'row'"), (dict(baseline="median"), "baseline 'median'"), (dict(eps=-1.0), "eps -1.0")])
def test_what_does_not_fit_is_named(options, names):
    with pytest.raises(ValueError, match=names):
        group_advantage(**dict(rewards=torch.zeros(2, 2)) | options)
