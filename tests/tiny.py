"""A vision-language model small enough to check by brute force, prompts of every odd kind, comparisons."""
import re

import numpy as np
import pytest
import torch

from data import scenes
from data.sample import collate
from model.clip import ClipConfig
from model.llama import LlamaConfig
from model.vlm import VLM, VlmConfig

PAD, BOS, EOS, IMAGE = 0, 1, 2, -200
SIDE, PATCHES, VOCAB = 15, 9, 37
CLIP = dict(image_size=SIDE, patch=5, width=12, layers=2, heads=3, embed=7)
LLM = dict(vocab=VOCAB, width=24, layers=2, heads=6, kv_heads=2, ff=28, tied=False)


def shake(module, seed=0, scale=0.2):
    """Default initialisation hides bugs (zero biases, unit norms, small weights): all parameters + scale * randn."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module


def make_vlm(dtype=torch.float64, seed=0, clip=(), llm=(), device="cpu", **options):
    """A VLM whose parameters all matter, the same on every device; clip, llm: changes to CLIP and LLM; options: other
    VlmConfig fields."""
    options = dict(image_positions=True, projector="mlp2x_gelu") | options
    vlm = VLM(VlmConfig(ClipConfig(**CLIP | dict(clip)), LlamaConfig(**LLM | dict(llm)), **options))
    for name, parameter in vlm.named_parameters():          # whatever the initialisation is
        torch.nn.init.constant_(parameter, float(bool(re.search(r"(norm|ln_\w+)\.weight$", name))))
    return shake(vlm, seed).to(device, dtype)


def home(vlm):
    """The device of a model."""
    return vlm.llm.head.device


def words(count, rng):
    return rng.integers(3, VOCAB, count).tolist()


def prompts(seed=0, image_tokens=PATCHES):
    """Rows (ids, target mask, images): one picture; none; two with text between; one at the very end; and
    nothing but the first token."""
    rng = np.random.default_rng(seed)
    picture = [IMAGE] * image_tokens

    def image():
        return rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)

    rows = [([BOS, *picture, *words(3, rng)], (image(),)),
            ([BOS, *words(5, rng)], ()),
            ([BOS, *words(1, rng), *picture, *words(2, rng), *picture, *words(4, rng)], (image(), image())),
            ([BOS, *words(2, rng), *picture], (image(),)),
            ([BOS], ())]
    return [(ids, every_second_word(ids), images) for ids, images in rows]


def every_second_word(ids):
    """A target mask: every second token, where that is text."""
    return [i % 2 == 1 and token != IMAGE for i, token in enumerate(ids)]


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def unpainted(split, count, seed, teacher=None, world=scenes.GRID):
    """Drawn samples whose pictures are left out, and their scenes -> (samples, scenes)."""
    made = []

    def see(some, noise):
        made.extend(some)
        return np.zeros((len(some), 1, 1, 3), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "draw", see)
        samples = scenes.load(split, count, seed, teacher, world=world)
    return samples, made[:count]


def to_batch(rows, device="cpu"):
    return collate(rows, PAD, SIDE).to(device)


def random_completions(rows, group, length, seed=1, device="cpu"):
    """Tokens, the same on every device."""
    return torch.randint(3, VOCAB, (rows, group, length), generator=torch.Generator().manual_seed(seed)).to(device)


@torch.no_grad()
def speak_for(vlm, tokens, often):
    """Turns the head so that all states speak for these tokens, `often` times as much as their mean square."""
    device = home(vlm)
    states = vlm(to_batch(prompts(), device), random_completions(5, 3, 6, seed=7, device=device)).hidden.flatten(0, 2)
    mean = states.mean(0) / states.mean(0).square().sum()
    vlm.llm.lm_head.weight[list(tokens)] += often * mean.to(vlm.llm.lm_head.weight.dtype)


def gradients(module, loss):
    """Name -> gradient of every parameter that got one."""
    module.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def difference(given, wanted):
    """Largest difference, relative to the largest entry of `wanted`; of dicts, that of their worst tensor."""
    if isinstance(wanted, dict):
        assert given.keys() == wanted.keys()
        return max(difference(given[name], wanted[name]) for name in wanted)
    assert given.shape == wanted.shape
    if not wanted.numel():
        return 0.0
    given = given.double().cpu()
    wanted = wanted.double().cpu()
    largest = wanted.abs().max().clamp(min=1e-30)
    return ((given - wanted).abs().max() / largest).item()


def stream(vlm, rows, p, tokens):
    """Normed states of prompt p followed by `tokens` (n,), as one sequence through the x stream alone."""
    batch = to_batch(rows[p:p + 1], home(vlm))
    x = torch.cat([vlm.embed(batch), vlm.llm.embed_tokens(tokens[None])], dim=1)
    return vlm.llm(x, torch.tensor([x.shape[1]], device=x.device))[0][0]


def samples_shown(folder):
    """The samples of a run's report.html, of which the rest tells times."""
    html = (folder / "report.html").read_text()
    return html[html.index('<section id="samples">'):].partition("</section>")[0]
