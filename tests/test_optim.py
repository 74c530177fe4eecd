"""The optimizer of bf16 weights against torch's in fp32; rates by module, what they freeze, one norm."""
import io

import pytest
import torch
from torch import nn

from model.lora import attach
from model.optim import AdamW, freeze, make_optimizer, module_rates, optimizer_step
from rl.learner import Critic, Learner
from tiny import make_vlm

STEPS = 50


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)


def steps(module, optimizer, count=STEPS, lr=1e-2, first=0):
    """Gradients that depend on the step alone, so that every dtype gets the same, rounded to bf16."""
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for p in module.parameters():
            p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p.grad_dtype)
        optimizer_step(optimizer, lr, 1e6)
    return [p.detach().double() for p in module.parameters()]


def grouped(module, **options):
    return AdamW([dict(params=list(module.parameters()), scale=1.0, clip="policy")], weight_decay=0.1, **options)


# ---------------------------------------------------------------- AdamW for narrow weights

@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_on_wide_weights_it_equals_torch(dtype, bound):
    module, reference = net(dtype), net(dtype)
    wanted = steps(reference, make_optimizer(reference, 0.95, 0.1))
    for given, right in zip(steps(module, grouped(module, moments="bfloat16", master=False)), wanted):
        assert (given - right).abs().max() < bound


def test_a_first_step_worked_by_hand():
    # m = .1 g, v = .05 g^2, corrected g and g^2: a step of lr, after a decay of lr * .1: 1 - .01 * .1 - .01 = .989.
    p = nn.Parameter(torch.ones(1))
    p.grad = torch.full((1,), 3.0)
    optimizer_step(AdamW([dict(params=[p], scale=0.1, clip="policy")], weight_decay=0.1), 0.1, 9.0)
    assert abs(p.item() - 0.989) < 1e-6


def test_with_master_a_bf16_weight_follows_fp32_and_without_it_stands_still():
    # Steps of about 1e-4 on weights of size 1, whose bf16 spacing is 1 / 256 to 1 / 128.
    wide, narrow, bare = (nn.Linear(4, 4, bias=False).to(dtype) for dtype in (torch.float32, *[torch.bfloat16] * 2))
    for module in (wide, narrow, bare):
        nn.init.constant_(module.weight, 1.0)
    optimizers = [make_optimizer(module, 0.95, 0.0, master=module is narrow) for module in (wide, narrow, bare)]
    for _ in range(200):
        for module, optimizer in zip((wide, narrow, bare), optimizers):
            module.weight.grad = torch.ones_like(module.weight, dtype=module.weight.grad_dtype)
            optimizer_step(optimizer, 1e-4, 1e6)
    # Far from .9785, where bf16's rounding turns: the two, each a little off, are equal after it.
    assert abs(wide.weight[0, 0].item() - 0.98) < 1e-5
    assert torch.equal(narrow.weight, wide.weight.bfloat16()) and narrow.weight[0, 0] != 1
    assert torch.equal(bare.weight, torch.ones(4, 4, dtype=torch.bfloat16))
    assert torch.equal(optimizers[1].state[narrow.weight]["master"].bfloat16(), narrow.weight)


def test_with_master_bf16_stays_within_its_rounding_of_fp32():
    wide, narrow = net().bfloat16().float(), net(torch.bfloat16)
    wanted = steps(wide, make_optimizer(wide, 0.95, 0.1))
    for given, right in zip(steps(narrow, make_optimizer(narrow, 0.95, 0.1)), wanted):
        assert ((given - right).abs() <= right.abs() / 256 + 1e-6).all()


def test_with_master_the_gradients_of_micro_batches_are_summed_in_fp32():
    # 256 times 1 / 256 beside 1: bf16, whose spacing there is 1 / 128, stays at 1.
    for master, wanted in ((True, 2.0), (False, 1.0)):
        weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        module = nn.Module()
        module.weight = weight
        make_optimizer(module, 0.95, 0.0, master=master)
        for factor in [1.0, *[1 / 256] * 256]:
            (weight * factor).sum().backward()
        assert weight.grad.item() == wanted


def test_the_last_optimizer_of_a_module_decides_how_its_gradients_are_summed():
    module = net(torch.bfloat16)
    for master in (True, False, True):
        make_optimizer(module, 0.95, 0.0, master=master)
        module(torch.ones(1, 5, dtype=torch.bfloat16)).sum().backward()         # onto what is there
        assert all(p.grad.dtype == (torch.float32 if master else torch.bfloat16) for p in module.parameters())


@pytest.mark.parametrize("saved", [dict(master=False), dict(moments="bfloat16")])
def test_state_of_other_options_goes_on_in_the_fused_step(saved):
    module = net(torch.bfloat16)
    optimizer = make_optimizer(module, 0.95, 0.1, **saved)
    steps(module, optimizer, 20)
    again = make_optimizer(module, 0.95, 0.1)
    again.load_state_dict(optimizer.state_dict())
    before = [p.detach().clone() for p in module.parameters()]
    after = steps(module, again, 5, first=20)
    assert all(0 < (one - other).abs().max() < 0.1 for one, other in zip(before, after))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_fused_step_is_the_one_parameter_at_a_time(weight_decay):
    found = []
    for is_fused in (True, False):
        module = net(torch.bfloat16)
        optimizer = make_optimizer(module, 0.95, weight_decay)
        assert optimizer.is_fused
        optimizer.is_fused = is_fused
        steps(module, optimizer)
        found.append([optimizer.state[p] for p in module.parameters()])
    for fused, plain in zip(*found):
        assert fused["step"].item() == plain["step"] == STEPS
        for name in ("m", "v", "master"):
            torch.testing.assert_close(fused[name], plain[name], rtol=1e-5, atol=1e-6)


def test_a_checkpoint_that_counts_steps_in_an_int_goes_on():
    module = net(torch.bfloat16)
    optimizer = make_optimizer(module, 0.95, 0.1)
    steps(module, optimizer, 20)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["step"] = 20
    again = make_optimizer(module, 0.95, 0.1)
    again.load_state_dict(saved)
    assert all(again.state[p]["step"].item() == 20 for p in module.parameters())


def test_moments_in_bf16_cost_little_accuracy():
    modules = net(torch.bfloat16), net(torch.bfloat16)
    optimizers = [make_optimizer(module, 0.95, 0.1, moments=moments)
                  for module, moments in zip(modules, ("float32", "bfloat16"))]
    for module, optimizer in zip(modules, optimizers):
        steps(module, optimizer)
    exact, rough = ([optimizer.state[p] for p in module.parameters()] for module, optimizer in zip(modules, optimizers))
    assert all(state[name].dtype == torch.bfloat16 for state in rough for name in "mv")
    for right, given in zip(exact, rough):          # after 50 steps of .01
        assert 0 < (given["master"] - right["master"]).abs().max() < 2e-3


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("master", [True, False])
def test_a_run_resumed_from_a_file_equals_one_that_was_not(moments, master):
    options = dict(moments=moments, master=master)
    whole, half = net(torch.bfloat16), net(torch.bfloat16)
    wanted = steps(whole, make_optimizer(whole, 0.95, 0.1, **options))
    optimizer, file = make_optimizer(half, 0.95, 0.1, **options), io.BytesIO()
    steps(half, optimizer, 20)
    torch.save((half.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, saved = torch.load(file, weights_only=True)
    again = net(torch.bfloat16)
    again.load_state_dict(weights)
    resumed = make_optimizer(again, 0.95, 0.1, **options)
    resumed.load_state_dict(saved)
    for p, q in zip(half.parameters(), again.parameters()):
        old, new = optimizer.state[p], resumed.state[q]
        assert old.keys() == new.keys() == {"step", "m", "v"} | ({"master"} if master else set())
        assert all(old[name].dtype == new[name].dtype and torch.equal(old[name], new[name]) for name in old.keys() - {
            "step"})
    assert all(torch.equal(a, b) for a, b in zip(steps(again, resumed, 30, first=20), wanted))


def test_a_wide_critic_beside_bf16_needs_no_master():
    vlm = make_vlm(torch.bfloat16)
    learner = Learner(vlm, critic=Critic(vlm, "shared", 24))
    optimizer = make_optimizer(learner, 0.95, 0.0, learner.critic)
    steps(learner, optimizer, 1)
    assert isinstance(optimizer, AdamW) and "master" in optimizer.state[vlm.llm.norm.weight]
    assert optimizer.state[learner.critic.head.weight].keys() == {"step", "m", "v"}


def test_fp32_weights_keep_torch_s_fused_adamw():
    optimizer = make_optimizer(net(), 0.95, 0.1, moments="bfloat16", master=False)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]


@pytest.mark.parametrize("options, message", [
    (dict(moments="float16"), "moments 'float16' must be float32 or bfloat16"),
    (dict(moments="bfloat16", beta2=0.999), "beta2 0.999 must be at most 0.99 with moments in bfloat16")])
def test_impossible_moments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(net(torch.bfloat16), **dict(beta2=0.95) | options, weight_decay=0.0)


# ---------------------------------------------------------------- learning rates by module

def test_the_longest_name_wins_and_silence_is_one():
    vlm = make_vlm()
    rates = module_rates(vlm, "llm:0.5, llm.layers.1:0.25,llm.layers.1.mlp.up_proj.weight:2,projector:0")
    for name, rate in {"llm.norm.weight": 0.5, "llm.layers.0.mlp.up_proj.weight": 0.5,
                       "llm.layers.1.mlp.gate_proj.weight": 0.25, "llm.layers.1.mlp.up_proj.weight": 2.0,
                       "projector.0.bias": 0.0, "image_position": 1.0, "visual.ln_pre.weight": 1.0}.items():
        assert rates[name] == rate, name
    assert set(module_rates(vlm, "").values()) == {1.0}


def test_a_name_ends_at_a_dot():
    # layers.1 is not the beginning of layers.10.
    deep = make_vlm(llm=dict(layers=11))
    rates = module_rates(deep, "llm.layers.1:0.5")
    assert rates["llm.layers.1.mlp.up_proj.weight"] == 0.5 and rates["llm.layers.10.mlp.up_proj.weight"] == 1.0


@pytest.mark.parametrize("text, message", [
    ("projector", "'projector' must be NAME:RATE"), ("projector:", "'projector:' must be NAME:RATE"),
    (":1", "':1' must be NAME:RATE"), ("projector:-1", "a number in .0, 1000000"), ("projector:fast", "a number in"),
    ("projector:nan", "a number in .0, 1000000"), ("projector:inf", "a number in .0, 1000000"),
    ("llm:1,,projector:2", "'' must be NAME:RATE"), ("llm:1,llm:2", "gives llm a second rate"),
    ("lm:1", "must begin the name of a parameter; the first parts of those are"),
    ("llm.layer:1", "must begin the name"), ("llm.layers.1.:1", "must begin the name")])
def test_a_rate_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(ValueError, match=f"module_lr {text!r}: .*{message}"):
        module_rates(make_vlm(), text)


def test_zero_freezes_and_nothing_frozen_wakes():
    vlm = make_vlm()
    vlm.visual.requires_grad_(False)
    attach(vlm.llm, "q_proj", 2, 2.0)
    freeze(vlm, "llm:3,visual:1,projector:0,llm.layers.0:0")
    assert {name for name, p in vlm.named_parameters() if p.requires_grad} == {
        "image_position", *(f"llm.layers.1.self_attn.q_proj.lora_{x}" for x in "ab")}


def moved(optimizer, vlm, lr=1e-3):
    """Distance that each parameter goes in one step of gradients of 1, which in AdamW is its learning rate."""
    before = {name: p.detach().clone() for name, p in vlm.named_parameters()}
    for p in vlm.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p, dtype=p.grad_dtype)
    optimizer_step(optimizer, lr, 1e6)
    return {name: (p.detach() - before[name]).abs().mean().item() for name, p in vlm.named_parameters()}


def test_each_module_moves_at_its_rate():
    vlm = make_vlm()
    vlm.visual.requires_grad_(False)
    optimizer = make_optimizer(vlm, 0.95, 0.0, module_lr="projector:0.1,llm.embed_tokens:0,llm.layers.0:0.1")
    assert [group["scale"] for group in optimizer.param_groups] == [1.0, 0.1]       # equal rates are one group
    for name, distance in moved(optimizer, vlm).items():
        still = name.startswith(("visual.", "llm.embed_tokens."))
        rate = 0 if still else 1e-4 if name.startswith(("projector.", "llm.layers.0.")) else 1e-3
        assert abs(distance - rate) <= 1e-6 * rate, name


def with_gradients(learner):
    for n, p in enumerate(learner.parameters()):
        if p.requires_grad:
            p.grad = torch.full_like(p, 0.1 + n % 3)
    return learner


def test_one_norm_clips_all_groups_of_the_policy_and_the_critic_has_its_own():
    learners, norms, grads = [], [], []
    for module_lr in ("", "projector:0.1,llm.layers.0:2,image_position:0.5"):
        vlm = make_vlm()
        vlm.visual.requires_grad_(False)
        learner = with_gradients(Learner(vlm, critic=Critic(vlm, "shared", 24)))
        optimizer = make_optimizer(learner, 0.95, 0.0, learner.critic, 3.0, module_lr)
        assert [group["clip"] for group in optimizer.param_groups] == ["policy"] * (4 if module_lr else 1) + ["critic"]
        optimizer.zero_grad = lambda set_to_none: None          # so that the clipped gradients can be read
        norms.append(optimizer_step(optimizer, 1e-3, 0.5))
        grads.append([p.grad for p in learner.parameters() if p.requires_grad])
        learners.append(learner)
    assert len(norms[0]) == 2 and abs(norms[0][0] / norms[1][0] - 1) < 1e-12 and norms[0][1] == norms[1][1]
    assert norms[0][0] ** 2 > 10 * norms[0][1] ** 2
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*grads))
    policy = [p.grad for p in learners[1].policy.parameters() if p.requires_grad]
    assert abs(sum(g.square().sum() for g in policy).sqrt() - 0.5) < 1e-5


def test_rates_are_of_the_policy_s_names_and_its_frozen_parts_stay():
    vlm = make_vlm()
    vlm.visual.requires_grad_(False)
    learner = Learner(vlm, kl_coef=0.1, critic=Critic(vlm, "separate", 24))
    optimizer = make_optimizer(learner, 0.95, 0.0, learner.critic, 3.0, "projector:0")
    assert not any(p.requires_grad for p in vlm.projector.parameters())
    assert all(p.requires_grad for p in learner.critic.trunk.projector.parameters())
    policy, critic = optimizer.param_groups
    assert {id(p) for p in policy["params"]} == {id(p) for p in vlm.parameters() if p.requires_grad}
    assert {id(p) for p in critic["params"]} == {id(p) for p in learner.critic.parameters() if p.requires_grad}


def test_without_rates_the_groups_are_as_they_were():
    vlm = make_vlm(torch.float32).requires_grad_(True)
    groups = make_optimizer(vlm, 0.95, 0.1).param_groups
    assert [id(p) for p in groups[0]["params"]] == [id(p) for p in vlm.parameters()] and len(groups) == 1


def test_where_only_the_critic_trains_the_policy_s_group_is_empty():
    # optimizer_step gives one norm for each name of a group: the policy's comes first.
    vlm = make_vlm()
    learner = Learner(vlm.requires_grad_(False), critic=Critic(vlm, "detached", 24))
    optimizer = make_optimizer(learner, 0.95, 0.0, learner.critic)
    assert [(group["clip"], len(group["params"])) for group in optimizer.param_groups] == [("policy", 0), ("critic", 2)]
    norms = optimizer_step(optimizer, 1e-3, 1.0)
    assert norms == [0.0, 0.0]


def test_a_tower_whose_last_block_trains_moves_there_alone():
    vlm = make_vlm()
    vlm.requires_grad_(False)
    vlm.visual.transformer.resblocks[-1:].requires_grad_(True)
    optimizer = make_optimizer(vlm, 0.95, 0.0, module_lr="visual:0.1")
    for name, distance in moved(optimizer, vlm).items():
        rate = 1e-4 if name.startswith("visual.transformer.resblocks.0.") else 0
        assert abs(distance - rate) <= 1e-6 * rate, name
