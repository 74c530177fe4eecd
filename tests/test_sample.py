"""kernels.sample: frequencies against the distribution it should draw from, at fixed seeds; truncation by hand."""
import importlib

import pytest
import torch

from kernel_tools import DEVICES, PLAIN, TRITON_DEVICE, WITH_TRITON, error, mostly_slow, with_mistakes
from kernels import sample, sample_reference
from kernels.backend import INTERPRET
from tiny import difference

pytestmark = pytest.mark.usefixtures("blocks")
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5])


def ban(size, *tokens):
    return torch.zeros(size, dtype=torch.bool).index_fill(0, torch.tensor(tokens), True)


def draw(logits, n, device="cpu", seed=0, **options):
    """n samples of one row of logits, on the CPU."""
    generator = torch.Generator(device).manual_seed(seed)
    if "banned" in options:
        options["banned"] = options["banned"].to(device)
    return tuple(t.cpu() for t in sample(logits.expand(n, -1).to(device), generator, **options))


def support(logits, n, device="cpu", **options):
    """The tokens that n samples of one row of logits meet."""
    token, _, _ = draw(logits, n, device, **options)
    return set(token.tolist())


def chi_square(token, expected):
    """Of 5 values with 4 degrees of freedom: 18.5 is passed by chance once in a thousand."""
    count = torch.bincount(token, minlength=len(expected))
    inside = expected > 0
    assert not count[~inside].any()
    wanted = expected[inside] * len(token)
    return ((count[inside] - wanted) ** 2 / wanted).sum().item()


# ---------------------------------------------------------------- temperature and bans

@PLAIN
@DEVICES
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_at_the_temperature(temperature, device):
    token, logp, truncated = draw(LOGITS, 20_000, device, temperature=temperature)
    expected = (LOGITS / temperature).softmax(-1)
    assert chi_square(token, expected) < 18.5
    assert chi_square(token, (LOGITS / temperature / 1.2).softmax(-1)) > 50         # a fifth off is seen
    assert difference(logp, expected.log()[token]) < 1e-6 and difference(truncated, logp) < 1e-6


@DEVICES
@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_uniform_still_sample_an_allowed_token(u, device, monkeypatch):
    def constant(*shape, device, **kind):
        return torch.full(shape, u, dtype=torch.float64, device=device)

    monkeypatch.setattr(torch, "rand", constant)
    logits = torch.randn(6, 700, generator=torch.Generator().manual_seed(0))
    token, logp, _ = sample(logits.to(device), banned=ban(700, 0, 1, 699).to(device))
    # Sums of fp32 probabilities lie on both sides of 1.
    assert (token == (2 if u == 0 else 698)).all() and logp.isfinite().all()


@DEVICES
def test_greedy_takes_the_largest_allowed_and_reports_temperature_one(device):
    logits = torch.tensor([[2.0, 1.0, 3.0], [0.0, 5.0, -1.0]]).to(device)
    token, logp, truncated = sample(logits, temperature=0, banned=ban(3, 2).to(device))
    assert token.tolist() == [0, 1]
    assert difference(logp, logits.log_softmax(-1)[[0, 1], [0, 1]]) < 1e-6
    assert difference(truncated, logits[:, :2].log_softmax(-1)[[0, 1], [0, 1]]) < 1e-6


# ---------------------------------------------------------------- top-k and top-p

@DEVICES
@pytest.mark.parametrize("options, left", [
    (dict(banned=ban(5, 0)), [1, 2, 3, 4]), (dict(top_k=2), [0, 4]), (dict(top_k=9), [0, 1, 2, 3, 4]),
    # p = .463, .170, .063, .023, .281: two reach .744.
    (dict(top_p=0.7), [0, 4]), (dict(top_p=0.74), [0, 4]), (dict(top_p=0.75), [0, 1, 4]), (dict(top_p=1e-9), [0]),
    # After top_k the two left have .623 and .377; of all five .463 would not reach .5.
    (dict(top_k=2, top_p=0.5), [0]),
    # Of three the first two reach .547 + .331 = .878.
    (dict(top_k=3, top_p=0.9, banned=ban(5, 0)), [1, 2, 4]),
    (dict(top_k=3, top_p=0.87, banned=ban(5, 0)), [1, 4])], ids=str)
def test_what_is_left_keeps_its_proportions(options, left, device):
    token, logp, truncated = draw(LOGITS, 40 if INTERPRET else 300, device, **options)
    expected = torch.zeros(5)
    expected[left] = LOGITS[left].softmax(-1)
    assert set(token.tolist()) <= set(left) and chi_square(token, expected) < 18.5
    assert difference(truncated.exp(), expected[token]) < 1e-5
    # The update scores the token under the full softmax: so does logp.
    assert difference(logp, LOGITS.log_softmax(-1)[token]) < 1e-6


@PLAIN
@DEVICES
@pytest.mark.parametrize("temperature, left", [
    # At temperature 2 p = .344, .209, .127, .077, .244; at a half .665, .090, .012, .002, .231.
    (2.0, [0, 1, 4]), (0.5, [0, 4])])
def test_the_temperature_comes_before_the_nucleus(temperature, left, device):
    token, logp, _ = draw(LOGITS, 20_000, device, temperature=temperature, top_p=0.75)
    expected = torch.zeros(5)
    expected[left] = (LOGITS[left] / temperature).softmax(-1)
    assert set(token.tolist()) == set(left) and chi_square(token, expected) < 18.5
    assert difference(logp, (LOGITS / temperature).log_softmax(-1)[token]) < 1e-6


def brute_force_nucleus(p, top_p):
    """The smallest set whose mass reaches top_p, of all subsets of the vocabulary; most mass first among equals."""
    masses = []
    for members in range(1, 2 ** len(p)):
        tokens = [v for v in range(len(p)) if members >> v & 1]
        mass = p[tokens].sum().item()
        if mass >= top_p:
            masses.append((len(tokens), -mass, tokens))
    return set(min(masses)[2])


@PLAIN
@DEVICES
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95])
def test_the_nucleus_is_the_smallest_set_that_reaches_p(top_p, seed, device):
    logits = 1.5 * torch.randn(7, generator=torch.Generator().manual_seed(seed))
    wanted = brute_force_nucleus((logits.double() / 0.8).softmax(-1), top_p)
    assert support(logits, 3000, device, temperature=0.8, top_p=top_p) == wanted


@DEVICES
@pytest.mark.parametrize("logits, options, left", [
    ([1.0, 1.0, 1.0, 0.0], dict(top_k=2), {0, 1, 2}),
    ([1.0, 1.0, 1.0, 0.0], dict(top_p=0.4), {0, 1, 2}),
    ([0.0, 1.0, 0.0, 2.0], dict(top_k=1), {3}),
    # The ties that top_k keeps are part of what top_p counts: three thirds.
    ([1.0, 1.0, 1.0, 0.0], dict(top_k=2, top_p=0.99), {0, 1, 2}),
    ([0.0] * 5, dict(top_p=1e-9), {0, 1, 2, 3, 4})], ids=str)
def test_tokens_that_tie_with_the_last_one_kept_stay(logits, options, left, device):
    assert support(torch.tensor(logits), 30, device, **options) == left


@DEVICES
@pytest.mark.parametrize("top_p, left", [(0.57, {0}), (0.58, {0, 1}), (0.85, {0, 1}), (0.86, {0, 1, 2})])
def test_the_token_that_crosses_p_is_kept_and_banned_ones_have_no_mass(top_p, left, device):
    # Probabilities of 4/7, 2/7 and 1/7: sums of .571 and .857. With the banned token they would be under 0.01.
    logits = torch.tensor([2.0, 1.0, 0.0, 9.0]) * torch.tensor(2.0).log()
    assert support(logits, 30, device, top_p=top_p, banned=ban(4, 3)) == left


@DEVICES
@pytest.mark.parametrize("options", [dict(top_k=1), dict(top_p=1e-6)], ids=str)
@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.1, 3.0])
def test_one_token_always_stays_at_any_temperature(temperature, options, device):
    # A floor compared after the division would forbid its own token wherever two divisions round differently.
    rows = 2 if INTERPRET else 40
    logits = torch.randn(rows, 601, generator=torch.Generator().manual_seed(0)).to(device)
    token, logp, truncated = sample(logits, temperature=temperature, **options)
    assert torch.equal(token, logits.argmax(-1)) and not truncated.any()
    assert difference(logp, (logits / temperature).log_softmax(-1).amax(-1)) < 1e-5


@DEVICES
def test_a_truncated_token_keeps_its_log_prob_under_the_full_softmax(device):
    logits = 3 * torch.randn(9, 601, generator=torch.Generator().manual_seed(0))
    token, logp, truncated = sample(logits.to(device), temperature=0.7, top_k=20, top_p=0.9)
    full = (logits.double() / 0.7).log_softmax(-1).gather(-1, token.cpu()[:, None])[:, 0]
    assert difference(logp.cpu(), full) < 1e-5
    assert (truncated > logp + 1e-3).all()


# ---------------------------------------------------------------- one definition, one stream of random numbers

OPTIONS = pytest.mark.parametrize("options", [
    dict(), dict(temperature=0.8, top_k=30), dict(top_p=0.9), dict(temperature=1.3, top_k=30, top_p=0.8),
    dict(temperature=0.8, top_k=300, top_p=0.95, banned=ban(601, 5, 600))], ids=["", "k", "p", "kp", "kpb"])


@DEVICES
@OPTIONS
def test_equals_the_reference(options, device):
    logits = 3 * torch.randn(9, 601, generator=torch.Generator().manual_seed(0))
    given = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        # Drawn in the shape in which sample draws them.
        generator = torch.Generator(device).manual_seed(1)
        u = torch.rand(9, 1, dtype=torch.float64, device=device, generator=generator)[:, 0].cpu()
        wanted = sample_reference(logits.double(), u, **options)
        found = sample(logits.to(device, dtype), torch.Generator(device).manual_seed(1), **given)
        assert torch.equal(found.token.cpu(), wanted.token)
        assert difference(found.logp.cpu(), wanted.logp) < tolerance
        assert difference(found.truncated_logp.cpu(), wanted.truncated_logp) < tolerance


@PLAIN
def test_without_truncation_nothing_changes_by_one_bit_and_nothing_is_sorted(monkeypatch):
    logits = 3 * torch.randn(64, 601, generator=torch.Generator().manual_seed(0))
    banned = ban(601, 5)
    generator = torch.Generator().manual_seed(1)
    # What sampling without truncation is, and was before it had any.
    u = torch.rand(64, 1, dtype=torch.float64, generator=generator)
    z = logits / 0.8
    p = z.masked_fill(banned, float("-inf")).softmax(-1)
    cumulated = p.cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(cumulated, u * cumulated[:, -1:], right=True)

    def refuse(*arguments, **options):
        raise AssertionError("a sort")

    monkeypatch.setattr(torch.Tensor, "sort", refuse)
    monkeypatch.setattr(torch.Tensor, "topk", refuse)
    for options in (dict(), dict(top_k=0, top_p=1.0), dict(top_k=601)):
        given = torch.Generator().manual_seed(1)
        found = sample(logits, given, 0.8, banned=banned, **options)
        assert torch.equal(found.token, token[:, 0])
        assert torch.equal(found.logp, z.log_softmax(-1).gather(-1, token)[:, 0])
        assert torch.equal(found.truncated_logp, p.gather(-1, token).log()[:, 0])
        assert torch.equal(given.get_state(), generator.get_state())


@DEVICES
def test_truncation_draws_as_many_random_numbers(device):
    states = []
    for options in (dict(), dict(top_k=3), dict(top_p=0.5)):
        generator = torch.Generator(device).manual_seed(0)
        sample(torch.randn(3, 7, device=device), generator, **options)
        states.append(generator.get_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


@DEVICES
def test_the_same_uniform_numbers_give_the_same_tokens_as_fp64(device):
    # fp64 runs the PyTorch form, whatever draws fp32.
    logits = 3 * torch.randn(24, 601, generator=torch.Generator().manual_seed(0))
    options = dict(temperature=0.8, top_k=300, top_p=0.95, banned=ban(601, 5, 600).to(device))
    found = [sample(logits.to(device, dtype), torch.Generator(device).manual_seed(1), **options)
             for dtype in (torch.float32, torch.float64)]
    assert torch.equal(found[0].token, found[1].token)
    assert difference(found[0].logp, found[1].logp) < 1e-5
    assert difference(found[0].truncated_logp, found[1].truncated_logp) < 1e-5


@DEVICES
def test_the_floor_is_a_logit_of_the_row_and_the_same_for_equal_logits_of_any_dtype(device):
    floor = importlib.import_module("kernels.sample").sampling_floor
    half = torch.randn(5, 601, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    nothing = torch.zeros(601, dtype=torch.bool, device=device)
    for top_k, top_p in ((7, 1.0), (0, 0.9), (50, 0.9)):
        found = floor(half, nothing, 0.7, top_k, top_p)
        assert (half == found).any(-1).all()
        for dtype in (torch.float32, torch.float64):
            assert torch.equal(floor(half.to(dtype), nothing, 0.7, top_k, top_p), found.to(dtype))
    assert floor(half, nothing, 0.7, 0, 1.0) is None


# ---------------------------------------------------------------- a row in parts

FILE = importlib.import_module("kernels.sample")
BLOCK = 16


def split_rows():
    """logits (8, 100), of 7 parts, and uniform numbers (8,): random rows, rows whose mass is in one part or at a part's
    ends, a row that is banned but for its last token."""
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(8, 100, generator=generator)
    logits[2, 40] = 30.0                    # a part's
    logits[3, 15:17] += 20.0                # the last of one part and the first of the next
    logits[4] = float("-inf")
    logits[4, 99] = -3.0                    # nothing else
    logits[5, :64] = float("-inf")          # four parts of nothing
    logits[6] -= 500.0
    logits[7, 41] = 5.0                     # banned in the tests
    u = torch.tensor([0.03, 0.97, 0.5, 0.6, 0.5, 0.01, 0.4, 0.999], dtype=torch.float64)
    return logits, u


@DEVICES
@pytest.mark.parametrize("options", [dict(), dict(temperature=0.7, top_k=9), dict(temperature=3.0)], ids=str)
def test_the_parts_of_a_row_draw_what_the_whole_does(options, device, monkeypatch):
    monkeypatch.setattr(FILE, "BLOCK", BLOCK)
    logits, u = split_rows()
    banned = ban(100, 0, 41, 98)
    wanted = sample_reference(logits.double(), u, banned=banned, **options)
    found = sample(logits.to(device), banned=banned.to(device), u=u.to(device), **options)
    assert torch.equal(found.token.cpu(), wanted.token)
    assert difference(found.logp.cpu(), wanted.logp) < 1e-5
    assert difference(found.truncated_logp.cpu(), wanted.truncated_logp) < 1e-5


@DEVICES
def test_greedy_takes_the_first_of_equal_largest_whatever_part_it_is_in(device, monkeypatch):
    monkeypatch.setattr(FILE, "BLOCK", BLOCK)
    logits = torch.zeros(4, 100)
    for row, tied in enumerate(([50, 70], [15, 16], [99, 98], [3, 97])):
        logits[row, tied] = 2.0
    token = sample(logits.to(device), temperature=0, banned=ban(100, 3).to(device)).token
    assert token.tolist() == [50, 15, 98, 97]


@DEVICES
def test_one_part_or_a_vocabulary_of_whole_parts(device, monkeypatch):
    monkeypatch.setattr(FILE, "BLOCK", BLOCK)
    for V in (1, 15, 16, 17, 32, 80):
        logits = torch.randn(3, V, generator=torch.Generator().manual_seed(V))
        u = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
        wanted = sample_reference(logits.double(), u)
        assert torch.equal(sample(logits.to(device), u=u.to(device)).token.cpu(), wanted.token)


IN_KERNELS = dict(
    parts_merge_without_rescaling=("return top, tl.exp2((m - finite) * scale) * tl.load(sums",
                                   "return top, (m > float(\"-inf\")) * tl.load(sums"),
    what_lies_before_the_part_is_lost=("passes = before + tl.cumsum(e, 0) > wanted",
                                       "passes = tl.cumsum(e, 0) > wanted"),
    the_part_counts_itself_before=("tl.where(part < chosen, s_allowed, 0.0)",
                                   "tl.where(part <= chosen, s_allowed, 0.0)"),
    every_part_is_the_first=("least, part * BLOCK, V, BLOCK)", "least, 0, V, BLOCK)"),
    the_token_of_the_first_part=("found = chosen * BLOCK + first_or_last", "found = first_or_last"),
    sums_of_all_for_those_of_the_allowed=("place += tl.num_programs(0).to(tl.int64) * parts", "place += 0 * parts"),
    another_rows_parts=("    allowed_place = (tl.num_programs(0) + row) * parts + part",
                        "    allowed_place = tl.num_programs(0) * parts + part"),
    bans_are_not_read=("mask=column < V, other=1) == 0) & (x >= least)",
                       "mask=column < V, other=1) < 2) & (x >= least)"),
    base_e_for_base_2=("    scale = LOG2_E / temperature\n    x, allowed",
                       "    scale = 1 / temperature\n    x, allowed"),
    an_empty_part=("finite = tl.where(m > float(\"-inf\"), m, 0.0)            # -inf minus",
                   "finite = m  # -inf minus"),
    the_last_part_for_the_first=("first = tl.min(tl.where(passes, index, END), 0)",
                                 "first = tl.max(tl.where(passes, index, 0), 0)"),
    the_truncated_log_prob_is_of_all=("(x - m_allowed) / temperature - tl.log(total)",
                                      "(x - m) / temperature - tl.log(tl.sum(s, 0))"))


def error_with(planted, folder, monkeypatch):
    """Infinite where a token differs."""
    copy = with_mistakes(FILE, planted, folder)
    monkeypatch.setattr(copy, "BLOCK", BLOCK)
    logits, u = split_rows()
    banned = ban(100, 0, 41, 98)
    wanted = sample_reference(logits.double(), u, 0.7, banned=banned)
    found = copy.sample(logits.to(TRITON_DEVICE), None, 0.7, banned=banned.to(TRITON_DEVICE), u=u.to(TRITON_DEVICE))
    if not torch.equal(found.token.cpu(), wanted.token):
        return float("inf")
    return max(error(x.cpu(), y) for x, y in zip(found[1:], wanted[1:]))


@WITH_TRITON
@pytest.mark.parametrize("planted", mostly_slow(IN_KERNELS))
def test_a_mistake_in_the_kernels_is_caught(planted, tmp_path, monkeypatch):
    assert error_with([planted], tmp_path, monkeypatch) > 1e-3


@WITH_TRITON
def test_without_a_mistake_nothing_is_caught(tmp_path, monkeypatch):
    assert error_with([], tmp_path, monkeypatch) < 1e-5


def test_any_leading_shape():
    for options in (dict(), dict(top_k=3), dict(top_p=0.5)):
        out = sample(torch.zeros(2, 3, 7), torch.Generator().manual_seed(0), **options)
        assert [t.shape for t in out] == [(2, 3)] * 3
        assert [t.shape for t in sample(torch.zeros(0, 3, 7), **options)] == [(0, 3)] * 3


@pytest.mark.parametrize("options, names", [
    (dict(logits=torch.zeros(2, 3, dtype=torch.long)), "logits must hold floating"),
    (dict(temperature=-1), "temperature -1"), (dict(temperature=float("nan")), "temperature nan"),
    (dict(top_k=-1), "top_k -1 must not be negative; 0 is no limit"),
    (dict(top_p=0.0), r"top_p 0.0 must lie in \(0, 1\]"), (dict(top_p=1.1), "top_p 1.1"),
    (dict(top_p=float("nan")), "top_p nan"),
    (dict(banned=ban(4, 0)), r"banned \(4,\) torch.bool must be \(3,\)")])
def test_what_does_not_fit_is_named(options, names):
    with pytest.raises(ValueError, match=names):
        sample(**dict(logits=torch.zeros(2, 3)) | options)
