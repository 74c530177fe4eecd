"""The central claim: both streams through each block once equal every row by itself, in value and in every gradient.

Row by row means: prompt p and completion g joined into one sequence, run alone through the x stream, all logits held.
"""
import pytest
import torch

from model.llama import Attention, Llama
from model.vlm import VLM, Output
from tiny import VOCAB, difference, gradients, home, make_vlm, prompts, random_completions, stream, to_batch

G, C, T = 3, 5, 0.8
ROWS = prompts()
P = len(ROWS)
IDS = random_completions(P, G, C)


def weights(like):
    """A different weight for every output, so that no error can average out; dtype and device are those of `like`."""
    generator = torch.Generator().manual_seed(2)
    shapes = (P, G, C), (P, G, C), (P, G, C + 1, 24)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(like) for shape in shapes]


def with_gradients(vlm, logp, entropy, hidden):
    a, b, c = weights(logp)
    grads = gradients(vlm, (a * logp).sum() + (b * entropy).sum() + (c * hidden).sum() / 24)
    return dict(logp=logp.detach(), entropy=entropy.detach(), hidden=hidden.detach()), grads


def shared(vlm, rows=ROWS):
    out = vlm(to_batch(rows, home(vlm)), IDS.to(home(vlm)), T)
    return with_gradients(vlm, out.logp, out.entropy, out.hidden)


def row_by_row(vlm, rows=ROWS):
    completions = IDS.to(home(vlm))
    logp, entropy, hidden = [], [], []
    for p, (ids, _, _) in enumerate(rows):
        for g in range(G):
            states = stream(vlm, rows, p, completions[p, g])[len(ids) - 1:]     # (C + 1, D)
            every = (states[:-1] @ vlm.llm.head.T / T).log_softmax(-1)      # (C, V)
            logp.append(every[range(C), completions[p, g]])
            entropy.append(-(every.exp() * every).sum(-1))
            hidden.append(states)
    grid = [torch.stack(values).unflatten(0, (P, G)) for values in (logp, entropy, hidden)]
    return with_gradients(vlm, *grid)


def errors(vlm, rows=ROWS):
    """Relative differences (of values, of gradients)."""
    values, grads = shared(vlm, rows)
    wanted_values, wanted_grads = row_by_row(vlm, rows)
    assert grads.keys() == {name for name, p in vlm.named_parameters() if p.requires_grad}
    return difference(values, wanted_values), difference(grads, wanted_grads)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kv_heads, tied", [(2, False), (6, True), (1, True)])
def test_shared_prefix_equals_every_row_by_itself(kv_heads, tied, dtype, tolerance, device):
    assert max(errors(make_vlm(dtype, llm=dict(kv_heads=kv_heads, tied=tied), device=device))) < tolerance


def test_a_linear_projector_and_the_class_token_change_nothing_about_it(device):
    vlm = make_vlm(projector="linear", image_positions=False, clip=dict(stem="mlp", pool="mean"), device=device)
    assert max(errors(vlm)) < 1e-12


def test_a_resampler_changes_nothing_about_it(device):
    vlm = make_vlm(projector="resampler", queries=4, device=device)
    assert max(errors(vlm, prompts(image_tokens=4))) < 1e-12


def test_an_image_tower_that_trains_changes_nothing_about_it(device):
    vlm = make_vlm(device=device)
    vlm.visual.requires_grad_(True)
    assert max(errors(vlm)) < 1e-12


def test_the_prompts_are_of_every_kind_and_the_outputs_far_from_trivial(device):
    ids = IDS.to(device)
    batch = to_batch(ROWS, device)
    assert batch.length.tolist() == [13, 6, 26, 12, 1] and batch.image_row.tolist() == [0, 2, 2, 3]
    out = make_vlm(device=device)(batch, ids, T)
    assert out.logp.shape == out.entropy.shape == (P, G, C) and out.hidden.shape == (P, G, C + 1, 24)
    assert out.logp.std() > 1 and out.hidden.std() > 0.5


def test_a_completion_of_one_token_and_a_group_of_one(device):
    ids = IDS.to(device)
    vlm = make_vlm(device=device)
    given = vlm(to_batch(ROWS, device), ids[:, :1, :1], T)
    whole = vlm(to_batch(ROWS, device), ids, T)
    assert difference(given.logp, whole.logp[:, :1, :1]) < 1e-12
    assert difference(given.hidden, whole.hidden[:, :1, :2]) < 1e-12


def test_state_0_is_the_last_state_of_the_prompt_for_the_whole_group(device):
    ids = IDS.to(device)
    vlm = make_vlm(device=device)
    hidden = vlm(to_batch(ROWS, device), ids).hidden
    for p in range(P):
        last = stream(vlm, ROWS, p, ids[0, 0, :0])[-1]
        for g in range(G):
            assert difference(hidden[p, g, 0], last) < 1e-12


def test_completions_of_a_group_do_not_see_each_other_nor_their_own_future(device):
    ids = IDS.to(device)
    vlm = make_vlm(device=device)
    changed = ids.clone()
    changed[:, 1, 2] = (changed[:, 1, 2] - 2) % (VOCAB - 3) + 3         # another token
    before, after = (vlm(to_batch(ROWS, device), given).hidden for given in (ids, changed))
    moved = (before - after).abs().amax(-1).cpu() > 1e-9                # (P, G, C + 1)
    wanted = torch.zeros(P, G, C + 1, dtype=torch.bool)
    wanted[:, 1, 3:] = True                                             # token 2 is first seen in state 3
    assert torch.equal(moved, wanted)


def test_outside_the_mask_nothing_is_computed_and_inside_nothing_changes(device):
    ids = IDS.to(device)
    vlm = make_vlm(device=device)
    mask = (torch.rand(P, G, C, generator=torch.Generator().manual_seed(3)) < 0.6).to(device)
    mask[1] = False                                                     # a group without a token
    a, b, _ = weights(torch.zeros(0, dtype=torch.float64, device=device))
    found = []
    for given in (mask, None):
        out = vlm(to_batch(ROWS, device), ids, T, given)
        logp, entropy = out.logp * mask, out.entropy * mask
        if given is not None:
            assert torch.equal(out.logp, logp) and torch.equal(out.entropy, entropy)
        found.append((logp.detach(), entropy.detach(), gradients(vlm, (a * logp + b * entropy).sum())))
    assert all(difference(one, other) < 1e-12 for one, other in zip(*found))


# ---------------------------------------------------------------- planted mistakes, each of which must be seen

def detached_prefix(monkeypatch):
    original = Attention.completions
    monkeypatch.setattr(Attention, "completions", lambda self, q, ky, vy, kx, vx, lengths: original(
        self, q, ky, vy, kx.detach(), vx.detach(), lengths))


def positions_from_zero(monkeypatch):
    original = Llama.rope

    def rope(self, position, dtype):
        return original(self, position - position[..., :1], dtype)      # of the prompt: 0, 1, ... as before
    monkeypatch.setattr(Llama, "rope", rope)


def positions_after_padding(monkeypatch):
    original = Llama.rope

    def rope(self, position, dtype):
        start = max(len(ids) for ids, _, _ in ROWS)
        return original(self, position if position.ndim == 1 else position - position[..., :1] + start, dtype)
    monkeypatch.setattr(Llama, "rope", rope)


def first_token_without_loss(monkeypatch):
    original = VLM.forward

    def forward(self, *args):
        out = original(self, *args)
        logp = torch.cat([out.logp[..., :1].detach(), out.logp[..., 1:]], dim=-1)
        entropy = torch.cat([out.entropy[..., :1].detach(), out.entropy[..., 1:]], dim=-1)
        hidden = torch.cat([out.hidden[..., :1, :].detach(), out.hidden[..., 1:, :]], dim=-2)
        return Output(logp, entropy, hidden)
    monkeypatch.setattr(VLM, "forward", forward)


def first_state_from_padding(monkeypatch):
    original = Llama.forward

    def forward(self, x, length, y=None):
        x, y = original(self, x, length, y)
        if y is not None:
            y = torch.cat([x[:, -1, None, None].expand_as(y[:, :, :1]), y[:, :, 1:]], dim=2)
        return x, y
    monkeypatch.setattr(Llama, "forward", forward)


def padding_seen(monkeypatch):
    original = Attention.completions
    monkeypatch.setattr(Attention, "completions", lambda self, q, ky, vy, kx, vx, lengths: original(
        self, q, ky, vy, kx, vx, [kx.shape[-2]] * len(lengths)))


@pytest.mark.parametrize("plant, value_too", [
    (detached_prefix, False), (first_token_without_loss, False), (positions_from_zero, True),
    (positions_after_padding, True), (first_state_from_padding, True), (padding_seen, True)])
def test_a_planted_mistake_is_caught(plant, value_too, monkeypatch, device):
    vlm = make_vlm(device=device)
    wanted_values, wanted_grads = row_by_row(vlm)
    plant(monkeypatch)
    values, grads = shared(vlm)
    assert difference(grads, wanted_grads) > 0.05
    error = difference(values, wanted_values)
    assert error > 0.05 if value_too else error < 1e-12
