"""model.flops against what torch's FlopCounterMode sees of the executed code: equal to the last product."""
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from model import flops
from model.generate import Sampler, generate
from model.lora import adapters, attach
from tiny import BOS, EOS, PAD, make_vlm, prompts, random_completions, to_batch

ROWS = prompts()
P, G, C = len(ROWS), 3, 5
IDS = random_completions(P, G, C)
KINDS = pytest.mark.parametrize("options", [
    dict(),                                                                     # conv stem, class token, GQA, untied
    dict(clip=dict(stem="mlp", pool="mean"), projector="linear", llm=dict(tied=True, kv_heads=6)),
    dict(clip=dict(layers=3), feature_layer=-1, image_positions=False, llm=dict(kv_heads=1, ff=31)),
], ids=["conv", "mlp", "last-layer"])


def attention(q, k, v, *_, **__):
    """Shapes (B, H, T, K), (B, H, S, K), (B, H, S, L): scores, and their product with v."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def attention_backward(g, q, k, v, *_, **__):
    """Of those shapes: scores again, gradients of q and k; of the probabilities and v."""
    return 2 * math.prod(q[:-1]) * k[-2] * (3 * q[-1] + 2 * v[-1])


# torch counts the CPU's fused attention since 2.15 only; before, these do, as torch counts its other fused attentions.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}
UNCOUNTED = {op: formula for op, formula in CPU_ATTENTION.items() if op not in flop_registry}


def counted(function, formulas=UNCOUNTED):
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        function()
    return counter.get_total_flops()


def frozen(options):
    vlm = make_vlm(torch.float32, **options)
    vlm.visual.requires_grad_(False)
    return vlm


def encoded(vlm):
    return vlm.encode(to_batch(ROWS))


@KINDS
def test_encoding(options):
    vlm = frozen(options)
    assert counted(lambda: vlm.encode(to_batch(ROWS))) == flops.encode(vlm, 4) > 0
    assert flops.encode(vlm, 0) == 0


@KINDS
@pytest.mark.parametrize("completions", [None, IDS], ids=["targets", "completions"])
def test_forward(completions, options):
    vlm = frozen(options)
    batch, shape = encoded(vlm), None if completions is None else completions.shape
    with torch.no_grad():
        assert counted(lambda: vlm(batch, completions)) == flops.forward(vlm, batch, shape)


@KINDS
@pytest.mark.parametrize("completions", [None, IDS], ids=["targets", "completions"])
def test_update(completions, options):
    vlm = frozen(options)
    batch, shape = encoded(vlm), None if completions is None else completions.shape
    assert counted(lambda: vlm(batch, completions).logp.sum().backward()) == flops.update(vlm, batch, shape)


def test_update_of_text_alone():
    vlm = frozen({})
    batch = to_batch([ROWS[1], ROWS[4]])
    assert counted(lambda: vlm(batch).logp.sum().backward()) == flops.update(vlm, batch)


# ---------------------------------------------------------------- what trains decides what a backward costs

def lora(targets):
    def choose(vlm):
        attach(vlm.llm, targets, 3, 4.0)
    return choose


def only(*names):
    """Trains the parameters whose names hold one of these."""
    def choose(vlm):
        for name, p in vlm.named_parameters():
            p.requires_grad_(any(part in name for part in names))
    return choose


def both(*choices):
    def choose(vlm):
        for one in choices:
            one(vlm)
    return choose


TRAINED = {
    "everything": only("projector", "image_position", "llm"),
    "projector": only("projector"),
    "last projector layer": only("projector.2", "projector.weight"),
    "positions": only("image_position"),
    "decoder": only("llm"),
    "blocks": only("llm.layers"),
    "second block": only("llm.layers.1"),
    "embedding": only("embed_tokens"),
    "head": only("lm_head"),
    "last norm": only("llm.norm"),
    "inner norm": only("layers.0.post_attention"),
    "keys' norm": only("k_norm"),
    "up": only("up_proj"),
    "LoRA + projector": lora("all"),
    "LoRA": both(lora("all"), only("lora_")),
    "LoRA of q, v": both(lora("q_proj,v_proj"), only("lora_")),
    "LoRA of o": both(lora("o_proj"), only("lora_")),
    "LoRA of down": both(lora("down_proj"), only("lora_")),
    "B alone": both(lora("gate_proj,down_proj"), only("lora_b")),
    "A alone": both(lora("k_proj,down_proj"), only("lora_a")),
}
MODELS = pytest.mark.parametrize("options", [
    dict(), dict(projector="linear", image_positions=False, llm=dict(tied=True, qkv_bias=True, qk_norm=True))],
    ids=["mlp2x_gelu, untied", "linear, tied"])


@MODELS
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("trained", TRAINED)
def test_update_costs_what_trains(trained, checkpointing, options):
    vlm = frozen(options)
    TRAINED[trained](vlm)
    vlm.llm.checkpointing = checkpointing
    # Completions after pictures; and targets of text alone, where no gradient comes from a projector.
    for rows, completions in ((ROWS, IDS), ([ROWS[1], ROWS[4]], None))[:1 if checkpointing else 2]:
        batch, shape = vlm.encode(to_batch(rows)), None if completions is None else completions.shape

        def run():
            logp = vlm(batch, completions).logp.sum()
            if logp.requires_grad:
                logp.backward()
        assert counted(run) == flops.update(vlm, batch, shape)


@MODELS
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
def test_update_without_head(checkpointing, options):
    vlm = frozen(options)
    vlm.llm.checkpointing = checkpointing
    batch = encoded(vlm)
    for choose in (only("projector", "image_position", "llm"), lora("q_proj,down_proj")):
        choose(vlm)
        assert counted(lambda: vlm.states(batch, IDS).sum().backward()) == flops.update(vlm, batch, IDS.shape, False)


def test_the_default_counts_two_for_one():
    # Everything trains: twice the forward for the Linears, 5 / 2 for attention, 3 for the head, and no gradient of the
    # features: what this count was before it asked what trains.
    vlm = frozen({})
    batch, c = encoded(vlm), vlm.llm.config
    _, T = batch.ids.shape
    attention = c.layers * 4 * (P * T * T + P * G * C * (T + C)) * c.heads * c.head_width
    last, ahead = flops.head(vlm.llm, P * G * C), flops.forward(vlm, batch, IDS.shape)
    first = 2 * len(batch.pixels) * vlm.config.clip.patches * vlm.config.clip.width * c.width
    wanted = ahead + 2 * (ahead - attention - last) + 5 * attention // 2 + 3 * last - first
    assert flops.update(vlm, batch, IDS.shape) == wanted


def test_adapters_cost_their_products_and_the_reference_pays_for_none():
    vlm = frozen({})
    batch = encoded(vlm)
    plain = flops.forward(vlm, batch, IDS.shape)
    attach(vlm.llm, "q_proj", 3, 4.0)
    tokens = batch.ids.numel() + IDS.numel()
    assert flops.forward(vlm, batch, IDS.shape) == plain + 2 * 2 * tokens * 3 * (24 + 24)
    base = vlm.base()
    with torch.no_grad():
        assert counted(lambda: vlm(batch, IDS)) == flops.forward(vlm, batch, IDS.shape)
        assert counted(lambda: base(batch, IDS)) == flops.reference(vlm, batch, IDS.shape) == plain
        assert counted(lambda: base.states(batch, IDS)) == flops.reference(vlm, batch, IDS.shape, False)
    assert all(layer.on for layer in adapters(vlm.llm))
    sampler = Sampler(vlm)
    assert counted(lambda: sampler.prefill(to_batch(ROWS), G, 6).extend(IDS[..., :1])) == sampler.meter.total


@pytest.mark.parametrize("choose", [lambda vlm: None, lora("all")], ids=["everything", "LoRA"])
def test_exact_kl(choose):
    vlm, other = frozen({}), frozen({})
    choose(vlm)
    batch = encoded(vlm)
    with torch.no_grad():
        theirs = other.states(batch, IDS)
    hidden = vlm.states(batch, IDS).detach().requires_grad_()
    assert counted(lambda: vlm.kl(hidden, theirs, other).sum().backward()) == flops.exact_kl(vlm, IDS.shape, True)
    with torch.no_grad():
        assert counted(lambda: vlm.kl(hidden, theirs, other)) == flops.exact_kl(vlm, IDS.shape, False)


@KINDS
def test_prefill_and_extend(options):
    vlm = frozen(options)
    sampler = Sampler(vlm)

    def run():
        sampler.prefill(to_batch(ROWS), G, 6).extend(IDS[..., :1]).extend(IDS[..., 1:4])
    assert counted(run) == sampler.meter.total


@KINDS
def test_generation_with_ended_rows_dropped(options):
    vlm, spent = frozen(options), []

    def run():
        done, count = generate(vlm, to_batch(ROWS), 7, 19, EOS, temperature=3.0, banned=(PAD, BOS),
                               generator=torch.Generator().manual_seed(0))
        spent.append(count)
        assert not done.mask.all()
    assert counted(run) == spent[0]


def test_a_sampler_given_encoded_pictures_does_not_count_them_again():
    vlm = frozen({})
    batch = encoded(vlm)
    sampler = Sampler(vlm)
    assert counted(lambda: sampler.prefill(batch, G, 3)) == sampler.meter.total == flops.prompt(vlm, batch)


@pytest.mark.parametrize("formulas", [UNCOUNTED, CPU_ATTENTION], ids=["as counted", "by the formulas here"])
def test_fused_attention_worked_by_hand(formulas):
    # 2 rows, 3 heads of 4, 5 queries, 7 keys: a product is 2 * 2 * 3 * 5 * 7 * 4 = 1680, two ahead and five back.
    q, k, v = (torch.zeros(2, 3, n, 4, requires_grad=True) for n in (5, 7, 7))
    attend = torch.nn.functional.scaled_dot_product_attention
    assert counted(lambda: attend(q, k, v), formulas) == 2 * 1680
    assert counted(lambda: attend(q, k, v).sum().backward(), formulas) == 7 * 1680


def test_worked_by_hand():
    # One text prompt of 3 tokens, width 24, 6 heads of 4, 2 key/value heads, ff 28, 2 layers, vocabulary 37, 1 target.
    # A layer: q, o 24 x 24; k, v 24 x 8; gate, up, down 24 x 28; attention 2 products of 3 x 3 x 24.
    vlm = frozen({})
    batch = to_batch([([1, 5, 6], [0, 0, 1], ())])
    layer = 2 * 3 * (2 * 24 * 24 + 2 * 24 * 8 + 3 * 24 * 28) + 2 * 2 * 3 * 3 * 24
    assert flops.forward(vlm, batch) == 2 * layer + 2 * 37 * 24
