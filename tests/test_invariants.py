"""What must not change a result: the batch around a row, padding, micro-batches; and what must not change at all."""
import numpy as np
import pytest
import torch

from data.sample import collate, to_pixels
from kernels import policy_loss
from model.optim import make_optimizer, optimizer_step
from rl.types import Experience
from tiny import (EOS, IMAGE, PAD, PATCHES, SIDE, VOCAB, difference, gradients, make_vlm, prompts, random_completions,
                  to_batch, words)

ROWS = prompts()
P, G, C = len(ROWS), 3, 6
IDS = random_completions(P, G, C)
MASK = torch.arange(C) < torch.randint(1, C + 1, (P, G, 1), generator=torch.Generator().manual_seed(3))
PRECISION = pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])


def padded(batch, extra):
    """The same batch with `extra` more padding tokens on the right."""
    batch.ids = torch.nn.functional.pad(batch.ids, (0, extra), value=PAD)
    batch.target = torch.nn.functional.pad(batch.target, (0, extra))
    return batch


def experience(dtype):
    generator = torch.Generator().manual_seed(4)
    advantage = torch.randn(P, G, generator=generator, dtype=torch.float64)
    old_logp = -3 + torch.randn(P, G, C, generator=generator, dtype=torch.float64)     # far off: both clips act
    advantage = advantage.to(dtype)[..., None].expand(P, G, C).clone()
    return Experience(to_batch(ROWS), IDS, MASK, MASK, torch.ones(P, G).bool(), torch.zeros(P, G, 2),
                      old_logp.to(dtype), torch.ones(P).bool(), old_logp.to(dtype), advantage=advantage)


def grpo_gradient(vlm, parts):
    denominator = sum(part.mask.sum() for part in parts)
    loss = 0
    for part in parts:
        loss = loss + policy_loss(vlm(part.batch, part.ids, 0.9).logp, part.old_logp, None, part.advantage, part.mask,
                                  denominator)[0]
    return gradients(vlm, loss)


# ---------------------------------------------------------------- batching and padding

@PRECISION
def test_batched_equals_single(dtype, tolerance):
    vlm = make_vlm(dtype)
    with torch.no_grad():
        batch = to_batch(ROWS)
        targets, completions = vlm(batch), vlm(batch, IDS)
        start = 0
        for p in range(P):
            alone = to_batch(ROWS[p:p + 1])
            mine = vlm(alone)
            count = int(alone.target.sum())
            for name in ("logp", "entropy", "hidden"):
                together = getattr(targets, name)[start:start + count]
                assert len(getattr(mine, name)) == count
                if count:
                    assert difference(getattr(mine, name), together) < tolerance
                assert difference(getattr(vlm(alone, IDS[p:p + 1]), name)[0], getattr(completions, name)[p]) < tolerance
            start += count
        assert start == len(targets.logp) == batch.target.sum() > 8


@PRECISION
def test_more_padding_of_the_prompts_changes_nothing(dtype, tolerance):
    vlm = make_vlm(dtype)
    for completions in (None, IDS):
        outputs, grads = [], []
        for extra in (0, 7):
            out = vlm(padded(to_batch(ROWS), extra), completions)
            outputs.append(dict(logp=out.logp.detach(), entropy=out.entropy.detach()))
            grads.append(gradients(vlm, (out.logp + out.entropy).sum()))
        assert difference(*outputs) < tolerance and difference(*grads) < tolerance


@PRECISION
def test_padding_of_the_completions_changes_neither_loss_nor_gradient(dtype, tolerance):
    vlm = make_vlm(dtype)
    whole = experience(dtype)
    longer = experience(dtype)
    for fill in (PAD, EOS, 5):
        longer.ids = torch.cat([IDS.masked_fill(~MASK, fill), torch.full((P, G, 4), fill)], dim=-1)
        longer.mask = torch.nn.functional.pad(MASK, (0, 4))
        longer.old_logp = torch.nn.functional.pad(whole.old_logp, (0, 4))
        longer.advantage = torch.nn.functional.pad(whole.advantage, (0, 4), value=5.0)
        assert difference(grpo_gradient(vlm, [longer]), grpo_gradient(vlm, [whole])) < tolerance


# ---------------------------------------------------------------- micro-batches

@PRECISION
@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_give_the_same_sft_gradient(size, dtype, tolerance):
    vlm, batch = make_vlm(dtype), to_batch(ROWS)
    denominator = batch.target[:, 1:].sum()
    parts = batch.micro_batches(size)
    assert [len(part.ids) for part in parts] == [size] * (P // size) + [P % size] * (P % size > 0)
    wanted = gradients(vlm, -vlm(batch).logp.sum() / denominator)
    assert difference(gradients(vlm, sum(-vlm(part).logp.sum() / denominator for part in parts)), wanted) < tolerance
    own_denominators = sum(-vlm(part).logp.sum() / part.target.sum().clamp(min=1) for part in parts)
    assert difference(gradients(vlm, own_denominators), wanted) > 0.05


@PRECISION
@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_give_the_same_grpo_gradient(size, dtype, tolerance):
    vlm, whole = make_vlm(dtype), experience(dtype)
    assert difference(grpo_gradient(vlm, [whole.rows(index).trim() for index in whole.split(1, size)[0][1]]),
                      grpo_gradient(vlm, [whole])) < tolerance


def test_rows_of_an_experience_keep_every_field_together():
    whole = experience(torch.float64)
    part = whole.rows(torch.tensor([3, 0]))
    for name in ("ids", "mask", "advantage", "old_logp"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[[3, 0]])
    assert torch.equal(part.batch.ids, whole.batch.ids[[3, 0], :13]) and part.batch.length.tolist() == [12, 13]
    assert part.ref_logp.numel() == part.values.numel() == part.returns.numel() == 0


# ---------------------------------------------------------------- pictures stay with their prompts

@pytest.mark.parametrize("index", [[2, 0], [4, 3, 2, 1, 0], [1], [2, 2], [1, 4]])
def test_rows_keep_pictures_with_their_prompts(index):
    vlm, batch = make_vlm(), to_batch(ROWS)
    part = batch.rows(torch.tensor(index))
    pictures = [image for p in index for image in ROWS[p][2]]
    assert torch.equal(part.pixels, to_pixels(pictures, SIDE))
    assert part.image_row.tolist() == [row for row, p in enumerate(index) for _ in ROWS[p][2]]
    with torch.no_grad():
        assert difference(vlm(part, IDS[index]).logp, vlm(batch, IDS).logp[index]) < 1e-12
        encoded = vlm.encode(to_batch(ROWS)).rows(torch.tensor(index))
        assert difference(encoded.features, vlm.encode(part).features) < 1e-12 if pictures else True
        assert len(encoded.features) == len(encoded.pixels) == len(pictures)


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


def test_logits_for_study_equal_the_streams():
    vlm, batch = make_vlm(), to_batch(ROWS[2:3])
    with torch.no_grad():
        every = vlm.logits(batch.pixels, batch.ids).log_softmax(-1)[0]
    at = batch.target[0].nonzero()[:, 0]
    assert difference(every[at - 1, batch.ids[0, at]], vlm(batch).logp.detach()) < 1e-12


# ---------------------------------------------------------------- what is frozen stays

@pytest.mark.parametrize("frozen", [("visual",), ("visual", "llm"), ("visual", "projector")])
def test_what_is_frozen_does_not_change_by_one_bit(frozen):
    vlm = make_vlm(torch.float32)
    for name in frozen:
        getattr(vlm, name).requires_grad_(False)
    before = {name: p.clone() for name, p in vlm.named_parameters()}
    optimizer = make_optimizer(vlm, 0.95, weight_decay=0.1)
    part = experience(torch.float32)
    for _ in range(3):
        out = vlm(to_batch(ROWS))
        (-out.logp.mean() + policy_loss(vlm(part.batch, IDS).logp, part.old_logp, None, part.advantage, MASK,
                                        9)[0]).backward()
        optimizer_step(optimizer, 1e-2, 1.0)
    for name, p in vlm.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith(tuple(f"{part}." for part in frozen)), name


def test_the_vision_tower_gets_no_gradient_even_when_not_frozen():
    # Encoding is without gradient in every stage; the parameters' own flag is only for the optimizer.
    vlm = make_vlm()
    assert not any(name.startswith("visual.") for name in gradients(vlm, vlm(to_batch(ROWS)).logp.sum()))


def test_features_encoded_once_are_used_again():
    vlm, batch = make_vlm(), to_batch(ROWS)
    vlm.encode(batch)
    ran = []
    vlm.visual.register_forward_pre_hook(lambda *_: ran.append(1))
    vlm.visual.ln_pre.register_forward_pre_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        again, fresh = vlm(batch, IDS).logp, vlm(to_batch(ROWS), IDS).logp
    assert difference(again, fresh) < 1e-12 and len(ran) == 1


def test_a_model_rebuilt_from_its_own_config_is_the_same():
    vlm = make_vlm()
    again = type(vlm).from_config(vlm.config_dict()).double()
    again.load_state_dict(vlm.state_dict())
    assert again.config == vlm.config and torch.equal(again(to_batch(ROWS), IDS).logp, vlm(to_batch(ROWS), IDS).logp)


def test_targets_are_read_in_reading_order_from_the_position_before():
    rng = np.random.default_rng(5)
    ids = words(7, rng)
    vlm = make_vlm()
    with torch.no_grad():
        out = vlm(to_batch([(ids, [1, 0, 1, 0, 0, 1, 1], ())]))      # a target at position 0 has nothing before it
        every = vlm.logits(torch.zeros(0), torch.tensor([ids])).log_softmax(-1)[0]
    assert difference(out.logp, torch.stack([every[t - 1, ids[t]] for t in (2, 5, 6)])) < 1e-12
    assert VOCAB > max(ids)
