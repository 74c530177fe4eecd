"""Adapters: what they compute and their gradients, what they leave alone, and the reference they make free."""
import copy

import pytest
import torch
from torch import nn

from model.llama import Llama, LlamaConfig
from model.lora import LoraLinear, adapters, attach, merge, off
from model.optim import make_optimizer, optimizer_step
from rl.learner import Learner
from tiny import LLM, difference, gradients, make_vlm, prompts, random_completions, shake, to_batch

ROWS = prompts()
IDS = random_completions(len(ROWS), 3, 5)
EVERY = torch.ones_like(IDS, dtype=torch.bool)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(dtype=torch.float64, targets="all", rank=3, alpha=4.0, trained=True, **options):
    """The tiny model with adapters; trained: B is no longer zero."""
    vlm = make_vlm(dtype, **options)
    attach(vlm.llm, targets, rank, alpha, torch.Generator().manual_seed(5))
    if trained:
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for layer in adapters(vlm.llm):
                layer.lora_b.copy_(0.3 * torch.randn(layer.lora_b.shape, generator=generator))
    return vlm


def plain(dtype=torch.float64, still="llm", **options):
    """The tiny model without adapters, its part `still` frozen as beside or under them ("" for all of it). Given rows
    that are not contiguous, as a picture's features are, torch's matmul is one product where the weight trains and one
    for each picture where it does not, and those round apart: equal bits need equal flags."""
    vlm = make_vlm(dtype, **options)
    vlm.get_submodule(still).requires_grad_(False)
    return vlm


def logp(model):
    with torch.no_grad():
        return model(to_batch(ROWS), IDS, 0.7).logp


def train(vlm, steps=3):
    """A few steps of all that trains, on completions."""
    optimizer = make_optimizer(vlm, 0.95, 0.1)
    for _ in range(steps):
        (-vlm(to_batch(ROWS), IDS).logp.mean()).backward()
        optimizer_step(optimizer, 1e-2, 1.0)


def test_an_adapter_worked_by_hand():
    # W = 1 row (1, 1), bias 10, A = (1, 2), B = 3, alpha / r = 2: 1 + 1 + 10 + 2 * 3 * (1 + 2) = 30.
    base = nn.Linear(2, 1)
    with torch.no_grad():
        base.weight.fill_(1.0), base.bias.fill_(10.0)
    layer = LoraLinear(base, 1, 2.0, None)
    with torch.no_grad():
        layer.lora_a.copy_(torch.tensor([[1.0, 2.0]])), layer.lora_b.fill_(3.0)
    assert layer(torch.ones(1, 2)).tolist() == [[30.0]]


def test_gradients_equal_the_formulas():
    # out = x W^T + s (x A^T) B^T: dB = s g^T (x A^T), dA = s (g B)^T x, dx = g W + s g B A.
    generator = torch.Generator().manual_seed(0)
    layer = LoraLinear(nn.Linear(5, 7).double(), 3, 4.0, generator).double()
    shake(layer)
    layer.weight.requires_grad_(False), layer.bias.requires_grad_(False)
    x, g = (torch.randn(2, 11, n, generator=generator, dtype=torch.float64) for n in (5, 7))
    x.requires_grad_()
    layer(x).backward(g)
    A, B, s = layer.lora_a.detach(), layer.lora_b.detach(), 4 / 3
    flat, up = x.detach().flatten(0, 1), g.flatten(0, 1)
    assert difference(layer.lora_b.grad, s * up.T @ (flat @ A.T)) < 1e-12
    assert difference(layer.lora_a.grad, s * (up @ B).T @ flat) < 1e-12
    assert difference(x.grad.flatten(0, 1), up @ layer.weight + s * up @ B @ A) < 1e-12
    assert layer.weight.grad is None and layer.bias.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_adapters_that_are_zero_change_no_bit(dtype):
    assert torch.equal(logp(adapted(dtype, trained=False)), logp(plain(dtype)))
    if dtype != torch.bfloat16:         # there it may be lost in rounding
        assert difference(logp(adapted(dtype)), logp(make_vlm(dtype))) > 1e-3


def test_adapters_alone_train():
    vlm = adapted(targets="q_proj,v_proj")
    found = gradients(vlm.llm, vlm(to_batch(ROWS), IDS).logp.sum())
    assert found.keys() == {f"layers.{n}.self_attn.{name}_proj.lora_{x}" for n in (0, 1) for name in "qv" for x in "ab"}
    before = {name: p.clone() for name, p in vlm.llm.named_parameters()}
    train(vlm)
    for name, p in vlm.llm.named_parameters():
        assert torch.equal(p, before[name]) == (".lora_" not in name), name


def test_all_means_every_linear_of_the_blocks():
    vlm = adapted()
    assert len(adapters(vlm.llm)) == 2 * len(LINEARS) and type(vlm.llm.lm_head) is nn.Linear
    assert {name for name, p in vlm.llm.named_parameters() if p.requires_grad} == {
        f"layers.{n}.{'self_attn' if name in LINEARS[:4] else 'mlp'}.{name}.lora_{x}"
        for n in (0, 1) for name in LINEARS for x in "ab"}
    assert all(p.requires_grad for p in vlm.projector.parameters())


def test_parameters_of_the_base_keep_their_names():
    plain, vlm = make_vlm(llm=dict(qkv_bias=True)), adapted(llm=dict(qkv_bias=True))
    missing, unexpected = vlm.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and {name.rpartition(".")[2] for name in missing} == {"lora_a", "lora_b"}


def test_a_drawn_on_the_paper_s_scale():
    # Uniform within +-1 / sqrt(in), of variance 1 / (3 in).
    llm = attach(Llama(LlamaConfig(**LLM | dict(width=96, layers=4))), "q_proj,up_proj", 64, 1.0,
                 torch.Generator().manual_seed(0))
    drawn = torch.cat([layer.lora_a.flatten() for layer in adapters(llm)]).detach()
    assert drawn.abs().max() <= 96 ** -0.5 and abs(drawn.var().item() * 3 * 96 - 1) < 0.02


def test_one_seed_gives_one_adapter_in_every_dtype():
    double, single = (adapters(adapted(dtype, trained=False).llm) for dtype in (torch.float64, torch.float32))
    assert all(torch.equal(a.lora_a.float(), b.lora_a) for a, b in zip(double, single))


# W + s B A is rounded before it meets x, W x + s B A x after: in each of 14 Linears in a row, whose sums have 24 or 28
# terms, some sqrt(28) roundings of 2^-24 (fp64: 2^-53), 4e-6 (8e-15) in all.
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_merged_equals_unmerged(dtype, bound):
    vlm = adapted(dtype, llm=dict(qkv_bias=True))
    folded = copy.deepcopy(vlm)
    merge(folded.llm)
    before = make_vlm(dtype, llm=dict(qkv_bias=True))
    assert not adapters(folded.llm) and folded.state_dict().keys() == before.state_dict().keys()
    with torch.no_grad():
        given, wanted = (model.states(to_batch(ROWS), IDS) for model in (folded, vlm))
    assert difference(given, wanted) < bound and difference(logp(before), logp(vlm)) > 1e-3


def test_a_merge_in_bf16_rounds_once():
    base = nn.Linear(64, 64, bias=False).bfloat16()
    llm = nn.Sequential(LoraLinear(base, 8, 16.0, torch.Generator().manual_seed(0)))
    nn.init.normal_(llm[0].lora_b, std=0.1, generator=torch.Generator().manual_seed(1))
    W, B, A = (t.detach().double() for t in (base.weight, llm[0].lora_b, llm[0].lora_a))
    # Half of bf16's spacing, 2^-8 of a number at most; the fp32 sum before it, of 8 terms, is off by less than 1e-6.
    exact = W + 2 * B @ A
    assert ((merge(llm)[0].weight - exact).abs() <= 2 ** -8 * exact.abs() + 1e-6).all()


def test_a_state_dict_goes_round():
    vlm = adapted()
    again = adapted(trained=False, seed=3)
    again.load_state_dict(vlm.state_dict())
    assert torch.equal(logp(again), logp(vlm))


def test_off_ignores_adapters_within_itself_and_through_errors():
    vlm, base = adapted(), logp(plain())
    on = logp(vlm)
    with off(vlm.llm):
        with off(vlm.llm):
            assert torch.equal(logp(vlm), base)
        assert torch.equal(logp(vlm), base)
    with pytest.raises(KeyError), off(vlm.llm):
        raise KeyError
    assert torch.equal(logp(vlm), on)


def test_attach_needs_no_weights():
    with torch.device("meta"):
        llm = Llama(LlamaConfig(**LLM))
    attach(llm, "all", 4, 8.0)
    assert all(p.is_meta for p in llm.parameters()) and len(adapters(llm)) == 14


@pytest.mark.parametrize("options, message", [
    (dict(targets="q_proj,w_proj"), "targets 'q_proj,w_proj': 'w_proj' must be all or some of"),
    (dict(targets=""), "targets '': '' must be"), (dict(targets="lm_head"), "'lm_head' must be"),
    (dict(rank=0), "rank 0 must be"), (dict(rank=1.5), "rank 1.5 must be"), (dict(alpha=0.0), "alpha 0.0 must be"),
    (dict(alpha=float("inf")), "alpha inf must be")])
def test_what_cannot_be_attached_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        adapted(**options)


def test_adapters_on_adapters_are_refused():
    with pytest.raises(ValueError, match="has adapters already"):
        attach(adapted().llm, "all", 1, 1.0)


# ---------------------------------------------------------------- the reference

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_base_is_the_model_before_attach_bit_for_bit_after_training_too(dtype):
    vlm, before = adapted(dtype, trained=False), plain(dtype, still="")
    base, batch = vlm.base(), to_batch(ROWS)
    train(vlm)                          # adapters, projector and image positions
    assert difference(logp(vlm), logp(before)) > 1e-3
    assert torch.equal(logp(base), logp(before))
    assert torch.equal(base.states(batch, IDS), before.states(batch, IDS).detach())
    assert torch.equal(base.logits(batch.pixels[:1], batch.ids[:1, :13]),
                       before.logits(batch.pixels[:1], batch.ids[:1, :13]).detach())
    hidden = vlm(batch, IDS).hidden
    ref_hidden = base.states(batch, IDS)
    assert torch.equal(vlm.kl(hidden, ref_hidden, base, EVERY), vlm.kl(hidden, ref_hidden, before, EVERY))
    assert all(layer.on for layer in adapters(vlm.llm)) and not base(batch, IDS).logp.requires_grad


def test_base_holds_no_second_decoder():
    vlm = adapted()
    learner = Learner(vlm)
    learner.reference = vlm.base()
    saved = {name for name in learner.state_dict() if name.startswith("reference.")}
    projector = {f"reference.projector.{n}.{x}" for n in (0, 2) for x in ("weight", "bias")}
    assert saved == projector | {"reference.image_position"}
    assert not any(p.requires_grad for p in learner.reference.parameters())
    twin = copy.deepcopy(learner)       # its reference follows its own policy, not this one
    train(vlm)
    assert twin.reference.llm is twin.policy.llm and torch.equal(logp(twin.reference), logp(plain(still="")))


def test_base_resumes_with_the_projector_it_began_with():
    vlm = adapted()
    learner = Learner(vlm)
    learner.reference = vlm.base()
    wanted = logp(learner.reference)
    train(vlm)
    other = Learner(adapted(seed=3))
    other.reference = other.policy.base()
    other.load_state_dict(learner.state_dict())
    assert torch.equal(logp(other.reference), wanted)


def test_there_is_no_base_without_adapters_or_where_the_decoder_trains_beside_them():
    assert make_vlm().base() is None
    vlm = adapted()
    vlm.llm.norm.weight.requires_grad_(True)
    assert vlm.base() is None


def test_a_twin_shares_what_stands_still_and_nothing_that_trains():
    vlm = adapted()
    twin, wanted = vlm.twin(), logp(vlm)
    copied = dict(twin.named_parameters())
    for name, p in vlm.named_parameters():
        shared = name.startswith("visual.") or not p.requires_grad
        assert (copied[name] is p) == shared, name
    train(twin)
    assert torch.equal(logp(vlm), wanted) and not torch.equal(logp(twin), wanted)
    bare = make_vlm()
    assert not {id(p) for p in bare.llm.parameters()} & {id(p) for p in bare.twin().parameters()}


def test_a_compiled_twin_has_blocks_of_its_own():
    vlm = make_vlm()
    vlm.llm.compile_blocks()
    for block in (*vlm.llm.layers, *vlm.twin().llm.layers):
        assert block.before.__wrapped__.__self__ is block
        assert block.after.__wrapped__.__self__ is block
