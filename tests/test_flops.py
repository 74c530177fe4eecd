"""model.flops against what torch's FlopCounterMode sees of the executed code: equal to the last product."""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import flops
from model.generate import Sampler, generate
from tiny import BOS, EOS, PAD, make_vlm, prompts, random_completions, to_batch

ROWS = prompts()
P, G, C = len(ROWS), 3, 5
IDS = random_completions(P, G, C)
KINDS = pytest.mark.parametrize("options", [
    dict(),                                                                     # conv stem, class token, GQA, untied
    dict(clip=dict(stem="mlp", pool="mean"), projector="linear", llm=dict(tied=True, kv_heads=6)),
    dict(clip=dict(layers=3), feature_layer=-1, image_positions=False, llm=dict(kv_heads=1, ff=31)),
], ids=["conv", "mlp", "last-layer"])


def counted(function):
    with FlopCounterMode(display=False) as counter:
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


@KINDS
def test_prefill_and_extend(options):
    vlm = frozen(options)
    sampler = Sampler(vlm)

    def run():
        sampler.prefill(to_batch(ROWS), G, 6).extend(IDS[..., :1]).extend(IDS[..., 1:4])
    assert counted(run) == sampler.flops


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
    assert counted(lambda: sampler.prefill(batch, G, 3)) == sampler.flops == flops.prompt(vlm, batch)


def test_worked_by_hand():
    # One text prompt of 3 tokens, width 24, 6 heads of 4, 2 key/value heads, ff 28, 2 layers, vocabulary 37, 1 target.
    # A layer: q, o 24 x 24; k, v 24 x 8; gate, up, down 24 x 28; attention 2 products of 3 x 3 x 24.
    vlm = frozen({})
    batch = to_batch([([1, 5, 6], [0, 0, 1], ())])
    layer = 2 * 3 * (2 * 24 * 24 + 2 * 24 * 8 + 3 * 24 * 28) + 2 * 2 * 3 * 3 * 24
    assert flops.forward(vlm, batch) == 2 * layer + 2 * 37 * 24
