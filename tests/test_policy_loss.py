"""kernels.policy_loss against a loop over tokens, and linear_policy_loss against the path it fuses."""
import math

import pytest
import torch

from kernel_tools import DEVICES, assert_equals
from kernels import (linear_logp, linear_policy_loss, linear_policy_loss_reference, policy_loss,
                     policy_loss_reference)
from tiny import difference

pytestmark = pytest.mark.usefixtures("blocks")
OPTIONS = pytest.mark.parametrize("options", [
    dict(), dict(clip_low=0.1, clip_high=0.3, bound=1.5), dict(kl="k1", kl_coef=0.3), dict(kl="k2", kl_coef=0.3),
    dict(kl="k3", kl_coef=0.3, bound=3.0), dict(entropy_coef=0.2)], ids=str)
SURROGATES = pytest.mark.parametrize("options", [
    dict(surrogate="cispo"), dict(surrogate="cispo", clip_low=0.1, clip_high=0.3, kl="k1", kl_coef=0.3),
    dict(surrogate="sapo"), dict(surrogate="sapo", kl="k2", kl_coef=0.3, entropy_coef=0.2)], ids=str)


def problem(N=300, seed=0):
    torch.manual_seed(seed)
    logp = -torch.rand(N, dtype=torch.float64)
    return dict(logp=logp, old_logp=logp + 0.4 * torch.randn(N, dtype=torch.float64),
                ref_logp=logp + 0.4 * torch.randn(N, dtype=torch.float64),
                advantage=torch.randn(N, dtype=torch.float64).masked_fill(torch.arange(N) % 7 == 0, 0.0),
                mask=torch.arange(N) % 5 != 2, entropy=torch.rand(N, dtype=torch.float64))


def naive(logp, old_logp, ref_logp, advantage, mask, entropy, denominator, clip_low=0.2, clip_high=0.2, bound=None,
          kl="k3", kl_coef=0.0, entropy_coef=0.0, surrogate="clip", weight=None):
    """One token at a time, in words: a gain counts only as far as the clip, a loss in full, but only to the bound."""
    total = 0.0
    count = dict(clip_low=0, clip_high=0, ratio_off=0.0, kl=0.0, kl_ref=0.0, ratio_off_max=0.0)
    for t in range(len(logp)):
        if not mask[t]:
            continue
        ratio = (logp[t] - old_logp[t]).exp()
        a = advantage[t]
        x = ref_logp[t] - logp[t]
        if a > 0 and ratio > 1 + clip_high:
            gain = (1 + clip_high) * a
            count["clip_high"] += 1
        elif a < 0 and ratio < 1 - clip_low:
            gain = (1 - clip_low) * a
            count["clip_low"] += 1
        elif a < 0 and bound is not None and ratio > bound:
            gain = bound * a
        else:
            gain = ratio * a
        if surrogate == "cispo":
            gain = min(max(ratio.item(), 1 - clip_low), 1 + clip_high) * a * logp[t]
        if surrogate == "sapo":
            tau = 1.0 if a > 0 else 1.05
            gain = 4 / tau / (1 + (-tau * (ratio - 1)).exp()) * a
        penalty = {"k1": -x, "k2": x * x / 2, "k3": x.exp() - 1 - x}[kl]
        gain = gain - kl_coef * penalty + entropy_coef * entropy[t]
        token_weight = 1 if weight is None else weight[t]
        total = total - token_weight * gain / denominator
        r = ratio.item()
        count["ratio_off"] += abs(r - 1)
        count["ratio_off_max"] = max(count["ratio_off_max"], abs(r - 1))
        count["kl"] += r - 1 - math.log(r)
        count["kl_ref"] += (x.exp() - 1 - x).item()
    return total, count


def loss_alone(op):
    return lambda **tensors: op(**tensors)[0]


@OPTIONS
def test_the_reference_is_the_definition(options):
    tensors = problem()
    tensors["logp"].requires_grad_()
    wanted, _ = naive(**tensors, denominator=11, **options)
    given = policy_loss_reference(**tensors, denominator=11, **options)
    assert given.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert difference(*(torch.autograd.grad(value, tensors["logp"])[0] for value in (given, wanted))) < 1e-12


@SURROGATES
def test_the_reference_of_the_other_surrogates_is_the_definition(options):
    tensors = problem() | dict(weight=torch.rand(300, dtype=torch.float64))
    tensors["logp"].requires_grad_()
    wanted, _ = naive(**tensors, denominator=11, **options)
    given = policy_loss_reference(**tensors, denominator=11, **options)
    assert given.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert difference(*(torch.autograd.grad(value, tensors["logp"])[0] for value in (given, wanted))) < 1e-12


@DEVICES
@SURROGATES
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradients_of_the_other_surrogates(options, weighted, device):
    tensors = problem()
    if weighted:
        tensors["weight"] = torch.rand(300, dtype=torch.float64)
    assert_equals(loss_alone(policy_loss), policy_loss_reference, tensors, ("logp", "entropy"), device, denominator=11,
                  **options)


@DEVICES
def test_weights_of_the_clipped_loss(device):
    tensors = problem() | dict(weight=torch.rand(300, dtype=torch.float64))
    assert_equals(loss_alone(policy_loss), policy_loss_reference, tensors, ("logp", "entropy"), device, denominator=11,
                  kl_coef=0.3, entropy_coef=0.2)


@DEVICES
@OPTIONS
def test_value_and_gradients(options, device):
    assert_equals(loss_alone(policy_loss), policy_loss_reference, problem(), ("logp", "entropy"), device,
                  denominator=11, **options)


@DEVICES
def test_statistics(device):
    tensors = problem()
    options = dict(clip_low=0.1, clip_high=0.3, bound=1.5)
    _, wanted = naive(**tensors, denominator=11, **options)
    assert wanted["clip_low"] > 20 and wanted["clip_high"] > 10
    given = {name: t.float().to(device) if t.is_floating_point() else t.to(device) for name, t in tensors.items()}
    _, found = policy_loss(**given, denominator=11, **options)
    assert {name: value.item() for name, value in found.items()} == pytest.approx(wanted, rel=1e-5)
    given["ref_logp"] = None
    assert policy_loss(**given, denominator=11)[1].keys() == wanted.keys() - {"kl_ref"}


@DEVICES
@pytest.mark.parametrize("far", [-1000.0, 1000.0, float("nan")])
def test_what_stands_at_masked_tokens_changes_nothing(far, device):
    tensors = {name: t.to(device) for name, t in problem().items()}
    found = []
    for value in (0.0, far):
        given = {name: t.float().masked_fill(~tensors["mask"], value) if t.is_floating_point() else t
                 for name, t in tensors.items()}
        given["logp"] = tensors["logp"].float().requires_grad_()
        loss, statistics = policy_loss(**given, denominator=11, kl_coef=0.1, entropy_coef=0.1)
        found.append([loss.detach(), *statistics.values(), torch.autograd.grad(loss, given["logp"])[0]])
    assert all(torch.equal(*pair) for pair in zip(*found)) and not found[0][-1][~tensors["mask"]].any()


def test_the_advantage_is_one_for_a_completion_and_the_denominator_may_be_a_tensor():
    logp, old, ref, _, mask, _ = (t.view(3, 4, 25) for t in problem().values())
    advantage = torch.randn(3, 4, 1, dtype=torch.float64)
    one, _ = policy_loss(logp, old, ref, advantage, mask, 11)
    same, _ = policy_loss(logp, old, ref, advantage.expand(3, 4, 25), mask, torch.tensor(11))
    assert difference(one, same) < 1e-12


# ---------------------------------------------------------------- from hidden states

def head(N, D, V, seed=0):
    torch.manual_seed(seed)
    tensors = problem(N, seed)
    h = torch.randn(N, D, dtype=torch.float64)
    weight = torch.randn(V, D, dtype=torch.float64)
    target = torch.randint(V, (N,))
    target[::5] = V - 1
    logp = linear_logp(h, weight, target)[0]
    return dict(h=h, weight=weight, target=target, old_logp=logp + 0.3 * torch.randn(N, dtype=torch.float64),
                ref_logp=logp + 0.3 * torch.randn(N, dtype=torch.float64), advantage=tensors["advantage"],
                mask=tensors["mask"])


@DEVICES
@OPTIONS
@pytest.mark.parametrize("N, V, chunk", [(9, 601, None), (7, 11, 3)])
def test_the_fused_head_equals_the_composed_path(N, V, chunk, options, device):
    def fused(**tensors):
        return linear_policy_loss(**tensors, chunk=chunk, softcap=9.0, temperature=0.8)[0]

    def reference(**tensors):
        return linear_policy_loss_reference(**tensors, softcap=9.0, temperature=0.8)

    assert_equals(fused, reference, head(N, 5, V), ("h", "weight"), device, denominator=11, **options)


@DEVICES
def test_the_fused_head_reports_what_the_composed_path_does(device):
    tensors = {name: t.to(device, torch.float32) if t.is_floating_point() else t.to(device)
               for name, t in head(9, 5, 601).items()}
    loss, logp, entropy, found = linear_policy_loss(**tensors, denominator=11, chunk=4)
    composed_logp, composed_entropy = linear_logp(*(tensors.pop(name) for name in ("h", "weight", "target")))
    wanted, statistics = policy_loss(composed_logp, **tensors, denominator=11)
    mask = tensors["mask"]
    assert difference(logp, composed_logp * mask) < 1e-6 and difference(entropy, composed_entropy * mask) < 1e-6
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert found.keys() == statistics.keys()
    for name, value in statistics.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6)


def test_on_policy_every_ratio_is_one_and_the_gradient_that_of_reinforce():
    tensors = head(9, 5, 11) | dict(old_logp=None, ref_logp=None)
    tensors["h"].requires_grad_()
    loss, _, _, statistics = linear_policy_loss(**tensors, denominator=11)
    logp, _ = linear_logp(tensors["h"], tensors["weight"], tensors["target"])
    reinforce = -(logp * tensors["advantage"] * tensors["mask"]).sum() / 11
    assert statistics["ratio_off"] == statistics["kl"] == 0
    assert difference(*(torch.autograd.grad(value, tensors["h"])[0] for value in (loss, reinforce))) < 1e-12


def test_without_gradients_none_is_computed():
    tensors = head(9, 5, 11)
    tensors["h"].requires_grad_()
    with torch.no_grad():
        assert not linear_policy_loss(**tensors, denominator=11)[0].requires_grad
    linear_policy_loss(**tensors, denominator=11)[0].backward()
    assert tensors["h"].grad.any() and tensors["weight"].grad is None


@pytest.mark.parametrize("change, names", [
    (dict(old_logp=torch.zeros(3)), r"old_logp \(3,\) must have the shape of logp, \(2,\)"),
    (dict(advantage=torch.zeros(3)), r"advantage \(3,\) must broadcast to logp \(2,\)"),
    (dict(mask=torch.ones(2, 1).bool()), r"mask \(2, 1\)"),
    (dict(logp=torch.zeros(2, dtype=torch.long)), "logp must hold floating"),
    (dict(clip_low=1.5), "clip_low 1.5"),
    (dict(clip_high=-0.1), "clip_high -0.1"),
    (dict(bound=1.1), "bound 1.1 must be at least"),
    (dict(kl="k4"), "kl 'k4' must be k1, k2 or k3"), (dict(surrogate="ppo"), "surrogate 'ppo' must be one of clip"),
    (dict(weight=torch.ones(3)), r"weight \(3,\) must broadcast to logp \(2,\)"),
    (dict(denominator=0), "denominator 0"),
    (dict(denominator=torch.ones(2)), r"denominator \(2,\)"),
])
def test_what_does_not_fit_is_named(change, names):
    good = dict(logp=torch.zeros(2), old_logp=torch.zeros(2), ref_logp=None, advantage=torch.zeros(2),
                mask=torch.ones(2).bool(), denominator=2)
    with pytest.raises(ValueError, match=names):
        policy_loss(**good | change)
