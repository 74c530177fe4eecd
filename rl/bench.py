"""Where the time of an RL step goes, and what sharing the prompt saves. Ratios inside one run, no absolute promises."""
import time
import zlib

import numpy as np
import torch

from data.sample import Batch, Sample

WORDS = [f"w{n}" for n in range(64)]


def samples(count, image_size):
    """Random pictures under random questions of 12 words."""
    rng = np.random.default_rng(0)
    return [Sample(images=(rng.integers(0, 255, (image_size, image_size, 3), dtype=np.uint8),),
                   question=" ".join(rng.choice(WORDS, 12)), answer="w1") for _ in range(count)]


def varied(sample, text):
    """A reward that differs within a group, so that every completion takes part in the update."""
    return zlib.crc32(text.encode()) / 2**32


def step_text(what, lines):
    """Log lines of RL steps -> what a person reads: the median of a step and of every part."""
    names = [name for name in lines[0] if name.startswith("seconds_")]
    parts = {name: float(torch.tensor([line[name] for line in lines]).median()) for name in names}
    total = sum(parts.values())
    return "\n".join([f"{what}: {total:.3f} s a step, median of {len(lines)}",
                      *(f"  {name.removeprefix('seconds_'):<8}{seconds:8.3f} s {100 * seconds / total:5.1f} %"
                        for name, seconds in parts.items())])


def unshared(batch, completions):
    """The same work without sharing: a row for each completion, its prompt in front. Prompts must not be padded."""
    P, G, C = completions.shape
    ids = torch.cat([batch.ids.repeat_interleave(G, 0), completions.flatten(0, 1)], dim=1)
    target = torch.zeros_like(ids, dtype=torch.bool)
    target[:, -C:] = True
    repeated = torch.arange(P, device=ids.device).repeat_interleave(G)
    pictures = batch.rows(repeated)
    return Batch(ids, batch.length.repeat_interleave(G) + C, target, pictures.pixels, pictures.image_row,
                 pictures.features)


def shared_prefix(vlm, batch, completions, repeats=5):
    """Times forward and backward of the update, shared against one row a completion -> dict.

    tokens: how many times fewer tokens the decoder computes; seconds, seconds_unshared: medians; faster: their ratio;
    reached: `faster` over `tokens`.
    """
    P, G, C = completions.shape
    T = batch.ids.shape[1]
    rows = unshared(vlm.encode(batch), completions)

    def seconds(run):
        times = []
        for _ in range(repeats + 1):
            vlm.zero_grad(set_to_none=True)
            start = time.perf_counter()
            run().logp.sum().backward()
            if completions.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return float(torch.tensor(times[1:]).median())      # the first pays for memory and warm-up

    alone, together = seconds(lambda: vlm(rows)), seconds(lambda: vlm(batch, completions))
    tokens = G * (T + C) / (T + G * C)
    return dict(tokens=tokens, seconds=together, seconds_unshared=alone, faster=alone / together,
                reached=alone / together / tokens)


def prefix_text(what, found):
    """The result of `shared_prefix` as a person reads it."""
    return (f"update, {what}\n  {found['tokens']:.2f} times fewer tokens, {found['faster']:.2f} times faster "
            f"({found['seconds_unshared']:.3f} -> {found['seconds']:.3f} s): {100 * found['reached']:.0f} %")
