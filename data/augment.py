"""Random changes to pictures that a contrastive CLIP learns from nothing, so that it does not learn a few of them by
heart: `--augment=flip,crop,colour`.

    flip        left and right change places, for half of the pictures
    crop        a part of .5 to 1 of the area, resized
    colour      brightness, contrast and saturation by a factor of .7 to 1.3, hue by a twentieth of its circle

What a change would make wrong, it must not be used for: digits and text read otherwise mirrored, and so do pictures
whose captions say left and right; `colour` takes away what a caption about colours is about.
"""
from dataclasses import replace

import numpy as np
import torch

from data.sample import to_array

NAMES = ("flip", "crop", "colour")


def names_in(text):
    """--augment -> its names, () for "". Raises ValueError for others, and for one that stands there twice."""
    names = tuple(text.split(",")) if text else ()
    if {*names} - {*NAMES} or len({*names}) < len(names):
        raise ValueError(f"--augment={text} must be some of {', '.join(NAMES)}, each once, as in flip,crop")
    return names


def augmented(samples, size, names, seed, first=0):
    """Samples of one picture each -> the same with (size, size, 3) uint8 arrays, each changed at random in the ways of
    `names`. A function of its arguments: the same seed makes the same changes. first: how many pictures come before
    these, whose changes are drawn and not made."""
    change = _changes(size, names)
    changed = []
    blank = torch.zeros(3, size, size, dtype=torch.uint8)
    with torch.random.fork_rng(devices=[]):         # torchvision draws from torch's own stream
        torch.manual_seed(seed)
        for _ in range(first):
            change(blank)
        for sample in samples:
            pixels = torch.from_numpy(np.array(to_array(sample.images[0], size))).permute(2, 0, 1)
            array = change(pixels).permute(1, 2, 0).contiguous().numpy()
            changed.append(replace(sample, images=(array,)))
    return changed


def _changes(size, names):
    """One function of a (3, size, size) uint8 tensor; the order of `names` makes no difference."""
    from torchvision.transforms import v2           # takes a second that other runs need not wait
    known = {"crop": v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True),
             "flip": v2.RandomHorizontalFlip(),
             "colour": v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05)}
    return v2.Compose([transform for name, transform in known.items() if name in names])
