"""What must not change a result: the batch around a row, padding, micro-batches; and what must not change at all."""
import numpy as np
import pytest
import torch

from data.sample import collate, to_pixels
from kernels import policy_loss
from model.lora import attach
from model.optim import make_optimizer, optimizer_step
from rl.types import Experience
from tiny import (EOS, IMAGE, PAD, PATCHES, SIDE, VOCAB, difference, gradients, make_vlm, prompts, random_completions,
                  to_batch, words)

ROWS = prompts()
P, G, C = len(ROWS), 3, 6
IDS = random_completions(P, G, C)
MASK = torch.arange(C) < torch.randint(1, C + 1, (P, G, 1), generator=torch.Generator().manual_seed(3))
PRECISION = pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
KINDS = pytest.mark.parametrize("kind", ["mlp2x_gelu", "resampler", "tower trains"])


def model_and_rows(kind, dtype):
    """A model of each kind of which pictures become tokens in another way, and prompts for it."""
    if kind == "resampler":
        return make_vlm(dtype, projector="resampler", queries=4), prompts(image_tokens=4)
    vlm = make_vlm(dtype)
    vlm.visual.requires_grad_(kind == "tower trains")
    return vlm, ROWS


def padded(batch, extra):
    """The same batch with `extra` more padding tokens on the right."""
    batch.ids = torch.nn.functional.pad(batch.ids, (0, extra), value=PAD)
    batch.target = torch.nn.functional.pad(batch.target, (0, extra))
    return batch


def experience(dtype, rows=ROWS):
    generator = torch.Generator().manual_seed(4)
    advantage = torch.randn(P, G, generator=generator, dtype=torch.float64)
    old_logp = -3 + torch.randn(P, G, C, generator=generator, dtype=torch.float64)     # far off: both clips act
    advantage = advantage.to(dtype)[..., None].expand(P, G, C).clone()
    return Experience(to_batch(rows), IDS, MASK, MASK, torch.ones(P, G).bool(), torch.zeros(P, G, 2),
                      old_logp.to(dtype), torch.ones(P).bool(), old_logp.to(dtype), advantage=advantage)


def grpo_gradient(vlm, micros):
    denominator = sum(micro.mask.sum() for micro in micros)
    loss = 0
    for micro in micros:
        logp = vlm(micro.batch, micro.ids, 0.9).logp
        loss = loss + policy_loss(logp, micro.old_logp, None, micro.advantage, micro.mask, denominator)[0]
    return gradients(vlm, loss)


# ---------------------------------------------------------------- batching and padding

@KINDS
@PRECISION
@torch.no_grad()
def test_batched_equals_single(dtype, tolerance, kind):
    vlm, rows = model_and_rows(kind, dtype)
    batch = to_batch(rows)
    targets = vlm(batch)
    completions = vlm(batch, IDS)
    start = 0
    for p in range(P):
        single = to_batch(rows[p:p + 1])
        single_targets = vlm(single)
        single_completions = vlm(single, IDS[p:p + 1])
        count = int(single.target.sum())
        for name in ("logp", "entropy", "hidden"):
            alone = getattr(single_targets, name)
            together = getattr(targets, name)[start:start + count]
            assert len(alone) == count and difference(alone, together) < tolerance
            alone = getattr(single_completions, name)[0]
            assert difference(alone, getattr(completions, name)[p]) < tolerance
        start += count
    assert start == len(targets.logp) == batch.target.sum() > 8


@KINDS
@PRECISION
def test_more_padding_of_the_prompts_changes_nothing(dtype, tolerance, kind):
    vlm, rows = model_and_rows(kind, dtype)
    for completions in (None, IDS):
        outputs, grads = [], []
        for extra in (0, 7):
            out = vlm(padded(to_batch(rows), extra), completions)
            outputs.append(dict(logp=out.logp.detach(), entropy=out.entropy.detach()))
            grads.append(gradients(vlm, (out.logp + out.entropy).sum()))
        assert difference(*outputs) < tolerance
        assert difference(*grads) < tolerance


@KINDS
@PRECISION
def test_padding_of_the_completions_changes_neither_loss_nor_gradient(dtype, tolerance, kind):
    vlm, rows = model_and_rows(kind, dtype)
    whole = experience(dtype, rows)
    longer = experience(dtype, rows)
    for fill in (PAD, EOS, 5):
        longer.ids = torch.cat([IDS.masked_fill(~MASK, fill), torch.full((P, G, 4), fill)], dim=-1)
        longer.mask = torch.nn.functional.pad(MASK, (0, 4))
        longer.old_logp = torch.nn.functional.pad(whole.old_logp, (0, 4))
        longer.advantage = torch.nn.functional.pad(whole.advantage, (0, 4), value=5.0)
        assert difference(grpo_gradient(vlm, [longer]), grpo_gradient(vlm, [whole])) < tolerance


# ---------------------------------------------------------------- micro-batches

@KINDS
@PRECISION
@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_give_the_same_sft_gradient(size, dtype, tolerance, kind):
    vlm, rows = model_and_rows(kind, dtype)
    batch = to_batch(rows)
    denominator = batch.target[:, 1:].sum()
    micros = batch.micro_batches(size)
    assert [len(micro.ids) for micro in micros] == [size] * (P // size) + [P % size] * (P % size > 0)
    wanted = gradients(vlm, -vlm(batch).logp.sum() / denominator)
    loss = sum(-vlm(micro).logp.sum() / denominator for micro in micros)
    assert difference(gradients(vlm, loss), wanted) < tolerance
    own_denominators = sum(-vlm(micro).logp.sum() / micro.target.sum().clamp(min=1) for micro in micros)
    assert difference(gradients(vlm, own_denominators), wanted) > 0.05


@KINDS
@PRECISION
@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_give_the_same_grpo_gradient(size, dtype, tolerance, kind):
    vlm, rows = model_and_rows(kind, dtype)
    whole = experience(dtype, rows)
    (_, indices), = whole.split(1, size)
    micros = [whole.rows(index).trim() for index in indices]
    assert difference(grpo_gradient(vlm, micros), grpo_gradient(vlm, [whole])) < tolerance


def test_rows_of_an_experience_keep_every_field_together():
    whole = experience(torch.float64)
    two = whole.rows(torch.tensor([3, 0]))
    for name in ("ids", "mask", "advantage", "old_logp"):
        assert torch.equal(getattr(two, name), getattr(whole, name)[[3, 0]])
    assert torch.equal(two.batch.ids, whole.batch.ids[[3, 0], :13])
    assert two.batch.length.tolist() == [12, 13]
    assert two.ref_logp.numel() == two.values.numel() == two.returns.numel() == 0


# ---------------------------------------------------------------- pictures stay with their prompts

@pytest.mark.parametrize("index", [[2, 0], [4, 3, 2, 1, 0], [1], [2, 2], [1, 4]])
def test_rows_keep_pictures_with_their_prompts(index):
    vlm, batch = make_vlm(), to_batch(ROWS)
    chosen = batch.rows(torch.tensor(index))
    pictures, image_row = [], []
    for row, p in enumerate(index):
        for image in ROWS[p][2]:
            pictures.append(image)
            image_row.append(row)
    assert torch.equal(chosen.pixels, to_pixels(pictures, SIDE))
    assert chosen.image_row.tolist() == image_row
    with torch.no_grad():
        assert difference(vlm(chosen, IDS[index]).logp, vlm(batch, IDS).logp[index]) < 1e-12
        encoded = vlm.encode(to_batch(ROWS)).rows(torch.tensor(index))
        assert len(encoded.features) == len(encoded.pixels) == len(pictures)
        if pictures:
            assert difference(encoded.features, vlm.encode(chosen).features) < 1e-12


def test_swapping_two_pictures_changes_their_prompts_alone():
    vlm, swapped = make_vlm(), to_batch(ROWS)
    swapped.pixels = swapped.pixels[[3, 1, 2, 0]]           # the pictures of prompts 0 and 3
    with torch.no_grad():
        moved = (vlm(swapped, IDS).logp - vlm(to_batch(ROWS), IDS).logp).abs().amax((1, 2)) > 1e-6
    assert moved.tolist() == [True, False, False, True, False]


def test_one_tiny_image_does_not_change_the_others():
    rng = np.random.default_rng(0)
    large, tiny = (rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((40, 53, 3), (3, 2, 3)))
    row = [IMAGE] * PATCHES
    alone = collate([(row, [], (large,))], PAD, SIDE)
    beside = collate([(row, [], (tiny,)), (row, [], (large,)), (row * 2, [], (tiny, large))], PAD, SIDE)
    assert torch.equal(beside.pixels[[1, 3]], alone.pixels[[0, 0]]) and beside.pixels.shape == (4, 3, SIDE, SIDE)


def test_picture_tokens_and_pictures_must_agree():
    batch = to_batch(ROWS)
    batch.ids[1, 2] = IMAGE
    with pytest.raises(ValueError, match="37 image tokens but their pictures give 36"):
        make_vlm()(batch)
    with pytest.raises(ValueError, match="9 image tokens but their pictures give 0"):
        make_vlm()(to_batch([(ROWS[0][0], [], ())]))
    with pytest.raises(ValueError, match="36 image tokens but their pictures give 16"):
        make_vlm(projector="resampler", queries=4)(to_batch(ROWS))


def test_logits_for_study_equal_the_streams():
    vlm, batch = make_vlm(), to_batch(ROWS[2:3])
    with torch.no_grad():
        every = vlm.logits(batch.pixels, batch.ids).log_softmax(-1)[0]
    at = batch.target[0].nonzero()[:, 0]
    assert difference(every[at - 1, batch.ids[0, at]], vlm(batch).logp.detach()) < 1e-12


# ---------------------------------------------------------------- what is frozen stays

@pytest.mark.parametrize("frozen", [(), ("visual",), ("visual", "llm"), ("visual", "projector"),
                                    ("llm", "projector")])
def test_what_is_frozen_does_not_change_by_one_bit(frozen):
    vlm = make_vlm(torch.float32)
    vlm.visual.requires_grad_(True)
    for name in frozen:
        getattr(vlm, name).requires_grad_(False)
    before = {name: p.clone() for name, p in vlm.named_parameters()}
    optimizer = make_optimizer(vlm, 0.95, weight_decay=0.1)
    e = experience(torch.float32)
    for _ in range(3):
        sft_loss = -vlm(to_batch(ROWS)).logp.mean()
        rl_loss = policy_loss(vlm(e.batch, IDS).logp, e.old_logp, None, e.advantage, MASK, 9)[0]
        (sft_loss + rl_loss).backward()
        optimizer_step(optimizer, 1e-2, 1.0)
    for name, p in vlm.named_parameters():
        assert torch.equal(p, before[name]) == (name.partition(".")[0] in frozen), name


def test_features_encoded_once_are_used_again():
    vlm, batch = make_vlm(), to_batch(ROWS)
    vlm.encode(batch)
    ran = []
    vlm.visual.register_forward_pre_hook(lambda *_: ran.append(1))
    vlm.visual.ln_pre.register_forward_pre_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        again, fresh = vlm(batch, IDS).logp, vlm(to_batch(ROWS), IDS).logp
    assert difference(again, fresh) < 1e-12 and len(ran) == 1


# ---------------------------------------------------------------- a tower of which something trains

def tower_trains(dtype=torch.float64, blocks=1, **clip):
    """A model of which, beside all else, the last `blocks` of the tower train."""
    vlm = make_vlm(dtype, clip=clip)
    vlm.visual.transformer.resblocks[-blocks:].requires_grad_(True)
    return vlm


def test_the_gradient_of_a_tower_that_trains_equals_a_finite_difference():
    # Along a random direction of the two blocks' weights, at both sides of where they are.
    vlm = tower_trains(blocks=2, layers=4)      # three blocks are left, of which the first is frozen
    generator = torch.Generator().manual_seed(8)
    trained = {name: p for name, p in vlm.visual.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in trained} == {"1", "2"}
    direction = {name: torch.randn(p.shape, generator=generator).double() for name, p in trained.items()}

    def loss():
        return vlm(to_batch(ROWS), IDS).logp.sum()

    def moved(step):
        with torch.no_grad():
            for name, p in trained.items():
                p += step * direction[name]
            return loss()

    grads = gradients(vlm, loss())
    slope = sum((grads[f"visual.{name}"] * direction[name]).sum() for name in trained)
    above = moved(1e-6)
    below = moved(-2e-6)
    assert slope.item() == pytest.approx(((above - below) / 2e-6).item(), rel=1e-6)
    assert abs(slope) > 1


def test_what_is_frozen_of_a_tower_that_trains_gets_no_gradient():
    vlm = tower_trains(layers=3)
    names = {name for name in gradients(vlm, vlm(to_batch(ROWS)).logp.sum()) if name.startswith("visual.")}
    block = vlm.visual.transformer.resblocks[1]
    assert names == {f"visual.transformer.resblocks.1.{name}" for name, _ in block.named_parameters()}


def test_a_tower_that_trains_leaves_no_features_and_reads_none():
    vlm, batch = tower_trains(), to_batch(ROWS)
    wanted = vlm(batch, IDS).logp
    assert not len(vlm.encode(batch).features)
    with torch.no_grad():
        assert torch.equal(vlm(batch, IDS).logp, wanted) and not len(batch.features)
    make_vlm(seed=5).encode(batch)              # as a frozen reference does
    assert len(batch.features) and torch.equal(vlm(batch, IDS).logp, wanted)


def test_a_twin_of_a_tower_that_trains_has_a_tower_of_its_own():
    for vlm, shared in ((make_vlm(), True), (tower_trains(), False)):
        twin = vlm.twin()
        assert (twin.visual is vlm.visual) == shared
        assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in vlm.parameters()]
        wanted = twin(to_batch(ROWS), IDS).logp.detach()
        with torch.no_grad():
            for p in vlm.parameters():
                if p.requires_grad:
                    p.mul_(1.1)
        assert torch.equal(twin(to_batch(ROWS), IDS).logp, wanted)


def test_a_base_of_a_tower_that_trains_keeps_the_tower_it_began_with():
    vlm = tower_trains()
    attach(vlm.llm, "q_proj", 2, 4.0)
    base = vlm.base()
    assert {name.partition(".")[0] for name in base.state_dict()} == {"visual", "projector", "image_position"}
    assert not any(p.requires_grad for p in base.parameters())
    batch = to_batch(ROWS)
    wanted = base(batch, IDS).logp
    assert difference(vlm(batch, IDS).logp.detach(), wanted) < 1e-12        # B is zero, all else the same
    with torch.no_grad():
        for p in vlm.visual.parameters():
            if p.requires_grad:
                p.mul_(1.1)
    assert torch.equal(base(to_batch(ROWS), IDS).logp, wanted)
    assert difference(vlm(batch, IDS).logp.detach(), wanted) > 1e-3


# ---------------------------------------------------------------- checkpoints, targets

@pytest.mark.parametrize("options", [{}, dict(projector="resampler", queries=4)], ids=["mlp2x_gelu", "resampler"])
def test_a_model_rebuilt_from_its_own_config_is_the_same(options):
    vlm = make_vlm(**options)
    rows = prompts(image_tokens=vlm.config.image_tokens)
    again = type(vlm).from_config(vlm.config_dict()).double()
    again.load_state_dict(vlm.state_dict())
    assert again.config == vlm.config
    assert torch.equal(again(to_batch(rows), IDS).logp.detach(), vlm(to_batch(rows), IDS).logp.detach())


def test_targets_are_read_in_reading_order_from_the_position_before():
    rng = np.random.default_rng(5)
    ids = words(7, rng)
    vlm = make_vlm()
    with torch.no_grad():
        out = vlm(to_batch([(ids, [1, 0, 1, 0, 0, 1, 1], ())]))      # a target at position 0 has nothing before it
        every = vlm.logits(torch.zeros(0), torch.tensor([ids])).log_softmax(-1)[0]
    assert difference(out.logp, torch.stack([every[t - 1, ids[t]] for t in (2, 5, 6)])) < 1e-12
    assert VOCAB > max(ids)
