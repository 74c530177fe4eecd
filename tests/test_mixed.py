"""--dtype=mixed: the products of the decoder's blocks in bf16, everything else in fp32."""
import copy
import json

import pytest
import torch
import torch.nn.functional as F

import train
from model import flops, memory
from model.lora import attach
from model.mixed import MixedLinear, mix
from model.optim import make_optimizer
from tiny import make_vlm, prompts, random_completions, to_batch


def case():
    """A decoder in fp32 under a frozen tower, a batch, completions (P, 2, 7)."""
    rows = prompts()
    vlm = make_vlm(torch.float32)
    vlm.visual.requires_grad_(False)
    batch = vlm.encode(to_batch(rows))
    return vlm, batch, random_completions(len(rows), 2, 7)


def rounded(x):
    return x.bfloat16().float()


def test_a_product_is_that_of_bf16_factors_and_so_are_its_gradients():
    torch.manual_seed(0)
    base = torch.nn.Linear(70, 33)
    layer = MixedLinear(base)
    x = torch.randn(2, 19, 70, requires_grad=True)
    out = layer(x)
    assert out.dtype == torch.float32 and layer.weight is base.weight
    exact = F.linear(rounded(x), rounded(base.weight)) + base.bias
    # One rounding to bf16 where a product ends: 8 bits.
    assert (out - exact).abs().max() <= exact.abs().max() * 2 ** -8
    g = torch.randn_like(out)
    out.backward(g)
    dx = rounded(g) @ rounded(base.weight)
    dw = rounded(g).flatten(0, 1).T @ rounded(x).flatten(0, 1)
    assert (x.grad - dx).abs().max() <= dx.abs().max() * 2 ** -8
    assert (base.weight.grad - dw).abs().max() <= dw.abs().max() * 2 ** -8
    assert (base.bias.grad - g.sum((0, 1))).abs().max() < 1e-5
    with torch.no_grad():
        assert torch.equal(layer(x), out)


@pytest.mark.parametrize("change", ["optimizer", "load", "copy", "replaced"])
def test_the_bf16_weight_follows_its_weight(change):
    layer = MixedLinear(torch.nn.Linear(8, 8))
    x = torch.randn(3, 8)
    before = layer(x)
    if change == "optimizer":
        optimizer = make_optimizer(layer, beta2=0.9, weight_decay=0.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.5
        before.sum().backward()
        optimizer.step()
    elif change == "load":
        layer.load_state_dict({"weight": torch.randn(8, 8), "bias": layer.bias})
    elif change == "copy":
        layer = copy.deepcopy(layer)
        with torch.no_grad():
            layer.weight.mul_(3)
    else:
        layer.weight = torch.nn.Parameter(torch.randn(8, 8))
    with torch.no_grad():
        after = layer(x)
        expected = F.linear(x.bfloat16(), layer.weight.bfloat16()).float() + layer.bias
    assert torch.equal(after, expected) and not torch.equal(after, before)


def test_a_mixed_model_samples_scores_and_learns_near_the_fp32_one():
    vlm, batch, completions = case()
    plain = vlm(batch, completions).logp
    plain.sum().backward()
    expected = {name: p.grad.clone() for name, p in vlm.named_parameters() if p.grad is not None}
    vlm.zero_grad(set_to_none=True)
    state = set(vlm.state_dict())
    mix(vlm.llm)
    mix(vlm.llm)            # a second time changes nothing
    assert set(vlm.state_dict()) == state
    logp = vlm(batch, completions).logp
    assert logp.dtype == torch.float32 and 0 < (logp - plain).abs().max() < 0.1
    logp.sum().backward()
    for name, gradient in expected.items():
        found = vlm.get_parameter(name).grad
        assert found.dtype == torch.float32, name
        assert (found - gradient).norm() < 0.05 * gradient.norm(), name


def test_mixed_products_are_counted_as_those_of_fp32():
    vlm, batch, completions = case()
    plain = flops.update(vlm, batch, completions.shape)
    mix(vlm.llm)
    assert flops.update(vlm, batch, completions.shape) == plain


@pytest.mark.slow
def test_a_mixed_run_trains_and_is_evaluated(tmp_path):
    out = tmp_path / "run"
    train.main(["--preset=tiny", "--dtype=mixed", "--stage=clip,align,cot,rl", f"--out={out}"])
    rows = json.loads((out / "results.json").read_text())
    assert {"cot", "grpo_token"} <= {row["method"] for row in rows}


def test_mixed_beside_compiled_blocks_is_refused():
    with pytest.raises(ValueError, match="--compile=True must be left out beside --dtype=mixed"):
        train.main(["--preset=tiny", "--dtype=mixed", "--compile=True"])


def test_a_decoder_with_adapters_is_not_mixed():
    vlm, _, _ = case()
    attach(vlm.llm, "q_proj", 2, 4.0)
    with pytest.raises(ValueError, match="takes no decoder with adapters"):
        mix(vlm.llm)


def test_a_twin_is_mixed_and_planned_with_its_copies():
    vlm, batch, completions = case()
    weights = memory.twin(vlm)
    mix(vlm.llm)
    twin = vlm.twin()
    with torch.no_grad():
        expected = vlm(batch, completions).logp
        assert torch.equal(twin(batch, completions).logp, expected)
    copies = [m.narrow for m in twin.modules() if isinstance(m, MixedLinear)]
    assert memory.twin(vlm) - weights == sum(copy.nbytes for copy in copies) > 0


def test_checkpointing_changes_no_bit_of_a_mixed_gradient():
    vlm, batch, completions = case()
    mix(vlm.llm)
    found = []
    for checkpointing in (False, True):
        vlm.llm.checkpointing = checkpointing
        vlm.zero_grad(set_to_none=True)
        vlm(batch, completions).logp.sum().backward()
        found.append([p.grad.clone() for p in vlm.llm.parameters()])
    assert all(torch.equal(kept, again) for kept, again in zip(*found))


def test_mixed_beside_adapters_is_refused():
    with pytest.raises(ValueError, match="--dtype=mixed must be bfloat16 beside --lora-rank"):
        train.main(["--preset=tiny", "--dtype=mixed", "--lora-rank=2"])
