"""Where the time of an RL step goes, what sharing the prompt saves, and how long others take.

What counts are ratios within one run; seconds depend on the machine.
"""
import time
import zlib

import numpy as np
import torch

from data.sample import Batch, Sample
from rl import metrics

WORDS = [f"w{n}" for n in range(64)]


def samples(count, image_size):
    """Random pictures under random questions of 12 words."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(count):
        picture = rng.integers(0, 255, (image_size, image_size, 3), dtype=np.uint8)
        question = " ".join(rng.choice(WORDS, 12))
        out.append(Sample(images=(picture,), question=question, answer="w1"))
    return out


def varied(sample, text):
    """A reward that differs within a group, so that every completion takes part in the update."""
    return zlib.crc32(text.encode()) / 2**32


def median(values):
    return float(torch.tensor(values).median())


class WorkClock(metrics.Clock):
    """A Clock that also says what a meter counted in each part. work: name of a part -> its FLOPs."""

    def __init__(self, device, meter):
        super().__init__(device)
        self.meter = meter
        self.work = {}
        self.counted = meter.total

    def lap(self, name):
        super().lap(name)
        self.work[name] = self.work.get(name, 0) + self.meter.total - self.counted
        self.counted = self.meter.total


def floors(work, ceiling, weights, cache):
    """Seconds that the parts of a step take where all goes as fast as large matmuls and copies -> {part: seconds}.

    work: part -> FLOPs; ceiling: FLOP/s of this machine's large matmuls, bytes/s of its large copies. Decoding also
    has to read the decoder's `weights` and the `cache`, bytes in all, whatever it multiplies.
    """
    matmul, copy = ceiling
    found = {name: flops / matmul for name, flops in work.items()}
    found["decode"] = max(found["decode"], (weights + cache) / copy)
    return found


def cache_read(P, T, G, C, slot):
    """Bytes of keys and values that decoding C tokens reads, of P prompts of T tokens and G completions each; `slot`
    bytes a token. The first token comes from the prompt's last state."""
    return P * slot * sum(T + G * step for step in range(1, C))


def parts_of(line):
    """Names of the seconds of a step's parts in its log line."""
    return [name for name in line if name.startswith("seconds_")]


def whole(lines):
    """Log lines of RL steps -> the seconds of each step."""
    return [sum(line[name] for name in parts_of(line)) for line in lines]


def spread_text(seconds):
    """The median and the range of some times."""
    return f"{median(seconds):.3f} s ({min(seconds):.3f}-{max(seconds):.3f})"


def versus_text(name, theirs, ours):
    """Seconds of another program beside ours, which took turns with it, as a line."""
    ratios = [their / our for their, our in zip(theirs, ours)]
    return (f"{name}: {spread_text(theirs)}, {median(ratios):.1f} times as long, turn by turn {min(ratios):.1f} to "
            f"{max(ratios):.1f}")


def decode_text(what, laps, tokens, floors):
    """What `decode_turns` found of ours, {part: seconds of each turn} -> text; tokens: sampled in a turn."""
    seconds = [sum(parts) for parts in zip(*laps.values())]
    text = [f"{what}: {spread_text(seconds)} a rollout, median of {len(seconds)}, {tokens / median(seconds):.0f} "
            "tokens a second"]
    for name, found in laps.items():
        text.append(f"  {name:<8}{median(found):8.3f} s, {median(found) / floors[name]:.1f} times its floor of "
                    f"{floors[name]:.3f} s")
    return "\n".join(text)


def step_text(what, lines, floors):
    """Log lines of RL steps -> text: the median time of a step and of each of its parts, beside their
    floors."""
    medians = {}                        # part of a step -> its seconds
    for name in parts_of(lines[0]):
        medians[name.removeprefix("seconds_")] = median([line[name] for line in lines])
    total = sum(medians.values())
    text = [f"{what}: {spread_text(whole(lines))} a step, median of {len(lines)}"]
    for name, seconds in medians.items():
        line = f"  {name:<8}{seconds:8.3f} s {100 * seconds / total:5.1f} %"
        if floors.get(name):
            line += f", {seconds / floors[name]:.1f} times its floor of {floors[name]:.3f} s"
        text.append(line)
    return "\n".join(text)


def unshared(batch, completions):
    """The same work without sharing: a row for each completion, its prompt in front.

    Prompts must not be padded.
    """
    P, G, C = completions.shape
    prompts = batch.ids.repeat_interleave(G, 0)
    ids = torch.cat([prompts, completions.flatten(0, 1)], dim=1)        # (P G, T + C)
    target = torch.zeros_like(ids, dtype=torch.bool)
    target[:, -C:] = True
    prompt_of_row = torch.arange(P, device=ids.device).repeat_interleave(G)
    pictures = batch.rows(prompt_of_row)
    length = batch.length.repeat_interleave(G) + C
    return Batch(ids=ids, length=length, target=target, pixels=pictures.pixels,
                 image_row=pictures.image_row, features=pictures.features)


def shared_prefix(vlm, batch, completions, repeats=5):
    """Times forward and backward of the update, shared against one row a completion -> dict.

    tokens: how many times fewer tokens the decoder computes; seconds, seconds_unshared: medians;
    faster: their ratio; reached: `faster` over `tokens`.
    """
    P, G, C = completions.shape
    T = batch.ids.shape[1]
    rows = unshared(vlm.encode(batch), completions)

    def seconds(forward):
        times = []
        for _ in range(repeats + 1):
            vlm.zero_grad(set_to_none=True)
            start = time.perf_counter()
            forward().logp.sum().backward()
            if completions.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return median(times[1:])        # the first pays for memory and warm-up

    alone = seconds(lambda: vlm(rows))
    together = seconds(lambda: vlm(batch, completions))
    tokens = G * (T + C) / (T + G * C)
    faster = alone / together
    return dict(tokens=tokens, seconds=together, seconds_unshared=alone, faster=faster,
                reached=faster / tokens)


def prefix_text(what, found):
    """The result of `shared_prefix` as text."""
    fewer = f"{found['tokens']:.2f} times fewer tokens"
    faster = f"{found['faster']:.2f} times faster"
    seconds = f"{found['seconds_unshared']:.3f} -> {found['seconds']:.3f} s"
    return f"update, {what}\n  {fewer}, {faster} ({seconds}): {100 * found['reached']:.0f} %"
