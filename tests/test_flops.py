"""model.flops against what torch's FlopCounterMode sees of the executed code: equal to the last product."""
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from model import flops, llama
from model.generate import Sampler, generate
from model.lora import adapters, attach
from tiny import BOS, EOS, IMAGE, LLM, PAD, make_vlm, prompts, random_completions, to_batch

ROWS = prompts()
P, G, C = len(ROWS), 3, 5
IDS = random_completions(P, G, C)
KINDS = pytest.mark.parametrize("options", [
    dict(),                                                                     # conv stem, class token, GQA, untied
    dict(clip=dict(stem="mlp", pool="mean"), projector="linear", llm=dict(tied=True, kv_heads=6)),
    dict(clip=dict(layers=3, ff=20), feature_layer=-1, image_positions=False, llm=dict(kv_heads=1, ff=31)),
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


def shape_of(completions):
    return None if completions is None else completions.shape


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
    batch = encoded(vlm)
    with torch.no_grad():
        assert counted(lambda: vlm(batch, completions)) == flops.forward(vlm, batch, shape_of(completions))


@KINDS
@pytest.mark.parametrize("completions", [None, IDS], ids=["targets", "completions"])
def test_update(completions, options):
    vlm = frozen(options)
    batch = encoded(vlm)
    executed = counted(lambda: vlm(batch, completions).logp.sum().backward())
    assert executed == flops.update(vlm, batch, shape_of(completions))


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
    cases = [(ROWS, IDS)]
    if not checkpointing:
        cases.append(([ROWS[1], ROWS[4]], None))        # text alone: no gradient comes from a projector
    for rows, completions in cases:
        batch = vlm.encode(to_batch(rows))

        def run():
            logp = vlm(batch, completions).logp.sum()
            if logp.requires_grad:
                logp.backward()
        assert counted(run) == flops.update(vlm, batch, shape_of(completions))


# ---------------------------------------------------------------- an image tower that trains

TOWERS = {
    "no block": only("projector", "llm"),
    "last block": only("visual.transformer.resblocks.1", "projector", "llm"),
    "both blocks": only("visual.transformer.resblocks", "projector", "llm"),
    "last block, projector frozen": only("visual.transformer.resblocks.1", "llm"),
    "both blocks, projector frozen": only("visual.transformer.resblocks", "llm"),
    "last block alone": only("visual.transformer.resblocks.1"),
    "everything": only("visual", "projector", "llm"),
    "stem": only("visual.conv1", "visual.stem"),
    "last layer of the stem": only("visual.conv1", "visual.stem.2"),
    "positions": only("visual.positional_embedding"),
    "out_proj of the first block": only("resblocks.0.attn.out_proj"),
    "bias of in_proj": only("resblocks.1.attn.in_proj_bias", "projector"),
    "second norm": only("resblocks.0.ln_2"),
    "last layer of the MLP": only("resblocks.1.mlp.c_proj"),
}


@pytest.mark.parametrize("clip", [dict(layers=3), dict(layers=3, stem="mlp", pool="mean", ff=31, act="gelu")],
                         ids=["conv, class", "mlp, mean"])
@pytest.mark.parametrize("trained", TOWERS)
def test_update_counts_the_tower_as_far_as_it_trains(trained, clip):
    vlm = make_vlm(torch.float32, clip=clip)        # two of three blocks are used
    TOWERS[trained](vlm)
    tower_trains = any(p.requires_grad for p in vlm.visual.parameters())
    assert flops.encode(vlm, 4) == (0 if tower_trains else flops.tower(vlm, 4))
    for completions in (IDS, None):
        def run():
            vlm(vlm.encode(to_batch(ROWS)), completions).logp.sum().backward()
        update = flops.update(vlm, to_batch(ROWS), shape_of(completions))
        assert counted(run) == flops.encode(vlm, 4) + update


def test_scoring_and_sampling_count_a_tower_that_trains_once():
    vlm = frozen({})
    batch = to_batch(ROWS)
    still = flops.encode(vlm, 4) + flops.forward(vlm, batch, IDS.shape)
    vlm.visual.transformer.resblocks[-1:].requires_grad_(True)
    with torch.no_grad():
        assert counted(lambda: vlm(vlm.encode(batch), IDS)) == flops.forward(vlm, batch, IDS.shape) == still
        twin = vlm.twin().requires_grad_(False)
        assert counted(lambda: twin(to_batch(ROWS), IDS)) == flops.reference(vlm, batch, IDS.shape) == still
    sampler = Sampler(vlm)
    assert counted(lambda: sampler.prefill(to_batch(ROWS), G, 3)) == sampler.meter.total > flops.tower(vlm, 4) > 0


def test_text_alone_costs_no_tower():
    vlm = make_vlm(torch.float32).requires_grad_(True)
    batch = to_batch([ROWS[1], ROWS[4]])
    assert counted(lambda: vlm(batch).logp.sum().backward()) == flops.update(vlm, batch)


# ---------------------------------------------------------------- modules that are not known

class Gathers(nn.Module):
    """A projector with attention."""

    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(12, 3, batch_first=True)
        self.out = nn.Linear(12, 24)

    def forward(self, features):
        return self.out(self.attend(features, features, features)[0])


class Squares(nn.Module):
    """A projector that uses its Linear twice, and says what that costs."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(12, 12)
        self.out = nn.Linear(12, 24)

    def forward(self, features):
        return self.out(self.inner(self.inner(features)))

    def flops(self, pictures):
        return 2 * pictures * 9 * (2 * 12 * 12 + 12 * 24)

    def backward_flops(self, pictures, features_train=False):
        return 2 * pictures * 9 * ((3 + features_train) * 12 * 12 + 2 * 12 * 24)


class HalfStated(Gathers):
    """Says what its forward costs, not its backward."""

    def flops(self, pictures):
        return 0


class Gated(llama.MLP):
    def forward(self, x):
        return super().forward(x) * self.gate_proj(x).mean(-1, keepdim=True)


class AttentionOnly(llama.Block):
    """A block without its MLP, which says what it costs where all of it trains."""

    def after(self, x, attended):
        return x + self.self_attn.out(attended)

    def flops(self, tokens, pairs):
        return 2 * tokens * (2 * 24 * 24 + 2 * 24 * 8) + 4 * pairs * 24

    def backward_flops(self, tokens, pairs, input_trains):
        assert input_trains
        return 2 * 2 * tokens * (2 * 24 * 24 + 2 * 24 * 8) + 10 * pairs * 24


class Once(nn.Linear):
    """Costs what a Linear costs, since it multiplies as one."""


class Twice(nn.Linear):
    def forward(self, x):
        return super().forward(x) + super().forward(-x)


def put(vlm, name, part):
    parent, _, last = name.rpartition(".")
    setattr(vlm.get_submodule(parent), last, part)


BY_PICTURES = r"a method flops\(pictures\) and backward_flops\(pictures\)"
BY_TOKENS = r"a method flops\(tokens, pairs\) and backward_flops\(tokens, pairs, input_trains\)"


@pytest.mark.parametrize("name, make, message", [
    ("projector.attend", lambda: nn.MultiheadAttention(24, 3),
     f"projector.attend is a MultiheadAttention, whose FLOPs are not known here: give projector {BY_PICTURES}"),
    ("projector", Gathers, f"projector is a Gathers, .*: give projector {BY_PICTURES}"),
    ("projector", HalfStated, f"projector is a HalfStated, .*: give projector {BY_PICTURES}"),
    ("projector", lambda: nn.Sequential(nn.Conv1d(9, 9, 1), nn.Linear(12, 24)), "projector.0 is a Conv1d, "),
    ("projector", lambda: Twice(12, 24), "projector is a Twice, "),
    ("projector", lambda: llama.MLP(llama.LlamaConfig(**LLM)), "projector is a MLP, "),
    ("llm.layers.0.mlp.up_proj", lambda: nn.Sequential(nn.Linear(24, 3), nn.Linear(3, 28)),
     "llm.layers.0.mlp.up_proj is a Sequential, "),
    ("visual.transformer.resblocks.0.mlp.conv", lambda: nn.Conv2d(3, 3, 1), "resblocks.0.mlp.conv is a Conv2d, "),
    ("llm.layers.1.mlp", lambda: Gated(llama.LlamaConfig(**LLM)),
     f"llm.layers.1.mlp is a Gated, .*: give llm.layers.1 {BY_TOKENS}"),
    ("llm.layers.0.mlp.extra", lambda: nn.Linear(24, 28), "llm.layers.0.mlp.extra is a Linear, "),
    ("llm.layers.0.self_attn.sink", lambda: nn.Parameter(torch.zeros(6, 4)),
     "llm.layers.0.self_attn.sink is a Parameter, "),
    ("visual.transformer.resblocks.0.attn", lambda: nn.MultiheadAttention(12, 3),
     f"resblocks.0.attn is a MultiheadAttention, .*: give visual {BY_PICTURES}"),
    ("visual.adapter", lambda: nn.Linear(12, 12), "visual.adapter is a Linear, "),
    ("llm.memory", lambda: nn.Linear(24, 24), "llm.memory is a Linear, .*: count it in model/flops.py"),
    ("memory", lambda: nn.Linear(24, 24), "memory is a Linear, .*: count it in model/flops.py"),
])
def test_a_module_of_unknown_cost_is_refused(name, make, message):
    vlm = frozen({})
    batch = encoded(vlm)
    put(vlm, name, make())
    for count in (lambda: flops.forward(vlm, batch), lambda: flops.encode(vlm, 1),
                  lambda: flops.Meter().update(vlm, batch), lambda: flops.Meter().prompt(vlm, batch)):
        with pytest.raises(ValueError, match=message):
            count()


def test_what_multiplies_nothing_may_be_anywhere():
    vlm = frozen({})
    batch = encoded(vlm)
    before = flops.update(vlm, batch)
    put(vlm, "projector", nn.Sequential(nn.LayerNorm(12), vlm.projector, nn.Dropout(0.0)))
    put(vlm, "llm.layers.0.gate", nn.Parameter(torch.ones(24)))
    put(vlm, "llm.layers.1.mlp.norm", nn.LayerNorm(24))
    # The norm's weight needs the gradient of the first Linear's input: 4 pictures of 9 patches.
    assert flops.update(vlm, batch) == before + 2 * 4 * 9 * 12 * 24
    assert counted(lambda: vlm(batch).logp.sum().backward()) == flops.update(vlm, batch)


def test_a_subclass_that_only_names_a_linear_is_known():
    vlm = frozen({})
    put(vlm, "projector", Once(12, 24))
    batch = encoded(vlm)
    assert counted(lambda: vlm(batch).logp.sum().backward()) == flops.update(vlm, batch)


def test_a_projector_put_in_later_is_looked_at():
    vlm = frozen({})
    batch = encoded(vlm)
    flops.forward(vlm, batch)
    put(vlm, "projector", Gathers())
    with pytest.raises(ValueError, match="projector is a Gathers"):
        flops.forward(vlm, batch)


@pytest.mark.parametrize("name, make, message", [
    ("llm.layers.1.mlp.extra", lambda: nn.Linear(24, 28), "llm.layers.1.mlp.extra is a Linear, "),
    ("llm.layers.1.mlp", lambda: Gated(llama.LlamaConfig(**LLM)), "llm.layers.1.mlp is a Gated, "),
    ("llm.layers.0.self_attn.sink", lambda: nn.Parameter(torch.zeros(6, 4)), "llm.layers.0.self_attn.sink is a "),
    ("visual.adapter", lambda: nn.Linear(12, 12), "visual.adapter is a Linear, "),
    ("projector.1", lambda: nn.Conv1d(9, 9, 1), "projector.1 is a Conv1d, "),
    ("memory", lambda: nn.Linear(24, 24), "memory is a Linear, "),
    ("llm.memory", lambda: nn.Linear(24, 24), "llm.memory is a Linear, "),
])
def test_what_is_put_into_a_model_after_the_first_count_is_looked_at(name, make, message):
    vlm = frozen({})
    batch = encoded(vlm)
    flops.forward(vlm, batch)
    put(vlm, name, make())
    with pytest.raises(ValueError, match=message):
        flops.forward(vlm, batch)


def test_a_model_is_walked_through_once(monkeypatch):
    walks = []
    monkeypatch.setattr(flops, "_unknown", lambda root, name, place: walks.append(name))
    vlm = frozen({})
    batch = encoded(vlm)
    for _ in range(3):
        flops.update(vlm, batch)
    assert walks == ["visual", "projector", "llm.layers.0", "llm.layers.1"]


@pytest.mark.parametrize("tower", [False, True], ids=["tower frozen", "tower trains"])
def test_a_projector_says_what_it_costs(tower):
    vlm = frozen({})
    vlm.visual.requires_grad_(tower)
    put(vlm, "projector", Squares())
    assert counted(lambda: vlm(to_batch(ROWS), IDS).logp.sum().backward()) == (
        flops.tower(vlm, 4) * (not tower) + flops.update(vlm, to_batch(ROWS), IDS.shape))


@pytest.mark.parametrize("trained", ["projector", "projector.v_proj", "projector.queries", "llm", "visual"])
def test_the_resampler_says_what_it_costs(trained):
    vlm = make_vlm(torch.float32, projector="resampler", queries=4, image_positions=False)
    only(trained)(vlm)
    rows = []
    for ids, _, images in ROWS:         # pictures first, of 4 tokens each instead of 9
        ids = [IMAGE] * 4 * len(images) + [token for token in ids if token != IMAGE]
        rows.append((ids, [False] * len(ids), images))
    assert counted(lambda: vlm(vlm.encode(to_batch(rows)), IDS).logp.sum().backward()) == (
        flops.encode(vlm, 4) + flops.update(vlm, to_batch(rows), IDS.shape))


def test_a_decoder_block_says_what_it_costs():
    vlm = frozen({})
    batch = encoded(vlm)
    put(vlm, "llm.layers.1", AttentionOnly(vlm.llm.config))
    for completions in (None, IDS):
        executed = counted(lambda: vlm(batch, completions).logp.sum().backward())
        assert executed == flops.update(vlm, batch, shape_of(completions))
    sampler = Sampler(vlm)
    assert counted(lambda: sampler.prefill(to_batch(ROWS), G, 6).extend(IDS[..., :1])) == sampler.meter.total


# ---------------------------------------------------------------- adapters, heads, sampling, by hand

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
        assert counted(lambda: base.states(batch, IDS)) == flops.reference(vlm, batch, IDS.shape, rows=0)
    assert all(layer.on for layer in adapters(vlm.llm))
    sampler = Sampler(vlm)
    assert counted(lambda: sampler.prefill(to_batch(ROWS), G, 6).extend(IDS[..., :1])) == sampler.meter.total


@pytest.mark.parametrize("choose", [lambda vlm: None, lora("all")], ids=["everything", "LoRA"])
def test_exact_kl(choose):
    vlm, other = frozen({}), frozen({})
    choose(vlm)
    batch = encoded(vlm)
    with torch.no_grad():
        ref_hidden = other.states(batch, IDS)
    hidden = vlm.states(batch, IDS).detach().requires_grad_()
    mask = IDS % 3 > 0
    rows = int(mask.sum())
    trained = counted(lambda: vlm.kl(hidden, ref_hidden, other, mask).sum().backward())
    assert trained == flops.exact_kl(vlm, other, rows, True)
    with torch.no_grad():
        assert counted(lambda: vlm.kl(hidden, ref_hidden, other, mask)) == flops.exact_kl(vlm, other, rows, False)


@pytest.mark.parametrize("trained", ["everything", "projector", "decoder", "head", "LoRA", "LoRA + projector"])
def test_told_what_the_loss_sends_the_head_spares_a_product(trained):
    vlm = frozen({})
    TRAINED[trained](vlm)
    upstream = (torch.ones(()), None)
    mask = IDS % 3 > 0
    for rows, completions in ((ROWS, IDS), (ROWS, None), ([ROWS[1], ROWS[4]], None)):       # the last: text alone
        batch = vlm.encode(to_batch(rows))
        shape = shape_of(completions)
        asked = None if completions is None else mask
        read = int(batch.target[:, 1:].sum() if completions is None else mask.sum())

        def run():
            logp = vlm(batch, completions, mask=asked, upstream=upstream).logp
            if logp.requires_grad:
                logp.sum().backward()

        cost = flops.update(vlm, batch, shape, read, upstream=True)
        assert counted(run) == cost
        something_trains = trained != "projector" or len(batch.pixels) > 0
        assert flops.update(vlm, batch, shape, read) - cost == something_trains * flops.head(vlm.llm, read)


@pytest.mark.parametrize("choose", [lambda vlm: None, lora("all")], ids=["everything", "LoRA"])
def test_the_head_reads_no_state_outside_the_mask(choose):
    vlm = frozen({})
    choose(vlm)
    batch = encoded(vlm)
    mask = IDS % 3 > 0
    rows = int(mask.sum())
    assert 0 < rows < IDS.numel()
    spared = counted(lambda: vlm(batch, IDS, mask=mask).logp.sum().backward())
    assert spared == flops.update(vlm, batch, IDS.shape, rows) < flops.update(vlm, batch, IDS.shape)


@KINDS
def test_prefill_and_extend(options):
    vlm = frozen(options)
    sampler = Sampler(vlm)

    def run():
        sampler.prefill(to_batch(ROWS), G, 6).extend(IDS[..., :1]).extend(IDS[..., 1:4])
    assert counted(run) == sampler.meter.total


@KINDS
def test_generation_with_ended_rows_dropped(options):
    vlm = frozen(options)
    spent = []

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
