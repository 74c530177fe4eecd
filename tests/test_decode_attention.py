"""kernels.decode_attention: one new token a row on the cache that the rows of a prompt share."""
import importlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernel_tools import DEVICES, PLAIN, TRITON_DEVICE as DEVICE
from kernel_tools import WITH_TRITON, assert_equals, error, mostly_slow, rounded, with_mistakes
from kernels import decode_attention, decode_attention_reference, prefix_attention
from model import generate as module
from model.generate import Sampler, draw_noise
from tiny import BOS, EOS, PAD, difference, make_vlm, prompts, speak_for, to_batch

FILE = importlib.import_module("kernels.decode_attention")
SEEN = 30               # how much larger what lies in a slot that is not taken is: a look at it is no rounding


@pytest.fixture(autouse=True)
def chunks(blocks, monkeypatch):
    """Chunks of two blocks where blocks are small."""
    if FILE.BLOCK == 16:
        monkeypatch.setattr(FILE, "CHUNK", 32)


def problem(P=2, H=6, Hk=2, G=3, K=24, T=37, used=5, holes=0.3, seed=0):
    """Tensors of decode_attention, fp64. The cache has room for more steps than are used, with numbers in it."""
    generator = torch.Generator().manual_seed(seed)
    S = T + used * G
    q = torch.randn(P, H, G, K, generator=generator, dtype=torch.float64)
    keys, values = torch.randn(2, P, Hk, S + 2 * G, K, generator=generator, dtype=torch.float64)
    taken = torch.rand(P, S + 2 * G, generator=generator) >= holes
    if holes:
        taken[-1, 1:T] = False                          # a prompt of one token, padded
        taken[0, T:S].view(used, G)[:, 0] = False       # a row that has written nothing
    taken[:, 0] = True
    taken[0, T - 1] = True
    for slots in (keys, values):
        slots *= torch.where(taken, 1.0, SEEN)[:, None, :, None]
    return dict(q=q, keys=keys[:, :, :S], values=values[:, :, :S], taken=taken[:, :S], prompt_slots=T)


SHAPES = dict(
    ragged=dict(), one_step=dict(used=1), no_step=dict(used=0), one_row=dict(P=1, G=1, used=20),
    no_groups=dict(H=2, T=16, used=16), one_key_head=dict(H=5, Hk=1, K=4), more_rows_than_a_block=dict(G=7, used=18),
    wide_head=dict(P=1, H=2, Hk=1, K=80, T=1, used=33), all_taken=dict(holes=0.0, used=17))


# ---------------------------------------------------------------- one definition

@DEVICES
@pytest.mark.parametrize("name, chunk", [*((name, 16) for name in SHAPES), ("more_rows_than_a_block", 32),
                                         ("ragged", 256)])
def test_equals_the_reference(name, chunk, device, monkeypatch):
    monkeypatch.setattr(FILE, "CHUNK", chunk)
    tensors = problem(**SHAPES[name])
    prompt_slots = tensors.pop("prompt_slots")
    assert_equals(decode_attention, decode_attention_reference, tensors, device=device, prompt_slots=prompt_slots)


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_off_by_its_rounding(dtype, device):
    given = rounded(problem(), dtype, device)
    found = decode_attention(**given)
    wanted = decode_attention_reference(**rounded(given, torch.float64, "cpu"))
    # The interpreter cuts digits off where a GPU rounds.
    assert found.dtype == dtype and difference(found.cpu(), wanted) < 2 * torch.finfo(dtype).eps


@DEVICES
def test_the_last_token_of_each_completion_gathers_what_it_does_in_full_attention(device):
    P, G, Hk, r, C, T, K = 2, 3, 2, 3, 18, 21, 16
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(P, G, Hk * r, C, K, generator=generator)
    k, v = torch.randn(2, P, G, Hk, C, K, generator=generator)
    kx, vx = torch.randn(2, P, Hk, T, K, generator=generator)
    wanted = prefix_attention(q, k, v, kx, vx, [T] * P)[..., -1, :]                 # (P, G, H, K)

    def cache(prompt, own):
        steps = own.permute(0, 2, 3, 1, 4).flatten(2, 3)                            # (P, Hk, C G, K)
        return torch.cat([prompt, steps], dim=2).to(device)

    taken = torch.ones(P, T + C * G, dtype=torch.bool, device=device)
    found = decode_attention(q[..., -1, :].transpose(1, 2).to(device), cache(kx, k), cache(vx, v), taken, T)
    assert difference(found.cpu(), wanted.transpose(1, 2)) < 1e-5


@DEVICES
def test_tensors_need_not_be_contiguous_and_the_result_has_no_gradient(device):
    given = rounded(problem(), torch.float32, device)
    wanted = decode_attention(**given)
    for name in ("q", "keys", "values"):
        turned = given[name].transpose(1, 2).contiguous().transpose(1, 2)
        assert difference(decode_attention(**given | {name: turned.requires_grad_()}), wanted) < 1e-6
    for name in ("q", "keys", "values", "taken"):           # as every other number of a wider row
        spread = given[name].repeat_interleave(2, dim=-1)[..., ::2]
        assert difference(decode_attention(**given | {name: spread}), wanted) < 1e-6
    given["q"].requires_grad_()
    assert not decode_attention(**given).requires_grad


def test_flops_are_those_of_the_slots_that_a_row_may_see():
    given = rounded(problem(used=5), torch.float32, "cpu")
    with FlopCounterMode(display=False) as counter:
        torch.ops.seethink.decode_attention(*given.values())
    P, H, G, K = given["q"].shape
    seen = 37 + 5
    products = 2            # with the keys and with the values
    assert counter.get_total_flops() == products * 2 * P * H * G * K * seen


@pytest.mark.parametrize("change, names", [
    (dict(q=torch.zeros(2, 6, 24)), r"q \(2, 6, 24\) must have 4 dimensions"),
    (dict(q=torch.zeros(2, 5, 3, 24)), "q's 5 heads must be a multiple of keys' 2"),
    (dict(values=torch.zeros(2, 2, 51, 24)), r"values \(2, 2, 51, 24\) torch.float32 must be \(2, 2, 52, 24\)"),
    (dict(keys=torch.zeros(2, 2, 52, 24).double()), r"keys \(2, 2, 52, 24\) torch.float64 must be .* torch.float32"),
    (dict(taken=torch.zeros(2, 51).bool()), r"taken \(2, 51\) torch.bool must be \(2, 52\) torch.bool, one entry"),
    (dict(taken=torch.zeros(2, 52)), r"taken \(2, 52\) torch.float32 must be \(2, 52\) torch.bool"),
    (dict(prompt_slots=0), r"prompt_slots 0 must lie in \[1, 52\]"),
    (dict(prompt_slots=36), "keys' 16 slots after the prompt must be a multiple of q's 3 rows")])
def test_what_does_not_fit_is_named(change, names):
    with pytest.raises(ValueError, match=names):
        decode_attention(**rounded(problem(), torch.float32, "cpu") | change)


# ---------------------------------------------------------------- planted mistakes, each of which must be seen

# Two chunks of two blocks for the prompt, one for each row; two blocks of rows.
HARD = dict(G=6, T=37, used=19)


def error_of(planted, tmp_path, monkeypatch):
    """How far the file is off the reference where (text, another text) of it is replaced."""
    copy = with_mistakes(FILE, planted, tmp_path)
    monkeypatch.setattr(copy, "CHUNK", 32)
    monkeypatch.setattr(copy, "BLOCK", 16)
    given = rounded(problem(**HARD), torch.float32, DEVICE)
    found = copy.decode_attention(**given).cpu()
    return error(found, decode_attention_reference(**rounded(given, torch.float64, "cpu")))


IN_KERNELS = dict(
    ignores_what_is_taken=("sees = tl.load(taken + slot, mask=n < count, other=0) != 0", "sees = n < count"),
    sees_one_key_past_the_end=("taken + slot, mask=n < count,", "taken + slot, mask=n <= count,"),
    all_rows_see_those_of_row_0=("T + row, G, chunk * CHUNK", "T, G, chunk * CHUNK"),
    a_row_sees_its_neighbour=("T + row, G, chunk * CHUNK", "T + (row + 1) % G, G, chunk * CHUNK"),
    the_newest_token_is_not_seen=("chunk * CHUNK, used,", "chunk * CHUNK, used - 1,"),
    one_step_late=("T + row, G, chunk * CHUNK", "T + row + G, G, chunk * CHUNK"),
    scaled_by_the_padded_width=("scale = K ** -0.5", "scale = constants['WIDTH'] ** -0.5"),
    base_2_for_base_e=(" * math.log2(math.e)", ""),
    query_heads_of_another_key_head=("head * r * q_head", "head * q_head"),
    another_key_head=("head * key_head", "0 * key_head"),
    values_of_another_prompt=("p * value_prompt", "0 * value_prompt"),
    drops_the_last_chunk_of_the_prompt=("triton.cdiv(prompt_slots, CHUNK)", "(prompt_slots // CHUNK)"),
    drops_the_last_chunk_of_the_rows=("triton.cdiv(used, CHUNK)", "(used // CHUNK)"),
    every_block_is_the_first_of_its_chunk=("n = begin + start + ", "n = begin + "),
    no_rescaling_of_the_sum=("s = s * shrink +", "s = s +"),
    no_rescaling_of_the_values=("a = a * shrink[:, None] +", "a = a +"),
    a_block_without_a_token=("finite = tl.where(new > float(\"-inf\"), new, 0.0)", "finite = new"),
    merges_without_rescaling=("share = tl.exp2(l - top)", "share = tl.where(part < parts, 1.0, 0.0)"),
    a_part_does_not_tell_its_sum=("m + tl.log2(sum_or_1)", "m"),
    heads_and_rows_change_places=("head = pair % Hk * r + i % r", "head = pair % Hk * r + i // G"))
IN_PYTORCH = dict(
    ignores_what_is_taken=("return taken[:, None] &", "return torch.ones_like(taken)[:, None] &"),
    sees_every_row=("slot % G == row", "slot % G + 0 * row >= 0"),
    a_row_sees_its_neighbour=("slot % G == row", "slot % G == (row + 1) % G"),
    one_prompt_slot_is_a_rows=("slot < 0", "slot < -1"),
    the_masks_of_other_rows=("sees.repeat(1, r, 1)", "sees.repeat_interleave(r, 1)"),
    another_key_head=("q.unflatten(1, (Hk, r))", "q.unflatten(1, (r, Hk)).transpose(1, 2)"))


@WITH_TRITON
@pytest.mark.parametrize("planted", mostly_slow(IN_KERNELS))
def test_a_mistake_in_the_kernels_is_caught(planted, tmp_path, monkeypatch):
    assert error_of([planted], tmp_path, monkeypatch) > 1e-2


@PLAIN
@pytest.mark.skipif(DEVICE == "cuda", reason="fp32 runs the kernels there")
@pytest.mark.parametrize("planted", IN_PYTORCH.values(), ids=IN_PYTORCH)
def test_a_mistake_in_the_pytorch_form_is_caught(planted, tmp_path, monkeypatch):
    assert error_of([planted], tmp_path, monkeypatch) > 1e-2


def test_without_a_mistake_nothing_is_caught(tmp_path, monkeypatch):
    assert error_of([], tmp_path, monkeypatch) < 1e-5


# ---------------------------------------------------------------- in the sampler

BATCH = prompts()[:3]
ROWS = 3                        # of each prompt
WIDTH = 24                      # of the model's one layer


def refuse(*arguments):
    raise AssertionError("the other form")


def forms(monkeypatch):
    """A sampler of a model whose rows end early, with a prefilled batch: by this op, then again under a mask."""
    vlm = make_vlm(llm=dict(layers=1))
    speak_for(vlm, [EOS], 2.0)
    vlm = vlm.to(DEVICE, torch.float32)
    for patches in (((Sampler, "_mask", refuse),),
                    ((module, "use_triton", lambda x: False), (module, "decode_attention", refuse))):
        with monkeypatch.context() as patch:
            for owner, name, other in patches:
                patch.setattr(owner, name, other)
            yield Sampler(vlm).prefill(to_batch(BATCH, DEVICE), ROWS, 6)


@WITH_TRITON
@torch.no_grad()
def test_a_sampler_draws_the_same_tokens_as_under_a_mask(monkeypatch):
    noise = draw_noise((len(BATCH), ROWS), 6, torch.Generator().manual_seed(2), "cpu").to(DEVICE)
    found = []
    for sampler in forms(monkeypatch):
        found.append(sampler.decode(6, EOS, banned=(PAD, BOS), noise=noise))
        assert sampler.position.numel() < len(BATCH) * ROWS         # some were dropped, others left holes
    split, masked = found
    assert torch.equal(split.ids, masked.ids) and torch.equal(split.mask, masked.mask)
    assert difference(split.logp, masked.logp) < 1e-5 and len(split.mask.sum(-1).unique()) > 3


@WITH_TRITON
@torch.no_grad()
def test_a_sampler_counts_the_products_that_are_computed(monkeypatch):
    flops = []
    for sampler in forms(monkeypatch):
        for _ in range(2):
            sampler.extend(torch.full((len(BATCH), ROWS, 1), 7, device=DEVICE))
        flops.append(sampler.meter.total)
    # Two products less of each query with what the other rows had written by the first step and by the second.
    hidden = (ROWS - 1) * (1 + 2)
    assert flops[1] - flops[0] == 2 * 2 * WIDTH * len(BATCH) * ROWS * hidden


@PLAIN
@pytest.mark.skipif(DEVICE == "cuda", reason="fp32 runs the kernels there")
@torch.no_grad()
def test_on_a_cpu_a_sampler_attends_under_its_mask(monkeypatch):
    monkeypatch.setattr(module, "decode_attention", refuse)
    sampler = Sampler(make_vlm(torch.float32)).prefill(to_batch(BATCH), ROWS, 3)
    for n in (1, 2):
        sampler.extend(torch.full((len(BATCH), ROWS, n), 7))
