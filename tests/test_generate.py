"""Cached, batched sampling on a shared prefix against plain re-computation of each row from the start."""
import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F

from model import generate as module
from model import machine
from model.generate import FEW_KEYS, FEW_QUERIES, Sampler, _attend, draw_noise, generate, prompts_at_a_time
from model.memory import slot
from tiny import BOS, EOS, PAD, VOCAB, difference, home, make_vlm, prompts, random_completions, stream, to_batch

ROWS = prompts()
P, G = len(ROWS), 3
BANNED = (PAD, BOS)
IDS = random_completions(P, G, 6, seed=7)


def model(dtype=torch.float64, seed=0, often=0.0, device="cpu"):
    """The same on every device. often: how much the states' mean speaks for EOS, so that rows end early, each at
    another length."""
    vlm = make_vlm(dtype, seed)
    if often:
        with torch.no_grad():
            states = vlm(to_batch(ROWS), IDS).hidden.flatten(0, 2)
            vlm.llm.lm_head.weight[EOS] += often * states.mean(0) / states.mean(0).square().sum()
    return vlm.to(device)


def noise(seed, group, max_new, device, prompts=P):
    """The numbers that choose the tokens, the same on every device."""
    return draw_noise((prompts, group), max_new, torch.Generator().manual_seed(seed), "cpu").to(device)


def uncached_greedy(vlm, p, max_new, before=(), rows=ROWS):
    """Tokens of prompt p continued greedily after `before`, everything computed anew for each."""
    new = []
    while len(new) < max_new and new[-1:] != [EOS]:
        tokens = torch.tensor([*before, *new], dtype=torch.long, device=home(vlm))
        logits = stream(vlm, rows, p, tokens)[-1] @ vlm.llm.head.T
        logits[list(BANNED)] = float("-inf")
        new.append(int(logits.argmax()))
    return new


def kept(done):
    """P lists of G lists of tokens."""
    return [[row[keep].tolist() for row, keep in zip(*group)] for group in zip(done.ids, done.mask)]


def last_state(vlm, p, tokens):
    with torch.no_grad():
        return stream(vlm, ROWS, p, torch.as_tensor(tokens, dtype=torch.long, device=home(vlm)))[-1]


# ---------------------------------------------------------------- against uncached computation

@torch.no_grad()
@pytest.mark.parametrize("seed, often", [(4, 0.0), (2, 2.0), (3, 1.0)])
def test_cached_greedy_equals_uncached(seed, often, device):
    vlm = model(seed=seed, often=often, device=device)
    done, _ = generate(vlm, to_batch(ROWS, device), 2, 21, EOS, temperature=0, banned=BANNED)
    wanted = [uncached_greedy(vlm, p, 21) for p in range(P)]
    assert kept(done) == [[row, row] for row in wanted]
    assert len({len(row) for row in wanted}) > 2            # rows did end at different lengths
    assert not done.ids[~done.mask].any() and not done.logp[~done.mask].any()


@torch.no_grad()
def test_cached_greedy_equals_uncached_behind_a_resampler_and_a_tower_that_trains(device):
    vlm = make_vlm(projector="resampler", queries=4, device=device)
    vlm.visual.requires_grad_(True)
    rows = prompts(image_tokens=4)
    done, _ = generate(vlm, to_batch(rows, device), 2, 12, EOS, temperature=0, banned=BANNED)
    wanted = [uncached_greedy(vlm, p, 12, rows=rows) for p in range(P)]
    assert kept(done) == [[row, row] for row in wanted]
    logp = vlm(to_batch(rows, device), done.ids).logp
    assert ((logp - done.logp).exp() - 1)[done.mask].abs().max() <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-6)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_sampling_equal_those_of_the_update(temperature, dtype, tolerance, monkeypatch, device):
    dropped = []
    original = Sampler.select
    monkeypatch.setattr(Sampler, "select", lambda self, *at: dropped.append(1) or original(self, *at))
    vlm = model(dtype, often=2.0, device=device)
    done, _ = generate(vlm, to_batch(ROWS, device), 5, 23, EOS, temperature=temperature, banned=BANNED,
                       noise=noise(0, 5, 23, device))
    logp = vlm(to_batch(ROWS, device), done.ids, temperature).logp
    assert ((logp - done.logp).exp() - 1)[done.mask].abs().max() <= tolerance
    assert dropped and len(done.mask.sum(-1).unique()) > 5
    # The other temperature is told apart.
    other = vlm(to_batch(ROWS, device), done.ids, 1.7 - temperature).logp
    assert ((other - done.logp).exp() - 1)[done.mask].abs().max() > 0.1


@torch.no_grad()
def test_dropping_ended_rows_changes_no_token(device):
    vlm, batch = model(often=2.0, device=device), to_batch(ROWS * 2, device)
    options = dict(temperature=0, banned=BANNED)
    sampler = Sampler(vlm).prefill(batch, G, 21)
    dropping = sampler.decode(21, EOS, **options)
    assert sampler.position.numel() < 2 * P * G             # some were dropped
    keeping = generate(vlm, batch, G, 21, EOS, drop=False, **options)[0]
    # Logits of fewer rows may round otherwise; the greedy token's lead over the next is far beyond that.
    assert torch.equal(dropping.ids, keeping.ids) and torch.equal(dropping.mask, keeping.mask)
    assert difference(dropping.logp, keeping.logp) < 1e-6


@torch.no_grad()
def test_what_a_row_samples_depends_on_no_other_row(device):
    vlm = model(often=2.0, device=device)
    found = []
    for drop in (True, False):
        done, _ = generate(vlm, to_batch(ROWS * 2, device), G, 21, EOS, banned=BANNED, drop=drop,
                           noise=noise(5, G, 21, device, 2 * P))
        found.append(done)
    assert torch.equal(found[0].ids, found[1].ids) and len(found[0].mask.sum(-1).unique()) > 5
    sampler = Sampler(vlm)
    whole, *parts = [
        sampler.complete(vlm.encode(to_batch(ROWS, device)), G, 21, EOS, torch.Generator(device).manual_seed(6), rows,
                         banned=BANNED, pad_id=PAD) for rows in (100, 1, 2 * G + 1)]
    assert not sampler.cache            # nothing is held until the next rollout
    for part in parts:
        assert torch.equal(part.ids, whole.ids) and torch.equal(part.mask, whole.mask)
        assert difference(part.logp, whole.logp) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("patience", [3, 32])
def test_asking_rarely_whether_rows_have_ended_changes_nothing(patience, monkeypatch, device):
    vlm = model(often=4.0, device=device)
    found = []
    for tokens in (1, patience):
        monkeypatch.setitem(module.PATIENCE, device, tokens)
        found.append(generate(vlm, to_batch(ROWS, device), G, 40, EOS, banned=BANNED,
                              noise=noise(5, G, 40, device))[0])
    often, rarely = found
    assert torch.equal(often.ids, rarely.ids) and torch.equal(often.mask, rarely.mask)
    assert often.ids.shape[-1] < 40 and difference(often.logp, rarely.logp) < 1e-12


def test_a_rollout_goes_in_parts_where_memory_has_no_room_for_all(monkeypatch):
    vlm = model()
    batch = to_batch(ROWS)
    prompt = (batch.ids.shape[1] + G * 21) * slot(vlm.llm)
    for room, wanted in ((None, P), (2 * prompt * P, P), (2 * prompt * P - 2, P - 1), (5 * prompt, 2), (0, 1)):
        monkeypatch.setattr(machine, "room", lambda device: room)
        assert prompts_at_a_time(vlm.llm, batch, G, 21) == wanted
    assert prompts_at_a_time(vlm.llm, batch, G, 21, rows=2 * G + 1) == 2


@torch.no_grad()
def test_selecting_rows_holds_one_layer_twice_at_most(monkeypatch):
    sampler = Sampler(model()).prefill(to_batch(ROWS), G, 6).extend(IDS[..., :3])
    layers = len(sampler.cache)
    original = Sampler._select_slots
    old = [weakref.ref(keys) for keys, _ in sampler.cache]
    alive = []
    monkeypatch.setattr(Sampler, "_select_slots", lambda *args: alive.append(sum(ref() is not None for ref in old))
                        or original(*args))
    sampler.select(torch.arange(P), torch.zeros(P, 2, dtype=torch.long))
    # Keys and values of each layer, then the slots that are taken, beside the last layer as it was.
    assert alive == [count for count in range(layers, 0, -1) for _ in "kv"] + [1]


def test_worth_dropping_keeps_every_live_row_once():
    alive = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1]]).bool()
    chosen, rows = module._worth_dropping(alive)
    assert chosen.tolist() == [1, 2] and rows.tolist() == [[1, 3], [3, 0]]
    alive = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()
    assert module._worth_dropping(alive) is None            # one full row: nothing narrower holds it
    assert module._worth_dropping(torch.tensor([[1, 1, 1, 1, 0]] * 2).bool()) is None       # saves a fifth only


@torch.no_grad()
@pytest.mark.parametrize("steps", [(1, 1), (3,), (2, 3, 1)])
def test_extended_text_equals_uncached(steps, device):
    ids = IDS.to(device)
    vlm = model(device=device)
    sampler = Sampler(vlm).prefill(to_batch(ROWS, device), G, 6)
    used = 0
    for n in steps:
        sampler.extend(ids[..., used:used + n])
        used += n
        for p in range(P):
            for g in range(G):
                assert difference(sampler.state[p, g], last_state(vlm, p, ids[p, g, :used])) < 1e-12
    lengths = torch.tensor([len(row[0]) for row in ROWS])[:, None]
    assert torch.equal(sampler.position.cpu(), lengths + used + 0 * IDS[..., 0])


@torch.no_grad()
def test_extend_then_decode_equals_uncached(device):
    ids = IDS.to(device)
    vlm = model(often=1.0, device=device)
    done = Sampler(vlm).prefill(to_batch(ROWS, device), G, 15).extend(ids[..., :4]).decode(11, EOS, temperature=0,
                                                                                         banned=BANNED)
    assert kept(done) == [[uncached_greedy(vlm, p, 11, ids[p, g, :4].tolist()) for g in range(G)] for p in range(P)]


@torch.no_grad()
def test_holes_of_rows_that_sat_out_are_seen_by_nothing(device):
    ids = IDS.to(device)
    vlm = model(device=device)
    alive = (torch.rand(P, G, generator=torch.Generator().manual_seed(1)) < 0.5).to(device)
    sampler = Sampler(vlm).prefill(to_batch(ROWS, device), G, 6)
    sampler.extend(ids[..., :1], alive)
    for p in range(P):
        for g in range(G):
            assert difference(sampler.state[p, g], last_state(vlm, p, ids[p, g, :int(alive[p, g])])) < 1e-12
    sampler.extend(ids[..., 1:3], ~alive).extend(ids[..., 3:6])
    for p in range(P):
        for g in range(G):
            mine = torch.cat([ids[p, g, :1] if alive[p, g] else ids[p, g, 1:3], ids[p, g, 3:6]])
            assert difference(sampler.state[p, g], last_state(vlm, p, mine)) < 1e-12
            assert sampler.position[p, g] == len(ROWS[p][0]) + len(mine)


@torch.no_grad()
def test_extending_after_rows_ended_at_different_lengths_equals_uncached(device):
    ids = IDS.to(device)
    # What a decode leaves of a row: all of it but its last token, EOS or the one that used up the budget.
    vlm = model(often=1.0, device=device)
    sampler = Sampler(vlm).prefill(to_batch(ROWS, device), G, 9 + 4)
    first = sampler.decode(9, EOS, temperature=1.0, banned=BANNED, drop=False, noise=noise(2, G, 9, device))
    assert len(first.mask.sum(-1).unique()) > 3
    before = [[row[:-1] + ids[p, g, :2].tolist() for g, row in enumerate(group)] for p, group in enumerate(kept(first))]
    sampler.extend(ids[..., :2])
    for p in range(P):
        for g in range(G):
            assert difference(sampler.state[p, g], last_state(vlm, p, before[p][g])) < 1e-12
    second = sampler.decode(3, EOS, temperature=0, banned=BANNED)
    assert kept(second) == [[uncached_greedy(vlm, p, 3, row) for row in group] for p, group in enumerate(before)]


@torch.no_grad()
def test_select_goes_on_with_the_chosen_rows(device):
    ids = IDS.to(device)
    vlm = model(device=device)
    sampler = Sampler(vlm).prefill(to_batch(ROWS, device), G, 6).extend(ids[..., :3])
    chosen = torch.tensor([2, 0, 2], device=device)                                 # indices may repeat
    rows = torch.tensor([[1, 1], [2, 0], [0, 2]], device=device)
    sampler.select(chosen, rows).extend(ids[:3, :2, 3:5])
    for i, p in enumerate(chosen.tolist()):
        for j, g in enumerate(rows[i].tolist()):
            mine = torch.cat([ids[p, g, :3], ids[i, j, 3:5]])
            assert difference(sampler.state[i, j], last_state(vlm, p, mine)) < 1e-12


# ---------------------------------------------------------------- the cache

@torch.no_grad()
def test_the_prompt_is_cached_once_whatever_the_group():
    for group in (1, 5):
        sampler = Sampler(model()).prefill(to_batch(ROWS), group, 7)
        assert {tuple(t.shape) for layer in sampler.cache for t in layer} == {(P, 2, 26 + 7 * group, 4)}   # Hk, T, K


@torch.no_grad()
def test_more_tokens_than_the_capacity_are_refused():
    sampler = Sampler(model()).prefill(to_batch(ROWS), G, 4).extend(IDS[..., :3])
    with pytest.raises(ValueError, match="2 tokens do not fit: 3 of 4"):
        sampler.extend(IDS[..., :2])


@torch.no_grad()
def test_pictures_are_encoded_once_and_prompts_once():
    vlm = model()
    ran = {"picture": 0, "prompt": 0}
    vlm.visual.ln_pre.register_forward_pre_hook(lambda _, x: ran.update(picture=ran["picture"] + len(x[0])))
    prompt = type(vlm.llm.layers[0]).prompt

    def counted(self, x, rope):
        ran["prompt"] += len(x)
        return prompt(self, x, rope)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(vlm.llm.layers[0]), "prompt", counted)
        generate(vlm, to_batch(ROWS), 7, 5, EOS, banned=BANNED)
    assert ran == {"picture": 4, "prompt": P * len(vlm.llm.layers)}


# ---------------------------------------------------------------- what is sampled

@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_banned_and_image_ids_are_never_sampled_even_when_their_logits_are_the_largest(temperature, device):
    vlm = model(torch.float32, device=device)
    direction = torch.randn(24, generator=torch.Generator().manual_seed(0)).to(device)
    vlm.llm.lm_head.weight[PAD], vlm.llm.lm_head.weight[BOS] = 1e4 * direction, -1e4 * direction    # one is far ahead
    options = dict(temperature=temperature, generator=torch.Generator(device).manual_seed(0))
    free = generate(vlm, to_batch(ROWS, device), 5, 9, EOS, **options)[0]
    assert (free.ids[free.mask] <= BOS).float().mean() > 0.9
    done = generate(vlm, to_batch(ROWS, device), 5, 9, EOS, banned=BANNED, **options)[0]
    assert done.mask.any() and BOS < done.ids[done.mask].min() and done.ids[done.mask].max() < VOCAB
    assert done.ids.min() >= 0 > vlm.config.image_id


@torch.no_grad()
def test_top_k_and_top_p_leave_the_likeliest_tokens(device):
    vlm, batch = model(device=device), to_batch(ROWS, device)
    options = dict(temperature=3.0, banned=BANNED)
    greedy = generate(vlm, batch, 4, 9, EOS, temperature=0, banned=BANNED)[0]
    for cut in (dict(top_k=1), dict(top_p=1e-6)):
        done = generate(vlm, batch, 4, 9, EOS, noise=noise(0, 4, 9, device), **options, **cut)[0]
        assert torch.equal(done.ids, greedy.ids)
    ranks = {}
    for top_k in (0, 3):
        done = generate(vlm, batch, 4, 9, EOS, noise=noise(0, 4, 9, device), top_k=top_k, **options)[0]
        states = vlm(batch, done.ids).hidden[..., :-1, :]
        logits = states @ vlm.llm.head.T
        logits[..., list(BANNED)] = float("-inf")
        chosen = logits.gather(-1, done.ids[..., None])
        ranks[top_k] = (logits > chosen).sum(-1)[done.mask]
    assert ranks[3].max() == 2 < ranks[0].max()


@torch.no_grad()
def test_no_end_before_min_new(device):
    vlm, lengths = model(often=2.0, device=device), {}
    for min_new in (0, 4):
        done = generate(vlm, to_batch(ROWS, device), 9, 9, EOS, banned=BANNED, min_new=min_new,
                        noise=noise(0, 9, 9, device))[0]
        lengths[min_new] = done.mask.sum(-1)
    assert (lengths[0] <= 4).sum() > 10 and lengths[4].min() == 5


@torch.no_grad()
def test_the_mask_ends_with_eos_or_at_the_budget(device):
    done = generate(model(often=1.0, device=device), to_batch(ROWS, device), 9, 7, EOS, banned=BANNED, pad_id=5,
                    noise=noise(0, 9, 7, device))[0]
    length = done.mask.sum(-1)
    assert torch.equal(done.mask, torch.arange(7, device=device) < length[..., None])
    ends = done.ids.gather(-1, length[..., None] - 1)[..., 0] == EOS
    assert torch.equal(ends, (done.ids == EOS).any(-1)) and (length[~ends] == 7).all() and ends.any() and not ends.all()
    assert (done.ids[~done.mask] == 5).all()


@torch.no_grad()
def test_the_same_seed_samples_the_same(device):
    vlm, batch = model(device=device), to_batch(ROWS, device)
    runs = [generate(vlm, batch, 5, 7, EOS, generator=torch.Generator(device).manual_seed(seed))[0].ids
            for seed in (3, 3, 4)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_sample_and_train_as_plain_ones_do():
    vlm, found = model(torch.float32), []
    for compiled in (False, True):
        if compiled:
            vlm.llm.compile_blocks()
        vlm.zero_grad()
        out = vlm(to_batch(ROWS), IDS)
        out.logp.sum().backward()
        grads = {name: p.grad.clone() for name, p in vlm.named_parameters() if p.grad is not None}
        done, _ = generate(vlm, to_batch(ROWS), G, 9, EOS, temperature=0, banned=BANNED)
        found.append((kept(done), {"logp": out.logp.detach(), **grads}))
    assert found[0][0] == found[1][0] and difference(found[1][1], found[0][1]) < 1e-5
    assert vlm.state_dict().keys() == model().state_dict().keys()


@pytest.mark.parametrize("queries", [1, FEW_QUERIES, FEW_QUERIES + 1])
@pytest.mark.parametrize("keys", [7, FEW_KEYS + 1])
def test_few_queries_attend_as_many_do(queries, keys):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)
    q = drawn(2, 3, queries, 5)
    cache = drawn(2, 2, 3, keys + 4, 5)[..., :keys, :]          # a slice, as of a cache with room left
    mask = torch.zeros(2, 1, queries, keys, dtype=torch.float64)
    mask[..., 2:5] = float("-inf")
    expected = F.scaled_dot_product_attention(q, *cache, attn_mask=mask)
    assert (_attend(q, *cache, mask) - expected).abs().max() < 1e-12
